"""Runs in fp16 with a scaler, with gradient checkpointing and compiled; and steps that are no number."""

import json
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from .commands import TWO, command, scripted, trained
from .test_training import losses, metrics, recipe  # noqa: F401


# Accelerate leaves fp16 to GPUs; PyTorch's autocast and scaler know it on CPUs, too
FP16 = """
import sys, torch
from accelerate import Accelerator
from training.__main__ import main, train
module = sys.modules[train.__module__]
def make_accelerator(_):
    accelerator = Accelerator()
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", **SCALER)
    return accelerator
module.make_accelerator = make_accelerator
main()
"""


def in_fp16(folder, *argv, **scaler) -> subprocess.CompletedProcess:
    return scripted(FP16.replace("SCALER", repr(scaler)), folder, *argv, ACCELERATE_MIXED_PRECISION="fp16")


def weights(output_dir, step: int, network: str) -> dict[str, torch.Tensor]:
    return load_file(output_dir / f"checkpoints/step_{step:07d}" / network / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_fp16_stays_near_fp32_and_keeps_fp32_weights(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder)
    trained(*argv, "--output_dir", tmp_path / "fp32")
    finished = in_fp16(tmp_path, *argv, "--output_dir", tmp_path / "fp16", init_scale=1.0)
    assert finished.returncode == 0, finished.stderr
    difference = np.abs(np.array(losses(tmp_path / "fp16")) / losses(tmp_path / "fp32") - 1)
    assert 0 < difference.mean() < 0.02
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "fp16/model.safetensors").values())


def test_steps_that_fp16_leaves_out_move_nothing_and_a_resume_keeps_the_scale(recipe, parquet_folder, tmp_path):  # noqa: F811
    """At this scale the first gradients overflow; it is halved each time, until they do not."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--save_steps", "1", "--save_total_limit", "99")
    argv += ("--num_train_epochs", "4")
    finished = in_fp16(tmp_path, *argv, "--output_dir", tmp_path / "run", init_scale=2.0**10)
    assert finished.returncode == 0, finished.stderr
    states = [torch.load(path / "state.pt") for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    scales = [state["scaler"]["scale"] for state in states]
    moved = [after == before for before, after in zip([2.0**10, *scales], scales)]
    first = moved.index(True)
    assert 2 <= first < 15 and all(moved[first:])
    for step in range(2, 21):
        before, after = states[step - 2], states[step - 1]
        assert torch.equal(before["center"], after["center"]) != moved[step - 1]
        for network in ("student", "teacher"):
            same = are_equal(weights(tmp_path / "run", step - 1, network), weights(tmp_path / "run", step, network))
            assert same != moved[step - 1], (step, network)
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 20  # the schedules went on
    argv += ("--output_dir", tmp_path / "again")
    argv += ("--resume_from_checkpoint", tmp_path / "run/checkpoints/step_0000002")
    again = in_fp16(tmp_path, *argv, init_scale=2.0**10)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[2:]


@pytest.mark.slow
def test_fp16_that_overflows_at_any_scale_stops(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_train_epochs", "8", "--save_steps", "20")
    finished = in_fp16(tmp_path, *argv, "--output_dir", tmp_path, init_scale=2.0**30, backoff_factor=0.999)
    assert finished.returncode == 2, finished.stderr
    assert "the gradient of step 26 is not finite" in finished.stderr and "train in bf16" in finished.stderr
    assert (tmp_path / "checkpoints/step_0000020/manifest.json").exists()


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_bit(recipe, parquet_folder, tmp_path):  # noqa: F811
    """Paths are dropped alike when a block is computed for the second time."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder)
    trained(*argv, "--output_dir", tmp_path / "without")
    trained(*argv, "--output_dir", tmp_path / "with", "--gradient_checkpointing")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert are_equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")))


TF32 = """
import sys, torch
from training.__main__ import train_from_command_line
try:
    train_from_command_line(sys.argv[1:])
finally:
    print("now", torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
"""


@pytest.mark.parametrize(("flags", "expected"), [((), "now highest False"), (("--tf32",), "now high True")])
def test_tf32_is_a_setting_of_its_own(recipe, parquet_folder, tmp_path, flags, expected):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--max_steps", 1)
    finished = scripted(TF32, tmp_path, *argv, *flags)
    assert finished.returncode == 0 and expected in finished.stdout, finished.stderr


SPOILT = """
import os, sys
from training.__main__ import main, train
module, guard = sys.modules[train.__module__], sys.modules["training.guard"]
finish_crops, steps = module.finish_crops, []
def spoil(batch, device, args):
    crops = finish_crops(batch, device, args)
    crops[0][3] = float("VALUE")
    return crops
def spoil_fourth(batch, device, args):
    steps.append(None)
    is_it = len(steps) == 4 and os.environ.get("RANK", "0") == "PROCESS"
    return (spoil if is_it else finish_crops)(batch, device, args)
module.finish_crops = spoil_fourth
guard.finish_crops = spoil if os.environ.get("RANK", "0") == "PROCESS" else finish_crops
main()
"""


