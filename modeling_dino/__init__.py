"""DINO for transformers. Importing it makes the auto classes know it: configuration, model, heads and backbone."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoVideoProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from .configuration_dino import DINOConfig
from .image_processing_dino import DINOImageProcessor, DINOPillowImageProcessor
from .modeling_dino import (
    DINOBackbone,
    DINOForImageClassification,
    DINOForPreTraining,
    DINOHead,
    DINOModel,
    DINOPreTrainedModel,
)


AutoConfig.register("dino", DINOConfig, exist_ok=True)
DINOConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, DINOModel),
    (AutoBackbone, DINOBackbone),
    (AutoModelForImageClassification, DINOForImageClassification),
    (AutoModelForPreTraining, DINOForPreTraining),
):
    _auto_class.register(DINOConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)  # its code goes along when it is saved
AutoImageProcessor.register(
    DINOConfig, image_processor_classes={"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}, exist_ok=True
)
# keys of their own: AutoImageProcessor finds a class by its name, and chooses a backend among those of the same key
for _processor_class in (DINOImageProcessor, DINOPillowImageProcessor):
    AutoImageProcessor.register(
        _processor_class,
        image_processor_classes={"torchvision": _processor_class, "pil": _processor_class},
        exist_ok=True,
    )
    _processor_class.register_for_auto_class()
# None, and that is known: pipelines look for one, infer its name from the image processor's, and ask to run its code
AutoVideoProcessor.register(DINOConfig, None, exist_ok=True)

__all__ = [
    "DINOBackbone",
    "DINOConfig",
    "DINOForImageClassification",
    "DINOForPreTraining",
    "DINOHead",
    "DINOImageProcessor",
    "DINOModel",
    "DINOPillowImageProcessor",
    "DINOPreTrainedModel",
]
