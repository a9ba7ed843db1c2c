"""What a run says of itself before its first step: where it trains, what, on how many images, and for how long."""

import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_dino import DINOForPreTraining

from .arguments import TrainingArguments
from .augmentation import NUM_GLOBAL_CROPS
from .log import say
from .schedules import Schedule
from .speed import describe_device


MAX_CPU_HOURS = 3  # of a run on a CPU, above which there is a warning
logger = logging.getLogger(__name__)


def describe_processes(accelerator: Accelerator) -> str:
    """Return a line on the processes, their device and their precision."""
    return f"Device: {count(accelerator.num_processes, 'process', 'processes')} on {describe_device(accelerator)}"


def describe_run(
    args: TrainingArguments,
    student: DINOForPreTraining,
    schedule: Schedule,
    num_images: int | None,
    global_batch_size: int,
    first_step: int,
) -> list[str]:
    """Return lines on the network, the images and the steps."""
    network = Path(args.model_config).stem + " with config_overrides" * bool(args.config_overrides)
    backbone, head = (sum(map(torch.numel, part.parameters())) for part in (student.dino, student.head))
    crops = f"{NUM_GLOBAL_CROPS} x {args.global_crop_size}"
    if args.num_local_crops:
        crops += f" and {args.num_local_crops} x {args.local_crop_size}"
    images = "a stream" if num_images is None else f"{num_images:,}"
    steps_left = f", {schedule.num_steps - first_step:,} left" if first_step else ""
    return [
        f"Network: {network}, {backbone:,} parameters",
        f"Head: {student.config.out_dim:,} prototypes, {head:,} parameters",
        f"Images: {images}, in batches of {global_batch_size:,}; crops of {crops} pixels",
        f"Steps: {schedule.num_steps:,} ({schedule.steps_per_epoch:,} an epoch){steps_left}",
    ]


def say_time(seconds: float) -> None:
    """Say how long a run on a CPU takes, as a warning with advice where that is more than some hours."""
    if seconds <= MAX_CPU_HOURS * 3600:
        say(f"Time: roughly {duration(seconds)} on this CPU")
    else:
        logger.warning(
            "Time: roughly %s on this CPU. Use a GPU, or configs/own_images_cpu.yaml, about 20 minutes on two cores.",
            duration(seconds),
        )


def estimate_seconds(args: TrainingArguments, student: DINOForPreTraining, is_mixed: bool) -> float:
    """Return roughly how long a CPU takes for one batch of a process, from forward passes of a few small crops.

    A backward pass takes about as long as two forward passes, and the time of a crop follows its pixels. So the
    student takes three times its forward pass of all crops, and the teacher once that of the global ones ::

        batch_size * (4 * num_global * global_size**2 + 3 * num_local * local_size**2) * seconds per pixel
    """
    size = args.local_crop_size if args.num_local_crops else args.global_crop_size
    was_training = student.training
    student.eval()  # draws no random numbers, and leaves the statistics of batch norms alone
    num_crops, seconds = 0, 0.0
    largest = args.per_device_train_batch_size * (args.num_local_crops or NUM_GLOBAL_CROPS)  # as a step has them
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        while seconds < 0.2 and num_crops < largest:  # a short time is mostly what any call costs
            num_crops = min(4 * num_crops + 1, largest)
            crops = torch.zeros(num_crops, student.config.num_channels, size, size)
            start = time.perf_counter()
            student.dino(crops)
            seconds = time.perf_counter() - start
    student.train(was_training)
    pixels = 4 * NUM_GLOBAL_CROPS * args.global_crop_size**2 + 3 * args.num_local_crops * args.local_crop_size**2
    return args.per_device_train_batch_size * pixels * seconds / (num_crops * size**2)


def describe_batch(args: TrainingArguments, global_batch_size: int) -> str:
    """Return a global batch and its factors, as "32 = 2 processes x 8 images x 2 accumulated"."""
    num_images, num_accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    num_processes = global_batch_size // (num_images * num_accumulated)
    accumulated = f" x {num_accumulated} accumulated" if num_accumulated > 1 else ""
    processes = count(num_processes, "process", "processes")
    return f"{global_batch_size:,} = {processes} x {count(num_images, 'image')}{accumulated}"


def explain_too_few(args: TrainingArguments, num_images: int, global_batch_size: int) -> str:
    """Return why there is no batch of so few images, and what to change."""
    most = num_images // (global_batch_size // args.per_device_train_batch_size)
    if most:
        fix = f"Give --per_device_train_batch_size {most}" + " or less" * (most > 1)
    else:
        fix = "Give more images, or lower the processes or --gradient_accumulation_steps"
    return (
        f"there are {count(num_images, 'image')}, fewer than one batch of "
        f"{describe_batch(args, global_batch_size)}. {fix}."
    )


def count(number: int, one: str, more: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which there are at least two."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{_rounded(seconds / length)} {unit}"
    return f"{_rounded(seconds)} s"


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
