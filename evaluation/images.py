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
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from tarfile import ReadError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from datasets.features import Array2D, Array3D, ClassLabel, LargeList, List, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY

from modeling_dino.command_line import check_files, one_line, printable

from .folders import IMAGE_SUFFIXES, MAX_UNREAD, File, ImageFolder, is_of_tables, list_folder, read_folder, split_word


FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_FOLDER_BUILDERS = FILE_BUILDERS | {".zip": "imagefolder"}
_PATH_COLUMNS = ("image", "img", "file_name", "path")  # names of columns that may hold paths of images

_NUM_STREAM_SHARDS = 64  # of a folder that is streamed
_NUM_MEMBERS = 10_000  # of tars whose names are read before the rest


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
    if not is_of_tables(listing):
        return read_folder(path, layout, tiff_pages, listing)
    if odd := listing.unread.get("names that are not UTF-8"):
        raise ValueError(
            f"the names of {len(odd)} files in {dataset_name} are not UTF-8, such as {printable(odd[0])}. The "
            "datasets library cannot read them. Rename them, as convmv does."
        )
    if listing.images:
        example = printable(listing.images[0])
        _warn(f"{path}: skipped {len(listing.images):,} image files beside tables, such as {example}")
    return None


def _is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


@cache  # one warning for all splits that a command loads
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
        files = _table_files(path)
        suffixes = {file.suffix.lower() for of_split in files.values() for file in of_split}
        if suffixes == {".zip"}:
            _warn(
                f"{path}: images in zips are read without labels. Unpack them to have the names of folders as labels."
            )
            options |= {"drop_labels": True}  # the datasets library fails on those of folders in a zip
        elif _no_pattern(path) == str(path):
            return load_dataset(str(path), config_name, streaming=streaming, **options)
        if len(suffixes) > 1:
            raise ValueError(f"{path} has files of several kinds: {', '.join(sorted(suffixes))}. Keep one kind in it.")
        data_files = {split: list(map(_no_pattern, of_split)) for split, of_split in files.items()}
        return load_dataset(_FOLDER_BUILDERS[suffixes.pop()], data_files=data_files, streaming=streaming, **options)
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


def _table_files(path: Path) -> dict[str, list[Path]]:
    """Return the tables, or else zips, of each split of a folder, by words in their names."""
    listing, splits = list_folder(path), {}
    for name in listing.tables or [name for name in listing.archives if name.lower().endswith(".zip")]:
        words = re.split(r"[^a-z]+", name.lower())
        split = next(filter(None, map(split_word, words)), "train")
        splits.setdefault(split, []).append(path / name)
    return splits


def _parquet_files(dataset_name: str, config_name: str | None, split: str) -> list[Path]:
    """Return the Parquet files of a split, as the datasets library assigns them where the path is not a pattern."""
    path = Path(dataset_name).expanduser()
    if not path.is_dir():
        return [path]
    if _no_pattern(path) != str(path):
        return _table_files(path)[split]
    return list(map(Path, load_dataset_builder(str(path), config_name).config.data_files[split]))


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
        reason = _unlike_files(dataset_name, str(cause)) or kind + one_line(cause)
        raise ValueError(f"{dataset_name} cannot be read: {reason}") from error
    finally:
        logger.setLevel(level)


def _unlike_files(dataset_name: str, message: str) -> str | None:
    """Return in words which file of a folder is unlike the others, if a library's message says that some is."""
    path = Path(dataset_name).expanduser()
    if not re.search("cast|column names|parse string|share the same prefix", message) or not path.exists():
        return None
    splits = _table_files(path) if path.is_dir() else {"train": [path]}
    files = sorted(file for of_split in splits.values() for file in of_split)
    if all(file.suffix.lower() == ".parquet" for file in files):
        return _unlike_columns(files)
    endings = _count_other_members(dataset_name, None, "")[2]
    listed = ", ".join(f"{number:,} .{printable(ending)}" for ending, number in endings.items())
    return f"tars mix images of several endings: {listed}. Rename to one ending" if len(endings) > 1 else None


def _unlike_columns(files: list[Path], columns: Collection[str] | None = None) -> str | None:
    """Return which Parquet file holds other columns than the first, in words; None if none does.

    Args:
        files: The files.
        columns: Those that all must hold, in about the same type. Default: all columns must be the same.
    """
    first = None
    for file in files:
        try:
            schema = pq.read_schema(file)
        except (pa.ArrowException, OSError):
            return None  # which another error says
        held = {name: str(type_) for name, type_ in zip(schema.names, schema.types)}
        first = first or held
        if columns is None:
            is_unlike = held != first
        else:
            is_unlike = any(_kind_of_type(held.get(name)) != _kind_of_type(first.get(name)) for name in columns)
        if is_unlike:
            return (
                f"{printable(file.name)} has the columns {_describe(held, first)}, and {printable(files[0].name)} "
                f"{_describe(first, held)}. Give all files the same columns, or move one away"
            )
    return None


