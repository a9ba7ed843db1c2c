"""Bad inputs for all five commands: `python -m tests.fuzz --tries 300 --seed 0`.

Each try copies a folder in which every command works, on images of a few pixels, and breaks one to three things:
settings, files, names. The command then runs as users run it. It must end within a minute, with exit code 0 or 2, or
with 1 if nobody foresaw the error. It must print at most one line of error, and neither a traceback nor a character
that a terminal obeys. It must leave no process behind, and all files of the user as they were.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluation.__main__ import evaluate_from_command_line
from evaluation.protocols import PROTOCOLS
from modeling_dino.convert_dino_checkpoint import convert_from_command_line
from training.__main__ import train_from_command_line
from training.check import check_from_command_line
from training.publish import publish_from_command_line

from .commands import Background, forked, trained
from .original import FIXTURES
from .test_training import RECIPE


LIMIT = 60  # seconds
MEMORY = 16 << 30  # bytes of addresses that a command may reserve
CONVERT, PUBLISH = "modeling_dino.convert_dino_checkpoint", "from training.publish import main; main()"
COMMANDS = "train eval convert eval train check eval train convert eval publish".split()

NUMBERS = ("-1", "0", "1", "2", "7", "1.5", "-0.5", "1e400", "nan", "inf", "-inf", "1e-30", "999999999", "9" * 30,
           "0x10", "1_0", "\u0663")  # fmt: skip
WORDS = ("", " ", "x", "None", "true", "[1", "{}", "null", "a=b", "x" * 5000, "a\nb", "\x1b[2J", "\x07", "ünïcødé",
         "\u202eabc", os.fsdecode(b"\xff\xfe"), "-", "--", "--x", "%s%n", "{0}", "a,b", "user/name", "latest", "none",
         "no/such/name", "untrained:", "raw_pixels:x", "timm/x", "hf://x", "a::b", "~nobody/x")  # fmt: skip
OVERRIDES = ("hidden_size=0", "hidden_size=1000000000", "patch_size=0", "num_attention_heads=7", "image_size=-1",
             "image_size=0", "out_dim=1e9", "drop_path_rate=nan", "num_channels=9999999", "num_hidden_layers=0",
             "mlp_ratio=inf", "layer_norm_eps=nan", "hidden_act=x\x1b[2J", "backbone_config={}", "=", "a.b.c=1",
             "backbone_config={\"model_type\": \"resnet\", \"depths\": []}", "initializer_range=-1")  # fmt: skip
PLACES = (".", "..", "/dev/null", "/dev/zero", "/proc/self/mem", "no/such/folder/x", "~x", "images", "images/train/a",
          "images/train/a/0.png", "run", "run/config.json", "run/checkpoints", "recipe.yaml", "original.pth",
          "notes.txt", "empty", "out/x/y", "features", "train.parquet", "vit")  # fmt: skip
ABSURD = (None, "", "x", "\x1b[2J", "a\nb", "x" * 5000, -1, 0, 7, 10**9, 10**30, 1.5, 1e308, math.nan, math.inf, True,
          [], [1, 2], ["x"], {}, {"a": 1})  # fmt: skip
NAMES = (b"new\nline", b"esc\x1b[2J", b"lat\xff", b"'quo\"tes'", b"[x]", b"*?", b"{a}", b"%s", b"-x", b" ", b"a::b",
         b"a#b", "ünï".encode(), "\u202ex".encode(), b"x" * 240)  # fmt: skip
WHOLE = (b"", b"[1, 2]", b"{}", b"null", b"7", b'"x"', b"\x00" * 64, b"\xff\xfe\x00", b"{", b"a: [", b"a: b: c",
         b"- a", b"\x80\x04N.", pickle.dumps({"a": print}), b"[" * 100_000)  # fmt: skip


def flags_of(main: Callable, *argv: str) -> list[str]:
    """The flags that a command's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--\w+", text.getvalue())) - {"--debug", "--help"})


