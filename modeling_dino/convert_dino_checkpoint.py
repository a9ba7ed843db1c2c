"""`dino-convert SOURCE OUTPUT`: every DINO network that has been published -> ours, and ours -> theirs.

In: the original's `.pth` files (a backbone: Vision Transformer, ResNet or XCiT; a whole training checkpoint; a linear
classifier beside its backbone), a stock ViT of transformers, timm's `.dino` models, our own folders. Out: our folder,
a stock ViT that needs no code of ours, a `.pth` in the original's names, or ONNX. Weights are moved, never changed:
there and back again is byte-equal, but that half precision becomes single.
"""

import argparse
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ViTConfig, ViTImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from .checkpoint_names import State, join, original_names, split, stock_vit_names
from .command_line import Parser, check_files, one_line, run_process
from .configuration_dino import DINOConfig
from .export_onnx import save_as_onnx
from .image_processing_dino import DINOPillowImageProcessor, make_image_processor
from .modeling_dino import DINOForImageClassification, DINOForPreTraining, DINOModel, DINOPreTrainedModel
from .original_training import Progress, read_progress, training_entries


@dataclass
class Source:
    """What was read: networks in our names (`backbone`, or `student` and `teacher` of a training) and their config."""

    config: DINOConfig
    networks: dict[str, State]
    center: torch.Tensor | None = None
    image_processor: object | None = None
    progress: Progress | None = None  # of a checkpoint of a run


def read_pickle(path: Path) -> object:
    """A `.pth` file, without running any code that it may hold.

    Raises:
        ValueError: a file that would run code, or that is none of PyTorch's.
    """
    # what the original's checkpoints hold beside tensors: their arguments, and numbers of numpy's
    scalar = np.float64(0).__reduce__()[0]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed = [argparse.Namespace, np.dtype, *names, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # says nothing that the error does not
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, and whatever else damaged bytes lead to
        if isinstance(error, OSError) and error.filename:  # the file itself cannot be opened
            raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise ValueError(f"{path} is refused: reading it would call {found[1]}, and so run code") from error
        raise ValueError(f"{path} is no file of PyTorch's, or none that can be read without running code") from error


@contextmanager
def _damage_named(source: str) -> Iterator[None]:
    """Context manager in which errors of fields and tensors of another kind than expected name the source."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, StrictDataclassError,
            TypeError) as error:  # fmt: skip
        raise ValueError(
            f"{source} is damaged, or not a network of DINO ({type(error).__name__}: {one_line(error)}). Copy or "
            "download it again."
        ) from error


def read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors: {error}") from error


def _check_state(path: Path, state: object) -> None:
    """Raise a ValueError unless a state dict maps names to tensors."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} must hold names and tensors, got {_kind(state)}. Save the network's state_dict.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path} must hold names and tensors, got {_kind(tensor)} for {name}. Save the network's state_dict."
            )


def _kind(value: object) -> str:
    return "nothing" if isinstance(value, dict) else f"a {type(value).__name__}"


def _check_there(network: str, backbone: State, *needed: str) -> None:
    if missing := [name for name in needed if name not in backbone]:
        raise ValueError(
            f"no network of DINO's: of its {network}, there is no {', '.join(missing)}; the keys begin with "
            f"{', '.join(list(backbone)[:3])}"
        )


