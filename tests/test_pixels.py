"""Every bit, band and page of images, against the arrays that other libraries wrote into the files."""

import io
import json
import pickle
import struct
import sys
import threading
import zipfile
import zlib

import imagecodecs
import numpy as np
import pandas as pd
import pillow_heif
import pytest
import tifffile
import torch
from datasets import Array2D, Array3D, Dataset, Features
from PIL import Image, ImageCms
from transformers import ViTImageProcessorPil

from evaluation import decoding
from evaluation.decoding import (
    BrokenImageError,
    EncodedImage,
    Reading,
    decode_8_bits,
    decode_image,
    pixel_hash,
)
from evaluation.images import load_images
from evaluation.models import to_pixel_values
from evaluation.scientific_files import count_pages
from modeling_dino.image_processing_dino import DINOImageProcessor, make_image_processor, scale_values
from training.augmentation import AugmentationArguments, MultiCrop
from training.check import check_from_command_line

from .commands import command, trained
from .test_training import recipe  # noqa: F401
from .without_package import run_without_package


HEIGHT, WIDTH = 20, 28
HUGE = 200_000  # a side, whose square no machine here holds in memory


def noise(*shape: int, dtype="uint16") -> np.ndarray:
    """Values over the whole range of an integer type, or around 0."""
    rng = np.random.default_rng(sum(shape))
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1000, shape).astype(dtype)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    ends = np.iinfo(dtype)
    return rng.integers(ends.min, ends.max, shape, dtype=dtype, endpoint=True)


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(*shape: int) -> Image.Image:
    return Image.fromarray(noise(*shape, dtype="uint8"))


