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


@torch.no_grad()
def clip_gradients_(model: nn.Module, max_norm: float) -> None:
    """Clips every parameter's gradient by its own norm: g <- g * min(1, max_norm / (|g| + 1e-6)).

    Not the global norm of `torch.nn.utils.clip_grad_norm_`: `clip_gradients` of the original's `utils.py`.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (max_norm / (norms + 1e-6)).clamp(max=1.0).unbind())


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Freezes the prototypes for a step: without a gradient, neither weight decay nor Adam's moments touch them."""
    for parameter in model.head.last_layer.parameters():
        parameter.grad = None


@torch.no_grad()
def update_teacher_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters; buffers are not averaged."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight=1 - momentum)
