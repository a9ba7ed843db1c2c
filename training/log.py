"""`train.log`: all that happened in a run, and when. The console shows a line where the file has the whole story."""

import faulthandler
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from datasets.utils import logging as datasets_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import evaluation
from evaluation.interruption import Stopping
from modeling_dino.command_line import as_arguments, is_notebook, one_line, printable


OURS = Path(evaluation.__file__).parent
TALKING_LIBRARIES = (
    "transformers",
    "datasets",
    "huggingface_hub",
)  # print by themselves, on every process

logger = logging.getLogger(__name__)


def _one_line_warning(message, category, filename, lineno, line=None) -> str:
    if Path(filename).is_relative_to(OURS):  # meant for users, whatever the code
        return str(message)
    return f"{message} ({category.__name__}, {filename}:{lineno})"


class _Console(logging.Handler):
    """Warnings on stderr, above a bar that may be there."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # nobody reads it any more
            line = printable(" ".join(self.format(record).split()))
            tqdm.write(as_arguments(line) if is_notebook() else line, file=sys.stderr)


class _File(logging.FileHandler):
    """`train.log`. A disk that is full ends no training: one line on the console says so, the first time."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.has_failed:
            self.has_failed = True
            reason = one_line(sys.exc_info()[1])
            with suppress(OSError):
                line = f"{self.baseFilename} cannot be written ({reason}), and training continues"
                tqdm.write(line, file=sys.stderr)


class _Formatter(logging.Formatter):
    """Names of files, as they are in messages, may hold what a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def say(text: str) -> None:
    """Write a line on the console, above a bar that may be there, and in the log."""
    try:
        tqdm.write(as_arguments(text) if is_notebook() else text)
        sys.stdout.flush()  # a pipe or a file would keep it
    except OSError:  # whoever read it has gone, and the training goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logger.info(text)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context manager within which libraries draw no bars, neither in a terminal nor in a notebook."""
    libraries = [module for module in (datasets_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


class RunLog(MemoryHandler):
    """What is logged and warned of, by us and by libraries, kept until there is a file to write it to.

    Warnings are also shown on stderr, those of the main process alone.

    Args:
        process_index: Of this process.
        num_processes: Of the run.
    """

    def __init__(self, process_index: int, num_processes: int):
        super().__init__(capacity=math.inf, flushLevel=math.inf, flushOnClose=False)
        self.is_main = process_index == 0
        which = f" [process {process_index}]" if num_processes > 1 else ""
        self.file_format = _Formatter(f"%(asctime)s{which} %(levelname)s %(name)s: %(message)s")
        self.failed = set()
        self.is_crash_logged = False

    @contextmanager
    def listening(self) -> Iterator["RunLog"]:
        """Within, everything is heard, and also what ends it; afterwards Python's logging is as it was."""
        root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("training", "evaluation")]
        handlers = [self, _Console(logging.WARNING)] if self.is_main else [self]
        libraries = [logging.getLogger(name) for name in TALKING_LIBRARIES]
        before = [(library, library.handlers, library.propagate) for library in libraries]
        for library in libraries:
            library.handlers, library.propagate = [], True
        for handler in handlers:
            root.addHandler(handler)
        levels = [part.level for part in ours]
        for part in ours:
            part.setLevel(logging.INFO)
        logging.captureWarnings(True)
        formatted, warnings.formatwarning = warnings.formatwarning, _one_line_warning
        try:
            yield self
        except BaseException as end:  # a SystemExit, too
            logger.info("ended by %s: %s", type(end).__name__, end, exc_info=isinstance(end, Exception))
            raise
        finally:
            logging.captureWarnings(False)
            warnings.formatwarning = formatted
            for part, level in zip(ours, levels):
                part.setLevel(level)
            for handler in handlers:
                root.removeHandler(handler)
            for library, its_handlers, propagate in before:
                library.handlers, library.propagate = its_handlers, propagate
            if self.is_crash_logged:
                faulthandler.disable()
            if self.target:
                with suppress(OSError):  # a disk that is full
                    self.target.close()

    def open(self, output_dir: Path) -> None:
        """Writes what there has been so far to the end of `train.log`, and from now on everything at once."""
        file = _File(output_dir / "train.log")
        file.setFormatter(self.file_format)
        self.setTarget(file)
        self.flush()
        self.capacity = 1
        if self.is_main and not faulthandler.is_enabled():  # a crash, as of a data file that is cut while it is read
            faulthandler.enable(file.stream)
            self.is_crash_logged = True

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """What fails within does not stop the training: one line says so, the first time; the file has tracebacks."""
        try:
            yield
        except Stopping:  # the loop stops next
            logger.info("%s is skipped, as the run is asked to stop", what)
        except Exception as error:  # of whatever library
            logger.info("%s failed", what, exc_info=True)
            if what not in self.failed:
                self.failed.add(what)
                reason = textwrap.shorten(f"{type(error).__name__}: {one_line(error)}", 200)
                logger.warning("%s failed, and training continues (traceback in train.log): %s", what, reason)
