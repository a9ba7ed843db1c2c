"""Every recipe parses, and is what its header says it is; so are the launcher's configs, and the Slurm script."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image as PillowImage
from transformers import AutoImageProcessor

from modeling_dino.command_line import CONFIGS
from training import TrainingArguments
from training.arguments import parse_arguments
from training.networks import load_config
from training.schedules import Schedule

from .commands import command, trained
from .test_training import losses, recipe  # noqa: F401


IMAGENET = 1_281_167
# by hand: images, processes, images each, batch, steps per epoch, steps, peak learning rate, peak temperature
RECIPES = {
    "imagenet_vit_small_patch16": (IMAGENET, 8, 64, 512, 2502, 250_200, 0.001, 0.04),
    "imagenet_vit_small_patch16_300ep": (IMAGENET, 16, 64, 1024, 1251, 375_300, 0.002, 0.07),
    "imagenet_vit_base_patch16": (IMAGENET, 16, 64, 1024, 1251, 500_400, 0.002, 0.07),
    "imagenet_vit_small_patch8": (IMAGENET, 64, 16, 1024, 1251, 375_300, 0.002, 0.07),
    "imagenet_vit_base_patch8": (IMAGENET, 64, 16, 1024, 1251, 375_300, 0.002, 0.07),
    "imagenet_resnet50": (IMAGENET, 8, 64, 512, 2502, 250_200, 0.06, 0.04),
    "imagenet_xcit_small_12_p16": (IMAGENET, 16, 64, 1024, 1251, 375_300, 0.001, 0.07),
    "small_data_1k": (1000, 1, 64, 64, 15, 15_000, 0.000125, 0.02),
    "small_data_10k": (10_000, 1, 128, 128, 78, 31_200, 0.00025, 0.02),
    "small_data_100k": (100_000, 1, 128, 128, 781, 156_200, 0.00025, 0.04),
}
DATA = ("--dataset_name", "x", "--output_dir", "y")


def parsed(name: str) -> TrainingArguments:
    return parse_arguments(["--config", name, *DATA])


def header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().partition("\nmodel_config")[0].splitlines()
    return " ".join(" ".join(line.removeprefix("#") for line in lines if line.startswith("#")).split())


def test_every_recipe_is_tested():
    others = {"quickstart", "cifar10_cpu", "own_images_cpu"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == RECIPES.keys() | others


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_what_its_header_says(name):
    images, processes, each, batch, steps_per_epoch, num_steps, peak, temperature = RECIPES[name]
    assert f"--config {name} " in header(name)
    plural = "processes" if processes > 1 else "process"
    assert f"{processes} {plural} x {each} = {batch} images a step; {steps_per_epoch} steps an epoch" in header(name)
    assert f"{steps_per_epoch} steps an epoch, {num_steps} in all; peak learning rate {peak:g}." in header(name)
    for mark in ("published", "measured here", "Time: ", "Score: "):
        assert mark in header(name)

    args = parsed(name)
    load_config(args)
    assert args.per_device_train_batch_size == each and processes * each == batch
    if images == IMAGENET:
        assert args.streaming and args.num_examples == images
    assert args.num_train_epochs * steps_per_epoch == num_steps and images // batch == steps_per_epoch
    schedule = Schedule(args, steps_per_epoch, num_steps, batch)
    assert max(schedule(step).learning_rate for step in range(0, num_steps, 5)) == pytest.approx(peak, rel=1e-9)
    assert schedule(num_steps - 1).teacher_temp == temperature
    # the network learns all of itself for most of the time, at the full learning rate for nine tenths of it
    assert args.warmup_epochs <= args.num_train_epochs / 10
    assert args.freeze_last_layer_epochs <= args.num_train_epochs / 10
    assert args.warmup_teacher_temp_epochs <= args.num_train_epochs * 0.3
    # the centre is quicker than the teacher, or all images get one answer
    drift = (1 - args.momentum_teacher) * (args.student_temp / args.teacher_temp - 1)
    assert drift <= (1 - args.center_momentum) / 5 + 1e-9


def changes(name: str) -> dict:
    """What a recipe changes of the method; `config_overrides` as one value."""
    args, default = parsed(name), TrainingArguments(dataset_name="x", output_dir="y")
    about_data = ("streaming", "num_examples", "eval_split", "per_device_train_batch_size", "model_config")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return {
        name: value for name, value in values.items() if name not in about_data and value != getattr(default, name)
    }


def test_recipes_of_the_originals_readme_change_what_it_changes_and_nothing_else():
    assert changes("imagenet_vit_small_patch16") == {}
    assert changes("imagenet_vit_small_patch16_300ep") == {
        "num_train_epochs": 300, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30,
        "config_overrides": ["norm_last_layer=false"],
    }  # fmt: skip
    assert changes("imagenet_resnet50") == {
        "optimizer": "sgd", "base_learning_rate": 0.03, "weight_decay": 1e-4, "weight_decay_end": 1e-4,
        "global_crops_scale": [0.14, 1.0], "local_crops_scale": [0.05, 0.14],
    }  # fmt: skip


def test_recipe_for_own_images_takes_any_size_without_labels(tmp_path):
    """A folder of gray, transparent, tiny, long and large images, in a few steps of the recipe itself."""
    rng = np.random.default_rng(0)
    for i in range(64):
        mode = ("RGB", "L", "RGBA")[i % 3]
        width, height = rng.integers(5, 60, 2) * rng.choice([1, 5], 2)
        pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        image = PillowImage.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
        image.save(tmp_path / f"{i}.{'png' if i % 2 or mode == 'RGBA' else 'jpg'}")
    short = ("--max_steps", 4, "--warmup_epochs", 1, "--report_to", "none")
    argv = ("--config", "own_images_cpu", "--dataset_name", tmp_path, "--output_dir", tmp_path.parent / "own", *short)
    said = trained(*argv)
    assert "64 image files found, 64 listed (train 64, no labels: all in one folder)" in said
    assert "step 4 of 4: loss" in said and not (tmp_path.parent / "own/skipped.jsonl").exists()
    processor = AutoImageProcessor.from_pretrained(tmp_path.parent / "own")
    assert processor.crop_size.height == load_config(parsed("own_images_cpu")).image_size == 64


@pytest.mark.parametrize(
    ("name", "num_processes", "num_machines", "mixed_precision", "kind"),
    [
        ("one_gpu", 1, 1, "bf16", "NO"),
        ("eight_gpus", 8, 1, "bf16", "MULTI_GPU"),
        ("two_nodes_of_eight", 16, 2, "bf16", "MULTI_GPU"),
        ("fsdp2", 8, 1, "bf16", "FSDP"),
        ("cpu", 2, 1, "no", "MULTI_GPU"),
    ],
)
def test_accelerate_reads_its_configs(name, num_processes, num_machines, mixed_precision, kind):
    config = load_config_from_file(str(CONFIGS / f"accelerate/{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (num_processes, num_machines)
    assert (config.mixed_precision, config.distributed_type.value) == (mixed_precision, kind)


def test_flags_that_headers_name_go_with_the_config_of_two_nodes():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    argv = ["--config_file", str(CONFIGS / "accelerate/two_nodes_of_eight.yaml"), "--machine_rank", "1"]
    argv += ["--main_process_ip", "node0", "--mixed_precision", "no", "-m", "training"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(argv))
    assert (args.multi_gpu, args.num_processes, args.num_machines, args.machine_rank) == (True, 16, 2, 1)
    assert (args.main_process_ip, args.main_process_port, args.mixed_precision) == ("node0", 29500, "no")


@pytest.mark.slow
def test_config_for_cpu_trains_in_two_processes(recipe, parquet_folder, tmp_path):  # noqa: F811
    config = str(CONFIGS / "accelerate/cpu.yaml")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", "-m")
    argv = ("--config", recipe, "--dataset_name", parquet_folder)
    trained(*argv, "--output_dir", tmp_path / "two", launcher=launcher)
    assert len(losses(tmp_path / "two")) == 2 * (40 // 16)
    alone = command(*argv, "--output_dir", tmp_path / "no", launcher=launcher, ACCELERATE_USE_CPU="false")
    assert alone.returncode != 0 and "on CPU, set ACCELERATE_USE_CPU=true" in alone.stderr


SBATCH = CONFIGS / "slurm/train.sbatch"
# as much of Slurm as the script uses: srun starts all tasks, passes signals on, and exits with the highest code
SRUN = """#!{python}
import os, signal, subprocess, sys
first = next(i for i, arg in enumerate(sys.argv) if i and not arg.startswith("--"))
tasks = [
    subprocess.Popen(sys.argv[first:], env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


class Job:
    """The script as Slurm would run it, with `num_tasks` processes; `requeued` is what it asked `scontrol` for."""

    def __init__(self, folder: Path, num_tasks: int, *argv):
        (folder / "bin").mkdir()
        for name, script in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)
        self.log = folder / "scontrol.log"
        environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SCONTROL_LOG": str(self.log), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NTASKS": str(num_tasks), "SLURM_NTASKS_PER_NODE": str(num_tasks), "SLURM_CPUS_PER_TASK": "1",
            "ACCELERATE_MIXED_PRECISION": "no",
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", SBATCH, *map(str, argv)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        printed, _ = self.process.communicate(timeout=120)
        return self.process.returncode, printed

    @property
    def requeued(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def test_slurm_script_asks_for_what_it_relies_on():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    options = re.findall(r"^#SBATCH --(.+)$", SBATCH.read_text(), re.MULTILINE)
    assert {"requeue", "signal=B:USR1@120", "ntasks-per-node=8", "gpus-per-node=8", "open-mode=append"} <= set(options)


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [1, 2])
def test_job_whose_time_is_up_writes_a_checkpoint_and_is_requeued_until_it_is_done(
    recipe,  # noqa: F811
    parquet_folder,
    tmp_path,
    num_tasks,
):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    argv += ("--num_train_epochs", 40, "--save_steps", 1000, "--per_device_train_batch_size", 8 // num_tasks)
    job = Job(tmp_path, num_tasks, *argv)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
        assert job.process.poll() is None, job.end()
        time.sleep(0.01)
    job.process.send_signal(signal.SIGUSR1)
    code, printed = job.end()
    assert code == 75 or (num_tasks > 1 and code), printed  # of several, one may be cut off by another's end
    assert printed.count("Stopped by SIGUSR1 after step") == 1, printed
    assert job.requeued == f"requeue {os.getpid()}\n"
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    stopped = int(checkpoint.name[5:])
    assert 3 <= stopped < 200

    (tmp_path / "again").mkdir()
    job = Job(tmp_path / "again", num_tasks, *argv)
    code, printed = job.end()
    assert code == 0 and not job.requeued, printed
    assert len(losses(tmp_path / "run")) == 200 and (tmp_path / "run/model.safetensors").exists()


def test_job_that_ends_by_itself_is_not_requeued(tmp_path):
    job = Job(tmp_path, 1, "--lerning_rate", "1")
    code, printed = job.end()
    assert code == 2 and "there is no option --lerning_rate" in printed and not job.requeued
