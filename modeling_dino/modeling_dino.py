"""DINO (arXiv 2104.14294): a Vision Transformer, the projection head it is pretrained with, and what is made of it.

Where it departs from ViT of transformers, on purpose, because the original does so too: stochastic depth grows with
the block, position embeddings are resampled by scale factor, queries, keys and values are one parameter (gradients are
clipped per parameter), and the patch projection and the prototypes keep PyTorch's default initialisation.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    ModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_dino import DINOConfig
from .network_dino import build_network, run_network, width_of_features


# of the forward passes that take one batch of images
_PIXEL_VALUES = r"""
    pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
        Normalised images, as the image processor beside the weights makes them. The Vision Transformer takes any
        height and width that the patch size divides.
"""

_INTERMEDIATE_LAYERS = r"""
    intermediate_layers (`Collection[int]`, *optional*):
        Numbers of the Vision Transformer's blocks, from 1, after which tokens are returned as they are, without the
        final norm; 0 is before the first block. Unlike `output_hidden_states`, it compiles without a graph break.
"""

_CLS_ONLY = r"""
    cls_only (`bool`, defaults to `False`):
        Spares the Vision Transformer's last block all tokens but CLS, for the same `pooler_output`: its
        `last_hidden_state` is then of shape `(batch_size, 1, hidden_size)`. Of another network it changes nothing.
"""


class DINOPatchEmbeddings(nn.Module):
    """(batch, channels, height, width) -> (batch, patches, hidden): one strided convolution, patches in row order."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


def _resample_in_export(grid: torch.Tensor, height: int, width: int, offset: float) -> torch.Tensor:
    """Resample (1, hidden, rows, columns) to (1, hidden, height, width), for any size of an exported program.

    PyTorch's bicubic resampling by `(size + offset) / number stored` in matrix products: `interpolate` would make its
    scale a constant of the program. The size that is stored has no offset.
    """
    rows, columns = grid.shape[-2:]
    # in fp32 whatever the default dtype is, in which numbers and arange would be rounded
    num_rows, num_columns = (torch.scalar_tensor(size, dtype=torch.float32) for size in (height, width))
    is_stored = (num_rows == rows) & (num_columns == columns)
    offset = torch.full_like(num_rows, offset).masked_fill(is_stored, 0.0)
    grid = nn.functional.pad(grid, (2, 2, 2, 2), mode="replicate")
    by_row = _bicubic_weights(height, rows, (num_rows + offset) / rows).to(grid.device)
    by_column = _bicubic_weights(width, columns, (num_columns + offset) / columns).to(grid.device)
    return by_row @ grid @ by_column.T


def _bicubic_weights(size: int, num_stored: int, scale: torch.Tensor) -> torch.Tensor:
    """Return each of `size` rows as a sum of `num_stored` and two more on either side: (size, num_stored + 4)."""
    a = -0.75  # of PyTorch's cubic convolution
    row = (torch.arange(size, dtype=torch.float32) + 0.5) / scale - 0.5
    distance = (row[:, None] - torch.arange(-2, num_stored + 2)).abs()
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


