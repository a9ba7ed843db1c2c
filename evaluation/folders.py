"""Folders of image files as datasets, by an explicit list: every file is listed, or counted with the reason why not.

Splits are the folders at the top that are called train, val, test or another word for a split, in any case; folders
beside them are splits of their own name. Labels are the names of the folders that the images lie in.
"""

import hashlib
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, NamedSplit, SplitDict, SplitInfo, Value
from datasets.data_files import SPLIT_KEYWORDS
from datasets.table import InMemoryTable
from PIL import Image as PillowImage

from modeling_dino.command_line import one_line, printable

from . import decoding
from .decoding import HEIF_SUFFIXES
from .scientific_files import count_pages


IMAGE_SUFFIXES = frozenset((*decoding.IMAGE_SUFFIXES, ".mpo"))  # Pillow's reader of JPEG reads .mpo
_FORMATS = {PillowImage.registered_extensions().get(suffix) for suffix in IMAGE_SUFFIXES}
UNREAD_HEIF = {*HEIF_SUFFIXES, ".heics", ".heifs", ".hif"} - IMAGE_SUFFIXES
TABLE_SUFFIXES = (".parquet", ".arrow", ".tar")
ARCHIVE_SUFFIXES = (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as the datasets library knows it
LAYOUTS = ("auto", "splits", "classes")
MAX_UNREAD = 0.1  # share of a folder's image files that may stay unread without --allow_unread
_SPLIT_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_HELD_OUT = ("validation", "test")


class File(NamedTuple):
    name: str  # relative to the folder, with /
    size: int
    time: int  # of the last modification, in seconds


@dataclass
class Listing:
    """Names of the files in a folder, relative to it and sorted.

    Args:
        path: Of the folder.
        images: Files that are read as images.
        unread: Reason -> names of image files, or folders, that are not read.
        tables: Parquet, Arrow and tar files, which the datasets library reads.
        archives: Other archives.
        metadata: Files of metadata, such as metadata.csv.
        others: Ending -> number of all other files.
        repeated: Folders that a link leads to and that are read twice.
    """

    path: Path
    images: list[str] = field(default_factory=list)
    unread: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    repeated: list[str] = field(default_factory=list)

    def files(self, names: list[str]) -> list[File]:
        """Return sizes and modification times of some of the files; both are 0 for files that have disappeared."""
        folder = os.path.join(self.path, "")
        return [File(name, *_size_and_time(folder + name)) for name in names]

    def num_bytes(self, names: list[str]) -> int:
        return sum(file.size for file in self.files(names))


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, int(status.st_mtime)


def list_folder(path: Path) -> Listing:
    """List all files below a folder. Links are followed; hidden files and folders, and __MACOSX, are skipped.

    Raises:
        OSError: the folder itself cannot be opened.
    """
    listing = Listing(path)
    for prefix, entry in _walk(path, listing):
        base, name = entry.name, prefix + entry.name
        stem, _, ending = base.rpartition(".")
        suffix = "." + ending.lower() if stem else ""
        is_image = suffix in IMAGE_SUFFIXES
        if not _is(entry.is_file):
            if is_image:
                kind = "broken links" if entry.is_symlink() else "pipes, sockets or devices"
                listing.unread[kind].append(name)
        elif not _is_utf8(name):
            if is_image or suffix in TABLE_SUFFIXES:
                listing.unread["names that are not UTF-8"].append(name)
        elif is_image:
            listing.images.append(name)
        elif base in METADATA:
            listing.metadata.append(name)
        elif suffix in TABLE_SUFFIXES:
            if not (suffix == ".arrow" and base.startswith(("cache-", "tmp"))):  # of the datasets library
                listing.tables.append(name)
        elif suffix in UNREAD_HEIF:
            listing.unread["HEIF, which needs pillow-heif"].append(name)
        elif suffix in ARCHIVE_SUFFIXES:
            listing.archives.append(name)
        elif not suffix and _is_image(entry.path, *_size_and_time(entry.path)):
            listing.images.append(name)
        else:
            listing.others[suffix or "no ending"] += 1
    for names in (listing.images, listing.tables, listing.archives, listing.metadata, *listing.unread.values()):
        names.sort()
    return listing


def image_tables(listing: Listing) -> list[str]:
    """Return the tables, without tars, that hold encoded images by their columns; damaged ones count, too."""
    found = []
    for name in listing.tables:
        try:
            fields = pq.read_schema(listing.path / name) if name.lower().endswith(".parquet") else None
        except (pa.ArrowException, OSError):
            fields = None
        if fields is None or any("binary" in str(field.type) for field in fields):
            found += [] if name.lower().endswith(".tar") else [name]
    return found


def is_of_tables(listing: Listing) -> bool:
    """Return whether tables or zips are the dataset of a folder: images are at most a tenth of the bytes."""
    if not listing.images:
        return bool(listing.tables) or any(name.lower().endswith(".zip") for name in listing.archives)
    tables = image_tables(listing) + [name for name in listing.tables if name.lower().endswith(".tar")]
    if not tables:
        return False
    num_bytes = listing.num_bytes(listing.images)
    return num_bytes <= MAX_UNREAD * (num_bytes + listing.num_bytes(tables))


def _walk(path: Path, listing: Listing) -> Iterator[tuple[str, os.DirEntry]]:
    """Yield the folder (relative, with / at its end) and entry of each file; a link to a folder above is not followed.

    Only links cost a call of `stat`.
    """
    pending, seen = [("", os.fspath(path), ())], set()
    while pending:
        prefix, folder, above = pending.pop()
        try:
            status = os.stat(folder)
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            if not prefix:
                raise
            listing.unread[f"cannot be opened ({error.strerror})"].append(prefix)
            continue
        identity = status.st_dev, status.st_ino
        if identity in above:
            continue
        if identity in seen:
            listing.repeated.append(prefix)
        seen.add(identity)
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if _is(entry.is_dir):
                pending.append((prefix + entry.name + "/", entry.path, (*above, identity)))
            else:
                yield prefix, entry


def _is(predicate: Callable[[], bool]) -> bool:
    try:
        return predicate()
    except OSError:  # a link to itself, or into a folder that cannot be opened
        return False


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps the bytes as surrogates
        return False
    return True


@cache  # as folders are listed several times; size and time tell a file that is replaced
def _is_image(path: str, size: int, time: int) -> bool:
    """Return whether a file without an ending is an image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PillowImage.open(path) as image:
                return image.format in _FORMATS
    except PillowImage.DecompressionBombError:
        return True
    except Exception:  # of any of Pillow's readers
        return False


def split_word(folder: str) -> str | None:
    """Return train, validation or test if a folder is called by a word for it, in any case, perhaps with a number."""
    found = re.fullmatch(r"(.*?)[ ._\-0-9]*", folder.casefold())
    return _SPLIT_WORDS.get(found[1]) if found else None  # a line break in a name fits no pattern


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _parts(folder: str) -> list[str]:
    return folder.split("/") if folder else []


def assign_splits(listing: Listing, layout: str = "auto") -> tuple[dict[str, list[str]], int]:
    """Assign images to splits; those beside folders of splits become `listing.unread`.

    Args:
        listing: Of the folder.
        layout: `splits` if the folders at the top are splits, `classes` if all is one split `train`; `auto` decides by
            their names.

    Returns:
        Split -> its images; and how many folders in their names come before those of classes.

    Raises:
        ValueError: names of which `auto` cannot tell what they are, or that would put test images into the training.
    """
    path, folders = listing.path, sorted({_folder_of(name) for name in listing.images})
    num_above = _num_wrappers(folders)
    tops = {folder: top[0] for folder in folders if (top := _parts(folder)[num_above : num_above + 1])}
    splits = {top: split_word(top) for top in tops.values()}
    named = sorted(top for top, split in splits.items() if split)
    words = {splits[top] for top in named}
    is_sure = layout != "auto"
    if not is_sure:
        if words and len(words) == 1 and len(named) < len(splits):
            others = sorted(set(splits) - set(named))
            raise ValueError(
                f"{path} has the folder {printable(named[0])} beside others with images ({_some(others)}), so that it "
                "may be a split or a class. Give --folder_layout splits or --folder_layout classes."
            )
        layout = "splits" if words else "classes"
    if layout == "classes":
        if not is_sure:
            _check_held_out(path, folders, "Move them to the top, beside train, or give --folder_layout classes.")
        return {"train": listing.images} if listing.images else {}, num_above
    if not is_sure:
        below = ["/".join(_parts(folder)[num_above + 1 :]) for folder, top in tops.items() if splits[top] == "train"]
        _check_held_out(path, below, "Move them to the top, beside train, or give --folder_layout splits.")
    assigned, beside = defaultdict(list), []
    for name in listing.images:
        top = tops.get(_folder_of(name))
        (beside if top is None else assigned[splits[top] or top]).append(name)
    if beside:
        listing.unread["images beside the folders of splits"] += beside
    order = ("train", *_HELD_OUT, *sorted(assigned))
    return {split: assigned[split] for split in dict.fromkeys(order) if split in assigned}, num_above + 1


def _num_wrappers(folders: list[str]) -> int:
    """Return below how many folders the splits or classes begin: those that hold everything and are not a split."""
    common = os.path.commonprefix([_parts(folder) for folder in folders])
    return next((number for number, folder in enumerate(common) if split_word(folder)), len(common))


def _check_held_out(path: Path, folders: list[str], advice: str) -> None:
    held_out = sorted({part for folder in folders for part in _parts(folder) if split_word(part) in _HELD_OUT})
    if held_out:
        raise ValueError(
            f"{path} has folders of the name {_some(held_out)} within others, so that test images would be trained "
            f"on. {advice}"
        )


def _count(things: Collection, name: str) -> str:
    """Return "1 table", or "2 tables"."""
    ending = "" if len(things) == 1 else "es" if name.endswith("s") else "s"
    return f"{len(things):,} {name}{ending}"


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass
class ImageFolder:
    """A folder of images as splits of a dataset.

    Args:
        listing: What lies in it.
        splits: Split -> names of its images.
        labels: Split -> class of each image, or None; splits without labels are not in it.
        class_names: Of all splits.
        metadata: Columns of metadata files, by the name of the image; None without.
        remarks: What a user should know, a sentence each.
        tiff_pages: See `read_folder`.
    """

    listing: Listing
    splits: dict[str, list[str]]
    labels: dict[str, list[str | None]]
    class_names: list[str]
    metadata: pd.DataFrame | None
    remarks: list[str]
    tiff_pages: str | None = None

    def dataset(self, split: str) -> Dataset:
        """Return rows of `image` (a path), `label`, and columns of metadata; with `tiff_pages` images, one a page."""
        files = self.listing.files(self.splits[split])
        folder = os.path.join(os.path.abspath(self.listing.path), "")
        paths = [folder + file.name for file in files]
        rows = np.arange(len(files))  # file of each row
        parts, image = {"bytes": Value("binary"), "path": Value("string")}, Image(decode=False)
        if self.tiff_pages == "images":
            counts = [count_pages(path) if path.lower().endswith((".tif", ".tiff")) else 1 for path in paths]
            rows = np.repeat(rows, counts)
            image = parts = parts | {"page": Value("int32")}
        arrays = [pa.nulls(len(rows), pa.binary()), pa.array(paths, pa.string()).take(pa.array(rows))]
        if "page" in parts:
            arrays.append(pa.array([page for count in counts for page in range(count)], pa.int32()))
        columns, features = {"image": pa.StructArray.from_arrays(arrays, list(parts))}, {"image": image}
        for name, column in self._metadata_of(split).items():
            columns[name] = column.take(pa.array(rows))
            features |= Features.from_arrow_schema(pa.schema({name: column.type}))
        if split in self.labels:
            numbers = {name: number for number, name in enumerate(self.class_names)}
            labels = pa.array([numbers.get(name) for name in self.labels[split]], pa.int64())
            columns["label"], features["label"] = labels.take(pa.array(rows)), ClassLabel(names=self.class_names)
        features = Features(features)
        table = pa.table(columns, schema=features.arrow_schema)
        digest = hashlib.sha256(repr((split, self.class_names, self.tiff_pages)).encode())
        digest.update("\0".join(self.splits[split]).encode())
        digest.update(np.array([file[1:] for file in files], dtype=np.int64).tobytes())
        digest.update(repr(table.drop_columns("image").to_pydict()).encode())
        length = SplitDict({split: SplitInfo(split, num_examples=len(table))})  # which a stream of it then knows
        info = DatasetInfo(self.account(), features=features, splits=length)
        name = NamedSplit(re.sub(r"\W", "_", split))
        return Dataset(InMemoryTable(table), info, split=name, fingerprint=digest.hexdigest()[:16])

    def _metadata_of(self, split: str) -> dict[str, pa.Array]:
        """Return columns of metadata, a value for each file of a split."""
        if self.metadata is None:
            return {}
        table = self.metadata.reindex(self.splits[split])
        columns = {str(name): pa.array(table[name], from_pandas=True) for name in table.columns}
        return {name: column for name, column in columns.items() if not pa.types.is_null(column.type)}

    def account(self) -> str:
        """Return how many image files were found and listed, and in which splits and classes, in one line.

        None is decoded yet: of the listed files, the broken ones are skipped later, and said then.
        """
        num_listed = sum(map(len, self.splits.values()))
        splits = "; ".join(f"{name} {len(files):,}, {self._classes(name)}" for name, files in self.splits.items())
        found = f"{num_listed + self.num_unread:,} image files found"
        text = f"{self.listing.path}: {found}, {num_listed:,} listed ({splits})"
        if self.listing.others:
            listed = ", ".join(f"{number:,} {suffix}" for suffix, number in self.listing.others.most_common(4))
            text += f"; other files: {listed}" + ", ..." * (len(self.listing.others) > 4)
        return printable(text)

    def _classes(self, split: str) -> str:
        if split not in self.labels:
            if self.metadata is not None and "label" in self.metadata:
                return "labels of metadata"
            is_flat = len({_folder_of(name) for name in self.splits[split]}) == 1
            return "no labels: " + ("all in one folder" if is_flat else "fewer than two classes")
        missing = self.labels[split].count(None)
        return _count(set(self.labels[split]) - {None}, "class") + f", {missing:,} without" * bool(missing)

    @property
    def num_unread(self) -> int:
        return sum(map(len, self.listing.unread.values()))

    def warnings(self) -> list[str]:
        """Return a line for each reason why image files are not read, and for what else is not as it seems."""
        path = self.listing.path
        lines = []
        for reason, names in self.listing.unread.items():
            number = _count(names, "folder" if names[0].endswith("/") else "image file")
            lines.append(f"{path}: skipped {number}: {reason}, such as {printable(names[0])}")
        for kind, names, advice in (
            ("archive", self.listing.archives, "Unpack archives to read their images"),
            ("table", self.listing.tables, "Give the path of a table to read it"),
            ("second link", self.listing.repeated, "The images in a folder with two names are read twice"),
        ):
            if names:
                verb = "followed" if kind == "second link" else "skipped"
                lines.append(f"{path}: {verb} {_count(names, kind)}, such as {printable(names[0])}. {advice}.")
        return lines + self.remarks

    def check(self, allow_unread: bool = False) -> None:
        """Check that most image files are read.

        Raises:
            ValueError: over a tenth is not read, unless `allow_unread`.
        """
        num_found = self.num_unread + sum(map(len, self.splits.values()))
        if self.num_unread > MAX_UNREAD * num_found and not allow_unread:
            reason, names = max(self.listing.unread.items(), key=lambda item: len(item[1]))
            raise ValueError(
                f"{self.listing.path}: {self.num_unread:,} of {num_found:,} image files cannot be read, more than a "
                f"tenth: {reason}, such as {printable(names[0])}. Give --allow_unread to skip them."
            )
        if not self.listing.tables or allow_unread:
            return
        tables = image_tables(self.listing)
        in_tables, in_files = map(self.listing.num_bytes, (tables, self.listing.images))
        if in_tables > MAX_UNREAD * (in_tables + in_files):
            num_images, num_tables = _count(self.listing.images, "image file"), _count(tables, "table")
            raise ValueError(
                f"{self.listing.path} has {num_images} beside {num_tables} of images, such as {printable(tables[0])}. "
                "Give the path of either, or --allow_unread to skip tables."
            )


def _read_metadata(path: Path, name: str) -> pd.DataFrame | str:
    """Return metadata by the image's name relative to the dataset's folder, or why a file is not used."""
    readers = {
        ".csv": lambda file: pd.read_csv(file, dtype={"file_name": str}),
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype={"file_name": str}),
        ".parquet": pd.read_parquet,
    }
    try:
        table = readers[path.suffix](path)
    except Exception as error:  # of pandas' parsers, which raise many kinds
        return f"{path} cannot be read and is not used: {one_line(error)}"
    if "file_name" not in table.columns:
        columns = printable(_some(list(map(str, table.columns))))
        return f"{path} has no column file_name and is not used; its columns are {columns}"
    table, folder = table.dropna(subset="file_name"), os.path.dirname(name)
    names = [os.path.normpath(os.path.join(folder, str(file))) for file in table["file_name"]]
    return table.drop(columns=["file_name", "image"], errors="ignore").set_index(pd.Index(names))


def read_folder(
    path: Path, layout: str = "auto", tiff_pages: str | None = None, listing: Listing | None = None
) -> ImageFolder:
    """Read a folder of images as splits, with labels by the names of folders.

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
    splits, num_above = assign_splits(listing, layout)
    if not splits:
        raise ValueError(_describe_nothing(listing))
    remarks = []
    for split, names in splits.items():
        tops = sorted({_parts(_folder_of(name))[num_above - 1] for name in names}) if num_above else []
        if len(tops) > 1:
            remarks.append(f"{path}: split {split} joins the folders {_some(tops)}")
    parents = {folder: _parts(folder)[num_above:] for folder in {_folder_of(name) for name in listing.images}}
    depths = {len(classes) for classes in parents.values() if classes}
    level = -1 if len(depths) == 1 else 0
    if len(depths) > 1:
        remarks.append(
            f"{path}: images lie at {len(depths)} depths; labels are the names of the first folder below the split"
        )
    classes = {folder: names[level] if names else None for folder, names in parents.items()}
    labels = {split: [classes[_folder_of(name)] for name in names] for split, names in splits.items()}
    labels, class_names = _match_spelling(labels)
    metadata = _join_metadata(listing, splits, remarks)
    if len(class_names) < 2:
        labels = {}
    elif metadata is not None and "label" in metadata:
        if metadata["label"].reindex(listing.images).isna().any():
            remarks.append(f"{path}: metadata has no label for some images; labels are the names of folders")
            metadata = metadata.drop(columns="label")
        else:
            remarks.append(f"{path}: labels are those of metadata, not the names of folders")
            labels = {}
    labels = {split: names for split, names in labels.items() if any(name is not None for name in names)}
    for split, names in labels.items():
        if missing := names.count(None):
            remarks.append(
                f"{path}: no label for {missing:,} of {len(names):,} images of {split}, beside class folders"
            )
    return ImageFolder(listing, splits, labels, class_names if labels else [], metadata, remarks, tiff_pages)


def _describe_nothing(listing: Listing) -> str:
    found = listing.others + Counter({reason: len(names) for reason, names in listing.unread.items()})
    found += Counter(os.path.splitext(name)[1].lower() for name in listing.archives + listing.metadata)
    kinds = ", ".join(f"{number:,} {what}" for what, number in found.most_common(4))
    return (
        f"no images in {listing.path}: looked in all folders below it for .jpg, .png and all else that Pillow reads, "
        f".npy, and for .parquet, .arrow, .tar and .zip; found {found.total():,} files" + f" ({kinds})" * bool(kinds)
    )


def _match_spelling(labels: dict[str, list[str | None]]) -> tuple[dict[str, list[str | None]], list[str]]:
    """Return labels of splits that spell classes in unlike case, in the spelling of the first; and all class names.

    If a split itself has two folders that differ by case alone, as of letters, all are classes of their own.
    """
    names = {split: set(of_split) - {None} for split, of_split in labels.items()}
    if all(len({name.casefold() for name in each}) == len(each) for each in names.values()):
        spelled = {}
        for each in names.values():
            for name in sorted(each):
                spelled.setdefault(name.casefold(), name)
        labels = {split: [name and spelled[name.casefold()] for name in each] for split, each in labels.items()}
    return labels, sorted(set().union(*labels.values()) - {None})


def _join_metadata(listing: Listing, splits: dict[str, list[str]], remarks: list[str]) -> pd.DataFrame | None:
    """Return all metadata by the name of the image, or None; `remarks` say how far it fits the images."""
    images, tables = {name for names in splits.values() for name in names}, []
    for name in listing.metadata:
        path, table = listing.path / name, _read_metadata(listing.path / name, name)
        if isinstance(table, str):
            remarks.append(table)
            continue
        near = {image for image in images if image.startswith(name[: -len(path.name)])}
        num_named, num_missing = len(near & set(table.index)), len(set(table.index) - images)
        if num_named < len(near):
            remarks.append(f"{path} names {num_named:,} of {len(near):,} images; the others are read without it")
        if num_missing:
            remarks.append(f"{path} names images that do not exist: {num_missing:,}")
        tables.append(table)
    if not tables:
        return None
    table = pd.concat(tables)
    table = table[~table.index.duplicated()].dropna(axis=1, how="all")
    plain = [name for name in table.columns if _is_plain(table[name])]
    if len(plain) < len(table.columns):
        mixed = _some([str(name) for name in table.columns if name not in plain])
        remarks.append(f"{listing.path}: columns of metadata that mix types are not used: {mixed}")
    return table[plain]


def _is_plain(column: pd.Series) -> bool:
    try:
        pa.array(column, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several types
        return False
    return True
