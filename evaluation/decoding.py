"""Decode image files to pixels with all bits, bands and pages; `EncodedImage` is the only way to get pixels.

Pillow reads images of at most 8 bits a channel, and gray images of more bits. tifffile reads all other TIFFs;
imagecodecs reads color PNG of 16 bits and JPEG 2000 of more than 8 (both in the extra `scientific`). NumPy reads .npy
and .npz. Whatever a reader would reduce raises `BrokenImageError`, or is named in `EncodedImage.notes`.
"""

import hashlib
import io
import logging
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from datasets import Features
from datasets.features import Array2D, Array3D
from PIL import ExifTags, ImageColor, ImageOps, UnidentifiedImageError
from PIL import Image as PillowImage

from modeling_dino.command_line import one_line, printable
from modeling_dino.image_processing_dino import PILLOW_MODES, has_channels_last, to_channels_first


with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

PillowImage.init()  # all of its readers
# formats that Pillow only identifies, and PostScript, which is a program that Ghostscript runs
_NOT_DECODED = {"MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS"}
ARRAY_SUFFIXES = (".npy", ".npz")
HEIF_SUFFIXES = (".heic", ".heif")  # of pillow-heif
IMAGE_SUFFIXES = (
    *(
        suffix
        for suffix, kind in PillowImage.registered_extensions().items()
        if kind in PillowImage.OPEN and kind not in _NOT_DECODED
    ),
    *ARRAY_SUFFIXES,
)
TIFF_PAGES = ("channels", "images", "first")
MAX_IMAGE_PIXELS = 178_956_970  # where Pillow assumes a decompression bomb
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG_2000_STARTS = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_ASSOCIATED, _UNASSOCIATED = 1, 2  # alpha in the TIFF tag ExtraSamples
_SRGB_TOLERANCE = 10  # of 255: colors that differ less are taken for sRGB's; Gray Gamma 2.2 differs by 9
_TURNS = {  # of the orientations of TIFF and EXIF: what to do to (..., height, width)
    2: lambda pixels: pixels[..., ::-1],
    3: lambda pixels: pixels[..., ::-1, ::-1],
    4: lambda pixels: pixels[..., ::-1, :],
    5: lambda pixels: pixels.swapaxes(-1, -2),
    6: lambda pixels: pixels[..., ::-1, :].swapaxes(-1, -2),
    7: lambda pixels: pixels[..., ::-1, ::-1].swapaxes(-1, -2),
    8: lambda pixels: pixels[..., ::-1].swapaxes(-1, -2),
}


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
        array_dtype: Type of the values of an array column.
    """

    num_channels: int
    background: str = "white"
    tiff_pages: str | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
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


class BrokenImageError(ValueError):
    """An image that cannot be decoded faithfully. `kind` is one of a few words, the message names the image.

    A data loader raises an error of a worker again with its message as the only argument.

    Args:
        name: Of the image.
        kind: Few words, equal for equal faults.
        reason: What follows the name in the message.
        number: The image's channels or pixels, where the model or a setting asks for others.
    """

    def __init__(self, name: str, kind: str = "", reason: str = "", number: int = 0):
        super().__init__(f"image {printable(name)} {reason}" if kind else name)
        self.name, self.kind, self.reason, self.number = name, kind, reason, number

    def __reduce__(self):
        return BrokenImageError, (self.name, self.kind, self.reason, self.number)


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
            pixels = to_channels_first(_plain(np.asarray(image, dtype=reading.array_dtype)), reading.num_channels)
            self.dtype, (self.height, self.width) = pixels.dtype, pixels.shape[1:]
            self._decode = lambda reduction: np.ascontiguousarray(pixels)
            return
        self.name = image_name(image) or self.name
        self.page = image.get("page")
        with self._named_errors():
            if reading.tiff_pages and _is_stack(image):  # of which only the pages that are wanted are read
                self._open_scientific(_open_tiff, image["path"])
            else:
                content = image_content(image)
                reader = _scientific_reader(content)
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
        file = _open_any_size(io.BytesIO(content))
        self._check_size(*file.size)  # first, as looking for EXIF data decodes a PNG
        _refuse_reduced(file, content, self.name)
        reading, num_channels = self.reading, self.reading.num_channels
        self.is_jpeg = file.format == "JPEG"
        is_on_its_side = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        # of a TIFF, new Pillows give the upright size
        size = (file.tag_v2[256], file.tag_v2[257]) if file.format == "TIFF" else file.size
        self.width, self.height = size[::-1] if is_on_its_side else size
        self.notes = _notes(file, content)
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
                    return self._fit(pixels, _UNASSOCIATED if len(pixels) == 2 else None)
                pixels = np.array(_convert(file, mode, reading.background))
            return pixels.reshape(*pixels.shape[:2], num_channels).transpose(2, 0, 1)

        self._decode = decode

    def _open_scientific(self, reader: Callable, source: bytes | str) -> None:
        try:
            opened = reader(source, self)
        except ImportError as error:
            raise _needs_scientific(self.name, error.name) from error
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
            pixels = _on_background(pixels, self.reading.background, alpha == _ASSOCIATED)
        elif alpha == _ASSOCIATED:
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
                raise _needs_scientific(self.name, "imagecodecs") from error
            raise BrokenImageError(self.name, "damaged", f"cannot be decoded: {one_line(error)}") from error


class _Opened(NamedTuple):
    """A scientific image whose header has been read."""

    shape: tuple[int, int, int]  # (channels, height, width)
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # the pixels of that shape
    alpha: int | None = None  # kind of the last channel: _ASSOCIATED, _UNASSOCIATED, or None if it is not alpha
    notes: tuple[str, ...] = ()


def _needs_scientific(name: str, module: str) -> BrokenImageError:
    return BrokenImageError(
        name, "needs scientific", f"needs {module}. Install it with pip install 'dino-hf[scientific]'"
    )


def _open_any_size(file: BinaryIO, formats: tuple[str, ...] = ()) -> PillowImage.Image:
    """Open an image by Pillow, of any size: `max_image_pixels` is checked instead.

    `PIL.Image.open` warns of large images or refuses them, by a limit that the whole process shares and that therefore
    must not change here, even for a moment: other threads would see it.

    Raises:
        UnidentifiedImageError: no reader takes it; says why where the first bytes are of a known format.
    """
    start, reason = file.read(16), ""
    for name in formats or [name for name in PillowImage.ID if name not in _NOT_DECODED]:
        factory, accept = PillowImage.OPEN[name]
        accepted = False
        try:
            accepted = not accept or accept(start)
            if accepted and not isinstance(accepted, str):  # a string says which library is missing
                file.seek(0)
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as PIL.Image.open skips a reader
            reason = reason or (f" ({name}: {one_line(error)})" if accept and accepted else "")
    raise UnidentifiedImageError(f"no image file{reason}")


def _convert(file: PillowImage.Image, mode: str, background: str) -> PillowImage.Image:
    """An image in the mode of the model; a transparent one put on the background, unless the mode has alpha."""
    if file.mode == "La":  # premultiplied, which Pillow converts to nothing else
        file = file.convert("LA")
    if mode != "RGBA" and file.has_transparency_data:
        canvas = PillowImage.new("RGBA", file.size, background)
        canvas.alpha_composite(file.convert("RGBA"))
        file = canvas.convert("RGB")
    return file if file.mode == mode else file.convert(mode)


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


def _refuse_reduced(file: PillowImage.Image, content: bytes, name: str) -> None:
    """Check that Pillow reads all bits and channels of an image.

    Raises:
        BrokenImageError: it does not.
    """
    args = file.tile[0][3] if file.format in ("PPM", "DDS") else ()
    is_deep_ppm = file.format == "PPM" and file.mode == "RGB" and isinstance(args, tuple) and args[1] > 255
    is_deep_dds = file.format == "DDS" and isinstance(args, tuple) and args[0] == 6  # BC6H, of half precision
    if is_deep_ppm or is_deep_dds or (file.format == "SGI" and content[3] == 2):
        raise BrokenImageError(
            name, "16 bits", "has 16 bits a channel, of which Pillow reads 8. Convert it to PNG or TIFF"
        )
    if file.format == "FITS" and not _is_plain_fits(content):
        raise BrokenImageError(
            name, "FITS", "is a FITS of a kind that Pillow does not read in full. Convert it to TIFF or .npy"
        )


def _is_plain_fits(content: bytes) -> bool:
    """Return whether a FITS file is one image, uncompressed, of uint8, int32 or float32, without a scale."""
    cards, name = {}, b""
    for start in range(0, len(content), 80):
        name, _, value = content[start : start + 80].partition(b"/")[0].partition(b"=")
        name = name.strip()
        if name == b"END":
            break
        cards[name] = value.strip()
    axes = [int(cards.get(b"NAXIS%d" % axis, b"1")) for axis in range(1, int(cards.get(b"NAXIS", b"0")) + 1)]
    has_scale = float(cards.get(b"BZERO", b"0")) != 0 or float(cards.get(b"BSCALE", b"1")) != 1
    is_one_image = len(axes) >= 2 and math.prod(axes[2:]) == 1 and b"XTENSION" not in content[:1_000_000]
    return cards.get(b"BITPIX") in (b"8", b"32", b"-32") and is_one_image and not has_scale


def _notes(file: PillowImage.Image, content: bytes) -> tuple[str, ...]:
    """What of a file Pillow does not put into the pixels."""
    notes, sizes = [], file.info.get("sizes") or ()
    profile, mode = file.info.get("icc_profile"), file.mode
    if mode in ("CMYK", "LAB"):
        notes.append(f"{'CIELAB' if mode == 'LAB' else mode} converted without a color profile")
    elif not _is_srgb(profile, mode) or (not profile and _has_other_colors(file, content)):
        notes.append("color profile ignored")
    if file.format not in ("TIFF", "PSD") and getattr(file, "is_animated", False):
        notes.append("frames after the first ignored")
    if (file.format in ("ICO", "ICNS") and len(sizes) > 1) or file.format == "PCD":
        notes.append("other sizes ignored")
    if file.format == "PSD" and int.from_bytes(content[12:14], "big") > len(file.getbands()):
        notes.append(f"channels after {len(file.getbands())} ignored")
    if file.format == "TIFF" and mode == "P" and any(entry % 256 and entry % 257 for entry in file.tag_v2[320]):
        notes.append("palette of 16 bits reduced to 8")
    place = content[:65536].find(b"av1C") if file.format == "AVIF" else -1
    if place > 0 and content[place + 6] & 0x40:  # high_bitdepth
        notes.append("more than 8 bits reduced to 8")
    place = content[:65536].find(b"hvcC") if file.format == "HEIF" else -1
    if place > 0 and content[place + 21] & 7:  # bitDepthLumaMinus8
        notes.append("more than 8 bits reduced to 8")
    return tuple(notes)


def _has_other_colors(file: PillowImage.Image, content: bytes) -> bool:
    """Return whether a file without an ICC profile says by numbers that its colors are not sRGB's."""
    if file.format == "PNG":
        place = content[:4096].find(b"cICP")
        if place > 0:
            return content[place + 4] != 1 or content[place + 5] not in (1, 6, 13, 14, 15)
        return "srgb" not in file.info and abs(file.info.get("gamma", 0.45455) - 0.45455) > 0.01
    place = content[:65536].find(b"colrnclx") if file.format in ("AVIF", "HEIF") else -1
    if place < 0:
        return False
    primaries, transfer = struct.unpack(">HH", content[place + 8 : place + 12])
    return primaries not in (1, 2, 5, 6, 7) or transfer not in (1, 2, 6, 13, 14, 15)


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes | None, mode: str) -> bool:
    """Return whether an ICC profile means about the colors that sRGB, or for gray its curve, would."""
    if not profile:
        return True
    try:
        from PIL import ImageCms

        if mode in ("RGB", "RGBA", "RGBX", "P", "YCbCr"):
            levels = np.stack(np.meshgrid(*[np.linspace(0, 255, 5)] * 3), -1).reshape(1, -1, 3).astype(np.uint8)
        else:
            levels = np.arange(256, dtype=np.uint8)[None]
        shown = ImageCms.profileToProfile(
            PillowImage.fromarray(levels),
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except ImportError:  # a Pillow without LittleCMS
        return b"sRGB" in profile or b"s\0R\0G\0B" in profile
    except (ImageCms.PyCMSError, OSError):  # damaged, or of another color space
        return False
    expected = levels if levels.ndim == 3 else levels[..., None]
    return int(np.abs(np.asarray(shown).astype(int) - expected).max()) < _SRGB_TOLERANCE


def _plain_dtype(dtype: np.dtype) -> np.dtype:
    """The type that values of a type are read as: native byte order, uint8 for booleans, float32 for float16.

    Raises:
        ValueError: a type that is not of real numbers.
    """
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ValueError(f"values of {dtype} are not an image")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype.kind == "f" and dtype.itemsize == 2 else dtype.newbyteorder("=")


def _plain(array: np.ndarray) -> np.ndarray:
    """Values in the type that `_plain_dtype` says; booleans become 0 and 255."""
    dtype = _plain_dtype(array.dtype)
    return array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array.astype(dtype, copy=False)


def _open_array(content: bytes, image: EncodedImage) -> _Opened:
    """The array of an .npy file, or the only one of an .npz file. Nothing is allocated before its size is checked.

    Raises:
        ValueError: pickled objects, several arrays, a size that the header does not tell truly, or no image.
    """
    if not content.startswith(b"PK"):
        return _of_array(io.BytesIO(content), len(content), image)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) != 1 or not members[0].filename.endswith(".npy"):
            names = ", ".join(member.filename.removesuffix(".npy") for member in members[:3])
            raise ValueError(f"an .npz must hold one array, got {len(members)} ({names}). Save one image in each")
        with archive.open(members[0]) as member:
            opened = _of_array(member, members[0].file_size, image)

    def read() -> np.ndarray:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(members[0]) as member:
            return _of_array(member, members[0].file_size, image).read()

    return opened._replace(read=read)