class DINOEmbeddings(nn.Module):
    """Patches, the CLS token in front of them, and learned position embeddings for any image size."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.config = config
        height, width = config.image_height_and_width
        self.grid_size = height // config.patch_size, width // config.patch_size
        num_patches = self.grid_size[0] * self.grid_size[1]
        self.patch_embeddings = DINOPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings (1, 1 + height * width, hidden) for a grid of `height` x `width` patches.

        The original passes `scale_factor = (height + 0.1) / grid_size` to the bicubic resampling, and PyTorch then
        samples in steps of its inverse: 96 pixels at patch 16 read row 0.648 of the 14 stored ones, not row 0.667.
        """
        is_exported = torch.compiler.is_exporting()  # for which a comparison would make the size a constant
        if not is_exported and (height, width) == self.grid_size:
            return self.position_embeddings
        cls_position, patch_positions = self.position_embeddings.tensor_split([1], dim=1)
        grid = patch_positions.unflatten(1, self.grid_size).permute(0, 3, 1, 2)  # (1, hidden, *grid_size)
        has_offset = self.config.position_interpolation == "scale_factor"
        if is_exported:
            grid = _resample_in_export(grid.float(), height, width, 0.1 if has_offset else 0.0)
        else:
            rows, columns = self.grid_size
            target = {"scale_factor": ((height + 0.1) / rows, (width + 0.1) / columns)}
            target = target if has_offset else {"size": (height, width)}
            grid = nn.functional.interpolate(grid.float(), mode="bicubic", align_corners=False, **target)
        patch_positions = grid.to(cls_position.dtype).flatten(2).transpose(1, 2)  # (1, height * width, hidden)
        return torch.cat([cls_position, patch_positions], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        num_channels, height, width = pixel_values.shape[1:]
        patch_size = self.config.patch_size
        if num_channels != self.config.num_channels:
            raise ValueError(f"the model takes images of {self.config.num_channels} channels, got {num_channels}")
        if height % patch_size or width % patch_size:
            raise ValueError(f"image height and width must be multiples of {patch_size}, got {height}x{width}")
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return tokens + self.interpolate_pos_encoding(height // patch_size, width // patch_size)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling) v, also returning the softmax. Heads in (batch, heads, tokens, head_dim)."""
    attention = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        attention = attention + attention_mask
    # it computes in fp32 whatever it is given; autocast, which meta tensors have not, would keep copies in fp32
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
        attention = nn.functional.softmax(attention, dim=-1)
    output = torch.matmul(nn.functional.dropout(attention, p=dropout, training=module.training), value)
    return output.transpose(1, 2), attention


class DINOAttention(nn.Module):
    """Multi-head self-attention. Rows of `qkv.weight` are all queries, then all keys, then all values."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of all tokens, (batch, tokens, hidden); with `cls_only` of the first, (batch, 1, hidden)."""
        heads = (self.num_attention_heads, self.head_dim)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, *heads))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head_dim)
        if cls_only:  # only keys and values of the other tokens are needed
            query = query[:, :, :1]
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, attention = attention_interface(self, query, key, value, None, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), attention


class DINOMLP(nn.Module):
    def __init__(self, config: DINOConfig):
        super().__init__()
        hidden_dim = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden_dim)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_dim, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        if self.training and torch.is_grad_enabled():
            # spares a quarter of a block's memory: what fc2 is given is computed anew for the backward pass
            return checkpoint(self.project, hidden_states, use_reentrant=False)
        return self.project(hidden_states)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(hidden_states))


class DINODropPath(nn.Module):
    """Stochastic depth: in training, zeroes a sample's residual branch with `drop_prob` and rescales the others."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        # drawn as in the original, where bf16 would round; and by an operation that compiles once for all blocks
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        shape = (len(hidden_states), *[1] * (hidden_states.ndim - 1))
        keep = (keep_prob + torch.rand(shape, dtype=dtype, device=hidden_states.device)).floor()
        return hidden_states / keep_prob * keep.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class DINOLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block. Its one drop path is drawn for each of the two residual branches."""

    def __init__(self, config: DINOConfig, drop_prob: float):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DINOAttention(config)
        self.drop_path = DINODropPath(drop_prob)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DINOMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same, or with `cls_only` (batch, 1, hidden) of the first token."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), cls_only, **kwargs)
        if cls_only:
            hidden_states = hidden_states[:, :1]
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class DINOPrototypes(nn.Module):
    r"""The head's weight-normalised last layer: logit_k = g_k <v_k / |v_k|, x>, without a bias.

    Our own, since `from_pretrained` makes every parameter trainable again: a frozen gain is a buffer here. The keys
    `weight_v` (out_dim, bottleneck) and `weight_g` (out_dim, 1) are the original's in either case.
    """

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.weight_v = nn.Parameter(torch.zeros(config.out_dim, config.head_bottleneck_dim))
        gain = torch.ones(config.out_dim, 1)
        if config.norm_last_layer:
            self.register_buffer("weight_g", gain)
        else:
            self.weight_g = nn.Parameter(gain)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight_g * nn.functional.normalize(self.weight_v, dim=-1))

    def extra_repr(self) -> str:
        out_dim, in_dim = self.weight_v.shape
        return f"{in_dim}, {out_dim}, frozen_gain={not isinstance(self.weight_g, nn.Parameter)}"


