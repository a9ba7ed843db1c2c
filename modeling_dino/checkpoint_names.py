"""Our names of a network's tensors, and those that the original, or a stock ViT of transformers, has for them.

One side may keep in one tensor what is three on the other, its rows one after another: queries, keys and values. A
mapping is therefore from each whole tensor's name to the names of its parts, and `split` and `join` go along it.
"""

import re
from collections import defaultdict

import torch

from .configuration_dino import DINOConfig
from .modeling_dino import DINOModel


State = dict[str, torch.Tensor]
Parts = dict[str, tuple[str, ...]]

_VIT_TO_ORIGINAL = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"layers\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"layernorm", "norm"),
    (r"attention\.qkv", "attn.qkv"),
    (r"attention\.o_proj", "attn.proj"),
]
_RESNET_TO_ORIGINAL = [
    (r"backbone\.embedder\.embedder\.convolution", "conv1"),
    (r"backbone\.embedder\.embedder\.normalization", "bn1"),
    (r"backbone\.encoder\.stages\.(\d+)\.layers", lambda found: f"layer{int(found[1]) + 1}"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d+)\.convolution", lambda found: f"conv{int(found[1]) + 1}"),
    (r"layer\.(\d+)\.normalization", lambda found: f"bn{int(found[1]) + 1}"),
]
_XCIT_TO_ORIGINAL = [
    (r"backbone\.timm_model\.", ""),
    (r"^pos_embed\.", "pos_embeder."),
    (r"^(cls_attn_blocks\.\d+\.attn)\.[qkv]\.", r"\1.qkv."),  # the original's computes queries of all tokens
]
_VIT_TO_STOCK_VIT = [
    (r"layers\.", "encoder.layer."),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]


def _renamed(name: str, patterns: list) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _our_names(config: DINOConfig) -> list[str]:
    with torch.device("meta"):
        return list(DINOModel(config).state_dict())


def original_names(config: DINOConfig) -> Parts:
    """The original's name of each tensor of its backbone -> ours, of a [`DINOModel`].

    Raises:
        ValueError: a network that the original does not have.
    """
    network = config.backbone_config
    if network is None:
        patterns = _VIT_TO_ORIGINAL
    elif network.model_type == "resnet":
        patterns = _RESNET_TO_ORIGINAL
    elif network.model_type == "timm_wrapper" and network.architecture.startswith("xcit"):
        patterns = _XCIT_TO_ORIGINAL
    else:
        raise ValueError(f"the original has no {network.model_type}; allowed are its Vision Transformer, resnet, xcit")
    names = defaultdict(tuple)
    for ours in _our_names(config):
        names[_renamed(ours, patterns)] += (ours,)
    return names


def stock_vit_names(config: DINOConfig) -> Parts:
    """Our name of each tensor of a [`DINOModel`] -> those in the file of a stock `ViTModel`.

    Raises:
        ValueError: a network that is no Vision Transformer.
    """
    if config.backbone_config is not None:
        raise ValueError(
            f"a {config.backbone_config.model_type} is no Vision Transformer, and cannot become a ViTModel"
        )
    names = {}
    for ours in _our_names(config):
        stock = _renamed(ours, _VIT_TO_STOCK_VIT)
        parts = ("query", "key", "value") if "attention.qkv" in stock else ("",)
        names[ours] = tuple(stock.replace("attention.qkv", f"attention.attention.{part}") for part in parts)
    return names


def split(state: State, names: Parts) -> State:
    """By the names of the parts. Tensors that `names` does not have keep theirs, so that they show as unexpected."""
    found = {}
    for whole, tensor in state.items():
        parts = names.get(whole, (whole,))
        found |= zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor])
    return found


def join(state: State, names: Parts) -> State:
    """By the names of the wholes. What no whole can be made of keeps its name, so that it shows as unexpected."""
    rest, found = dict(state), {}
    for whole, parts in names.items():
        if all(part in rest for part in parts):
            tensors = [rest.pop(part) for part in parts]
            found[whole] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return found | rest
