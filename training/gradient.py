"""The gradient of a batch: of one resolution after another, so that activations of one alone have to be there."""

from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator

from modeling_dino import DINOConfig

from .arguments import TrainingArguments
from .augmentation import NUM_GLOBAL_CROPS
from .fused_loss import fused_cross_entropy
from .loss import koleo_loss
from .state import TrainingState


def student_passes(config: DINOConfig, crops: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Which crops go through the student together, of `crops` by resolution.

    The loss is a sum over crops, so any parts of them will do. Those stay together that the original normalises
    together: all, by batch norms in the head, and those of one size, by batch norms in the backbone.
    """
    is_one_size = len({rows.shape[-1] for rows in crops}) == 1
    return [crops] if config.use_bn_in_head or is_one_size else [[rows] for rows in crops]


def backpropagate(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainingState,
    crops: list[torch.Tensor],
    targets: torch.Tensor,
    is_last: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Adds the gradient of a batch to what is there.

    Args:
        crops: Of each resolution, (crops * batch, channels, size, size); global ones first.
        targets: The teacher's, (2 * batch, out_dim).
        is_last: Whether processes share their gradients after this batch.

    Returns:
        The loss, the loss with KoLeo, and what `FusedLoss` says of the targets.
    """
    batch_size = len(targets) // NUM_GLOBAL_CROPS
    loss, total, done = 0, 0, 0
    for resolutions in student_passes(state.student.config, crops):
        these = range(done, done + sum(map(len, resolutions)) // batch_size)
        done = these.stop
        criterion = partial(
            fused_cross_entropy, targets=targets, num_crops=args.num_crops, student_temp=args.student_temp, crops=these
        )
        shares = is_last and done == args.num_crops
        with nullcontext() if shares else accelerator.no_sync(state.student_model):
            output = state.student_model(resolutions, criterion=criterion)
            part, *statistics = output.loss
            loss = loss + part.detach()
            if args.koleo_weight and these.start == 0:  # of each global crop by itself: else, the other is nearest
                features = output.pooler_output[: len(targets)].chunk(NUM_GLOBAL_CROPS)
                part = part + args.koleo_weight * sum(map(koleo_loss, features))
            total = total + part.detach()
            accelerator.backward(part)  # over the number of batches
    return loss, total, statistics
