"""Images per second from encoded images to crops, ours beside the original's recipe and lightly's, in the same run.

    python benchmarks/data.py --dataset_name path/to/images [--rounds 5] [--output benchmarks/results/data.json]
    python benchmarks/data.py --dataset_name path/to/images --memory_images 100000 [--streaming]

Every variant turns the same images into 2 crops of 224 and 8 of 96 pixels, in a process of its own with one thread (of
the loader: one a worker), and the variants take turns; the medians of all rounds are printed, and their ratios to the
original's recipe. `pip install -e '.[benchmarks]'` brings lightly. The second command prints the memory of the loader
and its two workers together, ten times on the way.
"""

import argparse
import io
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from measuring import environment, save
from PIL import Image
from recipes import lightly_recipe, pil_recipe

from evaluation.decoding import EncodedImage, Reading, image_content
from evaluation.images import load_images
from training.arguments import TrainingArguments
from training.augmentation import MultiCrop, collate, finish_crops
from training.data import CropLoader


BATCH_SIZE = 16


def views_of(recipe: Callable[[int], Callable]) -> Callable[[list[bytes]], Iterator[int]]:
    """One of `recipes`, on one image after another."""

    def run(contents: list[bytes]) -> Iterator[int]:
        views = recipe(8)
        for content in itertools.cycle(contents):
            views(Image.open(io.BytesIO(content)).convert("RGB"))
            yield 1

    return run


def settings(**changes) -> TrainingArguments:
    return TrainingArguments(**{"dataset_name": "unused", "output_dir": "unused"} | changes)


def host_half(contents: list[bytes]) -> Iterator[int]:
    multi_crop = MultiCrop(settings(), seed=0)
    for epoch in itertools.count():
        for position, content in enumerate(contents):
            multi_crop(EncodedImage({"bytes": content, "path": None}, Reading(3)), epoch, position)
            yield 1


