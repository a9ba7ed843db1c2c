"""Jaccard of attention maps with the objects of PASCAL VOC 2012, each by the head that fits it best.

Nothing is trained. The paper's figure 4 has 45.9 for ViT-S/16, 27.3 for the same network supervised and 22.0 for one
with random weights (here `--model untrained:M`).
"""

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image as PillowImage
from torch.nn import functional as F
from tqdm import tqdm

from modeling_dino.command_line import Parser

from .arguments import add_model, add_output
from .attention import cls_attention, mass_masks
from .decoding import BrokenImageError, Reading, decode_8_bits
from .images import load_images
from .models import describe_model, load_model, mean_and_std, num_channels, patch_size
from .processes import of_all_processes
from .report import Report, make_report
from .skipped import refuse_incomplete
from .video_segmentation import VOID, jaccard, read_indices


def object_jaccards(masks: torch.Tensor, indices: np.ndarray) -> list[tuple[float, float]]:
    """Of each object of an image, the Jaccard index with the mask that fits it best.

    The protocol is what the author wrote in issue 54 of the original, where void is as good as background. Most who
    measure on PASCAL VOC leave it out of intersections and unions.

    Args:
        masks: Booleans (heads, rows, columns), enlarged here to the annotation's size by nearest cells.
        indices: Object indices (height, width) in uint8; 0 is background, 255 void.

    Returns:
        For each object, in the order of the indices: as the author did, and with void left out.
    """
    masks = F.interpolate(masks[None].float(), size=indices.shape, mode="nearest-exact")[0].bool().numpy()
    known = indices != VOID
    return [
        tuple(max(jaccard(mask & where, indices == index) for mask in masks) for where in (True, known))
        for index in np.unique(indices)
        if index not in (0, VOID)
    ]


def find_images_and_masks(args: Namespace) -> tuple[Sequence[dict], Sequence[dict]]:
    """Rows of images and of masks, as `load_images` has them: of a list of PASCAL VOC, or of a data set's columns.

    Raises:
        ValueError: no such list or column, or files that the list names and that are not there.
    """
    if args.mask_column:
        return tuple(
            load_images(args.dataset_name, args.dataset_config_name, args.eval_split, column, with_labels=False)
            for column in (args.image_column, args.mask_column)
        )
    root = Path(args.dataset_name)
    file = root / f"ImageSets/Segmentation/{args.eval_split}.txt"
    if not file.is_file():
        raise ValueError(
            f"there is no list {file} as in PASCAL VOC 2012; of a data set in columns, name that of the masks by "
            "--mask_column"
        )
    names = file.read_text().split()
    images, masks = (
        [root / folder / f"{name}{suffix}" for name in names]
        for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationObject", ".png"))
    )
    for path in images + masks:
        if not path.is_file():
            raise ValueError(f"there is no {path}, which the list {file} names")
    return tuple([{"image": {"path": str(path), "bytes": None}} for path in paths] for paths in (images, masks))


def resized_to_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """An image (channels, height, width) in uint8 as a square, by Pillow's bilinear filter; its aspect is not kept."""
    size = (side, side)
    return np.stack(
        [np.array(PillowImage.fromarray(channel).resize(size, PillowImage.Resampling.BILINEAR)) for channel in pixels]
    )


def add_arguments(parser: Parser) -> None:
    add_model(parser, 480, "side of the squares that images are resized to")
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="folder in the layout of PASCAL VOC 2012; with --mask_column, a Hub id or path of a data set",
    )
    parser.add_argument("--dataset_config_name", help="configuration of a data set that has several")
    parser.add_argument("--eval_split", default="val", help="list or split to evaluate on (default: %(default)s)")
    parser.add_argument("--image_column", help="column of the images, where there is a --mask_column")
    parser.add_argument("--mask_column", help="column of the masks: palette or grey images of object indices")
    parser.add_argument(
        "--mass", type=float, default=0.6, help="share of the attention that a mask keeps (default: %(default)s)"
    )
    add_output(parser)


def measure(args: Namespace) -> Report:
    """The mean over images of the mean over their objects; images are shared out to the processes."""
    if args.model is None:
        raise ValueError("give --model")
    if not 0 < args.mass < 1:
        raise ValueError(f"mass must be between 0 and 1, got {args.mass}")
    images, masks = find_images_and_masks(args)
    model, image_processor = load_model(args.model)
    channels, patch = num_channels(model.config), patch_size(model)
    if args.image_size < patch:
        raise ValueError(f"image_size must be at least {patch}, the side of a patch, got {args.image_size}")
    mean, std = mean_and_std(image_processor, channels)
    state = PartialState()

    def share() -> dict[int, tuple[bytes, list[tuple[float, float]]]]:
        """Hash and objects of this process's images."""
        own = range(state.process_index, len(images), state.num_processes)
        found = {}
        # on a terminal alone
        for number in tqdm(own, "images", leave=False, disable=None if state.is_main_process else True):
            mask = masks[number]["image"]
            try:
                pixels, indices = decode_8_bits(images[number]["image"], Reading(channels)), read_indices(mask)
            except BrokenImageError as error:
                refuse_incomplete([{"name": error.name, "reason": error.reason}])
            if pixels.shape[1:] != indices.shape:
                sizes = "{1}x{0}, and its image {3}x{2}".format(*indices.shape, *pixels.shape[1:])
                raise ValueError(f"the mask {mask['path'] or f'of image {number} (from 0)'} is {sizes}")
            square = resized_to_square(pixels, args.image_size // patch * patch)
            attention = cls_attention(model, (torch.from_numpy(square)[None] / 255 - mean) / std)[0]
            content = hashlib.sha256(pixels.tobytes() + indices.tobytes()).digest()
            found[number] = content, object_jaccards(mass_masks(attention, args.mass), indices)
        return found

    found = {number: entry for part in of_all_processes(share, "masks") for number, entry in part.items()}
    contents, objects = zip(*(found[number] for number in range(len(images)))) if images else ((), ())
    means = 100 * np.array([np.mean(of_image, axis=0) for of_image in objects if of_image])  # (images, 2)
    if not len(means):
        raise ValueError(f"there are no objects in the {len(images)} masks of {args.dataset_name}, {args.eval_split}")
    data = {
        "name": args.dataset_name,
        "config": args.dataset_config_name,
        "split": args.eval_split,
        "num_images": len(means),
        "num_images_without_objects": len(images) - len(means),
        "num_objects": sum(map(len, objects)),
        "revision": f"sha256:{hashlib.sha256(b''.join(contents)).hexdigest()[:16]}",
    }
    scores = {"jaccard": means[:, 0], "jaccard_without_void": means[:, 1]}
    return make_report(args, describe_model(model, args.model), data, scores)
