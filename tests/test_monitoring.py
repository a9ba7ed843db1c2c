"""What can be seen of a run, and that nothing that only shows it can stop it; by the real commands."""

import logging
import re
import warnings

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.log import RunLog

from .commands import command, scripted, trained
from .test_training import losses, metrics, recipe  # noqa: F401


def flags(recipe, dataset, output_dir, *more) -> tuple:  # noqa: F811
    return "--config", recipe, "--dataset_name", dataset, "--output_dir", output_dir, *more


@pytest.fixture(scope="module")
def plain(recipe, parquet_folder, tmp_path_factory):  # noqa: F811
    """Ten steps with k-NN and without trackers."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    trained(*flags(recipe, parquet_folder, folder, "--eval_steps", "5", "--report_to", "none"))
    return folder


def scalars(output_dir) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(output_dir / "tensorboard"))
    events.Reload()
    return {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


def numbers(output_dir) -> dict[tuple[str, int], float]:
    return {
        (name, line["step"]): value
        for line in metrics(output_dir)
        for name, value in line.items()
        if name not in ("step", "skipped", "verdict")
    }


@pytest.mark.slow
def test_short_run_says_little_and_the_log_says_all(recipe, parquet_folder, tmp_path):  # noqa: F811
    more = ("--max_steps", "700", "--logging_steps", "20", "--eval_steps", "100", "--save_steps", "350")
    finished = command(*flags(recipe, parquet_folder, tmp_path, *more))
    assert finished.returncode == 0, finished.stderr
    # six lines of what is trained, then the first step, six lines of progress and one of their start, k-NN, the end
    assert len((finished.stdout + finished.stderr).splitlines()) <= 31, finished.stdout + finished.stderr
    assert "step 700 of 700: loss" in finished.stdout and "00:00 left" in finished.stdout
    log = (tmp_path / "train.log").read_text()
    for step in range(20, 701, 20):
        assert f"step {step} of 700: loss" in log
    for words in (f"torch {torch.__version__.split('+')[0]}", "max_steps: 700", "step 100: k-NN (k = "):
        assert words in log
    assert scalars(tmp_path) == pytest.approx(numbers(tmp_path), rel=1e-6)


KILLED = """
import os, time
from training import figures
from training.monitor import Monitor
from training.__main__ import main
count, counted = Monitor.count, []

def count_or_die(self, images):
    counted.append(images)
    if len(counted) == 9:
        time.sleep(2)  # until the tracker has written what it was told
        os._exit(9)
    count(self, images)

Monitor.count, figures.SHARE_OF_TIME = count_or_die, 1e9
main()
"""


@pytest.mark.slow
def test_resumed_run_goes_on_in_its_log_and_in_tensorboard(plain, recipe, parquet_folder, tmp_path):  # noqa: F811
    """Killed after step 8, whose last checkpoint is of step 6: what there was of 7 and 8 is taken back."""
    argv = flags(recipe, parquet_folder, tmp_path, "--eval_steps", "5")
    assert scripted(KILLED, tmp_path, *argv).returncode == 9
    assert ("loss", 8) in scalars(tmp_path)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"attention", "crops", "curves"}
    trained(*argv, "--resume_from_checkpoint", "latest")
    assert losses(tmp_path) == losses(plain)
    assert scalars(tmp_path) == pytest.approx(numbers(tmp_path), rel=1e-6)
    log = (tmp_path / "train.log").read_text()
    assert log.count("settings:") == 2 and "steps 1 to 10 of a run" in log and "steps 7 to 10 of a run" in log
    trained(*argv, "--overwrite_output_dir", "--max_steps", "2", "--eval_steps", "2")
    assert scalars(tmp_path) == pytest.approx(numbers(tmp_path), rel=1e-6)
    assert (tmp_path / "train.log").read_text().count("settings:") == 1


WAITING = """
from contextlib import contextmanager
from types import SimpleNamespace
from training import monitor
from training.__main__ import main
now, steps, count, waiting = [0.0], [], monitor.Monitor.count, monitor.Monitor.waiting
monitor.time = SimpleNamespace(perf_counter=lambda: now[0])

def count_by_clock(self, images):
    steps.append(images)
    now[0] += 1
    count(self, images)

@contextmanager
def waiting_by_clock(self):
    with waiting(self):
        now[0] += 3 if len(steps) >= {slow} else 0
        yield

