"""One training step on crops that are there already: ours beside the original's, restated plainly, and lightly's.

    python benchmarks/step.py [--batch 8] [--precision bf16] [--rounds 7] [--output benchmarks/results/step.json]

Every variant is a process of its own with its networks, its optimiser and the same number of threads; after a warm-up
they take turns, a step each a round. Printed are the medians of images per second, the median of the ratios to lightly
and to the plain step within a round, the peak of memory on top of the imported libraries, and the share of the matrix
rate that the hardware reached in the same run: operations of the plain step, attention included, over time and rate.
`pip install -e '.[benchmarks]'` brings lightly; without it, it is left out.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from peers import Lightly, Plain, Task
from torch.utils.flop_counter import FlopCounterMode

from modeling_dino import DINOForPreTraining
from training.arguments import TrainingArguments
from training.augmentation import CropBatch
from training.guard import Guard
from training.networks import load_config, make_teacher
from training.schedules import Schedule
from training.state import prepare_state
from training.train import train_step


MODELS = {  # ours: timm's
    "vit_small_patch16": "vit_small_patch16_224",
    "vit_small_patch8": "vit_small_patch8_224",
    "vit_base_patch16": "vit_base_patch16_224",
    "resnet50": "resnet50",
}
SECONDS_OF_MATRICES = 2.0


class Ours:
    """`train_step` of the training itself, with its signals and its guard."""

    def __init__(self, args: argparse.Namespace, is_compiled: bool):
        self.args = TrainingArguments(
            dataset_name="unused",
            output_dir="unused",
            model_config=args.model,
            config_overrides=[f"out_dim={args.out_dim}"],
            per_device_train_batch_size=args.batch,
            num_local_crops=args.local_crops,
        )
        plugin = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True) if is_compiled else None
        self.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.precision, dynamo_plugin=plugin)
        student = DINOForPreTraining(load_config(self.args))
        self.state = prepare_state(self.accelerator, self.args, student, make_teacher(student))
        student.train()
        self.guard = Guard(self.accelerator, self.state.optimizer)
        self.schedule = Schedule(self.args, 1000, 100_000, args.batch)
        self.done = 20_000  # steps, so that neither the rate warms up nor prototypes are frozen

    def step(self, views: list[torch.Tensor]) -> None:
        sizes = dict.fromkeys(view.shape[-1] for view in views)
        crops = [torch.cat([view for view in views if view.shape[-1] == size]) for size in sizes]
        now = self.schedule(self.done)
        self.done += 1
        batch = CropBatch(crops, None)
        train_step(self.accelerator, self.args, self.state, [batch], self.done, now, self.guard)
        self.guard.settle()


def make_variant(args: argparse.Namespace):
    name, precision = args.variant.split(", ")[0], "no" if args.variant.endswith("fp32") else args.precision
    if name.startswith("ours"):
        return Ours(args, name == "ours compiled")
    task = Task(MODELS[args.model], args.out_dim, precision, args.device)
    return Plain(task) if name == "plain" else Lightly(task)


def make_views(args: argparse.Namespace, batch_size: int) -> list[torch.Tensor]:
    sizes = [224] * 2 + [96] * args.local_crops
    return [torch.randn(batch_size, 3, size, size, device=args.device) for size in sizes]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_mib(field: str) -> float:
    """Of this process, on Linux: VmRSS, what it holds, or VmHWM, the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def serve(args: argparse.Namespace) -> None:
    """Warms up, and then does a step for each line on stdin; prints its seconds and the peak of memory on top."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.empty(1, device="cuda")
    before = memory_mib("VmRSS")
    variant, views = make_variant(args), make_views(args, args.batch)
    for _ in range(3):
        variant.step(views)
    synchronize(args.device)
    if args.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: compilers are no part of a step
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        variant.step(views)
        synchronize(args.device)
        seconds = time.perf_counter() - start
        on_gpu = args.device == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory_mib("VmHWM") - before
        print(json.dumps([seconds, peak]), flush=True)


def operations_per_image(args: argparse.Namespace) -> float:
    """Multiplications and additions of matrices in the plain step, forward and backward, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        Plain(Task(MODELS[args.model], args.out_dim, "no", args.device)).step(make_views(args, 2))
    return counter.get_total_flops() / 2


def matrix_rate(device: str, precision: str) -> float:
    """Operations per second that the hardware reaches: the best of products of 4096 x 4096, as PyTorch does them."""
    left, right = (
        torch.randn(4096, 4096, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        for _ in range(2)
    )
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < SECONDS_OF_MATRICES:
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * 4096**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="vit_small_patch16")
    parser.add_argument("--local_crops", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--precision", choices=["bf16", "no"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager_only", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--output", help="JSON file for the results; a table in Markdown is written beside it")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of this one measures
    args = parser.parse_args()
    if args.variant:
        return serve(args)
    torch.set_num_threads(args.threads)
    precision = "fp32" if args.precision == "no" else args.precision
    names = [f"plain, {precision}", f"ours, {precision}"]
    names += [f"ours compiled, {precision}"] * (not args.eager_only)
    if find_spec("lightly"):
        names.insert(0, "lightly, fp32")
    operations = operations_per_image(args)
    rates = [matrix_rate(args.device, args.precision)]
    processes = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", name]
        processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ready = processes[name].stdout.readline()
        if json.loads(ready or "null") != "ready":
            raise RuntimeError(f"{name} did not get through its warm-up")
    found = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            found[name].append(json.loads(process.stdout.readline()))
        rates.append(matrix_rate(args.device, args.precision))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rate = statistics.median(rates)
    rows = []
    for name, rounds in found.items():
        seconds, memory = zip(*rounds)
        row = {"variant": name, "images_per_second": args.batch / statistics.median(seconds)}
        row |= {"seconds": [round(second, 4) for second in seconds], "peak_mib": max(memory)}
        row["share_of_matrix_rate"] = operations * row["images_per_second"] / rate
        for peer in names[: names.index(f"plain, {precision}") + 1]:
            short = peer.partition(",")[0]
            row[f"speed_over_{short}"] = statistics.median(
                theirs / ours for (theirs, _), ours in zip(found[peer], seconds)
            )
            row[f"memory_over_{short}"] = row["peak_mib"] / max(memory for _, memory in found[peer])
        rows.append(row)
    columns = [key for key in rows[0] if key != "seconds"]
    table = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---" * len(columns) + "|"]
    table += ["| " + " | ".join(written(row[column]) for column in columns) + " |" for row in rows]
    print(f"{operations / 1e9:.1f} GFLOP an image, matrices at {rate / 1e9:.0f} GFLOP/s in {precision}")
    print("\n".join(table))
    if args.output:
        output = Path(args.output)
        about = {
            "date": str(date.today()),
            "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]),
            "processor": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "timm", "lightly")
                         if find_spec(name)},
            "operations_per_image": operations,
            "matrix_rate": rate,
        }  # fmt: skip
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(about | {"results": rows}, indent=2) + "\n")
        heading = f"`{about['command']}`, {about['date']}, {args.threads} threads of {about['processor']}, "
        heading += ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        output.with_suffix(".md").write_text(heading + "\n\n" + "\n".join(table) + "\n")


def written(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
