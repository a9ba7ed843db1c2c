"""The ways in which processes are started, and those in which they would each train for themselves."""

import inspect
import os
import re
import socket
import subprocess
import sys

import accelerate.utils.launch
import pytest
from accelerate.commands import launch

from modeling_dino.command_line import CONFIGS
from training import launcher

from .commands import TWO, command, scripted, trained
from .test_interruption import assert_same_end
from .test_training import RECIPE, losses, recipe  # noqa: F401


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")

FROM_PYTHON = """
import yaml
from accelerate import LAUNCHER
from training import TrainingArguments, train


def start():
    settings = yaml.safe_load(open("RECIPE"))
    overrides = settings.pop("config_overrides")
    settings["config_overrides"] = [f"{name}={value}" for name, value in overrides.items()]
    settings["per_device_train_batch_size"] = 4
    train(TrainingArguments(dataset_name="DATA", output_dir="OUTPUT", **settings))


if __name__ == "__main__":
    LAUNCHER(start, num_processes=2, OPTIONS)
"""


@pytest.fixture(scope="module")
def two(recipe, parquet_folder, tmp_path_factory):  # noqa: F811
    """A run of two processes, by accelerate launch."""
    output_dir = tmp_path_factory.mktemp("two")
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--per_device_train_batch_size", 4)
    trained(*argv, "--output_dir", output_dir, launcher=TWO)
    return output_dir


