"""Accelerate's trackers, TensorBoard, W&B and others: whatever becomes of them, the training goes on as without."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread

import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from modeling_dino.command_line import nearest

from .log import RunLog


PROJECT = "dino-hf"  # the name that trackers know our runs by
MAX_TOLD = 10_000  # lines that wait for a tracker
PATIENCE = 15  # seconds that a run waits for a tracker when all is done; jobs that are told to stop have about 30

logger = logging.getLogger(__name__)


def find_trackers(report_to: list[str]) -> list[str]:
    """The names of the trackers that are wanted.

    Raises:
        ValueError: a name that Accelerate does not know, or a tracker that is not installed.
    """
    if report_to == ["none"]:
        return []
    for name in report_to:
        if name == "none":
            raise ValueError(f"report_to: none stands alone, got {' '.join(report_to)}")
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"report_to: there is no tracker {name}{nearest(name, [*LOGGER_TYPE_TO_CLASS, 'none'])}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise ValueError(f"report_to: {name} is not installed; install it, or give --report_to none")
    return list(dict.fromkeys(report_to))


class Tracker(GeneralTracker):
    """One of Accelerate's trackers, told everything by a thread of its own: neither its errors nor its waiting matter.

    Args:
        name: By which Accelerate knows it.
        output_dir: Folder of the run; TensorBoard's files go into `tensorboard` there.
        first_step: Steps done before; what TensorBoard has of later ones is taken back.
        run_log: Where failures are told.
    """

    requires_logging_directory = False

    def __init__(self, name: str, output_dir: Path, first_step: int, run_log: RunLog):
        self.name, self.output_dir, self.first_step, self.run_log = name, output_dir, first_step, run_log
        self.told: Queue[Callable[[GeneralTracker], None] | None] = Queue(MAX_TOLD)
        self.tracker = Thread(target=self._work, name=name, daemon=True)
        self.is_left_behind = False

    def _make(self) -> GeneralTracker:
        make = LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "tensorboard":
            return make("tensorboard", self.output_dir, purge_step=self.first_step + 1)
        if self.name == "wandb":  # whose variables count for less than arguments do
            folder = os.environ.get("WANDB_DIR", self.output_dir)
            return make(os.environ.get("WANDB_PROJECT", PROJECT), dir=folder)
        return make(PROJECT, *[self.output_dir] * make.requires_logging_directory)

    def _work(self) -> None:
        what = f"the tracker {self.name}"
        with self.run_log.tolerated(what):
            tracker = self._make()
            tracker.start()
            for tell in iter(self.told.get, None):
                with self.run_log.tolerated(what):
                    tell(tracker)
            tracker.finish()

    def _tell(self, tell: Callable[[GeneralTracker], None]) -> None:
        if self.tracker.is_alive():  # it has not failed at its start
            with self.run_log.tolerated(f"the tracker {self.name} is {MAX_TOLD} lines behind: telling it more"):
                self.told.put_nowait(tell)

    def start(self) -> None:
        self.tracker.start()

    def store_init_configuration(self, values: dict) -> None:
        if self.name == "tensorboard":  # its own way makes another run of them, and takes neither lists nor None
            self.log({"settings": f"```\n{yaml.safe_dump(values)}```"}, self.first_step)
        else:
            self._tell(lambda tracker: tracker.store_init_configuration(values))

    def log(self, values: dict, step: int | None = None) -> None:
        self._tell(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        """Waits until it has written all that it was told, but not for long. To do so twice does no harm."""
        with suppress(Full):
            self.told.put_nowait(None)
        self.tracker.join(PATIENCE)
        if self.tracker.is_alive() and not self.is_left_behind:
            logger.warning("the tracker %s did not come to its end in %d s, and is left behind", self.name, PATIENCE)
            self.is_left_behind = True


@contextmanager
def tracked(accelerator: Accelerator) -> Iterator[None]:
    """However the run ends within, its trackers write what they have been told."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
