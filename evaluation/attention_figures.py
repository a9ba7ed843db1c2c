"""Pictures of CLS attention: a sheet of all images and heads, and figures of one image.

Every map is scaled by its own smallest and largest value, and enlarged by nearest cells, as in the original's
`visualize_attention.py`: what a figure shows are the network's patches, not an interpolation between them.
"""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage
from scipy.ndimage import binary_erosion

from .outputs import mark, write_figure, write_picture
from .pictures import add_caption, short_label, start_figure


OPACITY = 0.6  # of colour that is laid over an image
FIGURES = ("heads", "mean", "mask", "colors")  # of each image
SMALLEST = 240  # short side of a figure in pixels


def enlarge(cells: np.ndarray, size: tuple[int, int], patch: tuple[float, float] | None = None) -> np.ndarray:
    """Cells (rows, columns) -> (height, width), each pixel the cell that it lies in.

    Args:
        cells: Of any type; more dimensions may follow.
        size: Height and width to enlarge to.
        patch: Height and width of a cell in pixels. Default: as the cells fill the size. Pixels beyond the last cell,
            which the network did not see, take the nearest.
    """
    patch = patch or (size[0] / cells.shape[0], size[1] / cells.shape[1])
    rows, columns = (
        ((np.arange(side) + 0.5) // length).astype(int).clip(max=number - 1)
        for side, length, number in zip(size, patch, cells.shape)
    )
    return cells[rows[:, None], columns]


def color_map(cells: np.ndarray, name: str = "inferno") -> np.ndarray:
    """A map (rows, columns) -> RGB (rows, columns, 3) in uint8 by a colour map of matplotlib, from min to max."""
    import matplotlib

    span = cells.max() - cells.min()
    return matplotlib.colormaps[name]((cells - cells.min()) / (span or 1), bytes=True)[..., :3]


def blend(picture: np.ndarray, colors: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
    """A picture (height, width, 3) with `colors`, which broadcast to it, laid over it where `where` is true."""
    mixed = (1 - OPACITY) * picture + OPACITY * np.asarray(colors)
    return np.where(np.atleast_2d(where)[..., None], mixed.round(), picture).astype(np.uint8)


def head_colors(num_heads: int) -> np.ndarray:
    """Hues (heads, 3) in uint8, as far apart as they can be."""
    hues = [colorsys.hsv_to_rgb(head / num_heads, 0.85, 1) for head in range(num_heads)]
    return (255 * np.array(hues)).round().astype(np.uint8)


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (height, width) that lie at its border, in a line that suits its size."""
    return mask & ~binary_erosion(mask, iterations=max(1, min(mask.shape) // 240), border_value=1)


def mask_overlay(picture: np.ndarray, mask: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A picture (height, width, 3) with a mask (rows, columns) in a colour over it, and its contour."""
    mask = enlarge(mask, picture.shape[:2])
    overlay = blend(picture, color, mask)
    overlay[outline(mask)] = color
    return overlay


def colored_heads(picture: np.ndarray, attention: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
    """All heads in one picture, as in the paper's figure 3: each head's mask in its colour over the darkened image.

    Where masks overlap, the cell is of the head that gives it the largest share of its attention.

    Args:
        picture: RGB (height, width, 3) in uint8.
        attention: (heads, rows, columns) of `cls_attention`.
        masks: Of `mass_masks`, of the same shape.
    """
    shares = attention / attention.sum((1, 2), keepdim=True)
    winners = enlarge(shares.masked_fill(~masks, -1).argmax(0).numpy(), picture.shape[:2])
    covered = enlarge(masks.any(0).numpy(), picture.shape[:2])
    colors = head_colors(len(attention))
    colored = blend(picture, np.where(covered[..., None], colors[winners], 0).astype(np.uint8))
    for head, color in enumerate(colors):
        colored[outline(covered & (winners == head))] = color
    return colored


def draw_attention(
    images: Sequence[np.ndarray],
    attention: Sequence[torch.Tensor],
    path: Path,
    origin: str = mark("attention"),
    names: Sequence[str] = (),
    model: str = "",
    data: str = "",
) -> Path:
    """Draw a row for every image: the image, the mean of its attention maps, and each head's map.

    Args:
        images: What the model saw, each (height, width, 3) in uint8.
        attention: For each image (heads, rows, columns) of `cls_attention`.
        path: PNG, PDF or SVG to write.
        origin: See `mark`.
        names: Written beside the images.
        model, data: See `add_caption`.
    """
    panels = [
        panel for image, maps in zip(images, attention) for panel in [image, *_maps_in_color(image, maps)]
    ]  # fmt: skip
    return _draw_panels(
        panels, _titles(attention[0]), path, origin, model, data, names, columns=2 + len(attention[0]), width=1.3,
        dpi=150,
    )  # fmt: skip


def draw_figures(
    picture: np.ndarray, attention: torch.Tensor, masks: torch.Tensor, folder: Path, name: str, model: str
) -> None:
    """Write the figures of one image, which name the model. A small one is shown enlarged.

    NAME_heads.png: the image, the mean map and each head's.
    NAME_mean.png: the mean map over the image, pixel by pixel.
    NAME_mask.png: each head's mask over the image, with its contour.
    NAME_colors.png: all masks in one, in the same colours, pixel by pixel.
    """
    origin = mark("attention")
    times = max(1, SMALLEST // min(picture.shape[:2]))
    picture = picture.repeat(times, axis=0).repeat(times, axis=1)
    paths = {kind: folder / f"{name}_{kind}.png" for kind in FIGURES}
    titles = _titles(attention)
    _draw_panels([picture, *_maps_in_color(picture, attention)], titles, paths["heads"], origin, model, name)
    mean = enlarge(color_map(attention.mean(0).numpy()), picture.shape[:2])
    write_picture(PillowImage.fromarray(blend(picture, mean)), paths["mean"], origin)
    colors = head_colors(len(attention))
    overlays = [mask_overlay(picture, mask.numpy(), color) for mask, color in zip(masks, colors)]
    _draw_panels(overlays, titles[2:], paths["mask"], origin, model, name)
    write_picture(PillowImage.fromarray(colored_heads(picture, attention, masks)), paths["colors"], origin)


def _titles(attention: torch.Tensor) -> list[str]:
    return ["image", "mean"] + [f"head {head + 1}" for head in range(len(attention))]


def _maps_in_color(picture: np.ndarray, attention: torch.Tensor) -> list[np.ndarray]:
    maps = [attention.mean(0), *attention]
    return [enlarge(color_map(cells.numpy(), "viridis"), picture.shape[:2]) for cells in maps]


def _draw_panels(
    panels: Sequence[np.ndarray],
    titles: Sequence[str],
    path: Path,
    origin: str,
    model: str = "",
    data: str = "",
    names: Sequence[str] = (),
    columns: int | None = None,
    width: float = 2,
    dpi: int = 200,
) -> Path:
    """Draw pictures row by row, under titles, which are those of the first row alone where there are no more.

    Args:
        model, data: See `add_caption`.
        names: Of the rows, written beside them.
        columns: Pictures a row. Default: at most 5, in rows as even as they can be.
        width: Of a picture, in inches.
    """
    columns = columns or math.ceil(len(panels) / math.ceil(len(panels) / 5))
    heights = [panel.shape[0] / panel.shape[1] * width for panel in panels[::columns]]
    title_height = 0.25 * math.ceil(len(titles) / columns)
    label_width = 0.15 if names else 0
    size = (columns * width + label_width, sum(heights) + title_height)
    figure = start_figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels):
        axis.imshow(panel, interpolation="nearest" if max(panel.shape) < width * dpi else None)
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title, fontsize=9)
    for axis, name, height in zip(axes[:, 0], names, heights):
        label = short_label(name, max(8, int(17 * height)))  # at 6 points, 0.05 inches a letter
        axis.text(-0.03, 0.5, label, fontsize=6, rotation=90, ha="right", va="center", transform=axis.transAxes,
                  parse_math=False)  # fmt: skip
    if model:
        add_caption(figure, model, data)
    write_figure(figure, path, origin, dpi=dpi, bbox_inches="tight", pad_inches=0.02)
    return path
