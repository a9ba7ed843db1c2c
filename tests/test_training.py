"""Whole runs through the real commands, on a network of a few thousand parameters."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import load_file

from modeling_dino.convert_dino_checkpoint import convert
from training import monitor
from training.augmentation import CropBatch
from training.monitor import draw_curves

from .commands import command, trained
from .original import FIXTURES


RECIPE = {
    "model_config": "vit_tiny_patch16",
    "config_overrides": {
        "image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "drop_path_rate": 0.3,
    },
    "global_crop_size": 16, "local_crop_size": 8, "num_local_crops": 2, "num_workers": 0, "warmup_epochs": 0,
    "per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "save_steps": 3,
    "save_total_limit": 9, "eval_crop_pct": 1.0, "base_learning_rate": 0.03,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def metrics(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir):
    return [line["loss"] for line in metrics(output_dir) if "loss" in line]


@pytest.fixture(scope="module")
def run(recipe, parquet_folder, tmp_path_factory):
    """Ten steps with k-NN in between; the folder and what was printed."""
    output_dir = tmp_path_factory.mktemp("run")
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", output_dir)
    return output_dir, trained(*argv, "--eval_split", "test", "--eval_steps", "5")


def test_run_writes_metrics_of_every_step_and_knn_before_the_first(run):
    output_dir, _ = run
    steps = [line for line in metrics(output_dir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert {"loss_over_ln_k", "teacher_entropy", "learning_rate", "images_per_second"} <= set(steps[0])
    assert steps[0]["loss"] == pytest.approx(steps[0]["loss_over_ln_k"] * torch.tensor(32.0).log().item(), rel=1e-6)
    assert 0 < steps[0]["teacher_entropy"] <= torch.tensor(32.0).log().item() + 1e-5
    assert [line["step"] for line in metrics(output_dir) if "knn_10_top1" in line] == [0, 5, 10]


def run_snippet(printed: str, folder) -> str:
    """Runs the five lines that a run ends with where there is an `image.jpg`; returns shape and class they lead to.

    Not in the run's own folder: the code beside the weights would be found there before the package.
    """
    snippet = printed[printed.index("import modeling_dino") :].strip()
    assert len(snippet.splitlines()) == 5
    Image.new("RGB", (40, 30)).save(folder / "image.jpg")
    code = snippet + "\nprint(tuple(features.shape), type(model).__name__)"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    shown = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.split("\n")[-2]


def started_from(name, recipe, parquet_folder, output_dir, *flags):
    """The networks and the centre after one step that changes nothing."""
    still = ("--max_steps", "1", "--base_learning_rate", "0", "--min_learning_rate", "0")
    still += ("--center_momentum", "1", "--momentum_teacher", "1")
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", output_dir, *still, *flags)
    trained(*argv, "--init_from", name)
    folder = output_dir / "checkpoints/step_0000001"
    networks = [load_file(folder / which / "model.safetensors") for which in ("student", "teacher")]
    return *networks, torch.load(folder / "state.pt")["center"]


def test_training_goes_on_from_a_checkpoint_of_the_original(recipe, parquet_folder, tmp_path):
    convert(str(FIXTURES / "checkpoint.pth"), str(tmp_path / "converted"), num_attention_heads=3)
    config = json.loads((tmp_path / "converted/student/config.json").read_text())
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "out_dim",
              "head_hidden_dim", "head_bottleneck_dim")  # fmt: skip
    overrides = ("--config_overrides", *(f"{field}={config[field]}" for field in fields))
    student, teacher, center = started_from(
        tmp_path / "converted", recipe, parquet_folder, tmp_path / "out", *overrides
    )
    finished = command("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "no",
                       "--resume_from_checkpoint", tmp_path / "converted")  # fmt: skip
    assert finished.returncode == 2 and "Weights alone are for --init_from" in finished.stderr
    original = torch.load(FIXTURES / "checkpoint.pth", weights_only=False)
    assert torch.equal(center, original["dino_loss"]["center"])
    for ours, theirs in ((student, original["student"]), (teacher, original["teacher"])):
        theirs = {key.removeprefix("module."): tensor for key, tensor in theirs.items()}
        assert torch.equal(ours["head.last_layer.weight_v"], theirs["head.last_layer.weight_v"])
        assert torch.equal(ours["dino.embeddings.position_embeddings"], theirs["backbone.pos_embed"])
    assert not torch.equal(student["dino.layernorm.weight"], teacher["dino.layernorm.weight"])


def test_training_starts_from_a_backbone_with_heads_that_are_alike(run, recipe, parquet_folder, tmp_path):
    student, teacher, center = started_from(run[0], recipe, parquet_folder, tmp_path)
    assert student.keys() == teacher.keys() and all(torch.equal(student[name], teacher[name]) for name in student)
    published = load_file(run[0] / "model.safetensors")
    assert all(torch.equal(tensor, student[f"dino.{name}"]) for name, tensor in published.items())
    assert not center.any()


def test_weights_of_another_network_are_no_start(run, recipe, parquet_folder, tmp_path):
    """Also where all shapes are the same."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, "--init_from", run[0])
    finished = command(*argv, "--config_overrides", "num_attention_heads=3")
    assert finished.returncode == 2 and "is another network: it has num_attention_heads 2, not 3" in finished.stderr
    finished = command(*argv, "--init_from", FIXTURES / "backbone.pth")
    assert finished.returncode == 2 and "is a file; make a folder of it with dino-convert" in finished.stderr
    assert not list(tmp_path.iterdir())