monitor.Monitor.count, monitor.Monitor.waiting = count_by_clock, waiting_by_clock
main()
"""


@pytest.mark.parametrize(("slow", "step"), [(0, 52), (60, 102)])
def test_waiting_for_data_is_advised_on_after_many_steps(recipe, parquet_folder, tmp_path, slow, step):  # noqa: F811
    """Steps take 1 s, and from `slow` on batches 3 s, as long as a clock of our own says; windows are of 50 steps."""
    argv = flags(recipe, parquet_folder, tmp_path / "run", "--max_steps", 110, "--logging_steps", 2)
    finished = scripted(WAITING.format(slow=slow), tmp_path, *argv, "--report_to", "none", "--save_steps", 0)
    assert finished.returncode == 0, finished.stderr
    found = re.findall(r"^step (\d+): (\d+)% of the time is spent waiting for data: ", finished.stdout, re.M)
    share = 75 if slow == 0 else round(100 * 3 * 42 / (50 + 3 * 42))
    assert found == [(str(step), str(share))]


TRACKER = """
import time
from accelerate.tracking import GeneralTracker, register_tracker_class
from training import trackers
from training.__main__ import main

class Bad(GeneralTracker):
    name, requires_logging_directory, tracker = "bad", False, None
    def __init__(self, project): self.lines = 0
    def start(self): {start}
    def log(self, values, step=None): {log}
    def finish(self): {finish}

register_tracker_class(Bad)
trackers.PATIENCE = 2
main()
"""
FINE = {"start": "pass", "log": "pass", "finish": "pass"}


@pytest.mark.parametrize(
    "fault", [pytest.param("start", marks=pytest.mark.slow), "log", pytest.param("finish", marks=pytest.mark.slow)]
)
def test_tracker_that_fails_is_said_once_and_changes_nothing(plain, recipe, parquet_folder, tmp_path, fault):  # noqa: F811
    script = TRACKER.format(**FINE | {fault: "raise RuntimeError('no such host')"})
    argv = flags(recipe, parquet_folder, tmp_path, "--eval_steps", "5", "--report_to", "bad", "tensorboard")
    finished = scripted(script, tmp_path, *argv)
    assert finished.returncode == 0, finished.stderr
    [line] = finished.stderr.splitlines()
    assert line.startswith("the tracker bad failed, and training continues") and "RuntimeError: no such host" in line
    assert "Traceback" in (tmp_path / "train.log").read_text()
    assert losses(tmp_path) == losses(plain)
    assert scalars(tmp_path) == pytest.approx(numbers(tmp_path), rel=1e-6)  # the other one does not suffer


@pytest.mark.parametrize("where", ["start", "log"])
def test_tracker_that_hangs_is_left_behind(plain, recipe, parquet_folder, tmp_path, where):  # noqa: F811
    script = TRACKER.format(**FINE | {where: "time.sleep(1000)"})
    argv = flags(recipe, parquet_folder, tmp_path, "--eval_steps", "5", "--report_to", "bad")
    finished = scripted(script, tmp_path, *argv)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines() == ["the tracker bad did not come to its end in 2 s, and is left behind"]
    assert losses(tmp_path) == losses(plain)


NO_PLACE = """
import sys
from training.__main__ import main, train
module = sys.modules[train.__module__]
begin = module.OutputFolder.begin
def begin_and_fill(folder, *args, **kwargs):
    begin(folder, *args, **kwargs)
    for name in ("tensorboard", "figures"):
        (folder.path / name).write_text("")
module.OutputFolder.begin = begin_and_fill
main()
"""


def test_no_place_for_tensorboard_or_figures_changes_nothing(plain, recipe, parquet_folder, tmp_path):  # noqa: F811
    """Files come to lie where their folders would, after the run has looked."""
    argv = flags(recipe, parquet_folder, tmp_path / "run", "--eval_steps", "5")
    finished = scripted(NO_PLACE, tmp_path, *argv)
    assert finished.returncode == 0, finished.stderr
    for what in ("the tracker tensorboard", "drawing crops.png", "drawing curves.png", "drawing attention.png"):
        assert finished.stderr.count(f"{what} failed, and training continues") == 1, finished.stderr
    assert len(finished.stderr.splitlines()) == 4
    assert losses(tmp_path / "run") == losses(plain)
    assert "curves.png" not in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], "report_to: there is no tracker tensorbord, did you mean tensorboard?"),
        (["none", "tensorboard"], "report_to: none stands alone, got none tensorboard"),
        (["clearml"], "report_to: clearml is not installed"),
    ],
)
def test_tracker_that_is_not_there_is_refused(recipe, parquet_folder, tmp_path, names, message):  # noqa: F811
    finished = command(*flags(recipe, parquet_folder, tmp_path / "run", "--report_to", *names))
    [line] = finished.stderr.splitlines()
    assert finished.returncode == 2 and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_run_is_told_to_other_trackers_offline(plain, recipe, parquet_folder, tmp_path, name):  # noqa: F811
    pytest.importorskip(name)
    argv = flags(recipe, parquet_folder, tmp_path / "run", "--eval_steps", "5", "--report_to", name)
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    finished = command(*argv, **environment)
    assert finished.returncode == 0 and "failed" not in finished.stderr, finished.stderr
    assert losses(tmp_path / "run") == losses(plain)
    written = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb") if name == "wandb" else
                   (tmp_path / "trackio").glob("*.db"))  # fmt: skip
    assert written and written[0].stat().st_size > 1000


BROKEN_KNN = """
import os
from evaluation import features
share, calls = features._extract_share, []

