"""What commands share that write a picture: where its images come from, and how it is written."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState

from modeling_dino.command_line import Parser, printable

from .descriptors import image_rows
from .folders import list_folder
from .outputs import FIGURE_SUFFIXES, check_outputs, mark, write_arrays, write_figure


def add_picture(parser: Parser, output: str, num_images: int, meaning: str) -> None:
    """`--image`, `--num_images`, `--seed`, `--output` and `--save_arrays`."""
    parser.add_argument(
        "--image",
        nargs="+",
        metavar="PATH",
        help=f"{meaning}: image files, or folders, of which --num_images are drawn",
    )
    add_num_images(parser, num_images)
    add_display_channels(parser)
    add_files(parser, output)


def add_num_images(parser: Parser, num_images: int) -> None:
    """`--num_images` and `--seed`."""
    parser.add_argument(
        "--num_images",
        type=int,
        default=num_images,
        help="images to draw of a data set, or of the folders of --image. Default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")


def add_display_channels(parser: Parser) -> None:
    parser.add_argument(
        "--display_channels",
        nargs="+",
        type=int,
        help="three channels, from 0, shown as red, green and blue, or one as gray. Default: the first three",
    )


def add_files(parser: Parser, output: str) -> None:
    parser.add_argument("--output", default=output, help="picture to write: .png, .pdf or .svg. Default: %(default)s")
    parser.add_argument(
        "--save_arrays", action="store_true", help="also write the numbers behind it, to an .npz beside"
    )


def check_files(args: Namespace) -> None:
    """Check --output and the .npz beside it, before any work.

    Raises:
        ValueError: an output that is not a picture; see also `check_outputs`.
    """
    path = Path(args.output)
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"output must end in .png, .pdf or .svg, got {args.output}")
    check_outputs(args, [path, path.with_suffix(".npz")] if args.save_arrays else [path])


def find_images(given: Sequence[str], num_images: int, seed: int) -> list[dict]:
    """Return rows of image files, in the order given: all that are named, and some of those that folders hold.

    Args:
        given: Files, and folders, whose images, and those of all folders in them, come by name.
        num_images: Images to choose from those of all folders.
        seed: Of the choice.

    Raises:
        ValueError: a file that is not there, a folder without images.
    """
    paths, of_folders = [], []
    for name in given:
        path = Path(name).expanduser()
        found = [path / name for name in list_folder(path).images] if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there is no image in the folder {name}")
        of_folders += range(len(paths), len(paths) + len(found)) if path.is_dir() else []
        paths += found
    left_out = set(of_folders) - {of_folders[number] for number in choose_images(len(of_folders), num_images, seed)}
    return image_rows([path for number, path in enumerate(paths) if number not in left_out])


def choose_images(num_all: int, num_images: int, seed: int, setting: str = "num_images") -> np.ndarray:
    """Return the numbers of the images to draw, in a random order; the main process says so if these are not all.

    Args:
        num_all: Number of images.
        num_images: Number of those to draw, if there are as many.
        seed: Of the choice: the same as `datasets` shuffles by.
        setting: Name of the setting that `num_images` is from.
    """
    if num_images < num_all and PartialState().is_main_process:
        print(f"drawing {num_images:,} of {num_all:,} images; --{setting} sets how many", flush=True)
    return np.random.default_rng(seed).permutation(num_all)[:num_images]


def describe_given(given: Sequence[str]) -> str:
    """Return what a caption says of the data of --image: the first of the files and folders, and how many others."""
    return given[0] + (f" and {len(given) - 1} more" if len(given) > 1 else "")


def image_label(row: dict, number: int | None = None) -> str:
    """Return what a picture calls an image: its file, or its number in the dataset."""
    image = row["image"]
    path = image.get("path") if isinstance(image, dict) else None
    return Path(path).name if path else "" if number is None else f"number {number}"


def short_label(name: str, length: int = 24) -> str:
    """Return the name of a file or class as all pictures show it: the end of a long one, which tells files apart."""
    name = printable(name)
    return name if len(name) <= length else "…" + name[1 - length :]


def add_caption(figure, model: str, data: str = "") -> None:
    """Write under a figure which model it is of, and of what data.

    Args:
        figure: The figure, which is saved with `bbox_inches="tight"`.
        model: Name of the model.
        data: Name of the dataset, and what of it.
    """
    text = f"model: {short_label(model, 60)}" + f"\ndata: {short_label(data, 60)}" * bool(data)
    figure.text(0.002, -0.02 / figure.get_figheight(), text, va="top", fontsize=6, color="0.4", parse_math=False)


def to_picture(pixels: np.ndarray, display_channels: Sequence[int] | None = None) -> np.ndarray:
    """Pixels (channels, height, width) in uint8, or fp32 from 0 to 1 -> RGB (height, width, 3) in uint8.

    Args:
        pixels: Of any number of channels.
        display_channels: Three channels, from 0, that become red, green and blue, or one that becomes gray. Default:
            the first three; of two, the first.
    """
    if pixels.dtype != np.uint8:
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    chosen = choose_channels(len(pixels), display_channels)
    return np.ascontiguousarray(pixels[chosen].transpose(1, 2, 0))


def choose_channels(num_channels: int, display_channels: Sequence[int] | None = None) -> list[int]:
    """The channels that become red, green and blue, see `to_picture`.

    Raises:
        ValueError: another number of channels than 1 or 3, or a channel that is not there.
    """
    if not display_channels:
        return [0, 1, 2] if num_channels >= 3 else [0, 0, 0]
    if len(display_channels) not in (1, 3) or not all(0 <= channel < num_channels for channel in display_channels):
        raise ValueError(
            f"display_channels must be 1 or 3 numbers from 0 to {num_channels - 1}, got "
            f"{' '.join(map(str, display_channels))}"
        )
    return list(display_channels) * (3 // len(display_channels))


def write_files(args: Namespace, figure, arrays: dict[str, np.ndarray]) -> None:
    """Writes --output and, if wanted, --save_arrays, and prints their names."""
    origin, beside = mark(args.protocol), Path(args.output).with_suffix(".npz")
    write_figure(figure, Path(args.output), origin, dpi=200, bbox_inches="tight", pad_inches=0.03)
    if args.save_arrays:
        write_arrays(arrays, beside, origin)
    print(f"wrote {args.output}" + f" and {beside}" * args.save_arrays)


def start_figure(**kwargs):
    """A figure of matplotlib that needs no display; arguments are those of `matplotlib.pyplot.figure`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.figure(**kwargs)