def test_printed_snippet_loads_the_teacher(run, tmp_path):
    output_dir, printed = run
    assert run_snippet(printed, tmp_path) == "(1, 24) DINOModel"
    published, checkpoint = (
        load_file(output_dir / path)
        for path in ("model.safetensors", "checkpoints/step_0000010/teacher/model.safetensors")
    )
    assert published and all(torch.equal(tensor, checkpoint[f"dino.{name}"]) for name, tensor in published.items())


def test_first_crops_are_drawn_as_the_networks_see_them(run):
    """Under titles, eight rows of two global crops of 16 and two local ones of 8 pixels, eight times as large."""
    with Image.open(run[0] / "figures/crops.png") as picture:
        assert picture.size == (2 * 128 + 2 * 64 + 3 * 4, 20 + 8 * 132 - 4)
        pixels = np.array(picture)
    titles, pixels = pixels[:20], pixels[20:]
    for left, width in ((0, 128), (132, 128), (264, 64), (332, 64)):
        assert titles[:, left + 2 : left + width - 2].min() < 100  # which keeps within its column
    assert (pixels[:, 128:132] == 255).all()  # a gap
    for left in (0, 132):  # a picture may be flat; all are not
        crops = [pixels[top : top + 128, left : left + 128] for top in range(0, 8 * 132, 132)]
        assert all((crop == crop[::8, ::8].repeat(8, 0).repeat(8, 1)).all() for crop in crops)
        assert np.median([crop.std() for crop in crops]) > 10


def test_no_image_is_drawn_twice(recipe, flat_folder, tmp_path):  # noqa: F811
    """Two of eight images are broken, and others take their places in the batch."""
    shutil.copytree(flat_folder, tmp_path / "images")
    for number in (8, 9, 10, 11):
        (tmp_path / f"images/{number}.png").unlink()
    for number in (2, 5):
        (tmp_path / f"images/{number}.png").write_bytes(b"broken")
    argv = ("--config", recipe, "--dataset_name", tmp_path / "images", "--output_dir", tmp_path / "run")
    trained(*argv, "--max_steps", 1, "--max_skipped_fraction", 1, "--report_to", "none")
    with Image.open(tmp_path / "run/figures/crops.png") as picture:
        pixels = np.array(picture)[20:]
    rows = [pixels[top : top + 128] for top in range(0, len(pixels), 132)]
    assert len(rows) == 6 and len({row.tobytes() for row in rows}) == 6


