"""Images from anywhere that `datasets` reads: Hub id, folder (class folders or flat), parquet, tars, `save_to_disk`.

Images stay encoded until somebody needs pixels, and then `decoding.EncodedImage` is the one way to get them.
"""

import glob
import hashlib
import logging
import os
import pickle
import re
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import ReadError

import numpy as np
from accelerate import PartialState
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from datasets.features import Array2D, Array3D, ClassLabel, LargeList, List, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY

from modeling_dino.command_line import check_files, one_line, printable

from .folders import File, ImageFolder, list_folder, read_folder, split_word


FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_NUM_STREAM_SHARDS = 64  # of a folder that is streamed


def _refuse_pickle(content: bytes) -> None:
    raise pickle.UnpicklingError("a pickled member (.pth) of a tar could run code and is not read. Leave it out.")


WebDataset.DECODERS["pth"] = _refuse_pickle  # the library's own unpickles what torch.load holds to be harmless


def is_path(name: str) -> bool:
    """Whether a name of data or weights is a path, there or not, and no Hub id."""
    path = Path(name).expanduser()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in FILE_BUILDERS or path.exists()


def _image_folder(dataset_name: str, layout: str, tiff_pages: str | None) -> ImageFolder | None:
    """The folder of image files of a name; None for anything else."""
    path = Path(dataset_name).expanduser()
    if not path.is_dir() or _is_saved(path):
        return None
    listing = list_folder(path)
    has_zip = any(file.name.lower().endswith(".zip") for file in listing.archives)
    if listing.tables or (has_zip and not listing.images):
        odd = listing.unread.get("names that are not UTF-8")
        if odd:
            raise ValueError(
                f"the names of {len(odd)} files in {dataset_name} are not UTF-8, such as {printable(odd[0])}. The "
                "datasets library cannot read them. Rename them, as convmv does."
            )
        if listing.images:
            _warn(f"{path}: {len(listing.images):,} image files beside tables are not read, such as "
                  f"{printable(listing.images[0].name)}")  # fmt: skip
        return None
    return read_folder(path, layout, tiff_pages, listing)


def _is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _warn(text: str) -> None:
    if PartialState().is_main_process:
        warnings.warn(text)


def _load(dataset_name: str, config_name: str | None, streaming: bool, **options):
    """All splits of a dataset that is not a folder of images; `options` are for the builder of its format."""
    path = Path(dataset_name).expanduser()
    if not path.exists():
        if is_path(dataset_name):
            raise ValueError(f"there is no file or folder {dataset_name}")
        try:
            return load_dataset(dataset_name, config_name, streaming=streaming, **options)
        except DatasetNotFoundError as error:
            raise ValueError(
                f"{dataset_name} is neither a local path nor a dataset that the Hub lets you read ({error}); for a "
                "gated or private one, log in with `hf auth login`"
            ) from error
        except DataFilesNotFoundError as error:
            raise ValueError(f"no data files in {dataset_name}: {error}") from error
        except (OSError, *CONNECTION_ERRORS_TO_RETRY) as error:
            raise ValueError(f"{dataset_name} is no local path, and the Hub could not be asked: {error}") from error
    if path.is_file():
        if path.suffix not in FILE_BUILDERS:
            raise ValueError(f"{dataset_name} is a file; allowed are .parquet, .arrow, .tar or a folder")
        return load_dataset(
            FILE_BUILDERS[path.suffix], data_files={"train": _no_pattern(path)}, streaming=streaming, **options
        )
    if _is_saved(path):
        for folder in (path, *(part for part in path.iterdir() if part.is_dir())):
            check_files(folder)
        saved = load_from_disk(str(path))
        saved = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        if streaming:
            return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in saved.items()})
        return saved
    try:
        if _no_pattern(path) == str(path):
            return load_dataset(str(path), config_name, streaming=streaming, **options)
        builder, files = _table_files(path)
        return load_dataset(builder, data_files=files, streaming=streaming, **options)
    except DataFilesNotFoundError as error:
        raise ValueError(f"no data files in {dataset_name}: {error}") from error


def _no_pattern(path: Path) -> str:
    """A path as the datasets library takes it, which would see patterns in brackets, and an address in ::.

    Raises:
        ValueError: a path with ::, which cannot be written otherwise.
    """
    if "::" in str(path):
        raise ValueError(
            f"{printable(str(path))} has :: in its name, which the datasets library takes apart. Rename it."
        )
    return glob.escape(str(path))


