"""Finds a loss or a gradient that is no number before the optimiser uses it, without waiting for the device."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .arguments import TrainingArguments
from .augmentation import CropBatch, finish_crops
from .checkpoint import last_checkpoint
from .failure import RunError


MAX_OVERFLOWS = 25  # of fp16, one after another; the scale has then fallen from 65536 to 0.002


class NonFiniteError(RunError):
    """A loss or a gradient that is no number, at the `step` of `batches`; this process's loss, if `is_here`."""

    def __init__(self, step: int, batches: list[CropBatch], name: str, is_here: bool):
        super().__init__(f"the {name} of step {step} is not finite")
        self.step, self.batches, self.is_here = step, batches, is_here


class Guard:
    """Checks the steps of all processes. From the first bad one on, the optimiser changes nothing.

    The host looks at what the device has found when it has already queued the next step, so that neither waits for
    the other. `optimizer.found_inf`, by which PyTorch's fused optimisers (and ours) leave a step out, is set here.

    With fp16, gradients that overflow are no fault: the scaler leaves out such a step and lowers its scale. Only if
    that does not help `MAX_OVERFLOWS` times in a row is it one. A loss that is no number always is.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer):
        self.accelerator = accelerator
        self.stopped = torch.zeros((), dtype=torch.float32, device=accelerator.device)  # 1. from the first fault on
        is_cuda = accelerator.device.type == "cuda"
        self.found = torch.zeros(3, pin_memory=is_cuda)  # loss here, loss anywhere, gradient
        self.copied = torch.cuda.Event() if is_cuda else None
        self.num_overflows = 0
        self.latest: tuple[int, list[CropBatch]] | None = None
        if accelerator.scaler is None:  # which sets it by itself
            getattr(optimizer, "optimizer", optimizer).found_inf = self.stopped

    def check(self, step: int, batches: list[CropBatch], losses: list[torch.Tensor], norms: torch.Tensor) -> bool:
        """Looks at this process's losses and the gradients' norms of a step, which is counted from 1.

        Returns:
            Whether the step is left out, as gradients overflow in fp16; else always False.

        Raises:
            NonFiniteError: on all processes, if the step before was bad.
        """
        self.settle()
        is_bad = torch.stack([~torch.stack(losses).isfinite().all(), ~norms.isfinite().all()]).float()
        loss, gradient = self.accelerator.reduce(is_bad, "sum").clamp(max=1).unbind()
        overflows = False
        if self.accelerator.scaler is not None:
            overflows = bool(gradient > loss)
            self.num_overflows = self.num_overflows + 1 if overflows else 0
            gradient = gradient * (self.num_overflows > MAX_OVERFLOWS)
        self.stopped.copy_(torch.maximum(self.stopped, torch.maximum(loss, gradient)))
        self.found.copy_(torch.stack([is_bad[0], loss, gradient]), non_blocking=True)
        if self.copied:
            self.copied.record()
        self.latest = step, batches
        return overflows

    def settle(self) -> None:
        """Waits until the device has done the step that was checked last.

        Raises:
            NonFiniteError: on all processes, if it was bad.
        """
        if self.copied:
            self.copied.synchronize()
        here, loss, gradient = self.found.tolist()
        if loss or gradient:
            raise NonFiniteError(*self.latest, "loss" if loss else "gradient", bool(here))


@contextmanager
def explained(
    accelerator: Accelerator,
    args: TrainingArguments,
    learning_rate: Callable[[int], float],
    describe: Callable[[tuple], list[dict]],
) -> Iterator[None]:
    """Within, a `NonFiniteError` becomes a `ValueError` for the user; the step's images go to a file in output_dir.

    Args:
        learning_rate: Of a step, counted from 0.
        describe: The loader's names for the images of a batch.
    """
    try:
        yield
    except NonFiniteError as error:
        file = Path(args.output_dir) / "non_finite.jsonl"
        raise ValueError(_explain(error, accelerator, args, learning_rate(error.step - 1), describe, file)) from error


def _explain(
    error: NonFiniteError,
    accelerator: Accelerator,
    args: TrainingArguments,
    learning_rate: float,
    describe: Callable[[tuple], list[dict]],
    file: Path,
) -> str:
    lines, bad_crops = [], False
    for batch in error.batches:
        images = describe(batch.images)
        is_finite = torch.ones(len(images), dtype=torch.bool)
        for crops in finish_crops(batch, "cpu", args):
            is_finite &= crops.flatten(1).isfinite().all(1).view(-1, len(images)).all(0)  # of crop-major rows
        bad_crops |= not is_finite.all()
        place = {"step": error.step, "process": accelerator.process_index}
        lines += [place | image | {"is_finite": good} for image, good in zip(images, is_finite.tolist())]
    reports = gather_object([(error.is_here, bad_crops, lines)])
    if accelerator.is_main_process:
        file.write_text("".join(json.dumps(line) + "\n" for _, _, lines in reports for line in lines))
    ranks = [str(rank) for rank, (is_here, _, _) in enumerate(reports) if is_here]
    where = f" on process {', '.join(ranks)}" if ranks and accelerator.num_processes > 1 else ""
    if any(bad_crops for _, bad_crops, _ in reports):
        suspect = "suspect: the data, as its crops are not finite either; look at image_mean and image_std"
    elif accelerator.mixed_precision == "fp16":
        suspect = "suspect: fp16, which ends at 65504; train in bf16, or in fp32"
    else:
        suspect = (
            f"suspect: the learning rate, {learning_rate:.1e} at this step; lower base_learning_rate, or raise "
            "warmup_epochs"
        )
    kept = last_checkpoint(Path(args.output_dir))
    return f"{error}{where} and was not used; {suspect}. {kept}, and the images of the step are in {file}"
