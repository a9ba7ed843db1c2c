"""The settings of a run and how they are read: defaults, then the YAML of --config, then flags."""

import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

import yaml
from accelerate.utils import is_tensorboard_available
from transformers.hf_argparser import HfArg, HfArgumentParser

from evaluation.decoding import MAX_IMAGE_PIXELS, Reading
from evaluation.workers import MAX_WORKERS
from modeling_dino import DINOConfig
from modeling_dino.command_line import CONFIGS, OneLineErrors, find_config, meant, nearest, short_in_notebooks

from .augmentation import AugmentationArguments


_PROCESSES = "Processes are the launcher's: accelerate launch --num_processes N -m training ..."
_PRECISION = "Precision is the launcher's: accelerate launch --mixed_precision bf16 -m training ..."
_SLURM = "Options of Slurm are for sbatch: see configs/slurm/train.sbatch."
# names of fields of the model's config elsewhere, and here
FIELD_SYNONYMS = {
    "embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    "img_size": "image_size", "in_chans": "num_channels", "input_channels": "num_channels",
    "drop_path": "drop_path_rate", "nlayers": "head_num_layers", "hidden_dim": "head_hidden_dim",
    "bottleneck_dim": "head_bottleneck_dim", "output_dim": "out_dim", "num_prototypes": "out_dim",
    "use_bn": "use_bn_in_head",
}  # fmt: skip
# names of settings elsewhere (the reference implementation, lightly-train, timm, scripts of transformers), and here
SYNONYMS = {
    field: f"{name} is a field of the model's config. Give --config_overrides {name}=VALUE."
    for field, name in ({name: name for name in DINOConfig().to_dict()} | FIELD_SYNONYMS).items()
} | {
    "lr": "base_learning_rate", "learning_rate": "base_learning_rate", "blr": "base_learning_rate",
    "lr_base": "base_learning_rate", "min_lr": "min_learning_rate", "warmup_lr_epochs": "warmup_epochs",
    "warmup_steps": "warmup_epochs", "num_warmup_steps": "warmup_epochs", "warmup_ratio": "warmup_epochs",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "max_epochs": "num_train_epochs",
    "steps": "max_steps", "max_train_steps": "max_steps", "num_steps": "max_steps",
    "num_train_steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "batch_size_per_gpu": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size",
    "per_gpu_batch_size": "per_device_train_batch_size", "validation_batch_size": "per_device_eval_batch_size",
    "accumulate_grad_batches": "gradient_accumulation_steps", "grad_accum_steps": "gradient_accumulation_steps",
    "accum_iter": "gradient_accumulation_steps", "grad_checkpointing": "gradient_checkpointing",
    "max_grad_norm": "clip_grad", "gradient_clip_val": "clip_grad", "opt": "optimizer", "optim": "optimizer",
    "wd": "weight_decay", "freeze_last_layer": "freeze_last_layer_epochs", "student_temperature": "student_temp",
    "teacher_temperature": "teacher_temp", "warmup_teacher_temperature": "warmup_teacher_temp",
    "teacher_momentum": "momentum_teacher", "model_ema_decay": "momentum_teacher", "ema_decay": "momentum_teacher",
    "ema": "momentum_teacher",
    "arch": "model_config", "model": "model_config", "backbone": "model_config", "model_name": "model_config",
    "config_name": "model_config", "config_name_or_path": "model_config", "model_type": "model_config",
    "model_name_or_path": "init_from", "pretrained_weights": "init_from", "pretrained": "init_from",
    "initial_checkpoint": "init_from", "weights": "init_from", "checkpoint": "init_from", "load_from": "init_from",
    "data": "dataset_name", "data_path": "dataset_name", "data_dir": "dataset_name", "dataset": "dataset_name",
    "train_dir": "dataset_name", "images": "dataset_name", "image_column_name": "image_column",
    "label_column_name": "label_column", "input_key": "image_column", "target_key": "label_column",
    "out": "output_dir", "output": "output_dir", "overwrite": "overwrite_output_dir",
    "resume_interrupted": "resume_from_checkpoint", "ckpt_path": "resume_from_checkpoint",
    "saveckp_freq": "save_steps", "checkpointing_steps": "save_steps", "save_every": "save_steps",
    "save_freq": "save_steps", "checkpoint_hist": "save_total_limit", "log_interval": "logging_steps",
    "log_every": "logging_steps", "log_freq": "logging_steps", "knn_every": "eval_steps", "eval_freq": "eval_steps",
    "val_freq": "eval_steps", "workers": "num_workers", "dataloader_num_workers": "num_workers",
    "num_data_workers": "num_workers", "img_size": "global_crop_size", "image_size": "global_crop_size",
    "input_size": "global_crop_size", "crop_size": "global_crop_size", "resolution": "global_crop_size",
    "global_crops_size": "global_crop_size", "local_crops_size": "local_crop_size",
    "local_crops_number": "num_local_crops", "crop_pct": "eval_crop_pct", "hflip": "flip_probability",
    "color_jitter_prob": "jitter_probability", "color_jitter": "brightness",
    "grayscale_prob": "grayscale_probability", "gaussian_blur_prob": "blur_probability",
    "solarize_prob": "solarize_probability", "mean": "image_mean", "std": "image_std", "loggers": "report_to",
    "with_tracking": "report_to", "log_wandb": "report_to", "log_with": "report_to", "repo_id": "hub_model_id",
    **dict.fromkeys(["dist_url", "local_rank", "ngpus", "gpus", "num_gpus", "nodes", "num_nodes", "devices",
                     "accelerator", "strategy", "world_size", "num_processes", "device"], _PROCESSES),
    **dict.fromkeys(["use_fp16", "fp16", "bf16", "amp", "amp_dtype", "use_amp", "precision", "mixed_precision",
                     "fp16_precision"], _PRECISION),
    **dict.fromkeys(["timeout", "partition", "use_volta32", "comment"], _SLURM),
    **dict.fromkeys(["torchcompile", "torch_compile", "compile"],
                    "Compile by the launcher: accelerate launch --dynamo_backend inductor "
                    "--dynamo_use_regional_compilation -m training ..."),
}  # fmt: skip


