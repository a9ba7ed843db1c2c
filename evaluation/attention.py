"""CLS self-attention of the last block, as maps and as a picture: what the paper shows in figure 1."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel


@torch.no_grad()
def cls_attention(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """How much the CLS token attends to each patch in the last block, one map a head.

    Args:
        model: A vision transformer with one CLS token in front of its patches; put back as it was afterwards.
        pixel_values: (images, channels, height, width).

    Returns:
        Attention (images, heads, height / patch_size, width / patch_size). A head's map sums to one minus the CLS
        token's attention to itself, as in `visualize_attention.py` of the original.
    """
    implementation, was_training = model.config._attn_implementation, model.training
    try:
        model.set_attn_implementation("eager")  # the only one that keeps its weights
        attention = model.eval()(pixel_values.to(model.device, model.dtype), output_attentions=True).attentions[-1]
    finally:
        model.set_attn_implementation(implementation)
        model.train(was_training)
    height, width = (side // model.config.patch_size for side in pixel_values.shape[-2:])
    return attention[:, :, 0, 1:].unflatten(-1, (height, width)).float().cpu()


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
        ValueError: a DINO model whose backbone is another network.
    """
    if model.config.model_type == "dino" and model.config.backbone_config is not None:
        raise ValueError(
            f"a {type(model.backbone).__name__} has no CLS attention; attention is for Vision Transformers"
        )
    seen, inputs = (
        image_processor(images, return_tensors="pt", input_data_format="channels_first", do_normalize=normalized)[
            "pixel_values"
        ]
        for normalized in (False, True)
    )
    maps = cls_attention(model, inputs)
    pictures = (seen * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = pictures if pictures.shape[-1] == 3 else np.ascontiguousarray(pictures[..., 0])
    return draw_attention(pictures, maps, path)
