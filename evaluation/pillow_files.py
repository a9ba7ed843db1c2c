"""Image files that Pillow reads: of any size, with what it leaves out of the pixels by name."""

import io
import math
import struct
from contextlib import suppress
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from modeling_dino.command_line import one_line, printable


with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

PillowImage.init()  # all of its readers
# formats that Pillow only identifies, and PostScript, which is a program that Ghostscript runs
_NOT_DECODED = {"MPEG", "HDF5", "GRIB", "BUFR", "WMF", "EPS"}
PILLOW_SUFFIXES = tuple(
    suffix
    for suffix, kind in PillowImage.registered_extensions().items()
    if kind in PillowImage.OPEN and kind not in _NOT_DECODED
)
_SRGB_TOLERANCE = 10  # of 255: colors that differ less are taken for sRGB's; Gray Gamma 2.2 differs by 9


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


def open_any_size(file: BinaryIO, formats: tuple[str, ...] = ()) -> PillowImage.Image:
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


def convert(file: PillowImage.Image, mode: str, background: str) -> PillowImage.Image:
    """An image in the mode of the model; a transparent one put on the background, unless the mode has alpha."""
    if file.mode == "La":  # premultiplied, which Pillow converts to nothing else
        file = file.convert("LA")
    if mode != "RGBA" and file.has_transparency_data:
        canvas = PillowImage.new("RGBA", file.size, background)
        canvas.alpha_composite(file.convert("RGBA"))
        file = canvas.convert("RGB")
    return file if file.mode == mode else file.convert(mode)


def refuse_reduced(file: PillowImage.Image, content: bytes, name: str) -> None:
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


def notes_of(file: PillowImage.Image, content: bytes) -> tuple[str, ...]:
    """What of a file Pillow does not put into the pixels."""
    notes, sizes = [], file.info.get("sizes") or ()
    profile, mode = file.info.get("icc_profile"), file.mode
    if mode in ("CMYK", "LAB"):
        notes.append(f"{'CIELAB' if mode == 'LAB' else mode} converted without a color profile")
    elif not is_srgb(profile, mode) or (not profile and _has_other_colors(file, content)):
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
def is_srgb(profile: bytes | None, mode: str) -> bool:
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
