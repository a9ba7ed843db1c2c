"""The original's recorded numbers, and its names for our parameters."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_dino import DINOConfig


FIXTURES = Path(__file__).parent / "fixtures"
META = json.loads((FIXTURES / "meta.json").read_text())
NAMES = [
    (r"^backbone\.(.*)", r"dino.\1"),
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"(^|dino\.)norm\.", r"\1layernorm."),
]


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def our_names(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors below `prefix`, by our names for them."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, replacement in NAMES:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed


def tiny_config(**changes) -> DINOConfig:
    """The network that the numbers were recorded with."""
    fields = {
        "hidden_size": META["dim"],
        "num_hidden_layers": META["depth"],
        "num_attention_heads": META["heads"],
        "patch_size": META["patch"],
        "image_size": META["img"],
        "out_dim": META["K"],
        "head_hidden_dim": META["hid"],
        "head_bottleneck_dim": META["bott"],
    }
    return DINOConfig(**fields | changes)
