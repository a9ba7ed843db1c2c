"""Checkpoints: everything that a run needs to go on as if it had never stopped.

`checkpoints/step_0000100/` holds `student/` and `teacher/` in the Hugging Face format, so that either opens by
`from_pretrained`; `state.pt` (centre, optimiser, fp16's scale, step, place in the data); one `rank_N.pt` a process
(random state, sums of the metrics that have not been written yet); and `manifest.json`: the settings, the versions of
the libraries, and the size and hash of every file, by which a damaged checkpoint is known.
"""

import hashlib
import itertools
import json
import logging
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedConfig

from evaluation.images import is_path
from evaluation.models import load_weights
from modeling_dino import DINOConfig, DINOForPreTraining
from modeling_dino.command_line import check_files, one_line
from modeling_dino.configuration_dino import VIT_FIELDS
from modeling_dino.convert_dino_checkpoint import read_pickle
from modeling_dino.image_processing_dino import DINOImageProcessor
from modeling_dino.modeling_dino import DINOEmbeddings

from .agreement import Agreement
from .arguments import TrainingArguments
from .data_identity import explain_change
from .failure import RunError
from .networks import check_depth
from .sharding import cut_up_like_, gathered, whole_network
from .state import TrainingState, random_state


logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "torchvision")  # whose versions are noted


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (output_dir / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if re.fullmatch(r"step_\d+", folder.name))


def last_checkpoint(output_dir: Path) -> str:
    """What of a run is safe, for a message that it has failed."""
    checkpoints = list_checkpoints(output_dir)
    return f"{checkpoints[-1]} is the last checkpoint before" if checkpoints else "there is no checkpoint yet"