def _table_files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """Builder and files of each split of a folder whose path itself looks like a pattern."""
    files = [path / file.name for file in list_folder(path).tables]
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1:
        raise ValueError(f"{path} has files of several kinds ({', '.join(sorted(suffixes))}). Keep one kind in it.")
    splits = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(path)).lower())
        split = next(filter(None, map(split_word, words)), "train")
        splits.setdefault(split, []).append(_no_pattern(file))
    return FILE_BUILDERS[suffixes.pop()], splits


def _pickled_member(dataset_name: str) -> str:
    path = Path(dataset_name).expanduser()
    for file in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.lower().endswith(".pth"):
                    return printable(member.name)
    return "a .pth file"


@contextmanager
def _errors_named(dataset_name: str) -> Iterator[None]:
    """Context manager in which what libraries raise for damaged data becomes a ValueError that names the data."""
    logger = logging.getLogger("datasets.packaged_modules")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # of the same errors
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    except (ImportError, *CONNECTION_ERRORS_TO_RETRY):  # an extra that is missing, the network
        raise
    except Exception as error:  # of pyarrow, fsspec, tarfile, or of fields that a saved dataset's JSON lacks
        if dataset_name in str(error) and isinstance(error, (ValueError, OSError)):
            raise
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, pickle.UnpicklingError):
            raise ValueError(
                f"{dataset_name} holds pickled members, such as {_pickled_member(dataset_name)}, which could run code "
                "and are not read. Leave them out of the tar."
            ) from error
        kind = "" if isinstance(cause, (ValueError, OSError, ReadError)) else f"{type(cause).__name__}: "
        raise ValueError(f"{dataset_name} cannot be read: {kind}{one_line(cause)}") from error
    finally:
        logger.setLevel(level)


def split_names(
    dataset_name: str, config_name: str | None = None, streaming: bool = False, folder_layout: str = "auto"
) -> list[str]:
    """The splits that a dataset has, by the arguments of `load_images`."""
    with _errors_named(dataset_name):
        folder = _image_folder(dataset_name, folder_layout, None)
        return list(folder.splits if folder else _load(dataset_name, config_name, streaming))


def local_files(dataset_name: str, split: str, folder_layout: str = "auto") -> list[File]:
    """The files of a split of a local dataset: of a folder of images its images, else all tables and archives."""
    path = Path(dataset_name).expanduser()
    if path.is_file():
        status = path.stat()
        return [File("", status.st_size, int(status.st_mtime))]
    folder = _image_folder(dataset_name, folder_layout, None)
    if folder:
        return folder.splits.get(split, [])
    listing = list_folder(path)
    return sorted(listing.tables + listing.archives)


def describe_folder(dataset_name: str, folder_layout: str = "auto") -> str | None:
    """How many files of a folder of images are read, in one line; None for anything else."""
    folder = _image_folder(dataset_name, folder_layout, None)
    return folder and folder.account()


def _find_image_column(features: Features, image_column: str | None) -> str:
    columns = ", ".join(features)
    if image_column is not None:
        if image_column not in features:
            raise ValueError(f"there is no column {image_column} (--image_column); the columns are {columns}")
        if not _holds_images(features[image_column], is_named=True):
            raise ValueError(f"column {image_column} holds no images but {features[image_column]}")
        return image_column
    candidates = [name for name, feature in features.items() if _holds_images(feature, is_named=False)]
    if not candidates:
        candidates = [
            name for name in ("image", "img", "file_name", "path") if _holds_images(features.get(name), True)
        ]
    if not candidates:
        raise ValueError(f"the dataset has no image column; the columns are {columns}. Name it by --image_column.")
    if len(candidates) > 1:
        raise ValueError(f"the dataset has several image columns, choose with --image_column: {', '.join(candidates)}")
    return candidates[0]


def _holds_images(feature, is_named: bool) -> bool:
    """Return whether a column holds images: files, arrays, or lists of files; if it is named, paths and bytes, too."""
    if isinstance(feature, (List, LargeList)):
        feature = feature.feature
    if isinstance(feature, (Image, Array2D, Array3D)):
        return True
    if isinstance(feature, dict):
        return set(feature) >= {"bytes", "path"}
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return True
    return is_named and isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _find_label_column(features: Features, label_column: str | None) -> str | None:
    """The column of the labels; None if there is none. One that is found, not named, may hold lists of labels."""
    if label_column is not None:
        if label_column not in features:
            raise ValueError(
                f"there is no column {label_column} (--label_column); the columns are {', '.join(features)}"
            )
        if not isinstance(features[label_column], (ClassLabel, Value)):
            raise ValueError(
                f"column {label_column} holds {_kind(features[label_column])}, and labels must be one an image. Name "
                "another by --label_column."
            )
        return label_column
    candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(candidates) == 1:
        return candidates[0]
    return "label" if "label" in features else None


