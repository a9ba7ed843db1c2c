"""Images from anywhere that `datasets` reads: Hub id, folder (class folders or flat), parquet, tars, `save_to_disk`.

Images stay encoded until somebody needs pixels, and then `EncodedImage` is the one way to get them.
"""

import hashlib
import io
import logging
import pickle
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import ReadError

import numpy as np
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
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
from datasets.features import Array3D, ClassLabel, Value
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PillowImage

from modeling_dino.command_line import check_files, one_line, printable
from modeling_dino.image_processing_dino import PILLOW_MODES


IMAGE_SUFFIXES = tuple(ImageFolder.EXTENSIONS)
FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


def _refuse_pickle(content: bytes) -> None:
    raise pickle.UnpicklingError("a pickled member (.pth) of a tar could run code and is not read. Leave it out.")


WebDataset.DECODERS["pth"] = _refuse_pickle  # the library's own unpickles what torch.load holds to be harmless


def _split_folders(path: Path) -> dict[str, str]:
    """Split -> all files of its folder, if `path` holds folders of splits and nothing else; else all is `train`.

    Left to itself, `datasets` also takes words in file names for splits, and `my-test.png` out of the training.
    """
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    words = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
    if folders and all(folder.name in words for folder in folders):
        return {words[folder.name]: f"{folder}/**" for folder in folders}
    return {"train": f"{path}/**"}


def split_folder(path: Path, split: str) -> Path:
    """The folder that all files of a split lie in."""
    folders = {} if not path.is_dir() else _split_folders(path)
    return Path(folders.get(split, str(path)).removesuffix("/**"))


def is_path(name: str) -> bool:
    """Whether a name of data or weights is a path, there or not, and no Hub id."""
    path = Path(name).expanduser()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in FILE_BUILDERS or path.exists()


def _load(dataset_name: str, config_name: str | None, streaming: bool, **options):
    """All splits of a data set; `options` are for the builder of the format that it is in."""
    path = Path(dataset_name).expanduser()
    if not path.exists():
        if is_path(dataset_name):
            raise ValueError(f"there is no file or folder {dataset_name}")
        try:
            return load_dataset(dataset_name, config_name, streaming=streaming, **options)
        except DatasetNotFoundError as error:
            raise ValueError(
                f"{dataset_name} is neither a local path nor a data set that the Hub lets you read ({error}); for a "
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
            FILE_BUILDERS[path.suffix], data_files={"train": str(path)}, streaming=streaming, **options
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        for folder in (path, *(part for part in path.iterdir() if part.is_dir())):
            check_files(folder)
        saved = load_from_disk(str(path))
        saved = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        if streaming:
            return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in saved.items()})
        return saved
    files = [file for file in path.rglob("*") if file.is_file()]
    if odd := [file for file in files if not _is_utf8(str(file)) and _is_read(file.relative_to(path))]:
        raise ValueError(
            f"the names of {len(odd)} files in {dataset_name} are not UTF-8, such as {printable(str(odd[0]))}. The "
            "datasets library cannot read them. Rename them, as convmv does."
        )
    if not any(file.suffix in (".parquet", ".arrow", ".tar", ".zip") for file in files):
        if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            found = sorted({file.suffix or "no ending" for file in files})
            raise ValueError(
                f"no images in {dataset_name}: looked in all folders below it for .jpg, .png and all else that Pillow "
                f"reads, and for .parquet, .arrow, .tar and .zip; found {len(files)} files"
                + (f" ({', '.join(found[:9])})" if found else "")
            )
        return load_dataset("imagefolder", data_files=_split_folders(path), streaming=streaming)
    try:
        return load_dataset(str(path), config_name, streaming=streaming, **options)
    except DataFilesNotFoundError as error:
        raise ValueError(f"no data files in {dataset_name}: {error}") from error