def save_checkpoint(
    accelerator: Accelerator,
    agreement: Agreement,
    output_dir: Path,
    step: int,
    state: TrainingState,
    data_state: dict,
    image_processor,
    args: TrainingArguments,
    global_batch_size: int,
    data: list[dict],
) -> None:
    """Write under a temporary name, rename when all processes are done, then remove the oldest above the limit.

    With `Agreement(None)`, for after an error, the main process writes everything, as others may be gone: their random
    states are known to it, and only their sums of the metrics are lost.

    Raises:
        RunError: on all processes, if one cannot write; what has been written before stays.
    """
    is_main, is_alone = accelerator.is_main_process, agreement.is_alone
    student, teacher = (whole_network(network, is_main, "cpu") for network in (state.student, state.teacher))
    optimizer_state = gathered(state.optimizer.state_dict(), is_main)
    folder = output_dir / "checkpoints" / f"step_{step:07d}"
    unfinished = folder.with_name(folder.name + ".tmp")
    parts = (student.state_dict(), teacher.state_dict(), optimizer_state) if is_main else ()
    shared_size = sum(map(_size, parts))

    def write_shared() -> None:
        student.save_pretrained(unfinished / "student")
        teacher.save_pretrained(unfinished / "teacher")
        image_processor.save_pretrained(unfinished / "teacher")
        shared = {
            "step": step,
            "center": state.dino_loss.center,
            "optimizer": optimizer_state,
            "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
            "data": data_state,
            "num_processes": accelerator.num_processes,
            "is_alone": is_alone and accelerator.num_processes > 1,
        }
        torch.save(shared, unfinished / "state.pt")

    def write_own() -> None:
        own = {"random": random_state(), "signals": state.signals.state_dict()}
        if is_alone:
            for process, random in enumerate(state.random_of_all):
                torch.save({"random": random, "signals": None}, unfinished / f"rank_{process}.pt")
            own["random"] = state.random_of_all[accelerator.process_index]
        torch.save(own, unfinished / f"rank_{accelerator.process_index}.pt")

    def finish() -> None:
        write_manifest(unfinished, step, args, global_batch_size, data)
        unfinished.rename(folder)

    for write, is_mine in ((write_shared, is_main), (write_own, True), (finish, is_main)):
        reason = None
        if is_mine:
            try:
                write()
            except Exception as error:  # each library has its own for a disk that is full
                reason = _explain_full_disk(unfinished, shared_size) or one_line(error)
        if reason := agreement.first_of_any(reason):
            if is_main:
                remove_checkpoint(unfinished)
            raise RunError(
                f"the checkpoint of step {step} cannot be written to {folder.parent}: {reason}. "
                f"{last_checkpoint(output_dir)}"
            )
    if is_main:
        for old in [*filter(is_checkpoint, list_checkpoints(output_dir))][: -args.save_total_limit]:
            remove_checkpoint(old)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a run wrote a folder, whole or damaged; other programs name their folders `step_N`, too."""
    if folder.is_symlink():
        return False
    try:
        check_files(folder)
        if {"step", "arguments", "files"} <= json.loads((folder / "manifest.json").read_text()).keys():
            return True
    except (OSError, ValueError, AttributeError):  # it is damaged
        pass
    return all((folder / name).exists() for name in ("student", "teacher", "state.pt"))


def remove_checkpoint(folder: Path) -> None:
    """Delete the files of a checkpoint, whole or not, and its folders.

    Files that no run wrote stay, in a folder of the same name and `.left`, which is not a checkpoint. Nothing is
    deleted through a symbolic link.
    """
    if folder.is_symlink():
        return
    try:
        names = [*json.loads((folder / "manifest.json").read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):  # it was not finished
        names = [path.name for path in folder.glob("rank_*.pt")] + ["state.pt"]
        names += [f"{part}/{path.name}" for part in ("student", "teacher") for path in folder.glob(f"{part}/*")]
    for name in [*names, "manifest.json"]:
        path = folder / name
        is_inside = path.parent.resolve().is_relative_to(folder.resolve())  # else a folder has become a link
        if is_inside and not path.is_dir():
            path.unlink(missing_ok=True)
    for part in (folder / "student", folder / "teacher", folder):
        with suppress(OSError):  # not empty, or a link
            part.rmdir()
    if folder.exists():
        free = (folder.with_name(f"{folder.name}.left{number or ''}") for number in itertools.count())
        folder.rename(next(path for path in free if not path.exists()))


def _size(content) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, (list, tuple)) else 0


def _explain_full_disk(folder: Path, needed: int) -> str | None:
    """How much space is missing for `needed` bytes in a folder that could not be written; None if there was enough."""
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free + written
    if free > needed:
        return None
    return f"no space left on the device: it needs {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free"


def write_manifest(folder: Path, step: int, args: TrainingArguments, global_batch_size: int, data: list[dict]) -> None:
    """Say in `manifest.json` what the checkpoint is of, and what its files must be like."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "step": step,
        "global_batch_size": global_batch_size,
        "mixed_precision": AcceleratorState().mixed_precision,
        "arguments": asdict(args),
        "data": data,
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in LIBRARIES},
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None for one that is as it was written."""
    try:
        check_files(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {name: {"size": file["size"], "sha256": file["sha256"]} for name, file in manifest["files"].items()}
        dict(manifest["arguments"]), manifest["step"], manifest["global_batch_size"], manifest["mixed_precision"]
        files["state.pt"], dict(manifest.get("versions", {}))
        [(part["num_images"], dict(part.get("files") or {})) for part in manifest.get("data", [])]
    except OSError as error:
        return f"its manifest.json cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest.json is not what was written ({type(error).__name__})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def set_later_checkpoints_aside(output_dir: Path, step: int) -> None:
    """Renames checkpoints of more than `step` steps, which a run that goes on from there would take for its own."""
    for folder in list_checkpoints(output_dir):
        if int(folder.name.removeprefix("step_")) > step:
            aside = folder.with_name(folder.name + ".aside")
            if aside.exists():
                remove_checkpoint(aside)
            folder.rename(aside)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str, must: bool) -> Path | None:
    """The folder meant by --resume_from_checkpoint: a path, or `latest` for the last whole one, if there is any.

    Raises:
        ValueError: a path that is no checkpoint, or a damaged one; checkpoints that all are damaged; none, if there
            `must` be one.
    """
    if resume_from_checkpoint == "latest":
        folders = list_checkpoints(output_dir)
        for folder in reversed(folders):
            damage = find_damage(folder)
            if damage is None:
                return folder
            warnings.warn(f"{folder} is damaged, {damage}; looking for the one before")
        if must or folders:
            kind = "whole checkpoint" if folders else "checkpoint"
            raise ValueError(f"there is no {kind} in {output_dir / 'checkpoints'} to resume from")
        return None
    folder = Path(resume_from_checkpoint)
    if not (folder / "manifest.json").is_file():
        runs = (folder, *folder.parents)[:4]  # of a run, its checkpoints, one that is gone, or a network in it
        whole = [[one for one in list_checkpoints(run) if (one / "manifest.json").is_file()] for run in runs]
        newest = next((found[-1] for found in whole if found), None)
        fix = f"Give {newest}." if newest else "Weights alone are for --init_from."
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint, which has a manifest.json, got {folder}. {fix}"
        )
    if damage := find_damage(folder):
        raise ValueError(f"{folder} is damaged: {damage}")
    return folder


# settings that say where things are, or how a run is watched, and nothing of what is learned
_ABOUT_THE_RUN = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "resume", "allow_changed", "init_from"),
    *("save_steps", "save_total_limit", "logging_steps", "num_workers", "stream_timeout", "max_skipped_fraction"),
    *("eval_steps", "eval_split", "label_column", "eval_crop_pct", "max_eval_samples", "per_device_eval_batch_size"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "augmentation_device", "dry_run", "report_to"),
    *("stop_on_collapse", "allow_unread", "max_image_pixels", "display_channels", "dry_run_processes"),
    *("model_config", "config_overrides"),  # what they make is compared itself
    *("gradient_checkpointing", "tf32"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # of all processes together, see below
}


def saved_arguments(folder: Path) -> dict:
    """The settings of the run that a checkpoint is of. Those that its version lacked had their defaults."""
    defaults = asdict(TrainingArguments(dataset_name="", output_dir=""))
    return defaults | json.loads((folder / "manifest.json").read_text())["arguments"]


def saved_value_types(folder: Path) -> list[str]:
    """Return whether images were of 8 bits, by the image processor of a checkpoint: uint8, or `other`."""
    processor = json.loads((folder / "teacher" / "preprocessor_config.json").read_text())
    return ["other" if processor["image_processor_type"] == DINOImageProcessor.__name__ else "uint8"]


def check_same_settings(folder: Path, args: TrainingArguments, global_batch_size: int, data: list[dict]) -> None:
    """Find settings and data by which the run would not continue as it would have.

    Other versions of libraries, and another number of threads, are warned of: the last bits may differ.

    Raises:
        ValueError: names what differs, unless it is in `args.allow_changed`; and another optimizer, in any case.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    theirs, ours = (json.loads(json.dumps(each)) for each in (saved_arguments(folder), asdict(args)))
    changes = {name: (theirs[name], value) for name, value in ours.items() if name not in _ABOUT_THE_RUN}
    changes["per_device_train_batch_size"] = (manifest["global_batch_size"], global_batch_size)
    changes["mixed_precision"] = (manifest["mixed_precision"], AcceleratorState().mixed_precision)
    if args.freeze_backbone_steps is None:  # then it is the checkpoint's, see `resolve_freeze`
        del changes["freeze_backbone_steps"]
    before, now = changes["optimizer"]
    if before != now:
        raise ValueError(
            f"{folder} was trained with optimizer {before}, not {now}, which cannot go on with its moments; begin "
            "another run from these weights, by --init_from"
        )
    for name, (before, now) in changes.items():
        if before != now and name not in args.allow_changed:
            of_all = ", of all processes together" if name == "per_device_train_batch_size" else ""
            raise ValueError(
                f"{folder} was trained with {name} {before}{of_all}, not {now}: the run would not go on as it would "
                f"have. --allow_changed {name} does so all the same"
            )
    if "data" not in manifest:
        logger.info("%s is of an earlier version and does not say what its data was", folder)
    elif (change := explain_change(manifest["data"], data)) and "data" not in args.allow_changed:
        raise ValueError(
            f"{folder} was trained on other data: {change}. --allow_changed data continues on what is there now"
        )
    _warn_of_other_bits(folder, manifest)


