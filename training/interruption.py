"""A run that is told to stop finishes its step, writes a checkpoint, and says by its exit code that it can go on."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


EXIT_CODE = 75  # "temporary failure; try again", in sysexits.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # scancel and preemption, Ctrl-C, Slurm's --signal=USR1@...


def is_launched() -> bool:
    """Whether this is a child of torchrun or `accelerate launch`, and not of a shell, whose end is not ours."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        return (
            b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        )  # which starts one process by itself
    except OSError:  # not on Linux
        return False


class Interruption:
    """What has been asked for, so far. To be made while the launcher is there."""

    def __init__(self):
        self._signal: str | None = None
        self._launcher = os.getppid() if is_launched() else None

    @property
    def name(self) -> str | None:
        """The signal's, if there was one. A launcher that was killed leaves processes that nothing else would end."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return "its launcher's end"
        return self._signal

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, the signals are noted instead of ending the process; a second Ctrl-C ends it at once.

        Outside the main thread, where Python lets nobody listen to signals, none will be noted.

        After an error under a launcher, SIGTERM is noted until the process ends: the launcher may send it as others
        have failed, too, before this one has said why.
        """
        is_main = threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, self._note) for number in SIGNALS} if is_main else {}
        try:
            yield
        except Exception:
            if self._launcher is not None:
                previous.pop(signal.SIGTERM, None)
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name


def leave_signals_to_parent() -> None:
    """For a loader's workers: signals go to all processes of a job, and the batches underway are still needed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