@dataclass
class Try:
    """A command line in a folder of its own, and what has been broken in it."""

    command: str
    module: str
    argv: list[str]
    flags: list[str]
    faults: list[str] = field(default_factory=list)


# Faults. Each takes a try, its folder and a generator, and breaks one thing.


def bad_setting(attempt: Try, here: Path, chance: random.Random) -> None:
    flag = chance.choice(attempt.flags)
    values = chance.choice([NUMBERS, NUMBERS, WORDS, PLACES])
    if flag == "--config_overrides":
        values = chance.choice([OVERRIDES, OVERRIDES, WORDS])
    number = chance.choice([0, 1, 1, 1, 1, 1, 1, 1, 2, 3])
    attempt.argv += [flag, *(chance.choice(values) for _ in range(number))]


def bad_argument(attempt: Try, here: Path, chance: random.Random) -> None:
    attempt.argv[chance.randrange(len(attempt.argv))] = chance.choice(WORDS + PLACES)


def _inputs(attempt: Try, here: Path, chance: random.Random) -> list[Path]:
    """Files of one input of the command, all with the same ending."""
    given = [path for path in map(Path, attempt.argv) if here in path.parents and (path.is_file() or path.is_dir())]
    if not given:
        return [here / "notes.txt"]
    place = chance.choice(sorted(given))
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    ending = chance.choice(sorted({path.suffix for path in files}) or [""])
    return [path for path in files if path.suffix == ending] or [here / "notes.txt"]


def damaged_file(attempt: Try, here: Path, chance: random.Random) -> None:
    """Cut, flip a bit, or replace by something of another kind."""
    file = chance.choice(_inputs(attempt, here, chance))
    content = file.read_bytes()
    place = chance.randrange(max(len(content), 1))
    flipped = content[:place] + bytes(byte ^ (1 << chance.randrange(8)) for byte in content[place : place + 1])
    huge = (2**50).to_bytes(8, "little") + content[8:]
    large = content.replace(b"24", b"999999999")
    kinds = [content[:place], content[:place], flipped + content[place + 1 :], flipped + content[place + 1 :], huge]
    file.write_bytes(chance.choice([*kinds, large, content + b"x", chance.choice(WHOLE), chance.choice(WHOLE)]))


def missing_file(attempt: Try, here: Path, chance: random.Random) -> None:
    """Remove a file, or all with the same ending."""
    files = _inputs(attempt, here, chance)
    for file in files if chance.random() < 0.3 else [chance.choice(files)]:
        file.unlink()


def special_file(attempt: Try, here: Path, chance: random.Random) -> None:
    """Put a folder, a pipe, or a link that leads nowhere in the place of a file."""
    file = chance.choice(_inputs(attempt, here, chance))
    file.unlink()
    kind = chance.choice(["folder", "pipe", "loop", "dangling"])
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if kind == "loop" else "nowhere")


def wrong_structure(attempt: Try, here: Path, chance: random.Random) -> None:
    """Change, add or remove a field of a JSON or YAML."""
    files = [here / "recipe.yaml"] if "recipe.yaml" in " ".join(attempt.argv) and chance.random() < 0.5 else [
        path for word in attempt.argv if word.startswith(str(here)) for path in sorted(Path(word).rglob("*"))
        if path.suffix in (".json", ".jsonl", ".yaml") and path.is_file()
    ]  # fmt: skip
    files = [path for path in files if path.is_file()]
    if not files:
        return damaged_file(attempt, here, chance)
    by_name = sorted({path.name for path in files})
    name = chance.choice(by_name)
    file = chance.choice([path for path in files if path.name == name])
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    number = chance.randrange(len(lines))
    content = yaml.safe_load(lines[number]) if file.suffix == ".yaml" else json.loads(lines[number])
    place, value = content, chance.choice(ABSURD)
    while isinstance(place, dict) and place:
        key = chance.choice([*sorted(place), *sorted(place), chance.choice(["x", "\x1b", "", "model_type"])])
        if isinstance(place.get(key), dict) and chance.random() < 0.7:
            place = place[key]
            continue
        if key in place and chance.random() < 0.2:
            del place[key]
        else:
            place[key] = value
        break
    else:
        content = value
    lines[number] = yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content)
    file.write_text("\n".join(lines))


