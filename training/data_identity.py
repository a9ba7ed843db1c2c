"""What a run was trained on, in a few numbers: a resume on other images is refused instead of going wrong quietly."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import load_dataset_builder
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY

from evaluation.images import FILE_BUILDERS, IMAGE_SUFFIXES, is_path, split_folder

from .arguments import TrainingArguments


COMMIT = re.compile(r"@([0-9a-f]{40})/")


def identify_data(args: TrainingArguments, lengths: list[int | None]) -> list[dict]:
    """Identify each data set that is trained on, without reading an image; the same on all processes.

    Args:
        args: Name the data sets.
        lengths: Number of images of each, where it is known.

    Returns:
        For each, its name, the number of images, and of local files their number and hashes of their names (below the
        data set's folder), sizes and modification times (in seconds); of the Hub, the commit.
    """
    found = None
    if PartialState().is_main_process:
        found = []
        for number, (name, num_images) in enumerate(zip((args.dataset_name, *args.mix_with), lengths)):
            config_name = None if number else args.dataset_config_name
            place = _files(name, args.train_split) if is_path(name) else {"commit": _commit(name, config_name)}
            found.append({"name": name, "num_images": num_images} | place)
    return broadcast_object_list([found])[0]


def explain_change(before: list[dict], now: list[dict]) -> str | None:
    """What has changed between two results of `identify_data`, in words; None if nothing has."""
    for old, new in zip(before, now):
        if old["num_images"] != new["num_images"]:
            return f"{new['name']} had {old['num_images']} images, and has {new['num_images']}"
        if old.get("commit") and new.get("commit") and old["commit"] != new["commit"]:
            return f"{new['name']} was at commit {old['commit']} of the Hub, and is at {new['commit']}"
        if old.get("names") != new.get("names"):
            return f"files of {new['name']} have been added, removed or renamed"
        if old.get("sizes") != new.get("sizes") or old.get("times") != new.get("times"):
            return f"files of {new['name']} have been replaced since: their sizes or modification times differ"
    return None


def _files(name: str, split: str) -> dict:
    path = Path(name).expanduser()
    files = [("", path.stat())] if path.is_file() else sorted(_walk(split_folder(path, split), ""))
    described = {
        "names": [name for name, _ in files],
        "sizes": [status.st_size for _, status in files],
        "times": [int(status.st_mtime) for _, status in files],
    }
    hashes = {key: hashlib.sha256(repr(values).encode()).hexdigest()[:16] for key, values in described.items()}
    return {"num_files": len(files)} | hashes


def _walk(folder: Path, below: str) -> Iterator[tuple[str, os.stat_result]]:
    """Names and states of data files: images, and what holds or labels them; not what libraries keep beside."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "cache-", "tmp")):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry), f"{below}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in (*IMAGE_SUFFIXES, *FILE_BUILDERS, ".zip"):
                yield f"{below}{entry.name}", entry.stat()


def _commit(name: str, config_name: str | None) -> str | None:
    """The commit at which a data set of the Hub is read; None if the Hub cannot be asked and only a cache is there."""
    try:
        files = load_dataset_builder(name, config_name).config.data_files or {}
    except (OSError, ValueError, *CONNECTION_ERRORS_TO_RETRY):
        return None
    commits = {found[1] for part in files.values() for address in part if (found := COMMIT.search(str(address)))}
    return ", ".join(sorted(commits)) or None
