"""What commands share that write a picture: where its images come from, and how it is written."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modeling_dino.command_line import Parser

from .descriptors import image_rows
from .images import IMAGE_SUFFIXES
from .outputs import check_outputs, mark, write_arrays, write_figure


def add_picture(parser: Parser, output: str, num_images: int, meaning: str) -> None:
    """`--image`, `--num_images`, `--seed`, `--output` and `--save_arrays`."""
    parser.add_argument(
        "--image", nargs="+", metavar="PATH", help=f"{meaning}: image files, or folders of which all are taken"
    )
    parser.add_argument(
        "--num_images",
        type=int,
        default=num_images,
        help="without --image, how many of the data set to show (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    add_files(parser, output)


def add_files(parser: Parser, output: str) -> None:
    parser.add_argument("--output", default=output, help="PNG to write (default: %(default)s)")
    parser.add_argument(
        "--save_arrays", action="store_true", help="also write the numbers behind it, to an .npz beside"
    )


def check_files(args: Namespace) -> None:
    """Check --output and the .npz beside it, before any work.

    Raises:
        ValueError: an output that is not a .png; see also `check_outputs`.
    """
    path = Path(args.output)
    if path.suffix != ".png":
        raise ValueError(f"output must be a file that ends in .png, got {args.output}")
    check_outputs(args, [path, path.with_suffix(".npz")] if args.save_arrays else [path])


def find_images(given: Sequence[str]) -> list[dict]:
    """Rows of image files, in the order given; those of a folder, and of all folders in it, by name.

    Raises:
        ValueError: a file that is not there, a folder without images.
    """
    paths = []
    for name in given:
        path = Path(name).expanduser()
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if path.is_dir() and not found:
            raise ValueError(f"there is no image in the folder {name}")
        paths += found if path.is_dir() else [path]
    return image_rows(paths)


def to_picture(pixels: np.ndarray) -> np.ndarray:
    """Pixels (channels, height, width) -> RGB (height, width, 3); of fewer than 3 channels, the first in grey."""
    pixels = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


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
