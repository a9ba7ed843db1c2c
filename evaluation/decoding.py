"""Image files -> pixels, every bit and band of them: `EncodedImage` is the one way to get them.

Pillow reads what it reads in full: at most 8 bits a channel, or one channel of more. TIFFs of other kinds are
tifffile's, PNG and JPEG 2000 in color of 16 bits imagecodecs' (both in the extra `scientific`), .npy and .npz NumPy's.
What a reader would reduce is not read (`BrokenImageError`), or is in `EncodedImage.notes`.
"""

import hashlib
import io
import logging
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Features
from datasets.features import Array2D, Array3D
from PIL import ExifTags, ImageColor, ImageOps, UnidentifiedImageError
from PIL import Image as PillowImage

from modeling_dino.command_line import one_line, printable
from modeling_dino.image_processing_dino import PILLOW_MODES, to_channels_first


with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

PillowImage.init()  # all of its readers
_NOT_DECODED = {"MPEG", "HDF5", "GRIB", "BUFR", "WMF"}  # formats that Pillow only identifies
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
_ALPHA = (1, 2)  # of the TIFF tag ExtraSamples: associated and unassociated
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
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"background must be the name of a color or #rrggbb, got {self.background}. Use white or black."
            ) from None
        if self.tiff_pages not in (None, *TIFF_PAGES):
            raise ValueError(f"tiff_pages must be channels, images or first, got {self.tiff_pages}")
        if self.max_image_pixels < 1:
            raise ValueError(f"max_image_pixels must be at least 1, got {self.max_image_pixels}")


class BrokenImageError(ValueError):
    """An image that cannot be decoded faithfully. `kind` is one of a few words, the message names the image.

    A data loader raises an error of a worker again with its message as the only argument.
    """

    def __init__(self, name: str, kind: str = "", reason: str = ""):
        super().__init__(f"image {printable(name)} {reason}" if kind else name)
        self.name, self.kind, self.reason = name, kind, reason

    def __reduce__(self):
        return BrokenImageError, (self.name, self.kind, self.reason)