class DINOHead(nn.Module):
    """Projection head: an MLP, L2 normalisation, and one cosine similarity a prototype.

    Takes features (rows, in_dim) and returns logits (rows, out_dim). `vision_transformer.py` of the original.
    """

    def __init__(self, config: DINOConfig, in_dim: int):
        super().__init__()
        hidden_dims = [config.head_hidden_dim] * (config.head_num_layers - 1)
        layers = []
        for hidden_dim in hidden_dims:
            layers.append(nn.Linear(in_dim, hidden_dim))
            if config.use_bn_in_head:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            in_dim = hidden_dim
        self.mlp = nn.Sequential(*layers, nn.Linear(in_dim, config.head_bottleneck_dim))
        self.last_layer = DINOPrototypes(config)

    def forward(self, features: torch.Tensor, criterion: Callable | None = None):
        """With `criterion`, what it returns, of what the last layer is given, and of the last layer."""
        bottleneck = nn.functional.normalize(self.mlp(features), dim=-1)
        return self.last_layer(bottleneck) if criterion is None else criterion(bottleneck, self.last_layer)


class DINOClassifier(nn.Linear):
    """A linear layer of its own kind, because the paper starts classifiers smaller than the network's other layers."""


@auto_docstring
class DINOPreTrainedModel(PreTrainedModel):
    config: DINOConfig
    base_model_prefix = "dino"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DINOEmbeddings", "DINOLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DINOLayer, "attentions": DINOAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, DINOEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
            init.trunc_normal_(module.cls_token, std=std)
        elif isinstance(module, DINOClassifier):  # `eval_linear.py` of the original
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # PyTorch's default, which the original does not touch
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm1d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, DINOPrototypes):  # nn.Linear's default: |v| sets how fast a prototype turns
            init.kaiming_uniform_(module.weight_v, a=math.sqrt(5))
            init.ones_(module.weight_g)


