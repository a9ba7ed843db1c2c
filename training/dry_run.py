"""What a run would be, told before it is one: `--dry_run`. Nothing here writes, deletes, or starts a worker.

Memory that follows from the network is exact; that of its activations is an estimate, see `activation_bytes`. Time is
that of a few steps on this device, see `measure_step`.
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from evaluation.images import is_path
from modeling_dino import DINOForPreTraining

from .arguments import TrainingArguments
from .augmentation import NUM_GLOBAL_CROPS
from .fused_loss import fused_cross_entropy
from .gradient import student_passes
from .schedules import Schedule
from .speed import describe_device, measure_step
from .start import describe_batch, duration


WIDTH = 79  # of what is printed, but for paths
NUM_MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}  # fp32 copies of the trained parameters that an optimiser keeps


def without_downloads(args: TrainingArguments) -> TrainingArguments:
    """Settings to look at the data with: as a stream where they are on the Hub, whose images then stay there."""
    names = (args.dataset_name, *args.mix_with)
    return args if all(map(is_path, names)) else dataclasses.replace(args, streaming=True)


def describe(
    args: TrainingArguments,
    student: DINOForPreTraining,
    schedule: Schedule,
    accelerator: Accelerator,
    num_images: int | None,
    checkpoint: Path | None,
) -> Iterator[str]:
    """Yield all that `--dry_run` prints, for a person: settings, data, schedule, parameters, memory per device, time.

    Each section as soon as it is known: the last two run the network, for which the kernel may end the process.
    """
    yield _settings(args)
    yield _data(args, schedule, accelerator, num_images, checkpoint)
    yield _schedule(schedule)
    yield _parameters(student)
    yield _memory(args, student, accelerator)
    yield _time(args, student, schedule, accelerator)
    yield "Dry run: nothing was trained or written."


def find_origins(args: TrainingArguments) -> dict[str, str]:
    """Where each setting has its value from: `flag`, the name of a recipe, `given` (from Python) or `default`."""
    defaults = TrainingArguments(dataset_name="", output_dir="")
    origins = {}
    for field in dataclasses.fields(args):
        is_default = getattr(args, field.name) == getattr(defaults, field.name)
        origins[field.name] = args.origins.get(field.name) or ("default" if is_default else "given")
    return origins


def _settings(args: TrainingArguments) -> str:
    """Return the settings by origin: what was given, defaults, and what is not set."""
    origins = find_origins(args)
    del origins["dry_run"]
    values = {name: _shown(getattr(args, name)) for name in origins}
    titles = {"flag": "Settings given as flags", "given": "Settings given in Python"}
    sections = []
    for origin in dict.fromkeys(origins.values()):
        if origin != "default":
            title = titles.get(origin) or f"Settings of {origin.replace(', flag', ' and flags')}"
            rows = [(name, value) for name, value in values.items() if origins[name] == origin]
            sections.append("\n".join([title, *_columns(rows)]))
    defaults = {name: value for name, value in values.items() if origins[name] == "default"}
    pairs = ", ".join(f"{name} {value}".replace(" ", "\0") for name, value in defaults.items() if value != "none")
    unset = ", ".join(name for name, value in defaults.items() if value == "none")
    default = ["Settings left at their default", _paragraph(pairs).replace("\0", " ")]
    return "\n\n".join([*sections, "\n".join(default), f"Settings not given\n{_paragraph(unset)}"])


def _paragraph(text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _shown(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _columns(rows: list[tuple[str, ...]], align: str = "<") -> list[str]:
    """Return rows as indented lines, their cells below one another; a long last cell continues on further lines."""
    *widths, _ = [max(map(len, column)) for column in zip(*rows)]
    room = WIDTH - sum(width + 2 for width in widths) - 2
    lines = []
    for row in rows:
        *first, last = row
        parts = textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False) or [""]
        cells = [f"{cell:{align}{width}}" for cell, width in zip(first, widths)]
        lines.append("  " + "  ".join([*cells, parts[0]]))
        lines += [" " * (WIDTH - room) + part for part in parts[1:]]
    return lines


def _data(
    args: TrainingArguments,
    schedule: Schedule,
    accelerator: Accelerator,
    num_images: int | None,
    checkpoint: Path | None,
) -> str:
    num_processes = args.dry_run_processes or accelerator.num_processes
    global_batch_size = num_processes * args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = [
        ("images per epoch", "unknown" if num_images is None else f"{num_images:,}"),
        ("global batch", describe_batch(args, global_batch_size)),
        ("steps per epoch", f"{schedule.steps_per_epoch:,}"),
        ("steps in all", f"{schedule.num_steps:,}"),
        ("peak learning rate", f"{schedule.peak_learning_rate:g}"),
        ("starts from", str(checkpoint or args.init_from or "random weights")),
    ]
    return "\n".join(["Run", *_columns(rows)])


def _schedule(schedule: Schedule) -> str:
    """The schedule where something begins or ends, at every quarter, and at the last step."""
    args, last = schedule.args, schedule.num_steps - 1
    starts = [epochs * schedule.steps_per_epoch for epochs in (args.freeze_last_layer_epochs,
                                                               args.warmup_teacher_temp_epochs)]  # fmt: skip
    steps = {
        0,
        schedule.warmup_steps,
        args.freeze_backbone_steps or 0,
        *starts,
        *(schedule.num_steps * quarter // 4 for quarter in (1, 2, 3)),
        last,
    }
    rows = [("step", "epoch", "learning rate", "weight decay", "momentum", "temp.", "frozen")]
    frozen = {(False, False): "none", (True, False): "last layer", (False, True): "backbone", (True, True): "both"}
    for step in sorted(step for step in steps if step <= last):
        now = schedule(step)
        rows.append(
            (
                f"{step}",
                f"{step / schedule.steps_per_epoch:.2f}",
                f"{now.learning_rate:.4e}",
                f"{now.weight_decay:.5f}",
                f"{now.teacher_momentum:.7f}",
                f"{now.teacher_temp:.4f}",
                frozen[now.freeze_last_layer, now.freeze_backbone],
            )
        )
    return "\n".join(["Schedule (momentum and temperature are the teacher's)", *_columns(rows, align=">")])


def num_parameters(module: nn.Module) -> int:
    """Parameters; batch norms' running statistics and a fixed gain of the prototypes are none."""
    return sum(parameter.numel() for parameter in module.parameters())