def _kind(feature) -> str:
    return "lists" if isinstance(feature, (List, LargeList)) else str(feature)


def load_images(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    with_labels: bool = True,
    folder_layout: str = "auto",
    tiff_pages: str | None = None,
    allow_unread: bool = False,
) -> Dataset | IterableDataset:
    """A split of a dataset with the columns `image` (encoded) and, where there are labels, `label`.

    Args:
        dataset_name: A Hub id, or a path: a folder of images (in class folders, or flat and so without labels), of
            parquet, Arrow or tar files, one such file, or what `save_to_disk` wrote.
        config_name: Configuration of a dataset that has several.
        split: Name of the split. One file, or a folder without folders of splits, is `train`.
        image_column: Column of the images. Default: the only one that holds images.
        label_column: Column of the labels. Default: the only class column, or else `label`, or else none.
        streaming: Read while iterating, instead of preparing the whole dataset first. Of parquet, other columns are
            then never read.
        with_labels: Whether the labels are wanted.
        folder_layout: Of a folder of images, see `folders.assign_splits`.
        tiff_pages: By `images`, every page of a TIFF in a folder is an image.
        allow_unread: Whether more than a tenth of a folder's image files may be left unread.

    Raises:
        ValueError: whatever is missing; says what there is instead.
    """
    with _errors_named(dataset_name):
        folder = _image_folder(dataset_name, folder_layout, tiff_pages)
        if folder:
            for line in folder.warnings():
                _warn(line)
            folder.check(allow_unread)
        splits = folder.splits if folder else _load(dataset_name, config_name, streaming)
        if split not in splits:
            raise ValueError(f"{dataset_name} has no split {split}; its splits are {', '.join(splits)}")
        dataset = folder.dataset(split) if folder else splits[split]
        if folder and streaming:
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), _NUM_STREAM_SHARDS))
        if dataset.features is None:
            dataset = dataset._resolve_features()
    try:
        image_column = _find_image_column(dataset.features, image_column)
        label_column = _find_label_column(dataset.features, label_column) if with_labels else None
    except ValueError as error:
        raise ValueError(f"{dataset_name}: {error}") from None
    chosen = {image_column: "image"} | ({} if label_column is None else {label_column: "label"})
    if streaming and dataset.info.builder_name == "parquet":
        dataset = _load(dataset_name, config_name, streaming, columns=list(chosen))[split]
        dataset = dataset if dataset.features is not None else dataset._resolve_features()
    with _errors_named(dataset_name):
        # first of all: what a stream does to its rows afterwards would decode each and encode it again
        dataset = _encoded(dataset, image_column, Path(dataset_name).expanduser())
        dataset = dataset.select_columns(list(chosen))
        renamed = {old: new for old, new in chosen.items() if old != new}
        dataset = dataset.rename_columns(renamed) if renamed else dataset
        return _one_a_row(dataset) if isinstance(dataset.features["image"], (List, LargeList)) else dataset


def _encoded(dataset: Dataset | IterableDataset, column: str, path: Path) -> Dataset | IterableDataset:
    """The dataset with a column of files encoded, as bytes or paths. Arrays stay as they are."""
    feature = dataset.features[column]
    if isinstance(feature, (List, LargeList)):
        return dataset.cast_column(column, List(Image(decode=False)))
    if isinstance(feature, (Array2D, Array3D)) or (isinstance(feature, dict) and "page" in feature):
        return dataset
    if isinstance(feature, Value) and "string" in feature.dtype:  # paths, relative to the table
        folder = path if path.is_dir() else path.parent
        dataset = dataset.map(_absolute, fn_kwargs={"column": column, "folder": str(folder)}, batched=True)
    return dataset.cast_column(column, Image(decode=False))


def _absolute(rows: dict, column: str, folder: str) -> dict:
    return {column: [name and os.path.join(folder, name) for name in rows[column]]}


def _one_a_row(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows of lists of images -> a row for each image, with the label of its list."""
    features = Features(dataset.features | {"image": dataset.features["image"].feature})
    return dataset.map(_unroll, batched=True, remove_columns=list(dataset.features), features=features)


def _unroll(rows: dict) -> dict:
    counts = [len(images or ()) for images in rows["image"]]
    images = {"image": [image for images in rows["image"] for image in images or ()]}
    others = {name: np.repeat(values, counts).tolist() for name, values in rows.items() if name != "image"}
    return images | others


def content_of(hashes: np.ndarray) -> dict:
    """Number and hash of images, whatever their order, for a report; of their pixels' hashes (images,) in int64."""
    digest = hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()[:16]
    return {"num_images": len(hashes), "revision": f"sha256:{digest}"}
