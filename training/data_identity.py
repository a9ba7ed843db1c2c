"""What a run was trained on, in a few numbers: a resume on other images is refused instead of going wrong quietly."""

import hashlib
import logging
import re

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import load_dataset_builder
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY

from evaluation.images import is_path, local_files
from modeling_dino.command_line import printable

from .arguments import TrainingArguments


MAX_LISTED = 1000  # files of a dataset that are listed one by one, so that a change can name them
COMMIT = re.compile(r"@([0-9a-f]{40})/")


def identify_data(args: TrainingArguments, lengths: list[int | None]) -> list[dict]:
    """Identify each dataset that is trained on, without reading an image; the same on all processes.

    Args:
        args: Name the datasets.
        lengths: Number of images of each, where it is known.

    Returns:
        For each, its name, the number of images, and of local files their number and hashes of their names (below the
        dataset's folder), sizes and modification times (in seconds), and if there are few, a list; of the Hub, the
        commit.
    """
    found = None
    if PartialState().is_main_process:
        found = []
        for number, (name, num_images) in enumerate(zip((args.dataset_name, *args.mix_with), lengths)):
            config_name = None if number else args.dataset_config_name
            place = (
                _files(name, args.train_split, args.folder_layout)
                if is_path(name)
                else {"commit": _commit(name, config_name)}
            )
            found.append({"name": name, "num_images": num_images} | place)
    return broadcast_object_list([found])[0]


def explain_change(before: list[dict], now: list[dict]) -> str | None:
    """What has changed between two results of `identify_data`, in words; None if nothing has."""
    for old, new in zip(before, now):
        example = _example(old.get("files") or {}, new.get("files") or {})
        # a stream does not always know its number, and may learn it when another run has prepared the data
        if None not in (old["num_images"], new["num_images"]) and old["num_images"] != new["num_images"]:
            return f"{new['name']} had {old['num_images']} images, and has {new['num_images']}{example}"
        if old.get("commit") and new.get("commit") and old["commit"] != new["commit"]:
            return f"{new['name']} was at commit {old['commit']} of the Hub, and is at {new['commit']}"
        if old.get("names") != new.get("names"):
            return f"files of {new['name']} have been added, removed or renamed{example}"
        if old.get("sizes") != new.get("sizes") or old.get("times") != new.get("times"):
            return (
                f"files of {new['name']} have been replaced since: their sizes or modification times differ{example}"
            )
    return None


def _example(before: dict[str, str], now: dict[str, str]) -> str:
    """How many of the listed files differ, and one of them, in parentheses; nothing if either list is missing."""
    differing = sorted(name for name in before | now if before.get(name) != now.get(name))
    if not (before and now and differing):
        return ""
    return f" (in {len(differing)} file{'s' * (len(differing) > 1)}, such as {printable(differing[0])})"


def _files(name: str, split: str, layout: str) -> dict:
    files = local_files(name, split, layout)
    described = {
        "names": [file.name for file in files],
        "sizes": [file.size for file in files],
        "times": [file.time for file in files],
    }
    hashes = {key: hashlib.sha256(repr(values).encode()).hexdigest()[:16] for key, values in described.items()}
    if len(files) > MAX_LISTED or not files or not files[0].name:
        return {"num_files": len(files)} | hashes
    listed = {file.name: f"{file.size} bytes, {file.time}" for file in files}
    return {"num_files": len(files)} | hashes | {"files": listed}


def _commit(name: str, config_name: str | None) -> str | None:
    """The commit at which a dataset of the Hub is read, or offline the cached one's; None if neither is known."""
    logging.disable(logging.WARNING)  # the same as when the data was loaded
    try:
        builder = load_dataset_builder(name, config_name)
    except (OSError, ValueError, *CONNECTION_ERRORS_TO_RETRY):
        return None
    finally:
        logging.disable(logging.NOTSET)
    files = builder.config.data_files or {}
    commits = {found[1] for part in files.values() for address in part if (found := COMMIT.search(str(address)))}
    if not commits and re.fullmatch(r"[0-9a-f]{40}", builder.hash or ""):
        return builder.hash
    return ", ".join(sorted(commits)) or None