def pixel_hash(pixels: np.ndarray) -> int:
    """64 bits, signed, that are equal for images of equal pixels, whatever files they come from."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little", signed=True)


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
            array = np.asarray(image, dtype=reading.array_dtype)
            self._from_array(to_channels_first(array, reading.num_channels))
            return
        self.name = image_name(image) or self.name
        self.page = image.get("page")
        with self._named_errors():
            content = image_content(image)
            if content.startswith(b"\x93NUMPY") or (image["path"] or "").lower().endswith(".npz"):
                self._from_array(self._fit(_read_array(content)))
            elif (of_scientists := _scientific_reader(content)) is not None:
                self._open_scientific(of_scientists, content)
            else:
                self._open_pillow(content)
            if self.height * self.width > reading.max_image_pixels:
                raise BrokenImageError(
                    self.name,
                    "too large",
                    f"has {self.width} x {self.height} pixels, more than max_image_pixels = "
                    f"{reading.max_image_pixels}. Give --max_image_pixels {self.height * self.width} if you trust it",
                )

    def _from_array(self, pixels: np.ndarray) -> None:
        self.dtype, (self.height, self.width) = pixels.dtype, pixels.shape[1:]
        self._decode = lambda reduction: np.ascontiguousarray(pixels)

    def _open_pillow(self, content: bytes) -> None:
        with _any_size():
            file = PillowImage.open(io.BytesIO(content))
        reading, num_channels = self.reading, self.reading.num_channels
        self.is_jpeg = file.format == "JPEG"
        is_on_its_side = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        self.width, self.height = file.size[::-1] if is_on_its_side else file.size
        self.notes = _notes(file, content)
        is_deep = file.mode[0] in "IF"
        if is_deep:
            is_16_bit = file.mode.startswith("I;16") or file.format in ("PNG", "PPM")  # older Pillows widen these
            self.dtype = np.dtype(np.float32 if file.mode == "F" else np.uint16 if is_16_bit else np.int32)
            self._check_channels(1)
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
                    return self._fit(np.array(file).astype(self.dtype)[None])
                pixels = np.array(_convert(file, mode, reading.background))
            return pixels.reshape(*pixels.shape[:2], num_channels).transpose(2, 0, 1)

        self._decode = decode

    def _open_scientific(self, reader: Callable, content: bytes) -> None:
        """`reader` gives the shape (channels, height, width), dtype, and a function that reads."""
        try:
            (channels, self.height, self.width), self.dtype, has_alpha, read = reader(content, self)
        except ImportError as error:
            raise BrokenImageError(
                self.name, "needs scientific", f"needs {error.name}. Install it by pip install 'dino-hf[scientific]'"
            ) from error
        if not has_alpha or self.reading.num_channels != channels - 1:
            self._check_channels(channels)
        self.decoder_bytes = 2 * channels * self.dtype.itemsize
        self._decode = lambda reduction: self._fit(read(), has_alpha)

    def _fit(self, pixels: np.ndarray, has_alpha: bool = False) -> np.ndarray:
        """Pixels of any number of channels -> those that the model takes, if it can be without a loss."""
        num_channels = self.reading.num_channels
        if has_alpha and len(pixels) == num_channels + 1:
            return _on_background(pixels, self.reading.background)
        try:
            return np.ascontiguousarray(to_channels_first(pixels, num_channels))
        except ValueError:
            raise self._other_channels(len(pixels) if pixels.ndim == 3 else pixels.shape) from None

    def _check_channels(self, channels: int) -> None:
        if channels != self.reading.num_channels and (channels, self.reading.num_channels) != (1, 3):
            raise self._other_channels(channels)

    def _other_channels(self, channels) -> BrokenImageError:
        advice = f". Train with --config_overrides num_channels={channels}" if isinstance(channels, int) else ""
        return BrokenImageError(
            self.name,
            "other channels",
            f"has {channels} channels, and the model takes {self.reading.num_channels}{advice}",
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
        """Context manager in which what readers raise becomes a `BrokenImageError`."""
        try:
            yield
        except BrokenImageError:
            raise
        except UnidentifiedImageError as error:
            raise BrokenImageError(self.name, "no image", "cannot be decoded: no image file") from error
        except PillowImage.DecompressionBombError as error:
            raise BrokenImageError(self.name, "too large", f"is too large: {error}") from error
        except (
            *(OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, MemoryError),
            *(struct.error, zlib.error, zipfile.BadZipFile, RuntimeError),
        ) as error:
            raise BrokenImageError(self.name, "damaged", f"cannot be decoded: {one_line(error)}") from error


@contextmanager
def _any_size() -> Iterator[None]:
    """Context manager in which Pillow opens images of any size; their limit is `max_image_pixels`."""
    limit, PillowImage.MAX_IMAGE_PIXELS = PillowImage.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        PillowImage.MAX_IMAGE_PIXELS = limit


def _convert(file: PillowImage.Image, mode: str, background: str) -> PillowImage.Image:
    """An image in the mode of the model; a transparent one put on the background, unless the mode has alpha."""
    if mode != "RGBA" and file.has_transparency_data:
        canvas = PillowImage.new("RGBA", file.size, background)
        canvas.alpha_composite(file.convert("RGBA"))
        file = canvas.convert("RGB")
    return file if file.mode == mode else file.convert(mode)


def _on_background(pixels: np.ndarray, background: str) -> np.ndarray:
    """Pixels (channels + 1, height, width), of which the last channel is alpha, put on a color."""
    highest = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1
    color = np.array(ImageColor.getrgb(background)[:3])
    color = color if len(pixels) == 4 else np.resize(color.mean(), len(pixels) - 1)
    alpha = pixels[-1:] / highest
    mixed = alpha * pixels[:-1] + (1 - alpha) * (color[:, None, None] / 255 * highest)
    return mixed.round().astype(pixels.dtype) if pixels.dtype.kind in "ui" else mixed.astype(pixels.dtype)


def _notes(file: PillowImage.Image, content: bytes) -> tuple[str, ...]:
    """What of a file Pillow does not put into the pixels."""
    notes = []
    profile = file.info.get("icc_profile") or b""
    if profile and b"sRGB" not in profile and b"s\0R\0G\0B" not in profile and file.mode not in ("L", "LA", "1"):
        notes.append("color profile ignored")
    if file.format in ("GIF", "PNG", "WEBP", "MPO", "AVIF", "HEIF") and getattr(file, "is_animated", False):
        notes.append("frames after the first ignored")
    place = content[:4096].find(b"av1C") if file.format == "AVIF" else -1
    if place > 0 and content[place + 6] & 0x40:  # high_bitdepth
        notes.append("more than 8 bits reduced to 8")
    place = content[:65536].find(b"hvcC") if file.format == "HEIF" else -1
    if place > 0 and content[place + 21] & 7:  # bitDepthLumaMinus8
        notes.append("more than 8 bits reduced to 8")
    return tuple(notes)


def _read_array(content: bytes) -> np.ndarray:
    """The array of an .npy file, or the only one of an .npz file.

    Raises:
        ValueError: pickled objects, several arrays, or values that are not numbers.
    """
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(array, np.lib.npyio.NpzFile):
        if len(array.files) != 1:
            raise ValueError(f"an .npz of {len(array.files)} arrays ({', '.join(array.files[:3])}); one is an image")
        array = array[array.files[0]]
    return _plain(array)


def _plain(array: np.ndarray) -> np.ndarray:
    """Numbers in the byte order of the machine; booleans are 0 and 255, half precision becomes single."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif" or not array.size or array.ndim < 2:
        raise ValueError(f"an array of {array.dtype} and the shape {array.shape} is not an image")
    return array.astype(np.float32 if array.dtype == np.float16 else array.dtype.newbyteorder("="))


