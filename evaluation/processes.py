"""Work that several processes share, so that one that fails takes the others along and says why."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from modeling_dino.command_line import one_line


T = TypeVar("T")


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