def extract(*args, **kwargs):
    calls.append(0)
    if {first} <= len(calls) < {last} and os.environ.get("RANK", "0") == "{rank}":
        raise OSError("the network is gone")
    return share(*args)

features._extract_share = extract
from training.__main__ import main; main()
"""


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_knn_that_fails_is_said_and_tried_again(plain, recipe, parquet_folder, tmp_path, num_processes):  # noqa: F811
    """At step 5, of one process alone, between the bank and the test images; at step 10 it works again."""
    script = BROKEN_KNN.format(first=4, last=5, rank=num_processes - 1)
    argv = flags(recipe, parquet_folder, tmp_path / "run", "--eval_steps", "5", "--report_to", "none")
    argv += ("--per_device_train_batch_size", 8 // num_processes)
    finished = scripted(script, tmp_path, *argv, processes=num_processes)
    assert finished.returncode == 0, finished.stderr
    said = [line for line in finished.stderr.splitlines() if "k-NN" in line]
    assert len(said) == 1 and said[0].startswith("k-NN at step 5 failed, and training continues"), finished.stderr
    assert "the network is gone" in said[0]
    log = (tmp_path / "run/train.log").read_text()
    assert log.count("k-NN at step 5 failed\nTraceback") == num_processes
    assert [line["step"] for line in metrics(tmp_path / "run") if "knn_10_top1" in line] == [0, 10]
    if num_processes == 1:
        assert losses(tmp_path / "run") == losses(plain)


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_first_knn_that_fails_stops_the_start(recipe, parquet_folder, tmp_path, num_processes):  # noqa: F811
    script = BROKEN_KNN.format(first=1, last=99, rank=num_processes - 1)
    argv = flags(recipe, parquet_folder, tmp_path / "run", "--eval_steps", "5", "--report_to", "none")
    finished = scripted(script, tmp_path, *argv, processes=num_processes)
    said = [line for line in finished.stderr.splitlines() if line.startswith("dino-train: error: ")]
    assert finished.returncode != 0 and len(said) == num_processes, finished.stderr
    assert all("the network is gone" in line for line in said)


def test_attention_is_drawn_of_held_out_images_else_of_training_images(plain, recipe, flat_folder, tmp_path):  # noqa: F811
    trained(*flags(recipe, flat_folder, tmp_path, "--per_device_train_batch_size", "4", "--report_to", "none"))
    for folder in (plain, tmp_path):
        with Image.open(folder / "figures/attention.png") as picture:  # four images, two heads
            assert picture.width / picture.height == pytest.approx((1.3 * 4) / (1.3 * 4 + 0.25), rel=0.02)


def test_warnings_are_shown_and_logged(tmp_path, capsys, recwarn):
    """And of other processes only logged; afterwards all is as before."""
    handlers = list(logging.getLogger().handlers)
    for process in (0, 1):
        run_log = RunLog(process, 2)
        with run_log.listening(), warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)
            warnings.warn(f"early {process}")
            run_log.open(tmp_path)
            logging.getLogger("datasets").warning("late %d", process)
            logging.getLogger("training.data").info("detail %d", process)
    shown, log = capsys.readouterr().err, (tmp_path / "train.log").read_text()
    assert "early 0" in shown and shown.count("late 0") == 1
    assert not any(words in shown for words in ("early 1", "late 1", "detail"))
    for words in ("early 0", "late 0", "detail 0", "early 1", "late 1"):
        assert log.count(words) >= 1
    assert "[process 1] WARNING datasets: late 1" in log
    assert logging.getLogger().handlers == handlers