@pytest.mark.parametrize("knows_rows", [True, False])
def test_as_many_images_are_compared_as_are_drawn(knows_rows, monkeypatch):
    """Of a batch of hundreds, in which every other image is a repeated one."""
    batch_size, compared = 512, []
    pixels = torch.arange(batch_size // 2).repeat_interleave(2)
    crops = (pixels[:, None, None, None] + torch.zeros(1, 3, 4, 4)).repeat(2, 1, 1, 1)
    rows = SimpleNamespace(images=pixels.tolist()) if knows_rows else None
    equal = torch.equal
    monkeypatch.setattr(monitor.torch, "equal", lambda a, b: compared.append(0) or equal(a, b))
    found = monitor._different_images(CropBatch([crops], None, images=rows), batch_size, 8)
    assert found == [0, 2, 4, 6, 8, 10, 12, 14] and len(compared) <= 8 * 16


def test_waiting_for_data_is_a_share_of_the_time(run):
    shares = [line["data_wait"] for line in metrics(run[0]) if "data_wait" in line]
    assert len(shares) == 10 and all(0 <= share < 1 for share in shares) and max(shares) > 0


def test_curves_are_drawn(run):
    with Image.open(run[0] / "figures/curves.png") as picture:
        assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 10
    assert (run[0] / "figures/curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("with_knn", [True, False])
def test_curves_show_what_decides_the_verdict(run, tmp_path, monkeypatch, with_knn):
    lines = [line for line in metrics(run[0]) if "loss" in line]
    knn = [{"step": 0, "knn_10_top1": 50.0}] * with_knn
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in knn + lines))
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    draw_curves(tmp_path, 64)
    axes = {axis.get_title().partition(" [")[0]: axis for axis in figures[0].axes}
    expected = ["loss", "teacher entropy", "target information"] + ["k-NN of the teacher, top-1"] * with_knn
    assert list(axes) == expected
    for title in expected[:3]:
        curve, limit = axes[title].lines
        assert curve.get_ydata().tolist() == [line[title.replace(" ", "_")] for line in lines]
        assert limit.get_ydata()[0] == pytest.approx(0.1 if title == "target information" else math.log(64))
    assert figures[0].get_suptitle() == f"Verdict: {lines[-1]['verdict']}"


@pytest.mark.parametrize("steps", [[1], [6], [1, 2, 3], [2, 4, 6], range(10, 12_001, 10), range(1, 151)])
def test_curves_of_few_steps_are_legible(steps, run, tmp_path, monkeypatch):
    """No fractions of steps, and no text over another or a point."""
    line = next(line for line in metrics(run[0]) if "loss" in line) | {"verdict": "collapsing to one output"}
    lines = [line | {"step": step, "loss": 4.2, "teacher_entropy": 4.15} for step in steps]  # near ln K
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    draw_curves(tmp_path, 64)
    [figure, _] = figures
    figure.draw_without_rendering()
    texts = [figure._suptitle]
    for axis in figure.axes:
        ticks = axis.get_xticks()
        shown = [tick for tick in ticks if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
        assert (ticks == ticks.round()).all() and len(shown) >= 2
        texts += [axis.title, *axis.texts, axis.xaxis.label]
        texts += [label for label in axis.get_xticklabels() if axis.get_xlim()[0] <= label._x <= axis.get_xlim()[1]]
        [name] = axis.texts
        points = axis.transData.transform(axis.lines[0].get_xydata())
        assert not any(name.get_window_extent().contains(*point) for point in points)
    boxes = [text.get_window_extent() for text in texts]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_run_resumes_as_if_it_had_never_stopped(run, recipe, parquet_folder, tmp_path):
    output_dir, _ = run
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    trained(*argv, "--resume_from_checkpoint", output_dir / "checkpoints/step_0000006")
    assert losses(tmp_path) == losses(output_dir)[6:]
    resumed, uninterrupted = (load_file(folder / "model.safetensors") for folder in (tmp_path, output_dir))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in uninterrupted.items())


