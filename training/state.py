"""All that a training step changes, in one place."""

import logging
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from modeling_dino import DINOForPreTraining

from .arguments import TrainingArguments
from .batch_norm import share_batch_norms_
from .loss import DINOLoss
from .optim import gradient_groups, make_optimizer
from .sharding import shard_
from .signals import Signals


logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """`student_model` and `teacher_model` are the networks as Accelerate runs them: cast, compiled, with others."""

    student: DINOForPreTraining
    teacher: DINOForPreTraining
    student_model: nn.Module
    teacher_model: nn.Module
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    signals: Signals
    has_batch_norms: bool = False
    random_of_all: list[dict] | None = None  # random states of all processes after the last whole step
    is_whole: bool = True  # False while a step is applied to student, center and teacher one after the other


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of PyTorch's generators in this process, (bytes,) in uint8 each."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def prepare_state(
    accelerator: Accelerator, args: TrainingArguments, student: DINOForPreTraining, teacher: DINOForPreTraining
) -> TrainingState:
    """Networks that have their weights, for the processes and the precision of `accelerator`.

    Raises:
        ValueError: batch norms that processes cannot share, or an optimiser that FSDP does not go with.
    """
    config = student.config
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            logger.warning("without AVX-512, a CPU like this takes a hundred times as long in bf16: train in fp32")
        if config.backbone_config is None:
            for network in (student, teacher):  # PyTorch's fused attention takes three times as long there
                network.set_attn_implementation("eager")
    # a block is compiled for student and teacher, for each resolution, and as the first, the last or another, which is
    # 8 times already, and PyTorch's limit: beyond, it would run as it is
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if accelerator.num_processes > 1:  # both, as in the original: batch norms see the batches of all processes
        share_batch_norms_(student, accelerator.device)
        share_batch_norms_(teacher, accelerator.device)
    if accelerator.is_fsdp2:
        if args.optimizer == "sgd":
            raise ValueError("FSDP trains with optimizer adamw or lars, got sgd")
        shard_(accelerator, student, teacher)
        student_model, teacher_model, optimizer = student, teacher, make_optimizer(student, args)
    else:
        student_model, optimizer = accelerator.prepare(student, make_optimizer(student, args))
        teacher_model = accelerator.prepare_model(teacher, evaluation_mode=True)
    dino_loss = DINOLoss(config.out_dim, args.student_temp, args.center_momentum, args.centering)
    signals = Signals(config.out_dim, accelerator.device, gradient_groups(student))
    has_batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())
    return TrainingState(
        student, teacher, student_model, teacher_model, dino_loss.to(accelerator.device), optimizer, signals,
        has_batch_norms,
    )  # fmt: skip
