"""A campaign of faults against real training runs: `python -m tests.campaign --tries 200 --seed 0`.

Every try starts a run through the real command, with workers, and does one thing to it at a random moment: an
exception of any type at any point, or a signal to the main process, a rank, a worker, the launcher, or the whole
group, once or twice. Then everything that the run has started must be gone within 30 seconds, without a traceback,
with a line that says what happened; and the run that is resumed must end as one that was left alone, bit for bit.

By hand, as 200 tries take two hours on two cores. `--forked`, of which `tests/test_campaign.py` runs a few, starts
runs of one process as forks that have imported everything, and so strikes none while it imports; every tenth try is of
two.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file

from .test_training import RECIPE


LIMIT = 30  # seconds until everything must be gone
GRACE = 60  # seconds more that are waited, to tell slow from never

# where an exception can come from, and what is replaced to bring it; each is called with its original
POINTS = {
    "decoding": "evaluation.decoding:EncodedImage.decode",
    "loader": "training.data:CropLoader._next_on_all",
    "step": "training.train:backpropagate",
    "optimizer": "training.train:update_teacher_",
    "k-NN": "training.knn_evaluation:knn_accuracy",
    "features": "evaluation.features:pooled",
    "drawing": "training.figures:draw_curves",
    "logging": "training.signals:Signals.read",
    "saving": "training.checkpoint:write_manifest",
    "publishing": "training.train:publish",
}
EXCEPTIONS = ("RuntimeError", "MemoryError", "AssertionError", "KeyError", "OSError", "ValueError", "ImportError",
              "torch.OutOfMemoryError")  # fmt: skip

SCRIPT = """
import importlib, os, sys
sys.argv[0] = "dino-train"
from training.__main__ import main

point, exception, calls, rank = {point!r}, {exception!r}, {calls!r}, {rank!r}

def arm():
    import torch
    module, _, path = point.partition(":")
    owner = importlib.import_module(module)  # not the function of that name
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, count = getattr(owner, name), [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] == calls:
            raise eval(exception)("injected")
        return original(*args, **kwargs)

    setattr(owner, name, failing)

if point and os.environ.get("RANK", "0") == rank:
    arm()