def _vit_fields(backbone: State, num_attention_heads: int | None) -> dict:
    """The config of the original's Vision Transformer. Only the heads do not show in shapes."""
    _check_there("Vision Transformer", backbone, "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    position, patch = backbone["pos_embed"], backbone["patch_embed.proj.weight"]
    hidden_size = position.shape[-1]
    if num_attention_heads is None:
        if hidden_size % 64:
            raise ValueError(f"give --num_attention_heads: the width {hidden_size} is not made of heads of 64")
        num_attention_heads = hidden_size // 64
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": len({name.split(".")[1] for name in backbone if name.startswith("blocks.")}),
        "num_attention_heads": num_attention_heads,
        "mlp_ratio": backbone["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "qkv_bias": "blocks.0.attn.qkv.bias" in backbone,
        "num_channels": patch.shape[1],
        "patch_size": patch.shape[-1],
        "image_size": round((position.shape[1] - 1) ** 0.5) * patch.shape[-1],
    }


def _resnet_fields(backbone: State) -> dict:
    """The config of one of torchvision's ResNets."""
    stages = sorted({name.split(".")[0] for name in backbone if re.match(r"layer\d+\.", name)})
    blocks = [{name.split(".")[1] for name in backbone if name.startswith(f"{stage}.")} for stage in stages]
    last = "conv3" if "layer1.0.conv3.weight" in backbone else "conv2"
    _check_there("ResNet", backbone, "conv1.weight", *(f"{stage}.0.{last}.weight" for stage in stages))
    num_channels = backbone["conv1.weight"].shape[1]
    resnet = {
        "model_type": "resnet",
        "num_channels": num_channels,
        "embedding_size": backbone["conv1.weight"].shape[0],
        "hidden_sizes": [backbone[f"{stage}.0.{last}.weight"].shape[0] for stage in stages],
        "depths": [len(of_stage) for of_stage in blocks],
        "layer_type": "bottleneck" if last == "conv3" else "basic",
    }
    return {"backbone_config": resnet, "num_channels": num_channels}


def _xcit_fields(backbone: State) -> dict:
    """The config of one of the original's XCiTs, which timm has too."""
    _check_there("XCiT", backbone, "cls_token", "patch_embed.proj.0.0.weight")
    width = backbone["cls_token"].shape[-1]
    depth = len({name.split(".")[1] for name in backbone if name.startswith("blocks.")})
    halvings = len({name.split(".")[2] for name in backbone if re.match(r"patch_embed\.proj\.\d+\.0\.weight", name)})
    names = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
    if width not in names:
        raise ValueError(f"there is no XCiT of width {width}; allowed are {', '.join(map(str, names))}")
    architecture = f"xcit_{names[width]}_{depth}_p{2**halvings}_224"
    num_channels = backbone["patch_embed.proj.0.0.weight"].shape[1]
    xcit = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": {}}
    if num_channels != 3:
        xcit["model_args"]["in_chans"] = num_channels
    return {"backbone_config": xcit, "num_channels": num_channels}


def _head_fields(head: State, norm_last_layer: bool | None) -> dict:
    if not {"last_layer.weight_v", "last_layer.weight_g"} <= head.keys():
        raise ValueError(f"no head of DINO's: its last layer has {', '.join(k for k in head if 'last_layer' in k)}")
    linear = [tensor for name, tensor in head.items() if name.startswith("mlp.") and tensor.ndim == 2]
    if norm_last_layer is None:
        norm_last_layer = bool((head["last_layer.weight_g"] == 1).all())
    return {
        "head_num_layers": len(linear),
        "head_hidden_dim": linear[0].shape[0],
        "head_bottleneck_dim": linear[-1].shape[0],
        "out_dim": head["last_layer.weight_v"].shape[0],
        "use_bn_in_head": "mlp.1.running_mean" in head,
        "norm_last_layer": norm_last_layer,
    }


def _read_network(
    state: State, num_attention_heads: int | None, drop_path_rate: float = 0.0, norm_last_layer: bool | None = None
) -> tuple[DINOConfig, State]:
    """A network in the original's names, with or without a head, wrapped by DDP or not -> its config and our names."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    head = {name.removeprefix("head."): tensor for name, tensor in state.items() if name.startswith("head.")}
    for old, new in (("original0", "weight_g"), ("original1", "weight_v")):  # the names of torch's newer weight norm
        if f"last_layer.parametrizations.weight.{old}" in head:
            head[f"last_layer.{new}"] = head.pop(f"last_layer.parametrizations.weight.{old}")
    if "last_layer.weight" in head:  # without weight norm, as in some releases: direction and length of each row
        head["last_layer.weight_v"] = weight = head.pop("last_layer.weight")
        head["last_layer.weight_g"] = weight.norm(dim=1, keepdim=True)
    backbone = {
        name.removeprefix("backbone."): tensor for name, tensor in state.items() if not name.startswith("head.")
    }
    if "cls_attn_blocks.0.norm1.weight" in backbone:
        fields = _xcit_fields(backbone)
        fields["backbone_config"]["model_args"] |= {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    elif "layer1.0.conv1.weight" in backbone:
        fields = _resnet_fields(backbone)
    else:
        fields = _vit_fields(backbone, num_attention_heads) | {"drop_path_rate": drop_path_rate}
    config = DINOConfig(**fields, **(_head_fields(head, norm_last_layer) if head else {}))
    if "cls_attn_blocks.0.attn.q.weight" in backbone:  # timm's own XCiT
        backbone = {f"backbone.timm_model.{name}": tensor for name, tensor in backbone.items()}
    else:
        backbone = split(backbone, original_names(config))
    if not head:
        return config, backbone
    return config, {f"dino.{name}": tensor for name, tensor in backbone.items()} | {
        f"head.{name}": tensor for name, tensor in head.items()
    }


def read_original(path: Path, key: str | None = None, num_attention_heads: int | None = None) -> Source:
    """A `.pth` of the original: a backbone, or a training checkpoint, of which `key` takes one backbone alone."""
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no dictionary of tensors")
    if "state_dict" in content:
        raise ValueError(f"{path} is a linear classifier: convert its backbone, with --linear {path}")
    if not {"student", "teacher"} & content.keys():
        if key is not None:
            raise ValueError(f"--key {key} is for training checkpoints, and {path} is a backbone")
        _check_state(path, content)
        config, network = _read_network(content, num_attention_heads)
        return Source(config, {"backbone": network})
    wanted = ["student", "teacher"] if key is None else [key]
    if absent := [name for name in wanted if name not in content]:
        there = " and ".join(name for name in ("student", "teacher") if name in content)
        raise ValueError(f"{path} has no {absent[0]}, but a {there}: give --key {there}")
    for name in wanted:
        _check_state(path, content[name])
    if key is not None:
        state = {name.removeprefix("module."): tensor for name, tensor in content[key].items()}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        config, network = _read_network(state, num_attention_heads)
        return Source(config, {"backbone": network})
    given = vars(content["args"]) if "args" in content else {}
    fields = {"drop_path_rate": float(given["drop_path_rate"])} if "drop_path_rate" in given else {}
    if "norm_last_layer" in given and "module.head.last_layer.weight_g" in content["student"]:
        fields["norm_last_layer"] = bool(given["norm_last_layer"])
    networks = {}
    for name in ("student", "teacher"):
        config, networks[name] = _read_network(content[name], num_attention_heads, **fields)
    center = content["dino_loss"]["center"] if "dino_loss" in content else None
    return Source(config, networks, center)


def _read_vit(folder: Path, config: dict) -> Source:
    state = {name.removeprefix("vit."): tensor for name, tensor in _read_folder(folder).items()}
    # a stock ViT comes with a pooler that DINO does not have, and that nothing trained
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    vit = ViTConfig(**config)
    ours = DINOConfig(
        hidden_size=vit.hidden_size,
        num_hidden_layers=vit.num_hidden_layers,
        num_attention_heads=vit.num_attention_heads,
        mlp_ratio=vit.intermediate_size / vit.hidden_size,
        qkv_bias=vit.qkv_bias,
        num_channels=vit.num_channels,
        patch_size=vit.patch_size,
        image_size=vit.image_size,
        hidden_act=vit.hidden_act,
        # facebook/dino-* say 1e-12, which is ViTConfig's default, and were trained with 1e-6
        layer_norm_eps=1e-6 if vit.layer_norm_eps == 1e-12 else vit.layer_norm_eps,
    )
    processor = _image_processor(folder)
    # that of facebook/dino-* squeezes images into a square, where the original crops
    kept = processor if processor is not None and processor.do_center_crop else None
    return Source(ours, {"backbone": join(state, stock_vit_names(ours))}, image_processor=kept)


def _image_processor(folder: Path):
    return AutoImageProcessor.from_pretrained(folder) if (folder / "preprocessor_config.json").is_file() else None


def _read_folder(folder: Path) -> State:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_safetensors(folder / name) if name.endswith("safetensors") else read_pickle(folder / name)
    raise ValueError(f"there are no weights in {folder}: looked for model.safetensors and pytorch_model.bin")


def _read_ours(folder: Path) -> State:
    state, config = _read_folder(folder), DINOConfig.from_pretrained(folder)
    if config.backbone_config is None:
        return state
    # files of some networks have older names, which `from_pretrained` knows
    model, found = _class_of(state).from_pretrained(folder, output_loading_info=True)
    unexpected = {name: state[name] for name in found["unexpected_keys"]}
    return {k: v for k, v in model.state_dict().items() if k not in found["missing_keys"]} | unexpected


def _class_of(state: State) -> type[DINOPreTrainedModel]:
    if any(name.startswith("classifier.") for name in state):
        return DINOForImageClassification
    return DINOForPreTraining if any(name.startswith("head.") for name in state) else DINOModel


def read(source: str, key: str | None = None, num_attention_heads: int | None = None) -> Source:
    """Whatever `dino-convert` takes: a file, a folder, or a Hub id.

    Raises:
        ValueError: nothing there, or nothing that is DINO's.
    """
    path = Path(source).expanduser()
    for part in (path, path / "student", path / "teacher"):
        check_files(part)
    if path.is_file():
        return read_original(path, key, num_attention_heads)
    if not path.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix in (".pth", ".safetensors"):
            raise ValueError(f"there is no file or folder {source}")
        path = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "pytorch_model.bin"]))
    if (path / "student").is_dir() and (path / "teacher").is_dir():
        return _read_training_folder(path, key)
    if key is not None:
        raise ValueError(f"--key {key} is for training checkpoints, and {source} is one model")
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{source} must hold a config.json, or student and teacher, got neither. Give a model, or a checkpoint of "
            "a run, such as checkpoints/step_0000100."
        )
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:  # of JSON, or UTF-8
        raise ValueError(f"{path / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} must be a JSON object, got a {type(config).__name__}")
    if config.get("model_type") == "vit":
        return _read_vit(path, config)
    if config.get("model_type") == "dino":
        return Source(DINOConfig.from_pretrained(path), {"backbone": _read_ours(path)}, None, _image_processor(path))
    if "architecture" in config:  # timm's, which has the original's names
        config, network = _read_network(_read_folder(path), num_attention_heads)
        return Source(config, {"backbone": network})
    raise ValueError(
        f"{source} is a {config.get('model_type')}; allowed are dino, vit, and timm's Vision Transformers, "
        "ResNets and XCiTs"
    )


def _read_training_folder(folder: Path, key: str | None) -> Source:
    """A checkpoint of ours, or what was made of one of the original's."""
    networks = {name: _read_ours(folder / name) for name in ("student", "teacher")}
    processor = _image_processor(folder / "teacher")
    if key is not None:
        return Source(
            DINOConfig.from_pretrained(folder / key), {"backbone": _only_backbone(networks[key])}, None, processor
        )
    path = folder / "state.pt"
    if not path.is_file() and (folder / "manifest.json").is_file():
        raise ValueError(f"{path} is missing. Choose another checkpoint of the run.")
    state = read_pickle(path) if path.is_file() else {}
    config, progress = DINOConfig.from_pretrained(folder / "student"), read_progress(folder, state)
    return Source(config, networks, state.get("center"), processor, progress)


def _only_backbone(state: State) -> State:
    """Without a head or classifier that may be on it."""
    if not any(name.startswith("dino.") for name in state):
        return state
    return {name.removeprefix("dino."): tensor for name, tensor in state.items() if name.startswith("dino.")}


def add_linear(source: Source, path: Path, n_last_blocks: int | None, avgpool_patchtokens: bool) -> None:
    """Put a classifier of the original's `eval_linear.py` on the backbone of `source`, and print what it takes.

    The width tells from how many last blocks it takes CLS. With the mean of the last block's patches, the original
    takes one block, and CLS and mean alternate channel by channel. A width of two blocks on ViT-B is read so, as in
    the released classifiers, unless `n_last_blocks` is given. The mean beside several blocks, which the original
    cannot train, follows them.

    Raises:
        ValueError: a file without a linear classifier, or one of another width.
    """
    check_files(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is no linear classifier of the original: it has no state_dict")
    _check_state(path, content["state_dict"])
    state = {
        name.removeprefix("module.").replace("linear.", "classifier."): tensor
        for name, tensor in content["state_dict"].items()
    }
    if state.keys() != {"classifier.weight", "classifier.bias"} or state["classifier.weight"].ndim != 2:
        raise ValueError(f"{path} is no linear classifier of the original: it has {', '.join(content['state_dict'])}")
    config, backbone = source.config, _only_backbone(source.networks["backbone"])
    source.networks["backbone"] = {f"dino.{name}": tensor for name, tensor in backbone.items()} | state
    config.num_labels, width = state["classifier.weight"].shape
    if config.backbone_config is not None:  # of its pooled features; another width shows as misshapen
        if n_last_blocks is not None or avgpool_patchtokens:
            network = config.backbone_config.model_type
            raise ValueError(
                f"n_last_blocks and avgpool_patchtokens are for Vision Transformers, got a {network}. Leave them out."
            )
        print("the classifier takes the network's pooled features")
        return
    blocks, rest = divmod(width, config.hidden_size)
    if rest or not blocks:
        raise ValueError(f"{path} takes features of width {width}, no multiple of the backbone's {config.hidden_size}")
    guessed_base = n_last_blocks is None and config.hidden_size == 768 and blocks == 2
    pooled = avgpool_patchtokens or guessed_base
    if blocks == pooled:
        raise ValueError(
            f"the width of features must be at least {2 * width} with avgpool_patchtokens, got {width} in {path}. "
            "Leave --avgpool_patchtokens out."
        )
    if n_last_blocks not in (None, blocks - pooled):
        mean = ", one of them the mean of patches" if pooled else ""
        raise ValueError(
            f"n_last_blocks must be {blocks - pooled} for features of width {width}{mean}, got {n_last_blocks}. Leave "
            "it out."
        )
    n_last_blocks = blocks - pooled
    config.n_last_blocks, config.avgpool_patchtokens = n_last_blocks, pooled
    config.interleave_features = pooled and n_last_blocks == 1
    if config.interleave_features:
        print("the classifier takes CLS of the last block and the mean of its patches, alternating channel by channel")
    else:
        which = "block" if n_last_blocks == 1 else f"{n_last_blocks} blocks, one after another"
        mean = ", then the mean of the last block's patches" if pooled else ""
        print(f"the classifier takes CLS of the last {which}{mean}")


def build(config: DINOConfig, state: State, allow_partial: bool = False) -> DINOPreTrainedModel:
    """The model of ours that `state` is of, with its weights.

    Raises:
        ValueError: lists all keys that are missing, unexpected or of another shape, unless `allow_partial`.
    """
    model = _class_of(state)(config)
    expected = model.state_dict()
    shared = expected.keys() & state.keys()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": sorted(name for name in shared if expected[name].shape != state[name].shape),
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        if not allow_partial:
            raise ValueError(f"the weights do not fit {type(model).__name__}: {told} (--allow_partial takes the rest)")
        print(f"{told}\nthese stay random: {', '.join(problems['missing'] + problems['misshapen']) or 'none'}")
    fitting = {name: state[name] for name in shared if name not in problems["misshapen"]}
    model.load_state_dict(fitting, strict=False)
    return model.eval()


def save_as_vit(backbone: DINOModel, output: Path) -> None:
    """As a stock `ViTModel` without a pooler, whose outputs at its own image size are the same."""
    config, state = backbone.config, split(backbone.state_dict(), stock_vit_names(backbone.config))
    vit = ViTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=int(config.hidden_size * config.mlp_ratio),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        qkv_bias=config.qkv_bias,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        architectures=["ViTModel"],
    )
    vit.save_pretrained(output)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})