def both_halves(contents: list[bytes]) -> Iterator[int]:
    args = settings()
    multi_crop = MultiCrop(args, seed=0)
    for epoch in itertools.count():
        for start in range(0, len(contents) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = collate(
                [
                    multi_crop(EncodedImage({"bytes": contents[position], "path": None}, Reading(3)), epoch, position)
                    for position in range(start, start + BATCH_SIZE)
                ]
            )
            finish_crops(batch, "cpu", args)
            yield BATCH_SIZE


def large_photographs(reduced: bool) -> Callable[[list[bytes]], Iterator[int]]:
    """Our host half of 12-megapixel JPEGs, decoded as large as the crops need them, or whole."""

    def run(contents: list[bytes]) -> Iterator[int]:
        photographs = []
        for content in contents[:4]:
            file = io.BytesIO()
            Image.open(io.BytesIO(content)).convert("RGB").resize((4000, 3000)).save(file, "jpeg", quality=90)
            photographs.append(file.getvalue())
        decode = EncodedImage.decode
        if not reduced:
            EncodedImage.decode = lambda self, reduction=1: decode(self)
        return host_half(photographs)

    return run


def stream_alone(dataset_name: str) -> Callable[[list[bytes]], Iterator[int]]:
    """Images of a stream as they are given to workers, which this leaves out."""

    def run(contents: list[bytes]) -> Iterator[int]:
        crops = CropLoader(
            settings(dataset_name=dataset_name, streaming=True, per_device_train_batch_size=BATCH_SIZE), 3
        )
        for _ in crops._stream(**crops.state):
            yield BATCH_SIZE

    return run


def loader(dataset_name: str, num_workers: int, streaming: bool) -> Callable[[list[bytes]], Iterator[int]]:
    """Our host half through the loader."""

    def run(contents: list[bytes]) -> Iterator[int]:
        args = settings(dataset_name=dataset_name, streaming=streaming, num_workers=num_workers,
                        per_device_train_batch_size=BATCH_SIZE)  # fmt: skip
        for _ in CropLoader(args, 3).batches(1_000_000):
            yield BATCH_SIZE

    return run


def measure(run: Callable, contents: list[bytes], seconds: float) -> None:
    """Prints images/s of `run` and the process's peak memory in MiB, after a first batch that does not count."""
    torch.set_num_threads(1)
    images, done = run(contents), 0
    while done < BATCH_SIZE:
        done += next(images)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += next(images)
    speed = done / (time.perf_counter() - start)
    print(json.dumps([speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)
    os.killpg(0, signal.SIGKILL)  # with all its workers, whatever they are at


def print_memory(dataset_name: str, num_images: int, streaming: bool) -> None:
    """Memory that this process and its workers have allocated, after each tenth of the images; on Linux."""
    args = settings(dataset_name=dataset_name, streaming=streaming, num_workers=2,
                    per_device_train_batch_size=BATCH_SIZE)  # fmt: skip
    torch.set_num_threads(1)
    num_batches = num_images // BATCH_SIZE
    this = psutil.Process()
    for done, _ in enumerate(CropLoader(args, 3).batches(num_batches), start=1):
        if done == 20 or done % max(1, num_batches // 10) == 0:
            processes = [this, *this.children(recursive=True)]
            memory = sum(allocated(process.pid) for process in processes)
            print(f"{done * BATCH_SIZE:>9} images {memory:8.0f} MiB in {len(processes)} processes", flush=True)


def allocated(pid: int) -> float:
    """Memory of a process in MiB, its share of what it shares with others included, files' pages not."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="per variant and round")
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--memory_images", type=int, help="print the memory used over so many images instead")
    parser.add_argument("--streaming", action="store_true", help="of the memory: stream the data")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of this one measures
    args = parser.parse_args()
    if args.memory_images:
        return print_memory(args.dataset_name, args.memory_images, args.streaming)
    variants = {
        "the original's recipe (PIL)": views_of(pil_recipe),
        "host half: decode, crops": host_half,
        "both halves on one core": both_halves,
        "host half, 12 megapixels": large_photographs(reduced=True),
        "the same decoded whole": large_photographs(reduced=False),
        "reading a stream, no crops": stream_alone(args.dataset_name),
        "host half, loader, 1 worker": loader(args.dataset_name, 1, False),
        "host half, loader, 2 workers": loader(args.dataset_name, 2, False),
        "the same streaming, 1 worker": loader(args.dataset_name, 1, True),
        "the same streaming, 2 workers": loader(args.dataset_name, 2, True),
    }
    if find_spec("lightly"):
        variants["lightly's DINOTransform"] = views_of(lightly_recipe)
    if args.variant:
        contents = [image_content(row["image"]) for row in itertools.islice(load_images(args.dataset_name), 256)]
        return measure(variants[args.variant], contents, args.seconds)
    results = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in variants:
            command = [sys.executable, __file__, "--dataset_name", args.dataset_name, "--variant", name,
                       "--seconds", str(args.seconds)]  # fmt: skip
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, start_new_session=True)
            results[name].append(json.loads(answer.stdout.splitlines()[-1]))
    report = {}
    for name, rounds in results.items():
        speeds, memory = zip(*rounds)
        peer = [speed / peer for speed, (peer, _) in zip(speeds, results["the original's recipe (PIL)"])]
        report[name] = {
            "images_per_second": round(statistics.median(speeds), 1),
            "lowest": round(min(speeds), 1),
            "highest": round(max(speeds), 1),
            "ratio_to_original": round(statistics.median(peer), 2),
            "peak_memory_mib": round(max(memory)),
        }
    print(f"{'':32}{'images/s':>10}{'lowest':>9}{'highest':>9}{'ratio':>8}{'peak MiB':>10}")
    for name, row in report.items():
        print(f"{name:32}" + "".join(f"{value:>{width}}" for value, width in zip(row.values(), (10, 9, 9, 8, 10))))
    about = environment(["torch", "torchvision", "pillow", "datasets", "lightly"])
    save(args.output, about, [{"variant": name} | row for name, row in report.items()])


if __name__ == "__main__":
    main()
