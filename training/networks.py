"""The networks of a run, by its settings: a student with random weights, and its teacher."""

import copy
import difflib
import json
import logging
import re
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import CONFIG_MAPPING

from modeling_dino import DINOConfig, DINOForPreTraining
from modeling_dino.command_line import CONFIGS, find_config, meant, nearest, one_line
from modeling_dino.configuration_dino import VIT_FIELDS

from .arguments import FIELD_SYNONYMS, TrainingArguments
from .worker_memory import free_memory


MAX_LAYERS = 10_000

logger = logging.getLogger(__name__)


def load_config(args: TrainingArguments, saved: dict | None = None) -> DINOConfig:
    """Return the model's config: the JSON of --model_config with --config_overrides in it.

    If neither names an `image_size`, it is that of the weights to start from, or the size of the global crops.

    Args:
        args: The run's settings.
        saved: Fields of the config of the weights to start from, if there are any.

    Raises:
        ValueError: an unknown field (names the nearest one), a wrong type, or sizes that do not fit one another.
    """
    fields = read_fields(args.model_config)
    for override in args.config_overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"config_overrides must be written as field=value, got {override}")
        *parents, name = name.split(".")
        target = fields
        for parent in parents:  # of a name with dots, which lies deeper
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"config_overrides: {parent} has no fields, got {override}")
        try:
            target[name] = json.loads(value)
        except json.JSONDecodeError:
            target[name] = value  # a word
    allowed = DINOConfig().to_dict()
    for name in fields:
        if name not in allowed:
            raise ValueError(f"the model's config has no field {name}{meant(name, allowed, FIELD_SYNONYMS)}")
    check_depth(fields)
    is_vit = fields.get("backbone_config") is None
    if "image_size" not in fields:
        fields["image_size"] = saved["image_size"] if saved else args.global_crop_size
        patch_size = fields.get("patch_size", DINOConfig.patch_size)
        if is_vit and isinstance(patch_size, int) and patch_size > 0:  # else DINOConfig finds it
            check_crop_size("global_crop_size", args.global_crop_size, patch_size)
    try:
        config = DINOConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"model config: {error.__cause__ or error}") from error
    if is_vit:
        check_crop_size("global_crop_size", args.global_crop_size, config.patch_size)
        check_crop_size("local_crop_size", args.local_crop_size if args.num_local_crops else 0, config.patch_size)
    else:
        check_backbone_config(fields)
    for name in ("image_mean", "image_std"):
        if len(getattr(args, name)) not in (1, config.num_channels):
            raise ValueError(
                f"{name} must have one value or one for each of the {config.num_channels} channels, got "
                f"{' '.join(map(str, getattr(args, name)))}. Give --image_mean 0.5 --image_std 0.25"
            )
    return config


def check_crop_size(name: str, size: int, patch_size: int) -> None:
    if size % patch_size:
        raise ValueError(f"{name} must be a multiple of the patch size {patch_size}, got {size}")


def read_fields(name: str) -> dict:
    """Return the fields of --model_config: those of a JSON, or for `timm/NAME` a network of timm.

    Raises:
        ValueError: a name that is neither, answered with what would do; a file that is not such a JSON.
        ImportError: a network of timm, which is not installed.
    """
    if name.startswith("timm/") and not Path(name).exists():
        try:
            import timm
        except ImportError as error:
            raise ImportError(f"model_config {name} needs timm. Install it: pip install timm.") from error
        architecture = name.removeprefix("timm/")
        if not timm.is_model(architecture):
            known = timm.list_models()
            longer = sorted((each for each in known if architecture and each.startswith(architecture)), key=len)
            close = (longer + difflib.get_close_matches(architecture, known))[:3]
            answer = f" Did you mean {' or '.join(f'timm/{each}' for each in dict.fromkeys(close))}?" if close else ""
            raise ValueError(
                f"model_config must be a network of timm, got {name}.{answer} timm.list_models() lists them all."
            )
        return {"backbone_config": {"model_type": "timm_wrapper", "architecture": architecture}}
    try:
        path = find_config(name, CONFIGS / "models", ".json")
    except ValueError:
        raise ValueError(f"model_config: there is no file {name}. {_what_does(name)}") from None
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must map names of the config's fields to values, got a {type(fields).__name__}")
    return fields