def _pickled_member(dataset_name: str) -> str:
    path = Path(dataset_name).expanduser()
    for file in [path] if path.is_file() else sorted(path.rglob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.lower().endswith(".pth"):
                    return printable(member.name)
    return "a .pth file"


def _is_read(file: Path) -> bool:
    """Return whether the datasets library would read a file of a folder as data."""
    is_hidden = any(part.startswith(".") for part in file.parts)
    return file.suffix.lower() in (*IMAGE_SUFFIXES, *FILE_BUILDERS, ".zip") and not is_hidden


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps the bytes as surrogates
        return False
    return True


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


def split_names(dataset_name: str, config_name: str | None = None, streaming: bool = False) -> list[str]:
    """The splits that a data set has, by the arguments of `load_images`."""
    with _errors_named(dataset_name):
        return list(_load(dataset_name, config_name, streaming))


def _find_image_column(features: Features, image_column: str | None) -> str:
    columns = ", ".join(features)
    if image_column is not None:
        if image_column not in features:
            raise ValueError(f"there is no column {image_column} (--image_column); the columns are {columns}")
        if not isinstance(features[image_column], (Image, Array3D)):
            raise ValueError(f"column {image_column} holds no images but {features[image_column]}")
        return _check_array(features, image_column)
    candidates = [name for name, feature in features.items() if isinstance(feature, (Image, Array3D))]
    if not candidates:
        raise ValueError(f"the data set has no image column; the columns are {columns}")
    if len(candidates) > 1:
        raise ValueError(
            f"the data set has several image columns, choose with --image_column: {', '.join(candidates)}"
        )
    return _check_array(features, candidates[0])


def _check_array(features: Features, column: str) -> str:
    if isinstance(features[column], Array3D) and features[column].dtype != "uint8":
        raise ValueError(f"arrays of images must be uint8, those in column {column} are {features[column].dtype}")
    return column


def _find_label_column(features: Features, label_column: str | None) -> str | None:
    if label_column is not None:
        if label_column not in features:
            raise ValueError(
                f"there is no column {label_column} (--label_column); the columns are {', '.join(features)}"
            )
        if not isinstance(features[label_column], (ClassLabel, Value)):
            raise ValueError(f"column {label_column} holds no labels, one an image, but {features[label_column]}")
        return label_column
    candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    return candidates[0] if len(candidates) == 1 else "label" if "label" in features else None


def load_images(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    with_labels: bool = True,
) -> Dataset | IterableDataset:
    """A split of a data set with the columns `image` (encoded) and, where there are labels, `label`.

    Args:
        dataset_name: A Hub id, or a path: a folder of images (in class folders, or flat and so without labels), of
            parquet, Arrow or tar files, one such file, or what `save_to_disk` wrote.
        config_name: Configuration of a data set that has several.
        split: Name of the split. One file, or a folder without folders of splits, is `train`.
        image_column: Column of the images. Default: the only one that holds images.
        label_column: Column of the labels. Default: the only class column, or else `label`, or else none.
        streaming: Read while iterating, instead of preparing the whole data set first. Of parquet, other columns are
            then never read.
        with_labels: Whether the labels are wanted.

    Raises:
        ValueError: whatever is missing; says what there is instead.
    """
    with _errors_named(dataset_name):
        splits = _load(dataset_name, config_name, streaming)
        if split not in splits:
            raise ValueError(f"{dataset_name} has no split {split}; its splits are {', '.join(splits)}")
        dataset = splits[split]
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
    if isinstance(dataset.features[image_column], Image):
        # first of all: what a stream does to its rows afterwards would decode each and encode it again
        dataset = dataset.cast_column(image_column, Image(decode=False))
    dataset = dataset.select_columns(list(chosen))
    renamed = {old: new for old, new in chosen.items() if old != new}
    return dataset.rename_columns(renamed) if renamed else dataset


class BrokenImageError(ValueError):
    """An image that cannot be decoded faithfully. `kind` is one of a few words, the message names the image."""

    def __init__(self, name: str, kind: str, reason: str):
        super().__init__(f"image {printable(name)} {reason}")
        self.name, self.kind = name, kind


def pixel_hash(pixels: np.ndarray) -> int:
    """64 bits, signed, that are equal for images of equal pixels, whatever files they come from."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little", signed=True)


def content_of(hashes: np.ndarray) -> dict:
    """Number and hash of images, whatever their order, for a report; of their pixels' hashes (images,) in int64."""
    digest = hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()[:16]
    return {"num_images": len(hashes), "revision": f"sha256:{digest}"}


def image_content(image: dict) -> bytes:
    """The bytes of an image's file."""
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise BrokenImageError(image["path"], "unreadable", f"cannot be read: {error.strerror}") from error


class EncodedImage:
    """An image of a data set whose header has been read, and whose pixels have not been decoded yet.

    Files are turned upright as their EXIF says and become grey (1 channel), RGB (3) or RGBA (4). Arrays must already
    have `num_channels` as their first or last dimension.

    Args:
        image: What a row of `load_images` holds in `image`.
        num_channels: Channels that the model takes.

    Attributes:
        height, width: In pixels, upright.
        is_jpeg: Whether it can be decoded to fewer pixels.
        decoder_bytes: What decoding takes for each pixel of the file, in bytes, beside the pixels that come out.

    Raises:
        BrokenImageError: an image that is broken, or has more than 8 bits a channel; names its file where it has one.
        ValueError: a number of channels that no file has, or another than the arrays'.
    """

    def __init__(self, image: dict | list | np.ndarray | None, num_channels: int):
        self.num_channels = num_channels
        if image is None:
            raise BrokenImageError("without a file name", "missing", "is missing: its row holds none")
        if not isinstance(image, dict):
            self._pixels = _channels_first(np.asarray(image, dtype=np.uint8), num_channels)
            self.height, self.width = self._pixels.shape[1:]
            return
        if num_channels not in PILLOW_MODES:
            raise ValueError(
                f"an image file has 1, 3 or 4 channels, the model takes {num_channels}; use an array column"
            )
        self._pixels = None
        self.name = image["path"] or "without a file name"
        with self._named_errors():
            self._file = PillowImage.open(io.BytesIO(image_content(image)))
            self.is_jpeg = self._file.format == "JPEG"
            is_other = not self.is_jpeg and self._file.mode != PILLOW_MODES[num_channels]
            self.decoder_bytes = (  # measured: buffers of libwebp, coefficients of a progressive JPEG, another mode
                8 * (self._file.format == "WEBP")
                + 3 * bool(self._file.info.get("progressive"))
                + is_other * (1 if len(self._file.getbands()) == 1 else 4)
            )
            if self._file.mode[0] in "IF":
                reason = f"has Pillow's mode {self._file.mode}, and not 8 bits a channel"
                raise BrokenImageError(self.name, "not 8 bits", reason)
            is_on_its_side = self._file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            self.width, self.height = self._file.size[::-1] if is_on_its_side else self._file.size

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels (num_channels, height, width) in uint8; once, for an image of a file.

        JPEGs are decoded to `reduction` (1, 2, 4 or 8) times fewer pixels a side, rounded up, which is faster the
        fewer they are. Nothing else can be, and keeps its size.
        """
        if self._pixels is not None:
            return self._pixels
        with self._named_errors(), self._file as file:
            if reduction > 1:
                file.draft(None, tuple(side // reduction for side in file.size))
            ImageOps.exif_transpose(file, in_place=True)
            mode = PILLOW_MODES[self.num_channels]
            pixels = np.array(file if file.mode == mode else file.convert(mode))
        return pixels.reshape(*pixels.shape[:2], self.num_channels).transpose(2, 0, 1)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """What Pillow's readers raise becomes a `BrokenImageError`."""
        try:
            yield
        except BrokenImageError:
            raise
        except UnidentifiedImageError as error:
            raise BrokenImageError(self.name, "no image", "cannot be decoded: no image file") from error
        except PillowImage.DecompressionBombError as error:
            raise BrokenImageError(self.name, "too large", f"is too large: {error}") from error
        except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error) as error:
            raise BrokenImageError(self.name, "damaged", f"cannot be decoded: {error}") from error


def _channels_first(array: np.ndarray, num_channels: int) -> np.ndarray:
    if array.shape[0] != num_channels and array.shape[-1] == num_channels:
        array = array.transpose(2, 0, 1)
    if array.shape[0] != num_channels:
        raise ValueError(f"the model takes {num_channels} channels, the data set holds arrays {array.shape}")
    return np.ascontiguousarray(array)


def decode_image(image: dict | list | np.ndarray, num_channels: int) -> np.ndarray:
    """The pixels (num_channels, height, width) in uint8 of what a row of `load_images` holds in `image`.

    Raises:
        BrokenImageError, ValueError: see `EncodedImage`.
    """
    return EncodedImage(image, num_channels).decode()