def _of_array(file, size: int, image: EncodedImage) -> _Opened:
    """An .npy file of `size` bytes; `file` must stay open until it is read."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3 is for names of fields
        raise ValueError(f"an .npy of version {version} is not an image")
    is_first = version == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    plain = _plain_dtype(dtype)
    if len(shape) < 2 or not all(side > 0 for side in shape):
        raise ValueError(f"an array of the shape {shape} is not an image")
    num_bytes = math.prod(shape) * dtype.itemsize
    if size - file.tell() < num_bytes:
        raise ValueError(f"an array of {num_bytes} bytes, of which {size - file.tell()} are there")
    num_channels = image.reading.num_channels
    is_last = has_channels_last(shape, num_channels)
    if len(shape) == 3 and not is_last and shape[0] not in (1, num_channels):
        is_last = shape[-1] < shape[0]  # for the message
    channels, height, width = (
        (shape[2], *shape[:2]) if is_last else (math.prod(shape[:-2]), *shape[-2:])
    )  # of (height, width): one

    def read() -> np.ndarray:
        array = np.frombuffer(file.read(num_bytes), dtype)
        array = _plain(array.reshape(shape, order="F" if is_fortran else "C"))
        array = array.transpose(2, 0, 1) if is_last else array.reshape(channels, height, width)
        return np.ascontiguousarray(array)

    return _Opened((channels, height, width), plain, read)


def _scientific_reader(content: bytes) -> Callable[[bytes, EncodedImage], _Opened] | None:
    """What reads an image in full where Pillow would not; None if Pillow does."""
    if content.startswith((b"\x93NUMPY", b"PK\3\4")):
        return _open_array
    if content.startswith(_TIFF_STARTS):
        return None if _is_pillows(io.BytesIO(content)) else _open_tiff
    if content.startswith(b"\x89PNG") and content[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return _open_deep_png
    if content.startswith(_JPEG_2000_STARTS) and not _parse_jpeg2000(content).is_pillows:
        return _open_jpeg2000
    return None


def _is_stack(image: dict) -> bool:
    """Return whether an image is a TIFF file that tifffile reads, by its path."""
    if image["bytes"] is not None or not image["path"].lower().endswith((".tif", ".tiff")):
        return False
    try:
        with open(image["path"], "rb") as file:
            return file.read(4) in _TIFF_STARTS and not _is_pillows(file)
    except OSError:
        return False


def _is_pillows(file: BinaryIO) -> bool:
    """Return whether Pillow reads all of a TIFF: one page of at most 8 bits a channel, gray, color or with alpha."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file.seek(0)
            file = _open_any_size(file, ("TIFF",))
            tags, num_pages = file.tag_v2, file.n_frames
        except Exception:  # of a TIFF that is damaged or unknown to Pillow
            return False
    bits, num_samples, extra = tags.get(258, (1,)), tags.get(277, 1), tags.get(338, ())
    signed = any(kind != 1 for kind in np.atleast_1d(tags.get(339, (1,))))
    num_extra = len(extra) if isinstance(extra, tuple) else 1
    is_color = num_samples - num_extra in (1, 3) or (num_samples == 4 and file.mode == "CMYK")
    has_alpha = not num_extra or tuple(np.atleast_1d(extra)) in ((_ASSOCIATED,), (_UNASSOCIATED,))
    is_plain = max(np.atleast_1d(bits)) <= 8 and not signed and file.mode[0] not in "IF"
    is_known = file.info.get("compression") != "webp"  # for which libtiff is seldom built
    return num_pages == 1 and is_plain and is_color and has_alpha and is_known