def in_original_names(model: DINOForPreTraining) -> State:
    """Return the tensors of backbone and head by the original's names, `backbone.*` and `head.*`."""
    state = {f"backbone.{key}": tensor for key, tensor in _in_original_names(model.dino).items()}
    return state | {f"head.{key}": tensor for key, tensor in model.head.state_dict().items()}


def _in_original_names(backbone: DINOModel) -> State:
    network, state = backbone.config.backbone_config, join(backbone.state_dict(), original_names(backbone.config))
    if network is not None:  # the names say nothing of what is computed, such as where a ResNet strides
        fields = _resnet_fields(state) if network.model_type == "resnet" else _xcit_fields(state)
        theirs = DINOConfig(**fields).backbone_config.to_dict()
        differing = [
            name for name, value in _computing(network.to_dict()).items() if value != _computing(theirs)[name]
        ]
        if differing:
            raise ValueError(f"the original has no {network.model_type} with this {', '.join(differing)}")
    return state


def _computing(fields: dict) -> dict:
    """Of a network's config, what changes its output."""
    rest = {"_name_or_path", "architectures", "dtype", "transformers_version", "out_features", "out_indices"}
    fields = {name: value for name, value in fields.items() if name not in rest}
    arguments = fields.get("model_args") or {}
    return fields | {"model_args": {k: v for k, v in arguments.items() if k != "drop_path_rate"}}


