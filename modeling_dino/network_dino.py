"""Networks of transformers and timm in the place of DINO's Vision Transformer: `DINOConfig.backbone_config`.

Each is built as its library builds it, and asked for pooled features (batch, width).
"""

import math

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, TimmWrapperModel


class DINOTimmModel(TimmWrapperModel):
    """A network of timm that starts as timm starts it.

    `TimmWrapperModel` means to hold trained weights, and draws all others anew with one standard deviation.
    """

    _is_built = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self._is_built = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if self._is_built:  # what `from_pretrained` has not found
            super()._init_weights(module)


def build_network(config: PreTrainedConfig) -> PreTrainedModel:
    return DINOTimmModel(config) if config.model_type == "timm_wrapper" else AutoModel.from_config(config)


def width_of_features(network: PreTrainedModel) -> int:
    """How wide the pooled features are.

    Raises:
        ValueError: a config that does not say it.
    """
    if isinstance(network, DINOTimmModel):
        return network.timm_model.head_hidden_size
    fields = network.config.to_dict()
    widths = fields.get("hidden_sizes") or [fields.get("hidden_size")]
    if not isinstance(widths[-1], int):
        raise ValueError(f"the config of a {network.config.model_type} does not say how wide its features are")
    return widths[-1]


def run_network(network: PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's last hidden state, of whatever shape, and its pooled features (batch, width).

    Raises:
        ValueError: a network without pooled features, or outputs that are not passed on.
    """
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name, getattr(network.config, name)):
            raise ValueError(f"{name} is for DINO's own Vision Transformer: ask it of `model.backbone`")
    if network.config.model_type == "swin":
        _set_shifts_of_swin(network, *pixel_values.shape[-2:])
        kwargs["always_partition"] = True
    output = network(pixel_values, **{name: value for name, value in kwargs.items() if value is not None})
    if output.get("pooler_output") is None:
        raise ValueError(f"a {type(network).__name__} gives no pooled features")
    return output.last_hidden_state, output.pooler_output.flatten(1)


def _set_shifts_of_swin(network: PreTrainedModel, height: int, width: int) -> None:
    """Windows are shifted in every other block, unless one window covers the whole grid.

    `SwinModel` finds that out by itself, once: after a small image its windows stay small, shifts stay off, and its
    position bias, which is that of whole windows, does not fit.
    """
    config = network.config
    grid = [math.ceil(side / config.patch_size) for side in (height, width)]
    for stage in network.encoder.layers:
        for i, block in enumerate(stage.blocks):
            is_shifted = i % 2 == 1 and min(grid) > config.window_size
            block.shift_size = config.window_size // 2 if is_shifted else 0
        grid = [(side + 1) // 2 for side in grid]
