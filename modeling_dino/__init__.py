"""DINO for transformers. Importing it makes `AutoConfig`, `AutoModel` and `AutoModelForPreTraining` know it."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .configuration_dino import DINOConfig
from .modeling_dino import DINOForPreTraining, DINOHead, DINOModel, DINOPreTrainedModel


AutoConfig.register("dino", DINOConfig, exist_ok=True)
AutoModel.register(DINOConfig, DINOModel, exist_ok=True)
AutoModelForPreTraining.register(DINOConfig, DINOForPreTraining, exist_ok=True)

__all__ = ["DINOConfig", "DINOForPreTraining", "DINOHead", "DINOModel", "DINOPreTrainedModel"]