def _wrong_tensors(state: dict, chance: random.Random) -> None:
    key = chance.choice(sorted(state, key=str))
    kind = chance.choice(["drop", "rename", "shape", "dtype", "nan", "scalar", "empty", "add", "huge"])
    tensor = state[key] if isinstance(state[key], torch.Tensor) else torch.zeros(3)
    if kind in ("drop", "rename"):
        del state[key]
    if kind == "rename":
        state["x\x1b[2J" if chance.random() < 0.5 else f"{key}.x"] = tensor
    elif kind == "shape":
        state[key] = torch.zeros(*(size + 1 for size in tensor.shape))
    elif kind == "dtype":
        state[key] = tensor.to(chance.choice([torch.int64, torch.bool, torch.float16, torch.complex64]))
    elif kind == "nan":
        state[key] = torch.full(tensor.shape, math.nan)
    elif kind in ("scalar", "empty"):
        state[key] = torch.tensor(1.0) if kind == "scalar" else torch.zeros(0)
    elif kind == "add":
        state["extra"] = torch.zeros(2)
    elif kind == "huge":
        state[key] = torch.zeros(1, 20_000)


def wrong_tensors(attempt: Try, here: Path, chance: random.Random) -> None:
    """Change weights: missing, renamed, misshapen, of another type, non-finite; in safetensors or in pickles."""
    files = [path for word in attempt.argv if word.startswith(str(here)) and Path(word).exists()
             for path in [Path(word), *sorted(Path(word).rglob("*"))]
             if path.suffix in (".safetensors", ".pth", ".pt") and path.is_file()]  # fmt: skip
    if not files:
        return damaged_file(attempt, here, chance)
    file = chance.choice(files)
    with contextlib.suppress(Exception):  # it has been damaged before
        if file.suffix == ".safetensors":
            state = load_file(file)
            _wrong_tensors(state, chance)
            return save_file(state, file, chance.choice([None, {"format": "pt"}, {"format": "x"}]))
        state = content = torch.load(file, weights_only=False)
        while isinstance(content, dict) and chance.random() < 0.7:
            inner = [value for value in content.values() if isinstance(value, dict) and value]
            if not inner:
                break
            content = chance.choice(inner)
        if isinstance(content, dict) and chance.random() < 0.7:
            _wrong_tensors(content, chance)
        elif isinstance(content, dict) and content:
            content[chance.choice(sorted(content, key=str))] = chance.choice([*ABSURD, print, np.float64(1)])
        else:
            state = chance.choice([[1], torch.zeros(3), "x", None, print])
        torch.save(state, file)


def _header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and ends."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\r" + chunk + struct.pack(">I", zlib.crc32(chunk))


def broken_images(attempt: Try, here: Path, chance: random.Random) -> None:
    """One image that is broken or unusual, or all."""
    folder = here / "images"
    files = sorted(path for path in folder.rglob("*.png") if path.is_file())
    odd = io.BytesIO()
    mode = chance.choice(["L", "1", "P", "RGBA", "CMYK", "I;16", "F"])
    kind = "TIFF" if mode in ("CMYK", "F") else "PNG"
    Image.new(mode, chance.choice([(1, 1), (24, 24), (1, 3000)])).save(odd, kind)
    contents = [b"", b"no image", _header(60_000, 60_000), _header(0, 0), _header(24, 24), odd.getvalue(), None]
    content = chance.choice(contents)
    for file in files if chance.random() < 0.3 else chance.sample(files, min(len(files), 2)):
        file.write_bytes(file.read_bytes()[: chance.randrange(60)] if content is None else content)