@pytest.mark.slow
def test_torchrun(two, recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--per_device_train_batch_size", 4)
    trained(*argv, "--output_dir", tmp_path, launcher=TORCHRUN)
    assert_same_end(tmp_path, two)


def started_from_python(launcher: str, recipe, parquet_folder, tmp_path):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = f"use_port='{free.getsockname()[1]}'" if launcher == "notebook_launcher" else ""
    script = FROM_PYTHON.replace("LAUNCHER", launcher).replace("RECIPE", str(recipe)).replace("OPTIONS", options)
    (tmp_path / "script.py").write_text(
        script.replace("DATA", str(parquet_folder)).replace("OUTPUT", str(tmp_path / "run"))
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    environment.pop("ACCELERATE_USE_CPU")
    started = [sys.executable, tmp_path / "script.py"]
    return subprocess.run(started, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_debug_launcher(two, recipe, parquet_folder, tmp_path):  # noqa: F811
    finished = started_from_python("debug_launcher", recipe, parquet_folder, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert_same_end(tmp_path / "run", two)


@pytest.mark.slow
def test_processes_that_would_each_train_for_themselves_are_refused(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    finished = command(*argv, launcher=TORCHRUN, ACCELERATE_USE_CPU="false")
    assert finished.returncode != 0
    assert (
        "the launcher started 2 processes, Accelerate sees 1; on CPU, set ACCELERATE_USE_CPU=true" in finished.stderr
    )
    finished = started_from_python("notebook_launcher", recipe, parquet_folder, tmp_path)
    assert finished.returncode != 0 and "the launcher started 2 processes, Accelerate sees 1" in finished.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_quiet_launcher_shows_the_refusal_alone(tmp_path):
    config = str(CONFIGS / "accelerate/one_gpu.yaml")
    launcher = ("-m", "accelerate.commands.launch", "-q", "--config_file", config, "-m")
    finished = command("--output_dir", tmp_path, "--lerning_rate", "1", launcher=launcher)
    [line] = (finished.stdout + finished.stderr).splitlines()
    assert finished.returncode == 1 and line.startswith("dino-train: error: there is no option --lerning_rate")


ACCELERATE, TORCH, DEEPSPEED, MEGATRON, FP8 = "Accelerate", "PyTorch or a driver", "DeepSpeed's", "Megatron's", "fp8's"
PARALLELISM = "of parallelism_config"
# every variable that accelerate launch can set: who follows it; whose it is where a whole engine is refused; or, in a
# tuple, a value that is refused and a part of the answer
LAUNCHER = {
    "ACCELERATE_USE_CPU": ACCELERATE,
    "ACCELERATE_DEBUG_MODE": ACCELERATE,
    "ACCELERATE_CPU_AFFINITY": ACCELERATE,
    "ACCELERATE_DYNAMO_BACKEND": ACCELERATE,
    "ACCELERATE_DYNAMO_MODE": ACCELERATE,
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ACCELERATE,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ACCELERATE,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ACCELERATE,
    **dict.fromkeys(["MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME"], TORCH),
    **dict.fromkeys(["ZE_AFFINITY_MASK", "MLU_VISIBLE_DEVICES", "SDAA_VISIBLE_DEVICES"], TORCH),
    **dict.fromkeys(["ASCEND_RT_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES", "NEURON_RT_VISIBLE_CORES"], TORCH),
    **dict.fromkeys(["CUDA_VISIBLE_DEVICES", "MUSA_VISIBLE_DEVICES", "PYTHONPATH"], TORCH),
    "ACCELERATE_MIXED_PRECISION": ("fp8", "mixed_precision of the launcher must be no, bf16 or fp16, got fp8"),
    **dict.fromkeys(["ACCELERATE_FP8_OVERRIDE_FPROP", "ACCELERATE_FP8_OVERRIDE_DGRAD"], FP8),
    "ACCELERATE_FP8_OVERRIDE_WGRAD": FP8,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "got 4. Give --gradient_accumulation_steps 4."),
    "ACCELERATE_GRADIENT_CLIPPING": ("1.0", "Give --clip_grad"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "Train by FSDP"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "Train by FSDP"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "only images are split between processes"),
    "ACCELERATE_USE_SAGEMAKER": ACCELERATE,
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": ("DATA_PARALLEL", "Start processes by torchrun"),
    "XLA_USE_BF16": ("1", "It is for TPUs"),
    "XLA_DOWNCAST_BF16": ("1", "It is for TPUs"),
    "ACCELERATE_USE_FSDP": ACCELERATE,
    "FSDP_VERSION": ACCELERATE,
    "FSDP_RESHARD_AFTER_FORWARD": ACCELERATE,
    "FSDP_OFFLOAD_PARAMS": ACCELERATE,
    "FSDP_SYNC_MODULE_STATES": "networks are the same on all processes, whatever it says",
    "FSDP_MIN_NUM_PARAMS": "of SIZE_BASED_WRAP, which is refused",
    "FSDP_SHARDING_STRATEGY": ("SHARD_GRAD_OP", "Use fsdp_reshard_after_forward."),
    "FSDP_AUTO_WRAP_POLICY": ("SIZE_BASED_WRAP", "must be TRANSFORMER_BASED_WRAP, got SIZE_BASED_WRAP"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("ViTLayer", "must be unset, got ViTLayer"),
    "FSDP_BACKWARD_PREFETCH": ("BACKWARD_POST", "must be BACKWARD_PRE, got BACKWARD_POST"),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "must be FULL_STATE_DICT, got SHARDED_STATE_DICT"),
    "FSDP_FORWARD_PREFETCH": ("true", "must be false, got true"),
    "FSDP_USE_ORIG_PARAMS": ("false", "must be TRUE, got false"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("true", "Give --fsdp_cpu_ram_efficient_loading false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "Give --gradient_checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("true", "must be false, got true"),
    "FSDP_IGNORED_MODULES": (".*head.*", "must be unset, got .*head.*"),
}  # fmt: skip
ENGINES = {"ACCELERATE_DEEPSPEED_": DEEPSPEED, "ACCELERATE_CONFIG_DS_FIELDS": DEEPSPEED, "MEGATRON_LM_": MEGATRON,
           "PARALLELISM_CONFIG_": PARALLELISM}  # fmt: skip
REFUSED = {name: how for name, how in LAUNCHER.items() if isinstance(how, tuple)}


def variables_of_accelerate_launch() -> set[str]:
    """All that its code writes into the environment of the processes that it starts."""
    names, prefix = set(), ""
    for line in inspect.getsource(accelerate.utils.launch).splitlines():
        if found := re.search(r'prefix = "(\w+)"', line):
            prefix = found[1]
        names |= set(re.findall(r'current_env\["([A-Z]\w+)"\]', line))
        names |= {prefix + name for name in re.findall(r'current_env\[prefix \+ "(\w+)"\]', line)}
        names |= set(re.findall(r'^ +"([A-Z]{3,}_\w+)": str', line)) | set(re.findall(r'"(\w*SAGEMAKER\w*)":', line))
    return names


def test_every_variable_of_accelerate_launch_is_followed_or_refused():
    names = variables_of_accelerate_launch()
    assert len(names) > 80
    assert not {name for name in names if name not in LAUNCHER and not name.startswith(tuple(ENGINES))}
    # each that is refused is one that accelerate knows: a typo here would refuse nothing
    assert {*launcher.REFUSED, *launcher.REFUSED_WITH_FSDP} <= names | {"ACCELERATE_DOWNCAST_BF16"}
    assert {*launcher.REFUSED, *launcher.REFUSED_WITH_FSDP} <= {*REFUSED, "ACCELERATE_DOWNCAST_BF16"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_would_not_do_is_refused(name, monkeypatch):
    value, message = REFUSED[name]
    if name.startswith("FSDP_"):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launcher.check_environment(gradient_accumulation_steps=1)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        launcher.check_environment(gradient_accumulation_steps=1)


def variables_from(*flags: str) -> dict[str, str]:
    """What accelerate launch gives its processes for such flags."""
    argv = [*flags, "-m", "training"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(argv))
    if args.use_fsdp or args.multi_gpu:
        return accelerate.utils.launch.prepare_multi_gpu_env(args)
    return accelerate.utils.launch.prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--config_file", str(CONFIGS / "accelerate/one_gpu.yaml")),
        ("--config_file", str(CONFIGS / "accelerate/eight_gpus.yaml"), "--main_process_port", "0"),
        ("--config_file", str(CONFIGS / "accelerate/fsdp2.yaml"), "--main_process_port", "0"),
        ("--config_file", str(CONFIGS / "accelerate/cpu.yaml"), "--main_process_port", "0"),
        ("--config_file", str(CONFIGS / "accelerate/two_nodes_of_eight.yaml"), "--machine_rank", "1",
         "--main_process_ip", "127.0.0.1"),
        ("--cpu", "--num_processes", "1"),
        ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--dynamo_backend", "inductor"),
        ("--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false", "--num_processes", "2",
         "--main_process_port", "0", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    ],
)  # fmt: skip
def test_defaults_of_accelerate_launch_ask_for_nothing_that_is_refused(flags, monkeypatch):
    for name, value in variables_from(*flags).items():
        monkeypatch.setenv(name, value)
    launcher.check_environment(gradient_accumulation_steps=1)


def test_same_accumulation_of_launcher_and_setting_is_no_conflict(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launcher.check_environment(gradient_accumulation_steps=4)


def test_refusal_is_one_line_of_the_command(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    finished = command(*argv, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    assert "must be gradient_accumulation_steps = 1, got 4." in finished.stderr


ONE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "20001"}  # as a batch script exports it
CHECK = """
from training.launcher import check_environment
check_environment(1)
print("no objection")
"""


@pytest.mark.parametrize(
    ("launcher", "exported"),
    [
        (ONE, ADDRESS),
        pytest.param(ONE, {}, marks=pytest.mark.slow),
        pytest.param((), ADDRESS | {"ACCELERATE_DYNAMO_BACKEND": "inductor"}, marks=pytest.mark.slow),
    ],
)
def test_address_that_a_script_has_exported_asks_for_nothing(launcher, exported, tmp_path):
    finished = scripted(CHECK, tmp_path, launcher=launcher, **exported)
    assert finished.returncode == 0 and finished.stdout.endswith("no objection\n"), finished.stderr


@pytest.mark.parametrize("exported", [ADDRESS, pytest.param({}, marks=pytest.mark.slow)])
def test_one_process_of_several_is_found_whatever_is_exported(exported, tmp_path):
    finished = scripted(CHECK, tmp_path, launcher=(*ONE[:-1], "2"), **exported)
    assert finished.returncode != 0 and "was asked for several processes and started one" in finished.stderr


@pytest.mark.slow
def test_launcher_that_starts_one_process_instead_of_two_is_refused(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    one = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m")
    finished = command(*argv, launcher=one)
    assert finished.returncode != 0
    assert "dino-train: error: accelerate launch was asked for several processes and started one" in finished.stderr
    assert not list(tmp_path.iterdir())
