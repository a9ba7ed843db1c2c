"""The transform of the paper's evaluation, as an image processor that needs no code of ours."""

from collections.abc import Sequence

from PIL.Image import Resampling
from transformers import ViTImageProcessor, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


def make_image_processor(
    image_size: int,
    num_channels: int = 3,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
) -> ViTImageProcessorPil | ViTImageProcessor:
    """Shorter side to `image_size / crop_pct` (bicubic), centre crop, normalise: what the original evaluates with.

    The stock processor of ViT does all of it. Its Pillow kind, the same to the pixel as torchvision's transforms on
    PIL images, where Pillow knows the number of channels.

    Args:
        image_size: Side of the crop.
        num_channels: Channels that the network takes.
        image_mean: Mean of each channel, of 1; one value serves all.
        image_std: Standard deviation of each channel, of 1; one value serves all.
        crop_pct: Side of the crop over the resized image's shorter side.
    """
    processor_class = ViTImageProcessorPil if num_channels in PILLOW_MODES else ViTImageProcessor
    mean, std = (
        list(values) * num_channels if len(values) == 1 else list(values) for values in (image_mean, image_std)
    )
    return processor_class(
        size={"shortest_edge": round(image_size / crop_pct)},
        resample=Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        image_mean=mean,
        image_std=std,
        do_convert_rgb=num_channels == 3,
    )
