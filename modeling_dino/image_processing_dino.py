"""The transform of the paper's evaluation, as an image processor: transformers' own, or ours for what it cannot take.

Ours are for Pillow images where the network has 1 or 4 channels, for scientific images, and for rectangular crops.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image as PillowImage
from PIL.Image import Resampling
from transformers import ViTImageProcessor, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


def parse_value_range(value_range: Sequence[str | float] | None) -> list[str] | list[float] | None:
    """Return a range of values in its one form: None, two numbers, or two percentiles such as ["p1", "p99"].

    Raises:
        ValueError: anything else, or a low end that is not below the high one.
    """
    if not value_range:
        return None
    ends = [str(end) for end in value_range]
    are_percentiles = [end.startswith("p") for end in ends]
    try:
        low, high = (float(end.removeprefix("p")) for end in ends)
        is_allowed = low < high and np.isfinite([low, high]).all() and len(set(are_percentiles)) == 1
        is_allowed = is_allowed and (not are_percentiles[0] or 0 <= low and high <= 100)
    except ValueError:
        is_allowed = False
    if not is_allowed:
        raise ValueError(
            "value_range must be two numbers, low < high, or two percentiles, as p1 p99, got "
            f"{' '.join(ends)}. Leave it out to scale integers by the range of their type."
        )
    return [f"p{low:g}", f"p{high:g}"] if are_percentiles[0] else [low, high]


def scale_values(pixels: np.ndarray, value_range: Sequence[str | float] | None = None) -> np.ndarray:
    """Scale values of any type to fp32 in [0, 1]; values beyond the range are clipped, NaN becomes 0.

    Args:
        pixels: (channels, height, width).
        value_range: What becomes 0 and 1: two numbers; or two percentiles, as ["p1", "p99"], of each channel of each
            image. Default: the range of the integer type.

    Raises:
        ValueError: floats without `value_range`, as their type has no range.
    """
    value_range = parse_value_range(value_range)
    is_exact = pixels.dtype.itemsize <= 2 or pixels.dtype == np.float32  # in fp32
    values = pixels.astype(np.float32 if is_exact else np.float64)
    if value_range is None and pixels.dtype == bool:
        low, high = 0.0, 1.0
    elif value_range is None:
        if pixels.dtype.kind not in "ui":
            raise ValueError(
                f"images of {pixels.dtype} have no range of values. Give --value_range LOW HIGH, or as percentiles "
                "--value_range p1 p99"
            )
        low, high = float(np.iinfo(pixels.dtype).min), float(np.iinfo(pixels.dtype).max)
    elif isinstance(value_range[0], str):
        percentiles = [float(end[1:]) for end in value_range]
        finite = np.where(np.isfinite(values), values, np.nan)
        finite[np.isnan(finite).all(axis=(1, 2))] = 0
        low, high = np.nanpercentile(finite, percentiles, axis=(1, 2), keepdims=True).astype(values.dtype)
    else:
        low, high = value_range
    span = np.subtract(high, low)
    span = np.where(span > 0, span, 1).astype(values.dtype)  # a channel of one value becomes 0
    with np.errstate(over="ignore", invalid="ignore"):  # values near the end of the type's range become 0 or 1
        scaled = np.clip((values - low) / span, 0, 1)
    return np.nan_to_num(scaled, nan=0.0).astype(np.float32)


def has_channels_last(shape: Sequence[int], num_channels: int) -> bool:
    """Return whether an array of this shape has its channels last, for a network of `num_channels`."""
    return len(shape) == 3 and shape[0] not in (num_channels, 1) and shape[-1] in (num_channels, 1)


def to_channels_first(array: np.ndarray, num_channels: int) -> np.ndarray:
    """Array of an image -> (num_channels, height, width).

    Args:
        array: (height, width), channels before or after them, or pages and channels before them, as tifffile reads
            stacks. One channel serves a network of three.
        num_channels: Channels of the network.

    Raises:
        ValueError: other numbers of channels.
    """
    shape = array.shape
    if array.ndim == 2:
        array = array[None]
    elif has_channels_last(shape, num_channels):
        array = array.transpose(2, 0, 1)
    elif array.ndim > 3:
        array = array.reshape(-1, *shape[-2:])
    if len(array) == 1 and num_channels == 3 and array.ndim == 3:
        array = np.repeat(array, 3, axis=0)
    if array.ndim != 3 or len(array) != num_channels:
        raise ValueError(f"the model takes {num_channels} channels, got an array of the shape {shape}")
    return array


def _to_array(image, num_channels: int) -> np.ndarray:
    """The values of an array, a tensor or a Pillow image; of the latter, colors rather than indices of a palette."""
    if isinstance(image, PillowImage) and image.mode[0] not in "IF" and num_channels in PILLOW_MODES:
        image = image.convert(PILLOW_MODES[num_channels])
    return np.asarray(image)


class _CoveringResize:
    """Resize that can keep the aspect ratio, for rectangular crops, which `shortest_edge` does not fit.

    Args:
        keep_aspect_ratio: Whether the resized image keeps its aspect ratio and just covers `size`, a height and a
            width, instead of being stretched to it.
        **kwargs: Those of the image processor.
    """

    def __init__(self, keep_aspect_ratio: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.keep_aspect_ratio = keep_aspect_ratio

    def resize(self, image: np.ndarray | torch.Tensor, size, *args, **kwargs) -> np.ndarray | torch.Tensor:
        if self.keep_aspect_ratio:
            height, width = image.shape[-2:]
            scale = max(size.height / height, size.width / width)
            height, width = max(size.height, round(height * scale)), max(size.width, round(width * scale))
            size = type(size)(height=height, width=width)
        return super().resize(image, size, *args, **kwargs)


class DINOImageProcessor(_CoveringResize, ViTImageProcessor):
    """`ViTImageProcessor` for images of more than 8 bits or more than 4 channels, which it scales to [0, 1] first.

    Takes arrays and tensors (channels, height, width), or what `to_channels_first` makes that of, and Pillow images.

    Args:
        value_range: See `scale_values`.
        **kwargs: Those of `ViTImageProcessor`; `image_mean` has an entry for each channel. With `keep_aspect_ratio`,
            images cover the height and width of `size` instead of being stretched to them.
    """

    def __init__(self, value_range: Sequence[str | float] | None = None, **kwargs):
        super().__init__(**kwargs)
        self.value_range = parse_value_range(value_range)

    def preprocess(self, images, **kwargs):
        images = images if isinstance(images, (list, tuple)) else [images]
        num_channels = len(self.image_mean)
        arrays = [to_channels_first(_to_array(image, num_channels), num_channels) for image in images]
        scaled = [torch.from_numpy(scale_values(array, self.value_range)) for array in arrays]
        return super().preprocess(
            scaled, **kwargs | {"do_rescale": False, "do_convert_rgb": False, "input_data_format": "channels_first"}
        )

    def resize(self, image: torch.Tensor, size, *args, **kwargs) -> torch.Tensor:
        """Resize, and clip where bicubic resampling overshoots, as that of 8-bit pixels does."""
        return super().resize(image, size, *args, **kwargs).clamp(0, 1)


class DINOPillowImageProcessor(_CoveringResize, ViTImageProcessorPil):
    """`ViTImageProcessorPil` for networks of 1 or 4 channels, and for rectangular crops.

    For the former, Pillow images become gray, or get an alpha channel: pipelines of transformers turn every image to
    RGB before the image processor sees it. `image_mean` has an entry for each channel. With `keep_aspect_ratio`,
    images cover the height and width of `size` instead of being stretched to them.
    """

    def process_image(self, image, input_data_format: str | None = None, **kwargs) -> np.ndarray:
        if isinstance(image, PillowImage) and len(self.image_mean) != 3:
            image = np.asarray(image.convert(PILLOW_MODES[len(self.image_mean)]))
            image, input_data_format = np.atleast_3d(image).transpose(2, 0, 1), "channels_first"
        return super().process_image(image, input_data_format=input_data_format, **kwargs)


def make_image_processor(
    image_size: int | Sequence[int],
    num_channels: int = 3,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
    value_range: Sequence[str | float] | None = None,
    is_deep: bool = False,
) -> ViTImageProcessorPil | ViTImageProcessor:
    """Shorter side to `image_size / crop_pct` (bicubic), center crop, normalize: what the original evaluates with.

    The stock processor of ViT does all of it. Its Pillow kind, the same to the pixel as torchvision's transforms on
    PIL images, where Pillow knows the number of channels; of 1 or 4 channels, it is `DINOPillowImageProcessor`. Images
    that are not of 8 bits take `DINOImageProcessor`. Rectangular crops take either of ours: the image covers
    `image_size / crop_pct`, height and width, with its aspect ratio kept, which the stock processor cannot do.

    Args:
        image_size: Side of the crop, or its height and width.
        num_channels: Channels that the network takes.
        image_mean: Mean of each channel, of 1; one value serves all.
        image_std: Standard deviation of each channel, of 1; one value serves all.
        crop_pct: Side of the crop over the resized image's shorter side, or over what the resized image covers.
        value_range: See `scale_values`.
        is_deep: Whether images have more than 8 bits a channel.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    by_pillow = {1: DINOPillowImageProcessor, 3: ViTImageProcessorPil, 4: DINOPillowImageProcessor}
    processor_class = by_pillow.get(num_channels, ViTImageProcessor)
    options = {"do_convert_rgb": num_channels == 3, "size": {"shortest_edge": round(height / crop_pct)}}
    if height != width:
        processor_class = DINOPillowImageProcessor if num_channels in PILLOW_MODES else DINOImageProcessor
        options["size"] = {"height": round(height / crop_pct), "width": round(width / crop_pct)}
        options["keep_aspect_ratio"] = True
    if is_deep or value_range:
        processor_class, options["value_range"] = DINOImageProcessor, value_range
        del options["do_convert_rgb"]
    mean, std = (
        list(values) * num_channels if len(values) == 1 else list(values) for values in (image_mean, image_std)
    )
    return processor_class(
        resample=Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=mean,
        image_std=std,
        **options,
    )
