"""`--dry_run` by the real command: its numbers against independent ones, and that it leaves nothing behind."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from modeling_dino import DINOConfig, DINOForPreTraining
from modeling_dino.command_line import CONFIGS
from training import TrainingArguments, dry_run, speed, train
from training.__main__ import train_from_command_line
from training.arguments import parse_arguments
from training.dry_run import activation_bytes, find_origins, state_bytes
from training.networks import load_config
from training.optim import parameter_groups
from training.schedules import Schedule

from .commands import command, scripted, trained
from .hub import Hub
from .test_bad_input import answer
from .test_hub import client
from .test_step import Training
from .test_training import RECIPE, recipe  # noqa: F401


def section(printed: str, title: str) -> list[list[str]]:
    """Cells of the rows below a title."""
    [block] = [block for block in printed.split("\n\n") if block.startswith(title)]
    return [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()[1:]]


def listed(printed: str, title: str) -> list[str]:
    """The parts of a paragraph below a title."""
    return ", ".join(sum(section(printed, title), [])).replace(",,", ",").split(", ")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time of its last change."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def imagenet_run(flat_folder, tmp_path_factory):
    """What is printed of the original's first run, on one process with the batch of its eight. Of ImageNet, which is
    not here, the number of images alone matters."""
    folder = tmp_path_factory.mktemp("imagenet")
    argv = ("--config", "imagenet_vit_small_patch16", "--dataset_name", flat_folder, "--dry_run")
    return trained(*argv, "--output_dir", folder / "run", "--per_device_train_batch_size", "512"), folder


def test_schedule_of_the_imagenet_run_has_the_originals_numbers(imagenet_run):
    rows = {int(row[0]): row[1:] for row in section(imagenet_run[0], "Schedule")[1:]}
    assert rows.keys() == {0, 2502, 25_020, 62_550, 125_100, 187_650, 250_199}
    assert rows[0] == ["0.00", "0.0000e+00", "0.04000", "0.9960000", "0.0400", "last layer"]
    assert rows[25_020][:2] == ["10.00", "1.0000e-03"]
    # of the original, at half of the training and at its last step
    assert rows[125_100] == ["50.00", "5.8724e-04", "0.22000", "0.9980000", "0.0400", "none"]
    assert rows[250_199] == ["100.00", "1.0000e-06", "0.40000", "1.0000000", "0.0400", "none"]
    assert [row[-1] for row in rows.values()] == ["last layer"] + ["none"] * 6


def test_steps_batch_and_parameters_of_the_imagenet_run(imagenet_run):
    run = dict(section(imagenet_run[0], "Run"))
    assert run == {
        "images per epoch": "1,281,167", "global batch": "512 = 1 process x 512 images", "steps per epoch": "2,502",
        "steps in all": "250,200", "peak learning rate": "0.001", "starts from": "random weights",
    }  # fmt: skip
    # 22 352 128 with the prototypes' gains, which are no parameters as they are fixed
    head = 22_352_128 - 65_536
    assert section(imagenet_run[0], "Parameters") == [
        ["backbone", "21,665,664"], ["head", f"{head:,}"], ["student and teacher", f"{2 * (21_665_664 + head):,}"],
    ]  # fmt: skip


def test_memory_of_the_imagenet_run(imagenet_run):
    rows = {row[0]: float(row[1].removesuffix(" GiB")) for row in section(imagenet_run[0], "Memory") if len(row) > 1}
    trained, gains = 21_665_664 + 22_352_128 - 65_536, 65_536
    network = 4 * (trained + gains) / 2**30
    assert rows["student"] == rows["teacher"] == pytest.approx(network, abs=6e-4)
    assert rows["gradients"] == pytest.approx(4 * trained / 2**30, abs=6e-4)
    assert rows["optimiser"] == pytest.approx(8 * trained / 2**30, abs=6e-4)
    *parts, total = rows.values()
    assert total == pytest.approx(sum(parts), abs=3e-3)
    # eleven blocks and a part of the last, in fp32, of 2 x 197 tokens an image: global crops are passed first
    blocks = 512 * 11 * 2 * 197 * 4 * (8 + 4) * 384 / 2**30
    targets = 512 * 2 * 65_536 * 4 / 2**30
    assert blocks + targets < rows["activations, estimated, fp32"] < 1.15 * (blocks + targets)


def test_settings_come_with_their_origin_and_those_that_were_given_come_first(imagenet_run, flat_folder):
    printed, folder = imagenet_run
    assert section(printed, "Settings given as flags") == [
        ["dataset_name", str(flat_folder)],
        ["per_device_train_batch_size", "512"],
        ["output_dir", str(folder / "run")],
    ]
    assert section(printed, "Settings of imagenet_vit_small_patch16.yaml") == [
        ["streaming", "true"],
        ["num_examples", "1281167"],
        ["model_config", "vit_small_patch16"],
        ["num_train_epochs", "100"],
        ["eval_split", "validation"],
    ]
    defaults, unset = (listed(printed, title) for title in ("Settings left at their default", "Settings not given"))
    assert "clip_grad 3" in defaults and "local_crops_scale 0.05 0.4" in defaults and "init_from" in unset
    assert not [text for text in defaults + unset if text.startswith("num_examples")]
    names = [text.split()[0] for text in defaults + unset]
    assert len(names) == len(set(names)) == len(dataclasses.fields(TrainingArguments)) - 8 - 1  # --dry_run itself


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_sections_fit_a_terminal_of_80_columns(name):
    """Without the folders, of whatever length: all sections but those that measure, of every recipe."""
    args = parse_arguments(["--config", name, "--dataset_name", "photos", "--output_dir", "run"])
    args.gradient_accumulation_steps = 4
    schedule = Schedule(args, steps_per_epoch=12_345, num_steps=1_234_567, global_batch_size=4096)
    printed = "\n".join([dry_run._settings(args), dry_run._schedule(schedule)])
    assert max(map(len, printed.splitlines())) < 80, max(printed.splitlines(), key=len)


def test_whole_dry_run_fits_a_terminal_and_lists_each_override_once(flat_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(flat_folder)
    argv = ("--config", "own_images_cpu", "--dataset_name", "photos", "--output_dir", "run", "--dry_run")
    argv += ("--per_device_train_batch_size", 4, "--config_overrides", "out_dim=64", "drop_path_rate=0.1")
    printed = trained(*argv, "--dry_run_processes", 2)
    lines = printed.splitlines()[1:]  # but for the account, which begins with a path
    assert max(map(len, lines)) < 80, max(lines, key=len)
    [first, *more] = section(printed, "Settings of own_images_cpu.yaml and flags")
    overrides = " ".join([first[1], *sum(more, [])]).split()
    assert len(overrides) == 8 and {"out_dim=64", "drop_path_rate=0.1", "hidden_size=128"} < set(overrides)
    memory = dict(row for row in section(printed, "Memory") if len(row) == 2)
    assert all(float(text.removesuffix(" MiB").replace(",", "")) > 1 for text in memory.values()) and len(memory) > 5


def test_origin_of_each_setting(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"seed": 0, "hue": 0.2, "config_overrides": {"out_dim": 8}}))
    argv = ["--config", str(tmp_path / "mine.yaml"), "--dataset_name", "x", "--output_dir=y", "--hue", "0.3"]
    origins = find_origins(parse_arguments([*argv, "--config_overrides", "out_dim=9", "--clip-grad", "3"]))
    assert {name: origin for name, origin in origins.items() if origin != "default"} == {
        "dataset_name": "flag", "output_dir": "flag", "hue": "flag", "clip_grad": "flag", "seed": "mine.yaml",
        "config_overrides": "mine.yaml, flag",
    }  # fmt: skip
    origins = find_origins(TrainingArguments(dataset_name="x", output_dir="y", seed=3))
    assert {name for name, origin in origins.items() if origin == "given"} == {"dataset_name", "output_dir", "seed"}
    assert not {"flag", "mine.yaml"} & set(origins.values())


@pytest.mark.slow
def test_nothing_is_touched(imagenet_run, recipe, parquet_folder, tmp_path, capsys):  # noqa: F811
    """No folder is made, and of a run that is there already, not a byte or a time changes: neither where it would be
    gone on with nor where it would be lost."""
    assert not list(imagenet_run[1].iterdir())
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--max_steps", "5")
    trained(*argv)
    before = contents(tmp_path)
    printed = trained(*argv, "--dry_run", "--resume_from_checkpoint", "latest")
    assert dict(section(printed, "Run"))["starts from"] == str(tmp_path / "run/checkpoints/step_0000005")
    assert trained(*argv, "--dry_run", "--overwrite_output_dir", "--eval_steps", "1").endswith("or written.\n")
    assert "holds another run" in answer(train_from_command_line, (*argv, "--dry_run"), capsys)
    assert contents(tmp_path) == before
    arguments = json.loads((tmp_path / "run/checkpoints/step_0000005/manifest.json").read_text())["arguments"]
    assert arguments["dry_run"] is False and "origins" not in arguments


def test_several_processes_print_once(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    printed = trained(*argv, "--gradient_accumulation_steps", 2, processes=2)
    run = dict(section(printed, "Run"))
    assert run["global batch"] == "32 = 2 processes x 8 images x 2 accumulated"
    assert (run["steps per epoch"], run["steps in all"]) == ("1", "2")
    assert "gradients' buckets (DDP)" in dict(row for row in section(printed, "Memory") if len(row) == 2)
    assert not list(tmp_path.iterdir())


def test_from_python(flat_folder, tmp_path, capsys):
    fields = {name: value for name, value in RECIPE.items() if name != "config_overrides"}
    overrides = [f"{name}={value}" for name, value in RECIPE["config_overrides"].items()]
    args = TrainingArguments(
        **fields, config_overrides=overrides, dataset_name=str(flat_folder), output_dir=str(tmp_path / "run"),
        dry_run=True,
    )  # fmt: skip
    assert train(args) == tmp_path / "run" and not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert ["dataset_name", str(flat_folder)] in section(printed, "Settings given in Python")
    assert "Settings of" not in printed and "given as flags" not in printed


def test_images_of_the_hub_stay_there(recipe, parquet_folder, tmp_path):  # noqa: F811
    """Not streamed, the run itself would take them all before its first step."""
    with Hub() as hub:
        hub.add_dataset(
            "tester/images", {f"data/{path.name}": path.read_bytes() for path in parquet_folder.glob("*.parquet")}
        )
        argv = ("--config", recipe, "--dataset_name", "tester/images", "--output_dir", tmp_path / "run", "--dry_run")
        finished = command(*argv, "--max_steps", "7", **client(hub.url, tmp_path / "home"))
        assert finished.returncode == 0, finished.stderr
        assert dict(section(finished.stdout, "Run"))["steps in all"] == "7"
        assert not list((tmp_path / "home").rglob("*.parquet")) and not list((tmp_path / "home").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_tmp", "1"], "there is no option --teacher_tmp, did you mean --teacher_temp?"),
        (
            ["--warmup_epochs", "3"],
            "warmup_epochs must be at most 2, got 3: the training has only 10 steps, 5 an epoch.",
        ),
        (
            ["--per_device_train_batch_size", "64"],
            "there are 40 images, fewer than one batch of 64 = 1 process x 64 images. Give",
        ),
        (["--config_overrides", "hiden_size=3"], "the model's config has no field hiden_size, did you mean hidden_si"),
    ],
)
def test_bad_settings_end_as_they_do_without_it(recipe, parquet_folder, tmp_path, capsys, flags, message):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    assert message in answer(train_from_command_line, (*argv, *flags), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize("backbone", [{}, {"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1]}}])
def test_state_is_what_a_step_really_leaves(norm_last_layer, backbone):
    """Of networks, gradients and AdamW after a step; its counters, one number a parameter, are not counted."""
    small = {} if backbone else {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DINOConfig(out_dim=64, norm_last_layer=norm_last_layer, **small, **backbone)
    student = DINOForPreTraining(config)
    optimizer = torch.optim.AdamW(parameter_groups(student))
    student(torch.randn(2, 3, 64, 64)).logits.sum().backward()
    optimizer.step()
    parts = state_bytes(student, num_processes=1, optimizer="adamw")
    assert parts["student"] == parts["teacher"] == sum(tensor.nbytes for tensor in student.state_dict().values())
    assert parts["gradients"] == sum(p.grad.nbytes for p in student.parameters() if p.requires_grad)
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert parts["optimiser"] == sum(tensor.nbytes for tensor in states)
    assert state_bytes(student, 2, "adamw")["gradients' buckets (DDP)"] == parts["gradients"]


def test_activations_of_many_images_follow_from_those_of_two():
    """Exactly, as far as what autograd keeps goes: the estimate for 6 images is what 6 images keep."""
    args = TrainingArguments(dataset_name="x", output_dir="y", global_crop_size=32, local_crop_size=16)
    config = DINOConfig(image_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, out_dim=50)
    student = DINOForPreTraining(config).train()

    def estimate(num_images: int) -> int:
        args.per_device_train_batch_size = num_images
        return activation_bytes(args, student, is_mixed=False)

    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.add(tensor) or tensor, lambda tensor: tensor):
        student([torch.zeros(48, 3, 16, 16)], criterion=lambda bottleneck, last_layer: bottleneck.sum())
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    really = sum(size for address, size in storages.items() if address not in own)  # of local crops: more, here
    # targets; what the last layer is given, and sums of exponentials; fixed gains
    loss = 12 * 50 * 4 + 48 * (256 + 1) * 4 + 50 * 4
    assert really < estimate(6) <= really + loss
    assert estimate(6) - estimate(5) == estimate(2) - estimate(1)
    assert math.isclose(estimate(600), 100 * estimate(6), rel_tol=0.05)


def test_too_few_images_for_another_machine_name_its_processes(recipe, parquet_folder, tmp_path, capsys):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    message = answer(train_from_command_line, (*argv, "--dry_run_processes", 8), capsys)
    batch = "there are 40 images, fewer than one batch of 64 = 8 processes x 8 images."
    assert message.endswith(f"{batch} Give --per_device_train_batch_size 5 or less.")
    trained(*argv, "--dry_run_processes", 8, "--per_device_train_batch_size", 5)
    argv += ("--dry_run_processes", 8, "--gradient_accumulation_steps", 10)
    message = answer(train_from_command_line, argv, capsys)
    assert "fewer than one batch of 640 = 8 processes x 8 images x 10 accumulated. Give more images, or " in message


def test_processes_of_another_machine(recipe, parquet_folder, tmp_path):  # noqa: F811
    """What one process says of two is what two say of themselves, but for the time that was measured."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    argv += ("--gradient_accumulation_steps", 2)
    alone, both = trained(*argv, "--dry_run_processes", 2), trained(*argv, processes=2)
    for title in ("Run", "Schedule", "Parameters", "Memory"):
        assert section(alone, title) == section(both, title), title
    assert dict(section(alone, "Run"))["global batch"] == "32 = 2 processes x 8 images x 2 accumulated"
    assert "as if each process had such a device" in alone.lower() and not list(tmp_path.iterdir())
    finished = command(*argv[:-3], "--dry_run_processes", 2)
    assert finished.returncode == 2 and "dry_run_processes is for --dry_run alone, got 2" in finished.stderr