def _warn_of_other_bits(folder: Path, manifest: dict) -> None:
    versions = {name: version(name) for name in LIBRARIES}
    others = [f"{name} {old}, not {versions[name]}" for name, old in manifest.get("versions", {}).items()
              if versions.get(name) != old and name in versions]  # fmt: skip
    num_threads = manifest.get("num_threads", torch.get_num_threads())
    if num_threads != torch.get_num_threads():
        others.append(f"{num_threads} threads (OMP_NUM_THREADS), not {torch.get_num_threads()}")
    if others:
        warnings.warn(f"{folder} was saved with {', '.join(others)}: the last bits of what follows may differ")


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


def _has_both(folder: Path) -> bool:
    return (folder / "student").is_dir() and (folder / "teacher").is_dir()


def _find_model(name: str, which: str) -> tuple[Path | str, dict]:
    """Return where the `student` or `teacher` of --init_from is, a folder or Hub id, and the fields of its config.

    Raises:
        ValueError: a model that is not there, or not one of ours.
    """
    folder = Path(name).expanduser()
    if is_path(name) and not folder.exists():
        raise ValueError(f"init_from: there is no folder {name}")
    if folder.is_file():
        raise ValueError(f"{name} is a file; make a folder of it with dino-convert")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"init_from must be a folder or Hub id, got {name}. Choose a folder of weights.")
    source = folder / which if _has_both(folder) else folder if folder.exists() else name
    check_files(Path(source))
    fields = PreTrainedConfig.get_config_dict(source)[0]
    if fields.get("model_type") != DINOConfig.model_type:
        raise ValueError(f"{source} is no model of ours; dino-convert makes one of it, if it is DINO's")
    return source, {"image_size": DINOConfig.image_size} | fields


