"""Processes and precision, as accelerate launch, torchrun or a notebook give them; and what is not taken from them."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs


def make_accelerator(gradient_accumulation_steps: int = 1) -> Accelerator:
    """The launcher's processes and precision.

    Raises:
        ValueError: a launcher that Accelerate does not see, or settings of it that training would not follow.
    """
    # buffers are the same on all processes already: a frozen weight_g, and statistics that batch norms share
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(gradient_accumulation_steps=gradient_accumulation_steps, kwargs_handlers=[ddp])
    num_started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if accelerator.num_processes != num_started:
        what_to_do = "on CPU, set ACCELERATE_USE_CPU=true"
        if "WORLD_SIZE" not in os.environ:
            what_to_do = "srun alone does not connect them: see configs/slurm/train.sbatch"
        raise ValueError(
            f"the launcher started {num_started} processes, Accelerate sees {accelerator.num_processes}; {what_to_do}"
        )
    requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision of accelerate launch must be no, bf16 or fp16, got {requested}")
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError("FSDP must be fsdp_version 2, on several GPUs")
    if is_fsdp and requested == "fp16":
        raise ValueError("FSDP trains in bf16 or fp32, not in fp16")
    if requested == "fp16" and accelerator.device.type == "cpu":  # Accelerate would go on in fp32
        raise ValueError("mixed_precision fp16 needs a GPU; on CPU there is bf16")
    return accelerator
