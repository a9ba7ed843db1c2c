"""Checkpoints: everything that a run needs to go on as if it had never stopped.

`checkpoints/step_0000100/` holds `student/` and `teacher/` in the Hugging Face format, so that either opens by
`from_pretrained`; `state.pt` (centre, optimiser, step, place in the data); and one `rank_N.pt` a process (random
state, sums of the metrics that have not been written yet).
"""

import re
import shutil
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from modeling_dino import DINOConfig, DINOForPreTraining
from modeling_dino.configuration_dino import VIT_FIELDS

from .loss import DINOLoss


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (output_dir / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d+", folder.name))


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    student: DINOForPreTraining,
    teacher: DINOForPreTraining,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
    data_state: dict,
    running: torch.Tensor,
    image_processor,
    total_limit: int,
) -> None:
    """Writes under a temporary name, renames when all processes are done, then drops the oldest above the limit."""
    folder = output_dir / "checkpoints" / f"step_{step:07d}"
    unfinished = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        student.save_pretrained(unfinished / "student")
        teacher.save_pretrained(unfinished / "teacher")
        image_processor.save_pretrained(unfinished / "teacher")
        state = {"step": step, "center": dino_loss.center, "optimizer": optimizer.state_dict(), "data": data_state}
        state["num_processes"] = accelerator.num_processes
        torch.save(state, unfinished / "state.pt")
    accelerator.wait_for_everyone()
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    rank = {"random": random, "running": running}
    torch.save(rank, unfinished / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)


def set_later_checkpoints_aside(output_dir: Path, step: int) -> None:
    """Renames checkpoints of more than `step` steps, which a run that goes on from there would take for its own."""
    for folder in list_checkpoints(output_dir):
        if int(folder.name.removeprefix("step_")) > step:
            aside = folder.with_name(folder.name + ".aside")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path:
    """The folder meant by --resume_from_checkpoint: a path, or `latest`.

    Raises:
        ValueError: if it is not there.
    """
    if resume_from_checkpoint == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise ValueError(f"there is no checkpoint in {output_dir / 'checkpoints'} to resume from")
        return found[-1]
    folder = Path(resume_from_checkpoint)
    if not (folder / "rank_0.pt").is_file():
        raise ValueError(
            f"{folder} is no checkpoint of a run, which has state.pt and rank_0.pt; weights alone are for --init_from"
        )
    return folder


# fields of a config that say nothing about what the network computes of an image
_ABOUT_THE_FILE = {"_name_or_path", "architectures", "dtype", "transformers_version"}
_ABOUT_ITS_USE = {
    *("drop_path_rate", "initializer_range", "n_last_blocks", "avgpool_patchtokens", "interleave_features"),
    *("freeze_backbone", "id2label", "label2id", "problem_type", "out_features", "out_indices", "stage_names"),
}
_ABOUT_THE_HEAD = {
    *("out_dim", "head_hidden_dim", "head_bottleneck_dim", "head_num_layers", "use_bn_in_head", "norm_last_layer")
}


def _flat(fields: dict, prefix: str = "") -> dict:
    """{"a": 1, "b": {"c": 2}} -> {"a": 1, "b.c": 2}"""
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _check_same_network(
    name: Path | str, saved: DINOConfig, config: DINOConfig, ignored: set[str], without_head: bool = False
) -> None:
    theirs, ours = (
        "vit" if each.backbone_config is None else each.backbone_config.model_type for each in (saved, config)
    )
    if theirs != ours:
        raise ValueError(f"{name} is another network: a {theirs}, not a {ours}")
    elsewhere = _ABOUT_THE_HEAD if without_head else set()
    if config.backbone_config is not None:
        elsewhere = elsewhere | {*VIT_FIELDS, "image_size"}
    theirs, ours = (_flat(each.to_dict()) for each in (saved, config))
    differing = [
        key
        for key in ours | theirs
        if ours.get(key) != theirs.get(key) and key not in elsewhere and not ignored & set(key.split("."))
    ]
    if differing:
        changes = ", ".join(f"{key} {theirs.get(key)}, not {ours.get(key)}" for key in differing)
        raise ValueError(f"{name} is another network: it has {changes}")


def load_initial_weights(
    name: str, student: DINOForPreTraining, teacher: DINOForPreTraining, dino_loss: DINOLoss
) -> None:
    """Starts from the weights of another training, as --init_from names them.

    A checkpoint of ours, or what `dino-convert` makes of one of the original's, gives both networks and the centre.
    Any other model of ours, a folder or Hub id, gives both networks the same weights; if it is a backbone alone, their
    heads start alike and anew.

    Raises:
        ValueError: weights that are not there, or do not fit.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{name} is a file; make a folder of it with dino-convert")
    both = (folder / "student").is_dir() and (folder / "teacher").is_dir()
    for which, model in (("student", student), ("teacher", teacher)):
        source = folder / which if both else folder if folder.exists() else name
        if PreTrainedConfig.get_config_dict(source)[0].get("model_type") != DINOConfig.model_type:
            raise ValueError(f"{source} is no model of ours; dino-convert makes one of it, if it is DINO's")
        ignored = _ABOUT_THE_FILE | _ABOUT_ITS_USE
        _check_same_network(source, DINOConfig.from_pretrained(source), model.config, ignored, without_head=True)
        saved, info = DINOForPreTraining.from_pretrained(source, output_loading_info=True)
        head = {key for key in saved.state_dict() if key.startswith("head.")}
        if info["missing_keys"] and set(info["missing_keys"]) != head:
            raise ValueError(f"{source} lacks weights, such as {min(info['missing_keys'])}")
        without_head = bool(info["missing_keys"])
        if not without_head:
            _check_same_network(source, saved.config, model.config, ignored)
        (model.dino if without_head else model).load_state_dict((saved.dino if without_head else saved).state_dict())
    if both and (folder / "state.pt").is_file():
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        dino_loss.center.copy_(state["center"])


def load_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    student: DINOForPreTraining,
    teacher: DINOForPreTraining,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict, torch.Tensor]:
    """Puts a checkpoint's state into what is given.

    Returns:
        The steps done, the place in the data, and this process's running sums of the metrics. With another number of
        processes, random states and sums are not those of the checkpoint, and a warning says so.

    Raises:
        ValueError: a checkpoint of another network.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        saved = DINOForPreTraining.from_pretrained(folder / name)
        _check_same_network(folder / name, saved.config, model.config, _ABOUT_THE_FILE)
        model.load_state_dict(saved.state_dict())
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    dino_loss.center.copy_(state["center"])
    optimizer.load_state_dict(state["optimizer"])
    if state["num_processes"] != accelerator.num_processes:
        warnings.warn(
            f"{folder} was saved by {state['num_processes']} processes and goes on with {accelerator.num_processes}, "
            "at the same place in the epoch: if that changes the batch of all of them, images come in other batches "
            "from here on, and what was measured since the last line of metrics is lost"
        )
        return state["step"], state["data"], torch.zeros(3, device=accelerator.device)
    rank = torch.load(folder / f"rank_{accelerator.process_index}.pt", weights_only=True)
    torch.set_rng_state(rank["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in rank["random"]:
        torch.cuda.set_rng_state(rank["random"]["cuda"])
    return state["step"], state["data"], rank["running"].to(accelerator.device)
