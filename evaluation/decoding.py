"""Decode image files to pixels with all bits, bands and pages; `EncodedImage` is the only way to get pixels.

Pillow reads images of at most 8 bits a channel, and gray images of more bits. tifffile reads all other TIFFs;
imagecodecs reads color PNG of 16 bits and JPEG 2000 of more than 8 (both in the extra `scientific`). NumPy reads .npy
and .npz. Whatever a reader would reduce raises `BrokenImageError`, or is named in `EncodedImage.notes`.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Features
from datasets.features import Array2D, Array3D
from PIL import ExifTags, ImageColor, ImageOps, UnidentifiedImageError
from PIL import Image as PillowImage

from modeling_dino.command_line import one_line
from modeling_dino.image_processing_dino import PILLOW_MODES, to_channels_first

from .pillow_files import PILLOW_SUFFIXES, BrokenImageError, convert, notes_of, open_any_size, refuse_reduced
from .scientific_files import (
    ASSOCIATED,
    UNASSOCIATED,
    Wanted,
    is_stack,
    needs_scientific,
    open_tiff,
    plain,
    scientific_reader,
)


HEIF_SUFFIXES = (".heic", ".heif")  # of pillow-heif
IMAGE_SUFFIXES = (*PILLOW_SUFFIXES, ".npy", ".npz")
TIFF_PAGES = ("channels", "images", "first")
MAX_IMAGE_PIXELS = 178_956_970  # where Pillow assumes a decompression bomb


@dataclass(frozen=True)
class Reading:
    """How images become pixels.

    Args:
        num_channels: Channels that the model takes.
        background: Color that transparent images are put on, by a name or as #rrggbb; alpha is kept where the model
            takes it as its last channel.
        tiff_pages: What the pages of a TIFF are: `channels` of one image, `images` (of a folder), or the `first`
            counts alone. Default: a TIFF of several pages is not read.
        max_image_pixels: Pixels above which an image is not read.
        allow_unread: Whether more than a tenth of the images of a split may be skipped, see `say_skipped`.
        array_dtype: Type of the values of an array column.
    """

    num_channels: int
    background: str = "white"
    tiff_pages: str | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    allow_unread: bool = False
    array_dtype: str = "uint8"

    def of(self, features: Features) -> "Reading":
        """The same for a dataset of these features."""
        is_array = isinstance(features["image"], (Array2D, Array3D))
        return replace(self, array_dtype=features["image"].dtype if is_array else "uint8")

    def __post_init__(self):
        try:
            is_opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            is_opaque = False
        if not is_opaque:
            raise ValueError(
                f"background must be the name of a color or #rrggbb, got {self.background}. Use white or black."
            )
        if self.tiff_pages not in (None, *TIFF_PAGES):
            raise ValueError(f"tiff_pages must be channels, images or first, got {self.tiff_pages}")
        if self.max_image_pixels < 1:
            raise ValueError(f"max_image_pixels must be at least 1, got {self.max_image_pixels}")


def pixel_hash(pixels: np.ndarray) -> int:
    """64 bits, signed, that are equal for images of equal size and pixels, whatever files they come from."""
    digest = hashlib.blake2b(repr((pixels.shape, pixels.dtype.str)).encode(), digest_size=8)
    digest.update(pixels.tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def image_name(image) -> str | None:
    """The path of an image's file, with #page=N, from 1, for a page of it; None for images without a file."""
    if not isinstance(image, dict) or image["path"] is None:
        return None
    return image["path"] + (f"#page={image['page'] + 1}" if image.get("page") is not None else "")


def image_content(image: dict) -> bytes:
    """The bytes of an image's file."""
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise BrokenImageError(image["path"], "unreadable", f"cannot be read: {error.strerror}") from error


