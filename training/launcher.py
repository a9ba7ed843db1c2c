"""Processes and precision, as accelerate launch, torchrun or a notebook give them; and what is not taken from them."""

import os

import psutil
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend

from evaluation.interruption import is_launched


WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
NO = ("", "0", "false", "no", "none")
# what launchers may ask for and training does not do: the values that do not ask for it, and what to do instead
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (NO, "Train by FSDP: configs/accelerate/fsdp2.yaml."),
    "ACCELERATE_USE_MEGATRON_LM": (NO, "Train by FSDP: configs/accelerate/fsdp2.yaml."),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (NO, "Leave it out: only images are split between processes."),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": (NO, "Start processes by torchrun."),
    "ACCELERATE_GRADIENT_CLIPPING": (NO, "Give --clip_grad, which is for each parameter."),
    "ACCELERATE_DOWNCAST_BF16": (NO, "It is for TPUs. Train on GPUs or a CPU."),
    "XLA_USE_BF16": (NO, "It is for TPUs. Train on GPUs or a CPU."),
    "XLA_DOWNCAST_BF16": (NO, "It is for TPUs. Train on GPUs or a CPU."),
}
REFUSED_WITH_FSDP = {
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "Use fsdp_reshard_after_forward."),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "Each block of the network is a unit."),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "Leave it out: blocks are found automatically."),
    "FSDP_IGNORED_MODULES": ((), "Leave it out: all modules are sharded."),
    "FSDP_BACKWARD_PREFETCH": (("backward_pre",), "It is the only order of fsdp_version 2."),
    "FSDP_FORWARD_PREFETCH": (NO, "Leave it out."),
    "FSDP_STATE_DICT_TYPE": (("full_state_dict", "1"), "Checkpoints hold whole tensors."),
    "FSDP_USE_ORIG_PARAMS": (("true", "1"), "Leave it out."),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (NO, "Give --fsdp_cpu_ram_efficient_loading false."),
    "FSDP_ACTIVATION_CHECKPOINTING": (NO, "Give --gradient_checkpointing."),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (NO, "Leave it out."),
}


def make_accelerator(gradient_accumulation_steps: int = 1) -> Accelerator:
    """The launcher's processes and precision.

    Raises:
        ValueError: a launcher that Accelerate does not see, or settings of it that training would not follow.
    """
    check_environment(gradient_accumulation_steps)
    # buffers are the same on all processes already: a frozen weight_g, and statistics that batch norms share
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(gradient_accumulation_steps=gradient_accumulation_steps, kwargs_handlers=[ddp])
    num_started = int(next(filter(None, map(os.environ.get, WORLD_SIZES)), 1))
    if accelerator.num_processes != num_started:
        what_to_do = "on CPU, set ACCELERATE_USE_CPU=true"
        if "SLURM_STEP_NUM_TASKS" in os.environ and "WORLD_SIZE" not in os.environ:
            what_to_do = "srun alone does not connect them: see configs/slurm/train.sbatch"
        raise ValueError(
            f"the launcher started {num_started} processes, Accelerate sees {accelerator.num_processes}; {what_to_do}"
        )
    is_fsdp, is_fp16 = _is_fsdp(), accelerator.mixed_precision == "fp16"
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError("FSDP must be fsdp_version 2, on several GPUs")
    if is_fsdp and is_fp16:
        raise ValueError("FSDP trains in bf16 or fp32, not in fp16")
    if is_fp16 and accelerator.device.type == "cpu":  # Accelerate would go on in fp32
        raise ValueError("mixed_precision fp16 needs a GPU; on CPU there is bf16")
    dynamo = accelerator.state.dynamo_plugin
    if is_fsdp and dynamo.backend != DynamoBackend.NO and not dynamo.use_regional_compilation:
        raise ValueError("FSDP compiles block by block. Give --dynamo_use_regional_compilation.")
    return accelerator


def check_environment(gradient_accumulation_steps: int) -> None:
    """Find what a launcher asks for, by its variables, and training would not do.

    Raises:
        ValueError: names the variable, its value, and what to do instead.
    """
    launched = os.environ
    precision = launched.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision of the launcher must be no, bf16 or fp16, got {precision}")
    for name, (allowed, remedy) in (REFUSED | (REFUSED_WITH_FSDP if _is_fsdp() else {})).items():
        if name in launched and launched[name].lower() not in allowed:
            raise ValueError(f"{name} of the launcher must be {_listed(allowed)}, got {launched[name]}. {remedy}")
    accumulated = launched.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if accumulated not in ("", str(gradient_accumulation_steps)):
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the launcher must be gradient_accumulation_steps = "
            f"{gradient_accumulation_steps}, got {accumulated}. Give --gradient_accumulation_steps {accumulated}."
        )
    if not any(map(launched.get, WORLD_SIZES)) and _is_one_of_several():
        raise ValueError(
            "accelerate launch was asked for several processes and started one. Add --multi_gpu, also on a CPU, where "
            "ACCELERATE_USE_CPU=true takes the place of --cpu; or give --num_processes 1."
        )


def _is_one_of_several() -> bool:
    """Return whether `accelerate launch` was asked for several processes and, without torchrun or MPI, started one.

    It then sets an address, and nothing else. A batch script may have exported one as well, which the launcher itself
    has, too.
    """
    if not is_launched():
        return False
    try:
        before = psutil.Process(os.getppid()).environ()
    except psutil.Error:  # of another user, or it has just ended
        return False
    return any(os.environ.get(name) != before.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))


def _is_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _listed(allowed: tuple[str, ...]) -> str:
    return "unset" if not allowed else "false" if allowed is NO else allowed[0].upper()
