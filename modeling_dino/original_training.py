"""What a `checkpoint.pth` of the reference implementation (facebookresearch/dino) holds beside the networks.

Its `main_dino.py` builds networks, loss, optimizer and schedules from its flags. Then it resumes from the file
`checkpoint.pth` in its `--output_dir`, with the keys `student`, `teacher`, `dino_loss`, `optimizer`, `fp16_scaler` and
`epoch`, the number of epochs done. `args` is there for people.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from .checkpoint_names import original_names
from .configuration_dino import VIT_FIELDS, DINOConfig
from .modeling_dino import DINOForPreTraining


_VIT = {(192, 12, 3): "vit_tiny", (384, 12, 6): "vit_small", (768, 12, 12): "vit_base"}
_RESNET = {
    ("basic", 2, 2, 2, 2): "resnet18", ("basic", 3, 4, 6, 3): "resnet34", ("bottleneck", 3, 4, 6, 3): "resnet50",
    ("bottleneck", 3, 4, 23, 3): "resnet101", ("bottleneck", 3, 8, 36, 3): "resnet152",
}  # fmt: skip
# values of the config, and of a run's settings, that `main_dino.py` has no flags for
_FIXED_IN_CONFIG = {
    "num_channels": 3, "image_size": 224, "mlp_ratio": 4, "qkv_bias": True, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "position_interpolation": "scale_factor", "head_hidden_dim": 2048,
    "head_bottleneck_dim": 256, "head_num_layers": 3,
}  # fmt: skip
_FIXED_IN_SETTINGS = {
    "global_crop_size": 224, "local_crop_size": 96, "student_temp": 0.1, "center_momentum": 0.9, "centering": "ema",
    "koleo_weight": 0, "layer_decay": 1, "patch_embed_lr_multiplier": 1,
}  # fmt: skip


@dataclass
class Progress:
    """What a checkpoint of a run says beside networks and center: its `state.pt` and its `manifest.json`."""

    state: dict
    manifest: dict

    @property
    def steps_per_epoch(self) -> int:
        settings, lengths = self.manifest["arguments"], [part["num_images"] for part in self.manifest["data"]]
        if settings["num_examples"]:
            lengths = [settings["num_examples"]]
        if None in lengths:  # of a stream, which ends by `max_steps`
            return math.ceil(settings["max_steps"] / settings["num_train_epochs"])
        return sum(lengths) // self.manifest["global_batch_size"]


def read_progress(folder: Path, state: dict) -> Progress | None:
    """Return the progress of a checkpoint; None for a folder of networks and a center alone.

    Args:
        folder: A checkpoint of a run, or what `dino-convert` wrote.
        state: Content of its `state.pt`.

    Raises:
        ValueError: a checkpoint without a `manifest.json` that can be read.
    """
    if "optimizer" not in state:
        return None
    path = folder / "manifest.json"
    try:
        return Progress(state, json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged. Choose another checkpoint of the run.") from error


def _in_original_order(names: Iterable[str]) -> list[str]:
    """Order names as the modules there do: a ResNet block's shortcut is last, a weight norm's gain first."""

    def block(name: str) -> str:
        return re.match(r"(backbone\.layer\d+\.\d+\.|head\.last_layer\.)?", name)[0]

    def is_last(name: str) -> bool:
        return ".downsample." in name or name.endswith(".weight_v")

    return [name for _, of_block in groupby(names, block) for name in sorted(of_block, key=is_last)]


def optimizer_state(saved: dict, student: DINOForPreTraining) -> dict | None:
    """Return the state of the optimizer that `main_dino.py` builds, from that of one of our runs.

    It numbers parameters in two groups, weights before biases and norms, each in the order of its modules.

    Args:
        saved: `state_dict` of AdamW, SGD or LARS.
        student: With the same parameters.

    Returns:
        None where parameters do not correspond one to one: more groups, as by `layer_decay`, or an XCiT.
    """
    names = original_names(student.config)
    if any(name.startswith("cls_attn_blocks.") for name in names):
        return None
    theirs = {f"dino.{ours}": f"backbone.{name}" for name, (ours,) in names.items()}
    parameters = dict(student.named_parameters())  # those of the head have the same names
    is_undecayed = {name: name.endswith(".bias") or parameter.ndim == 1 for name, parameter in parameters.items()}
    groups = [[name for name in parameters if is_undecayed[name] == second] for second in (False, True)]
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group) for group in groups]:
        return None

    moments, param_groups, number = {}, [], 0
    for group, names_of_group in zip(saved["param_groups"], groups):
        found = {
            theirs.get(name, name): saved["state"].get(index)  # None of a last layer that is still frozen
            for index, name in zip(group["params"], names_of_group)
        }
        ordered = _in_original_order(found)
        options = {name: value for name, value in group.items() if name not in ("params", "lr_scale", "is_decayed")}
        if "trust_coefficient" in group:
            options["eta"] = options.pop("trust_coefficient")
            options |= {"weight_decay_filter": None, "lars_adaptation_filter": None}
            found = {name: state and {"mu": state["momentum_buffer"]} for name, state in found.items()}
        if "fused" in group:
            options["fused"] = None
        moments |= {i: found[name] for i, name in enumerate(ordered, number) if found[name]}
        param_groups.append(options | {"params": [*range(number, number + len(ordered))]})
        number += len(ordered)
    param_groups[1]["weight_decay"] = 0.0
    return {"state": moments, "param_groups": param_groups}


def original_arguments(progress: Progress, config: DINOConfig) -> dict:
    """Return the flags of `main_dino.py` that correspond to a run, in its order; `arch` is left out if it has none."""
    settings, manifest, network = progress.manifest["arguments"], progress.manifest, config.backbone_config
    if network is None:
        arch = _VIT.get((config.hidden_size, config.num_hidden_layers, config.num_attention_heads))
    elif network.model_type == "resnet":
        arch = _RESNET.get((network.layer_type, *network.depths))
    else:
        arch = network.architecture.removesuffix("_224")
    max_steps = settings["max_steps"]
    return ({"arch": arch} if arch else {}) | {
        **({"patch_size": config.patch_size} if network is None else {}),
        "out_dim": config.out_dim,
        "norm_last_layer": config.norm_last_layer,
        "momentum_teacher": settings["momentum_teacher"],
        "use_bn_in_head": config.use_bn_in_head,
        "warmup_teacher_temp": settings["warmup_teacher_temp"],
        "teacher_temp": settings["teacher_temp"],
        "warmup_teacher_temp_epochs": settings["warmup_teacher_temp_epochs"],
        "use_fp16": manifest["mixed_precision"] == "fp16",
        "weight_decay": settings["weight_decay"],
        "weight_decay_end": settings["weight_decay_end"],
        "clip_grad": settings["clip_grad"],
        "batch_size_per_gpu": manifest["global_batch_size"] // progress.state["num_processes"],
        "epochs": math.ceil(max_steps / progress.steps_per_epoch) if max_steps else settings["num_train_epochs"],
        "freeze_last_layer": settings["freeze_last_layer_epochs"],
        "lr": settings["base_learning_rate"],
        "warmup_epochs": settings["warmup_epochs"],
        "min_lr": settings["min_learning_rate"],
        "optimizer": settings["optimizer"],
        "drop_path_rate": config.drop_path_rate,
        "global_crops_scale": settings["global_crops_scale"],
        "local_crops_number": settings["num_local_crops"],
        "local_crops_scale": settings["local_crops_scale"],
        "seed": settings["seed"],
    }


def training_entries(progress: Progress, student: DINOForPreTraining) -> dict:
    """Return the entries of a `checkpoint.pth` beside the networks and the loss, and print what resuming takes."""
    arguments, state = original_arguments(progress, student.config), progress.state
    optimizer = optimizer_state(state["optimizer"], student)
    epoch, steps = divmod(state["step"], progress.steps_per_epoch)
    entries = {"epoch": epoch, "args": argparse.Namespace(**arguments)}
    if optimizer is None:
        print("left out: the optimizer's state, which has no counterpart there; its moments start from zero")
    else:
        entries["optimizer"] = optimizer
    if state["scaler"] is not None:
        entries["fp16_scaler"] = state["scaler"]
    flags = " ".join(f"--{name} {_as_flag(value)}" for name, value in arguments.items())
    print(f"to resume, name the file checkpoint.pth and run main_dino.py in its folder, with {flags}")
    print(
        f"processes: {state['num_processes']}; epochs done: {epoch}"
        + f", and {steps} steps, which are repeated" * bool(steps)
    )
    in_config = {name: value for name, value in _FIXED_IN_CONFIG.items()
                 if student.config.backbone_config is None or name not in {*VIT_FIELDS, "image_size"}}  # fmt: skip
    given = {name: (getattr(student.config, name), value) for name, value in in_config.items()}
    given |= {name: (progress.manifest["arguments"][name], value) for name, value in _FIXED_IN_SETTINGS.items()}
    others = [f"{name} {value}, not {fixed}" for name, (value, fixed) in given.items() if value != fixed]
    if "arch" not in arguments:
        others.insert(0, "an --arch of this size")
    if others:
        print(f"main_dino.py must be changed to have {'; '.join(others)}")
    return entries


def _as_flag(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).lower()