def test_loss_that_is_no_number_stops_before_the_optimiser_and_lists_the_images(recipe, flat_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", flat_folder, "--output_dir", tmp_path)
    finished = command(*argv, "--base_learning_rate", "1e30", "--save_steps", "1", "--num_train_epochs", "9",
                       "--warmup_epochs", "1", "--logging_steps", "50")  # fmt: skip
    assert finished.returncode == 2
    [message] = [line for line in finished.stderr.splitlines() if line.startswith("dino-train: error: ")]
    [*_, last] = sorted(tmp_path.glob("checkpoints/step_*"))
    step = int(last.name[5:]) + 1
    assert f"the loss of step {step} is not finite" in message and f"{last} is the last checkpoint" in message
    assert "suspect: the learning rate" in message and "lower base_learning_rate" in message
    images = [json.loads(line) for line in (tmp_path / "non_finite.jsonl").read_text().splitlines()]
    assert len(images) == 8 and {image["step"] for image in images} == {step}
    assert len({image["image"] for image in images}) == 8
    assert all(image["image"].startswith(str(flat_folder)) and image["is_finite"] for image in images)
    state = torch.load(last / "state.pt")
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, step - 1, "student").values())
    assert torch.isfinite(state["center"]).all()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_crops_that_are_no_numbers_stop_all_processes_and_are_named(recipe, flat_folder, tmp_path, processes):  # noqa: F811
    """Of one process: the others' losses are numbers, and stop all the same, at the same step."""
    argv = ("--config", recipe, "--dataset_name", flat_folder, "--output_dir", tmp_path / "run", "--save_steps", "1")
    argv += ("--num_train_epochs", "9", "--per_device_train_batch_size", 4, "--logging_steps", "50")
    script = SPOILT.replace("VALUE", "nan").replace("PROCESS", str(processes - 1))
    finished = scripted(script, tmp_path, *argv, processes=processes)
    assert finished.returncode != 0
    messages = {line for line in finished.stderr.splitlines() if line.startswith("dino-train: error: ")}
    [message] = messages
    assert "the loss of step 4 is not finite" in message and "suspect: the data" in message
    assert ("on process 1 and" in message) == (processes == 2)
    assert "step_0000003 is the last checkpoint" in message
    images = [json.loads(line) for line in (tmp_path / "run/non_finite.jsonl").read_text().splitlines()]
    assert len(images) == 4 * processes
    [bad] = [image for image in images if not image["is_finite"]]
    assert bad["process"] == processes - 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("regional", [False, True])
def test_compiled_run_ends_as_one_that_is_not(recipe, parquet_folder, tmp_path, processes, regional):  # noqa: F811
    """By Accelerate's plugin; with the backend that traces as the others do but needs no compiler."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--config_overrides", "drop_path_rate=0")
    argv += ("--per_device_train_batch_size", 8 // processes)
    trained(*argv, "--output_dir", tmp_path / "plain", processes=processes)
    launcher = TWO if processes == 2 else (*TWO[:2], "--cpu", "--num_processes", "1", "-m")
    flags = ("--dynamo_backend", "aot_eager") + regional * ("--dynamo_use_regional_compilation",)
    trained(*argv, "--output_dir", tmp_path / "compiled", launcher=(*launcher[:-1], *flags, "-m"))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("compiled", "plain"))
    assert one.keys() == other.keys()
    assert {name for name in weights(tmp_path / "compiled", 10, "student")} == {
        name for name in weights(tmp_path / "plain", 10, "student")
    }


COUNTED = """
import sys, torch
from torch._dynamo.utils import counters
from training.__main__ import train, train_from_command_line
module = sys.modules[train.__module__]
step, compiled = module.train_step, []

def train_step(*args):
    step(*args)
    compiled.append(counters["stats"]["unique_graphs"])

module.train_step = train_step
try:
    train_from_command_line(sys.argv[1:])
finally:
    print("compiled", *compiled)
"""


def test_compiled_training_compiles_in_its_first_step_alone(recipe, parquet_folder, tmp_path):  # noqa: F811
    """Of a deep network, whose blocks drop paths with different probabilities, no block twice: two resolutions of the
    student, the teacher's one, and first, last and other blocks."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    argv += ("--config_overrides", "num_hidden_layers=12", "drop_path_rate=0.2", "--report_to", "none")
    dynamo = {"ACCELERATE_DYNAMO_BACKEND": "EAGER", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true",
              "ACCELERATE_MIXED_PRECISION": "bf16"}  # fmt: skip
    finished = scripted(COUNTED, tmp_path, *argv, **dynamo)
    assert finished.returncode == 0, finished.stderr
    [line] = [line for line in finished.stdout.splitlines() if line.startswith("compiled")]
    first, *later = map(int, line.split()[1:])
    assert len(later) == 9 and set(later) == {first}
    assert 8 <= first <= 24 and "recompile_limit" not in finished.stderr