def saved_config(checkpoint: Path | None, init_from: str | None) -> dict | None:
    """Return the fields of the config of the weights that a run starts from; None for random ones."""
    start = str(checkpoint) if checkpoint else init_from
    return _find_model(start, "student")[1] if start else None


@torch.no_grad()
def _resample_positions_(embeddings: DINOEmbeddings, grid_size: tuple[int, int]) -> None:
    """Store position embeddings for a grid of another size: those that the network computes for such images."""
    embeddings.position_embeddings = torch.nn.Parameter(embeddings.interpolate_pos_encoding(*grid_size).clone())


def load_initial_weights(
    name: str, student: DINOForPreTraining, teacher: DINOForPreTraining
) -> tuple[bool, torch.Tensor | None]:
    """Starts from the weights of another training, as --init_from names them.

    A checkpoint of ours, or what `dino-convert` makes of one of the original's, gives both networks and the centre.
    Any other model of ours, a folder or Hub id, gives both networks the same weights; if it is a backbone alone, their
    heads start alike and anew. Position embeddings are resampled to the `image_size` of the networks.

    Returns:
        Whether there were heads, and the centre (1, out_dim) if there was one.

    Raises:
        ValueError: weights that are not there, or do not fit.
    """
    folder, center = Path(name).expanduser(), None
    for which, model in (("student", student), ("teacher", teacher)):
        source, fields = _find_model(name, which)
        check_depth(fields)
        ignored = _ABOUT_THE_FILE | _ABOUT_ITS_USE | {"image_size"}
        _check_same_network(source, DINOConfig.from_pretrained(source), model.config, ignored, without_head=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # says nothing that the error does not
            saved, info = load_weights(DINOForPreTraining, str(source))
        head = {key for key in saved.state_dict() if key.startswith("head.")}
        if info["missing_keys"] and set(info["missing_keys"]) != head:
            raise ValueError(f"{source} lacks weights, such as {min(info['missing_keys'])}")
        without_head = bool(info["missing_keys"])
        if not without_head:
            _check_same_network(source, saved.config, model.config, ignored)
        if model.config.backbone_config is None:
            _resample_positions_(saved.dino.embeddings, model.dino.embeddings.grid_size)
        (model.dino if without_head else model).load_state_dict((saved.dino if without_head else saved).state_dict())
    if _has_both(folder) and (folder / "state.pt").is_file():
        state = read_pickle(folder / "state.pt")
        center = state.get("center") if isinstance(state, dict) else None
        expected = (1, student.config.out_dim)
        if not isinstance(center, torch.Tensor) or center.shape != expected or not center.is_floating_point():
            raise ValueError(
                f"{folder / 'state.pt'} must hold a center of the shape {expected}, and does not. Copy or convert the "
                "weights again."
            )
    return not without_head, center


def load_networks(folder: Path, student: DINOForPreTraining, teacher: DINOForPreTraining) -> None:
    """Puts a checkpoint's weights into both networks.

    Raises:
        ValueError: a checkpoint of another network.
    """
    for name, model in (("student", student), ("teacher", teacher)):
        saved = DINOForPreTraining.from_pretrained(folder / name)
        _check_same_network(folder / name, saved.config, model.config, _ABOUT_THE_FILE)
        model.load_state_dict(saved.state_dict())


def _load_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Puts the state of an optimiser into another, which keeps its own settings: they may have been changed."""
    groups = [dict(group) for group in optimizer.param_groups]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
        raise ValueError(
            "layer_decay and patch_embed_lr_multiplier cannot be switched on or off on the way; begin another run "
            "from these weights, by --init_from"
        )
    optimizer.load_state_dict(cut_up_like_(saved, optimizer))
    for group, own in zip(optimizer.param_groups, groups):
        group.update(own)


def _read_parts(path: Path, *names: str) -> dict:
    """Load a file of a checkpoint, and find what is not one, as of another program, in spite of its hash."""
    parts = read_pickle(path)
    if missing := [name for name in names if not isinstance(parts, dict) or name not in parts]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}. Resume from another checkpoint.")
    return parts


def load_progress(accelerator: Accelerator, folder: Path, state: TrainingState) -> tuple[int, dict]:
    """Puts all of a checkpoint but the networks' weights into `state`.

    Returns:
        The steps done and the place in the data. With another number of processes, random states and sums of the
        signals are not those of the checkpoint, and a warning says so.
    """
    shared = _read_parts(folder / "state.pt", "step", "center", "optimizer", "scaler", "data", "num_processes")
    state.dino_loss.center.copy_(shared["center"])
    _load_moments(state.optimizer, shared["optimizer"])
    if accelerator.scaler is not None and shared["scaler"] is not None:
        accelerator.scaler.load_state_dict(shared["scaler"])
    if shared["num_processes"] != accelerator.num_processes:
        warnings.warn(
            f"{folder} was saved by {shared['num_processes']} processes and goes on with {accelerator.num_processes}, "
            "at the same place in the epoch: if that changes the batch of all of them, images come in other batches "
            "from here on, and what was measured since the last line of metrics is lost"
        )
        return shared["step"], shared["data"]
    rank = _read_parts(folder / f"rank_{accelerator.process_index}.pt", "random", "signals")
    torch.set_rng_state(rank["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in rank["random"]:
        torch.cuda.set_rng_state(rank["random"]["cuda"])
    if shared.get("is_alone"):
        warnings.warn(
            f"{folder} was saved after an error: the next line of metrics lacks what other processes measured"
        )
    if rank["signals"] is not None:
        state.signals.load_state_dict(rank["signals"])
    return shared["step"], shared["data"]
