"""CLS self-attention of the last block, as maps and as a picture: what the paper shows in figure 1."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_model
from .features import find_eval_split
from .images import decode_image, load_images
from .models import grid, load_model, mean_and_std, network_of, num_channels, run_model, to_pixel_values


@torch.no_grad()
def cls_attention(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """How much the CLS token attends to each patch in the last block, one map a head.

    Args:
        model: A Vision Transformer with a CLS token; put back as it was afterwards.
        pixel_values: (images, channels, height, width).

    Returns:
        Attention (images, heads, height / patch_size, width / patch_size). A head's map sums to one minus the CLS
        token's attention to itself (and to registers), as in `visualize_attention.py` of the original.

    Raises:
        ValueError: a network without CLS attention.
    """
    network = network_of(model)
    was_training = network.training
    network.eval()
    try:
        if network.config.model_type == "timm_wrapper":
            attention = _timm_attention(network, pixel_values)
        else:
            attention = _attention(network, pixel_values)
    finally:
        network.train(was_training)
    rows, columns = grid(network, pixel_values)
    if attention is None or attention.ndim != 4 or attention.shape[-1] <= rows * columns:
        raise ValueError(
            f"a {type(network).__name__} has no CLS attention; attention is for Vision Transformers with a CLS token"
        )
    return attention[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)).float().cpu()


def _attention(network: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor | None:
    implementation = network.config._attn_implementation
    if implementation is None or getattr(network.config, "num_attention_heads", None) is None:
        return None
    try:
        network.set_attn_implementation("eager")  # the only one that keeps its weights
        attentions = run_model(network, pixel_values, output_attentions=True).attentions
    finally:
        network.set_attn_implementation(implementation)
    return attentions[-1] if attentions else None


def _timm_attention(network: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor | None:
    from timm.utils import AttentionExtract

    last = list(getattr(network.timm_model, "blocks", []))[-1:]
    if not last or not hasattr(last[0], "attn"):
        return None
    attention, was_fused = last[0].attn, last[0].attn.fused_attn
    attention.fused_attn = False  # which would not keep its weights
    try:
        extract = AttentionExtract(network.timm_model, ["blocks.*.attn.attn_drop"], method="hook")
        maps = extract(pixel_values.to(network.device, network.dtype))
    finally:
        attention.fused_attn = was_fused
    return list(maps.values())[-1]


def mass_masks(attention: torch.Tensor, mass: float) -> torch.Tensor:
    """The cells of each map that hold `mass` of its sum, the strongest first: `--threshold` of the original.

    Args:
        attention: (..., rows, columns), at least 0.
        mass: Share of the sum, in (0, 1); the paper's is 0.6.

    Returns:
        Booleans of the same shape. Sorted upwards, a cell belongs to the mask if the sum up to and with it exceeds
        1 - mass.
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass must be between 0 and 1, got {mass}")
    values, order = attention.flatten(-2).sort()
    kept = (values / values.sum(-1, keepdim=True)).cumsum(-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, attention.shape[-2:])


def draw_attention(images: Sequence[np.ndarray], attention: torch.Tensor, path: Path) -> Path:
    """Draws a row for every image: the image, the mean of its attention maps, and each head's map.

    Args:
        images: What the model saw, (height, width) or (height, width, 3) in uint8.
        attention: (images, heads, rows, columns) of `cls_attention`.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    maps = torch.cat([attention.mean(1, keepdim=True), attention], dim=1)
    titles = ["image", "mean"] + [f"head {head + 1}" for head in range(attention.shape[1])]
    figure, axes = plt.subplots(
        len(images), len(titles), figsize=(1.3 * len(titles), 1.3 * len(images) + 0.25), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, image, image_maps in zip(axes, images, maps):
        height, width = image.shape[:2]
        row[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        for axis, attention_map in zip(row[1:], image_maps):
            axis.imshow(attention_map, cmap="viridis", extent=(0, width, height, 0), interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_attention_of(model: PreTrainedModel, image_processor, images: Sequence[np.ndarray], path: Path) -> Path:
    """Draws what a Vision Transformer's CLS token looks at in images (channels, height, width) of uint8.

    Raises:
        ValueError: a network without CLS attention.
    """
    inputs = to_pixel_values(image_processor, images)
    maps = cls_attention(model, inputs)
    mean, std = mean_and_std(image_processor, inputs.shape[1])
    pictures = ((inputs * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = pictures if pictures.shape[-1] == 3 else np.ascontiguousarray(pictures[..., 0])
    return draw_attention(pictures, maps, path)


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    parser.add_argument("--num_images", type=int, default=8, help="rows of the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which images (default: %(default)s)")
    parser.add_argument("--output", default="attention.png", help="PNG to write (default: %(default)s)")


def measure(args: Namespace) -> None:
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {args.num_images}")
    split = find_eval_split(args)
    dataset = load_images(args.dataset_name, args.dataset_config_name, split, args.image_column, None)
    model, image_processor = load_model(args.model, args.image_size)
    rows = dataset.shuffle(seed=args.seed).select(range(min(args.num_images, len(dataset))))
    images = [decode_image(row["image"], num_channels(model.config)) for row in rows]
    print(f"wrote {draw_attention_of(model, image_processor, images, Path(args.output))}")