def save_as_original(models: dict[str, DINOModel | DINOForPreTraining], source: Source, output: Path) -> None:
    """Save a `.pth` that the original's scripts read.

    Of a backbone, its weights. Of a training, student, teacher and center, and of a checkpoint of a run all that the
    original's `main_dino.py` resumes from.
    """
    if "backbone" in models:
        torch.save(_in_original_names(models["backbone"]), output)
        return
    content = {}
    for name, model in models.items():
        state = in_original_names(model)
        # the original wraps the teacher by DDP only if it has batch norms
        wrapped = name == "student" or any(key.endswith("running_mean") for key in state)
        content[name] = {f"module.{key}": tensor for key, tensor in state.items()} if wrapped else state
    if source.center is not None:
        content["dino_loss"] = {"center": source.center}
    if source.progress is not None:
        content |= training_entries(source.progress, models["student"])
    torch.save(content, output)


def convert(
    source: str,
    output: str,
    to: str = "dino",
    key: str | None = None,
    linear: str | None = None,
    n_last_blocks: int | None = None,
    avgpool_patchtokens: bool = False,
    num_attention_heads: int | None = None,
    dynamic_image_size: bool = False,
    allow_partial: bool = False,
) -> Path:
    """Converts a checkpoint; returns where it was written.

    Args:
        source: A `.pth` of the original, a folder or Hub id of ours, of a stock ViT or of timm.
        output: A folder, or a file for `to="original"` (`.pth`) and `to="onnx"`. Nothing may be there yet.
        to: `dino` (ours), `vit` (a stock `ViTModel`), `original` or `onnx`.
        key: `teacher` or `student`: this backbone alone of a training checkpoint. Default: both networks, with heads
            and center, which a training starts from; a checkpoint of ours to `original` also with the state of the
            optimizer and of fp16's scaler, and the number of epochs, from which its `main_dino.py` resumes.
        linear: A linear classifier of the original that belongs to the backbone.
        n_last_blocks: From how many last blocks `linear` takes CLS. Default: as its width tells.
        avgpool_patchtokens: Whether `linear` takes the mean of the last block's patches too, alternating with CLS
            channel by channel if that is of one block, else after it.
        num_attention_heads: If heads are not 64 wide.
        dynamic_image_size: Whether ONNX takes images of any size, instead of the network's own.
        allow_partial: Takes weights that do not fit for what fits of them.

    Raises:
        ValueError: what cannot be read, or does not fit.
    """
    path, to_file = Path(output).expanduser(), to in ("original", "onnx")
    if path.is_file() or (path.is_dir() and (to_file or any(path.iterdir()))):
        raise ValueError(f"{output} is there already; give another {'file' if to_file else 'folder'} to write")
    if dynamic_image_size and to != "onnx":
        raise ValueError("--dynamic_image_size is for --to onnx; all others take any image size")
    if linear is None and (n_last_blocks is not None or avgpool_patchtokens):
        raise ValueError("n_last_blocks and avgpool_patchtokens are of a classifier. Give it by --linear.")
    with _damage_named(source):
        read_source = read(source, key, num_attention_heads)
    if linear is not None:
        if "backbone" not in read_source.networks:
            raise ValueError("--linear needs a backbone: give --key teacher")
        with _damage_named(linear):
            add_linear(read_source, Path(linear).expanduser(), n_last_blocks, avgpool_patchtokens)
    if to in ("vit", "onnx") and "backbone" not in read_source.networks:
        raise ValueError(f"--to {to} needs a backbone: give --key teacher")
    with _damage_named(source):
        models = {
            name: build(read_source.config, state, allow_partial) for name, state in read_source.networks.items()
        }
    kept = (DINOModel, DINOForImageClassification) if to == "onnx" else DINOModel
    if to != "dino" and "backbone" in models and not isinstance(models["backbone"], kept):
        print(f"of {type(models['backbone']).__name__}, the backbone is converted; the rest has no place in --to {to}")
        models["backbone"] = models["backbone"].dino
    path.parent.mkdir(parents=True, exist_ok=True)
    if to == "original":
        with _damage_named(source):
            save_as_original(models, read_source, path)
        return path
    if to == "onnx":
        difference = save_as_onnx(models["backbone"], path, dynamic_image_size)
        print(f"outputs of onnxruntime are within {difference:.1e} of PyTorch's")
        return path
    processor = read_source.image_processor
    if processor is None and read_source.config.num_channels == 3:
        processor = make_image_processor(read_source.config.image_size, read_source.config.num_channels)
    elif processor is None:  # whose mean nobody knows
        processor = make_image_processor(read_source.config.image_size, read_source.config.num_channels, [0.5], [0.5])
        print("the image processor has mean and std 0.5: set those that the network was trained with")
    for name, model in models.items():
        folder = path if name == "backbone" else path / name
        if to == "vit":
            save_as_vit(model, folder)
            if isinstance(processor, DINOPillowImageProcessor):  # then the one that needs no code of ours
                ours = ("auto_map", "keep_aspect_ratio")
                fields = {name: value for name, value in processor.to_dict().items() if name not in ours}
                if processor.keep_aspect_ratio:
                    print("the stock image processor stretches images to the aspect ratio of the network's image_size")
                processor = ViTImageProcessorPil.from_dict(fields)
        else:
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
    if read_source.center is not None:
        torch.save({"center": read_source.center}, path / "state.pt")
    return path