def _kind_of_type(name: str | None) -> str | None:
    """Return an Arrow type without its size: numbers are numbers."""
    name = name and re.sub(r"large_|\d+|[<(\[].*", "", name)
    return "number" if name in ("int", "uint", "float", "double", "halffloat", "bool") else name


def _describe(held: dict[str, str], other: dict[str, str]) -> str:
    """Columns by name, and their type where the other has another."""
    return ", ".join(name if other.get(name) in (None, kind) else f"{name} ({kind})" for name, kind in held.items())


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
        return folder.listing.files(folder.splits.get(split, []))
    listing = list_folder(path)
    return listing.files(sorted(listing.tables + listing.archives))


def describe_folder(dataset_name: str, folder_layout: str = "auto") -> str | None:
    """How many files of a folder of images are found and listed, in one line; None for anything else."""
    folder = _image_folder(dataset_name, folder_layout, None)
    return folder and folder.account()


def how_to_label(dataset_name: str) -> str:
    """Return how to give the images of a dataset without labels some: a sentence for an error."""
    path = Path(dataset_name).expanduser()
    if path.is_dir() and not _is_saved(path) and not is_of_tables(list_folder(path)):
        return (
            "Put the images of each class into a folder of its own, or write a metadata.csv with the columns "
            "file_name and label."
        )
    return "Name their column by --label_column."


def _find_image_column(features: Features, image_column: str | None) -> str:
    columns = ", ".join(features)
    if image_column is not None:
        if image_column not in features:
            raise ValueError(f"there is no column {image_column} (--image_column); the columns are {columns}")
        if _stored_as(features[image_column]) is None:
            raise ValueError(f"column {image_column} holds no images but {features[image_column]}")
        return image_column
    kinds = {name: _stored_as(feature) for name, feature in features.items()}
    for kind in ("images", "bytes"):
        candidates = [name for name in kinds if kinds[name] == kind]
        if len(candidates) > 1:
            raise ValueError(
                f"the dataset has several image columns, choose with --image_column: {', '.join(candidates)}"
            )
        if candidates:
            return candidates[0]
    for name in _PATH_COLUMNS:
        if kinds.get(name) == "paths":
            return name
    raise ValueError(f"the dataset has no image column; the columns are {columns}. Name it by --image_column.")


def _stored_as(feature) -> str | None:
    """Return how a column stores images, one or a list a row: as `images`, `bytes` or `paths`; None if not at all."""
    if isinstance(feature, (List, LargeList)):
        feature = feature.feature
    if isinstance(feature, (Image, Array2D, Array3D)):
        return "images"
    if isinstance(feature, dict):
        return "bytes" if set(feature) >= {"bytes", "path"} else None
    if not isinstance(feature, Value):
        return None
    return {"binary": "bytes", "large_binary": "bytes", "string": "paths", "large_string": "paths"}.get(feature.dtype)


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
            folder.check(allow_unread)
        splits = folder.splits if folder else _load(dataset_name, config_name, streaming)
        if split not in splits:
            raise ValueError(f"{dataset_name} has no split {split}; its splits are {', '.join(splits)}")
        dataset = folder.dataset(split) if folder else splits[split]
        if folder and streaming:
            info = dataset.info
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), _NUM_STREAM_SHARDS))
            dataset.info.splits, dataset.info.description = info.splits, info.description  # which it drops
        if dataset.features is None:
            dataset = dataset._resolve_features()
    if folder:
        for line in folder.warnings():
            _warn(line)
    try:
        image_column = _find_image_column(dataset.features, image_column)
        label_column = _find_label_column(dataset.features, label_column) if with_labels else None
    except ValueError as error:
        raise ValueError(f"{dataset_name}: {error}") from None
    chosen = {image_column: "image"} | ({} if label_column is None else {label_column: "label"})
    if streaming and dataset.info.builder_name == "parquet":
        if is_path(dataset_name) and (
            reason := _unlike_columns(_parquet_files(dataset_name, config_name, split), chosen)
        ):
            raise ValueError(f"{dataset_name} cannot be read: {reason}")
        dataset = _load(dataset_name, config_name, streaming, columns=list(chosen))[split]
        dataset = dataset if dataset.features is not None else dataset._resolve_features()
    with _errors_named(dataset_name):
        # first of all: what a stream does to its rows afterwards would decode each and encode it again
        dataset = _encoded(dataset, image_column, Path(dataset_name).expanduser(), config_name, split)
        dataset = dataset.select_columns(list(chosen))
        renamed = {old: new for old, new in chosen.items() if old != new}
        dataset = dataset.rename_columns(renamed) if renamed else dataset
        dataset = _one_a_row(dataset) if isinstance(dataset.features["image"], (List, LargeList)) else dataset
        _check_missing(dataset, dataset_name, split, image_column, allow_unread)
    return dataset


