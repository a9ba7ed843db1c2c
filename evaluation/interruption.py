"""Signals, and how a process ends: at once where nothing would be lost, after the step where something would.

This module imports nothing heavy, so that a command can listen before it imports the libraries.
"""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


EXIT_CODE = 75  # "temporary failure; try again", in sysexits.h
SIGNALS = tuple(  # scancel and preemption, Ctrl-C, Slurm's --signal=USR1@..., a terminal that is closed
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
LAUNCHER_ENDED = "its launcher's end"


class Interrupted(KeyboardInterrupt):
    """The end of a run that was asked to stop, and has saved what it needs to resume. The message says how."""

    exit_code = EXIT_CODE


class Stopping(Exception):
    """The end of something that a run can do without when it is asked to stop."""


def is_launched() -> bool:
    """Return whether this is a child of torchrun or `accelerate launch`; a shell may end before its children."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:  # accelerate sets nothing where it starts one process
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:  # not on Linux
        return False
    names = {word.rpartition(b"/")[2] for word in words}
    return b"accelerate.commands.launch" in words or not names.isdisjoint({b"accelerate", b"accelerate-launch"})


def _is_orphan() -> bool:
    """Return whether init has adopted this process, whose launcher ended before it could be noticed."""
    if os.getppid() != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:  # in a container, the launcher may be process 1 itself
        return not any(word in Path("/proc/1/cmdline").read_bytes() for word in (b"accelerate", b"torch", b"python"))
    except OSError:
        return False


class Interruption:
    """Signals that this process has received, and what becomes of them.

    A command calls `listen` first of all. A thread then hears the signals, even while the main thread is busy within
    C code. It ends the process at once, in one line, except within `deferred()`: there it notes the first signal in
    `name`, for the training loop to look at after each step, and a second Ctrl-C ends the process at once.

    Without `listen`, as in a notebook, signals are heard within `deferred()` alone, and a second Ctrl-C raises
    KeyboardInterrupt.

    Attributes:
        name: The first signal that was deferred, or the launcher's end; None if there was none.
        is_failing: Whether an error has already ended what the process was at, which will say so.
        remark: What the line says of the state of things after "stopped by SIGINT".
    """

    def __init__(self):
        self.name: str | None = None
        self.remark = ""
        self.is_failing = False
        self._since = 0.0
        self._command: str | None = None  # which listens; None in a program or notebook of somebody else's
        self._exit_code: int | None = None
        self._launcher: int | None = None
        self._is_deferring = False

    def listen(self, command: str, exit_code: int | None = None, remark: str = "") -> None:
        """Hear signals from now to the end of the process, and notice when its launcher ends.

        A second call changes the arguments alone.

        Args:
            command: The name that lines on stderr begin with.
            exit_code: What to exit with when a signal ends the process at once. Default: 128 + the signal's number.
            remark: See `Interruption`.
        """
        is_listening = self._command is not None
        self._command, self._exit_code, self.remark = command, exit_code, remark
        if is_listening:
            return
        if sys.platform == "win32":  # which has no such signals
            return
        self._launcher = os.getppid() if is_launched() else None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # a signal to a worker is not one to this process
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._hear, args=(reader,), daemon=True, name="signals").start()

    def _hear(self, reader: int) -> None:
        while True:
            heard, _, _ = select.select([reader], [], [], 0.5)
            for number in os.read(reader, 64) if heard else b"":
                if number in SIGNALS:
                    self._react(signal.Signals(number))
            if self._launcher is not None and (os.getppid() != self._launcher or _is_orphan()):
                self._launcher = None
                self._react(LAUNCHER_ENDED)

    def _react(self, asked: signal.Signals | str) -> None:
        name = asked if isinstance(asked, str) else asked.name
        code = 128 + (signal.SIGTERM if isinstance(asked, str) else asked)
        if not self._is_deferring:
            self._end(f"stopped by {name}{self.remark}", self._exit_code or code)
        elif self._note(name) and not self.is_failing:
            again = ", Ctrl-C again to stop now" if name == "SIGINT" else ""
            self._tell(f"{name} received: stopping after this step{again}")
        elif self._is_second(name):
            self._end("stopped now, before the step was done" + self.remark, code)

    def _note(self, name: str) -> bool:
        """Return whether this is the first."""
        is_first = self.name is None
        if is_first:
            self.name, self._since = name, time.monotonic()
        return is_first

    def _is_second(self, name: str) -> bool:
        """Return whether somebody has pressed Ctrl-C again. Launchers send it on, besides the terminal."""
        patience = 0.3 if self._launcher is None else 1.0
        return name == "SIGINT" and time.monotonic() - self._since > patience

    def announce(self, text: str) -> None:
        """Say on a terminal what the process is about to do; a log needs no such line."""
        if os.isatty(2) and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, f"{self._command}: {text}\n".encode())

    def _tell(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            begin = "\n" if os.isatty(2) else ""  # below a progress bar
            # as `printable` does, whose package takes seconds to import
            line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
            with contextlib.suppress(OSError):
                os.write(2, f"{begin}{self._command}: {line}\n".encode(errors="backslashreplace"))

    def _end(self, text: str, code: int) -> None:
        timer = threading.Timer(1, os._exit, (code,))  # a terminal that was stopped by Ctrl-S takes no line
        timer.daemon = True
        timer.start()
        try:
            self._tell(text)
            kill_children()
        finally:
            os._exit(code)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager within which the first signal is noted instead of ending the process.

        After an error, or when the run has stopped, signals are still noted: a launcher may send them because another
        process has ended, before this one has said why. Outside the main thread, where Python hears no signals, none
        is noted.
        """
        previous = {}
        if self._command is None and threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            previous = {number: signal.signal(number, self._note_in_main_thread) for number in heard}
        self._is_deferring, self.is_failing = True, False
        try:
            yield
            self._is_deferring = False
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)
            if self._command is None:
                self.name = None  # it is not for whatever this program does next

    def _note_in_main_thread(self, number: int, _) -> None:
        name = signal.Signals(number).name
        if not self._note(name) and self._is_second(name):
            raise KeyboardInterrupt

    def end_within(self, seconds: float, text: str, code: int) -> None:
        """End the process with a line and an exit code, unless it ends earlier; no-op outside of a command."""
        if self._command is not None:
            timer = threading.Timer(seconds, self._end, (text, code))
            timer.daemon = True
            timer.start()

    @contextmanager
    def stopping(self, module) -> Iterator[None]:
        """Context manager within which forward passes of a PyTorch module end with `Stopping` after a signal."""

        def check(*_) -> None:
            if self.name is not None:
                raise Stopping(f"stopping, as {self.name} asks")

        handle = module.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()


interruption = Interruption()  # of this process


def end_with_parent(is_of_main_thread: bool) -> None:
    """Make a data loader's worker ignore signals, and end when its parent does.

    Signals go to all processes of a job, and the parent may still need the batches that are underway.

    Args:
        is_of_main_thread: Whether the parent's main thread started it; Linux tells it of the end of that thread.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # a fork server is not the parent; where this says nothing, PyTorch's worker looks every few seconds
    if sys.platform == "linux" and is_of_main_thread and os.getppid() == parent.pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not parent.is_alive():
        os._exit(1)


def kill_children() -> None:
    """Kill the workers that this process has started: those that ignore SIGTERM would be waited for forever."""
    with contextlib.suppress(Exception):  # of a list that another thread changes
        for process in multiprocessing.active_children():
            process.kill()