main()
"""

SETTINGS = RECIPE | {
    "num_workers": 2, "num_train_epochs": 12, "save_steps": 7, "eval_steps": 20, "save_total_limit": 2,
    "report_to": "none",
}  # fmt: skip
NUM_STEPS = 60


@dataclass
class Fault:
    """What is done to a run."""

    kind: str  # "exception" or the name of a signal
    where: str  # a point, or who gets the signal
    exception: str = ""
    calls: int = 0
    moment: float = 0.0  # share of the run's time from its start; an exception has none
    twice: bool = False
    processes: int = 1

    @property
    def name(self) -> str:
        what = self.exception if self.kind == "exception" else self.kind + " twice" * self.twice
        return f"{what}, {self.where}"


def draw_fault(chance: random.Random, processes: int) -> Fault:
    if chance.random() < 0.45:
        where = chance.choice(list(POINTS))
        few = {"publishing": 1, "saving": 4, "k-NN": 3, "drawing": 2, "features": 12}
        calls = chance.randint(1, few.get(where, 50))
        return Fault("exception", where, chance.choice(EXCEPTIONS), calls, processes=processes)
    kind = chance.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"))
    targets = ["main", "group"] + ["worker"] * (kind == "SIGKILL") + ["launcher", "rank"] * (processes == 2)
    twice = kind != "SIGKILL" and chance.random() < 0.5
    return Fault(kind, chance.choice(targets), moment=chance.random(), twice=twice, processes=processes)


class Fork:
    """A Python that runs a script, as far as `Campaign` uses a `Popen`: a fork of this one, with what it imported."""

    def __init__(self, argv: list[str], output, environment: dict[str, str]):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for descriptor, file in enumerate((os.open(os.devnull, os.O_RDONLY), output.fileno(), output.fileno())):
                os.dup2(file, descriptor)
            os.environ.update(environment)
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
            os._exit(0)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", seconds)
            time.sleep(0.02)
        return self.returncode


class Campaign:
    """Runs of one dataset and recipe.

    Args:
        folder: Where everything goes.
        dataset: Folder of images in classes, with the splits train and test.
        is_forked: Whether runs of one process are forks of this one.
    """

    def __init__(self, folder: Path, dataset: Path, is_forked: bool = False):
        self.folder, self.is_forked = folder, is_forked
        self.argv = ["--config", str(folder / "recipe.yaml"), "--dataset_name", str(dataset)]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
        self.whole: dict[int, tuple[Path, float]] = {}

    def start(self, output: Path, fault: Fault, *more: str) -> subprocess.Popen:
        script = self.folder / f"{output.name}.py"
        point = POINTS.get(fault.where, "")
        script.write_text(SCRIPT.format(point=point, exception=fault.exception, calls=fault.calls,
                                        rank=str(fault.processes - 1)))  # fmt: skip
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0",
                    "--num_processes", "2"] if fault.processes == 2 else []  # fmt: skip
        batch = ["--per_device_train_batch_size", str(8 // fault.processes)]
        line = [sys.executable, *launcher, str(script), *self.argv, *batch, "--output_dir", str(output), *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
                                    "PYTHONPATH": os.getcwd()}  # fmt: skip
        with open(self.folder / f"{output.name}.out", "a") as file:
            if self.is_forked and fault.processes == 1:
                return Fork(line[1:], file, environment)
            return subprocess.Popen(line, stdout=file, stderr=file, env=environment, start_new_session=True)

    def reference(self, processes: int) -> tuple[Path, float]:
        """A run that was left alone, and how long it took."""
        if processes not in self.whole:
            output, start = self.folder / f"whole_{processes}", time.monotonic()
            assert self.start(output, Fault("none", "", processes=processes)).wait(300) == 0
            self.whole[processes] = output, time.monotonic() - start
        return self.whole[processes]

    def attempt(self, number: int, fault: Fault) -> dict:
        """One try; says how long it took until everything was gone, and what was wrong."""
        whole, seconds = self.reference(fault.processes)
        output = self.folder / f"try_{number}"
        running, self.is_heard = self.start(output, fault), True
        root, seen = psutil.Process(running.pid), set()
        start = struck = time.monotonic()
        if fault.kind == "exception":
            while running.poll() is None and time.monotonic() - start < 6 * seconds + LIMIT:
                seen |= family(root)
                time.sleep(0.1)
                struck = self.struck_at(output, struck)
        else:
            while running.poll() is None and time.monotonic() - start < fault.moment * seconds:
                seen |= family(root)
                time.sleep(0.02)
            seen |= family(root)
            self.strike(fault, root)
            struck = time.monotonic()
        gone = wait_gone(seen | family(root), struck)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(1)
        said = (self.folder / f"{output.name}.out").read_text()
        problems = self.judge(fault, running.returncode, gone, said)
        kill(seen | family(root))
        problems += self.resumed(output, fault, whole)
        steps = last_step(output)
        result = {"number": number, "fault": fault.name, "processes": fault.processes, "code": running.returncode,
                  "moment": round(fault.moment, 3) if fault.kind != "exception" else fault.calls,
                  "gone": None if gone is None else round(gone, 1), "problems": problems, "steps": steps}  # fmt: skip
        if not problems:
            for path in (output, self.folder / f"{output.name}.py", self.folder / f"{output.name}.out"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return result

    def struck_at(self, output: Path, before: float) -> float:
        """When the exception came: the last time at which the run made progress."""
        files = [path for path in (output / "metrics.jsonl", output / "train.log") if path.exists()]
        newest = max((path.stat().st_mtime for path in files), default=0)
        return max(before, time.monotonic() - (time.time() - newest)) if newest else before

    def strike(self, fault: Fault, root: psutil.Process) -> None:
        for _ in range(1 + fault.twice):
            number = getattr(signal, fault.kind)
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                self.is_heard = self.is_heard and all(map(is_listening, self.ranks(fault, root)))
                if fault.where == "group":  # as a terminal or Slurm does: launcher, ranks and workers
                    for process in sorted(family(root), key=lambda process: process.pid):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.send_signal(number)
                else:
                    self.find(fault, root).send_signal(number)
            if fault.twice:
                time.sleep(1.5)

    def ranks(self, fault: Fault, root: psutil.Process) -> list[psutil.Process]:
        """The processes that train; the launcher, if it has not started them yet."""
        children = root.children() if fault.processes == 2 else []
        return [child for child in children if "try_" in " ".join(child.cmdline())] or [root]

    def find(self, fault: Fault, root: psutil.Process) -> psutil.Process:
        """Who is struck; a worker, as soon as there is one."""
        if fault.where == "launcher":
            return root
        while is_there(root):
            ranks = self.ranks(fault, root)
            if fault.where != "worker":
                return ranks[-1] if fault.where == "rank" else ranks[0]
            if workers := [child for rank in ranks for child in rank.children()]:
                return workers[-1]
            time.sleep(0.02)
        raise psutil.NoSuchProcess(root.pid)

    def judge(self, fault: Fault, code: int | None, gone: float | None, said: str) -> list[str]:
        problems = []
        if gone is None:
            problems.append(f"something was still there after {LIMIT + GRACE} s")
        elif gone > LIMIT:
            problems.append(f"gone after {gone:.0f} s")
        own = [line for line in said.split("\n") if "dino-train" in line or "Stopped by" in line]
        is_tolerated = code == 0
        # a process that is killed says nothing, nor does a Python that has not come to our code yet, nor a launcher
        is_silent = fault.kind == "SIGKILL" and fault.where != "worker" or not self.is_heard
        if not own and not is_tolerated and not is_silent:
            problems.append(f"no line says what happened: {said[-300:]!r}")
        if "Traceback" in said and fault.processes == 1 and self.is_heard:  # launchers have their own
            problems.append("a traceback")
        if "Exception ignored" in said:
            problems.append("an ignored exception")
        return problems

    def resumed(self, output: Path, fault: Fault, whole: Path) -> list[str]:
        """Return the problems of the run that resumes where this one ended."""
        again = Fault("none", "", processes=fault.processes)
        code = self.start(output, again, "--resume_from_checkpoint", "latest").wait(300)
        if code:
            return [f"the resume ended with code {code}"]
        said = (self.folder / f"{output.name}.out").read_text()
        # an error may take the place of a line of metrics, and what a lost process had measured is lost
        return compare(output, whole, with_losses=fault.where != "logging" and "was saved after an error" not in said)


def compare(output: Path, whole: Path, with_losses: bool = True) -> list[str]:
    problems = []
    if with_losses and losses(output) != losses(whole):
        problems.append("other losses")
    for name in ("model.safetensors",):
        ours, theirs = load_file(output / name), load_file(whole / name)
        if not all(torch.equal(ours[key], theirs[key]) for key in theirs):
            problems.append("other weights")
    return problems


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def last_step(output: Path) -> int | None:
    names = [path.name for path in (output / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return max((int(name[5:]) for name in names), default=None)


def family(root: psutil.Process) -> set[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return {root, *root.children(recursive=True)}
    return set()


def is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_listening(process: psutil.Process) -> bool:
    """Return whether a process hears signals: a Python that has just started does not."""
    [caught] = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGUSR1 - 1))


def wait_gone(processes: set[psutil.Process], since: float) -> float | None:
    """Seconds until all were gone; None if that never came."""
    while any(map(is_there, processes)):
        if time.monotonic() - since > LIMIT + GRACE:
            return None
        time.sleep(0.1)
    return time.monotonic() - since


def kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def make_images(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 6)):
        for kind in ("a", "b"):
            (folder / split / kind).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{i}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON lines of the tries")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="campaign_"))
    if options.forked:
        import matplotlib.pyplot  # noqa: F401

        import training.__main__  # noqa: F401

        gc.freeze()
    campaign = Campaign(folder, make_images(folder / "images"), options.forked)
    chance = random.Random(options.seed)
    print(f"runs are in {folder}")
    results = []
    for number in range(options.tries):
        processes = 1 + (number % 10 == 9) if options.forked else chance.choice((1, 1, 2))
        results.append(campaign.attempt(number, draw_fault(chance, processes)))
        print(json.dumps(results[-1]), flush=True)
        if options.output:
            options.output.write_text("".join(json.dumps(result) + "\n" for result in results))
    print_table(results)
    sys.exit(any(result["problems"] for result in results))


def print_table(results: list[dict]) -> None:
    """Tries by kind of fault: number, longest time until everything was gone, number with problems."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        what, _, where = result["fault"].partition(", ")
        kind = what if what.startswith("SIG") else "exception"
        groups.setdefault(f"{kind}, {where}, {result['processes']} process(es)", []).append(result)
    print("| fault | tries | slowest until gone [s] | problems |\n|---|---|---|---|")
    for name, group in sorted(groups.items()):
        slowest = max(float("inf") if result["gone"] is None else result["gone"] for result in group)
        print(f"| {name} | {len(group)} | {slowest:.1f} | {sum(bool(result['problems']) for result in group)} |")


if __name__ == "__main__":
    main()