def deep_png(array: np.ndarray, transparent: np.ndarray | None = None) -> bytes:
    """A PNG of 16 bits from its specification; `array` is (height, width, channels)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    color = b"" if transparent is None else chunk(b"tRNS", np.asarray(transparent, ">u2").tobytes())
    content = chunk(b"IHDR", header) + color + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def encoded(content: bytes, num_channels: int, page: int | None = None, **options) -> EncodedImage:
    return EncodedImage({"bytes": content, "path": "image", "page": page}, Reading(num_channels, **options))


def assert_reads(content: bytes, expected: np.ndarray, **options) -> None:
    """The pixels are those of an array (channels, height, width), and the header says so beforehand."""
    image = encoded(content, len(expected), **options)
    assert (image.height, image.width, image.dtype) == (*expected.shape[1:], expected.dtype)
    pixels = image.decode()
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)


def fault(content: bytes, num_channels: int = 3, **options) -> BrokenImageError:
    with pytest.raises(BrokenImageError) as error:
        encoded(content, num_channels, **options).decode()
    assert len(str(error.value).splitlines()) == 1
    return error.value


# TIFF


COMPRESSIONS = ("lzw", "deflate", "zstd", "packbits", "lzma", "jpeg2000", "png")


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_tiff_keeps_all_values(compression, dtype):
    array = noise(HEIGHT, WIDTH, 3, dtype=dtype)
    content = tiff(array, photometric="rgb", compression=compression)
    assert_reads(content, array.transpose(2, 0, 1))


@pytest.mark.parametrize("compression", ["jpeg", "webp"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_lossy_tiff_is_what_tifffile_reads(compression, planar):
    if (compression, planar) == ("webp", "separate"):
        pytest.skip("WebP is only in color")
    shape = (64, 64, 3) if planar == "contig" else (3, 64, 64)
    content = tiff(noise(*shape, dtype="uint8"), photometric="rgb", planarconfig=planar, compression=compression)
    expected = tifffile.imread(io.BytesIO(content))
    assert_reads(content, expected.transpose(2, 0, 1) if planar == "contig" else expected)


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"byteorder": ">", "bigtiff": True, "tile": (16, 16), "compression": "deflate", "predictor": True},
        {"rowsperstrip": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_layouts_keep_all_values(options, dtype):
    array = noise(HEIGHT, WIDTH, 3, dtype=dtype)
    assert_reads(tiff(array, photometric="rgb", **options), array.transpose(2, 0, 1))
    separate = tiff(array.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", **options)
    assert_reads(separate, array.transpose(2, 0, 1))


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]


def as_read(array: np.ndarray) -> np.ndarray:
    """Half precision is read as single, booleans as black and white; everything else as it is."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    return array.astype(np.float32) if array.dtype == np.float16 else array


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_every_type_of_number_is_read(dtype):
    array = noise(HEIGHT, WIDTH, dtype=dtype)
    expected = as_read(array)[None]
    assert_reads(tiff(array, photometric="minisblack"), expected)
    assert_reads(npy(array), expected)
    assert_reads(npy(array.astype(array.dtype.newbyteorder(">"))), expected)
    assert_reads(npy(np.asfortranarray(array)), expected)
    assert_reads(npz(image=array), expected)
    np.testing.assert_array_equal(encoded(npy(array), 3).decode(), np.repeat(expected, 3, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("num_channels", [2, 4, 5, 13])
def test_bands_of_a_tiff_are_channels(num_channels, dtype):
    array = noise(num_channels, HEIGHT, WIDTH, dtype=dtype)
    assert_reads(tiff(array, photometric="minisblack", planarconfig="separate"), array)
    assert_reads(tiff(array.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"), array)
    error = fault(npy(array), num_channels + 1)
    assert error.kind == "other channels" and error.number == num_channels
    assert f"num_channels={num_channels}" in str(error)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_near_infrared_is_kept_or_refused(dtype):
    array = noise(HEIGHT, WIDTH, 4, dtype=dtype)
    content = tiff(array, photometric="rgb", extrasamples=[0])
    assert_reads(content, array.transpose(2, 0, 1))
    assert fault(content, 3).number == 4


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero_is_inverted(photometric, dtype):
    array = noise(HEIGHT, WIDTH, dtype=dtype)
    expected = np.iinfo(dtype).max - array if photometric == "miniswhite" else array
    assert_reads(tiff(array, photometric=photometric), expected[None])


@pytest.mark.parametrize("compression", [None, "group3", "group4", "tiff_ccitt"])
def test_bilevel_tiff_is_black_and_white(compression):
    image = picture(HEIGHT, WIDTH).convert("1")
    options = {"compression": compression} if compression else {}
    assert_reads(saved(image, "tiff", **options), np.array(image.convert("L"))[None])


def test_orientation_of_a_scientific_tiff_is_applied():
    array = noise(5, HEIGHT, WIDTH)
    content = tiff(array, photometric="minisblack", planarconfig="separate", extratags=[(274, 3, 1, 6, True)])
    assert_reads(content, np.rot90(array, -1, (1, 2)))


@pytest.mark.parametrize(
    ("photometric", "shape", "dtype"),
    [
        ("cielab", (HEIGHT, WIDTH, 3), "uint16"),
        ("icclab", (HEIGHT, WIDTH, 3), "uint8"),
        ("separated", (HEIGHT, WIDTH, 4), "uint16"),
        ("palette", (HEIGHT, WIDTH), "uint16"),
        ("cfa", (HEIGHT, WIDTH), "uint16"),
    ],
)
def test_tiff_of_other_colors_is_refused(photometric, shape, dtype):
    options = {"colormap": noise(3, 65536)} if photometric == "palette" else {}
    content = tiff(noise(*shape, dtype=dtype), photometric=photometric, **options)
    for num_channels in (1, 3, 4):
        assert fault(content, num_channels).kind == "other colors"


def test_palette_tiff_is_read_in_color():
    colors, indices = noise(3, 256, dtype="uint8"), noise(HEIGHT, WIDTH, dtype="uint8")
    content = tiff(indices, photometric="palette", colormap=colors.astype(np.uint16) * 257)
    assert_reads(content, colors[:, indices])
    assert encoded(content, 3).notes == ()
    reduced = tiff(indices, photometric="palette", colormap=noise(3, 256))
    assert encoded(reduced, 3).notes == ("palette of 16 bits reduced to 8",)


# pages


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pages_need_a_choice(dtype):
    array = noise(3, HEIGHT, WIDTH, dtype=dtype)
    content = tiff(array, photometric="minisblack")
    error = fault(content)
    assert error.kind == "several pages" and "Give --tiff_pages" in str(error)
    assert_reads(content, array, tiff_pages="channels")
    assert_reads(content, array[:1], tiff_pages="first")
    assert encoded(content, 1, tiff_pages="first").notes == ("pages after the first ignored",)
    assert count_pages(content) == 3
    for page in range(3):
        assert_reads(content, array[page : page + 1], tiff_pages="images", page=page)
    assert fault(content, tiff_pages="images").kind == "several pages"  # of a column of files


@pytest.mark.parametrize("axes", ["CYX", "ZYX", "TCYX", "ZCYX", "CZYX", "TZCYX", "YXS", "ZYXS"])
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_axes_of_ome_and_imagej_are_followed(kind, axes):
    if kind == "imagej" and axes in ("CZYX", "YXS", "ZYXS"):
        pytest.skip("ImageJ knows one order of axes")
    sizes = {"T": 2, "Z": 3, "C": 5, "Y": HEIGHT, "X": WIDTH, "S": 3}
    array = noise(*(sizes[axis] for axis in axes))
    photometric = "rgb" if "S" in axes else "minisblack"
    content = tiff(array, **{kind: True}, metadata={"axes": axes}, photometric=photometric)
    others = [axis for axis in axes if axis in "TZ"]
    order = [axes.index(axis) for axis in (*others, *(axis for axis in "CSYX" if axis in axes))]
    num_pages = int(np.prod([sizes[axis] for axis in others]))
    pages = array.transpose(order).reshape(num_pages, -1, HEIGHT, WIDTH)
    assert count_pages(content) == num_pages
    if num_pages == 1:
        assert_reads(content, pages[0])
        return
    assert fault(content, pages.shape[1]).kind == "several pages"
    assert_reads(content, pages.reshape(-1, HEIGHT, WIDTH), tiff_pages="channels")
    assert_reads(content, pages[0], tiff_pages="first")
    for page in range(num_pages):
        assert_reads(content, pages[page], tiff_pages="images", page=page)


def test_pages_of_unlike_sizes_are_images_of_their_own():
    first, second, file = noise(HEIGHT, WIDTH), noise(WIDTH, 9, 3, dtype="uint8"), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(first, photometric="minisblack")
        writer.write(second, photometric="rgb")
    content = file.getvalue()
    assert fault(content, 4, tiff_pages="channels").kind == "unlike pages"
    assert_reads(content, first[None], tiff_pages="first")
    assert_reads(content, second.transpose(2, 0, 1), tiff_pages="images", page=1)


def test_smaller_copies_of_a_tiff_are_not_pages():
    array, file = noise(5, 64, 64), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        options = {"photometric": "minisblack", "planarconfig": "separate"}
        writer.write(array, **options)
        writer.write(array[:, ::2, ::2], subfiletype=1, **options)
    assert_reads(file.getvalue(), array)


def test_mask_page_is_noted():
    array, file = noise(HEIGHT, WIDTH, 3), io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(array, photometric="rgb", metadata=None)
        writer.write(np.ones((HEIGHT, WIDTH), bool), photometric="mask", subfiletype=4, metadata=None)
    assert_reads(file.getvalue(), array.transpose(2, 0, 1))
    assert encoded(file.getvalue(), 3).notes == ("mask ignored",)


def test_planes_in_other_files_are_refused(tmp_path):
    array = noise(2, 5, HEIGHT, WIDTH)
    content = tiff(array, ome=True, metadata={"axes": "TCYX"}, photometric="minisblack")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        starts = [page.offset for page in file.pages]
    end = content.index(struct.pack("<I", starts[7]))  # the link to the eighth page
    error = fault(content[:end] + bytes(4) + content[end + 4 :], 10, tiff_pages="channels")
    assert error.kind == "damaged"


# transparency


def on_color(array: np.ndarray, color: tuple, is_associated: bool = False) -> np.ndarray:
    """(channels + 1, height, width) on a color, in real numbers."""
    highest = np.iinfo(array.dtype).max
    alpha, background = array[-1] / highest, np.array(color)[:, None, None] / 255 * highest
    return array[:-1] * (1 if is_associated else alpha) + (1 - alpha) * background


@pytest.mark.parametrize(("background", "color"), [("white", (255,) * 3), ("#204060", (32, 64, 96))])
@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "png16", "tiff16"])
def test_transparency_is_put_on_the_background(kind, background, color):
    array = noise(HEIGHT, WIDTH, 4, dtype="uint16" if kind.endswith("16") else "uint8")
    if kind == "png16":
        content = deep_png(array)
    elif kind == "tiff16":
        content = tiff(array, photometric="rgb", extrasamples=["unassalpha"])
    else:
        options = {"lossless": True, "exact": True} if kind == "webp" else {}
        content = saved(Image.fromarray(array), kind, **options)
    array = array.transpose(2, 0, 1)
    assert_reads(content, array)
    pixels = encoded(content, 3, background=background).decode()
    difference = np.abs(pixels - on_color(array, color)).max()
    assert difference <= (0.5 if kind.endswith("16") else 1)  # Pillow's own rounding


@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["png", "png16", "tiff16"])
def test_gray_with_alpha_serves_all_channels(kind, num_channels):
    array = noise(HEIGHT, WIDTH, 2, dtype="uint16" if kind.endswith("16") else "uint8")
    if kind == "png":
        bands = [Image.fromarray(np.ascontiguousarray(array[..., channel])) for channel in range(2)]
        content = saved(Image.merge("LA", bands), "png")
    else:
        options = {"photometric": "minisblack", "extrasamples": ["unassalpha"]}
        content = deep_png(array) if kind == "png16" else tiff(array, **options)
    array, pixels = array.transpose(2, 0, 1), encoded(content, num_channels).decode()
    if num_channels == 4:
        np.testing.assert_array_equal(pixels, array[[0, 0, 0, 1]])
    else:
        assert np.abs(pixels - np.repeat(on_color(array, (255,)), num_channels, 0)).max() <= 1


def test_associated_alpha_is_not_multiplied_twice():
    straight = noise(4, HEIGHT, WIDTH)
    straight[3, :2] = 0
    alpha = straight[3] / 65535
    stored = np.concatenate([(straight[:3] * alpha).round().astype(np.uint16), straight[3:]])
    content = tiff(stored.transpose(1, 2, 0), photometric="rgb", extrasamples=["assocalpha"])
    pixels = encoded(content, 3).decode()
    assert np.abs(pixels - on_color(stored, (255,) * 3, is_associated=True)).max() <= 0.5
    kept = encoded(content, 4).decode()
    np.testing.assert_array_equal(kept[3], straight[3])
    is_clear = alpha > 0.5
    assert np.abs(kept[:3] - straight[:3].astype(int))[:, is_clear].max() <= 1
    assert not kept[:3, :2].any()


def test_associated_alpha_of_8_bits_is_divided_out():
    straight = noise(HEIGHT, WIDTH, 4, dtype="uint8")
    straight[..., 3] = 128 + straight[..., 3] // 2
    stored = straight.copy()
    stored[..., :3] = (straight[..., :3] * (straight[..., 3:] / 255)).round()
    content = tiff(stored, photometric="rgb", extrasamples=["assocalpha"])
    assert np.abs(encoded(content, 4).decode() - straight.transpose(2, 0, 1).astype(int)).max() <= 1
    on_white = on_color(stored.transpose(2, 0, 1), (255,) * 3, is_associated=True)
    assert np.abs(encoded(content, 3).decode() - on_white).max() <= 2


@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize("num_bands", [1, 3])
def test_transparent_color_of_a_png_is_background(num_bands, is_deep):
    array = noise(HEIGHT, WIDTH, num_bands, dtype="uint16" if is_deep else "uint8") // 2  # nothing is white
    color = array[3, 4].tolist()
    if is_deep:
        content = deep_png(array, color)
    else:
        transparency = color[0] if num_bands == 1 else tuple(color)
        content = saved(Image.fromarray(array.squeeze()), "png", transparency=transparency)
    is_clear = (array == color).all(-1)
    expected = np.where(is_clear[..., None], np.iinfo(array.dtype).max, array).transpose(2, 0, 1)
    np.testing.assert_array_equal(encoded(content, num_bands).decode(), expected)
    if num_bands == 3:
        with_alpha = encoded(content, 4).decode()
        np.testing.assert_array_equal(with_alpha[3] == 0, is_clear)


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_transparent_entry_of_a_palette_is_background(kind):
    image = picture(HEIGHT, WIDTH, 3).quantize(16)
    content = saved(image, kind, transparency=3)
    is_clear, colors = np.array(image) == 3, np.array(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(encoded(content, 3, background="red").decode()[:, is_clear].T[0], [255, 0, 0])
    np.testing.assert_array_equal(encoded(content, 3).decode()[:, ~is_clear], colors[:, ~is_clear])
    np.testing.assert_array_equal(encoded(content, 4).decode()[3] == 0, is_clear)


@pytest.mark.parametrize("background", ["nothing", "#12", "#00000000"])
def test_background_must_be_an_opaque_color(background):
    with pytest.raises(ValueError, match="background must be the name of a color or #rrggbb, got"):
        Reading(3, background=background)


# bits, colors and frames that a reader would reduce


@pytest.mark.parametrize("num_bands", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_all_values(num_bands):
    array = noise(HEIGHT, WIDTH, num_bands)
    if num_bands != 2:
        assert_reads(deep_png(array), array.transpose(2, 0, 1))
    else:
        np.testing.assert_array_equal(encoded(deep_png(array), 2).decode(), array.transpose(2, 0, 1))


@pytest.mark.parametrize("codec", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("num_bands", [1, 2, 3, 4, 5])
def test_jpeg_2000_keeps_all_values(num_bands, bits, codec):
    array = noise(HEIGHT, WIDTH, num_bands) >> (16 - bits)
    array = array.astype(np.uint8 if bits == 8 else np.uint16)
    options = {"level": 0, "reversible": True, "bitspersample": bits, "codecformat": codec}
    content = imagecodecs.jpeg2k_encode(array.squeeze(), **options)
    assert_reads(content, array.transpose(2, 0, 1))
    if num_bands == 4:  # no alpha, as far as the file says
        assert fault(content, 3).kind == "other channels"


def test_jpeg_2000_with_alpha_is_put_on_the_background():
    array = noise(HEIGHT, WIDTH, 4, dtype="uint8")
    content = saved(Image.fromarray(array), "jpeg2000", irreversible=False)
    pixels = encoded(content, 3).decode()
    assert np.abs(pixels - on_color(array.transpose(2, 0, 1), (255,) * 3)).max() <= 1


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("kind", ["avif", "heif"])
def test_more_than_8_bits_of_heif_are_noted(kind, bits):
    if kind == "avif":
        array = noise(64, 64, 3) >> (16 - bits)
        content = imagecodecs.avif_encode(array.astype(np.uint8 if bits == 8 else np.uint16), bitspersample=bits)
    else:
        array, file = noise(64, 64, 3, dtype="uint8" if bits == 8 else "uint16"), io.BytesIO()
        mode = "RGB" if bits == 8 else "RGB;16"
        pillow_heif.from_bytes(mode, (64, 64), array.tobytes()).save(file)
        content = file.getvalue()
    image = encoded(content, 3)
    assert image.decode().dtype == np.uint8
    assert image.notes == (("more than 8 bits reduced to 8",) if bits > 8 else ())


def deep_sgi() -> bytes:
    header = struct.pack(">HBBHHHHII", 474, 0, 2, 3, 8, 8, 3, 0, 65535)
    return header.ljust(512, b"\0") + noise(3, 8, 8).astype(">u2").tobytes()


def psd(array: np.ndarray) -> bytes:
    """A Photoshop file in RGB without layers, of (channels, height, width)."""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, *array.shape, array.dtype.itemsize * 8, 3)
    return header + bytes(12) + bytes(2) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def fits(array: np.ndarray, *cards: str) -> bytes:
    bits = array.dtype.itemsize * (-8 if array.dtype.kind == "f" else 8)
    numbers = {"BITPIX": bits, "NAXIS": array.ndim}
    numbers |= {f"NAXIS{axis + 1}": side for axis, side in enumerate(reversed(array.shape))}
    lines = ["SIMPLE  =                    T", *(f"{name:8}= {value:>20}" for name, value in numbers.items())]
    header = "".join(line.ljust(80) for line in (*lines, *cards, "END"))
    content = array[..., ::-1, :].astype(array.dtype.newbyteorder(">")).tobytes()
    return header.ljust(2880).encode() + content + bytes(-len(content) % 2880)


PPM_VALUES = noise(4, 4, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"P6 4 4 65535\n" + PPM_VALUES.astype(">u2").tobytes(),
        b"P6\n# by a camera\n4 4\n# of 12 bits\n4095\n" + PPM_VALUES.astype(">u2").tobytes(),
        b"P3 4 4 65535\n" + b" ".join(b"%d" % value for value in PPM_VALUES.flat),
        deep_sgi(),
    ],
    ids=["P6", "comments", "P3", "sgi"],
)
def test_color_of_16_bits_that_pillow_reduces_is_refused(content):
    assert fault(content).kind == "16 bits"


def test_gray_netpbm_keeps_all_values():
    array = noise(8, 8)
    assert_reads(b"P5\n# gray\n8 8\n65535\n" + array.astype(">u2").tobytes(), array[None])
    floats = noise(8, 8, dtype="float32")
    assert_reads(b"Pf\n8 8\n-1.0\n" + floats[::-1].tobytes(), floats[None])


def test_photoshop_files_of_16_bits_or_more_channels():
    array = noise(3, 8, 8, dtype="uint8")
    assert_reads(psd(array), array)
    assert "cannot be decoded: no image file (PSD" in str(fault(psd(noise(3, 8, 8))))
    assert encoded(psd(noise(6, 8, 8, dtype="uint8")), 3).notes == ("channels after 3 ignored",)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_fits_is_read_where_pillow_keeps_its_values(dtype):
    array = noise(8, 8, dtype=dtype)
    assert_reads(fits(array), array[None])


@pytest.mark.parametrize(
    ("dtype", "shape", "cards"),
    [
        ("int16", (8, 8), ()),
        ("float64", (8, 8), ()),
        ("int32", (8, 8), ("BZERO   =           2147483648",)),
        ("float32", (3, 8, 8), ()),
    ],
)
def test_fits_that_pillow_reduces_is_refused(dtype, shape, cards):
    assert fault(fits(noise(*shape, dtype=dtype), *cards), 1).kind == "FITS"


def test_jpeg_of_12_bits_is_refused_with_the_reason():
    content = imagecodecs.jpeg_encode(noise(64, 64) >> 4, bitspersample=12)
    assert "12-bit" in str(fault(content, 1))


@pytest.mark.parametrize(
    ("mode", "note"),
    [("CMYK", "CMYK converted without a color profile"), ("LAB", "CIELAB converted without a color profile")],
)
def test_conversion_from_other_color_spaces_is_noted(mode, note):
    image = picture(16, 16, 3)
    if mode == "LAB":
        spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *spaces, outputMode="LAB")
    image = image.convert(mode) if mode == "CMYK" else image
    read = encoded(saved(image, "tiff"), 3)
    assert read.notes == (note,)
    np.testing.assert_array_equal(read.decode(), np.array(image.convert("RGB")).transpose(2, 0, 1))
    if mode == "CMYK":
        assert encoded(saved(image, "jpeg"), 3).notes == (note,)


def profile(primaries: tuple, gamma: float, name: str = "test") -> bytes:
    """An ICC profile of display colors from its specification; `primaries` are columns of XYZ under D50."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def text(kind: bytes, content: str) -> bytes:
        raw = content.encode("utf-16-be")
        return kind + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(raw), 28) + raw

    tags = {b"desc": text(b"mluc", name), b"cprt": text(b"mluc", "none"), b"wtpt": b"XYZ " + bytes(4)
            + b"".join(map(fixed, (0.9642, 1, 0.8249)))}  # fmt: skip
    for letter, xyz in zip(b"rgb", primaries):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + b"".join(map(fixed, xyz))
        tags[bytes([letter]) + b"TRC"] = b"para" + bytes(4) + struct.pack(">HH", 0, 0) + fixed(gamma)
    return _profile_of(tags, b"RGB ")


def gray_profile(gamma: float) -> bytes:
    white = b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1, 0.8249))
    curve = b"para" + bytes(4) + struct.pack(">HHi", 0, 0, round(gamma * 65536))
    return _profile_of({b"wtpt": white, b"kTRC": curve}, b"GRAY")


def _profile_of(tags: dict[bytes, bytes], space: bytes) -> bytes:
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", place + len(body), bytes(4), 0x04300000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1572, 0.0666, 0.7841))
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


@pytest.mark.parametrize(
    ("icc", "is_noted"),
    [
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), False),
        (profile(SRGB, 2.2, "a small one"), False),
        (profile(SRGB, 1.0, "linear sRGB"), True),
        (profile(DISPLAY_P3, 2.2, "not sRGB"), True),
        (profile(ADOBE_RGB, 2.2), True),
        (b"damaged sRGB", True),
    ],
    ids=["sRGB", "alike", "linear", "Display P3", "Adobe RGB", "damaged"],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "png16", "tiff16"])
def test_color_profile_other_than_srgb_is_noted(kind, icc, is_noted):
    array = noise(16, 16, 3, dtype="uint16" if kind.endswith("16") else "uint8")
    if kind == "png16":
        content = deep_png(array)
        chunk = b"iCCP" + b"x\0\0" + zlib.compress(icc)
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        content = content[:33] + chunk + content[33:]
    elif kind == "tiff16":
        content = tiff(array, photometric="rgb", iccprofile=icc)
    else:
        content = saved(Image.fromarray(array), kind, icc_profile=icc)
    image = encoded(content, 3)
    assert image.notes == (("color profile ignored",) if is_noted else ())
    assert image.decode().shape == (3, 16, 16)


@pytest.mark.parametrize(("gamma", "is_noted"), [(2.2, False), (1.0, True)])
def test_gray_profile_is_noted_where_it_matters(gamma, is_noted):
    content = saved(picture(16, 16), "png", icc_profile=gray_profile(gamma))
    assert encoded(content, 1).notes == (("color profile ignored",) if is_noted else ())


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "avif", "mpo"])
def test_frames_after_the_first_are_noted(kind):
    frames = [picture(16, 16, 3), picture(16, 16, 3).rotate(90)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "frames after the first ignored" in encoded(content, 3).notes
    assert "frames after the first ignored" not in encoded(saved(frames[0], kind), 3).notes


def test_icon_of_several_sizes_is_read_at_the_largest():
    array = noise(64, 64, 4, dtype="uint8")
    content = saved(Image.fromarray(array), "ico", sizes=[(16, 16), (64, 64)])
    assert_reads(content, array.transpose(2, 0, 1))
    assert encoded(content, 4).notes == ("other sizes ignored",)


# size, damage and malice


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff5", "npy", "npz", "png16", "jpeg2000"])
def test_declared_size_is_refused_before_memory_is_taken(kind):
    small = noise(HEIGHT, WIDTH, 3, dtype="uint8")
    if kind == "png":
        content = bytearray(saved(Image.fromarray(small), "png"))
        content[16:24] = struct.pack(">II", HUGE, HUGE)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "png16":
        content = bytearray(deep_png(noise(HEIGHT, WIDTH, 3)))
        content[16:24] = struct.pack(">II", HUGE, HUGE)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "jpeg2000":
        content = bytearray(imagecodecs.jpeg2k_encode(noise(HEIGHT, WIDTH, 3), codecformat="j2k"))
        content[8:16] = struct.pack(">II", HUGE, HUGE)
    elif kind.startswith("tiff"):
        array = small if kind == "tiff" else noise(HEIGHT, WIDTH, 3)
        content = bytearray(tiff(array, photometric="rgb", metadata=None))
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            for tag in (256, 257):
                place = file.pages[0].tags[tag].valueoffset
                size = 4 if file.pages[0].tags[tag].dtype == 4 else 2
                content[place : place + size] = (HUGE if size == 4 else 65535).to_bytes(size, "little")
    else:
        declared = npy(noise(HEIGHT, WIDTH, dtype="uint8"))
        header = str({"descr": "|u1", "fortran_order": False, "shape": (HUGE, HUGE)}).ljust(117).encode() + b"\n"
        content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + declared[128:]
        if kind == "npz":
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("image.npy", content)
            content = file.getvalue()
    error = fault(bytes(content), 1 if kind in ("npy", "npz") else 3)
    assert error.kind in ("too large", "damaged")
    if kind in ("png", "png16", "jpeg2000"):
        assert error.kind == "too large" and error.number == HUGE**2


def test_zip_bomb_is_refused_by_its_header():
    content = npz(image=np.zeros((1, 9000, 9000), np.uint16))
    assert len(content) < 300_000
    assert fault(content, 1, max_image_pixels=1_000_000).number == 81_000_000
    lying = content.replace(struct.pack("<I", 162_000_128), struct.pack("<I", 1000))
    assert fault(lying, 1, max_image_pixels=10**9).kind == "damaged"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array(3)), "an array of the shape () is not an image"),
        (npy(np.zeros(5)), "an array of the shape (5,) is not an image"),
        (npy(np.zeros((0, 4))), "an array of the shape (0, 4) is not an image"),
        (npy(np.zeros((4, 4), complex)), "values of complex128 are not an image"),
        (npy(np.array([["a"]])), "are not an image"),
        (npy(np.zeros((4, 4), [("x", "u2")])), "are not an image"),
        (npy(np.zeros((40, 40)))[:-1], "an array of 12800 bytes, of which 12799 are there"),
        (npz(a=np.zeros((4, 4)), b=np.zeros((4, 4))), "an .npz must hold one array, got 2 (a, b)"),
        (npz(a=np.zeros((40, 40)))[:-30], "cannot be decoded"),
        (pickle.dumps([1]), "no image file"),
        (b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535, "cannot be decoded"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_arrays_that_are_no_image_are_refused(content, message):
    assert message in str(fault(content, 1))


def test_pickled_array_is_refused():
    file = io.BytesIO()
    np.save(file, np.array([[{"a": 1}]]), allow_pickle=True)
    assert "are not an image" in str(fault(file.getvalue(), 1))


def scientific_files() -> dict[str, bytes]:
    array = noise(3, HEIGHT, WIDTH)
    last = array.transpose(1, 2, 0)
    return {
        "tiff": tiff(last, photometric="rgb"),
        "tiled": tiff(last, photometric="rgb", tile=(16, 16), compression="zstd"),
        "strips": tiff(last, photometric="rgb", rowsperstrip=3, compression="lzw"),
        "npy": npy(array),
        "npz": npz(a=array),
        "png": deep_png(last),
        "jp2": imagecodecs.jpeg2k_encode(last, level=0, reversible=True),
    }


@pytest.mark.parametrize("kind", scientific_files())
def test_cut_or_changed_files_give_one_kind_of_error(kind):
    content, rng = scientific_files()[kind], np.random.default_rng(0)
    whole = encoded(content, 3).decode()
    for cut in np.linspace(0, len(content) - 20, 25).astype(int):
        try:
            pixels = encoded(content[:cut], 3).decode()
        except BrokenImageError as error:
            assert len(str(error).splitlines()) == 1
        else:
            np.testing.assert_array_equal(pixels, whole)  # nothing that counts was cut
    for _ in range(60):
        changed = bytearray(content)
        for place in rng.integers(0, min(len(content), 400), 3):
            changed[place] = rng.integers(0, 256)
        try:
            assert encoded(bytes(changed), 3, max_image_pixels=10**6).decode().shape[0] == 3
        except BrokenImageError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.filterwarnings("error")
def test_large_images_warn_of_nothing_and_leave_pillows_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # so that 40 x 40 pixels are too large for Pillow
    content, seen = saved(picture(60, 60, 3), "png"), []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(Image.MAX_IMAGE_PIXELS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(50):
            assert encoded(content, 3, max_image_pixels=3600).decode().shape == (3, 60, 60)
    finally:
        stop.set()
        watcher.join()
    assert set(seen) == {1000}
    assert fault(content, 3, max_image_pixels=3599).kind == "too large"


def test_error_of_a_worker_keeps_its_fields():
    error = pickle.loads(pickle.dumps(BrokenImageError("a.tif", "other channels", "has 5 channels", 5)))
    assert (error.name, error.kind, error.number, str(error)) == (
        "a.tif", "other channels", 5, "image a.tif has 5 channels",
    )  # fmt: skip


# scaling


@pytest.mark.parametrize("dtype", DTYPES[:8])
def test_integers_are_scaled_by_the_range_of_their_type(dtype):
    array, ends = noise(2, 8, 8, dtype=dtype), np.iinfo(dtype)
    array[0, 0, :2] = ends.min, ends.max
    expected = (array.astype(float) - ends.min) / (float(ends.max) - ends.min)
    scaled = scale_values(array)
    assert scaled.dtype == np.float32 and (scaled[0, 0, 0], scaled[0, 0, 1]) == (0, 1)
    np.testing.assert_allclose(scaled, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_given_range_is_scaled_and_clipped(dtype):
    array = np.arange(-10, 190, 2).reshape(1, 10, 10).clip(0).astype(dtype)
    np.testing.assert_allclose(scale_values(array, ["20", "120"]), ((array - 20.0) / 100).clip(0, 1), atol=1e-6)


def test_percentiles_are_of_each_channel_of_each_image():
    array = noise(3, 30, 30, dtype="float32") * np.array([1, 10, 100])[:, None, None]
    low, high = np.percentile(array, [1, 99], axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(
        scale_values(array, ["p1", "p99"]), ((array - low) / (high - low)).clip(0, 1), atol=1e-5
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 1e9, -3.5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constant_channel_becomes_zero(value, dtype):
    array = np.full((2, 5, 5), value, dtype)
    array[1] = np.arange(25).reshape(5, 5)
    scaled = scale_values(array, ["p0", "p100"])
    assert not scaled[0].any() and scaled[1].max() == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value_range", [["0", "10"], ["p0", "p100"]])
def test_values_that_are_not_finite_stay_in_range(value_range):
    array = np.arange(11, dtype=np.float32).repeat(11).reshape(1, 11, 11)
    array[0, 0, :3] = np.nan, np.inf, -np.inf
    scaled = scale_values(array, value_range)
    np.testing.assert_array_equal(scaled[0, 0, :3], [0, 1, 0])
    np.testing.assert_allclose(scaled[0, 1:, 0], np.arange(1, 11) / 10, atol=1e-6)
    assert not scale_values(np.full((1, 4, 4), np.nan, np.float32), value_range).any()


def test_floats_need_a_range():
    with pytest.raises(ValueError, match="float32 have no range of values. Give --value_range LOW HIGH"):
        scale_values(noise(1, 4, 4, dtype="float32"))
    np.testing.assert_array_equal(scale_values(np.eye(4, dtype=bool)[None]), np.eye(4)[None])


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "1"])
def test_processor_takes_colors_of_a_palette(mode):
    image = picture(24, 24, 3).convert(mode)
    processor = DINOImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.image_mean, processor.image_std = [0.5] * 3, [0.25] * 3
    given = [processor(one, return_tensors="pt")["pixel_values"] for one in (image, image.convert("RGB"))]
    torch.testing.assert_close(*given, rtol=0, atol=0)


# 8 bits stay as they were


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1"])
@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "tiff"])
def test_crops_and_features_of_8_bits_are_pillows_to_the_bit(kind, mode):
    if (kind, mode) in (("png", "CMYK"), ("jpeg", "P"), ("bmp", "CMYK"), ("jpeg", "1")):
        pytest.skip("no such file")
    content = saved(picture(60, 70, 3).convert(mode), kind)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    pixels = np.array(image).transpose(2, 0, 1)
    assert_reads(content, pixels)
    args = AugmentationArguments(global_crop_size=32, local_crop_size=16, num_local_crops=2)
    crops, _ = MultiCrop(args, 0)(encoded(content, 3), 0, 0)
    same, _ = MultiCrop(args, 0)(EncodedImage(pixels, Reading(3)), 0, 0)
    assert crops[0].dtype == torch.uint8 and all(map(torch.equal, crops, same))
    processor = make_image_processor(32)
    assert type(processor) is ViTImageProcessorPil
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(to_pixel_values(processor, [encoded(content, 3).decode()]), expected)


def test_opaque_alpha_changes_nothing():
    array = noise(HEIGHT, WIDTH, 4, dtype="uint8")
    array[..., 3] = 255
    np.testing.assert_array_equal(
        encoded(saved(Image.fromarray(array), "png"), 3).decode(), array[..., :3].transpose(2, 0, 1)
    )


# columns, and protocols that take 8 bits


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64", "bool"])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (5, HEIGHT, WIDTH), (HEIGHT, WIDTH, 5)])
def test_array_columns_keep_type_and_values(tmp_path, shape, dtype):
    arrays = noise(2, *shape, dtype=dtype)
    feature = (Array2D if len(shape) == 2 else Array3D)(shape, dtype)
    Dataset.from_dict({"bands": list(arrays)}, features=Features({"bands": feature})).to_parquet(
        tmp_path / "a.parquet"
    )
    dataset = load_images(str(tmp_path / "a.parquet"))
    reading = Reading(1 if len(shape) == 2 else 5).of(dataset.features)
    for row, array in zip(dataset, as_read(arrays), strict=True):
        expected = array[None] if array.ndim == 2 else array.transpose(2, 0, 1) if shape[-1] == 5 else array
        pixels = decode_image(row["image"], reading)
        assert pixels.dtype == expected.dtype
        np.testing.assert_array_equal(pixels, expected)


def test_protocols_of_8_bits_refuse_others_in_one_line():
    image = {"bytes": tiff(noise(HEIGHT, WIDTH, 3), photometric="rgb"), "path": "a.tif"}
    with pytest.raises(ValueError, match="images must be of 8 bits a channel here, got uint16") as error:
        decode_8_bits(image, Reading(3))
    assert len(str(error.value).splitlines()) == 1


# dino-check


def checked(folder, capsys, *flags) -> tuple[int, str]:
    """Exit code and output of dino-check."""
    try:
        check_from_command_line([str(folder), *flags])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_check_proposes_the_flags_that_help(tmp_path, capsys):
    for number in range(5):
        (tmp_path / f"bands_{number}.tif").write_bytes(
            tiff(noise(HEIGHT, WIDTH, 4), photometric="rgb", extrasamples=[0])
        )
    (tmp_path / "six.npy").write_bytes(npy(noise(6, HEIGHT, WIDTH)))
    (tmp_path / "pages.tif").write_bytes(tiff(noise(3, HEIGHT, WIDTH), photometric="minisblack"))
    (tmp_path / "large.png").write_bytes(saved(picture(90, 90, 3), "png"))
    (tmp_path / "cmyk.jpg").write_bytes(saved(picture(24, 24, 3).convert("CMYK"), "jpeg"))
    code, printed = checked(tmp_path, capsys, "--max_image_pixels", "5000")
    assert code == 1
    for words in (
        "9 images, 8 of them would be skipped: 6 other channels, 1 ",
        "images of other channels than 3: 5 of 4, 1 of 6; train with --config_overrides num_channels=4",
        "the largest image has 8100 pixels; consider --max_image_pixels 8100",
        "consider --tiff_pages channels",
        "1 image is read in part, CMYK converted without a color profile:",
        "and 3 more (--all lists them)",
    ):
        assert words in printed, printed


def test_check_proposes_a_range_of_values(tmp_path, capsys):
    ramp = np.linspace(100, 300, 4000, dtype=np.float32).reshape(1, 40, 100)
    ramp[0, 0, 0] = np.nan
    (tmp_path / "a.npy").write_bytes(npy(ramp))
    code, printed = checked(tmp_path, capsys, "--num_channels", "1")
    assert code == 1 and "training stops at the 1 images of floats without --value_range" in printed
    proposed = printed.split("consider --value_range ")[1].split(",")[0].split()
    np.testing.assert_allclose(np.array(proposed, float), [102, 298], atol=2)
    code, printed = checked(tmp_path, capsys, "--num_channels", "1", "--value_range", *proposed)
    assert code == 0 and "1 of float32" in printed and "consider" not in printed


@pytest.mark.parametrize("module", ["tifffile", "imagecodecs"])
def test_check_proposes_packages_that_are_missing(module, tmp_path, capsys, monkeypatch):
    array = noise(HEIGHT, WIDTH, 3)
    (tmp_path / "a.tif").write_bytes(tiff(array, photometric="rgb", compression="zstd"))
    (tmp_path / "b.png").write_bytes(deep_png(array))
    (tmp_path / "c.tif").write_bytes(tiff(noise(HEIGHT, WIDTH, 3, dtype="uint8"), photometric="rgb"))
    monkeypatch.setitem(sys.modules, module, None)
    if module == "imagecodecs":  # which tifffile looks up by itself
        monkeypatch.setattr(tifffile.tifffile, "imagecodecs", None, raising=False)
        (tmp_path / "a.tif").unlink()
    code, printed = checked(tmp_path, capsys)
    assert code == 1 and "1 needs scientific" in printed
    assert f"needs {module}. Install it with pip install 'dino-hf[scientific]'" in printed
    assert "consider pip install 'dino-hf[scientific]'" in printed


def test_check_reads_every_page_of_a_folder(tmp_path, capsys):
    (tmp_path / "a.tif").write_bytes(tiff(noise(3, HEIGHT, WIDTH), photometric="minisblack"))
    code, printed = checked(tmp_path, capsys, "--tiff_pages", "images", "--num_channels", "1")
    assert code == 0 and "3 images, 0 of them would be skipped" in printed and "3 of uint16" in printed


# all of it


WITHOUT_PACKAGE = """
import numpy, sys, tifffile, torch
from transformers import AutoImageProcessor, AutoModel
folder, *files = sys.argv[1:]
processor, model = (Auto.from_pretrained(folder, trust_remote_code=True) for Auto in (AutoImageProcessor, AutoModel))
with torch.no_grad():
    features = [model(**processor(tifffile.imread(file), return_tensors="pt")).pooler_output[0] for file in files]
numpy.save("features.npy", torch.stack(features).numpy())
"""


def test_published_model_reads_5_bands_without_the_package(recipe, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    for split, number in (("train", 16), ("test", 4)):
        for name in ("a", "b"):
            (tmp_path / f"images/{split}/{name}").mkdir(parents=True)
            for i in range(number // 2):
                array = rng.integers(100, 4000, (5, 24, 30), dtype=np.uint16)
                path = tmp_path / f"images/{split}/{name}/{i}.ome.tif"
                tifffile.imwrite(path, array, metadata={"axes": "CYX"}, photometric="minisblack")
    small = ("image_size=16", "patch_size=8", "hidden_size=24", "num_hidden_layers=2", "num_attention_heads=2",
             "out_dim=32", "head_hidden_dim=16", "head_bottleneck_dim=8", "num_channels=5")  # fmt: skip
    trained(
        "--config", recipe, "--dataset_name", tmp_path / "images", "--output_dir", tmp_path / "run", "--max_steps", 2,
        "--value_range", 0, 4095, "--image_mean", 0.5, "--image_std", 0.25, "--eval_steps", 2,
        "--config_overrides", *small,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn_10_top1" in line] == [0, 2]
    argv = ("features", "--model", tmp_path / "run", "--dataset_name", tmp_path / "images")
    trained(*argv, "--features", tmp_path / "features", "--splits", "test", module="evaluation")
    table = pd.read_parquet(tmp_path / "features/test.parquet")
    files = [tmp_path / "images" / name for name in table["name"]]
    run_without_package(WITHOUT_PACKAGE, tmp_path, tmp_path / "run", *files, HF_HUB_OFFLINE="1")
    features = np.load(tmp_path / "features.npy")
    np.testing.assert_allclose(features, np.stack(table["features"]), atol=1e-6, rtol=0)


def test_training_on_floats_without_a_range_is_one_line(recipe, tmp_path):  # noqa: F811
    (tmp_path / "images").mkdir()
    for number in range(8):
        np.save(tmp_path / f"images/{number}.npy", noise(3, 24, 24, dtype="float32"))
    finished = command("--config", recipe, "--dataset_name", tmp_path / "images", "--output_dir", tmp_path / "run")
    assert finished.returncode != 0
    errors = [line for line in finished.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "Give --value_range LOW HIGH" in errors[0]


@pytest.mark.parametrize("pages", ["images", "first", "channels"])
def test_stack_in_a_file_is_not_read_whole_for_a_page(tmp_path, monkeypatch, pages):
    stack = np.random.default_rng(0).integers(0, 2**16, (6, 20, 30), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    monkeypatch.setattr(decoding, "image_content", None)  # would be called
    image = {"path": str(tmp_path / "stack.tif"), "bytes": None, "page": 4}
    expected = {"images": stack[4:5], "first": stack[:1], "channels": stack}[pages]
    encoded = EncodedImage(image, Reading(len(expected), tiff_pages=pages))
    np.testing.assert_array_equal(encoded.decode(), expected)
    np.testing.assert_array_equal(encoded.decode(), expected)  # the file was closed in between


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tiff", "jpeg", "png", "webp"])
def test_header_has_the_size_of_turned_pixels(kind, orientation):
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if kind == "tiff" else {"exif": exif}
    Image.new("RGB", (30, 20), "white").save(file, kind, **options)
    encoded = EncodedImage({"bytes": file.getvalue(), "path": None}, Reading(3))
    assert encoded.decode().shape == (3, encoded.height, encoded.width) == (3, *((20, 30), (30, 20))[orientation > 4])


@pytest.mark.parametrize("path", ["drawing.eps", "photo.jpg"])
def test_postscript_is_not_run(path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # would be called
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n"
    with pytest.raises(BrokenImageError, match="no image file"):
        EncodedImage({"bytes": content, "path": path}, Reading(3)).decode()


def test_pixel_values_do_not_depend_on_the_batch():
    rng, processor = np.random.default_rng(0), make_image_processor(16)
    photo = rng.integers(0, 256, (3, 40, 30), dtype=np.uint8)
    deep = rng.integers(0, 2**16, (3, 40, 30), dtype=np.uint16)
    alone = to_pixel_values(processor, [photo])
    np.testing.assert_array_equal(to_pixel_values(processor, [deep, photo])[1:], alone)


def test_hashes_tell_sizes_of_equal_bytes_apart():
    assert pixel_hash(np.zeros((3, 10, 20), np.uint8)) != pixel_hash(np.zeros((3, 20, 10), np.uint8))


def test_check_warns_of_unlike_types(tmp_path, capsys):
    for number in range(3):
        Image.new("L", (30, 20), 128).save(tmp_path / f"{number}.png")
        tifffile.imwrite(tmp_path / f"{number}.tif", np.full((20, 30), 3000, np.uint16))
    check_from_command_line([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "images of unlike types" in printed and "consider --value_range p1 p99" in printed
    assert "--value_range 3000" not in printed


def test_check_tells_stray_images_from_the_others(tmp_path, capsys):
    for number in range(3):
        tifffile.imwrite(
            tmp_path / f"{number}.tif", np.zeros((2, 20, 30), np.uint16), metadata={"axes": "CYX"}, ome=True
        )
    Image.new("L", (30, 20)).save(tmp_path / "stray.png")
    for flags, advice in (([], "num_channels=2 --image_mean 0.5"), (["--num_channels", "2"], "move them to another")):
        with pytest.raises(SystemExit):
            check_from_command_line([str(tmp_path), *flags])
        assert advice in capsys.readouterr().out