def _encoded(
    dataset: Dataset | IterableDataset, column: str, path: Path, config_name: str | None, split: str
) -> Dataset | IterableDataset:
    """Return the dataset with a column of files encoded, as bytes or paths. Arrays stay as they are."""
    feature = dataset.features[column]
    inner = feature.feature if isinstance(feature, (List, LargeList)) else feature
    if isinstance(inner, (Array2D, Array3D)) or (isinstance(inner, dict) and "page" in inner):
        return dataset
    is_without_bytes = isinstance(inner, dict) and inner["bytes"] == Value("null")
    if is_without_bytes or _stored_as(inner) == "paths":  # relative to the table
        folder = path.parent
        if path.is_dir():
            files = [] if _is_saved(path) else _parquet_files(str(path), config_name, split)
            folders = {file.parent for file in files}
            folder = folders.pop() if len(folders) == 1 else path
        where = {"column": column, "folder": str(folder)}
        files = {"bytes": Value("binary"), "path": Value("string")}
        features = Features(dataset.features | {column: files if inner is feature else List(files)})
        dataset = dataset.map(_locate, fn_kwargs=where, batched=True, features=features)
    image = Image(decode=False)
    return dataset.cast_column(column, image if inner is feature else List(image))


def _locate(rows: dict, column: str, folder: str) -> dict:
    """Paths in a column, or lists of them, -> files as `Image` stores them."""

    def file(image):
        if image is None:
            return None
        if isinstance(image, list):
            return [file(one) for one in image]
        path = image["path"] if isinstance(image, dict) else image
        return {"bytes": None, "path": path and os.path.join(folder, path)}

    return {column: [file(image) for image in rows[column]]}


def _check_missing(
    dataset: Dataset | IterableDataset, dataset_name: str, split: str, column: str, allow_unread: bool
) -> None:
    """Warn of rows without an image; of a stream, only tars on the disk tell of them.

    Raises:
        ValueError: over a tenth of the rows of tars, whose images have other endings, unless `allow_unread`.
    """
    num_missing, num_rows, endings = _count_other_members(dataset_name, split, column)
    if isinstance(dataset, Dataset):
        num_missing, num_rows = dataset.data.column("image").null_count, len(dataset)
    if not num_missing:
        return
    text = f"{dataset_name}: {num_missing:,} of {num_rows:,} rows of {split} have no image in column {column}"
    if endings:
        text += f"; images of other endings: {', '.join(f'{number:,} .{name}' for name, number in endings.items())}"
    if endings and num_missing > MAX_UNREAD * num_rows and not allow_unread:
        raise ValueError(f"{text}. Give --allow_unread to skip these rows.")
    _warn(text)


def _count_other_members(dataset_name: str, split: str | None, column: str) -> tuple[int, int, Counter]:
    """Read the first names in the tars of a split, or of all, on the disk; some 10,000 in all, as each costs a seek.

    Returns:
        Samples without an image in the column, all samples, and ending -> images in the former.
    """
    path = Path(dataset_name).expanduser()
    splits = _table_files(path) if path.is_dir() else {split: [path] if path.is_file() else []}
    files = splits.get(split, []) if split else sum(splits.values(), [])
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    num_missing = num_samples = 0
    endings = Counter()
    for file in tars:
        samples = defaultdict(set)
        with tarfile.open(file) as tar:
            for member in islice(tar, max(_NUM_MEMBERS // len(tars), 16)):
                key, ending = base_plus_ext(member.name)
                if key is not None and member.isfile():
                    samples[key].add(ending)
        without = [fields for fields in samples.values() if column not in fields]
        endings.update(
            field for fields in without for field in fields if f".{field.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
        )
        num_samples += len(samples)
        num_missing += len(without)
    return num_missing, num_samples, endings


def _one_a_row(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows of lists of images -> a row for each image, with the label of its list."""
    features = Features(dataset.features | {"image": dataset.features["image"].feature})
    return dataset.map(_unroll, batched=True, remove_columns=list(dataset.features), features=features)


def _unroll(rows: dict) -> dict:
    counts = [len(images or ()) for images in rows["image"]]
    others = {
        name: [value for value, count in zip(values, counts) for _ in range(count)]
        for name, values in rows.items()
        if name != "image"
    }
    return {"image": [image for images in rows["image"] for image in images or ()]} | others


def content_of(hashes: np.ndarray) -> dict:
    """Number and hash of images, whatever their order, for a report; of their pixels' hashes (images,) in int64."""
    digest = hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()[:16]
    return {"num_images": len(hashes), "revision": f"sha256:{digest}"}
