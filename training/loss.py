"""The DINO loss. `forward` is pure; the centre moves only when the loop calls `update_center`."""

import torch
from torch import nn


class DINOLoss(nn.Module):
    r"""Cross-entropy between teacher and student over all pairs of different views, with a centred teacher.

    With T teacher views, V student views (the first T of them the teacher's own crops) and B images, all logits
    crop-major (all images of view 0, then all of view 1, ...), the plain loop is::

        q = softmax((teacher_logits - center) / teacher_temp)       # T views of (B, K)
        p = log_softmax(student_logits / student_temp)              # V views of (B, K)
        terms = [-(q[t] * p[v]).sum(-1).mean() for t in range(T) for v in range(V) if v != t]
        loss = sum(terms) / len(terms)

    As each q sums to one, a term is `logsumexp(s[v]) - q[t] . s[v]`, so that the teachers of a view can be summed
    first and no log-softmax is stored. Computed in fp32 (or fp64) whatever the precision of the logits.

    Args:
        out_dim (`int`): Number of prototypes, K.
        student_temp (`float`, defaults to 0.1): Temperature of the student.
        center_momentum (`float`, defaults to 0.9): Share of the old centre that an update keeps.

    `center` is a saved buffer of shape (1, out_dim). Source: section 3.1 and algorithm 1 of arXiv 2104.14294.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def teacher_probs(self, teacher_logits: torch.Tensor, teacher_temp: float) -> torch.Tensor:
        """The teacher's targets, centred and sharpened: (rows, out_dim) logits -> (rows, out_dim) probabilities."""
        return torch.softmax((teacher_logits.to(self.center.dtype) - self.center) / teacher_temp, dim=-1)

    def forward(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, teacher_temp: float, num_crops: int
    ) -> torch.Tensor:
        """Mean loss of a batch, a scalar.

        Args:
            student_logits: (num_crops * batch, out_dim), crop-major.
            teacher_logits: (num_teacher_crops * batch, out_dim), crop-major; the student's first crops.
            teacher_temp: Temperature of the teacher at this step.
            num_crops: Student crops per image.

        Raises:
            ValueError: if the rows are not a whole number of images.
        """
        batch_size, rest = divmod(len(student_logits), num_crops)
        if rest or not batch_size or not len(teacher_logits) or len(teacher_logits) % batch_size:
            raise ValueError(
                f"student rows must be num_crops = {num_crops} times the batch, and teacher rows a multiple of the "
                f"batch, got {len(student_logits)} and {len(teacher_logits)}"
            )
        targets = self.teacher_probs(teacher_logits.detach(), teacher_temp).unflatten(0, (-1, batch_size))
        logits = student_logits.to(self.center.dtype).unflatten(0, (-1, batch_size)) / self.student_temp
        num_targets = len(targets)

        teachers_of_view = torch.full((num_crops, 1), num_targets, dtype=logits.dtype, device=logits.device)
        teachers_of_view[:num_targets] -= 1
        entropies = (teachers_of_view * torch.logsumexp(logits, dim=-1)).sum()
        agreement = (logits * targets.sum(0)).sum() - (logits[:num_targets] * targets).sum()
        num_terms = num_targets * (num_crops - 1)
        return (entropies - agreement) / (num_terms * batch_size)

    @torch.no_grad()
    def update_center(self, teacher_logits: torch.Tensor, num_rows: int | None = None) -> None:
        """Moves the centre towards the mean of the raw teacher logits of all processes. Call it once a step.

        Args:
            teacher_logits: (rows, out_dim), before centring and temperature; or their sum (1, out_dim).
            num_rows: How many rows were summed, if it is a sum. Default: the rows given.
        """
        num_rows = len(teacher_logits) if num_rows is None else num_rows
        batch_sum = teacher_logits.to(self.center.dtype).sum(0)
        # sum and count travel together, so that processes may hold different numbers of rows
        sum_and_count = torch.cat([batch_sum, batch_sum.new_tensor([num_rows])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sum_and_count)
        self.center.lerp_(sum_and_count[:-1] / sum_and_count[-1], 1 - self.center_momentum)
