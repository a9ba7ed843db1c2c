"""Image files that Pillow would reduce: TIFF by tifffile, PNG and JPEG 2000 by imagecodecs, .npy and .npz by NumPy."""

import io
import logging
import math
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags

from modeling_dino.image_processing_dino import has_channels_last

from .pillow_files import BrokenImageError, is_srgb, notes_of, open_any_size


TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG_2000_STARTS = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha in the TIFF tag ExtraSamples
_TURNS = {  # of the orientations of TIFF and EXIF: what to do to (..., height, width)
    2: lambda pixels: pixels[..., ::-1],
    3: lambda pixels: pixels[..., ::-1, ::-1],
    4: lambda pixels: pixels[..., ::-1, :],
    5: lambda pixels: pixels.swapaxes(-1, -2),
    6: lambda pixels: pixels[..., ::-1, :].swapaxes(-1, -2),
    7: lambda pixels: pixels[..., ::-1, ::-1].swapaxes(-1, -2),
    8: lambda pixels: pixels[..., ::-1].swapaxes(-1, -2),
}


class Wanted(NamedTuple):
    """What readers need to know of an image."""

    name: str  # of the file
    page: int | None  # of a TIFF, by `tiff_pages` images
    num_channels: int  # that the model takes
    tiff_pages: str | None  # see `decoding.Reading`


class Opened(NamedTuple):
    """A scientific image whose header has been read."""

    shape: tuple[int, int, int]  # (channels, height, width)
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # the pixels of that shape
    alpha: int | None = None  # kind of the last channel: ASSOCIATED, UNASSOCIATED, or None if it is not alpha
    notes: tuple[str, ...] = ()


def needs_scientific(name: str, module: str) -> BrokenImageError:
    return BrokenImageError(
        name, "needs scientific", f"needs {module}. Install it with pip install 'dino-hf[scientific]'"
    )


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


def plain(array: np.ndarray) -> np.ndarray:
    """Values in the type that `_plain_dtype` says; booleans become 0 and 255."""
    dtype = _plain_dtype(array.dtype)
    return array.astype(np.uint8) * np.uint8(255) if array.dtype == bool else array.astype(dtype, copy=False)


def _open_array(content: bytes, wanted: Wanted) -> Opened:
    """The array of an .npy file, or the only one of an .npz file. Nothing is allocated before its size is checked.

    Raises:
        ValueError: pickled objects, several arrays, a size that the header does not tell truly, or no image.
    """
    if not content.startswith(b"PK"):
        return _of_array(io.BytesIO(content), len(content), wanted)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) != 1 or not members[0].filename.endswith(".npy"):
            names = ", ".join(member.filename.removesuffix(".npy") for member in members[:3])
            raise ValueError(f"an .npz must hold one array, got {len(members)} ({names}). Save one image in each")
        with archive.open(members[0]) as member:
            opened = _of_array(member, members[0].file_size, wanted)

    def read() -> np.ndarray:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(members[0]) as member:
            return _of_array(member, members[0].file_size, wanted).read()

    return opened._replace(read=read)


