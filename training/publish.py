"""The finished run: the teacher's backbone and its image processor, where `from_pretrained` finds them."""

from pathlib import Path

from PIL.Image import Resampling
from transformers import ViTImageProcessor, ViTImageProcessorPil

from evaluation.images import PILLOW_MODES
from modeling_dino import DINOConfig, DINOModel

from .arguments import TrainingArguments


def make_image_processor(args: TrainingArguments, config: DINOConfig) -> ViTImageProcessorPil | ViTImageProcessor:
    """Evaluation's transform: shorter side to `image_size / eval_crop_pct` (bicubic), centre crop, normalise.

    The stock processor of ViT does all of it, so that a checkpoint needs no code for it. Its Pillow kind, the same to
    the pixel as `dino-eval` uses, where Pillow knows the number of channels.
    """
    size, num_channels = config.image_size, config.num_channels
    processor_class = ViTImageProcessorPil if num_channels in PILLOW_MODES else ViTImageProcessor
    return processor_class(
        size={"shortest_edge": round(size / args.eval_crop_pct)},
        resample=Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        image_mean=_per_channel(args.image_mean, num_channels),
        image_std=_per_channel(args.image_std, num_channels),
        do_convert_rgb=num_channels == 3,
    )


def _per_channel(values: list[float], num_channels: int) -> list[float]:
    return values * num_channels if len(values) == 1 else values


def publish(backbone: DINOModel, image_processor: ViTImageProcessorPil | ViTImageProcessor, output_dir: Path) -> str:
    """Saves backbone and image processor into `output_dir`; returns the five lines that load them."""
    backbone.save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    num_channels, size = backbone.config.num_channels, backbone.config.image_size
    if num_channels in PILLOW_MODES:
        library, image = "PIL.Image", f'PIL.Image.open("image.jpg").convert("{PILLOW_MODES[num_channels]}")'
        options = "" if num_channels == 3 else ', input_data_format="channels_last"'
    else:
        library, image = "numpy", f'numpy.zeros(({num_channels}, {size}, {size}), "uint8")'
        options = ', input_data_format="channels_first"'
    return f'''\
import modeling_dino, {library}
from transformers import AutoImageProcessor, AutoModel
processor, model = (Auto.from_pretrained("{output_dir}") for Auto in (AutoImageProcessor, AutoModel))
inputs = processor({image}, return_tensors="pt"{options})
features = model(**inputs).pooler_output  # (1, {backbone.config.hidden_size})'''
