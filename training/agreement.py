"""What processes must decide together, told by way of their processors, so that no device has to be waited for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState


@contextmanager
def lost_process_explained(last_checkpoint: Callable[[], str]) -> Iterator[None]:
    """Within, the error that one process gets when another has died is a `ValueError` for the user."""
    try:
        yield
    except RuntimeError as error:  # gloo has none of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ValueError(f"another process of the run has ended; {last_checkpoint()}") from error


class Agreement:
    """Between the processes of a run. To be made by all of them, at the same point.

    Args:
        patience: Seconds that one may wait for another, beyond PyTorch's half hour.
    """

    def __init__(self, patience: float):
        self.group = None
        if PartialState().num_processes > 1:
            timeout = timedelta(seconds=patience) + dist.default_pg_timeout
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def first_of_any(self, reason: str | None) -> str | None:
        """The first process's reason, of those that have one; the same on all."""
        if self.group is None:
            return reason
        given = torch.tensor(reason is not None, dtype=torch.uint8)
        dist.all_reduce(given, dist.ReduceOp.MAX, group=self.group)
        if not given:
            return None
        reasons = [None] * self.group.size()
        dist.all_gather_object(reasons, reason, group=self.group)
        return next(filter(None, reasons))
