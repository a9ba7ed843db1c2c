"""The finished run: the teacher's backbone and its image processor, where `from_pretrained` finds them."""

from pathlib import Path

from transformers import ViTImageProcessor, ViTImageProcessorPil

from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import PILLOW_MODES


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
features = model(**inputs).pooler_output  # (1, {backbone.num_features})'''
