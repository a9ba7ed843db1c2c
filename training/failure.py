"""An error in the middle of training: the last whole step is saved, and one line says what happened."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from evaluation.interruption import interruption
from evaluation.processes import is_lost_process
from modeling_dino.command_line import one_line


PATIENCE = 20  # seconds in which the process unwinds, after the last whole step is saved

logger = logging.getLogger(__name__)


class RunError(ValueError):
    """An end of the run that says itself what of it is safe."""


@contextmanager
def rescued(save: Callable[[], None], kept: Callable[[], str]) -> Iterator[None]:
    """Context manager that saves the last whole step when the training within fails, whatever the error.

    Args:
        save: Saves it, without help from other processes; raises what it likes if it cannot.
        kept: Says what is safe.

    Raises:
        RunError: says what happened and what is safe, instead of any other Exception.
    """
    try:
        yield
    except RunError as error:
        interruption.end_within(3 * PATIENCE, f"error: {error}", 2)  # it may have to be gathered from all processes
        raise
    except Exception as error:
        interruption.is_failing = True
        what = describe(error)
        try:
            save()
        except Exception:  # the device is gone, the disk is full: the checkpoint before is what there is
            logger.info("the last whole step cannot be saved", exc_info=True)
        message = f"{what}; {kept()}"
        interruption.end_within(PATIENCE, f"error: {message}", 2)
        raise RunError(message) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether this is what a GPU's or the host's allocator, or Python, raises where memory is full."""
    is_of_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_of_host or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def describe(error: Exception) -> str:
    """What happened, in words, and what helps."""
    if is_lost_process(error):
        return "another process of the run has ended"
    if is_out_of_memory(error):
        return (
            f"out of memory ({one_line(error)}): lower --per_device_train_batch_size, raise "
            "--gradient_accumulation_steps as much, or give --gradient_checkpointing"
        )
    if isinstance(error, OSError):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)} (traceback in train.log)"