@dataclass
class TrainingArguments(AugmentationArguments):
    """Settings of a training run, beside those of the augmentation. Defaults are the original's `main_dino.py`."""

    origins: ClassVar[dict[str, str]] = {}  # of settings that a command line gave: "flag", or its recipe's name

    dataset_name: str | None = HfArg(
        default=None,
        help="Hub id or path: a folder of images, parquet, Arrow or tar files, or what save_to_disk wrote. Required.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of a data set that has several.")
    train_split: str = HfArg(default="train", help="Split to train on.")
    image_column: str | None = HfArg(default=None, help="Column of the images; found by itself when there is one.")
    folder_layout: Literal["auto", "splits", "classes"] = HfArg(
        default="auto",
        help="What the folders at the top of a folder of images are: splits, or classes of one split `train`. "
        "Default: by their names.",
    )
    allow_unread: bool = HfArg(
        default=False, help="Train even if more than a tenth of a folder's image files is not read."
    )
    tiff_pages: Literal["channels", "images", "first"] | None = HfArg(
        default=None,
        help="What the pages of a TIFF are: channels of one image, images of their own, or the first alone. Default: "
        "TIFFs of several pages are skipped.",
    )
    background: str = HfArg(
        default="white", help="Color that transparent images are put on; alpha is kept with num_channels=4."
    )
    max_image_pixels: int = HfArg(default=MAX_IMAGE_PIXELS, help="Pixels above which an image is skipped.")
    mix_with: list[str] = HfArg(
        default_factory=list,
        help="More data sets to train on, as ids or paths, each with one column of images; k-NN is of dataset_name.",
    )
    mix_weights: list[float] = HfArg(
        default_factory=list,
        help="Share of the images that come from dataset_name and each of mix_with. Default: every image once, for "
        "which streams must know how many they have.",
    )
    streaming: bool = HfArg(default=False, help="Read the data while training, without preparing it first.")
    stream_timeout: float = HfArg(
        default=1800.0,
        help="Seconds without an image from a stream, while the network is tried again and again, before the run "
        "writes a checkpoint and stops.",
    )
    num_examples: int | None = HfArg(default=None, help="Images per epoch; for streams, which do not know it.")
    max_skipped_fraction: float = HfArg(
        default=0.01, help="Broken images are skipped; a larger share of them stops the run, after 1000 images."
    )
    num_workers: int = HfArg(
        default_factory=lambda: min(8, os.cpu_count() or 1),
        help="Worker processes per process that decode and crop. Default: 8, or as many as there are cores.",
    )

    model_config: str = HfArg(
        default="vit_small_patch16", help="JSON of a DINOConfig: a path, or a name in configs/models."
    )
    config_overrides: list[str] = HfArg(
        default_factory=list,
        help="Fields of the model's config to change, as out_dim=4096 norm_last_layer=false; on top of the recipe's.",
    )

    init_from: str | None = HfArg(
        default=None,
        help="Weights to start from: a checkpoint or what dino-convert wrote (both networks and centre), or a model.",
    )

    freeze_backbone_steps: int | None = HfArg(
        default=None,
        help="Steps at the start in which only the heads learn. Default: an epoch if --init_from has no heads, or 0.",
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="Compute the student's blocks twice instead of keeping what they computed: less memory."
    )
    tf32: bool = HfArg(
        default=False, help="Let NVIDIA GPUs round what they multiply in fp32 to TF32: faster, and less exact."
    )

    num_train_epochs: int = HfArg(default=100, help="Epochs to train.")
    max_steps: int | None = HfArg(default=None, help="Steps to train, instead of num_train_epochs.")
    per_device_train_batch_size: int = HfArg(default=64, help="Images per process and batch.")
    gradient_accumulation_steps: int = HfArg(
        default=1, help="Batches of a process that make one step; centre and teacher move once a step."
    )
    optimizer: Literal["adamw", "sgd", "lars"] = HfArg(
        default="adamw", help="AdamW, or with momentum 0.9 SGD, or LARS for large batches of convolutional networks."
    )
    base_learning_rate: float = HfArg(
        default=5e-4, help="Peak learning rate per 256 images; scaled by the batch of all processes."
    )
    min_learning_rate: float = HfArg(default=1e-6, help="Learning rate at the end; not scaled by the batch.")
    warmup_epochs: float = HfArg(default=10, help="Epochs of linear learning rate warm-up.")
    layer_decay: float = HfArg(
        default=1.0,
        help="Learning rate of a Vision Transformer's block over that of the block after it; of the last one, over "
        "that of the head. Below 1 to start from trained weights.",
    )
    patch_embed_lr_multiplier: float = HfArg(
        default=1.0, help="Factor of a Vision Transformer's patch projection's learning rate, beside layer_decay."
    )
    weight_decay: float = HfArg(default=0.04, help="Weight decay at the start.")
    weight_decay_end: float = HfArg(default=0.4, help="Weight decay at the end, reached by a cosine.")
    clip_grad: float = HfArg(default=3.0, help="Largest norm of each parameter's gradient; 0 does not clip.")
    freeze_last_layer_epochs: int = HfArg(default=1, help="Epochs in which the prototypes stay as they are.")
    student_temp: float = HfArg(default=0.1, help="Temperature of the student.")
    teacher_temp: float = HfArg(default=0.04, help="Temperature of the teacher after its warm-up.")
    warmup_teacher_temp: float = HfArg(default=0.04, help="Temperature of the teacher at the start.")
    warmup_teacher_temp_epochs: int = HfArg(default=0, help="Epochs from the one temperature to the other.")
    momentum_teacher: float = HfArg(
        default=0.996, help="Momentum of the teacher at the start; a cosine takes it to 1."
    )
    center_momentum: float = HfArg(default=0.9, help="Momentum of the centre.")
    centering: Literal["ema", "sinkhorn_knopp"] = HfArg(
        default="ema",
        help="What keeps the teacher from collapse: its moving centre, or Sinkhorn-Knopp, which balances the "
        "prototypes over each batch of all processes; accumulated batches one by one.",
    )
    koleo_weight: float = HfArg(
        default=0.0,
        help="Weight of KoLeo, which spreads the student's features of each global crop over a process's batch; "
        "DINOv2 has 0.1. What is logged as the loss is without it.",
    )

    output_dir: str | None = HfArg(default=None, help="Where the model, metrics.jsonl and checkpoints go. Required.")
    overwrite_output_dir: bool = HfArg(default=False, help="Start anew in an output_dir that holds another run.")
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="A checkpoint folder to go on from, or `latest` for the last whole one in output_dir; if there is none "
        "yet, the run starts anew.",
    )
    resume: Literal["may", "must"] = HfArg(
        default="may", help="Whether `latest` may start anew, or must find a checkpoint."
    )
    allow_changed: list[str] = HfArg(
        default_factory=list,
        help="Settings that may differ from those of the checkpoint that the run resumes from; `data` for the images.",
    )
    save_steps: int | None = HfArg(
        default=None,
        help="Steps between checkpoints; 0 writes one at the end alone, or when the run is told to stop. Default: an "
        "epoch.",
    )
    save_total_limit: int = HfArg(default=2, help="Checkpoints to keep.")
    logging_steps: int = HfArg(default=10, help="Steps between lines of metrics.jsonl.")
    stop_on_collapse: bool = HfArg(
        default=False,
        help="End the run, with code 2 and without another checkpoint, once its metrics say that it is stuck at "
        "uniform, collapsing to one output or diverging.",
    )
    eval_steps: int | None = HfArg(
        default=None, help="Steps between k-NN evaluations; needs labels. 0 switches them off. Default: off."
    )
    eval_split: str | None = HfArg(
        default=None,
        help="Split whose images k-NN classifies by those of the train split. Default: test, else validation; if "
        "there is no other split, each image by the others.",
    )
    label_column: str | None = HfArg(default=None, help="Column of the labels; found by itself when there is one.")
    eval_crop_pct: float = HfArg(
        default=0.875, help="Side of the centre crop over the resized image's shorter side, in the image processor."
    )
    max_eval_samples: int | None = HfArg(default=None, help="Use this many images of each split in k-NN at most.")
    per_device_eval_batch_size: int = HfArg(default=128, help="Images per forward pass in k-NN.")
    report_to: list[str] = HfArg(
        default_factory=lambda: ["tensorboard"] if is_tensorboard_available() else [],
        help="Trackers of Accelerate that get the metrics, such as tensorboard, wandb or trackio; `none` for none. "
        "Default: tensorboard, if it is installed.",
    )
    seed: int = HfArg(default=0, help="Seed of everything random.")
    dry_run: bool = HfArg(
        default=False, help="Print settings, schedule, parameters and memory of the run instead of starting it."
    )
    dry_run_processes: int | None = HfArg(
        default=None, help="With dry_run, processes of the machine that the run is meant for. Default: those started."
    )
    push_to_hub: bool = HfArg(default=False, help="Upload the finished run, without its checkpoints, to the Hub.")
    hub_model_id: str | None = HfArg(default=None, help="Name on the Hub, as user/model.")
    hub_private_repo: bool = HfArg(default=False, help="Make the repository private, if it is new.")

    @short_in_notebooks()
    def __post_init__(self):
        super().__post_init__()
        for name in ("dataset_name", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be given")
        names = [field.name for field in dataclasses.fields(self)]
        if self.dry_run_processes and not self.dry_run:
            raise ValueError(f"dry_run_processes is for --dry_run alone, got {self.dry_run_processes}. Add --dry_run.")
        for name in self.allow_changed:
            if name not in (*names, "data", "mixed_precision"):  # the images themselves; the launcher's
                raise ValueError(f"allow_changed: there is no setting {name}{nearest(name, names)}")
        for field in dataclasses.fields(self):
            allowed, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in (*allowed, field.default):
                raise ValueError(f"{field.name} must be {' or '.join(allowed)}, got {value}")
        self.reading(1)
        if "" in self.mix_with:
            raise ValueError(f"mix_with must be names or paths of data sets, got {self.mix_with}")
        if self.mix_weights and not self.mix_with:
            raise ValueError(f"mix_weights are of several data sets, and mix_with names none; got {self.mix_weights}")
        if self.mix_weights and len(self.mix_weights) != 1 + len(self.mix_with):
            raise ValueError(
                f"mix_weights must be {1 + len(self.mix_with)} numbers, for dataset_name and each of mix_with, got "
                f"{self.mix_weights}"
            )
        if not all(0 < weight < math.inf for weight in self.mix_weights):
            raise ValueError(f"mix_weights must be above 0 and finite, got {self.mix_weights}")
        if not 0 < self.stream_timeout <= 1e6:
            raise ValueError(f"stream_timeout must be above 0 and at most 1e6 seconds, got {self.stream_timeout}")
        for name in ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
                     "num_examples", "save_total_limit", "logging_steps", "max_eval_samples",
                     "per_device_eval_batch_size", "dry_run_processes"):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_workers", "save_steps", "eval_steps", "freeze_backbone_steps", "warmup_epochs",
                     "freeze_last_layer_epochs", "warmup_teacher_temp_epochs", "seed", "weight_decay",
                     "weight_decay_end", "clip_grad", "base_learning_rate", "min_learning_rate",
                     "patch_embed_lr_multiplier", "koleo_weight"):  # fmt: skip
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:  # so that nan is none
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.num_workers > MAX_WORKERS:
            raise ValueError(f"num_workers must be at most {MAX_WORKERS}, got {self.num_workers}")
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("momentum_teacher", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.koleo_weight and self.per_device_train_batch_size < 2:
            raise ValueError(
                "koleo_weight needs neighbours: per_device_train_batch_size must be at least 2, got "
                f"{self.per_device_train_batch_size}"
            )
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"max_skipped_fraction must be between 0 and 1, got {self.max_skipped_fraction}")
        if not 0.1 <= self.eval_crop_pct <= 1:  # of which images are resized to 10 times the network's size
            raise ValueError(f"eval_crop_pct must be between 0.1 and 1, got {self.eval_crop_pct}")

    def reading(self, num_channels: int) -> Reading:
        """How images are read for a network that takes `num_channels`."""
        return Reading(num_channels, self.background, self.tiff_pages, self.max_image_pixels, self.allow_unread)


