"""What the optimiser is given, and what happens to gradients and teacher: no step of it waits for the device."""

import re

import torch
from torch import nn

from modeling_dino import DINOForPreTraining

from .arguments import TrainingArguments
from .sharding import local, whole


def learning_rate_scale(
    name: str, num_hidden_layers: int, layer_decay: float = 1.0, patch_embed_lr_multiplier: float = 1.0
) -> float:
    """Share of the learning rate that a parameter of a Vision Transformer gets, by its name in `DINOForPreTraining`.

    layer_decay ** (L + 1 - layer) of L blocks: the embeddings are layer 0, blocks are 1 to L, and the final norm and
    the head L + 1, so that those have the whole rate. The patch projection's is multiplied once more. With the
    defaults all have the whole rate. Source: BEiT (arXiv 2106.08254), appendix H; DINOv2 (arXiv 2304.07193).
    """
    if name.startswith("dino.embeddings."):
        layer = 0
    elif block := re.match(r"dino\.layers\.(\d+)\.", name):
        layer = 1 + int(block[1])
    else:
        layer = num_hidden_layers + 1
    scale = layer_decay ** (num_hidden_layers + 1 - layer)
    return scale * patch_embed_lr_multiplier if name.startswith("dino.embeddings.patch_embeddings.") else scale


def parameter_groups(
    model: DINOForPreTraining, layer_decay: float = 1.0, patch_embed_lr_multiplier: float = 1.0
) -> list[dict]:
    """Groups by weight decay, which biases and 1-D parameters (norms) do not get, and by share of the learning rate.

    As in the original, `cls_token`, `position_embeddings` and a trainable `weight_g` are decayed. A group says by
    `is_decayed` and `lr_scale` what the loop makes of its `weight_decay` and `lr` at every step. With the defaults
    there are two, of which the first is decayed.

    Raises:
        ValueError: shares that differ, for another network than the Vision Transformer.
    """
    shares = {"layer_decay": layer_decay, "patch_embed_lr_multiplier": patch_embed_lr_multiplier}
    for setting, value in shares.items():
        if value != 1.0 and model.config.backbone_config is not None:
            network = model.config.backbone_config.model_type
            raise ValueError(f"{setting} is for Vision Transformers; of a {network} it must be 1, got {value}")
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_undecayed = name.endswith(".bias") or parameter.ndim == 1
            scale = learning_rate_scale(name, model.config.num_hidden_layers, **shares)
            groups.setdefault((is_undecayed, scale), []).append(parameter)
    return [
        {"params": groups[is_undecayed, scale], "lr_scale": scale, "is_decayed": not is_undecayed}
        for is_undecayed, scale in sorted(groups)
    ]


def make_optimizer(student: DINOForPreTraining, args: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW, SGD or LARS, as `args.optimizer` says; the loop sets learning rate and weight decay at every step.

    All three take a tensor `found_inf` as an attribute: where it is 1, a step changes nothing, which the device
    decides by itself.
    """
    groups = parameter_groups(student, args.layer_decay, args.patch_embed_lr_multiplier)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if args.optimizer == "lars":
        return LARS(groups)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    # PyTorch leaves them to the first step, but its fused SGD fails where prototypes join later than the rest, and
    # fills them with anything where the first step is skipped
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class LARS(torch.optim.Optimizer):
    """SGD whose every weight moves by a share of its own norm (arXiv 1708.03888), as the original has it.

    For a parameter w with gradient g and momentum buffer b, the plain step is::

        if w.ndim != 1:                                # biases and norms: neither weight decay nor adaptation
            g = g + weight_decay * w
            if |w| > 0 and |g| > 0:
                g = g * trust_coefficient * |w| / |g|
        b = momentum * b + g
        w = w - lr * b

    `found_inf` and `grad_scale`, set as attributes by a gradient scaler, are honoured as by PyTorch's fused
    optimisers: where `found_inf` is 1 nothing changes, whatever the gradients are, and no step waits to know.
    `class LARS` of the original's `utils.py`.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for is_adapted in (True, False):
                parameters = [p for p in group["params"] if p.grad is not None and (p.ndim != 1) == is_adapted]
                if parameters:
                    self._step(parameters, is_adapted, group)
        return loss

    def _step(self, parameters: list[nn.Parameter], is_adapted: bool, group: dict) -> None:
        # scalers set these and delete them again, and must not find others
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        updates = [parameter.grad for parameter in parameters]
        if grad_scale is not None:
            updates = torch._foreach_div(updates, grad_scale.reshape(()))
        if is_adapted:
            updates = torch._foreach_add(updates, parameters, alpha=group["weight_decay"])
            weight_norms, norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
            ratios = group["trust_coefficient"] * weight_norms / norms
            ratios = torch.where((weight_norms > 0) & (norms > 0), ratios, 1.0)
            torch._foreach_mul_(updates, ratios.unbind())
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        if found_inf is None:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(parameters, buffers, alpha=-group["lr"])
        else:
            skip = found_inf.reshape(()) > 0
            torch._foreach_mul_(buffers, torch.where(skip, 1.0, group["momentum"]))
            torch._foreach_add_(buffers, [update.masked_fill(skip, 0.0) for update in updates])
            torch._foreach_add_(parameters, [buffer.masked_fill(skip, 0.0) for buffer in buffers], alpha=-group["lr"])


def gradient_norms(model: nn.Module) -> torch.Tensor:
    """The norm of every trained parameter's gradient, in the order of `model.parameters()`."""
    return whole(torch.stack(torch._foreach_norm([parameter.grad for parameter in trained_parameters(model)])))


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
    torch._foreach_mul_(local(gradients), (max_norm / (norms + 1e-6)).clamp(max=1.0).unbind())


def drop_gradients(part: nn.Module) -> None:
    """Freezes a part of the network for a step: without gradients, no weight decay and no moments of Adam touch it."""
    for parameter in part.parameters():
        parameter.grad = None


@torch.no_grad()
def update_teacher_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over parameters; buffers are not averaged."""
    networks = (local(list(network.parameters())) for network in (teacher, student))
    torch._foreach_lerp_(*networks, weight=1 - momentum)