def convert_from_command_line(argv: list[str]) -> None:
    parser = Parser(prog="dino-convert", description="Convert DINO's networks, from and to all that holds them.")
    parser.add_argument("source", help=".pth of the original; folder or Hub id of ours, a stock ViT, or timm")
    parser.add_argument("output", help="folder to write; .pth or .onnx file with --to original or onnx")
    parser.add_argument(
        "--to",
        choices=["dino", "vit", "original", "onnx"],
        default="dino",
        help="format to write. dino: our folder; vit: a stock ViTModel; original: a .pth of the original, of a "
        "checkpoint of a run all that its main_dino.py resumes from (networks, heads, center, optimizer, fp16's "
        "scaler, epoch); onnx. Default: %(default)s",
    )
    parser.add_argument("--key", choices=["teacher", "student"], help="this backbone alone of a training checkpoint")
    parser.add_argument("--linear", help=".pth of the original's linear classifier for this backbone")
    parser.add_argument(
        "--n_last_blocks",
        type=int,
        help="number of last blocks whose CLS tokens --linear takes, one after another. Default: as its width tells",
    )
    parser.add_argument(
        "--avgpool_patchtokens",
        action="store_true",
        help="mean of the last block's patches as input of --linear too: alternating with CLS channel by channel if "
        "that is of one block, as in the original, else after it. Default: for ViT-B, as its width tells",
    )
    parser.add_argument("--num_attention_heads", type=int, help="if heads are not 64 wide")
    parser.add_argument("--dynamic_image_size", action="store_true", help="with --to onnx, take images of any size")
    parser.add_argument("--allow_partial", action="store_true", help="take what fits, and say what stays random")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    options = vars(parser.parse_args(argv))
    options.pop("debug")
    disable_progress_bar()
    print(f"wrote {convert(**options)}")


def main() -> None:
    run_process("dino-convert", convert_from_command_line)


if __name__ == "__main__":
    main()