class EncodedImage:
    """An image of a dataset whose header has been read, and whose pixels have not been decoded yet.

    Images are turned upright as their EXIF or TIFF tag says, and get the channels of `reading`: Pillow converts
    between gray, RGB and RGBA; an array of one channel serves a model of three; anything else must have the number
    that the model takes.

    Args:
        image: What a row of `load_images` holds in `image`.
        reading: How to read it.

    Attributes:
        height, width: In pixels, upright.
        dtype: Of the pixels; uint8 but for scientific images.
        is_jpeg: Whether it can be decoded to fewer pixels.
        decoder_bytes: What decoding takes for each pixel of the file, in bytes, beside the pixels that come out.
        notes: What of the file is not in the pixels, in a few words each: color profile, further frames, bits.

    Raises:
        BrokenImageError: an image that is damaged, too large, or would lose bits, channels or pages; names its file
            where it has one.
        ValueError: an array column of another number of channels than the model takes.
    """

    name = "without a file name"
    is_jpeg = False
    decoder_bytes = 0
    notes: tuple[str, ...] = ()

    def __init__(self, image: dict | list | np.ndarray | None, reading: Reading):
        self.reading = reading
        if image is None:
            raise BrokenImageError("without a file name", "missing", "is missing: its row holds none")
        if not isinstance(image, dict):
            pixels = to_channels_first(plain(np.asarray(image, dtype=reading.array_dtype)), reading.num_channels)
            self.dtype, (self.height, self.width) = pixels.dtype, pixels.shape[1:]
            self._decode = lambda reduction: np.ascontiguousarray(pixels)
            return
        self.name = image_name(image) or self.name
        self.page = image.get("page")
        with self._named_errors():
            if reading.tiff_pages and is_stack(image):  # of which only the pages that are wanted are read
                self._open_scientific(open_tiff, image["path"])
            else:
                content = image_content(image)
                reader = scientific_reader(content)
                if reader is None:
                    self._open_pillow(content)
                else:
                    self._open_scientific(reader, content)
            self._check_size(self.width, self.height)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.reading.max_image_pixels:
            raise BrokenImageError(
                self.name,
                "too large",
                f"has {width} x {height} pixels, more than max_image_pixels = {self.reading.max_image_pixels}. Give "
                f"--max_image_pixels {width * height} if you trust it",
                width * height,
            )

    def _open_pillow(self, content: bytes) -> None:
        file = open_any_size(io.BytesIO(content))
        self._check_size(*file.size)  # first, as looking for EXIF data decodes a PNG
        refuse_reduced(file, content, self.name)
        reading, num_channels = self.reading, self.reading.num_channels
        self.is_jpeg = file.format == "JPEG"
        is_on_its_side = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        # of a TIFF, new Pillows give the upright size
        size = (file.tag_v2[256], file.tag_v2[257]) if file.format == "TIFF" else file.size
        self.width, self.height = size[::-1] if is_on_its_side else size
        self.notes = notes_of(file, content)
        is_deep = file.mode[0] in "IF"
        transparent = file.info.get("transparency") if is_deep else None  # the value of a gray PNG that is
        if is_deep:
            is_16_bit = file.mode.startswith("I;16") or file.format in ("PNG", "PPM")  # older Pillows widen these
            self.dtype = np.dtype(np.float32 if file.mode == "F" else np.uint16 if is_16_bit else np.int32)
            self._check_channels(1 if transparent is None else 2, transparent is not None)
        else:
            self.dtype = np.dtype(np.uint8)
            if num_channels not in PILLOW_MODES:
                raise self._other_channels(len(file.getbands()))
        mode = "" if is_deep else PILLOW_MODES[num_channels]
        self.decoder_bytes = (  # measured: buffers of libwebp, coefficients of a progressive JPEG, another mode
            8 * (file.format == "WEBP")
            + 3 * bool(file.info.get("progressive"))
            + (not self.is_jpeg and file.mode != mode) * (1 if len(file.getbands()) == 1 else 4)
        )

        def decode(reduction: int) -> np.ndarray:
            with file:
                if reduction > 1:
                    file.draft(None, tuple(side // reduction for side in file.size))
                ImageOps.exif_transpose(file, in_place=True)
                if is_deep:
                    pixels = np.array(file).astype(self.dtype)[None]
                    if transparent is not None:
                        alpha = (pixels != transparent) * np.iinfo(self.dtype).max
                        pixels = np.concatenate([pixels, alpha.astype(self.dtype)])
                    return self._fit(pixels, UNASSOCIATED if len(pixels) == 2 else None)
                pixels = np.array(convert(file, mode, reading.background))
            return pixels.reshape(*pixels.shape[:2], num_channels).transpose(2, 0, 1)

        self._decode = decode

    def _open_scientific(self, reader: Callable, source: bytes | str) -> None:
        try:
            wanted = Wanted(self.name, self.page, self.reading.num_channels, self.reading.tiff_pages)
            opened = reader(source, wanted)
        except ImportError as error:
            raise needs_scientific(self.name, error.name) from error
        channels, self.height, self.width = opened.shape
        self.dtype, self.notes = opened.dtype, opened.notes
        self._check_channels(channels, opened.alpha is not None)
        self.decoder_bytes = 2 * channels * self.dtype.itemsize

        def decode(reduction: int) -> np.ndarray:
            pixels = opened.read()
            if pixels.shape[0] != channels or pixels.dtype != self.dtype:
                raise ValueError(f"its header promises {channels} channels of {self.dtype}, and it holds others")
            return self._fit(pixels, opened.alpha)

        self._decode = decode

    def _check_channels(self, channels: int, has_alpha: bool = False) -> None:
        """Check that the model takes these channels, alpha included: all, those without alpha, or gray as RGB(A)."""
        colors, num_channels = channels - has_alpha, self.reading.num_channels
        allowed = {channels, colors} | ({3, 3 + has_alpha} if colors == 1 else set())
        if num_channels not in allowed:
            raise self._other_channels(channels)

    def _fit(self, pixels: np.ndarray, alpha: int | None = None) -> np.ndarray:
        """Pixels of a checked number of channels -> those of the model. `alpha` is the kind of the last channel."""
        num_channels = self.reading.num_channels
        if alpha and num_channels in (1, 3) and len(pixels) != num_channels or alpha and num_channels < len(pixels):
            pixels = _on_background(pixels, self.reading.background, alpha == ASSOCIATED)
        elif alpha == ASSOCIATED:
            pixels = _unassociated(pixels)
        if len(pixels) < num_channels:  # gray
            pixels = np.concatenate([pixels[:1]] * 3 + [pixels[1:]])
        return np.ascontiguousarray(pixels)

    def _other_channels(self, channels: int) -> BrokenImageError:
        return BrokenImageError(
            self.name,
            "other channels",
            f"has {channels} channel{'s' * (channels > 1)}, and the model takes {self.reading.num_channels}. A model "
            f"with --config_overrides num_channels={channels} takes it",
            channels,
        )

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels (num_channels, height, width) in `dtype`; once, for an image of a file.

        JPEGs are decoded to `reduction` (1, 2, 4 or 8) times fewer pixels a side, rounded up, which is faster the
        fewer they are. Nothing else can be, and keeps its size.
        """
        with self._named_errors():
            return self._decode(reduction)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Context manager in which whatever a reader raises becomes a `BrokenImageError`."""
        try:
            yield
        except BrokenImageError:
            raise
        except UnidentifiedImageError as error:
            raise BrokenImageError(self.name, "no image", f"cannot be decoded: {one_line(error)}") from error
        except PillowImage.DecompressionBombError as error:
            raise BrokenImageError(self.name, "too large", f"is too large: {one_line(error)}") from error
        except Exception as error:  # of any reader, for damaged content
            if "requires the 'imagecodecs' package" in str(error):
                raise needs_scientific(self.name, "imagecodecs") from error
            raise BrokenImageError(self.name, "damaged", f"cannot be decoded: {one_line(error)}") from error


def _highest(dtype: np.dtype) -> int:
    """The value of full opacity or intensity."""
    return np.iinfo(dtype).max if dtype.kind in "ui" else 1


def _on_background(pixels: np.ndarray, background: str, is_associated: bool) -> np.ndarray:
    """Put pixels (channels + 1, height, width), the last of them alpha, on a color."""
    dtype, highest = pixels.dtype, _highest(pixels.dtype)
    color = np.array(ImageColor.getrgb(background)) / 255 * highest
    color = color if len(pixels) == 4 else np.resize(color.mean(), len(pixels) - 1)
    alpha = pixels[-1:] / highest
    colors = pixels[:-1] if is_associated else alpha * pixels[:-1]
    return _to_dtype(colors + (1 - alpha) * color[:, None, None], dtype)


def _unassociated(pixels: np.ndarray) -> np.ndarray:
    """Divide colors by alpha, the last channel, as Pillow does for 8 bits; where it is 0, colors become 0."""
    alpha = pixels[-1:] / _highest(pixels.dtype)
    colors = np.divide(pixels[:-1], alpha, out=np.zeros(pixels[:-1].shape), where=alpha > 0)
    return np.concatenate([_to_dtype(colors, pixels.dtype), pixels[-1:]])


def _to_dtype(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return values.round().clip(0, np.iinfo(dtype).max).astype(dtype) if dtype.kind in "ui" else values.astype(dtype)


def decode_image(image: dict | list | np.ndarray, reading: Reading) -> np.ndarray:
    """The pixels (num_channels, height, width) of what a row of `load_images` holds in `image`.

    Raises:
        BrokenImageError, ValueError: see `EncodedImage`.
    """
    return EncodedImage(image, reading).decode()


def decode_8_bits(image: dict | list | np.ndarray, reading: Reading) -> np.ndarray:
    """`decode_image` for what can only take uint8.

    Raises:
        BrokenImageError: an image of more bits, too.
    """
    encoded = EncodedImage(image, reading)
    if encoded.dtype != np.uint8:
        raise ValueError(
            f"images must be of 8 bits a channel here, got {encoded.dtype}. Convert them, or use knn, logistic or "
            "features, which take any."
        )
    return encoded.decode()
