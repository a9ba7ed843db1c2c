"""The ways in which processes are started, and those in which they would each train for themselves."""

import os
import socket
import subprocess
import sys

import pytest

from modeling_dino.command_line import CONFIGS

from .commands import TWO, command, trained
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