def _parameters(student: DINOForPreTraining) -> str:
    backbone, head = num_parameters(student.dino), num_parameters(student.head)
    rows = [("backbone", backbone), ("head", head), ("student and teacher", 2 * (backbone + head))]
    width = len(f"{rows[-1][1]:,}")
    return "\n".join(["Parameters", *_columns([(name, f"{number:>{width},}") for name, number in rows])])


def state_bytes(student: DINOForPreTraining, num_processes: int, optimizer: str) -> dict[str, int]:
    """Bytes on every device that stay from step to step. Exact: all is fp32, also under bf16 and fp16.

    Both networks with their buffers; a gradient and the optimiser's moments of every trained parameter; of several
    processes, the buckets in which DDP exchanges the gradients, which are as large as these.
    """
    network = sum(tensor.nbytes for tensor in [*student.parameters(), *student.buffers()])
    trained = sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)
    parts = {
        "student": network,
        "teacher": network,
        "gradients": trained,
        "optimiser": NUM_MOMENTS[optimizer] * trained,
    }
    return parts | ({"gradients' buckets (DDP)": trained} if num_processes > 1 else {})


def activation_bytes(args: TrainingArguments, student: DINOForPreTraining, is_mixed: bool) -> int:
    """Estimate of what a step keeps for its backward pass, in bytes, for one device's batch.

    The student and the loss really run forward, on the CPU, for two images and for three (batch norms need two), and
    what autograd then saves is added up, each storage once and without the parameters; of several passes that of the
    largest. Some of it comes with every image and some does not (bf16 copies of the weights), so that `images` of them
    keep ::

        saved(2) + (images - 2) * (saved(3) - saved(2))

    For a block of a Vision Transformer in fp32 that is about `4 * (8 + mlp_ratio) * hidden_size` bytes a token: the
    inputs of both norms and of all linear layers but the last, queries, keys and values, the attention's output, and
    what goes into the activation. Left out, and so on top of it: crops, the teacher, temporaries of kernels and
    of the backward pass, and what the allocator loses.
    """

    parameters = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}

    def saved_by_pass(resolutions: list[torch.Tensor], targets: torch.Tensor) -> int:
        kept = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()  # kept, so that its address stays its own
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage
            return tensor

        crops = range(sum(map(len, resolutions)) * NUM_GLOBAL_CROPS // len(targets))
        criterion = partial(
            fused_cross_entropy, targets=targets, num_crops=args.num_crops, student_temp=args.student_temp, crops=crops
        )
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
                loss, *_ = student(resolutions, criterion=criterion).loss
        assert loss.requires_grad  # the graph that has saved them still stands
        return sum(storage.nbytes() for storage in kept.values())

    def saved(num_images: int) -> int:
        numbers = [(NUM_GLOBAL_CROPS, args.global_crop_size), (args.num_local_crops, args.local_crop_size)]
        crops = [
            torch.zeros(number * num_images, student.config.num_channels, size, size)
            for number, size in numbers
            if number
        ]
        targets = torch.full((NUM_GLOBAL_CROPS * num_images, student.config.out_dim), 1 / student.config.out_dim)
        return max(saved_by_pass(resolutions, targets) for resolutions in student_passes(student.config, crops))

    two, three = saved(2), saved(3)
    return two + (args.per_device_train_batch_size - 2) * (three - two)


def _memory(args: TrainingArguments, student: DINOForPreTraining, accelerator: Accelerator) -> str:
    num_processes = args.dry_run_processes or accelerator.num_processes
    if accelerator.is_fsdp2:  # every process has its share
        whole = state_bytes(student, 1, args.optimizer)
        parts = {f"{name}, shared out": size // num_processes for name, size in whole.items()}
    else:
        parts = state_bytes(student, num_processes, args.optimizer)
    precision = accelerator.mixed_precision
    activations = activation_bytes(args, student.train(), is_mixed=precision != "no")
    title = f"activations, estimated, {'fp32' if precision == 'no' else precision}"
    total = sum(parts.values()) + activations
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    rows = [*parts.items(), (title, activations), ("in all", total)]
    numbers = [f"{number / size:,.{3 if unit == 'GiB' else 1}f}" for _, number in rows]
    rows = [(name, f"{number:>{len(numbers[-1])}} {unit}") for (name, _), number in zip(rows, numbers)]
    note = "Activations are what a batch keeps for its backward pass; kernels and the allocator take more."
    return "\n".join(["Memory per device", *_columns(rows), _paragraph(note)])


def _time(args: TrainingArguments, student: DINOForPreTraining, schedule: Schedule, accelerator: Accelerator) -> str:
    """Time by a few steps on this device, whatever machine the rest is about."""
    step = measure_step(args, student, accelerator)
    if step is None:
        return "Time\n  Not measured: a step of two images does not fit the memory of this device."
    measured = f"steps of at most {step.num_measured} of {args.per_device_train_batch_size} images"
    if step.num_too_many:
        measured += f"; {step.num_too_many} do not fit the memory"
    rows = [
        ("device", describe_device(accelerator)),
        ("measured", measured if step.num_measured < args.per_device_train_batch_size else "whole steps"),
        ("a step", f"{step.seconds:.3g} s for {step.num_images} images of a process"),
        ("an epoch", duration(step.seconds * schedule.steps_per_epoch)),
        ("all steps", duration(step.seconds * schedule.num_steps)),
    ]
    notes = ["Networks and optimizer alone: reading images comes on top where it is slower."]
    if (args.dry_run_processes or accelerator.num_processes) > 1:
        notes.append("As if each process had such a device; exchange between them comes on top.")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        notes.append("Measured without torch.compile.")
    return "\n".join(["Time, measured on this machine", *_columns(rows), *map(_paragraph, notes)])
