"""Bad inputs for all five commands: `python -m tests.fuzz --tries 300 --seed 0`.

Every try takes a command that works, on a network and images of a few pixels, and breaks one to three things:
settings, files, names. The answer must be a result or one line, within a minute, without a traceback, without a
character that a terminal would obey, and with every file of the user's as it was.
"""

import argparse
import dataclasses
import hashlib
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from training import TrainingArguments

from .commands import Background, forked, trained
from .test_training import RECIPE


LIMIT = 60  # seconds
VALUES = [
    *("", "-1", "0", "1", "2", "7", "1e400", "nan", "inf", "-0.5", "1.5", "None", "true", "x", "x" * 5000, "a\nb"),
    *("\x1b[2J", "ünïcødé", os.fsdecode(b"\xff\xfe"), "/", ".", "..", "/dev/null", "999999999", "1e-30", "[1", "{}"),
    *("a=b", "hidden_size=0", "patch_size=0", "num_attention_heads=7", "image_size=-1", "out_dim=1e9", "no/such/name"),
]
NAMES = [b"new\nline.png", b"esc\x1b[2J.png", b"lat\xff.png", b"'quo\"tes'.png", b"[x].png"]
PUBLISH = "from training.publish import main; main()"
PROTOCOLS = {
    "knn": ("--k", "--temperature"), "linear": ("--epochs", "--learning_rates", "--n_last_blocks"),
    "logistic": ("--fractions",), "few_shot": ("--shots", "--episodes"), "clustering": ("--num_clusters",),
    "retrieval": ("--k",), "features": ("--splits",), "attention": ("--num_images", "--mass"),
    "pca": ("--num_images",), "embedding": ("--method",), "neighbours": ("--num_images",),
}  # fmt: skip
SHARED = ("--model", "--dataset_name", "--image_size", "--batch_size", "--num_workers", "--dtype", "--train_split",
          "--eval_split", "--label_column", "--image_column", "--output", "--seed", "--image")  # fmt: skip


def damage(content: bytes, chance: random.Random) -> bytes:
    """A file's content that is cut, empty, flipped, of another kind or with a header of petabytes."""
    place = chance.randrange(max(len(content), 1))
    return chance.choice(
        [
            b"",
            content[:place],
            content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :],
            b"[1, 2]",
            b"{}",
            b"null",
            b"\x00" * 64,
            (2**50).to_bytes(8, "little") + content[8:],
            pickle.dumps({"a": print}),
            content.replace(b'"', b"'"),
            content.replace(b"24", b"999999999"),
        ]
    )


