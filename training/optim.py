"""What the optimiser is given, and what happens to gradients and teacher: no step of it waits for the device."""

import torch
from torch import nn


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: weight decay for everything but biases and 1-D parameters (norms), which get none.

    As in the original, `cls_token`, `position_embeddings` and a trainable `weight_g` are decayed. The second group is
    marked by `weight_decay` 0 and stays there; the loop sets the first one's at every step.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    undecayed = {name for name, parameter in trained if name.endswith(".bias") or parameter.ndim == 1}
    return [
        {"params": [parameter for name, parameter in trained if name not in undecayed]},
        {"params": [parameter for name, parameter in trained if name in undecayed], "weight_decay": 0.0},
    ]


def gradient_norms(model: nn.Module) -> torch.Tensor:
    """The norm of every trained parameter's gradient, in the order of `model.parameters()`."""
    return torch.stack(torch._foreach_norm([parameter.grad for parameter in trained_parameters(model)]))


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_groups(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which of `gradient_norms` are of the backbone, of the head and of its last layer: 1 where they are, else 0."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = ["last_layer" if ".last_layer." in n else "head" if n.startswith("head.") else "backbone" for n in names]
    return {
        group: torch.tensor([float(part == group) for part in parts]) for group in ("backbone", "head", "last_layer")
    }


@torch.no_grad()
def clip_gradients_(model: nn.Module, max_norm: float, norms: torch.Tensor) -> None:
    """Clips every parameter's gradient by its own norm: g <- g * min(1, max_norm / (|g| + 1e-6)).

    Not the global norm of `torch.nn.utils.clip_grad_norm_`: `clip_gradients` of the original's `utils.py`.
    `norms` are those of `gradient_norms`.
    """
    gradients = [parameter.grad for parameter in trained_parameters(model)]
    torch._foreach_mul_(gradients, (max_norm / (norms + 1e-6)).clamp(max=1.0).unbind())


def drop_gradients(part: nn.Module) -> None:
    """Freezes a part of the network for a step: without gradients, no weight decay and no moments of Adam touch it."""
    for parameter in part.parameters():
        parameter.grad = None


@torch.no_grad()
def update_teacher_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters; buffers are not averaged."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight=1 - momentum)
