"""How long a step takes on this device: measured on copies of the networks, with crops of noise."""

import copy
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from modeling_dino import DINOForPreTraining

from .arguments import TrainingArguments
from .augmentation import CropBatch, MultiCrop, collate, finish_crops
from .failure import is_out_of_memory
from .fused_loss import fused_cross_entropy
from .gradient import student_passes
from .loss import DINOLoss
from .networks import make_teacher
from .optim import clip_gradients_, gradient_norms, make_optimizer, update_teacher_


@dataclass(frozen=True)
class StepTime:
    """How long a step of one process takes.

    Attributes:
        seconds: Of a step of `num_images`.
        num_images: Of all accumulated batches.
        num_measured: Of the largest batch that was measured.
        num_too_many: Of a batch that did not fit the memory, if there was one.
    """

    seconds: float
    num_images: int
    num_measured: int
    num_too_many: int | None = None


def describe_device(accelerator: Accelerator) -> str:
    """Return the device and the precision for a person: `NVIDIA H100, bf16`, or `CPU, 2 threads, fp32`."""
    device = accelerator.device
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    number = torch.get_num_threads()
    threads = f", {number} thread{'s' * (number > 1)}" if device.type == "cpu" else ""
    return f"{device.type.upper()}{threads}, {precision}"


def measure_step(
    args: TrainingArguments, student: DINOForPreTraining, accelerator: Accelerator, seconds: float = 10.0
) -> StepTime | None:
    """Measure a step of this process, without data, without other processes, and without changing the run.

    Steps are of 2 images, then of 4, 8, ... up to the batch, as long as the next ones would end within `seconds`; the
    shorter of two of a size counts, and the first step is done in any case. Of a larger batch, both networks' passes
    take as much longer as there are more images, and the update of the weights does not.

    Args:
        args: The run's settings.
        student: The network, on whatever device; not compiled and not wrapped.
        accelerator: The device and the precision.
        seconds: Time to spend.

    Returns:
        The time of a step, all accumulated batches together; None if not even 2 images fit the memory.
    """
    end = time.perf_counter() + seconds
    device, batch_size = accelerator.device, args.per_device_train_batch_size
    took, num_images, num_too_many = {}, min(2, batch_size), None  # `took`: seconds of passes and update
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            step = _make_step(args, student, accelerator)
            while num_images not in took:
                batch = _noise(args, student.config.num_channels, num_images)
                took[num_images] = step(batch)
                if time.perf_counter() < end:
                    took[num_images] = min(took[num_images], step(batch), key=sum)
                # two steps of twice the images, the first of them slower
                if time.perf_counter() + 6 * sum(took[num_images]) < end:
                    num_images = min(2 * num_images, batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            num_too_many = num_images
    step = batch = None  # with the networks that it holds
    if device.type == "cuda":  # a run that follows shall find the device as it was
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if not took:
        return None
    measured = max(took)
    passes, update = took[measured]
    num_images = batch_size * accelerator.gradient_accumulation_steps
    return StepTime(passes * num_images / measured + update, num_images, measured, num_too_many)


def _noise(args: TrainingArguments, num_channels: int, num_images: int) -> CropBatch:
    """Crops of noise, with the changes of color that a run would draw."""
    multi_crop, rng = MultiCrop(args, seed=0), np.random.default_rng(0)
    samples = [
        (
            [torch.randint(0, 256, (num_channels, size, size), dtype=torch.uint8) for size in multi_crop.sizes],
            multi_crop.draw(rng, 256, 256)[1],
        )
        for _ in range(num_images)
    ]
    batch = collate(samples)
    if args.augmentation_device == "host":  # then it is the workers' part
        return batch._replace(crops=finish_crops(batch, "cpu", args), photometrics=None)
    return batch


def _make_step(args: TrainingArguments, student: DINOForPreTraining, accelerator: Accelerator):
    """Return a function that does what `train_step` does, but between processes.

    It returns how many seconds the passes of both networks took, and how many the update of the weights.
    """
    device = accelerator.device
    student = copy.deepcopy(student).train()
    teacher = make_teacher(student).to(device)
    student.to(device)
    if device.type == "cpu" and accelerator.mixed_precision == "bf16" and student.config.backbone_config is None:
        for network in (student, teacher):  # as in `prepare_state`
            network.set_attn_implementation("eager")
    optimizer = make_optimizer(student, args)
    dino_loss = DINOLoss(student.config.out_dim, args.student_temp).to(device)

    def step(batch: CropBatch) -> tuple[float, float]:
        start = time.perf_counter()
        crops = finish_crops(batch, device, args)
        with accelerator.autocast(), torch.no_grad():
            targets = dino_loss.teacher_probs(teacher(crops[0]).logits, args.teacher_temp)
        done = 0
        for resolutions in student_passes(student.config, crops):
            these = range(done, done + sum(map(len, resolutions)) * 2 // len(targets))
            done = these.stop
            criterion = partial(
                fused_cross_entropy, targets=targets, num_crops=args.num_crops, student_temp=args.student_temp,
                crops=these,
            )  # fmt: skip
            with accelerator.autocast():
                loss, *_ = student(resolutions, criterion=criterion).loss
            loss.backward()
        loss.item()  # waits for the device
        passed = time.perf_counter()
        if args.clip_grad:
            clip_gradients_(student, args.clip_grad, gradient_norms(student))
        optimizer.step()
        optimizer.zero_grad()
        update_teacher_(teacher, student, args.momentum_teacher)
        loss.item()
        return passed - start, time.perf_counter() - passed

    return step