class Fuzz:
    """Commands that work, in a folder that each try has a copy of."""

    def __init__(self, folder: Path):
        self.folder, self.valid = folder, folder / "valid"
        rng = np.random.default_rng(0)
        for split, number in (("train", 10), ("test", 4)):
            for kind in "ab":
                (self.valid / "images" / split / kind).mkdir(parents=True)
                for i in range(number):
                    pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(self.valid / "images" / split / kind / f"{i}.png")
        (self.valid / "publish.py").write_text(PUBLISH)
        (self.valid / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"max_steps": 2, "report_to": "none"}))
        base = ("--config", self.valid / "recipe.yaml", "--dataset_name", self.valid / "images")
        trained(*base, "--output_dir", self.valid / "run")
        model = ("--model", self.valid / "run", "--dataset_name", self.valid / "images")
        trained("features", *model, "--features", self.valid / "features", module="evaluation")
        original = self.valid / "original.pth"
        trained(self.valid / "run", original, "--to", "original", module="modeling_dino.convert_dino_checkpoint")

    def draw(self, chance: random.Random, here: Path) -> tuple[str, list[str]]:
        """A module, and arguments that break something."""
        images, run = here / "images", here / "run"
        command = chance.choice(["training"] * 4 + ["evaluation"] * 4 + ["check", "convert", "convert", "publish"])
        if command == "training":
            argv = ["--config", here / "recipe.yaml", "--dataset_name", images, "--output_dir", here / "out"]
            source = chance.choice([None, "resume", "init"])
            if source == "resume":
                argv[-1], argv[len(argv) :] = run, ["--resume_from_checkpoint", "latest"]
            elif source == "init":
                argv += ["--init_from", chance.choice([run, run / "checkpoints/step_0000002", here / "original.pth"])]
            names = [f"--{field.name}" for field in dataclasses.fields(TrainingArguments)]
            module = "training"
        elif command == "evaluation":
            protocol = chance.choice(list(PROTOCOLS))
            argv = [protocol, "--model", run, "--dataset_name", images]
            if chance.random() < 0.3:
                argv += ["--features", here / "features"]
            names, module = [*PROTOCOLS[protocol], *SHARED], "evaluation"
        elif command == "check":
            argv, names = [images], ["--split", "--num_channels", "--num_workers", "--image_column", "--streaming"]
            module = "training.check"
        elif command == "convert":
            argv = chance.choice([[here / "original.pth", here / "out"], [run, here / "out.pth", "--to", "original"],
                                  [run, here / "out", "--to", "vit"]])  # fmt: skip
            names, module = ["--to", "--arch", "--linear", "--image_size"], "modeling_dino.convert_dino_checkpoint"
        else:
            argv, names, module = [run, "tester/model"], ["--private", "--x"], here / "publish.py"
        argv = list(map(str, argv))
        for _ in range(chance.choice((1, 1, 2, 3))):
            kind = chance.choice(["setting", "setting", "file", "name", "missing", "argument"])
            if kind == "setting":
                argv += [chance.choice(names), *([chance.choice(VALUES)] if chance.random() < 0.9 else [])]
            elif kind == "argument":
                argv[chance.randrange(len(argv))] = chance.choice(VALUES).replace("\0", "")
            elif kind == "name":
                odd = chance.choice(NAMES)
                target = images / "train/a" / os.fsdecode(odd)
                shutil.copy(images / "train/a/0.png", target)
                if chance.random() < 0.5:
                    target.write_bytes(b"no image")
            else:
                file = chance.choice(
                    sorted(path for path in here.rglob("*") if path.is_file() and path.name != "publish.py")
                )
                if kind == "missing":
                    file.unlink()
                else:
                    file.write_bytes(damage(file.read_bytes(), chance))
        return module, argv

    def attempt(self, number: int, seed: int) -> dict:
        chance, here = random.Random(f"{seed} {number}"), self.folder / f"try_{number}"
        shutil.copytree(self.valid, here)
        for path in here.rglob("*.json"):  # which name their folder
            path.write_text(path.read_text().replace(str(self.valid), str(here)))
        module, argv = self.draw(chance, here)
        argv = [word for word in argv if "\0" not in word]
        before = content(here / "images")
        (self.folder / "streams").mkdir(exist_ok=True)
        for stream in (self.folder / "streams").iterdir():
            stream.unlink()
        os.chdir(here)  # relative names in it are of the try
        running = Background(*argv, module=module, folder=self.folder / "streams")
        code = running.poll(LIMIT)
        os.chdir(ROOT)
        wrong = []
        if code is None:
            os.killpg(running.pid, 9)
            running.poll(5)
            wrong.append("does not end")
        elif code not in (0, 1, 2):
            wrong.append(f"exit code {code}")
        said = running.streams[0].read_text(errors="replace") + running.streams[1].read_text(errors="replace")
        errors = [line for line in said.split("\n") if "error:" in line and line.startswith("dino-")]
        if "Traceback" in said or "Exception ignored" in said:
            wrong.append("a traceback")
        if code in (1, 2) and len(errors) != 1:
            wrong.append(f"{len(errors)} lines of errors")
        if any(not character.isprintable() and character not in "\n\r\t" for character in said):
            wrong.append("a control character")
        if content(here / "images") != before:
            wrong.append("the user's images changed")
        result = {
            "command": Path(module).stem,
            "argv": argv,
            "code": code,
            "wrong": wrong,
            "said": errors or said[-300:],
        }
        if not wrong:
            shutil.rmtree(here)
        return result


ROOT = os.getcwd()


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_TOKEN"] = "x"  # or dino-publish would not look at the run
    with tempfile.TemporaryDirectory(prefix="fuzz_", ignore_cleanup_errors=True) as folder:
        fuzz, counts, is_wrong = Fuzz(Path(folder)), Counter(), False
        for number in range(options.first, options.first + options.tries):
            result = fuzz.attempt(number, options.seed)
            counts[result["command"], f"code {result['code']}"] += 1
            if result["wrong"]:
                counts[result["command"], "wrong"] += 1
                is_wrong = True
            if result["wrong"] or result["code"] == 1:
                print(number, result, flush=True)
        for (command, what), count in sorted(counts.items()):
            print(f"{command:40} {what:10} {count:5}")
    forked.stop()
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
