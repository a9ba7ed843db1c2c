"""Folders of image files as datasets, by an explicit list: every file is read, or counted with the reason why not.

Splits are the folders at the top that are called train, val, test or another word for a split, in any case; folders
beside them are splits of their own name. Labels are the names of the folders that the images lie in.
"""

import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, NamedSplit, SplitDict, SplitInfo, Value
from datasets.data_files import SPLIT_KEYWORDS
from datasets.table import InMemoryTable
from PIL import Image as PillowImage

from modeling_dino.command_line import printable

from .decoding import HEIF_SUFFIXES, IMAGE_SUFFIXES, count_pages


TABLE_SUFFIXES = (".parquet", ".arrow", ".tar")
ARCHIVE_SUFFIXES = (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as the datasets library knows it
LAYOUTS = ("auto", "splits", "classes")
MAX_UNREAD = 0.1  # share of a folder's image files that may not be read without --allow_unread
_SPLIT_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_HELD_OUT = ("validation", "test")

logger = logging.getLogger(__name__)


class File(NamedTuple):
    name: str  # relative to the folder, with /
    size: int
    time: int  # of the last modification, in seconds


@dataclass
class Listing:
    """What lies in a folder, by name.

    Args:
        images: Files that are read as images.
        unread: Reason -> names of image files that are not read.
        tables: Parquet, Arrow and tar files, which the datasets library reads.
        archives: Other archives.
        metadata: Names of files of metadata, as metadata.csv.
        others: Ending -> number of all other files.
    """

    path: Path
    images: list[File] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tables: list[File] = field(default_factory=list)
    archives: list[File] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)


def list_folder(path: Path) -> Listing:
    """List all files below a folder; links are followed, hidden files and folders, and __MACOSX, are not read."""
    listing = Listing(path)
    for name, entry in _walk(path, listing):
        suffix = os.path.splitext(name)[1].lower()
        base = os.path.basename(name)
        is_image = suffix in IMAGE_SUFFIXES
        try:
            status = entry.stat()
        except OSError:
            if is_image:
                listing.unread["links to nothing"].append(name)
            continue
        if not _is_utf8(name):
            if is_image or suffix in TABLE_SUFFIXES:
                listing.unread["names that are not UTF-8"].append(name)
            continue
        file = File(name, status.st_size, int(status.st_mtime))
        if base in METADATA:
            listing.metadata.append(name)
        elif suffix in TABLE_SUFFIXES:
            is_cached = suffix == ".arrow" and base.startswith(("cache-", "tmp"))  # of the datasets library
            listing.tables += [] if is_cached else [file]
        elif is_image or (not suffix and _is_image(entry.path)):
            listing.images.append(file)
        elif suffix in HEIF_SUFFIXES:
            listing.unread["HEIF, which needs pillow-heif"].append(name)
        elif suffix in ARCHIVE_SUFFIXES:
            listing.archives.append(file)
        else:
            listing.others[suffix or "no ending"] += 1
    for part in (listing.images, listing.tables, listing.archives, listing.metadata):
        part.sort()
    return listing


def _walk(path: Path, listing: Listing) -> Iterator[tuple[str, os.DirEntry]]:
    """Names relative to `path` and entries of all files below it; folders that link to a folder above end there."""
    pending = [("", os.fspath(path), ())]
    while pending:
        prefix, folder, above = pending.pop()
        try:
            status = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            if not prefix:
                raise
            listing.unread[f"folders that cannot be opened ({error.strerror})"].append(prefix)
            continue
        identity = status.st_dev, status.st_ino
        if identity in above:
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                pending.append((name + "/", entry.path, (*above, identity)))
            else:
                yield name, entry


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps the bytes as surrogates
        return False
    return True


def _is_image(path: str) -> bool:
    """Return whether a file without an ending is an image."""
    try:
        with PillowImage.open(path):
            return True
    except PillowImage.DecompressionBombError:
        return True
    except Exception:  # of any of Pillow's readers
        return False


def split_word(folder: str) -> str | None:
    """The split that a folder is called by: train, validation or test, in any case, with a number perhaps."""
    found = re.fullmatch(r"(.*?)[ ._\-0-9]*", folder.casefold())
    return _SPLIT_WORDS.get(found[1])


