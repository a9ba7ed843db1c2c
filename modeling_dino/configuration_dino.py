"""DINO model configuration."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.auto import CONFIG_MAPPING, AutoConfig


_AT_LEAST_ONE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels"),
    *("out_dim", "head_hidden_dim", "head_bottleneck_dim", "head_num_layers", "n_last_blocks"),
)
# fields of our Vision Transformer, which say nothing about another network
VIT_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("qkv_bias", "drop_path_rate", "patch_size", "position_interpolation"),
    *("n_last_blocks", "avgpool_patchtokens", "interleave_features"),
)
# which class opens a saved folder for which auto class, all of them from the same checkpoint
_AUTO_MAP = {
    "AutoConfig": "configuration_dino.DINOConfig",
    "AutoModel": "modeling_dino.DINOModel",
    "AutoBackbone": "modeling_dino.DINOBackbone",
    "AutoModelForImageClassification": "modeling_dino.DINOForImageClassification",
    "AutoModelForPreTraining": "modeling_dino.DINOForPreTraining",
}


def _config_of_network(model_type: str | None = None, **fields) -> PreTrainedConfig:
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"backbone_config needs the model_type of a network in transformers, got {model_type}")
    return CONFIG_MAPPING[model_type](**fields)


@strict
class DINOConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`DINOModel`] (a Vision Transformer, or any network by `backbone_config`) and of what is put on
    it: the projection head of [`DINOForPreTraining`], the linear classifier of [`DINOForImageClassification`], the
    feature maps of [`DINOBackbone`]. The defaults are ViT-S/16 of the paper (arXiv 2104.14294) with its 65536
    prototypes.

    Args:
        hidden_size (`int`, defaults to 384): Width of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 6): Attention heads per block; must divide `hidden_size`.
        mlp_ratio (`float`, defaults to 4.0): Width of a block's MLP over `hidden_size`.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs; `"gelu"` is the exact one (erf).
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every LayerNorm.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have a bias.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth of the last block; grows linearly from 0 in the first. The paper trains with 0.1.
        initializer_range (`float`, defaults to 0.02): Standard deviation of Linear weights and embeddings.
        image_size (`int` or `[height, width]`, defaults to 224):
            Size in pixels that the position embeddings are stored for.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; must divide `image_size`.
        num_channels (`int`, defaults to 3): Channels of the images.
        position_interpolation (`str`, defaults to `"scale_factor"`):
            How position embeddings are resampled for other image sizes. `"scale_factor"` does as the original does,
            with its offset of 0.1 patches; `"size"` does as ViT of transformers does. The two differ at every size but
            `image_size`, so keep the one that the weights were trained with.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Another network instead of the Vision Transformer: the config of a model of transformers that pools its
            features and says in `hidden_sizes` or `hidden_size` how wide they are (ResNet, ConvNeXt, Swin, ...), or a
            `TimmWrapperConfig` for one of timm's (XCiT, ...). A dictionary names it by `model_type`.
            Of the fields above, only `image_size` (of the image processor), `num_channels` and `initializer_range` (of
            the head) then mean anything.
        out_dim (`int`, defaults to 65536): Number of prototypes, K in the paper.
        head_hidden_dim (`int`, defaults to 2048): Width of the head's hidden layers.
        head_bottleneck_dim (`int`, defaults to 256): Width of the L2-normalised bottleneck.
        head_num_layers (`int`, defaults to 3): Linear layers of the head in front of the prototypes.
        use_bn_in_head (`bool`, defaults to `False`): Whether the head's hidden layers have batch normalisation.
        norm_last_layer (`bool`, defaults to `True`):
            Whether the prototypes' gain is fixed to 1, which is more stable; `False` is better for ViT-S.
        n_last_blocks (`int`, defaults to 4):
            From how many last blocks the classifier takes the CLS token, each after the final norm. The paper takes 4
            of ViT-S and 1 of ViT-B.
        avgpool_patchtokens (`bool`, defaults to `False`):
            Whether the classifier also takes the mean of the last block's patch tokens, as the paper does for ViT-B.
        interleave_features (`bool`, defaults to `False`):
            Whether CLS and mean alternate channel by channel, `[cls_0, mean_0, cls_1, ...]`, as in the classifiers
            released for ViT-B, instead of following one another. Needs `n_last_blocks=1` and `avgpool_patchtokens`.
        freeze_backbone (`bool`, defaults to `False`):
            Whether training the classifier leaves the backbone as it is (linear probe), in evaluation mode and without
            gradients, or trains all of it (fine-tuning). [`DINOForImageClassification`] says how to thaw it later.
        out_features (`list[str]`, *optional*):
            Which of `stem`, `stage1`, ..., one a block, [`DINOBackbone`] returns. Default: the last.
        out_indices (`list[int]`, *optional*): The same by number; 0 is `stem`.
        reshape_hidden_states (`bool`, defaults to `True`):
            Whether [`DINOBackbone`] returns maps `(batch_size, hidden_size, height, width)` of patches, or tokens
            `(batch_size, 1 + patches, hidden_size)` with CLS, as DPT takes them.

    Raises:
        A type error of `huggingface_hub` for a value of the wrong type, `ValueError` for sizes that do not fit.

    ```python
    >>> from modeling_dino import DINOConfig, DINOModel

    >>> config = DINOConfig(patch_size=8)
    >>> model = DINOModel(config)  # ViT-S/8 with random weights
    >>> model = DINOModel(DINOConfig(backbone_config={"model_type": "resnet"}))  # ResNet-50
    ```"""

    model_type = "dino"
    sub_configs = {"backbone_config": AutoConfig}

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    position_interpolation: str = "scale_factor"
    backbone_config: dict | PreTrainedConfig | None = None
    out_dim: int = 65536
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    head_num_layers: int = 3
    use_bn_in_head: bool = False
    norm_last_layer: bool = True
    n_last_blocks: int = 4
    avgpool_patchtokens: bool = False
    interleave_features: bool = False
    freeze_backbone: bool = False
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _config_of_network(**self.backbone_config)
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        """`image_size` as two numbers."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)

    def validate_sizes(self):
        if len(self.image_height_and_width) != 2 or min(self.image_height_and_width) < 1:
            raise ValueError(f"image_size must be one number or [height, width], at least 1, got {self.image_size}")
        for name, value in vars(self).items():
            if name in _AT_LEAST_ONE and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.backbone_config is None and any(side % self.patch_size for side in self.image_height_and_width):
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        for name in ("mlp_ratio", "layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {self.hidden_act}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}")

    def validate_classifier(self):
        if self.interleave_features and not (self.avgpool_patchtokens and self.n_last_blocks == 1):
            raise ValueError(
                "interleave_features needs avgpool_patchtokens and n_last_blocks = 1, got "
                f"{self.avgpool_patchtokens} and {self.n_last_blocks}"
            )

    def validate_backbone_config(self):
        if self.backbone_config is None:
            return
        fields = self.backbone_config.to_dict()
        if fields["model_type"] == self.model_type:
            raise ValueError("backbone_config is for networks other than DINO's own Vision Transformer")
        if fields["model_type"] == "timm_wrapper":
            num_channels = (fields["model_args"] or {}).get("in_chans", 3)
        else:
            num_channels = fields.get("num_channels", self.num_channels)
        if num_channels != self.num_channels:
            raise ValueError(
                f"num_channels must be the backbone's too, got {self.num_channels} and, in backbone_config, "
                f"{num_channels}"
            )

    def validate_position_interpolation(self):
        if self.position_interpolation not in ("scale_factor", "size"):
            raise ValueError(
                f"position_interpolation must be 'scale_factor' or 'size', got {self.position_interpolation!r}"
            )


__all__ = ["DINOConfig"]
