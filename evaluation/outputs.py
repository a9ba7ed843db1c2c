"""Files that a command writes: which ones it may replace, and how they are written whole.

A command replaces its own files alone. It recognizes them by what they say of themselves: reports by their entries'
`protocol`, PNGs by the text chunk `Software`, PDFs and SVGs by their creator, videos by the tag `comment`, .npz files
by the archive's comment, CSVs by their columns, and features by their manifest.
"""

import csv
import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo

from .attention_video import VIDEO_SUFFIXES, import_av


FIGURE_SUFFIXES = (".png", ".pdf", ".svg")
_INPUTS = ("dataset_name", "image", "video", "distractors", "whitening", "places")


def mark(command: str) -> str:
    """Return what a picture, video or .npz of `dino-eval COMMAND` says of its origin."""
    return f"dino-eval {command}"


def is_from(path: Path, command: str) -> bool:
    """Return whether a report, picture, video or .npz is from `dino-eval COMMAND`."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start.startswith(b"\x89PNG"):
            with PillowImage.open(path) as picture:
                return picture.info.get("Software") == mark(command)
        if path.suffix.lower() in (".pdf", ".svg"):
            name = mark(command)
            creators = {f"/Creator ({name})", f"<dc:title>{name}</dc:title>"}
            text = path.read_bytes().decode("latin-1")
            return any(creator in text for creator in creators)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode() == mark(command)
        if path.suffix.lower() in VIDEO_SUFFIXES:
            with import_av().open(str(path)) as container:
                tags = {name.lower(): value for name, value in container.metadata.items()}
            return tags.get("comment") == mark(command)
        entries = json.loads(path.read_text()) if start.startswith(b"[") else []
        return bool(entries) and all(entry["protocol"] == command for entry in entries)
    except Exception:  # what libraries raise for a file of any other kind
        return False


def is_table(path: Path, columns: Sequence[str]) -> bool:
    """Return whether a file is a CSV with exactly these columns."""
    try:
        with path.open("rb") as file:
            return file.readline(10_000).decode().strip() == ",".join(columns)
    except (OSError, UnicodeDecodeError):
        return False


def check_outputs(args: Namespace, paths: Iterable[Path], is_ours: Callable[[Path], bool] | None = None) -> None:
    """Check the files that a command will write, before it does any work.

    Args:
        args: The command's arguments.
        paths: The files.
        is_ours: Return whether an existing file is from the same command. Default: `is_from`.

    Raises:
        ValueError: a file that is not from the same command, unless `args.overwrite`; an input; a file among the
            images of a folder that is an input, except a report; a folder that cannot be written.
    """
    given = [vars(args).get(name) or [] for name in _INPUTS]
    inputs = [Path(name).expanduser() for names in given for name in ([names] if isinstance(names, str) else names)]
    for path in paths:
        resolved = path.resolve()
        for source in inputs:
            if resolved == source.resolve():
                raise ValueError(f"the input {source} cannot be its own output. Choose another output.")
            if source.is_dir() and source.resolve() in resolved.parents and path.suffix != ".json":
                raise ValueError(f"{path} would become a part of the input {source}. Choose an output outside of it.")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is a folder or device, and not a file. Choose another output.")
        if os.path.lexists(path) and not args.overwrite:
            if not (is_ours(path) if is_ours else is_from(path, args.protocol)):
                origin = mark(args.protocol)
                raise ValueError(
                    f"{path} exists and is not from {origin}. Choose another output, or replace it with --overwrite."
                )
        folder = next(parent for parent in resolved.parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} is not a folder that can be written. Choose another output than {path}.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager that gives a temporary path of the same name, and moves it to `path` at the end.

    Where the block fails, `path` does not change. A link stays, and its target is replaced.
    """
    path = path.resolve()
    with _temporary_folder(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Context manager that gives a temporary folder, and moves the files in it to `folder` at the end."""
    with _temporary_folder(folder / "files") as temporary:
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Context manager that gives an empty folder beside `path`, and removes it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(".incomplete", f".{path.name[:50]}.", path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a CSV in UTF-8; parts of names that are not UTF-8 are written as escapes."""
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        _write_rows(file, columns, rows)


def print_table(columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print a CSV."""
    text = io.StringIO()
    _write_rows(text, columns, rows)
    print(text.getvalue().encode(errors="backslashreplace").decode(), end="")


def _write_rows(file: TextIO, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def write_figure(figure, path: Path, origin: str, **options) -> None:
    """Write a figure of matplotlib as a PNG, PDF or SVG that names its origin, and close it.

    The same figure gives the same bytes: no time is written.

    Args:
        figure: The figure.
        path: The file, whose name says the kind.
        origin: See `mark`.
        **options: Arguments of `savefig`.
    """
    from matplotlib import pyplot as plt

    metadata = {
        ".png": {"Software": origin},
        ".pdf": {"Creator": origin, "CreationDate": None},
        ".svg": {"Creator": origin, "Date": None},
    }
    with replacing(path) as temporary, plt.rc_context({"svg.hashsalt": origin}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in scripts that the font lacks
        figure.savefig(temporary, metadata=metadata[path.suffix.lower()], **options)
    plt.close(figure)


def write_picture(picture: PillowImage.Image, path: Path, origin: str) -> None:
    """Write a picture as a PNG that names its origin."""
    info = PngInfo()
    info.add_text("Software", origin)
    with replacing(path) as temporary:
        picture.save(temporary, pnginfo=info)


def write_arrays(arrays: dict[str, np.ndarray], path: Path, origin: str) -> None:
    """Write arrays as an .npz that names its origin."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = origin.encode()