def _of_array(file, size: int, wanted: Wanted) -> Opened:
    """An .npy file of `size` bytes; `file` must stay open until it is read."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3 is for names of fields
        raise ValueError(f"an .npy of version {version} is not an image")
    is_first = version == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    read_as = _plain_dtype(dtype)
    if len(shape) < 2 or not all(side > 0 for side in shape):
        raise ValueError(f"an array of the shape {shape} is not an image")
    num_bytes = math.prod(shape) * dtype.itemsize
    if size - file.tell() < num_bytes:
        raise ValueError(f"an array of {num_bytes} bytes, of which {size - file.tell()} are there")
    num_channels = wanted.num_channels
    is_last = has_channels_last(shape, num_channels)
    if len(shape) == 3 and not is_last and shape[0] not in (1, num_channels):
        is_last = shape[-1] < shape[0]  # for the message
    channels, height, width = (
        (shape[2], *shape[:2]) if is_last else (math.prod(shape[:-2]), *shape[-2:])
    )  # of (height, width): one

    def read() -> np.ndarray:
        array = np.frombuffer(file.read(num_bytes), dtype)
        array = plain(array.reshape(shape, order="F" if is_fortran else "C"))
        array = array.transpose(2, 0, 1) if is_last else array.reshape(channels, height, width)
        return np.ascontiguousarray(array)

    return Opened((channels, height, width), read_as, read)


def scientific_reader(content: bytes) -> Callable[[bytes, Wanted], Opened] | None:
    """What reads an image in full where Pillow would not; None if Pillow does."""
    if content.startswith((b"\x93NUMPY", b"PK\3\4")):
        return _open_array
    if content.startswith(TIFF_STARTS):
        return None if _is_pillows(io.BytesIO(content)) else open_tiff
    if content.startswith(b"\x89PNG") and content[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
        return _open_deep_png
    if content.startswith(_JPEG_2000_STARTS) and not _parse_jpeg2000(content).is_pillows:
        return _open_jpeg2000
    return None


def is_stack(image: dict) -> bool:
    """Return whether an image is a TIFF file that tifffile reads, by its path."""
    if image["bytes"] is not None or not image["path"].lower().endswith((".tif", ".tiff")):
        return False
    try:
        with open(image["path"], "rb") as file:
            return file.read(4) in TIFF_STARTS and not _is_pillows(file)
    except OSError:
        return False


def _is_pillows(file: BinaryIO) -> bool:
    """Return whether Pillow reads all of a TIFF: one page of at most 8 bits a channel, gray, color or with alpha."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file.seek(0)
            file = open_any_size(file, ("TIFF",))
            tags, num_pages = file.tag_v2, file.n_frames
        except Exception:  # of a TIFF that is damaged or unknown to Pillow
            return False
    bits, num_samples, extra = tags.get(258, (1,)), tags.get(277, 1), tags.get(338, ())
    signed = any(kind != 1 for kind in np.atleast_1d(tags.get(339, (1,))))
    num_extra = len(extra) if isinstance(extra, tuple) else 1
    is_color = num_samples - num_extra in (1, 3) or (num_samples == 4 and file.mode == "CMYK")
    has_alpha = not num_extra or tuple(np.atleast_1d(extra)) in ((ASSOCIATED,), (UNASSOCIATED,))
    is_plain = max(np.atleast_1d(bits)) <= 8 and not signed and file.mode[0] not in "IF"
    is_known = file.info.get("compression") != "webp"  # for which libtiff is seldom built
    return num_pages == 1 and is_plain and is_color and has_alpha and is_known