def _what_does(name: str) -> str:
    """Answer a name that is not a config of ours but may be a network's elsewhere; the best answer comes first."""
    if Path(name).is_dir():
        return f"Give {Path(name) / 'config.json'}."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(".json"):
        return (
            f"To start from weights on the Hub: dino-convert {name} FOLDER, then --init_from FOLDER --model_config "
            "FOLDER/config.json."
        )
    ours = sorted(path.stem for path in (CONFIGS / "models").glob("*.json"))
    if same := [each for each in ours if each.startswith(f"{name}_")]:
        return f"Did you mean {' or '.join(same)}?"
    with suppress(ImportError):
        import timm

        if timm.is_model(name):
            return f"Did you mean timm/{name}?"
    if close := difflib.get_close_matches(name, ours, n=1, cutoff=0.85):  # a slip of the keyboard
        return f"Did you mean {close[0]}?"
    return f"Give timm/NAME for a network of timm, or one of {', '.join(ours)}."


def warn_of_image_size(config: DINOConfig, args: TrainingArguments, is_resumed: bool) -> None:
    """Warn if features will be taken of images of another size than the network is trained on."""
    if config.image_height_and_width == (args.global_crop_size,) * 2:
        return
    remedy = " Leave out image_size, and it follows the crops."
    if is_resumed:
        remedy = ""
    elif args.init_from:
        effect = "resamples the position embeddings" if config.backbone_config is None else "changes it"
        remedy = f" --config_overrides image_size={args.global_crop_size} {effect}."
    logger.warning(
        "image_size is %s and global_crop_size %s: k-NN and the image processor take the one size, and training the "
        "other, which costs accuracy.%s",
        config.image_size, args.global_crop_size, remedy,
    )  # fmt: skip


def check_depth(fields: dict) -> None:
    """Find numbers of layers whose names alone, which `DINOConfig` makes, would exhaust the memory."""
    for name in ("num_hidden_layers", "head_num_layers"):
        if isinstance(fields.get(name), int) and fields[name] > MAX_LAYERS:
            raise ValueError(f"{name} must be at most {MAX_LAYERS}, got {fields[name]}. Make the network smaller.")


def check_backbone_config(fields: dict) -> None:
    """Finds what `DINOConfig` lets through: names that the network of `fields["backbone_config"]` does not have."""
    for name in VIT_FIELDS:
        if name in fields:
            raise ValueError(f"{name} is a field of the Vision Transformer, and there is a backbone_config")
    given = fields["backbone_config"]
    allowed = CONFIG_MAPPING[given["model_type"]]().to_dict()
    for name in given:
        if name not in allowed:
            raise ValueError(f"the config of a {given['model_type']} has no field {name}{nearest(name, allowed)}")


def make_student(config: DINOConfig, args: TrainingArguments) -> DINOForPreTraining:
    """A network with random weights. One of `config.backbone_config` is tried on crops first, as any may be given.

    Parameters that its loss does not need, such as a mask token, are frozen: processes would wait for their gradients.

    Raises:
        ValueError: a network that cannot be built, or does not take the crops.
    """
    if config.backbone_config is None:
        try:
            needed, free = 2 * _least_bytes(config), free_memory()
            if needed > free:  # the kernel would kill the process
                raise ValueError(
                    "model_config and config_overrides ask for more memory than there is: student and teacher take "
                    f"{needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are free. Make the network smaller."
                )
            return DINOForPreTraining(config)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # sizes that no memory holds
            raise ValueError(
                f"model_config and config_overrides ask for more memory than there is: {one_line(error)}"
            ) from error
    try:
        student = DINOForPreTraining(config)
        sizes = [args.global_crop_size] + [args.local_crop_size] * (args.num_local_crops > 0)
        trial = copy.deepcopy(student)
        with torch.random.fork_rng(devices=[]):
            trial([torch.randn(2, config.num_channels, size, size) for size in sizes]).logits.sum().backward()
    except ImportError:  # timm is missing, or does not know the architecture
        raise
    except Exception as error:  # of a library's network with settings that only it knows
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the {config.backbone_config.model_type} of backbone_config cannot be trained on these crops: "
            f"{type(error).__name__}: {reason}"
        ) from error
    for parameter, tried in zip(student.parameters(), trial.parameters(), strict=True):
        parameter.requires_grad_(tried.grad is not None)
    return student


def _least_bytes(config: DINOConfig) -> float:
    """Bytes of a Vision Transformer's and its head's large matrices in fp32; all else comes on top."""
    hidden, head = config.hidden_size, config.head_hidden_dim
    backbone = config.num_hidden_layers * (4 + 2 * config.mlp_ratio) * hidden**2
    hidden_layers = max(config.head_num_layers - 2, 0) * head**2
    return 4 * (backbone + hidden_layers + config.out_dim * config.head_bottleneck_dim)


def make_teacher(student: DINOForPreTraining) -> DINOForPreTraining:
    """A copy with the student's weights that is never trained, and drops nothing.

    Its batch norms stay in training mode, like the original's, and so normalise by the batch.
    """
    config = copy.deepcopy(student.config)
    config.drop_path_rate = 0.0
    teacher = DINOForPreTraining(config)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    return teacher