@auto_docstring(custom_intro="Output of [`DINOModel`].")
@dataclass
class DINOModelOutput(BaseModelOutputWithPooling):
    r"""
    intermediate_layers (`tuple(torch.FloatTensor)`, *optional*, returned when `intermediate_layers` is given):
        Tokens after these blocks, in the order of the blocks, each of shape `(batch_size, sequence_length,
        hidden_size)`, without the final norm.
    """

    intermediate_layers: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(
    custom_intro="""
    The network that DINO trains, without a head: its Vision Transformer, which takes any image size that the patch
    size divides, or the network of `config.backbone_config`.
    """
)
class DINOModel(DINOPreTrainedModel):
    def __init__(self, config: DINOConfig):
        super().__init__(config)
        if config.backbone_config is None:
            depth = config.num_hidden_layers
            drop_probs = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
            self.embeddings = DINOEmbeddings(config)
            self.layers = nn.ModuleList([DINOLayer(config, drop_prob) for drop_prob in drop_probs])
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.backbone = build_network(config.backbone_config)
            self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.post_init()

    @property
    def num_features(self) -> int:
        """Width of `pooler_output`."""
        if self.config.backbone_config is None:
            return self.config.hidden_size
        return width_of_features(self.backbone)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(custom_args=_PIXEL_VALUES + _CLS_ONLY + _INTERMEDIATE_LAYERS)
    def forward(
        self,
        pixel_values: torch.Tensor,
        cls_only: bool = False,
        intermediate_layers: Collection[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DINOModelOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from transformers import AutoModel

        >>> model = AutoModel.from_pretrained("path/to/run", trust_remote_code=True)
        >>> output = model(torch.randn(1, 3, 224, 224))
        >>> output.pooler_output.shape  # CLS after the final norm
        torch.Size([1, 384])
        >>> output.last_hidden_state.shape  # CLS and 14 x 14 patches
        torch.Size([1, 197, 384])
        ```
        """
        for name in ("attention_mask", "head_mask", "bool_masked_pos"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} must be None: the network sees every patch of every image. Leave it out.")
        if self.config.backbone_config is not None:
            last_hidden_state, features = run_network(self.backbone, pixel_values, **kwargs)
            return DINOModelOutput(last_hidden_state=last_hidden_state, pooler_output=features)
        numbers = () if intermediate_layers is None else intermediate_layers
        hidden_states = self.embeddings(pixel_values)
        intermediate = [hidden_states] if 0 in numbers else []
        for number, layer in enumerate(self.layers, start=1):
            is_last = number == len(self.layers)
            hidden_states = layer(hidden_states, cls_only=cls_only and is_last, **kwargs)
            if number in numbers:
                intermediate.append(hidden_states)
        hidden_states = self.layernorm(hidden_states)  # (batch, 1 + patches, hidden)
        return DINOModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            intermediate_layers=None if intermediate_layers is None else tuple(intermediate),
        )

    def get_intermediate_layers(self, pixel_values: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        """Return the tokens (batch, 1 + patches, hidden) after each of the last `n` blocks and the final norm.

        Earliest block first. `get_intermediate_layers` of the original; `output_hidden_states=True` gives them without
        the norm.

        Raises:
            ValueError: if there are fewer than `n` blocks, or none as there is another network.
        """
        if self.config.backbone_config is not None:
            raise ValueError(f"{type(self.backbone).__name__} has no blocks of a Vision Transformer")
        num_layers = len(self.layers)
        if not 1 <= n <= num_layers:
            raise ValueError(f"n must be from 1 to the network's {num_layers} blocks, got {n}")
        output = self(pixel_values, intermediate_layers=range(num_layers - n + 1, num_layers + 1))
        return [self.layernorm(tokens) for tokens in output.intermediate_layers]


@auto_docstring(custom_intro="Output of [`DINOForPreTraining`].")
@dataclass
class DINOForPreTrainingOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor`, *optional*, returned when `criterion` is given):
        What `criterion` has returned.
    logits (`torch.FloatTensor` of shape `(num_crops * batch_size, out_dim)`, *optional*, not with `criterion`):
        One row a crop, in the order of the input: all images of the first crop, then all of the second, and so on.
    pooler_output (`torch.FloatTensor` of shape `(num_crops * batch_size, num_features)`):
        The backbone's features that the logits were computed from: CLS after the final norm, or the pooled map of a
        network without.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@auto_docstring(custom_intro="Backbone and projection head: student and teacher of DINO are two of these.")
class DINOForPreTraining(DINOPreTrainedModel):
    accepts_loss_kwargs = False  # of transformers' Trainer, which then divides the loss by accumulated batches

    def __init__(self, config: DINOConfig):
        super().__init__(config)
        self.dino = DINOModel(config)
        self.supports_gradient_checkpointing = self.dino.supports_gradient_checkpointing
        self.head = DINOHead(config, self.dino.num_features)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        criterion: Callable[[torch.Tensor, nn.Module], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DINOForPreTrainingOutput:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, or a list of them):
            A list holds one tensor a resolution, or one a crop; sizes may differ. Neighbours of equal height and width
            share a pass of the backbone, and all rows share one pass of the head.
        criterion (`Callable`, *optional*):
            A loss that is computed together with the last layer, so that logits never exist as a whole: a function of
            what the last layer is given, `(num_crops * batch_size, head_bottleneck_dim)`, and of the last layer, whose
            weights are `weight_v` and `weight_g`. What it returns is the output's `loss`.

        `output_hidden_states` and `output_attentions` are for crops of one height and width.

        Example:

        ```python
        >>> import torch
        >>> from modeling_dino import DINOConfig, DINOForPreTraining

        >>> model = DINOForPreTraining(DINOConfig(out_dim=4096))
        >>> globals_, locals_ = torch.randn(2 * 4, 3, 224, 224), torch.randn(8 * 4, 3, 96, 96)
        >>> model([globals_, locals_]).logits.shape  # crop-major: all images of a crop, then those of the next
        torch.Size([40, 4096])
        ```
        """
        crops = [pixel_values] if isinstance(pixel_values, torch.Tensor) else pixel_values
        resolutions: list[list[torch.Tensor]] = []
        for crop in crops:
            if resolutions and resolutions[-1][0].shape[-2:] == crop.shape[-2:]:
                resolutions[-1].append(crop)
            else:
                resolutions.append([crop])
        recorded = ("output_hidden_states", "output_attentions")
        is_recording = any(kwargs.get(name, getattr(self.config, name)) for name in recorded)
        if is_recording and len(resolutions) > 1:
            raise ValueError(
                f"{' and '.join(recorded)} are for crops of one size, got {len(resolutions)} sizes. Pass the crops of "
                "each size on their own."
            )
        outputs = [self.dino(torch.cat(group), cls_only=not is_recording, **kwargs) for group in resolutions]
        features = torch.cat([output.pooler_output for output in outputs])
        head_output = self.head(features, criterion)
        return DINOForPreTrainingOutput(
            loss=None if criterion is None else head_output,
            logits=head_output if criterion is None else None,
            pooler_output=features,
            hidden_states=outputs[0].hidden_states,
            attentions=outputs[0].attentions,
        )


@auto_docstring(
    custom_intro="""
    A linear classifier on DINO features: the paper's linear probe with `config.freeze_backbone`, fine-tuning without.
    It sees the CLS token of the last `config.n_last_blocks` blocks and, with `config.avgpool_patchtokens`, the mean of
    the last block's patch tokens; of another network by `config.backbone_config`, the pooled features.

    To thaw a frozen backbone, before an optimizer or a Trainer takes the parameters:

    ```python
    model.config.freeze_backbone = False
    model.dino.requires_grad_(True)
    model.train()
    ```
    """
)
class DINOForImageClassification(DINOPreTrainedModel):
    def __init__(self, config: DINOConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dino = DINOModel(config)
        self.supports_gradient_checkpointing = self.dino.supports_gradient_checkpointing
        num_features = self.dino.num_features
        if config.backbone_config is None:
            if config.n_last_blocks > config.num_hidden_layers:
                raise ValueError(
                    f"n_last_blocks must be at most the network's {config.num_hidden_layers} blocks, got "
                    f"{config.n_last_blocks}"
                )
            num_features *= config.n_last_blocks + config.avgpool_patchtokens
        self.classifier = DINOClassifier(num_features, config.num_labels)
        # without those that PEFT will add
        self.backbone_names = {name for name, _ in (*self.dino.named_modules(), *self.dino.named_parameters())}
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "DINOForImageClassification":
        """Set the mode of all modules but a frozen backbone's, which stay in evaluation mode, and frozen.

        `from_pretrained`, which makes every parameter trainable, ends here too. Adapters in a frozen backbone train,
        and gradient checkpointing saves their memory: transformers checkpoints blocks in training mode alone. So
        blocks follow `mode`. What is random in a block is a module inside, such as drop path, and stays off.
        """
        super().train(mode)
        if self.config.freeze_backbone:
            for name, module in self.dino.named_modules():
                if self._is_of_backbone(name) and not isinstance(module, GradientCheckpointingLayer):
                    module.training = False
            for name, parameter in self.dino.named_parameters():
                if self._is_of_backbone(name):
                    parameter.requires_grad_(False)
        return self

    def _is_of_backbone(self, name: str) -> bool:
        """Return whether a module or parameter is the backbone's own, also where PEFT or a compiler wraps it."""
        parts = [part for part in name.split(".") if part not in ("base_layer", "_orig_mod")]
        return ".".join(parts) in self.backbone_names

    def features(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the classifier sees of the tokens after the last `n_last_blocks` blocks, (batch, in_features).

        `eval_linear.py` of the original.
        """
        config = self.config
        layers = [self.dino.layernorm(tokens) for tokens in blocks]
        features = [tokens[:, 0] for tokens in layers]
        if config.avgpool_patchtokens:
            features.append(layers[-1][:, 1:].mean(1))
        if config.interleave_features:
            return torch.stack(features, dim=-1).flatten(1)  # cls_0, mean_0, cls_1, mean_1, ...
        return torch.cat(features, dim=-1)

    @can_return_tuple
    @auto_docstring(custom_args=_PIXEL_VALUES)
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_dino import DINOForImageClassification

        >>> model = DINOForImageClassification.from_pretrained("path/to/run", num_labels=10, freeze_backbone=True)
        >>> model(torch.randn(4, 3, 224, 224), labels=torch.tensor([0, 3, 9, 3])).loss.backward()
        ```
        """
        if self.config.backbone_config is None:
            last = range(self.config.num_hidden_layers + 1)[-self.config.n_last_blocks :]
            output = self.dino(pixel_values, intermediate_layers=last, **kwargs)
            features = self.features(output.intermediate_layers)
        else:
            output = self.dino(pixel_values, **kwargs)
            features = output.pooler_output
        logits = self.classifier(features)
        loss = None if labels is None else self.loss(labels, logits, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )

    def loss(
        self,
        labels: torch.Tensor,
        logits: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return the mean loss over the labels, a scalar: cross-entropy of classes, or by `config.problem_type`.

        transformers' Trainer gives the labels of all batches that it accumulates as `num_items_in_batch`, and sums
        the losses: each is then this batch's share.
        """
        loss = self.loss_function(labels, logits, self.config)
        if num_items_in_batch is None:
            return loss
        num_items = (
            (labels != -100).sum() if self.config.problem_type == "single_label_classification" else labels.numel()
        )
        return loss * num_items / num_items_in_batch


@auto_docstring(custom_intro="The DINO Vision Transformer as a backbone of dense heads (DETR, UperNet, ...).")
class DINOBackbone(BackboneMixin, DINOPreTrainedModel):
    def __init__(self, config: DINOConfig):
        super().__init__(config)
        if config.backbone_config is not None:
            raise ValueError(
                f"feature maps of a {config.backbone_config.model_type} are given by a backbone of its own"
            )
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.dino = DINOModel(config)
        self.supports_gradient_checkpointing = self.dino.supports_gradient_checkpointing
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=_PIXEL_VALUES)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_dino import DINOBackbone

        >>> model = DINOBackbone.from_pretrained("path/to/run", out_indices=[3, 6, 9, 12])
        >>> [feature_map.shape for feature_map in model(torch.randn(1, 3, 224, 224)).feature_maps][-1]
        torch.Size([1, 384, 14, 14])
        ```
        """
        stages = [number for number, name in enumerate(self.stage_names) if name in self.out_features]
        output = self.dino(pixel_values, intermediate_layers=stages, **kwargs)
        feature_maps = [self.dino.layernorm(tokens) for tokens in output.intermediate_layers]
        if self.config.reshape_hidden_states:
            grid = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
            # (batch, 1 + patches, hidden) -> (batch, hidden, height, width) of the grid of patches
            feature_maps = [tokens[:, 1:].transpose(1, 2).unflatten(2, grid) for tokens in feature_maps]
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=output.hidden_states, attentions=output.attentions
        )


__all__ = [
    "DINOBackbone",
    "DINOForImageClassification",
    "DINOForPreTraining",
    "DINOHead",
    "DINOModel",
    "DINOPreTrainedModel",
]
