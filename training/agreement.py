"""What processes must decide together, told by way of their processors, so that no device has to be waited for."""

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState


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