def find_unusual(args: TrainingArguments) -> list[str]:
    """Return a warning for each setting that is allowed but hardly meant."""
    warnings = []
    for name in ("teacher_temp", "warmup_teacher_temp"):
        if getattr(args, name) > args.student_temp:
            warnings.append(
                f"{name} should be at most student_temp = {args.student_temp:g}, got {getattr(args, name):g}. "
                "Targets that are softer than the student's output can lead to collapse."
            )
    if args.num_local_crops:
        if args.local_crop_size > args.global_crop_size:
            warnings.append(
                f"local_crop_size should be at most global_crop_size = {args.global_crop_size}, got "
                f"{args.local_crop_size}. Local crops are the smaller ones."
            )
        local, largest = args.local_crops_scale[1], args.global_crops_scale[1]
        if local > largest:
            warnings.append(
                f"local_crops_scale should end at most at {largest:g}, where global_crops_scale ends, got {local:g}. "
                "Local crops show less of an image."
            )
    return warnings


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text, unless there is none or the text says it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_said = action.default in (None, []) or "Default:" in action.help or "Required." in action.help
        return action.help if is_said else super()._get_help_string(action)


class _TrainingParser(OneLineErrors, HfArgumentParser):
    synonyms = SYNONYMS


def _yaml_flags(path: Path) -> list[str]:
    """A recipe as flags, so that one parser checks both."""
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must map names of settings to values, got a {type(recipe).__name__}")
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    lists = [field.name for field in dataclasses.fields(TrainingArguments) if get_origin(field.type) is list]
    flags = []
    for key, value in recipe.items():
        if key not in names:
            raise ValueError(f"{path}: there is no setting {key}{meant(str(key), names, SYNONYMS)}")
        if value is None or (key == "config_overrides" and not value):
            continue
        if key == "config_overrides" and isinstance(value, dict):
            value = [f"{name}={json.dumps(item)}" for name, item in value.items()]
        if isinstance(value, dict) or (isinstance(value, list) and key not in lists):
            raise ValueError(f"{path}: {key} must be one value, got {value}")
        values = value if isinstance(value, list) else [value]
        flags += [f"--{key}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return flags


def parse_arguments(argv: list[str], prog: str = "dino-train") -> TrainingArguments:
    """Settings from a command line. `--config FILE` names a YAML of the same settings, which flags override.

    `origins` of what is returned says of every setting that was given whether a flag or the recipe did.

    Raises:
        ValueError: an unknown YAML key (names the nearest one) or a value that is not allowed.
        SystemExit: with code 2 and one line on stderr, for an unknown flag or a value of the wrong type.
    """
    description = "Pretrain a vision model by DINO on unlabelled images."
    parser = _TrainingParser(
        TrainingArguments, prog=prog, description=description, allow_abbrev=False, formatter_class=_Help
    )
    parser.add_argument("--config", help="YAML of settings: a path, or a name in configs.")
    parser.add_argument("--debug", action="store_true", help="Show a traceback instead of one line.")
    given, _ = parser.parse_known_args(argv)
    origins = dict.fromkeys(_named(parser, argv), "flag")
    if given.config is not None:
        path = find_config(given.config, CONFIGS, ".yaml")
        recipe = _yaml_flags(path)
        parser.prog = f"{prog}: {path}"
        recipe_overrides = parser.parse_known_args(recipe)[0].config_overrides  # reports a wrong value with the file
        parser.prog = prog
        origins = dict.fromkeys(_named(parser, recipe), path.name) | origins
        argv = recipe + argv
    namespace = vars(parser.parse_args(argv))
    if given.config is not None and given.config_overrides:
        overrides = {}
        for override in recipe_overrides + given.config_overrides:  # the last of a field counts
            field = override.partition("=")[:2]
            overrides.pop(field, None)
            overrides[field] = override
        namespace["config_overrides"] = [*overrides.values()]
        if recipe_overrides:
            origins["config_overrides"] = f"{path.name}, flag"
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    args = TrainingArguments(**{name: namespace[name] for name in names})
    args.origins = {name: origins[name] for name in names if name in origins}
    return args


def _named(parser: _TrainingParser, argv: list[str]) -> set[str]:
    """Settings that a command line names, which the parser has found right."""
    flags = [arg.partition("=")[0] for arg in argv if arg.startswith("--")]
    return {parser._option_string_actions[flag].dest for flag in flags}
