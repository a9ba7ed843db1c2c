"""A data loader whose workers never outlive what uses them, and whose losses are errors that say what happened."""

import atexit
import gc
import multiprocessing.util  # noqa: F401
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait

from torch.utils.data import DataLoader

from .interruption import end_with_parent


MAX_WORKERS = 1024  # of one process; more would only exhaust the machine
_HINTS = {
    "SIGKILL": ", as when memory runs out; lower --num_workers",
    "SIGBUS": ": a data file was cut while it was read, or shared memory (/dev/shm) is full",
}
_workers: set = set()  # of all loaders that have not come to their end


class Loader(DataLoader):
    """PyTorch's DataLoader, the end of whose workers is certain.

    A worker that is killed is a ValueError where its batch is waited for, and not wherever the process happens to be.
    When iteration ends early, by an error or otherwise, the workers are killed instead of being asked and waited for;
    persistent ones remain until the loader goes. When the process ends, by whatever cause, they end.
    """

    def __init__(self, *args, num_workers: int = 0, **kwargs):
        if not 0 <= num_workers <= MAX_WORKERS:
            raise ValueError(f"num_workers must be between 0 and {MAX_WORKERS}, got {num_workers}")
        super().__init__(*args, num_workers=num_workers, **kwargs)

    def __iter__(self) -> Iterator:
        is_of_main_thread = threading.current_thread() is threading.main_thread()
        self.worker_init_fn = partial(_prepare_worker, is_of_main_thread)
        with _sigchld_kept():
            batches = super().__iter__()
        workers = getattr(batches, "_workers", [])  # of an earlier epoch too, where they persist
        _workers.update(workers)
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    if not self.persistent_workers:
                        _workers.difference_update(workers)
                    return
                except Exception as error:
                    # a connection breaks before the system has taken the worker apart
                    is_broken = isinstance(error, (ConnectionError, EOFError))
                    if lost := _explain_lost(workers, 5 if is_broken else 0.2):
                        raise ValueError(lost) from error
                    raise
                yield batch
        except BaseException as error:
            if not (self.persistent_workers and isinstance(error, GeneratorExit)):
                _kill(batches)
            raise


def _kill(batches: Iterator) -> None:
    """End an iterator's workers without PyTorch's farewell, which waits for locks that a killed worker may hold."""
    workers = getattr(batches, "_workers", [])
    for worker in workers:
        worker.kill()
    if workers:
        _workers.difference_update(workers)
        batches._shutdown = True
        if getattr(batches, "_pin_memory", False):
            batches._pin_memory_thread_done_event.set()


@atexit.register  # before that of multiprocessing, which would wait for workers that ignore its signal
def _kill_all() -> None:
    for worker in _workers:
        worker.kill()


def _prepare_worker(is_of_main_thread: bool, _: int) -> None:
    end_with_parent(is_of_main_thread)
    sys.excepthook = _except_lost_parent
    # the memory of all that has been imported stays shared with the parent; a garbage collection would copy it
    gc.freeze()


def _except_lost_parent(kind: type[BaseException], error: BaseException, traceback) -> None:
    """Print what a thread of a worker fails with, unless it spoke to a parent that was killed."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    """Context manager within which PyTorch sets no handler that raises in mid-step when a worker is killed."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler: Callable | int = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _explain_lost(workers: list, patience: float) -> str | None:
    """Return how a worker has ended that should not have; None if all remain for `patience` seconds."""
    ready = wait([worker.sentinel for worker in workers], patience)  # for one that has just been killed
    for worker in workers:
        if worker.sentinel in ready:
            worker.join(5)  # its files are closed a moment before it has an exit code
        if worker.exitcode is not None and worker.exitcode < 0:
            name = signal.Signals(-worker.exitcode).name
            return f"a data loader worker (process {worker.pid}) was killed by {name}{_HINTS.get(name, '')}"
        if worker.exitcode:
            return f"a data loader worker (process {worker.pid}) ended with exit code {worker.exitcode}"
    return None