def odd_name(attempt: Try, here: Path, chance: random.Random) -> None:
    """Rename an image, a class folder, or an input as a whole."""
    name = os.fsdecode(chance.choice(NAMES))
    kind = chance.choice(["image", "image", "class", "input"])
    given = [word for word in attempt.argv if word.startswith(f"{here}/") and os.path.exists(word)]
    if kind == "input" and given:
        old = Path(chance.choice(sorted(given)))
        new = old.with_name(name + old.suffix)
        old.rename(new)
        attempt.argv = [str(new) if word == str(old) else word for word in attempt.argv]
    elif kind == "class" and (here / "images/train/a").is_dir():
        (here / "images/train/a").rename(here / "images/train" / name)
    else:
        images = sorted((here / "images").rglob("*.png"))
        if images:
            chance.choice(images).rename(here / "images" / f"{name}.png")


FAULTS = (
    *(bad_setting,) * 6, bad_argument, *(damaged_file,) * 3, missing_file, special_file, *(wrong_structure,) * 3,
    *(wrong_tensors,) * 2, broken_images, odd_name,
)  # fmt: skip


def noise(rng: np.random.Generator, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)


class Fuzz:
    """Commands that work, in a folder that each try has a copy of.

    Args:
        folder: Where that and the tries lie.
        keep: Keep the folders of wrong tries.
    """

    def __init__(self, folder: Path, keep: bool = False):
        self.folder, self.valid, self.keep = folder, folder / "valid", keep
        self.script = folder / "publish.py"
        self.script.write_text(PUBLISH)
        self._make_data(np.random.default_rng(0))
        here = self.valid
        base = ("--config", here / "recipe.yaml", "--dataset_name", here / "images")
        trained(*base, "--output_dir", here / "run")
        model = ("--model", here / "run", "--dataset_name", here / "images")
        trained("features", *model, "--features", here / "features", module="evaluation")
        trained(here / "run", here / "original.pth", "--to", "original", module=CONVERT)
        trained(here / "run", here / "vit", "--to", "vit", module=CONVERT)
        shutil.copy(FIXTURES / "checkpoint.pth", here / "checkpoint.pth")
        classifier = {"module.linear.weight": torch.zeros(2, 48), "module.linear.bias": torch.zeros(2)}
        torch.save({"state_dict": classifier}, here / "linear.pth")
        self.flags = {
            "train": flags_of(train_from_command_line),
            "check": flags_of(check_from_command_line),
            "convert": flags_of(convert_from_command_line),
            "publish": flags_of(publish_from_command_line),
        }
        self.flags |= {name: flags_of(evaluate_from_command_line, name) for name in (*PROTOCOLS, "suite")}

    def _make_data(self, rng: np.random.Generator) -> None:
        """A dataset in each format that the commands read."""
        here = self.valid
        for split, number in (("train", 10), ("test", 4)):
            for kind in "ab":
                for i in range(number):
                    noise(rng, here / f"images/{split}/{kind}/{i}.png")
        (here / "empty").mkdir()
        (here / "notes.txt").write_text("mine")
        recipe = RECIPE | {"max_steps": 2, "report_to": "none"}
        (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        images = sorted((here / "images/train").rglob("*.png"))
        features = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
        rows = {"image": [str(path) for path in images], "label": [i % 2 for i in range(len(images))]}
        dataset = Dataset.from_dict(rows, features=features)
        dataset.to_parquet(here / "train.parquet")
        dataset.save_to_disk(str(here / "saved"))
        with tarfile.open(here / "train.tar", "w") as tar:
            for i, path in enumerate(images):
                tar.add(path, f"{i}.png")
        names = [f"i{i}" for i in range(6)]
        for name in [*names, "q0"]:
            noise(rng, here / f"roxford5k/jpg/{name}.jpg")
        truth = [{"easy": [0, 1], "hard": [2], "junk": [3], "bbx": [0, 0, 20, 20]}]
        content = {"imlist": names, "qimlist": ["q0"], "gnd": truth}
        (here / "roxford5k/gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
        for i in range(3):
            for block in ("original", "jpegqual/3"):
                noise(rng, here / f"copydays/{block}/20{i:02d}00.jpg")
            noise(rng, here / f"copydays/strong/20{i:02d}01.jpg")
            noise(rng, here / f"davis/JPEGImages/480p/one/{i:05d}.jpg")
            noise(rng, here / f"voc/JPEGImages/{i}.jpg")
            indices = np.zeros((24, 24), np.uint8)
            indices[4:12, 4 + i : 16] = 1
            for path in (f"davis/Annotations/480p/one/{i:05d}.png", f"voc/SegmentationObject/{i}.png"):
                (here / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(indices).save(here / path)
        for path, text in (
            ("davis/ImageSets/2017/val.txt", "one\n"),
            ("voc/ImageSets/Segmentation/val.txt", "0\n1\n"),
        ):
            (here / path).parent.mkdir(parents=True)
            (here / path).write_text(text)
        measure = [{"protocol": "knn", "dataset_name": "images", "k": [1, 5], "show": ["knn_5_top1"]}]
        (here / "suite.yaml").write_text(yaml.safe_dump({"data": {"images": "images"}, "measure": measure}))

    def draw(self, command: str, chance: random.Random, here: Path) -> Try:
        """A command line that works."""
        images, run = here / "images", here / "run"
        flags, module = self.flags.get(command), {"train": "training", "check": "training.check", "eval": "evaluation",
                                                  "convert": CONVERT, "publish": self.script}[command]  # fmt: skip
        data = chance.choice([images, images, here / "train.parquet", here / "train.tar", here / "saved"])
        if command == "train":
            argv = ["--config", here / "recipe.yaml", "--dataset_name", data, "--output_dir", here / "out"]
            source = chance.choice([None, None, "resume", "init", "knn"])
            if source == "resume":
                argv = ["--config", here / "recipe.yaml", "--dataset_name", images, "--output_dir", run]
                argv += ["--resume_from_checkpoint", "latest", "--max_steps", 3, "--allow_changed", "max_steps"]
            elif source == "init":
                argv += ["--init_from", chance.choice([run, run / "checkpoints/step_0000002", here / "original.pth"])]
            elif source == "knn":
                argv[3] = images
                argv += ["--eval_steps", 1]
        elif command == "eval":
            name = chance.choice([*PROTOCOLS, *PROTOCOLS, "suite"])
            flags, place = self.flags[name], {"landmarks": here / "roxford5k", "copy_detection": here / "copydays",
                                              "video_segmentation": here / "davis",
                                              "segmentation_masks": here / "voc"}.get(name, images)  # fmt: skip
            argv = [name, "--model", chance.choice([run, run, here / "vit"]), "--dataset_name", place]
            if name == "suite":
                argv = [name, "--config", here / "suite.yaml", "--model", run, "--data", f"images={images}",
                        "--output_dir", here / "out"]  # fmt: skip
            elif "--features" in flags and chance.random() < 0.4:
                argv += ["--features", here / "features"]
            elif "--output" in flags:
                suffix = "csv" if name == "duplicates" else "png" if name in PICTURES else "json"
                argv += ["--output", here / f"out/{name}.{suffix}"]
            argv += ["--epochs", 1] * ("--epochs" in flags)
            argv += ["--image_size", 32] * (place != images)
        elif command == "check":
            argv = [data]
        elif command == "convert":
            heads = ["--num_attention_heads", 2]
            argv = chance.choice([
                [here / "original.pth", here / "out", *heads], [here / "checkpoint.pth", here / "out", *heads],
                [here / "checkpoint.pth", here / "out", "--key", "teacher", "--num_attention_heads", 3],
                [run, here / "out.pth", "--to", "original"], [run, here / "out", "--to", "vit"],
                [run / "checkpoints/step_0000002", here / "out.pth", "--to", "original"], [here / "vit", here / "out"],
                [here / "original.pth", here / "out", *heads, "--linear", here / "linear.pth"],
            ])  # fmt: skip
        else:
            argv = [run, "tester/model"]
        return Try(command, str(module), list(map(str, argv)), flags)

    def attempt(self, number: int, seed: int) -> dict:
        """Run a try; return what it is, how it ended and what is wrong."""
        chance, here = random.Random(f"{seed} {number}"), self.folder / f"try_{number}"
        shutil.copytree(self.valid, here)
        for path in (path for path in here.rglob("*") if path.suffix in (".json", ".txt", ".jsonl", ".md", ".yaml")):
            path.write_text(path.read_text().replace(str(self.valid), str(here)))  # they name their folder
        attempt = self.draw(COMMANDS[number % len(COMMANDS)], chance, here)
        for fault in chance.sample(FAULTS, chance.choice((1, 1, 2, 3))):
            try:
                fault(attempt, here, chance)
                attempt.faults.append(fault.__name__)
            except (
                OSError,
                ValueError,
                TypeError,
                yaml.YAMLError,
            ) as error:  # an earlier fault has taken what it would break
                attempt.faults.append(f"no {fault.__name__} ({type(error).__name__})")
        before, streams = contents(here), self.folder / f"streams_{number}"
        streams.mkdir()
        (here / "work").mkdir()
        os.chdir(here / "work")
        began = time.monotonic()
        try:
            # without a token, dino-publish would not look at the run
            running = Background(*attempt.argv, module=attempt.module, folder=streams, HF_TOKEN="x")
        finally:
            os.chdir(ROOT)
        code, wrong = running.poll(LIMIT), []
        if code is None and asks_for_much(attempt, here):  # for which nobody waits; it must stop when told
            running.send(signal.SIGTERM)
            code = 0 if running.poll(20) in (75, 128 + signal.SIGTERM) else running.code
        if code is None:
            wrong.append(f"no end within {LIMIT} s")
        elif code not in (0, 1, 2):
            wrong.append(f"exit code {code}")
        seconds = time.monotonic() - began
        if left := left_over(running.pid, patience=0 if code is None else 2):
            wrong += [f"{len(left)} processes left over"] * (code is not None)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, 9)
            running.poll(5)
        said = [os.fsdecode(stream.read_bytes()) for stream in running.streams]
        wrong += wrong_words(*said, code)
        after = contents(here)
        changed = [name for name in before if after.get(name) != before[name] and not may_change(name, attempt, here)]
        if changed:
            wrong.append(f"files changed or deleted: {changed[:3]}")
        if not (wrong and self.keep):
            shutil.rmtree(here)
            shutil.rmtree(streams)
        return {
            "number": number,
            "command": f"dino-{attempt.command}",
            "faults": attempt.faults,
            "code": code,
            "wrong": wrong,
            "argv": attempt.argv,
            "said": said,
            "seconds": seconds,
        }


ROOT = os.getcwd()
PICTURES = ("attention", "pca", "neighbours", "embedding")


def asks_for_much(attempt: Try, here: Path) -> bool:
    """Return whether steps, draws or the like are so many that no command is done with them."""
    recipe = here / "recipe.yaml"
    words = attempt.argv + (recipe.read_text(errors="replace").split() if recipe.is_file() else [])
    return any(word.isdecimal() and int(word) >= 10**8 for word in words)


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file, or what else lies there."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "pipe"
    return found


def may_change(name: str, attempt: Try, here: Path) -> bool:
    """Return whether a file belongs to a run or features that the command continues, or may be overwritten."""
    place = here / name
    given = [Path(word) for word in attempt.argv if word.startswith(str(here))]
    if any("overwrite" in word for word in attempt.argv):
        given += [here / "work" / word for word in attempt.argv if word in PLACES]
        return any(Path(os.path.normpath(path)) in (place, *place.parents) for path in given)
    is_resumed = "--resume_from_checkpoint" in attempt.argv or attempt.command == "publish"
    kept = ("--features",) if attempt.command == "eval" else ("--output_dir",) if is_resumed else ()
    owned = [Path(after) for word, after in zip(attempt.argv, attempt.argv[1:]) if word in kept]
    owned += given[:1] if attempt.command == "publish" else []
    return any(path in place.parents for path in owned)


def left_over(session: int, patience: float) -> list[int]:
    """Processes of a session that are alive after so many seconds."""
    end = time.monotonic() + patience
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, of_session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
                if int(of_session) == session and state not in "ZX":
                    found.append(int(path.parent.name))
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.05)


def wrong_words(stdout: str, stderr: str, code: int | None) -> list[str]:
    """What is wrong in what a command has printed."""
    wrong, said = [], stdout + stderr
    if "Traceback" in said or "Exception ignored" in said:
        wrong.append("a traceback")
    odd = {character for character in said if not character.isprintable() and character not in "\n\r\t"}
    if odd:
        wrong.append(f"control characters {sorted(odd)}")
    lines = [line.rpartition("\r")[2].strip() for line in stderr.split("\n")]
    warned = "warning|on this CPU. Use a GPU|and training continues|SIGTERM|image files found|"
    warned += "is damaged, .*; looking for the one before|should (be at most|end at) "
    lines = [line for line in lines if line and not re.search(warned, line, re.I)]
    errors = [line for line in lines if re.match(r"dino-\w+.*?: error: ", line)]
    has_found = code == 1 and "would be skipped" in stdout  # dino-check
    if code == 1 and not has_found:
        wrong.append("unforeseen")
    if code in (1, 2) and len(errors) != 1 and not has_found:
        wrong.append(f"{len(errors)} lines of error")
    if others := [line for line in lines if line not in errors and not re.search(r"\d+%\||/s\]$|s/\w+\]$", line)]:
        wrong.append(f"{len(others)} other lines on stderr, such as {others[0][:200]!a}")
    if any(len(word) > 1000 for line in errors for word in line.split()):
        wrong.append("a word of more than 1000 characters")
    return wrong


def report(results: list[dict]) -> str:
    """A table by command and fault. A try with several faults counts for each of them."""
    lines = [f"{'command':13} {'fault':17} {'tries':>5} {'0':>4} {'1':>4} {'2':>4} {'wrong':>5}"]
    groups = {}
    for result in results:
        for name in ("all", *result["faults"]):
            if not name.startswith("no "):
                groups.setdefault((result["command"], name), []).append(result)
                groups.setdefault(("all", name), []).append(result)
    for (command, name), group in sorted(groups.items()):
        codes = Counter(result["code"] for result in group)
        numbers = [len(group), codes[0], codes[1], codes[2]]
        wrong = sum(bool(result["wrong"]) for result in group)
        lines.append(
            f"{command:13} {name:17} {numbers[0]:5} " + "".join(f"{n:4} " for n in numbers[1:]) + f"{wrong:5}"
        )
    return "\n".join(lines)


def explain(result: dict, seed: int) -> str:
    """How a try ended, and how to see it again."""
    last = ([line for line in result["said"][1].splitlines() if "error:" in line] or [""])[-1]
    argv = ascii(shlex.join(word if len(word) < 300 else f"{word[:20]}...({len(word)})" for word in result["argv"]))
    return (
        f"try {result['number']}, {'; '.join(result['wrong'])}: exit code {result['code']} after "
        f"{result['seconds']:.1f} s, {', '.join(result['faults'])}\n    {result['command']} {argv}\n"
        f"    {ascii(last[:600])}\n"
        f"    python -m tests.fuzz --seed {seed} --first {result['number']} --tries 1 --folder FOLDER"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first try; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="new folder, which keeps wrong tries; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # sizes that no memory holds end the try alone
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fuzz_", ignore_cleanup_errors=True) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["HF_DATASETS_CACHE"] = f"{temporary}/cache"
        fuzz, results = Fuzz(folder.resolve(), keep=options.folder is not None), []
        for number in range(options.first, options.first + options.tries):
            results.append(fuzz.attempt(number, options.seed))
            if results[-1]["wrong"]:
                print(explain(results[-1], options.seed), flush=True)
        print(report(results))
        forked.stop()
    is_wrong = any(result["wrong"] for result in results)
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