def open_tiff(source: bytes | str, wanted: Wanted) -> Opened:
    """A TIFF, by its content or path. A path is opened again when pixels are read, and then only the pages wanted."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # of errors that are raised as well
    file = tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    try:
        opened = _open_series(file, wanted)
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


def _open_series(file, wanted: Wanted) -> Opened:
    """The images of a tifffile.TiffFile as one image, or the page of them that is wanted."""
    series = _image_series(file)
    if not series:
        raise ValueError("a TIFF without pages")
    num_pages = [_pages_of(part) for part in series]
    choice, total = wanted.tiff_pages, sum(num_pages)
    if total > 1 and (choice is None or (choice == "images" and wanted.page is None)):
        advice = (
            "and --tiff_pages images is for folders of files"
            if choice
            else "Give --tiff_pages " + ("channels, images or first")
        )
        raise BrokenImageError(wanted.name, "several pages", f"has {total} pages{', ' if choice else '. '}{advice}")
    page = None  # of the series; all pages are channels
    if total > 1 and choice != "channels":
        page = wanted.page if choice == "images" else 0
        part = next(number for number, end in enumerate(np.cumsum(num_pages)) if page < end)
        page -= sum(num_pages[:part])
        series = [series[part]]
    first, key = series[0], series[0].keyframe
    if len({(part.shape, part.dtype, part.axes, part.keyframe.photometric) for part in series}) > 1:
        raise BrokenImageError(
            wanted.name, "unlike pages", f"has {len(series)} images of unlike sizes or types. Split the file"
        )
    if not {"Y", "X"} <= set(first.axes):
        raise ValueError(f"axes {first.axes}, without height and width")
    _check_colors(key, wanted.name)
    if any(part is None for one in series for part in one.pages):
        raise ValueError("planes are missing, or are in other files")
    sizes = dict(zip(first.axes, first.shape))
    channels = sizes.get("C", 1) * sizes.get("S", 1) * (total if page is None else 1)
    extra = int(key.extrasamples[-1]) if key.extrasamples else 0
    alpha = extra if channels == sizes.get("S") and extra in (ASSOCIATED, UNASSOCIATED) else None
    orientation = int(key.tags[274].value) if 274 in key.tags else 1

    def read() -> np.ndarray:
        if page is not None and len(first.pages) == _pages_of(first):  # only the one is read
            planes = _planes(first.pages[page].asarray(), key.axes)
        elif page is not None:
            planes = _planes(first.asarray(), first.axes)[page]
        else:
            planes = np.concatenate([_planes(part.asarray(), part.axes) for part in series])
        pixels = _full_range(plain(planes.reshape(-1, *planes.shape[-2:])), key)
        return _TURNS.get(orientation, lambda same: same)(pixels)

    height, width = (sizes["X"], sizes["Y"]) if orientation in (5, 6, 7, 8) else (sizes["Y"], sizes["X"])
    notes = []
    if 34675 in key.tags and not is_srgb(bytes(key.tags[34675].value), "RGB" if channels > 2 else "L"):
        notes.append("color profile ignored")
    if choice == "first" and total > 1:
        notes.append("pages after the first ignored")
    if any(part.keyframe.is_mask for part in file.series):
        notes.append("mask ignored")
    return Opened((channels, height, width), _plain_dtype(first.dtype), read, alpha, tuple(notes))


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


def _open_deep_png(content: bytes, wanted: Wanted) -> Opened:
    """A PNG of 16 bits in color or with alpha; one of its colors may be transparent."""
    from imagecodecs import png_decode

    file = open_any_size(io.BytesIO(content), ("PNG",))
    orientation = file.getexif().get(ExifTags.Base.Orientation) if "exif" in file.info else None
    (width, height), kind = file.size, content[25]
    has_alpha = kind != 2 or "transparency" in file.info
    channels = 2 if kind == 4 else 3 + has_alpha
    height, width = (width, height) if orientation in (5, 6, 7, 8) else (height, width)

    def read() -> np.ndarray:
        return _TURNS.get(orientation, lambda same: same)(png_decode(content).transpose(2, 0, 1))

    shape, alpha = (channels, height, width), UNASSOCIATED if has_alpha else None
    return Opened(shape, np.dtype(np.uint16), read, alpha, notes_of(file, content))


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
        alpha = {1: UNASSOCIATED, 2: ASSOCIATED}.get(kinds.get(channels - 1))
    place = header.find(b"colr")
    if place > 0 and header[place + 4] == 1:
        color_space = int.from_bytes(header[place + 7 : place + 11], "big")
    has_alpha_or_none = channels in (1, 3) or (channels in (2, 4) and alpha is not None)
    is_pillows = bits <= 8 and not is_signed and has_alpha_or_none
    return _JPEG2000((channels, bottom - top, right - left), dtype, alpha, color_space, is_pillows)


def _open_jpeg2000(content: bytes, wanted: Wanted) -> Opened:
    from imagecodecs import jpeg2k_decode

    parsed = _parse_jpeg2000(content)
    if parsed.color_space not in (0, 16, 17):  # sRGB and gray
        raise BrokenImageError(
            wanted.name, "other colors", "stores colors that are neither gray nor RGB. Convert it to gray or RGB"
        )

    def read() -> np.ndarray:
        pixels = jpeg2k_decode(content)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    return Opened(parsed.shape, parsed.dtype, read, parsed.alpha)
