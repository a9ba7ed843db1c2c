"""The DINO loss together with the head's last layer: the student's logits, (rows, out_dim), never exist as a whole.

Prototypes are taken a chunk at a time, forward and again backward, where a chunk's logits are computed anew: one
matrix product in four, which spares copies of the largest tensor there is, and of the normalised prototypes.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable


CHUNK_SIZE = 4096  # prototypes, with whose logits a core's cache can deal


class FusedLoss(NamedTuple):
    """Of a batch, and of the targets of the crops that were given, (rows, out_dim); only `loss` has a gradient."""

    loss: torch.Tensor  # scalar
    target_entropies: torch.Tensor  # (rows,), in nats
    largest: torch.Tensor  # (rows,), the prototype that a target is largest at
    target_sum: torch.Tensor  # (out_dim,), over the rows


@torch.compiler.disable  # its loop is as fast without, and would be unrolled
def fused_cross_entropy(
    bottleneck: torch.Tensor,
    prototypes: nn.Module,
    targets: torch.Tensor,
    num_crops: int,
    student_temp: float,
    crops: range | None = None,
) -> FusedLoss:
    """`DINOLoss.cross_entropy` of `prototypes(bottleneck)`, for `targets` that `teacher_probs` has given.

    It is a sum over the student's crops, of which some may be given alone: `crops` says which.

    Under autocast, matrices are multiplied in its precision, as they would be by the layer itself; all else is
    computed in the precision of the targets.

    Args:
        bottleneck: (len(crops) * batch, dim), crop-major: what the last layer is given.
        prototypes: The last layer, a `DINOPrototypes`.
        targets: (num_teacher_crops * batch, out_dim), crop-major; those of the student's first crops.
        num_crops: Student crops per image.
        student_temp: Temperature of the student.
        crops: Which of the student's crops the rows are of. Default: all.

    Raises:
        ValueError: rows of a part of an image, or of fewer than two crops.
    """
    crops = range(num_crops) if crops is None else crops
    check_rows(len(bottleneck), len(targets), num_crops, len(crops))
    device_type = bottleneck.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else bottleneck.dtype
    with torch.autocast(device_type, enabled=False):
        outputs = _FusedCrossEntropy.apply(
            bottleneck, prototypes.weight_v, prototypes.weight_g, targets, num_crops, crops, student_temp, dtype
        )
    return FusedLoss(*outputs)


def check_rows(num_student_rows: int, num_teacher_rows: int, num_crops: int, num_given: int | None = None) -> None:
    """Check that rows are those of whole images.

    Args:
        num_student_rows: `num_given` times the batch.
        num_teacher_rows: From one to `num_crops` times the batch.
        num_crops: Student crops per image, at least 2: a crop is not compared with itself.
        num_given: Student crops whose rows are given. Default: all.

    Raises:
        ValueError: if they are not.
    """
    if num_crops < 2:
        raise ValueError(f"num_crops must be at least 2, as a crop is not compared with itself, got {num_crops}")
    num_given = num_crops if num_given is None else num_given
    batch_size, rest = divmod(num_student_rows, num_given)
    if rest or not batch_size or num_teacher_rows not in range(batch_size, num_crops * batch_size + 1, batch_size):
        raise ValueError(
            f"student rows must be num_crops = {num_given} times the batch, and teacher rows a multiple of the batch, "
            f"at most num_crops times, got {num_student_rows} and {num_teacher_rows}"
        )


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bottleneck, weight_v, weight_g, targets, num_crops, crops, student_temp, dtype):
        batch_size = len(bottleneck) // len(crops)
        num_targets = len(targets) // batch_size
        # rows of targets whose crops are among the student's, where they are the first
        own = slice(crops.start * batch_size, crops.stop * batch_size)
        num_own = len(targets[own])
        rows = bottleneck.to(dtype)
        ctx.scale = 1 / (num_targets * (num_crops - 1) * batch_size)
        ctx.student_temp, ctx.own, ctx.num_targets, ctx.batch_size = student_temp, own, num_targets, batch_size

        logsumexps = targets.new_full((len(rows),), -torch.inf)
        agreement, entropies = targets.new_zeros(()), targets.new_zeros(num_own)
        peaks = targets.new_full((num_own,), -torch.inf)
        largest = torch.zeros(num_own, dtype=torch.long, device=targets.device)
        target_sum = torch.empty_like(targets[0])
        for start in range(0, len(weight_v), CHUNK_SIZE):
            chunk = slice(start, start + CHUNK_SIZE)
            weight = nn.functional.normalize(weight_v[chunk], dim=-1).mul_(weight_g[chunk]).to(dtype)
            logits = (rows @ weight.T).to(targets.dtype).div_(student_temp)  # (rows, chunk)
            logsumexps = torch.logaddexp(logsumexps, torch.logsumexp(logits, dim=-1))

            of_images = targets[:, chunk].unflatten(0, (num_targets, batch_size)).sum(0)  # (batch, chunk)
            own_target = targets[own, chunk]
            agreement += (logits.unflatten(0, (-1, batch_size)).sum(0) * of_images).sum()
            agreement -= (logits[:num_own] * own_target).sum()

            entropies += torch.special.entr(own_target).sum(-1)
            peak, place = own_target.max(-1)
            largest = torch.where(peak > peaks, place + start, largest)
            peaks = torch.maximum(peaks, peak)
            target_sum[chunk] = own_target.sum(0)

        # a view that the teacher has as well has one teacher less
        terms = num_targets * logsumexps.sum() - logsumexps[:num_own].sum()
        ctx.save_for_backward(bottleneck, weight_v, weight_g, targets, logsumexps)
        ctx.rows_dtype = dtype
        ctx.mark_non_differentiable(entropies, largest, target_sum)
        return (terms - agreement) * ctx.scale, entropies, largest, target_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        bottleneck, weight_v, weight_g, targets, logsumexps = ctx.saved_tensors
        num_own, num_targets = len(targets[ctx.own]), ctx.num_targets
        dtype = ctx.rows_dtype
        rows = bottleneck.to(dtype)
        scale = grad_loss * (ctx.scale / ctx.student_temp)
        grad_rows = torch.zeros_like(rows, dtype=targets.dtype)
        grad_v = torch.empty_like(weight_v)
        grad_g = torch.empty_like(weight_g) if ctx.needs_input_grad[2] else None
        for start in range(0, len(weight_v), CHUNK_SIZE):
            chunk = slice(start, start + CHUNK_SIZE)
            lengths = torch.linalg.vector_norm(weight_v[chunk], dim=-1, keepdim=True).clamp_(min=1e-12)
            directions = weight_v[chunk] / lengths  # as `nn.functional.normalize` has them
            weight = (weight_g[chunk] * directions).to(dtype)
            logits = (rows @ weight.T).to(targets.dtype).div_(ctx.student_temp)

            # of each logit, teachers * softmax - targets
            grad = logits.sub_(logsumexps[:, None]).exp_()
            target = targets[:, chunk]
            grad[:num_own].mul_(num_targets - 1).add_(target[ctx.own])
            grad[num_own:].mul_(num_targets)
            grad = grad.unflatten(0, (-1, ctx.batch_size)).sub_(target.unflatten(0, (num_targets, -1)).sum(0))
            grad = grad.mul_(scale).flatten(0, 1).to(dtype)  # (rows, chunk)

            grad_rows += grad @ weight
            grad_weight = (grad.T @ rows).to(weight_v.dtype)  # (chunk, dim)
            along = (grad_weight * directions).sum(-1, keepdim=True)
            if grad_g is not None:
                grad_g[chunk] = along
            torch.addcmul(grad_weight, directions, along, value=-1, out=grad_weight)
            torch.mul(grad_weight, weight_g[chunk] / lengths, out=grad_v[chunk])
        return grad_rows.to(bottleneck.dtype), grad_v, grad_g, *[None] * 5
