"""The folder of a run: what in it is the run's, by its `run.json`, may be replaced; everything else is left alone."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

import modeling_dino
from evaluation.cards import is_classifier
from evaluation.images import is_path
from evaluation.outputs import replacing

from .arguments import TrainingArguments
from .checkpoint import is_checkpoint, list_checkpoints, remove_checkpoint, sha256_of
from .failure import RunError
from .monitor import read_metrics


MANIFEST = "run.json"
VERSION = 1  # of its format
LOCKS = ("run.lock", "run.soft.lock")
WRITTEN = (  # during the run
    *("train.log", "metrics.jsonl", "metrics.tmp", "skipped.jsonl", "non_finite.jsonl"),
    *("figures/crops.png", "figures/curves.png", "figures/curves.pdf", "figures/attention.png"),
)
CODE = tuple(sorted(path.name for path in Path(modeling_dino.__file__).parent.glob("*_dino.py")))
PUBLISHED = ("config.json", "preprocessor_config.json", "README.md", *CODE)  # once, when it is done; and the weights
UNPUBLISHED = ".publishing"  # the folder that files are published from
FOLDERS = ("checkpoints", "tensorboard", UNPUBLISHED)
PATIENCE = 5  # seconds in which the workers of a run that was killed let go of the lock
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # of network file systems; filelock knows ENOSYS itself


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
        self.lock: BaseFileLock | None = None
        self._load()

    def _load(self) -> None:
        manifest = self._read()
        self.claimed: list[str] = manifest["claimed"]
        self.published: dict[str, list[str]] = manifest["published"]  # hashes; two while files are replaced
        self.processes: list[dict] = manifest["processes"]  # that have written here, the last one now

    @property
    def is_finished(self) -> bool:
        """Whether a run has published its weights here."""
        return any(name.endswith(".safetensors") and (self.path / name).exists() for name in self.published)

    def check(self, args: TrainingArguments) -> None:
        """Find what a run would replace although no run wrote it.

        Raises:
            ValueError: names the first such file, or a dataset's folder that the run would write to.
        """
        output = self.path.resolve()
        for name in filter(is_path, (args.dataset_name, *args.mix_with)):
            images = Path(name).expanduser().resolve()
            if images.is_dir() and images in (output, *output.parents):
                raise ValueError(
                    f"output_dir must lie outside the dataset, got {self.path} in {name}. Choose another --output_dir"
                )
            if {output / own for own in ("figures", *FOLDERS)} & {images, *images.parents}:
                raise ValueError(
                    f"a run writes to folders of its output_dir, which {name} must not be in. Choose another "
                    "--output_dir"
                )
        advice = "move it away, or choose another --output_dir"
        names = [self.path / name for name in ("figures", MANIFEST, *LOCKS, *FOLDERS)]
        for file in [*names, *(self.path / "checkpoints").glob("step_*")]:
            if file.is_symlink():
                raise ValueError(f"{file} is a symbolic link, which no run writes through; {advice}")
        if (self.path / "figures").is_file():
            raise ValueError(f"{self.path / 'figures'} was not written by a run, which has a folder there; {advice}")
        for folder in list_checkpoints(self.path):
            if not is_checkpoint(folder):
                raise ValueError(f"{folder} was not written by a run, but is named as its checkpoints; {advice}")
        folders = [name for name in FOLDERS if name != "tensorboard" or name in args.report_to]
        for name in (*WRITTEN, *PUBLISHED, *self._weights(), *folders, *LOCKS):
            file = self.path / name
            if not os.path.lexists(file) or (name in FOLDERS and file.is_dir() and not any(file.iterdir())):
                continue
            if name in LOCKS and file.is_file() and not file.stat().st_size:  # of a run that has not begun
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
            ValueError: says how to keep the run, and how to replace it.
        """
        if is_resumed or args.overwrite_output_dir:
            return
        # a run without a checkpoint is begun again by a command that resumes if there is one
        if list_checkpoints(self.path) or (read_metrics(self.path) and not args.resume_from_checkpoint):
            raise ValueError(
                f"{self.path} holds another run: give another --output_dir, --resume_from_checkpoint latest to "
                "continue it, or --overwrite_output_dir to replace it"
            )
        if self.is_finished:
            raise ValueError(
                f"{self.path} holds a finished run, and no checkpoint to resume from: give another --output_dir, or "
                "--overwrite_output_dir to replace it"
            )

    def acquire(self) -> None:
        """Create the folder, lock it until `close` or the end of the process, and read `run.json` again.

        The system releases the lock when the process dies. On a file system without such locks, the lock is a file
        with process and host, and a stale one is detected on the same host.

        Raises:
            ValueError: another run holds it; names its process and host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        native, soft = (self.path / name for name in LOCKS)
        try:
            try:
                lock = FileLock(native)
                lock.acquire(timeout=PATIENCE)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                lock = SoftFileLock(soft)
                lock.acquire(timeout=PATIENCE)
        except Timeout:
            self._load()
            holder = self.processes[-1] if self.processes else None
            who = f"process {holder['pid']} on {holder['host']}" if holder else "which has just started"
            file = next((file for file in (native, soft) if file.exists() and file.stat().st_size), None)
            stale = f"; if that process is gone, remove {file}" if file else ""  # the system's own locks are empty
            raise ValueError(
                f"another run ({who}) is writing to {self.path}: wait for its end, or give another --output_dir{stale}"
            ) from None
        self.lock = lock
        self._load()  # the run that had the lock before may have written on

    def close(self) -> None:
        """Let go of the lock."""
        if self.lock is not None:
            self.lock.release()

    def begin(self, is_resumed: bool, keeps_log: bool) -> None:
        """Clear what is left of saves that were cut off and, for a new run, of the run before; claim the names.

        Weights, checkpoints and card of the run before stay until there are new ones. Of `tensorboard/`, event files
        go that are named after a process of the run before.
        """
        for unfinished in self._checkpoints("tmp"):
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
            gone += [f"tensorboard/{name}" for name in self._event_files()]
            self.processes = []
        self.processes.append({"pid": os.getpid(), "host": socket.gethostname()})
        self.claimed = sorted({*self.claimed, *WRITTEN, *FOLDERS, *LOCKS})
        self._write()
        for name in gone:
            (self.path / name).unlink(missing_ok=True)

    def drop_replaced(self) -> None:
        """Remove the checkpoints of the run before, now that there is one of this run."""
        for folder in self._checkpoints("replaced"):
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

    def rewrite(self, name: str, change: Callable[[str], str]) -> None:
        """Change the text of a published file, unless it was edited since."""
        if not self._is_ours(name):
            return
        text = change((self.path / name).read_text(encoding="utf-8")).encode()
        self.published[name] = [*self.published[name], hashlib.sha256(text).hexdigest()]
        self._write()
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(text)

    def may_upload(self, name: str) -> bool:
        """Return whether a run or `dino-eval` wrote a file of this name here; it may have been edited since."""
        if (self.path / MANIFEST).exists():
            return name in self.published or name in self.claimed
        # of a classifier of dino-eval, or of a run of an earlier version
        names = PUBLISHED if is_classifier(self.path) else (*WRITTEN, *PUBLISHED)
        return name in names or _is_weights(name)

    def _checkpoints(self, suffix: str) -> list[Path]:
        folders = (self.path / "checkpoints").glob(f"step_*.{suffix}")
        return [folder for folder in folders if re.fullmatch(r"step_\d+", folder.stem) and folder.is_dir()]

    def _event_files(self) -> list[str]:
        """Return the names of TensorBoard's files that are of the run's processes: `...tfevents.TIME.HOST.PID.N`."""
        writers = "|".join(re.escape(f"{process['host']}.{process['pid']}.") for process in self.processes)
        files = (self.path / "tensorboard").glob("events.out.tfevents.*")
        own = re.compile(rf"events\.out\.tfevents\.\d+\.({writers})\d+")
        return [file.name for file in files if writers and own.fullmatch(file.name)]

    def _weights(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("model*.safetensors*") if _is_weights(path.name))

    def _is_ours(self, name: str) -> bool:
        file = self.path / name
        if file.is_symlink():
            return False
        if name in self.published:
            return file.is_file() and sha256_of(file) in self.published[name]
        return name in self.claimed and (file.is_file() or file.is_dir())  # not a pipe, which waits for a writer

    def _read(self) -> dict:
        file = self.path / MANIFEST
        if not file.exists():
            return self._adopt()
        try:
            if not file.is_file():  # such as a pipe, which waits for a writer
                raise ValueError
            manifest = json.loads(file.read_text())
            if manifest["made_by"] != "dino-hf" or manifest.get("version", VERSION) != VERSION:
                raise ValueError
            published = {name: list(hashes) for name, hashes in manifest["published"].items() if _is_name(name)}
            processes = [{"pid": each["pid"], "host": str(each["host"])} for each in manifest.get("processes", [])]
            return {"claimed": list(manifest["claimed"]), "published": published, "processes": processes}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{file} is damaged, or not of a run of this version; move it away, or choose another --output_dir"
            ) from error

    def _adopt(self) -> dict:
        """What a run of an earlier version, which wrote no `run.json`, has claimed and published."""
        card, config = self.path / "README.md", self.path / "config.json"
        has_card = card.is_file() and "dino-hf" in card.read_text(errors="replace")
        has_config = config.is_file() and '"model_type": "dino"' in config.read_text(errors="replace")
        has_config = has_config and not is_classifier(self.path)
        if not any(map(is_checkpoint, list_checkpoints(self.path))) and not (has_card and has_config):
            return {"claimed": [], "published": {}, "processes": []}
        names = ["README.md"] * has_card + [*PUBLISHED[:2], *CODE, *self._weights()] * has_config
        published = {name: [sha256_of(self.path / name)] for name in names if (self.path / name).is_file()}
        return {"claimed": [*WRITTEN, *FOLDERS], "published": published, "processes": []}

    def _write(self) -> None:
        manifest = {"made_by": "dino-hf", "version": VERSION, "processes": self.processes, "claimed": self.claimed,
                    "published": self.published}  # fmt: skip
        with replacing(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1) + "\n")


def _is_name(name: str) -> bool:
    """Return whether a name lies in the folder itself, and not outside of it."""
    return name == os.path.basename(name)


def _is_weights(name: str) -> bool:
    """Return whether `save_pretrained` gives files such names: whole, in parts, or the index of parts."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", name) is not None
