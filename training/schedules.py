"""Every quantity that changes during training, as a function of the step. Nothing here remembers anything."""

import math
from dataclasses import dataclass

from .arguments import TrainingArguments


def cosine_schedule(
    step: int, base: float, final: float, num_steps: int, warmup_steps: int = 0, start: float = 0.0
) -> float:
    """Linear warm-up from `start` to `base`, both ends included, then a half cosine towards `final`.

    With warm-up, step 0 has exactly `start`, and `base` is reached twice: at the last warm-up step and at the first of
    the cosine. `final` itself would come one step after the last. `cosine_scheduler` of the original's `utils.py`.
    """
    if step < warmup_steps:
        return start + step * ((base - start) / (warmup_steps - 1)) if step < warmup_steps - 1 else base
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def teacher_temp_schedule(epoch: int, warmup_temp: float, final_temp: float, warmup_epochs: int) -> float:
    """Teacher temperature of an epoch: linear from `warmup_temp` in epoch 0 to `final_temp` in the last warm-up epoch.

    Constant within an epoch, as the original has it. A warm-up of one epoch is spent at `warmup_temp`.
    """
    if epoch >= warmup_epochs:
        return final_temp
    return warmup_temp + epoch * ((final_temp - warmup_temp) / max(warmup_epochs - 1, 1))


@dataclass(frozen=True)
class Hyperparameters:
    """What holds during one step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    freeze_last_layer: bool
    freeze_backbone: bool


class Schedule:
    """`schedule(step)` -> `Hyperparameters`. Durations become steps here, once.

    Learning rate, weight decay and momentum change every step; temperature and freeze every epoch, as in the original.
    The peak learning rate is `base_learning_rate * global_batch_size / 256`.

    Raises:
        ValueError: if a warm-up is longer than the training.
    """

    def __init__(self, args: TrainingArguments, steps_per_epoch: int, num_steps: int, global_batch_size: int):
        self.args = args
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = num_steps
        self.warmup_steps = round(args.warmup_epochs * steps_per_epoch)
        self.peak_learning_rate = args.base_learning_rate * global_batch_size / 256
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
            warmup_steps = round(getattr(args, name) * steps_per_epoch)
            if warmup_steps > num_steps:
                most = math.floor(100 * num_steps / steps_per_epoch) / 100
                most = int(most) if name == "warmup_teacher_temp_epochs" else most
                raise ValueError(
                    f"{name} must be at most {most:g}, got {getattr(args, name):g}: the training has only "
                    f"{num_steps:,} steps, {steps_per_epoch:,} an epoch. Give --{name} {most:g}."
                )

    def __call__(self, step: int) -> Hyperparameters:
        args, epoch = self.args, step // self.steps_per_epoch
        return Hyperparameters(
            learning_rate=cosine_schedule(
                step, self.peak_learning_rate, args.min_learning_rate, self.num_steps, self.warmup_steps
            ),
            weight_decay=cosine_schedule(step, args.weight_decay, args.weight_decay_end, self.num_steps),
            teacher_momentum=cosine_schedule(step, args.momentum_teacher, 1.0, self.num_steps),
            teacher_temp=teacher_temp_schedule(
                epoch, args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs
            ),
            freeze_last_layer=epoch < args.freeze_last_layer_epochs,
            freeze_backbone=step < (args.freeze_backbone_steps or 0),
        )
