"""The folder of a run: what in it is the run's, by its `run.json`, may be replaced; everything else is left alone."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

import modeling_dino
from evaluation.images import is_path
from evaluation.outputs import write_text

from .arguments import TrainingArguments
from .checkpoint import list_checkpoints, remove_checkpoint, sha256_of
from .failure import RunError
from .monitor import read_metrics


MANIFEST = "run.json"
WRITTEN = (  # while the run goes on
    *("train.log", "metrics.jsonl", "metrics.tmp", "skipped.jsonl", "non_finite.jsonl"),
    *("figures/crops.png", "figures/curves.png", "figures/attention.png"),
)
CODE = tuple(sorted(path.name for path in Path(modeling_dino.__file__).parent.glob("*_dino.py")))
PUBLISHED = ("config.json", "preprocessor_config.json", "README.md", *CODE)  # once, when it is done; and the weights
UNPUBLISHED = ".publishing"  # the folder that files are published from
FOLDERS = ("checkpoints", "tensorboard", UNPUBLISHED)
PATIENCE = 5  # seconds in which the workers of a run that was killed let go of the lock


class OutputFolder:
    """What lies in the folder of a run, and what may be done with it. Reading it changes nothing.

    `run.json` lists the names that runs have claimed, and the SHA-256 of the files that they published. A file of such
    a name that no run wrote, or that has been changed since, is somebody else's: the run does not start.

    Args:
        path: The folder, which need not be there.

    Raises:
        ValueError: a path that is a file, or a damaged `run.json`.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir must be a folder, and {path} is none")
        self.path = path
        manifest = self._read()
        self.claimed: list[str] = manifest["claimed"]
        self.published: dict[str, list[str]] = manifest["published"]  # hashes; two while files are replaced
        self.lock: FileLock | None = None

    @property
    def is_finished(self) -> bool:
        """Whether a run has published its weights here."""
        return any(name.endswith(".safetensors") and (self.path / name).exists() for name in self.published)

    def check(self, args: TrainingArguments) -> None:
        """Find what a run would replace although no run wrote it.

        Raises:
            ValueError: names the first such file, or a data set's folder that the output would lie in.
        """
        for name in filter(is_path, (args.dataset_name, *args.mix_with)):
            images, output = Path(name).expanduser().resolve(), self.path.resolve()
            if images.is_dir() and (images == output or images in output.parents):
                raise ValueError(
                    f"output_dir must lie outside the data set, got {self.path} in {name}. Choose another --output_dir"
                )
        advice = "move it away, or choose another --output_dir"
        for name in ("figures", *FOLDERS):
            if (self.path / name).is_symlink():
                raise ValueError(f"{self.path / name} is a symbolic link, which no run writes through; {advice}")
        if (self.path / "figures").is_file():
            raise ValueError(f"{self.path / 'figures'} was not written by a run, which has a folder there; {advice}")
        for name in (*WRITTEN, *PUBLISHED, *self._weights(), *FOLDERS):
            file = self.path / name
            if not os.path.lexists(file) or (name in FOLDERS and file.is_dir() and not any(file.iterdir())):
                continue
            if not self._is_ours(name):
                why = "was changed since a run wrote it" if name in self.published else "was not written by a run"
                raise ValueError(f"{file} {why} and would be replaced; {advice}")

    def check_idle(self, args: TrainingArguments, is_resumed: bool) -> None:
        """Find a run that would be lost.

        Args:
            args: Of the new run.
            is_resumed: Whether it continues from a checkpoint of this folder.

        Raises:
            ValueError: says how to keep it, and how to lose it.
        """
        if is_resumed or args.overwrite_output_dir:
            return
        # a run that has no checkpoint yet is begun again by the command that began it
        if list_checkpoints(self.path) or (read_metrics(self.path) and not args.resume_from_checkpoint):
            raise ValueError(
                f"{self.path} holds another run: give another --output_dir, --resume_from_checkpoint latest to "
                "continue it, or --overwrite_output_dir to lose it"
            )
        if self.is_finished and args.resume_from_checkpoint:
            raise ValueError(
                f"{self.path} holds a finished run, and no checkpoint to resume from: give another --output_dir, or "
                "--overwrite_output_dir to lose it"
            )

    def acquire(self) -> None:
        """Create the folder and lock it until `close`, or the end of the process.

        The system lets go of the lock when the process dies. Where a file system has no such locks, the lock is a file
        with process and host, and a stale one is recognized on the same host.

        Raises:
            ValueError: another run holds it; names its process and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / "run.lock")
        try:
            self.lock.acquire(timeout=PATIENCE)
        except Timeout:
            self.lock = None
            holder = self._read().get("process", {})
            who = f"process {holder['pid']} on {holder['host']}" if holder else "which has just started"
            raise ValueError(
                f"another run ({who}) is writing to {self.path}: wait for its end, or give another --output_dir"
            ) from None

    def close(self) -> None:
        """Let go of the lock."""
        if self.lock is not None:
            self.lock.release()

    def begin(self, is_resumed: bool, keeps_log: bool) -> None:
        """Clear what is left of saves that were cut off and, for a new run, of the run before; claim the names.

        Weights, checkpoints and card of the run before stay until there are new ones.
        """
        checkpoints = self.path / "checkpoints"
        for unfinished in checkpoints.glob("step_*.tmp"):
            remove_checkpoint(unfinished)
        shutil.rmtree(self.path / UNPUBLISHED, ignore_errors=True)
        gone = ["non_finite.jsonl"]
        if not is_resumed:
            for folder in list_checkpoints(self.path):
                replaced = folder.with_name(folder.name + ".replaced")
                if replaced.exists():
                    remove_checkpoint(replaced)
                folder.rename(replaced)
            gone += [name for name in WRITTEN if name != "train.log" or not keeps_log]
        self.claimed = sorted({*self.claimed, *WRITTEN, *FOLDERS})
        self._write()
        for name in gone:
            (self.path / name).unlink(missing_ok=True)

    def drop_replaced(self) -> None:
        """Remove the checkpoints of the run before, now that there is one of this run."""
        for folder in (self.path / "checkpoints").glob("step_*.replaced"):
            remove_checkpoint(folder)

    def publish(self, write: Callable[[Path], None]) -> None:
        """Put files into the folder that `write` makes in another; they replace those of the run before.

        Raises:
            RunError: a file that has come there meanwhile, and no run wrote.
        """
        new = self.path / UNPUBLISHED
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new)
        hashes = {path.name: sha256_of(path) for path in new.iterdir()}
        for name in hashes:
            if os.path.lexists(self.path / name) and not self._is_ours(name):
                raise RunError(
                    f"{self.path / name} was not written by this run, and stays; the run is whole in its checkpoints. "
                    "Move the file away and continue with --resume_from_checkpoint latest"
                )
        before = self.published
        self.published = before | {name: [*before.get(name, []), digest] for name, digest in hashes.items()}
        self._write()
        for name in sorted(hashes, key=lambda name: name == "config.json"):  # last: without it, nothing loads
            (new / name).replace(self.path / name)
        for name in before.keys() - hashes.keys():
            if self._is_ours(name):
                (self.path / name).unlink(missing_ok=True)
        self.published = {name: [digest] for name, digest in hashes.items()}
        self._write()
        new.rmdir()

    def rewrite(self, name: str, text: str) -> None:
        """Replace the text of a published file, which stays the run's if it was."""
        is_ours = self._is_ours(name)
        if is_ours:
            self.published[name] = [*self.published[name], hashlib.sha256(text.encode()).hexdigest()]
            self._write()
        temporary = self.path / f"{name}.incomplete"
        temporary.write_text(text)
        temporary.replace(self.path / name)

    def _weights(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("model*.safetensors*") if _is_weights(path.name))

    def _is_ours(self, name: str) -> bool:
        file = self.path / name
        if file.is_symlink():
            return False
        if name in self.published:
            return file.is_file() and sha256_of(file) in self.published[name]
        return name in self.claimed

    def _read(self) -> dict:
        file = self.path / MANIFEST
        if not file.exists():
            return self._adopt()
        try:
            manifest = json.loads(file.read_text())
            if manifest["made_by"] != "dino-hf":
                raise ValueError
            published = {name: list(hashes) for name, hashes in manifest["published"].items() if _is_name(name)}
            return manifest | {"claimed": list(manifest["claimed"]), "published": published}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{file} is damaged, or not of a run; move it away, or choose another --output_dir"
            ) from error

    def _adopt(self) -> dict:
        """What a run of an earlier version, which wrote no `run.json`, has claimed and published."""
        card, config = self.path / "README.md", self.path / "config.json"
        has_card = card.is_file() and "dino-hf" in card.read_text(errors="replace")
        has_config = config.is_file() and '"model_type": "dino"' in config.read_text(errors="replace")
        if not list_checkpoints(self.path) and not (has_card and has_config):
            return {"claimed": [], "published": {}}
        names = ["README.md"] * has_card + [*PUBLISHED[:2], *CODE, *self._weights()] * has_config
        published = {name: [sha256_of(self.path / name)] for name in names if (self.path / name).is_file()}
        return {"claimed": [*WRITTEN, *FOLDERS], "published": published}

    def _write(self) -> None:
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        manifest = {"made_by": "dino-hf", "process": process, "claimed": self.claimed, "published": self.published}
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1))


def _is_name(name: str) -> bool:
    """Return whether a name lies in the folder itself, and not outside of it."""
    return name == os.path.basename(name)


def _is_weights(name: str) -> bool:
    """Return whether `save_pretrained` gives files such names: whole, in parts, or the index of parts."""
    return name in ("model.safetensors", "model.safetensors.index.json") or "-of-" in name