def _scientific_reader(content: bytes) -> Callable | None:
    """What reads an image in full where Pillow would not; None if Pillow does."""
    if content.startswith(_TIFF_STARTS):
        return None if _is_pillows(content) else _open_tiff
    if content.startswith(b"\x89PNG") and content[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return _open_deep_png
    start = content[:4096].find(b"\xff\x4f\xff\x51")  # the codestream of JPEG 2000
    if start >= 0 and len(content) > start + 42:
        num_channels = int.from_bytes(content[start + 40 : start + 42], "big")
        if (content[start + 42] & 0x7F) + 1 > 8 and num_channels > 1:
            return _open_deep_jpeg2000
    if content[:2] == b"P6":
        with _any_size(), suppress(Exception):
            if int(content[:512].split()[3]) > 255:
                return _refuse_deep_ppm
    return None


def _is_pillows(content: bytes) -> bool:
    """Return whether Pillow reads all of a TIFF: one page of at most 8 bits a channel, gray, color or with alpha."""
    with warnings.catch_warnings(), _any_size():
        warnings.simplefilter("ignore")
        try:
            file = PillowImage.open(io.BytesIO(content), formats=["TIFF"])
            tags, num_pages = file.tag_v2, file.n_frames
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
            return False
    bits, num_samples, extra = tags.get(258, (1,)), tags.get(277, 1), tags.get(338, ())
    signed = any(kind != 1 for kind in tags.get(339, (1,)))
    num_extra = len(extra) if isinstance(extra, tuple) else 1
    is_color = num_samples - num_extra in (1, 3) or (num_samples == 4 and file.mode == "CMYK")
    has_alpha = not num_extra or tuple(np.atleast_1d(extra)) in ((1,), (2,))
    return num_pages == 1 and max(bits) <= 8 and not signed and is_color and has_alpha and file.mode[0] not in "IF"


def _open_tiff(content: bytes, image: EncodedImage) -> tuple:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of errors that are raised as well
    file = tifffile.TiffFile(io.BytesIO(content))
    if not file.pages:
        raise ValueError("a TIFF without pages")
    series = [part for part in file.series if not part.keyframe.is_reduced] or file.series[:1]
    first, key = series[0], series[0].keyframe
    if len({(part.shape, part.dtype) for part in series}) > 1:
        raise BrokenImageError(
            image.name, "unlike pages", f"has {len(series)} images of unlike sizes or types. Split the file"
        )
    axes = first.axes
    if not {"Y", "X"} <= set(axes):
        raise ValueError(f"axes {axes}, without height and width")
    if key.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise BrokenImageError(image.name, "palette", "has a palette of 16 bits. Convert it to gray or color")
    sizes = dict(zip(axes, first.shape))
    channels = sizes.get("C", 1) * sizes.get("S", 1)
    num_pages = len(series) * math.prod(size for axis, size in sizes.items() if axis not in "CSYX")
    choice = image.reading.tiff_pages
    if num_pages > 1 and choice is None:
        raise BrokenImageError(
            image.name, "several pages", f"has {num_pages} pages. Give --tiff_pages channels, images or first"
        )
    page = {"first": 0, "images": image.page}.get(choice)
    if num_pages > 1 and choice == "images" and page is None:
        raise BrokenImageError(
            image.name, "several pages", f"has {num_pages} pages, and --tiff_pages images is for folders of files"
        )
    if num_pages > 1 and choice == "channels":
        channels *= num_pages
    has_alpha = channels == sizes.get("S") and any(extra in _ALPHA for extra in key.extrasamples)

    def read() -> np.ndarray:
        pages_each = num_pages // len(series)
        wanted = series if page is None else [series[page // pages_each]]
        arrays = []
        for part in wanted:
            if page is not None and pages_each > 1 and len(part.pages) == pages_each:  # only the one is read
                array, axes_left = part.pages[page % pages_each].asarray(), part.pages[page % pages_each].axes
            else:
                array, axes_left = part.asarray(), axes
            arrays.append(_planes(array, axes_left))
        planes = np.concatenate(arrays)  # (pages, channels, height, width)
        if page is not None and len(planes) > 1:
            planes = planes[page % pages_each][None]
        pixels = _plain(planes.reshape(-1, *planes.shape[-2:]))
        if key.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u":
            pixels = np.iinfo(pixels.dtype).max - pixels
        return _TURNS.get(orientation, lambda same: same)(pixels)

    orientation = int(key.tags[274].value) if 274 in key.tags else 1
    height, width = (sizes["X"], sizes["Y"]) if orientation in (5, 6, 7, 8) else (sizes["Y"], sizes["X"])
    dtype = _plain(np.zeros((1, 1), first.dtype)).dtype
    return (channels, height, width), dtype, has_alpha, read


def count_pages(content_or_path: bytes | str) -> int:
    """Pages of a TIFF that are images of their own by `tiff_pages` images; 1 of anything that tifffile cannot open."""
    import tifffile

    source = io.BytesIO(content_or_path) if isinstance(content_or_path, bytes) else content_or_path
    try:
        with tifffile.TiffFile(source) as file:
            series = [part for part in file.series if not part.keyframe.is_reduced] or file.series[:1]
            return sum(
                math.prod(size for axis, size in zip(part.axes, part.shape) if axis not in "CSYX") for part in series
            )
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, KeyError, struct.error):
        return 1


def _planes(array: np.ndarray, axes: str) -> np.ndarray:
    """An array with the axes that tifffile names -> (pages, channels, height, width)."""
    others = [axis for axis in axes if axis not in "CSYX"]
    order = [*others, *(axis for axis in "CSYX" if axis in axes)]
    array = array.transpose([axes.index(axis) for axis in order])
    num_channels = math.prod(array.shape[len(others) : -2])
    return array.reshape(-1, num_channels, *array.shape[-2:])


def _open_deep_png(content: bytes, image: EncodedImage) -> tuple:
    from imagecodecs import png_decode

    width, height = struct.unpack(">II", content[16:24])
    channels = {2: 3, 4: 2, 6: 4}[content[25]]
    return _of_codec(png_decode, content, channels, height, width)


def _open_deep_jpeg2000(content: bytes, image: EncodedImage) -> tuple:
    from imagecodecs import jpeg2k_decode

    start = content.find(b"\xff\x4f\xff\x51") + 8  # (width, height) and their offsets
    right, bottom, left, top = struct.unpack(">IIII", content[start : start + 16])
    channels = int.from_bytes(content[start + 32 : start + 34], "big")
    return _of_codec(jpeg2k_decode, content, channels, bottom - top, right - left)


def _of_codec(decode: Callable, content: bytes, channels: int, height: int, width: int) -> tuple:
    def read() -> np.ndarray:
        return _plain(decode(content)).transpose(2, 0, 1)

    return (channels, height, width), np.dtype(np.uint16), channels in (2, 4), read


def _refuse_deep_ppm(content: bytes, image: EncodedImage) -> tuple:
    raise BrokenImageError(
        image.name, "16 bits", "has 16 bits a channel, of which Pillow reads 8. Convert it to PNG or TIFF"
    )


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