def test_metrics_of_a_resumed_run_are_those_of_one_that_never_stopped(recipe, parquet_folder, tmp_path):
    """Stopped between two lines of metrics, with k-NN on: neither may show in any of the later lines."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--logging_steps", "2")
    trained(*argv, "--output_dir", tmp_path / "whole")
    trained(
        *argv, "--output_dir", tmp_path / "rest", "--eval_steps", "4",
        "--resume_from_checkpoint", tmp_path / "whole/checkpoints/step_0000003",
    )  # fmt: skip
    measured = ("images_per_second", "data_wait", "peak_memory_mib")
    whole, rest = (
        [line | dict.fromkeys(measured) for line in metrics(tmp_path / name) if "loss" in line]
        for name in ("whole", "rest")
    )
    assert [line["step"] for line in rest] == [4, 6, 8, 10]
    assert rest == whole[1:]


@pytest.mark.parametrize(
    "flags", [(), ("--eval_split", "test", "--eval_steps", 5), ("--streaming", "--num_examples", 40)]
)
def test_finished_run_resumed_elsewhere_is_published_there(run, recipe, parquet_folder, tmp_path, flags):
    """There is nothing to train; the card has what is known: no loss, and k-NN if that is asked for."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, *flags)
    resumed = ("--resume_from_checkpoint", run[0] / "checkpoints/step_0000010")
    printed = trained(*argv, *resumed, "--allow_changed", "streaming", "num_examples", "data")
    assert run_snippet(printed, run[0].parent) == "(1, 24) DINOModel"
    resumed, first = (load_file(folder / "model.safetensors") for folder in (tmp_path, run[0]))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in first.items())
    card = (tmp_path / "README.md").read_text()
    assert "10 steps of 8 images" in card and "loss at the end" not in card and "curves.png" not in card
    if "--eval_steps" in flags:
        accuracies = [
            [line["knn_10_top1"] for line in metrics(f) if "knn_10_top1" in line] for f in (tmp_path, run[0])
        ]
        assert accuracies[0] == accuracies[1][-1:] and "k-NN of the features on the split `test`" in card


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/step_0000011", "checkpoints/step_0000003/student"])
def test_folder_near_a_checkpoint_is_answered_by_the_newest(run, recipe, parquet_folder, tmp_path, given):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    finished = command(*argv, "--resume_from_checkpoint", run[0] / given)
    newest = run[0] / "checkpoints/step_0000010"
    *_, line = finished.stderr.splitlines()
    assert finished.returncode == 2 and f"got {run[0] / given}. Give {newest}." in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_afterwards(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    trained(*argv)
    limits = ("--save_steps", "1", "--max_steps", "5", "--save_total_limit", "2", "--allow_changed", "max_steps")
    trained(*argv, "--resume_from_checkpoint", tmp_path / "checkpoints/step_0000003", *limits)
    names = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_0000004", "step_0000005", *(f"step_{step:07d}.aside" for step in (6, 9, 10))}
    finished = command(*argv, "--resume_from_checkpoint", "latest", "--max_steps", "4", "--allow_changed",
                       "max_steps")  # fmt: skip
    assert finished.returncode == 2 and "has done 5 steps already, and the training has 4" in finished.stderr


def test_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_checkpoint(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    finished = command(*argv, "--base_learning_rate", "1e30", "--save_steps", "1", "--warmup_epochs", "1")
    assert finished.returncode == 2 and "not finite and was not used" in finished.stderr, finished.stderr
    [*_, last] = sorted(tmp_path.glob("checkpoints/step_*"))
    assert str(last) in finished.stderr
    assert not (tmp_path / "model.safetensors").exists()
    assert all(line["loss"] < 100 for line in metrics(tmp_path))


def test_half_a_line_of_metrics_does_not_keep_a_run_from_going_on(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    trained(*argv, "--max_steps", "6")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    trained(*argv, "--max_steps", "8", "--resume_from_checkpoint", "latest", "--allow_changed", "max_steps")
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))


def test_another_run_is_not_overwritten_by_accident(run, recipe, parquet_folder):
    before = metrics(run[0])
    finished = command("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", run[0])
    assert finished.returncode == 2 and "holds another run" in finished.stderr
    assert metrics(run[0]) == before


def test_stream_trains_and_resumes(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--streaming", "--num_examples", "40")
    trained(*argv, "--output_dir", tmp_path / "whole")
    trained(
        *argv, "--output_dir", tmp_path / "rest",
        "--resume_from_checkpoint", tmp_path / "whole/checkpoints/step_0000006",
    )  # fmt: skip
    assert len(losses(tmp_path / "whole")) == 10
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[6:]


def test_two_processes_train_as_one_with_twice_the_batch(recipe, parquet_folder, tmp_path):
    # paths are dropped by each process for itself
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--config_overrides", "drop_path_rate=0.0")
    evaluation = ("--eval_split", "test", "--eval_steps", "5")
    trained(*argv, "--output_dir", tmp_path / "one", *evaluation)
    trained(
        *argv, "--output_dir", tmp_path / "two", *evaluation, "--per_device_train_batch_size", "4", processes=2
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name in ("target_information", "feature_std", "effective_rank", "student_teacher_distance"):
        two, one = ([line[name] for line in metrics(tmp_path / run) if name in line] for run in ("two", "one"))
        assert len(two) == 10 and two == pytest.approx(one, rel=1e-3), name
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in one.items():
        if not name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding noise
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    knn = [
        [line["knn_10_top1"] for line in metrics(tmp_path / name) if "knn_10_top1" in line] for name in ("two", "one")
    ]
    assert knn[0] == pytest.approx(knn[1], abs=100 / 12 + 1e-6)  # 12 images; one may sit on the border


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_accumulated_batches_train_as_a_large_one(recipe, parquet_folder, tmp_path, num_processes):
    """Centre and teacher move once a step. Stopped on the way, as well."""
    options = {"processes": num_processes}
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--config_overrides", "drop_path_rate=0.0")
    trained(*argv, "--output_dir", tmp_path / "large")
    argv += ("--per_device_train_batch_size", 8 // 4 // num_processes, "--num_workers", 1)
    argv += ("--gradient_accumulation_steps", 4)
    trained(*argv, "--output_dir", tmp_path / "small", **options)
    trained(*argv, "--output_dir", tmp_path / "small", "--resume_from_checkpoint",
            tmp_path / "small/checkpoints/step_0000003", **options)  # fmt: skip
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
    small, large = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "large"))
    for name, tensor in large.items():
        if not name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding noise
            torch.testing.assert_close(small[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes(recipe, parquet_folder, tmp_path):
    """At the same place of the epoch: with the same batch of all of them, as if nothing had happened."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--config_overrides", "drop_path_rate=0.0")
    trained(*argv, "--output_dir", tmp_path / "one")
    two = ("--output_dir", tmp_path / "two")
    trained(*argv, *two, "--per_device_train_batch_size", "4", processes=2)
    checkpoint = tmp_path / "two/checkpoints/step_0000003"
    finished = command(*argv, *two, "--resume_from_checkpoint", checkpoint)
    assert finished.returncode == 0, finished.stderr
    assert "was saved by 2 processes and goes on with 1, at the same place in the epoch" in finished.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_broken_images_are_counted_and_listed_and_too_many_stop_the_run(recipe, flat_folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(flat_folder, images)
    for name in ("1.png", "2.png"):
        (images / name).write_bytes((images / name).read_bytes()[:100])
    argv = ("--config", recipe, "--dataset_name", images, "--output_dir", tmp_path / "run", "--num_train_epochs", "90")
    argv += ("--per_device_train_batch_size", "12", "--save_steps", "99", "--eval_crop_pct", "1")
    trained(*argv, "--max_skipped_fraction", "0.2")
    counts = [line["skipped"] for line in metrics(tmp_path / "run") if "skipped" in line]
    assert counts[0] == {"damaged": 2} and counts[-1] == {"damaged": 180}
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 180 and {line["image"] for line in lines} == {str(images / n) for n in ("1.png", "2.png")}
    finished = command(*argv, "--overwrite_output_dir")
    assert finished.returncode == 2
    *_, message = finished.stderr.strip().splitlines()
    assert "168 of 1008 images are broken, more than max_skipped_fraction = 0.01" in message
    assert f"image {images / '1.png'} cannot be decoded" in message and str(images / "2.png") in message
    assert (tmp_path / "run/checkpoints/step_0000084/state.pt").is_file()


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_all_of_them_after_a_checkpoint(recipe, flat_folder, tmp_path):
    """Each has one image a step, so a broken image leaves its process without a batch."""
    argv = ("--config", recipe, "--per_device_train_batch_size", "1", "--max_steps", "6", "--save_steps", "99")
    kept = 0
    for name in ("3.png", "8.png"):
        images, run = tmp_path / name / "images", tmp_path / name / "run"
        shutil.copytree(flat_folder, images)
        (images / name).write_bytes(b"")
        finished = command(*argv, "--dataset_name", images, "--output_dir", run, processes=2)
        assert finished.returncode != 0
        messages = [line for line in finished.stderr.splitlines() if line.startswith("dino-train: error: ")]
        assert messages
        for line in messages:
            assert "none of the 1 images of a batch can be decoded" in line
            assert f"image {images / name} cannot be decoded" in line
        checkpoints = list(run.glob("checkpoints/step_*"))
        assert all(str(checkpoint) in line for checkpoint in checkpoints for line in messages)
        kept += len(checkpoints)
    assert kept  # one of the two at least comes after the first step


def test_bf16_stays_near_fp32_and_keeps_fp32_weights(run, recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    trained(*argv, ACCELERATE_MIXED_PRECISION="bf16")
    difference = np.abs(np.array(losses(tmp_path)) / losses(run[0]) - 1)
    assert 0 < difference.mean() < 0.02  # single steps part by more: each goes its own way at this learning rate
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "model.safetensors").values())


def test_unlabelled_flat_folder_of_one_channel(recipe, flat_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", flat_folder, "--output_dir", tmp_path, "--num_local_crops", "0")
    printed = trained(*argv, "--config_overrides", "num_channels=1", "--image_mean", "0.5", "--image_std", "0.2")
    assert len(losses(tmp_path)) == 2
    (tmp_path / "elsewhere").mkdir()
    assert run_snippet(printed, tmp_path / "elsewhere") == "(1, 24) DINOModel"


def test_knn_command_writes_results_beside_baselines(run, parquet_folder, tmp_path):
    output = tmp_path / "results.json"
    models = [f"{kind}{run[0]}" for kind in ("", "untrained:", "raw_pixels:")]
    argv = ("knn", "--model", *models, "--dataset_name", parquet_folder, "--label_column", "kind", "--k", "1", "10")
    printed = trained(*argv, "--output", output, module="evaluation")
    reports = json.loads(output.read_text())
    assert [report["model"]["name"] for report in reports] == models
    assert reports[0]["values"]["knn_10_top1"] == metrics(run[0])[-1]["knn_10_top1"]
    assert f"{reports[0]['values']['knn_1_top1']:.2f} [" in printed


def test_knn_command_measures_a_stock_vit_and_its_baselines(run, parquet_folder, tmp_path):
    convert(str(run[0]), str(tmp_path / "vit"), to="vit")
    values = []
    for folder in (tmp_path / "vit", run[0]):
        argv = ("knn", "--model", folder, f"raw_pixels:{folder}", "--dataset_name", parquet_folder, "--k", "1")
        finished = command(*argv, "--output", tmp_path / "knn.json", module="evaluation")
        assert finished.returncode == 0, finished.stderr
        values.append([report["values"] for report in json.loads((tmp_path / "knn.json").read_text())])
    assert values[0] == values[1]


def test_attention_command_draws_every_image_and_head(run, parquet_folder, tmp_path):
    sizes = []
    for num_images in (1, 3):
        argv = ("attention", "--model", run[0], "--dataset_name", parquet_folder, "--num_images", num_images)
        trained(*argv, "--output", tmp_path / f"{num_images}.png", module="evaluation")
        with Image.open(tmp_path / f"{num_images}.png") as picture:
            sizes.append(picture.size)
    (width, height), (same_width, larger_height) = sizes
    side = 1.3 * 150  # pixels of a panel
    assert width == pytest.approx(4 * side, rel=0.1) and same_width == pytest.approx(width, rel=0.05)
    assert larger_height - height == pytest.approx(2 * side, rel=0.05)