def test_time_of_a_run_follows_from_a_step(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    printed = trained(*argv, "--max_steps", 100_000_000)
    rows = dict(row for row in section(printed, "Time, measured on this machine") if len(row) == 2)
    assert rows["device"] == "CPU, 1 thread, fp32"
    number, _, what = rows["a step"].partition(" s for ")
    assert what == "8 images of a process"
    hours = float(rows["all steps"].removesuffix(" hours").replace(",", ""))
    assert hours == pytest.approx(float(number) * 1e8 / 3600, rel=0.01)
    assert "of at most" in rows["measured"] or rows["measured"] == "whole steps"


@pytest.mark.parametrize(
    ("seconds", "batch", "num_measured"),
    [(1000, 64, 64), (1000, 3, 3), (1000, 1, 1), (100, 64, 16), (0, 64, 2)],
)
def test_steps_of_a_whole_batch_follow_from_smaller_ones(monkeypatch, seconds, batch, num_measured):
    """By a clock of our own: a step takes 1 s and half a second an image, and twice that the first time."""
    now, calls = [0.0], []

    def step(noise) -> tuple[float, float]:
        num_images = len(noise.crops[0]) // 2
        factor = 1 if num_images in calls else 2
        calls.append(num_images)
        now[0] += (1 + 0.5 * num_images) * factor
        return 0.5 * num_images * factor, 1 * factor

    monkeypatch.setattr(speed, "_make_step", lambda *_: step)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    args = TrainingArguments(
        dataset_name="x", output_dir="y", global_crop_size=16, local_crop_size=8, num_local_crops=1,
        per_device_train_batch_size=batch,
    )  # fmt: skip
    student = DINOForPreTraining(tiny())
    found = speed.measure_step(args, student, Accelerator(cpu=True, gradient_accumulation_steps=3), seconds)
    assert (found.num_images, found.num_measured) == (3 * batch, num_measured)
    if seconds:
        assert found.seconds == pytest.approx(3 * 0.5 * batch + 1)
        assert now[0] <= seconds
    else:  # the one step that is always done
        assert calls == [2] and found.seconds == pytest.approx(2 * (3 * 0.5 * batch + 1))


def tiny() -> DINOConfig:
    return DINOConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, out_dim=8
    )


