"""The DINO loss, and KoLeo. `forward` is pure; the centre moves only when the loop calls `update_center`."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from .fused_loss import check_rows


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@torch.no_grad()
def sinkhorn_knopp(logits: torch.Tensor, temp: float, num_iterations: int = 3) -> torch.Tensor:
    """Targets that use all prototypes alike: (rows, out_dim) logits -> (rows, out_dim) probabilities.

    Of the rows of all processes together, the plain loop is::

        q = exp(logits / temp)
        for _ in range(num_iterations):
            q = q / q.sum(0, keepdim=True) / out_dim      # every prototype has the same share of the targets
            q = q / q.sum(1, keepdim=True) / num_rows     # every row has
        return q * num_rows

    Done on logarithms, so that nothing overflows and no prototype is divided by zero; what all columns, or all rows,
    are divided by alike cancels. Processes may hold different numbers of rows. Source: SwAV (arXiv 2006.09882),
    section 3.2; it replaces the centre in DINOv2 (arXiv 2304.07193), section 4.
    """
    scores = logits / temp
    rows = scores.new_zeros(len(scores), 1)
    for _ in range(num_iterations):
        columns = torch.logsumexp(scores - rows, dim=0)
        if _is_distributed():  # logsumexp over processes
            largest = columns.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            sums = (columns - largest).exp()
            dist.all_reduce(sums)
            columns = sums.log() + largest
        rows = torch.logsumexp(scores - columns, dim=1, keepdim=True)
    return (scores - columns - rows).exp()


def koleo_loss(features: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Pushes each image's features away from their nearest neighbour: (batch, hidden) of one crop -> a scalar.

    With `x` the features, each divided by its norm, the plain loop is::

        distances = [min(|x[i] - x[j]| for j in range(batch) if j != i) for i in range(batch)]
        loss = mean(-log(distance + eps) for distance in distances)

    The neighbours are those of the process's own batch. Computed in fp32 (or fp64) whatever the precision of the
    features, also under autocast. Source: section 3 of arXiv 1806.03198; DINOv2 (arXiv 2304.07193), section 4.

    Raises:
        ValueError: if there is one image alone.
    """
    if len(features) < 2:
        raise ValueError(f"KoLeo needs features of at least 2 images, got {len(features)}")
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        features = nn.functional.normalize(features, dim=-1)
        with torch.no_grad():
            similarities = (features @ features.T).fill_diagonal_(-2.0)  # below all cosines
            neighbours = similarities.argmax(1)
        distances = torch.linalg.vector_norm(features - features[neighbours], dim=-1)
        return -torch.log(distances + eps).mean()


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
        centering (`"ema"` or `"sinkhorn_knopp"`, defaults to `"ema"`): With the latter, q is by `sinkhorn_knopp` of
            the teacher's rows, of all views and processes together, and does not see the centre.

    `center` is a saved buffer of shape (1, out_dim). Source: section 3.1 and algorithm 1 of arXiv 2104.14294.
    """

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: Literal["ema", "sinkhorn_knopp"] = "ema",
    ):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.register_buffer("center", torch.zeros(1, out_dim))

    def teacher_probs(self, teacher_logits: torch.Tensor, teacher_temp: float) -> torch.Tensor:
        """The teacher's targets, centred and sharpened: (rows, out_dim) logits -> (rows, out_dim) probabilities.

        Of Sinkhorn-Knopp, to be called by all processes, with the rows of one batch.
        """
        teacher_logits = teacher_logits.to(self.center.dtype)
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(teacher_logits, teacher_temp)
        return torch.softmax((teacher_logits - self.center) / teacher_temp, dim=-1)

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
            ValueError: rows of a part of an image, or of fewer than two crops.
        """
        return self.cross_entropy(student_logits, self.teacher_probs(teacher_logits.detach(), teacher_temp), num_crops)

    def cross_entropy(self, student_logits: torch.Tensor, targets: torch.Tensor, num_crops: int) -> torch.Tensor:
        """The loss for `targets` that `teacher_probs` has given already; otherwise as `forward`."""
        check_rows(len(student_logits), len(targets), num_crops)
        batch_size = len(student_logits) // num_crops
        targets = targets.unflatten(0, (-1, batch_size))
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
        if _is_distributed():
            dist.all_reduce(sum_and_count)
        self.center.lerp_(sum_and_count[:-1] / sum_and_count[-1], 1 - self.center_momentum)