def assign_splits(listing: Listing, layout: str = "auto") -> tuple[dict[str, list[File]], int]:
    """Split -> its images; and how many folders in their names come before those of classes.

    Images beside folders of splits get into `listing.unread`.

    Args:
        listing: Of the folder.
        layout: `splits` if the folders at the top are splits, `classes` if all is one split `train`; `auto` decides by
            their names.

    Raises:
        ValueError: names of which `auto` cannot tell what they are, or that would put test images into the training.
    """
    root = _root(listing.images)
    tops = {file.name[len(root) :].partition("/")[0] for file in listing.images if "/" in file.name[len(root) :]}
    splits = {top: split_word(top) for top in tops}
    words = {split for split in splits.values() if split}
    if layout == "auto":
        if words and (all(splits.values()) or len(words) > 1):
            layout = "splits"
        elif words:
            named = sorted(top for top, split in splits.items() if split)[0]
            other = sorted(top for top, split in splits.items() if not split)
            raise ValueError(
                f"{listing.path} has the folder {named} beside others with images ({_some(other)}), so that it may be "
                "a split or a class. Give --folder_layout splits or --folder_layout classes."
            )
    if layout != "splits":
        deep = {folder for file in listing.images for folder in file.name[len(root) :].split("/")[:-1]}
        held_out = sorted(folder for folder in deep if split_word(folder) in _HELD_OUT)
        if held_out and layout == "auto":
            raise ValueError(
                f"{listing.path} has folders of the name {_some(held_out)} within others, so that test images would "
                "be trained on. Move them to the top, beside train, or give --folder_layout classes."
            )
        return {"train": listing.images} if listing.images else {}, root.count("/")
    assigned, beside = defaultdict(list), []
    for file in listing.images:
        top, slash, _ = file.name[len(root) :].partition("/")
        if slash:
            assigned[splits[top] or top].append(file)
        else:
            beside.append(file.name)
    if beside:
        listing.unread["images beside the folders of splits"] += beside
    order = ("train", *_HELD_OUT, *sorted(assigned))
    return {split: assigned[split] for split in dict.fromkeys(order) if split in assigned}, root.count("/") + 1