@pytest.mark.parametrize("settings", [{}, {"augmentation_device": "host"}, {"gradient_checkpointing": True}])
def test_measured_step_computes_what_a_training_step_does(settings):
    training = Training(**settings)
    student = DINOForPreTraining(load_config(training.args)).train()
    if settings.get("gradient_checkpointing"):
        for network in (student, training.state.student):
            # older versions of transformers know the second name alone
            enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
    before, random = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    measured = speed._make_step(training.args, student, training.accelerator)
    batch = speed._noise(training.args, 3, 4)
    training.step()
    with FlopCounterMode(display=False) as real:
        training.step()
    with FlopCounterMode(display=False) as copied:
        assert min(measured(batch)) > 0
    assert copied.get_total_flops() == real.get_total_flops() > 0
    torch.set_rng_state(random)
    speed.measure_step(training.args, student, training.accelerator, seconds=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def fill_a_gpu():
    raise torch.OutOfMemoryError


def fill_the_host():
    torch.empty(2**60, dtype=torch.uint8, device="cpu")  # a RuntimeError of the allocator


def fill_the_host_by_numpy():
    np.empty(2**60, np.uint8)


FILLING = [fill_a_gpu, fill_the_host, fill_the_host_by_numpy]


@pytest.mark.parametrize("fill", FILLING)
def test_batch_that_does_not_fit_the_memory_is_said(fill, monkeypatch, recipe, parquet_folder, tmp_path, capsys):  # noqa: F811
    def step(noise) -> tuple[float, float]:
        if len(noise.crops[0]) > 2 * 4:
            fill()
        return 1.0, 0.5

    monkeypatch.setattr(speed, "_make_step", lambda *_: step)
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    train_from_command_line(list(map(str, argv)))
    rows = dict(row for row in section(capsys.readouterr().out, "Time, measured on this machine") if len(row) == 2)
    assert rows["measured"] == "steps of at most 4 of 8 images; 8 do not fit the memory"
    assert rows["a step"] == "2.5 s for 8 images of a process"


@pytest.mark.parametrize("fill", FILLING)
def test_step_that_does_not_fit_the_memory_is_said(fill, monkeypatch, recipe, parquet_folder, tmp_path, capsys):  # noqa: F811
    monkeypatch.setattr(speed, "_make_step", lambda *_: fill())
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    train_from_command_line(list(map(str, argv)))
    assert "Not measured: a step of two images does not fit the memory" in capsys.readouterr().out


def test_other_errors_of_a_measured_step_are_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(speed, "_make_step", fail)
    args = TrainingArguments(dataset_name="x", output_dir="y")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        speed.measure_step(args, DINOForPreTraining(tiny()), Accelerator(cpu=True))


KILLED = """
import os
from training import dry_run
dry_run.measure_step = lambda *_: os.kill(os.getpid(), 9)  # as the kernel does where memory is full
from training.__main__ import main
main()
"""


def test_process_that_is_killed_while_it_measures_has_shown_the_rest(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    killed = scripted(KILLED, tmp_path, *argv)
    assert killed.returncode == -9, killed.stderr
    whole = trained(*argv)
    assert killed.stdout and whole.startswith(killed.stdout.rstrip("\n") + "\n\nTime, measured")
