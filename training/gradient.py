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

    The loss is a sum over crops, so any parts of them will do. All stay together where batch norms of the head see
    them together, where they are of one size, and for other networks, which might not use all parameters in each part.
    """
    is_one_size = len({rows.shape[-1] for rows in crops}) == 1
    at_once = config.use_bn_in_head or is_one_size or config.backbone_config is not None
    return [crops] if at_once else [[rows] for rows in crops]


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
        # after the last pass; by FSDP after each, as gradients that are not shared yet are held whole
        shares = is_last and (done == args.num_crops or accelerator.is_fsdp2)
        with nullcontext() if shares else accelerator.no_sync(state.student_model):
            output = state.student_model(resolutions, criterion=criterion)
            part, *statistics = output.loss
            loss = loss + part.detach()
            if these.start == 0:  # with the teacher's crops, and so with all targets
                target_statistics = statistics
            if args.koleo_weight and these.start == 0:  # of each global crop by itself: else, the other is nearest
                features = output.pooler_output[: len(targets)].chunk(NUM_GLOBAL_CROPS)
                part = part + args.koleo_weight * sum(map(koleo_loss, features))
            total = total + part.detach()
            accelerator.backward(part)  # over the number of batches
    return loss, total, target_statistics
