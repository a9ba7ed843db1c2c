"""What processes must decide together, told by way of their processors, so that no device has to be waited for."""

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState


class Agreement:
    """Between the processes of a run. To be made by all of them, at the same point.

    Args:
        patience: Seconds that one may wait for another, beyond PyTorch's half hour; None for a process that asks
            nobody, as others may have ended.
    """

    def __init__(self, patience: float | None):
        self.group, self.is_alone = None, patience is None
        if not self.is_alone and PartialState().num_processes > 1:
            timeout = timedelta(seconds=patience) + dist.default_pg_timeout
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def of_all(self, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The tensors of every process, in their order: 1-dimensional, on the CPU, and of one size in all of them."""
        if self.group is None:
            return [tensors]
        packed = torch.cat(list(tensors.values()))
        gathered = [torch.empty_like(packed) for _ in range(self.group.size())]
        dist.all_gather(gathered, packed, group=self.group)
        sizes = [len(tensor) for tensor in tensors.values()]
        return [dict(zip(tensors, each.split(sizes))) for each in gathered]

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
