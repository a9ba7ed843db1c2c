"""Any vision model of transformers or timm, and what its outputs mean: pooled features, patches, blocks.

Beside Hub ids and folders, `untrained:M` is the network of M with random weights and `raw_pixels:M` no network at all,
but what the image processor of M makes of an image: what a comparison starts from.
"""

import contextlib
import hashlib
import inspect
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperImageProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from modeling_dino import DINOConfig, DINOModel  # which makes AutoModel know DINO
from modeling_dino.command_line import check_files, one_line
from modeling_dino.image_processing_dino import (
    PILLOW_MODES,
    DINOImageProcessor,
    make_image_processor,
    parse_value_range,
    scale_values,
)

from .decoding import Reading
from .images import is_path


# the models of transformers whose `pooler_output` comes from a layer that DINO does not have and nobody trained
_WITH_UNTRAINED_POOLER = ("vit", "deit")
_WITHOUT_WEIGHTS = ("untrained:", "raw_pixels:")  # what may stand before a name


class RawPixels(torch.nn.Module):
    """No network at all, in the shape of one: what the pixels alone are worth."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, num_channels: int):
        super().__init__()
        self.config = DINOConfig(num_channels=num_channels)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values)


@lru_cache(maxsize=1)  # a protocol asks for it again with every split
def load_model(
    name: str,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[str, ...] | None = None,
) -> tuple[PreTrainedModel | RawPixels, object]:
    """A backbone and its image processor in evaluation mode on this process's device.

    The processor is the Pillow one, to the pixel what torchvision's transforms on PIL images are, where Pillow knows
    the number of channels.

    Args:
        name: Hub id or folder; `untrained:` or `raw_pixels:` may stand before it.
        image_size: Side of the images that the processor makes, by the paper's transform (shorter side to 8/7 of it,
            bicubic, centre crop). Default: whatever the model's own processor does.
        dtype: Of the weights.
        value_range: What the processor makes 0 and 1, see `scale_values`. Default: what the processor says.

    Raises:
        ValueError: a path that is no folder; a file that is missing or damaged, or that asks for more memory than
            there is; weights of other shapes than the model's; a checkpoint that lacks weights of the model, other
            than a stock ViT's pooler, which nothing uses.
    """
    kind, source = _kind_and_source(name)
    check_files(Path(source))
    with _named_errors(source, "config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        channels = num_channels(config)
    with _named_errors(source, "preprocessor_config.json"):
        backend = "pil" if channels in PILLOW_MODES else "torchvision"
        processor = AutoImageProcessor.from_pretrained(source, backend=backend, trust_remote_code=False)
        mean_and_std(processor, channels)
        to_pixel_values(processor, [np.zeros((channels, 64, 64), np.uint8)])
    if not kind:
        model, info = load_weights(AutoModel, source, dtype=dtype, trust_remote_code=False)
        missing = sorted(info["missing_keys"])
        if model.config.model_type in _WITH_UNTRAINED_POOLER:
            missing = [key for key in missing if not key.startswith("pooler.")]
        if missing:
            raise ValueError(f"{source} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    else:
        set_seed(0)
        with _named_errors(source, "config.json"):
            is_raw = kind == "raw_pixels:"
            model = RawPixels(channels) if is_raw else AutoModel.from_config(config, dtype=dtype)
    network = getattr(model, "timm_model", None)
    if getattr(network, "pos_embed", None) is not None and hasattr(network, "dynamic_img_size"):
        # as that option of the constructor does, which networks without it do not know
        from timm.layers import Format

        network.dynamic_img_size, embedding = True, network.patch_embed
        embedding.strict_img_size, embedding.flatten, embedding.output_fmt = False, False, Format.NHWC
    model.eval().to(PartialState().device)
    if image_size is not None:
        mean, std = (values.flatten().tolist() for values in mean_and_std(processor, channels))
        is_scientific = isinstance(processor, DINOImageProcessor)
        own = processor.value_range if is_scientific else None
        processor = make_image_processor(image_size, channels, mean, std, value_range=own, is_deep=is_scientific)
    if value_range is not None:
        processor = scaling(processor, channels, value_range)
    return model, processor


def scaling(image_processor, num_channels: int, value_range: Sequence[str] | None = None) -> DINOImageProcessor:
    """The same image processor for images of any values, see `scale_values`.

    Raises:
        ValueError: a timm model's, whose transforms are for 8 bits.
    """
    if isinstance(image_processor, TimmWrapperImageProcessor):
        raise ValueError("timm's image processors take images of 8 bits a channel. Convert the images, or the model.")
    mean, std = (values.flatten().tolist() for values in mean_and_std(image_processor, num_channels))
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "default_to_square", "keep_aspect_ratio")
    fields = {name: value for name, value in image_processor.to_dict().items() if name in names}
    return DINOImageProcessor(parse_value_range(value_range), image_mean=mean, image_std=std, **fields)


def reading_of(args: Namespace, model: PreTrainedModel | RawPixels) -> Reading:
    """How a command reads images for a model."""
    return Reading(
        num_channels(model.config), args.background, args.tiff_pages, args.max_image_pixels, args.allow_unread
    )


def load_weights(model_class, source: str, **options) -> tuple[PreTrainedModel, dict]:
    """What `model_class.from_pretrained` gives for a folder or Hub id, and what transformers says of its weights.

    Raises:
        ValueError: a file that is missing, damaged or asks for too much memory, or weights of other shapes; names it.
    """
    _check_headers(Path(source))
    with _named_errors(source, _weights_file(source)), _quiet():
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"the weight {key} of {source} has the shape {tuple(found)}, and config.json asks for "
            f"{tuple(expected)}. Copy or convert config.json and weights again, together."
        )
    return model, info


@contextlib.contextmanager
def _named_errors(source: str, file: str) -> Iterator[None]:
    """Context manager in which what libraries raise becomes a ValueError that names the file of a model."""
    try:
        yield
    except ImportError:  # an extra that is missing
        raise
    except Exception as error:
        path, is_local = Path(source) / file, Path(source).is_dir()
        if not is_local and (problem := _hub_problem(error, file)):
            raise ValueError(f"model must be a folder or a Hub id, got {source}, {problem}") from error
        if not is_local and isinstance(error, (OSError, ValueError)):  # which name the model
            raise
        reason = one_line(error)
        if is_local and not path.exists():
            problem = "is missing"
        elif is_local and path.suffix == ".json" and not _is_json_object(path):
            problem = "is not a JSON object"
        elif isinstance(error, MemoryError) or re.search("alloc|out of memory|Storage size|overflow", reason):
            path = path if path.suffix == ".json" else Path(source) / "config.json"
            problem = "asks for more memory than there is"
        elif isinstance(error, pickle.UnpicklingError):
            problem = "is not a PyTorch file of weights"
        else:
            problem = f"cannot be used: {reason.rstrip('.')}"
        raise ValueError(f"{path} {problem}. Copy, download or convert the model again.") from error


def _hub_problem(error: BaseException, file: str) -> str | None:
    """Return why the Hub did not give a file of a model, and what to do; None for any other error."""
    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def is_any(*kinds: type) -> bool:
        return any(isinstance(one, kinds) for one in causes)

    if is_any(HFValidationError):
        return "which is neither. Check the name."
    if is_any(GatedRepoError):
        return "which is gated. Ask for access on its page, and log in with `hf auth login`."
    if is_any(RepositoryNotFoundError):
        return "which is not on the Hub, or is private. Check the name, or log in with `hf auth login`."
    if is_any(LocalEntryNotFoundError, OfflineModeIsEnabled):
        if is_offline_mode():
            return "which is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or give a folder."
        return "which is not in the cache, and the Hub cannot be reached. Check the connection, or give a folder."
    if is_any(EntryNotFoundError) or (isinstance(error, OSError) and file == "preprocessor_config.json"):
        return f"which has no {file}. Choose another model, or give a folder with this file."
    return None


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


def _weights_file(source: str) -> str:
    """The name of the first file of weights, as far as a folder has one."""
    names = sorted(path.name for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin"))
    return names[0] if names else "model.safetensors"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager in which transformers prints no report of weights, of which errors tell."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_headers(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}. Copy, download or convert the model again.") from error


def _kind_and_source(name: str) -> tuple[str, str]:
    """What stands before the name of a model, and the name."""
    kind = next((kind for kind in _WITHOUT_WEIGHTS if name.startswith(kind)), "")
    source = name.removeprefix(kind)
    if is_path(source) and not Path(source).expanduser().is_dir():
        raise ValueError(f"there is no folder {source} with a model")
    return kind, str(Path(source).expanduser()) if is_path(source) else source


def revision_of(name: str) -> str | None:
    """Return the commit of a Hub id, or the hash of a folder's JSON files and, where they count, weights."""
    kind, source = _kind_and_source(name)
    suffixes = (".json",) if kind else (".json", ".safetensors", ".bin")
    if not Path(source).is_dir():
        return Path(cached_file(source, "config.json")).parent.name  # snapshots/COMMIT/config.json
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(source).iterdir() if path.suffix in suffixes):
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def describe_model(model: PreTrainedModel | RawPixels, name: str) -> dict:
    """What a report says of a model: its name, the commit of the Hub or the hash of the weights' files, its size."""
    return {
        "name": name,
        "revision": revision_of(name),
        "class": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def num_channels(config: PreTrainedConfig) -> int:
    """Channels of the images that a network takes."""
    return (config.model_args or {}).get("in_chans", 3) if config.model_type == "timm_wrapper" else config.num_channels


def mean_and_std(image_processor, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an image processor normalises by, each (channels, 1, 1), for pixels in [0, 1]."""
    if isinstance(image_processor, TimmWrapperImageProcessor):
        values = image_processor.data_config["mean"], image_processor.data_config["std"]
    elif image_processor.do_normalize:
        values = image_processor.image_mean, image_processor.image_std
    else:
        values = [0.0], [1.0]
    return tuple(torch.as_tensor(value).float().view(-1, 1, 1).expand(num_channels, 1, 1) for value in values)


def to_values(image_processor, pixels: np.ndarray) -> np.ndarray:
    """Pixels (channels, height, width) in uint8 as they are; what an image processor scales, in fp32 from 0 to 1."""
    if isinstance(image_processor, DINOImageProcessor):
        return scale_values(pixels, image_processor.value_range)
    return pixels if pixels.dtype == np.uint8 else scale_values(pixels)


def to_pixel_values(image_processor, images: list[np.ndarray]) -> torch.Tensor:
    """Images (channels, height, width) -> a batch, as the image processor makes it."""
    is_scaling = isinstance(image_processor, DINOImageProcessor)
    if not is_scaling and any(image.dtype != np.uint8 for image in images):
        if len(images) > 1:  # one by one, so that none depends on what else is in its batch
            return torch.cat([to_pixel_values(image_processor, [image]) for image in images])
        image_processor = scaling(image_processor, len(images[0]))
    if isinstance(image_processor, TimmWrapperImageProcessor):
        images = [image.transpose(1, 2, 0).squeeze() for image in images]
        return image_processor(images, return_tensors="pt")["pixel_values"]
    return image_processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]


def run_model(model: PreTrainedModel, pixel_values: torch.Tensor, **kwargs):
    """The output of a forward pass, at any size of image for which a network can place its position embeddings."""
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    with taking(pixel_values):
        return model(pixel_values.to(model.device, model.dtype, non_blocking=True), **kwargs)


@contextlib.contextmanager
def taking(pixel_values: torch.Tensor) -> Iterator[None]:
    """Of timm's networks, those that do not take images of such a size say it by an assertion; here, a ValueError."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"the model does not take images of {tuple(pixel_values.shape[-2:])}: {error}") from error


def pooled(model: PreTrainedModel, output) -> torch.Tensor:
    """The image's feature in a backbone's output: CLS after the final norm, or the pooled map of a network without."""
    if model.config.model_type in _WITH_UNTRAINED_POOLER or output.get("pooler_output") is None:
        return output.last_hidden_state[:, 0]
    return output.pooler_output.flatten(1)


def network_of(model: PreTrainedModel) -> PreTrainedModel:
    """The library's network inside one of ours that wraps it."""
    return model.backbone if model.config.model_type == "dino" and model.config.backbone_config is not None else model


def patch_size(model: PreTrainedModel) -> int:
    """Side of a Vision Transformer's patches in pixels, which has to divide the images' sides; 1 of other networks."""
    network = network_of(model)
    if network.config.model_type == "timm_wrapper":
        embedding = getattr(network.timm_model, "patch_embed", None)
        size = getattr(embedding, "patch_size", 1)
    else:
        size = getattr(network.config, "patch_size", 1)
    return size if isinstance(size, int) else size[0]


def num_blocks(model: PreTrainedModel) -> int | None:
    """Blocks of a Vision Transformer of transformers, timm or ours; None of other networks."""
    network = network_of(model)
    blocks = getattr(getattr(network, "timm_model", None), "blocks", None)
    if blocks is not None:
        return len(blocks)
    return getattr(network.config, "num_hidden_layers", None)


class Tokens(NamedTuple):
    """What a block puts out, after the final norm.

    pooled: (batch, hidden), the CLS token, or the pooled map.
    patches: (batch, rows, columns, hidden), without register and distillation tokens.
    """

    pooled: torch.Tensor
    patches: torch.Tensor


def tokens(model: PreTrainedModel, pixel_values: torch.Tensor, n: int = 1) -> list[Tokens]:
    """What the last `n` blocks put out, earliest first, each after the final norm.

    Args:
        model: A Vision Transformer of transformers or timm, or, for n = 1, a network whose output is a map.
        pixel_values: (batch, channels, height, width).
        n: Number of blocks.

    Raises:
        ValueError: a network without so many blocks, or whose output has neither one token a patch nor a map.
    """
    network = network_of(model)
    if isinstance(model, DINOModel) and network is model:
        blocks = model.get_intermediate_layers(pixel_values.to(model.device, model.dtype), n)
        return [_split_tokens(model, block, block[:, 0], pixel_values) for block in blocks]
    if n > 1 and hasattr(getattr(network, "timm_model", None), "get_intermediate_layers"):
        pixel_values = pixel_values.to(model.device, model.dtype)
        blocks = network.timm_model.get_intermediate_layers(pixel_values, n, return_prefix_tokens=True, norm=True)
        return [_split_tokens(network, patches, prefix[:, 0], pixel_values) for patches, prefix in blocks]
    output = run_model(model, pixel_values, **({} if n == 1 else {"output_hidden_states": True}))
    last = _split_tokens(network, output.last_hidden_state, pooled(model, output), pixel_values)
    if n == 1:
        return [last]
    norm = getattr(network, "layernorm", getattr(network, "norm", None))
    if norm is None or output.last_hidden_state.ndim != 3 or len(output.hidden_states) <= n:
        raise ValueError(
            f"n_last_blocks must be 1 for a {type(network).__name__}, which has no {n} last blocks, got {n}. Give "
            "--n_last_blocks 1."
        )
    earlier = [norm(hidden_states) for hidden_states in output.hidden_states[-n:-1]]
    return [_split_tokens(network, block, block[:, 0], pixel_values) for block in earlier] + [last]


def _split_tokens(
    network: PreTrainedModel, output: torch.Tensor, pooled: torch.Tensor, pixel_values: torch.Tensor
) -> Tokens:
    if output.ndim == 4:  # (batch, hidden, rows, columns)
        return Tokens(pooled, output.permute(0, 2, 3, 1))
    rows, columns = grid(network, pixel_values)
    if output.ndim != 3 or not rows * columns <= output.shape[1] <= rows * columns + 16:
        height, width = pixel_values.shape[-2:]
        raise ValueError(
            f"a {type(network).__name__} has an output of shape {tuple(output.shape)} for images of {height}x{width}, "
            "and neither a token for each patch nor a map"
        )
    return Tokens(pooled, output[:, -rows * columns :].unflatten(1, (rows, columns)))  # other tokens lie before them


def grid(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the patches that a Vision Transformer sees in images."""
    height, width = (side // patch_size(model) for side in pixel_values.shape[-2:])
    return height, width