def _root(images: list[File]) -> str:
    """The folder below which splits or classes begin: what a single folder at the top holds, unless it is a split."""
    root = ""
    while images:
        heads = {file.name[len(root) :].partition("/")[0:2] for file in images}
        (head, slash), *others = heads
        if others or not slash or split_word(head):
            break
        root += head + "/"
    return root


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass
class ImageFolder:
    """A folder of images as splits of a dataset.

    Args:
        listing: What lies in it.
        splits: Split -> images.
        labels: Split -> name of each image's class, or None; splits without labels are not in it.
        class_names: Of all splits.
        remarks: What a user should know, a sentence each.
    """

    listing: Listing
    splits: dict[str, list[File]]
    labels: dict[str, list[str | None]]
    class_names: list[str]
    remarks: list[str]
    tiff_pages: str | None = None

    def dataset(self, split: str) -> Dataset:
        """Rows of `image` (a path, and with `tiff_pages` images a page), `label`, and columns of metadata."""
        files = self.splits[split]
        folder = os.path.abspath(self.listing.path)
        columns = {"path": [os.path.join(folder, file.name) for file in files]}
        image_feature = Image(decode=False)
        indices, pages = range(len(files)), None
        if self.tiff_pages == "images":
            counted = [self._pages(path) for path in columns["path"]]
            indices = [index for index, count in enumerate(counted) for _ in range(count)]
            pages = [page for count in counted for page in range(count)]
            image_feature = {"bytes": Value("binary"), "path": Value("string"), "page": Value("int32")}
        paths = pa.array([columns["path"][index] for index in indices], pa.string())
        parts = {"bytes": pa.nulls(len(paths), pa.binary()), "path": paths}
        if pages is not None:
            parts["page"] = pa.array(pages, pa.int32())
        arrays = {"image": pa.StructArray.from_arrays(list(parts.values()), list(parts))}
        features = {"image": image_feature}
        metadata = self._metadata(files)
        for name, column in metadata.items():
            arrays[name] = pa.array(column.take(list(indices)), from_pandas=True)
            features[name] = Value(str(arrays[name].type)) if arrays[name].type != pa.null() else Value("null")
        if split in self.labels and "label" not in arrays:
            numbers = {name: number for number, name in enumerate(self.class_names)}
            labels = [numbers.get(self.labels[split][index]) for index in indices]
            arrays["label"] = pa.array(labels, pa.int64())
            features["label"] = ClassLabel(names=self.class_names)
        features = Features(features)
        digest = hashlib.sha256(repr((split, self.class_names, self.tiff_pages, files)).encode()).hexdigest()[:16]
        table = pa.table(arrays, schema=features.arrow_schema)
        length = SplitDict({split: SplitInfo(split, num_examples=len(table))})  # which a stream of it then knows
        info = DatasetInfo(self.account(), features=features, splits=length)
        return Dataset(InMemoryTable(table), info, split=NamedSplit(split), fingerprint=digest)

    @staticmethod
    def _pages(path: str) -> int:
        return count_pages(path) if path.lower().endswith((".tif", ".tiff")) else 1

    def _metadata(self, files: list[File]) -> dict[str, pd.Series]:
        """Columns of metadata files, a value for each of the files."""
        tables = [_read_metadata(self.listing.path / name, name) for name in self.listing.metadata]
        tables = [table for table in tables if table is not None]
        if not tables:
            return {}
        table = pd.concat(tables)
        table = table[~table.index.duplicated()].reindex([file.name for file in files])
        table = table.dropna(axis=1, how="all").drop(columns="image", errors="ignore")
        return {str(name): table[name] for name in table.columns if _is_plain(table[name])}

    def account(self, split: str | None = None) -> str:
        """How many image files were found and read, and why others were not, in one line."""
        num_read = sum(map(len, self.splits.values()))
        num_unread = sum(map(len, self.listing.unread.values()))
        parts = [f"{name} {len(files):,}{self._labeled(name)}" for name, files in self.splits.items()]
        text = (
            f"{self.listing.path}: {num_read + num_unread:,} image files found, {num_read:,} read ({'; '.join(parts)})"
        )
        if self.listing.others:
            listed = ", ".join(f"{number:,} {suffix}" for suffix, number in self.listing.others.most_common(4))
            text += f"; other files: {listed}" + ", ..." * (len(self.listing.others) > 4)
        return text

    def _labeled(self, split: str) -> str:
        if split not in self.labels:
            return ", no labels"
        missing = self.labels[split].count(None)
        return f", {len(set(self.labels[split]) - {None}):,} classes" + (f", {missing:,} without" if missing else "")

    def warnings(self) -> list[str]:
        """A line for each reason why image files are not read, and for what else is not as it seems."""
        lines = [
            f"{self.listing.path}: {len(names):,} image files are not read: {reason}, such as {printable(names[0])}"
            for reason, names in self.listing.unread.items()
        ]
        if self.listing.archives:
            lines.append(
                f"{self.listing.path}: {len(self.listing.archives)} archives are not read, such as "
                f"{printable(self.listing.archives[0].name)}. Unpack them to read their images."
            )
        return lines + self.remarks

    def check(self, allow_unread: bool = False) -> None:
        """Check that no more than a tenth of the image files is not read.

        Raises:
            ValueError: it is, unless `allow_unread`.
        """
        num_unread = sum(map(len, self.listing.unread.values()))
        num_read = sum(map(len, self.splits.values()))
        if num_unread > MAX_UNREAD * (num_read + num_unread) and not allow_unread:
            reason, names = max(self.listing.unread.items(), key=lambda item: len(item[1]))
            raise ValueError(
                f"{num_unread} of the {num_read + num_unread} image files in {self.listing.path} are not read: "
                f"{reason}, such as {printable(names[0])}. Give --allow_unread to go without them."
            )


def _is_plain(column: pd.Series) -> bool:
    try:
        return not pa.types.is_null(pa.array(column, from_pandas=True).type)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several types
        return False