def _open_tiff(source: bytes | str, image: EncodedImage) -> _Opened:
    """A TIFF, by its content or path. A path is opened again when pixels are read, and then only the pages wanted."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of errors that are raised as well
    file = tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    try:
        opened = _open_series(file, image)
    finally:
        if not isinstance(source, bytes):
            file.filehandle.close()

    def read() -> np.ndarray:
        file.filehandle.open()
        try:
            return opened.read()
        finally:
            file.filehandle.close()

    return opened if isinstance(source, bytes) else opened._replace(read=read)


def _open_series(file, image: EncodedImage) -> _Opened:
    """The images of a tifffile.TiffFile as one image, or the page of them that is wanted."""
    series = _image_series(file)
    if not series:
        raise ValueError("a TIFF without pages")
    num_pages = [_pages_of(part) for part in series]
    choice, total = image.reading.tiff_pages, sum(num_pages)
    if total > 1 and (choice is None or (choice == "images" and image.page is None)):
        advice = (
            "and --tiff_pages images is for folders of files"
            if choice
            else "Give --tiff_pages " + ("channels, images or first")
        )
        raise BrokenImageError(image.name, "several pages", f"has {total} pages{', ' if choice else '. '}{advice}")
    page = None  # of the series; all pages are channels
    if total > 1 and choice != "channels":
        page = image.page if choice == "images" else 0
        part = next(number for number, end in enumerate(np.cumsum(num_pages)) if page < end)
        page -= sum(num_pages[:part])
        series = [series[part]]
    first, key = series[0], series[0].keyframe
    if len({(part.shape, part.dtype, part.axes, part.keyframe.photometric) for part in series}) > 1:
        raise BrokenImageError(
            image.name, "unlike pages", f"has {len(series)} images of unlike sizes or types. Split the file"
        )
    if not {"Y", "X"} <= set(first.axes):
        raise ValueError(f"axes {first.axes}, without height and width")
    _check_colors(key, image.name)
    if any(part is None for one in series for part in one.pages):
        raise ValueError("planes are missing, or are in other files")
    sizes = dict(zip(first.axes, first.shape))
    channels = sizes.get("C", 1) * sizes.get("S", 1) * (total if page is None else 1)
    extra = int(key.extrasamples[-1]) if key.extrasamples else 0
    alpha = extra if channels == sizes.get("S") and extra in (_ASSOCIATED, _UNASSOCIATED) else None
    orientation = int(key.tags[274].value) if 274 in key.tags else 1

    def read() -> np.ndarray:
        if page is not None and len(first.pages) == _pages_of(first):  # only the one is read
            planes = _planes(first.pages[page].asarray(), key.axes)
        elif page is not None:
            planes = _planes(first.asarray(), first.axes)[page]
        else:
            planes = np.concatenate([_planes(part.asarray(), part.axes) for part in series])
        pixels = _full_range(_plain(planes.reshape(-1, *planes.shape[-2:])), key)
        return _TURNS.get(orientation, lambda same: same)(pixels)

    height, width = (sizes["X"], sizes["Y"]) if orientation in (5, 6, 7, 8) else (sizes["Y"], sizes["X"])
    notes = []
    if 34675 in key.tags and not _is_srgb(bytes(key.tags[34675].value), "RGB" if channels > 2 else "L"):
        notes.append("color profile ignored")
    if choice == "first" and total > 1:
        notes.append("pages after the first ignored")
    if any(part.keyframe.is_mask for part in file.series):
        notes.append("mask ignored")
    return _Opened((channels, height, width), _plain_dtype(first.dtype), read, alpha, tuple(notes))


def _image_series(file) -> list:
    """The images of a tifffile.TiffFile, without smaller copies and masks of them."""
    series = [part for part in file.series if not part.keyframe.is_reduced and not part.keyframe.is_mask]
    return series or file.series[:1]


def _pages_of(series) -> int:
    """Pages of a series of tifffile, which has height, width, and channels (C) and samples (S) on each."""
    return math.prod(size for axis, size in zip(series.axes, series.shape) if axis not in "CSYX")


def _check_colors(page, name: str) -> None:
    """Check that tifffile gives gray values, RGB or bands, and not colors that mean something else.

    Raises:
        BrokenImageError: it does not.
    """
    kind = getattr(page.photometric, "name", str(page.photometric))
    compression = getattr(page.compression, "name", str(page.compression))
    is_rgb = any(word in compression for word in ("JPEG", "JP2000", "WEBP"))  # which tifffile converts
    has_other_inks = 332 in page.tags and page.tags[332].value == 2
    allowed = ("MINISWHITE", "MINISBLACK", "RGB", "MASK", "LINEAR_RAW", "DEPTH_MAP")
    if not (kind in allowed or (kind == "YCBCR" and is_rgb) or (kind == "SEPARATED" and has_other_inks)):
        raise BrokenImageError(
            name, "other colors", f"stores colors as {kind}, which are not converted. Convert it to gray or RGB"
        )


def _full_range(pixels: np.ndarray, page) -> np.ndarray:
    """Values of less than 8 bits stretched to uint8, as Pillow does; values in which white is 0 inverted."""
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    if pixels.dtype.kind != "u":
        return pixels
    highest = 255 if bits == 1 else 2**bits - 1  # booleans have become 0 and 255
    if page.photometric == 0:
        pixels = pixels.dtype.type(highest) - pixels
    return (pixels * np.uint16(255) // highest).astype(np.uint8) if bits in (2, 4) else pixels


def count_pages(content_or_path: bytes | str) -> int:
    """Pages of a TIFF that are images of their own by `tiff_pages` images; 1 of anything that tifffile cannot open."""
    import tifffile

    source = io.BytesIO(content_or_path) if isinstance(content_or_path, bytes) else content_or_path
    try:
        with tifffile.TiffFile(source) as file:
            return max(1, sum(map(_pages_of, _image_series(file))))
    except Exception:  # of a damaged file, which is reported when it is read
        return 1


def _planes(array: np.ndarray, axes: str) -> np.ndarray:
    """An array with the axes that tifffile names -> (pages, channels, height, width)."""
    others = [axis for axis in axes if axis not in "CSYX"]
    order = [*others, *(axis for axis in "CSYX" if axis in axes)]
    array = array.transpose([axes.index(axis) for axis in order])
    num_channels = math.prod(array.shape[len(others) : -2])
    return array.reshape(-1, num_channels, *array.shape[-2:])


def _open_deep_png(content: bytes, image: EncodedImage) -> _Opened:
    """A PNG of 16 bits in color or with alpha; one of its colors may be transparent."""
    from imagecodecs import png_decode

    file = _open_any_size(io.BytesIO(content), ("PNG",))
    orientation = file.getexif().get(ExifTags.Base.Orientation) if "exif" in file.info else None
    (width, height), kind = file.size, content[25]
    has_alpha = kind != 2 or "transparency" in file.info
    channels = 2 if kind == 4 else 3 + has_alpha
    height, width = (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def read() -> np.ndarray:
        return _TURNS.get(orientation, lambda same: same)(png_decode(content).transpose(2, 0, 1))

    shape, alpha = (channels, height, width), _UNASSOCIATED if has_alpha else None
    return _Opened(shape, np.dtype(np.uint16), read, alpha, _notes(file, content))


class _JPEG2000(NamedTuple):
    shape: tuple[int, int, int]
    dtype: np.dtype
    alpha: int | None
    color_space: int  # EnumCS of the standard; 0 if it is not told
    is_pillows: bool  # gray or RGB, or these with alpha, of at most 8 bits


def _parse_jpeg2000(content: bytes) -> _JPEG2000:
    start = content.find(b"\xff\x4f\xff\x51")  # of the codestream
    if start < 0 or len(content) < start + 45:
        return _JPEG2000((0, 0, 0), np.dtype(np.uint8), None, 0, True)  # Pillow says what is wrong
    right, bottom, left, top = struct.unpack(">IIII", content[start + 8 : start + 24])
    channels = int.from_bytes(content[start + 40 : start + 42], "big")
    precisions = content[start + 42 : start + 42 + 3 * channels : 3]
    bits, is_signed = max((p & 0x7F) + 1 for p in precisions), precisions[0] >= 0x80
    dtype = np.dtype(f"{'i' if is_signed else 'u'}{1 if bits <= 8 else 2 if bits <= 16 else 4}")
    header, alpha, color_space = content[:start], None, 0
    place = header.find(b"cdef")  # (channel, type, association) each
    if place > 0:
        types = struct.unpack_from(f">{3 * int.from_bytes(header[place + 4 : place + 6], 'big')}H", header, place + 6)
        kinds = dict(zip(types[::3], types[1::3]))
        alpha = {1: _UNASSOCIATED, 2: _ASSOCIATED}.get(kinds.get(channels - 1))
    place = header.find(b"colr")
    if place > 0 and header[place + 4] == 1:
        color_space = int.from_bytes(header[place + 7 : place + 11], "big")
    has_alpha_or_none = channels in (1, 3) or (channels in (2, 4) and alpha is not None)
    is_pillows = bits <= 8 and not is_signed and has_alpha_or_none
    return _JPEG2000((channels, bottom - top, right - left), dtype, alpha, color_space, is_pillows)


def _open_jpeg2000(content: bytes, image: EncodedImage) -> _Opened:
    from imagecodecs import jpeg2k_decode

    parsed = _parse_jpeg2000(content)
    if parsed.color_space not in (0, 16, 17):  # sRGB and gray
        raise BrokenImageError(
            image.name, "other colors", "stores colors that are neither gray nor RGB. Convert it to gray or RGB"
        )

    def read() -> np.ndarray:
        pixels = jpeg2k_decode(content)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    return _Opened(parsed.shape, parsed.dtype, read, parsed.alpha)


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
