"""CLS self-attention of the last block, as arrays, figures and videos: what the paper shows in figures 1 and 3."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_dino.command_line import Parser

from .arguments import add_images
from .attention_figures import FIGURES, blend, color_map, draw_attention, draw_figures, enlarge
from .attention_video import VIDEO_SUFFIXES, Video, write_video
from .decoding import decode_image
from .features import evaluating, find_eval_split, images_of
from .models import (
    RawPixels,
    grid,
    load_model,
    mean_and_std,
    network_of,
    num_channels,
    patch_size,
    reading_of,
    run_model,
    taking,
    to_pixel_values,
    to_values,
)
from .outputs import FIGURE_SUFFIXES, check_outputs, mark, replacing, write_arrays
from .pictures import (
    add_display_channels,
    add_num_images,
    choose_images,
    describe_given,
    find_images,
    image_label,
    to_picture,
)
from .skipped import choose_decodable


SHORT_SIDE = 480  # pixels, of files and frames; the original's
SMALL = 128  # a network of images smaller than this sees them at its own size
MAX_ROWS = 300  # of a sheet, which could not be written if it were much longer


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
    with evaluating(network):
        if network.config.model_type == "timm_wrapper":
            attention = _timm_attention(network, pixel_values)
        else:
            attention = _attention(network, pixel_values)
    rows, columns = grid(network, pixel_values)
    if attention is None or attention.ndim != 4 or attention.shape[-1] <= rows * columns:
        raise ValueError(
            f"a {type(network).__name__} has no CLS attention; attention is for Vision Transformers with a CLS token"
        )
    return attention[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)).float().cpu()


def _attention(network: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor | None:
    """Attention (images, heads, 1, tokens) of the first token in the last block.

    The network runs with PyTorch's fused attention, and only this row of it is computed beside: whole maps of all
    blocks, which `output_attentions` keeps, would be 12 GB of a ViT-S/8 for one image of 480 x 848.
    """
    recorded = None

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        nonlocal recorded
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        recorded = (query[:, :, :1] @ key.transpose(2, 3) * scale).softmax(-1, dtype=torch.float32)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    implementation = network.config._attn_implementation
    if not network._supports_sdpa:
        return None
    AttentionInterface.register("cls_attention", attend)
    try:
        network.set_attn_implementation("cls_attention")
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled anew with every call
            run_model(network, pixel_values)
    finally:
        network.set_attn_implementation(implementation)
    return recorded


def _timm_attention(network: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor | None:
    from timm.utils import AttentionExtract

    last = list(getattr(network.timm_model, "blocks", []))[-1:]
    if not last or not hasattr(last[0], "attn"):
        return None
    attention, was_fused = last[0].attn, last[0].attn.fused_attn
    attention.fused_attn = False  # which would not keep its weights
    try:
        extract = AttentionExtract(network.timm_model, ["blocks.*.attn.attn_drop"], method="hook")
        with taking(pixel_values):
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


def draw_attention_of(
    model: PreTrainedModel,
    image_processor,
    images: Sequence[np.ndarray],
    path: Path,
    display_channels: Sequence[int] | None = None,
) -> Path:
    """Draws what a Vision Transformer's CLS token looks at in images (channels, height, width).

    Raises:
        ValueError: a network without CLS attention.
    """
    pixel_values = to_pixel_values(image_processor, images)
    maps = cls_attention(model, pixel_values)
    seen = [to_picture(image, display_channels) for image in _seen(image_processor, pixel_values)]
    return draw_attention(seen, maps, path, origin="dino-train")


def _seen(image_processor, pixel_values: torch.Tensor) -> np.ndarray:
    """What an image processor has left of images, (images, channels, height, width) in uint8."""
    mean, std = mean_and_std(image_processor, pixel_values.shape[1])
    return ((pixel_values * std + mean) * 255).round().to(torch.uint8).numpy()


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) of an image with the short side given, in the same aspect."""
    return tuple(short_side * side // min(size) for side in size)


def fit_to_patches(image: np.ndarray, short_side: int, patch: int) -> np.ndarray:
    """Resizes an image bilinearly to a short side, its aspect kept, then cuts right and bottom to whole patches.

    The original cuts alike, but makes a square first.

    Args:
        image: (channels, height, width) in uint8 or fp32.
        short_side: In pixels, at least a patch.
        patch: Side of a patch.
    """
    height, width = scaled_size(image.shape[1:], short_side)
    resized = resize(torch.from_numpy(np.ascontiguousarray(image)), [height, width], antialias=True).numpy()
    return resized[:, : height // patch * patch, : width // patch * patch]


def normalize(images: Sequence[np.ndarray], image_processor) -> torch.Tensor:
    """Images (channels, height, width) in uint8, or fp32 from 0 to 1, of one size -> pixel values, at that size."""
    mean, std = mean_and_std(image_processor, len(images[0]))
    values = torch.from_numpy(np.stack(images))
    return ((values.float() / 255 if values.dtype == torch.uint8 else values) - mean) / std


def attention_frames(
    model: PreTrainedModel, image_processor, video: Video, short_side: int, batch_size: int = 1, overlay: bool = False
) -> Iterator[np.ndarray]:
    """For each frame of a video, the mean of the heads' maps in its size: RGB (height, width, 3) in uint8.

    Args:
        model: A Vision Transformer.
        image_processor: What it normalises by.
        video: Its frames have the channels that the model takes.
        short_side: At which the network sees frames, in pixels.
        batch_size: Frames per forward pass.
        overlay: Lay the map over the frame, instead of showing it alone.
    """
    frames = iter(tqdm(video, "attention", total=video.num_frames or None, disable=None))
    while batch := list(islice(frames, batch_size)):
        seen = [fit_to_patches(frame, short_side, patch_size(model)) for frame in batch]
        maps = cls_attention(model, normalize(seen, image_processor)).mean(1)
        for frame, cells in zip(batch, maps):
            size = frame.shape[1:]
            # what was cut is less than a patch: the map stays where it belongs, its last cells reach to the edge
            cell = tuple(patch_size(model) * a / b for a, b in zip(size, scaled_size(size, short_side)))
            colors = enlarge(color_map(cells.numpy()), size, cell)
            yield blend(to_picture(frame), colors) if overlay else colors


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", nargs=1, required=True, help="Hub id or folder of a Vision Transformer")
    parser.add_argument(
        "--image", nargs="+", metavar="FILE", help="image files, or folders of which --num_images are drawn"
    )
    parser.add_argument("--video", metavar="FILE", help="video, for a video of the mean attention of each frame")
    add_images(parser)
    add_num_images(parser, 8)
    parser.add_argument(
        "--image_size",
        type=int,
        help="short side in pixels, aspect kept, cut to whole patches (default: of a data set, what the model's image "
        f"processor makes; else {SHORT_SIDE}, or the model's own size if that is below {SMALL})",
    )
    parser.add_argument("--mass", type=float, default=0.6, help="share of attention in masks (default: %(default)s)")
    parser.add_argument(
        "--output",
        help="a .png, .pdf or .svg for one sheet of all images, a folder for figures of each image, or, of --video, a "
        f"video: {', '.join(VIDEO_SUFFIXES)} (default: attention.png, attention.mp4)",
    )
    parser.add_argument(
        "--save_arrays",
        action="store_true",
        help="also write images, attention and masks: into an .npz beside the sheet, or for each image",
    )
    add_display_channels(parser)
    parser.add_argument("--overlay", action="store_true", help="video: the attention over the frames, not alone")
    parser.add_argument("--batch_size", type=int, default=1, help="frames per forward pass (default: %(default)s)")


def measure(args: Namespace) -> None:
    sources = [name for name in ("image", "video", "dataset_name") if getattr(args, name)]
    if len(sources) != 1:
        given = " and ".join(f"--{name}" for name in sources) or "none"
        raise ValueError(f"give one of --image, --video and --dataset_name, got {given}")
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {args.num_images}")
    if not 0 < args.mass < 1:
        raise ValueError(f"mass must be between 0 and 1, got {args.mass}")
    if args.video and args.save_arrays:
        raise ValueError("save_arrays is for images; of a video, only the video is written")
    output = Path(args.output or ("attention.mp4" if args.video else "attention.png")).expanduser()
    _check_output(output, args.video)
    if not PartialState().is_main_process:
        return
    if args.video:
        _draw_video(args, Path(args.video).expanduser(), output)
    else:
        _draw_images(args, output)


def _check_output(output: Path, is_video: bool) -> None:
    if is_video and output.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(f"the output of --video ends in {', '.join(VIDEO_SUFFIXES)}, got {output}")
    if not is_video and output.suffix.lower() not in (*FIGURE_SUFFIXES, "") and not output.is_dir():
        hint = "; a video needs --video" if output.suffix.lower() in VIDEO_SUFFIXES else ""
        raise ValueError(f"the output is a .png, .pdf or .svg, or a folder, got {output}{hint}")


def _short_side(model: PreTrainedModel, image_size: int | None) -> int:
    """Of files and frames: the network's own, if it is of small images."""
    if image_size is None:
        own = getattr(network_of(model).config, "image_size", SHORT_SIDE)
        own = own if isinstance(own, int) else min(own)
        image_size = own if own < SMALL else SHORT_SIDE
    if image_size < patch_size(model):
        raise ValueError(f"image_size must be at least a patch of {patch_size(model)} pixels, got {image_size}")
    return image_size


def _load(args: Namespace) -> tuple[PreTrainedModel, object]:
    model, image_processor = load_model(args.model, value_range=args.value_range and tuple(args.value_range))
    if isinstance(model, RawPixels):
        raise ValueError("raw_pixels is no network and has no attention; give a Vision Transformer")
    return model, image_processor


def _draw_video(args: Namespace, path: Path, output: Path) -> None:
    check_outputs(args, [output])
    model, image_processor = _load(args)
    video = Video(path, num_channels(model.config))
    short_side = _short_side(model, args.image_size)
    frames = attention_frames(model, image_processor, video, short_side, args.batch_size, args.overlay)
    with replacing(output) as temporary:
        write_video(temporary, frames, video.rate, mark(args.protocol))
    print(f"wrote {output}")


def _draw_images(args: Namespace, output: Path) -> None:
    if args.image:
        rows, source = find_images(args.image, args.num_images, args.seed), describe_given(args.image)
        labels = [image_label(row) for row in rows]
    else:
        split = find_eval_split(args)
        dataset, source = images_of(args, split, with_labels=False), f"{args.dataset_name}, {split}"
        chosen = choose_images(len(dataset), args.num_images, args.seed).tolist()
        rows = dataset.select(chosen)
        labels = [image_label(row, number) for row, number in zip(rows, chosen)]
    images = [row["image"] for row in rows]
    is_sheet = output.suffix.lower() in FIGURE_SUFFIXES
    if is_sheet and len(images) > MAX_ROWS:
        raise ValueError(f"a sheet has at most {MAX_ROWS} rows, got {len(images)} images; give a folder as the output")
    names = _names(images)
    suffixes = [f"_{kind}.png" for kind in FIGURES] + [".npz"] * args.save_arrays
    beside = output.with_suffix(".npz")
    files = [output / f"{name}{suffix}" for name in names for suffix in suffixes]
    check_outputs(args, [output] + [beside] * args.save_arrays if is_sheet else files)
    model, image_processor = _load(args)
    reading = reading_of(args, model)
    reading = reading if args.image else reading.of(dataset.features)
    kept = choose_decodable(rows, reading, "images to draw")
    images, names, labels = ([values[number] for number in kept] for values in (images, names, labels))
    sheet, arrays = [], {}
    for name, image in zip(tqdm(names, "attention", disable=None), images):
        pixels = decode_image(image, reading)
        if args.image or args.image_size is not None:
            values = to_values(image_processor, pixels)
            seen = fit_to_patches(values, _short_side(model, args.image_size), patch_size(model))
            pixel_values = normalize([seen], image_processor)
        else:
            pixel_values = to_pixel_values(image_processor, [pixels])
            [seen] = _seen(image_processor, pixel_values)
        [attention], picture = cls_attention(model, pixel_values), to_picture(seen, args.display_channels)
        masks = mass_masks(attention, args.mass)
        if is_sheet:
            sheet.append((picture, attention))
        else:
            draw_figures(picture, attention, masks, output, name, args.model)
        found = {"image": picture, "attention": attention, "masks": masks}
        if args.save_arrays and is_sheet:
            arrays |= {f"{name}_{what}": values for what, values in found.items()}
        elif args.save_arrays:
            write_arrays(found, output / f"{name}.npz", mark(args.protocol))
    if is_sheet:
        draw_attention(*zip(*sheet), output, names=labels, model=args.model, data=source)
    if arrays:
        write_arrays(arrays, beside, mark(args.protocol))
    print(f"wrote {output}" if is_sheet else f"wrote the figures of {len(names)} images to {output}")


def _names(images: Sequence[dict | list | np.ndarray]) -> list[str]:
    """What the files of each image are called: as the image's own; numbered, if some are of one name or none."""
    names = [Path((isinstance(image, dict) and image["path"]) or "image").stem for image in images]
    return names if len(set(names)) == len(names) else [f"{i:04d}_{name}" for i, name in enumerate(names)]