def _read_metadata(path: Path, name: str) -> pd.DataFrame | None:
    """Metadata by the image's name relative to the dataset's folder; None for a table without file names.

    Raises:
        ValueError: a file that cannot be read; names it.
    """
    readers = {".csv": pd.read_csv, ".jsonl": lambda file: pd.read_json(file, lines=True), ".parquet": pd.read_parquet}
    try:
        table = readers[path.suffix](path)
    except Exception as error:  # of pandas' parsers, which raise many kinds
        raise ValueError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if "file_name" not in table.columns:
        return None
    folder = os.path.dirname(name)
    names = [os.path.normpath(os.path.join(folder, str(file))) for file in table["file_name"]]
    return table.drop(columns="file_name").set_index(pd.Index(names))


def read_folder(
    path: Path, layout: str = "auto", tiff_pages: str | None = None, listing: Listing | None = None
) -> ImageFolder:
    """A folder of images as splits, with labels by the names of folders.

    Args:
        path: Of the folder.
        layout: See `assign_splits`.
        tiff_pages: See `decoding.Reading`; by `images`, every page is a row.
        listing: Of the folder, if it is known.

    Raises:
        ValueError: no images; see also `assign_splits`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"folder_layout must be auto, splits or classes, got {layout}")
    listing = listing or list_folder(path)
    splits, num_before = assign_splits(listing, layout)
    if not splits:
        others = listing.others + Counter({reason: len(names) for reason, names in listing.unread.items()})
        found = ", ".join(f"{number:,} {what}" for what, number in others.most_common(4))
        raise ValueError(
            f"no images in {path}: looked in all folders below it for .jpg, .png and all else that Pillow reads, "
            f".npy, and for .parquet, .arrow, .tar and .zip; found {others.total():,} files"
            + (f" ({found})" if found else "")
        )
    remarks = []
    parents = {
        split: [file.name.split("/")[num_before:-1] for file in files] for split, files in splits.items()
    }  # folders of classes of each image
    depths = {len(folders) for of_split in parents.values() for folders in of_split if folders}
    level = -1 if len(depths) == 1 else 0
    if len(depths) > 1:
        remarks.append(
            f"{path}: images lie at {len(depths)} depths; labels are the names of the first folder below the split"
        )
    labels = {split: [folders[level] if folders else None for folders in parents[split]] for split in parents}
    labels, class_names = _match_spelling(labels)
    if len(class_names) < 2:
        labels, class_names = {}, []
    labels = {split: names for split, names in labels.items() if any(name is not None for name in names)}
    for split, names in labels.items():
        if missing := names.count(None):
            remarks.append(f"{path}: {missing:,} images of {split} lie in no folder of a class and have no label")
    folder = ImageFolder(listing, splits, labels, class_names, remarks, tiff_pages)
    _remark_metadata(folder)
    return folder


def _match_spelling(labels: dict[str, list[str | None]]) -> tuple[dict[str, list[str | None]], list[str]]:
    """Labels of splits that spell classes in unlike case, in the spelling of the first; and the names of all classes.

    Where a split itself has two folders that differ by case alone, as of letters, all are classes of their own.
    """
    names = {split: set(of_split) - {None} for split, of_split in labels.items()}
    if all(len({name.casefold() for name in each}) == len(each) for each in names.values()):
        spelled = {}
        for each in names.values():
            for name in sorted(each):
                spelled.setdefault(name.casefold(), name)
        labels = {split: [name and spelled[name.casefold()] for name in each] for split, each in labels.items()}
    return labels, sorted(set().union(*labels.values()) - {None})


def _remark_metadata(folder: ImageFolder) -> None:
    """Say how far files of metadata fit the images."""
    images = {file.name for files in folder.splits.values() for file in files}
    for name in folder.listing.metadata:
        path = folder.listing.path / name
        table = _read_metadata(path, name)
        if table is None:
            folder.remarks.append(f"{path} has no column file_name and is not used")
            continue
        near = {image for image in images if image.startswith(name[: -len(path.name)])}
        num_named, num_missing = len(near & set(table.index)), len(set(table.index) - images)
        if num_named < len(near):
            folder.remarks.append(
                f"{path} names {num_named:,} of {len(near):,} images; the others are read without it"
            )
        if num_missing:
            folder.remarks.append(f"{path} names {num_missing:,} images that are not there")
