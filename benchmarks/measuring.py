"""What benchmarks share: processes that take turns, their memory, and what a result says of where it was measured."""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from modeling_dino.command_line import Parser


WARM_UP = 3  # turns that do not count
SECONDS_OF_MATRICES = 2.0


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def positive(text: str) -> int:
    """An argument's number, from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def make_parser(description: str, batch: int, precision: str) -> argparse.ArgumentParser:
    """The settings that all have, with these defaults: what is trained, and how it is measured."""
    parser = Parser(description=description.split("\n")[0])
    parser.add_argument("--local_crops", type=int, default=8)
    parser.add_argument("--batch", type=positive, default=batch)
    parser.add_argument("--out_dim", type=positive, default=65536)
    parser.add_argument("--precision", choices=["bf16", "no"], default=precision)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--output", help="JSON file for the results; a table in Markdown is written beside it")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of the benchmark measures
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; not bf16 on a CPU without instructions for it, where it takes a hundred times as long."""
    args = parser.parse_args()
    if args.device == "cpu" and args.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        parser.error("bf16 on a CPU needs AVX-512, which this one has not: give --precision no")
    return args


def memory_mib(field: str) -> float:
    """Of this process, on Linux: VmRSS, what it holds, or VmHWM, the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def serve(make_turn: Callable[[], Callable[[], None]], device: str, with_compiler: bool = False) -> None:
    """Builds what is measured and warms it up; then does a turn for each line on stdin.

    Printed are, of each, its seconds and the peak of memory in MiB, on top of the imported libraries: on a CPU the
    process's, with what its allocator keeps; on a GPU what was allocated. `with_compiler` counts PyTorch's compiler
    among the libraries.
    """
    if with_compiler:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else memory_mib("VmRSS")
    turn = make_turn()
    for _ in range(WARM_UP):
        turn()
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: to compile is no part of a step
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        turn()
        synchronize(device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else memory_mib("VmHWM")
        print(json.dumps([seconds, peak - before]), flush=True)


def take_turns(
    script: str, variants: list[str], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, tuple[list[float], float]]:
    """Of each variant, the seconds of its turn in every round, and the peak of its memory in MiB.

    `script` is started once a variant, with `--variant NAME`, and has to `serve`. Who has no turn is stopped, with its
    workers. `between` is called after every round.
    """
    processes = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nobody stays stopped
    try:
        for variant in variants:
            process = subprocess.Popen(
                [sys.executable, script, *sys.argv[1:], "--variant", variant],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            processes[variant] = process
            if json.loads(process.stdout.readline() or "null") != "ready":
                sys.exit(f"{variant} did not get through its warm-up")
            os.killpg(process.pid, signal.SIGSTOP)
        seconds, peaks = {name: [] for name in variants}, dict.fromkeys(variants, 0.0)
        for _ in range(rounds):
            for name, process in processes.items():
                os.killpg(process.pid, signal.SIGCONT)
                process.stdin.write("\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    sys.exit(f"{name} has died")
                second, peak = json.loads(answer)
                os.killpg(process.pid, signal.SIGSTOP)
                seconds[name].append(second)
                peaks[name] = max(peaks[name], peak)
            between()
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {name: (seconds[name], peaks[name]) for name in variants}


def compared(
    turns: dict[str, tuple[list[float], float]], images: int, peers: list[str]
) -> Iterator[dict[str, str | float]]:
    """A row a variant, of turns on so many images: the median speed, the peak, and ratios to each of `peers`.

    The ratio of speeds is the median of those within a round.
    """
    for name, (seconds, peak) in turns.items():
        row = {"variant": name, "images_per_second": images / statistics.median(seconds), "peak_mib": peak}
        row["seconds"] = [round(second, 4) for second in seconds]
        for peer in peers:
            theirs, their_peak = turns[peer]
            short = peer.partition(",")[0]
            row[f"speed_over_{short}"] = statistics.median(their / our for their, our in zip(theirs, seconds))
            row[f"memory_over_{short}"] = peak / their_peak
        yield row


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


def environment(packages: list[str], device: str = "cpu") -> dict:
    """When, by what command and where, without folders: for the head of a results file."""
    argv = [Path(argument).name if "/" in argument else argument for argument in sys.argv]
    allocator = Path(os.environ.get("LD_PRELOAD", "")).name
    return {
        "date": str(date.today()),
        "command": f"LD_PRELOAD={allocator} " * bool(allocator) + f"python benchmarks/{' '.join(argv)}",
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: number for name in packages if (number := installed_version(name))},
    }


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.machine()


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: list[dict]) -> str:
    """In Markdown; lists and dicts are left out."""
    columns = [name for name, value in rows[0].items() if not isinstance(value, (list, dict))]
    lines = [f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_written(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _written(value: str | float) -> str:
    return str(value) if not isinstance(value, float) else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def save(output: str | Path | None, about: dict, rows: list[dict]) -> None:
    """A JSON file of all, and beside it the table in Markdown, unless `output` is None."""
    if output is None:
        return
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(about | {"results": rows}, indent=2) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    heading = f"`{about['command']}`, {about['date']}, {about['threads']} threads of {about['processor']}, {versions}"
    output.with_suffix(".md").write_text(f"{heading}\n\n{table(rows)}")
