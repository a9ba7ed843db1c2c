"""The first three principal components of the patches' features, as colours: which parts a model takes for alike.

The components are those of all shown images together, so that a colour means the same in each of them.
"""

import copy
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image as PillowImage
from sklearn.decomposition import PCA
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_dino.command_line import Parser

from .arguments import add_images, add_model
from .decoding import decode_image
from .features import find_eval_split, images_of
from .landmarks import crop_to_patches
from .models import (
    RawPixels,
    load_model,
    mean_and_std,
    network_of,
    num_channels,
    patch_size,
    reading_of,
    to_values,
    tokens,
)
from .pictures import (
    add_caption,
    add_picture,
    check_files,
    choose_images,
    describe_given,
    find_images,
    image_label,
    short_label,
    start_figure,
    to_picture,
    write_files,
)
from .skipped import choose_decodable


IMAGE_SIZE = 480  # of `visualize_attention.py` of the original
PERCENTILES = (2, 98)  # that become 0 and 1, so that a few outliers leave the others their contrast
NUM_COLUMNS = 8
HEIGHT, GAP, LABEL_GAP = 1.2, 0.05, 0.3  # of the picture's images, between them, and with a name, in inches


def principal_components(
    maps: Sequence[np.ndarray], foreground: str | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first three principal components of all vectors of all maps, and colours of them.

    Args:
        maps: Each (rows, columns, hidden), of any rows and columns.
        foreground: `above` or `below`: leave out the vectors whose first component is on the other side of the mean,
            and take the components of what is left.

    Returns:
        Components, each (rows, columns, 3), and colours of the same shape, in [0, 1]: the 2nd and the 98th percentile
        of each component are 0 and 1. What is left out is nan in the components, and white. A component's largest
        weight is positive, so that no sign is by chance.

    Raises:
        ValueError: fewer than three vectors, or features.
    """
    vectors = np.concatenate([features.reshape(-1, features.shape[-1]) for features in maps]).astype(np.float64)
    kept = np.ones(len(vectors), dtype=bool)
    if foreground:
        first = _project(vectors)[:, 0]
        kept = first > 0 if foreground == "above" else first < 0
    components = np.full((len(vectors), 3), np.nan)
    components[kept] = _project(vectors[kept])
    low, high = np.percentile(components[kept], PERCENTILES, axis=0)
    colors = ((components - low) / np.maximum(high - low, np.finfo(float).tiny)).clip(0, 1)
    colors[~kept] = 1
    ends = np.cumsum([features.shape[0] * features.shape[1] for features in maps])[:-1]
    return tuple(
        [part.reshape(*features.shape[:2], 3) for part, features in zip(np.split(values, ends), maps)]
        for values in (components, colors)
    )


def _project(vectors: np.ndarray) -> np.ndarray:
    if min(vectors.shape) < 3:
        raise ValueError(f"three components need 3 patches and 3 features, got {vectors.shape[0]}, {vectors.shape[1]}")
    return PCA(3, svd_solver="full").fit_transform(vectors)  # which has the signs as promised


@torch.no_grad()
def patch_map(model: PreTrainedModel, pixel_values: torch.Tensor) -> np.ndarray:
    """The patches' features (rows, columns, hidden) in fp32 of one normalised image (channels, height, width)."""
    if hasattr(getattr(network_of(model), "timm_model", None), "set_input_size"):
        # timm's networks take images of one size until told another; a copy is, so that the next image's position
        # embeddings are made of the trained ones again
        model = copy.deepcopy(model)
        network_of(model).timm_model.set_input_size(img_size=pixel_values.shape[-2:])
    return tokens(model, pixel_values[None])[0].patches[0].float().cpu().numpy()


def resize_and_crop(pixels: np.ndarray, size: int, patch_size: int) -> np.ndarray:
    """Make the shorter side of pixels (channels, height, width) `size` by Pillow's bicubic filter, and cut them to
    whole patches at the right and at the bottom."""
    height, width = pixels.shape[1:]
    scale = size / min(height, width)
    shape = (round(width * scale), round(height * scale))
    resized = [
        np.array(PillowImage.fromarray(channel).resize(shape, PillowImage.Resampling.BICUBIC)) for channel in pixels
    ]
    return crop_to_patches(torch.from_numpy(np.stack(resized)), patch_size).numpy()


def draw_colors(images: Sequence[np.ndarray], colors: Sequence[np.ndarray], names: Sequence[str] = ()):
    """Return a figure of images (height, width, 3), all of the same height, each over its colors (rows, columns, 3).

    Args:
        images: The images.
        colors: Their colors.
        names: Written under the colors.
    """
    gap = LABEL_GAP if names else 3 * GAP
    widths = [HEIGHT * image.shape[1] / image.shape[0] for image in images]
    rows = [range(start, min(start + NUM_COLUMNS, len(images))) for start in range(0, len(images), NUM_COLUMNS)]
    width = max(sum(widths[number] + GAP for number in row) - GAP for row in rows)
    height = len(rows) * (2 * HEIGHT + GAP + gap) - (0 if names else gap)
    figure = start_figure(figsize=(width, height))
    top = height
    for row in rows:
        left = 0
        for number in row:
            for drawn, bottom in ((images[number], top - HEIGHT), (colors[number], top - 2 * HEIGHT - GAP)):
                place = (left / width, bottom / height, widths[number] / width, HEIGHT / height)
                axis = figure.add_axes(place, frameon=False, xticks=[], yticks=[])
                axis.imshow(drawn, aspect="auto", interpolation="nearest" if drawn is colors[number] else None)
            if names:
                name = short_label(names[number], max(4, int(18 * widths[number])))
                place = ((left + widths[number] / 2) / width, (top - 2 * HEIGHT - 1.5 * GAP) / height)
                figure.text(*place, name, fontsize=6, ha="center", va="top", parse_math=False)
            left += widths[number] + GAP
        top -= 2 * HEIGHT + GAP + gap
    return figure


def add_arguments(parser: Parser) -> None:
    add_model(parser, IMAGE_SIZE, "shorter side of the images in pixels, their aspect is kept", several=False)
    add_images(parser)
    add_picture(parser, "pca.png", 8, "what to show")
    parser.add_argument(
        "--foreground",
        choices=("above", "below"),
        help="colour only patches whose first component is above, or below, the mean: whichever the object is",
    )


def measure(args: Namespace) -> None:
    check_files(args)
    if not args.model or not (args.image or args.dataset_name):
        raise ValueError("give --model, and --image or --dataset_name")
    if args.num_images < 1 or args.image_size < 1:
        raise ValueError(f"num_images and image_size must be at least 1, got {args.num_images} and {args.image_size}")
    if not PartialState().is_main_process:
        return
    if args.image:
        rows, source = find_images(args.image, args.num_images, args.seed), describe_given(args.image)
        names = [image_label(row) for row in rows]
    else:
        split = find_eval_split(args)
        dataset, source = images_of(args, split, with_labels=False), f"{args.dataset_name}, {split}"
        chosen = choose_images(len(dataset), args.num_images, args.seed).tolist()
        rows = dataset.select(chosen)
        names = [image_label(row, number) for row, number in zip(rows, chosen)]
    model, image_processor = load_model(args.model, value_range=args.value_range and tuple(args.value_range))
    if isinstance(model, RawPixels):
        raise ValueError("raw pixels have no patches; give a model")
    mean, std = mean_and_std(image_processor, num_channels(model.config))
    reading = reading_of(args, model)
    reading = reading if args.image else reading.of(dataset.features)
    kept = choose_decodable(rows, reading, "images to draw")
    rows, names = [rows[number] for number in kept], [names[number] for number in kept]
    images, maps = [], []
    for row in tqdm(rows, "patches", leave=False, disable=None):
        pixels = to_values(image_processor, decode_image(row["image"], reading))
        pixels = resize_and_crop(pixels, args.image_size, patch_size(model))
        pixel_values = (to_tensor(pixels.transpose(1, 2, 0)) - mean) / std
        images.append(to_picture(pixels, args.display_channels))
        maps.append(patch_map(model, pixel_values))
    components, colors = principal_components(maps, args.foreground)
    arrays = {f"components_{number}": values for number, values in enumerate(components)}
    arrays |= {f"colors_{number}": values for number, values in enumerate(colors)}
    figure = draw_colors(images, colors, names)
    add_caption(figure, args.model, source)
    write_files(args, figure, arrays)
