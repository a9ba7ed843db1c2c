"""Work that several processes share, so that one that fails takes the others along and says why."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from modeling_dino.command_line import one_line


T = TypeVar("T")


def connect_processes() -> None:
    """Makes the processes that a launcher started know each other; the first thing that a command does.

    On CPU too: by itself, `PartialState` does not look for `ACCELERATE_USE_CPU`, and each process takes itself for the
    only one.

    Raises:
        ValueError: processes that Accelerate does not see.
    """
    num_processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes
    num_started = int(os.environ.get("WORLD_SIZE") or 1)
    if num_processes != num_started:
        raise ValueError(
            f"the launcher started {num_started} processes, Accelerate sees {num_processes}; on CPU, set "
            "ACCELERATE_USE_CPU=true"
        )


def of_all_processes(compute: Callable[[], T], what: str) -> list[T]:
    """What `compute` returns in each process, in their order, on all of them.

    Raises:
        ValueError: on all other processes, that one did not get `what`; on that one, whatever it was.
    """
    state = PartialState()
    try:
        result, failure = compute(), None
    except Exception as error:
        result, failure = None, error
    # the others wait for this one's result, and so are told that there is none
    results = [(result, failure and one_line(failure))]
    results = gather_object(results) if state.num_processes > 1 else results
    if failure is not None:
        raise failure
    for process, (_, reason) in enumerate(results):
        if reason is not None:
            raise ValueError(f"process {process} did not get {what}: {reason}")
    return [result for result, _ in results]


def is_lost_process(error: Exception) -> bool:
    """Return whether this is the error that one process gets when another has died."""
    # gloo has none of its own
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


@contextmanager
def lost_process_explained(what_is_safe: str) -> Iterator[None]:
    """Context manager within which the error that one process gets when another has died is a ValueError."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise ValueError(f"another process has ended; {what_is_safe}") from error
