"""What a run says of its data: the account of a folder, images that are skipped or read in part, splits of k-NN."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageCms

from training.monitor import read_metrics

from .commands import command, trained
from .conftest import noise
from .test_training import recipe  # noqa: F401


SHORT = ("--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "2")


@pytest.fixture
def photos(tmp_path):
    """Two classes of eight images in each of train and val, and a third folder."""
    rng = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "unlabeled"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            noise(rng).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos/notes.txt").write_text("mine")
    return tmp_path / "photos"


ACCOUNT = (
    "40 image files found, 40 listed (train 16, 2 classes; validation 16, 2 classes; unlabeled 8, no labels: "
    "all in one folder); other files: 1 .txt\n"
)


def test_run_begins_with_the_account_of_its_folder(recipe, photos, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", photos, "--output_dir", tmp_path / "run", *SHORT)
    said = trained(*argv)
    device, account, *_ = said.splitlines(keepends=True)
    assert device.startswith("Device: ") and account == f"{photos}: {ACCOUNT}"
    assert ACCOUNT.strip() in (tmp_path / "run/train.log").read_text()
    assert f"{photos}: {ACCOUNT}" in trained(*argv, "--dry_run", "--output_dir", tmp_path / "dry")
    found = command("knn", "--model", tmp_path / "run", "--dataset_name", photos, "--k", "3", module="evaluation")
    assert found.returncode == 0 and f"{photos}: {ACCOUNT}" in found.stderr


def test_knn_measures_on_the_split_that_dino_eval_takes(recipe, photos, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    argv = ("--config", recipe, "--dataset_name", photos, "--output_dir", run, *SHORT, "--eval_steps", "4")
    trained(*argv)
    line = [line for line in read_metrics(run) if "knn_10_top1" in line][-1]
    evaluation = ("knn", "--model", run, "--dataset_name", photos, "--k", "10", "--output", tmp_path / "r.json")
    trained(*evaluation, module="evaluation")
    [report] = json.loads((tmp_path / "r.json").read_text())
    assert report["values"]["knn_10_top1"] == pytest.approx(line["knn_10_top1"])
    assert report["data"]["test"]["split"] == "validation" and "split `validation`" in (run / "README.md").read_text()


def test_knn_leaves_one_out_where_there_is_one_split(recipe, photos, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    data = photos / "train"
    trained("--config", recipe, "--dataset_name", data, "--output_dir", run, *SHORT, "--eval_steps", "4")
    line = [line for line in read_metrics(run) if "knn_10_top1" in line][-1]
    evaluation = ("knn", "--model", run, "--dataset_name", data, "--k", "10", "--output", tmp_path / "r.json")
    trained(*evaluation, module="evaluation")
    [report] = json.loads((tmp_path / "r.json").read_text())
    assert report["values"]["knn_10_top1"] == pytest.approx(line["knn_10_top1"]) and report["data"]["leave_one_out"]


def test_skipped_images_are_said_on_the_console(recipe, photos, tmp_path):  # noqa: F811
    (photos / "train/cat/0.png").write_bytes(b"text")
    argv = ("--config", recipe, "--dataset_name", photos, "--output_dir", tmp_path / "run", *SHORT)
    said = trained(*argv, "--max_skipped_fraction", "1")
    lines = [line for line in said.splitlines() if "images skipped" in line]
    assert lines[-1] == "1 of 16 images skipped: 1 no image (listed in skipped.jsonl)" and len(lines) <= 2


def test_images_read_in_part_are_warned_of_by_kind(recipe, photos, tmp_path):  # noqa: F811
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for path in sorted((photos / "train/cat").iterdir())[:3]:
        Image.open(path).save(path.with_suffix(".jpg"), icc_profile=profile)
        path.unlink()
    first, second = (Image.new("RGB", (24, 24), color) for color in ("red", "blue"))
    first.save(photos / "train/dog/9.gif", save_all=True, append_images=[second])
    argv = ("--config", recipe, "--dataset_name", photos, "--output_dir", tmp_path / "run", *SHORT)
    finished = command(*argv, "--max_steps", "8")
    assert finished.returncode == 0
    warned = [line for line in finished.stderr.splitlines() if "read in part" in line]
    assert len(warned) == 2 and any("color profile ignored: " + str(photos) in line for line in warned), (
        finished.stderr
    )


def test_transparent_images_are_put_on_the_background(recipe, photos, tmp_path):  # noqa: F811
    """A black logo on transparent black: crops are white but for it, or as --background says."""
    shutil.rmtree(photos)
    photos.mkdir()
    for number in range(8):
        logo = np.zeros((24, 24, 4), np.uint8)
        logo[10:14, 10:14, 3] = 255
        Image.fromarray(logo).save(photos / f"{number}.png")
    argv = ("--config", recipe, "--dataset_name", photos, "--max_steps", "1", "--per_device_train_batch_size", "4")
    argv += ("--jitter_probability", "0", "--grayscale_probability", "0", "--solarize_probability", "0", "0", "0")
    for background, corner in (("white", 255), ("#102030", (16, 32, 48))):
        run = tmp_path / background.strip("#")
        trained(*argv, "--output_dir", run, "--background", background)
        with Image.open(run / "figures/crops.png") as picture:
            assert np.abs(np.array(picture)[-1, 0].astype(int) - corner).max() <= 1


def test_resumed_stream_keeps_the_image_processor(recipe, tmp_path):  # noqa: F811
    """Which is chosen by the first images, of which a resumed run sees others."""
    rng = np.random.default_rng(0)
    (tmp_path / "mixed").mkdir()
    for number in range(16):
        pixels = rng.integers(0, 256, (24, 24)).astype(np.uint16 if number % 4 == 0 else np.uint8)
        Image.fromarray(pixels).save(tmp_path / "mixed" / f"{number:02}.png")
    for seed in (0, 1):
        whole, resumed = (tmp_path / f"{name}_{seed}" for name in ("whole", "resumed"))
        argv = ("--config", recipe, "--dataset_name", tmp_path / "mixed", "--streaming", "--max_steps", "5")
        argv += ("--per_device_train_batch_size", "2", "--save_steps", "1", "--save_total_limit", "9", "--seed", seed)
        said = trained(*argv, "--output_dir", whole)
        assert "16 image files found, 16 listed" in said
        trained(*argv, "--output_dir", resumed, "--resume_from_checkpoint", whole / "checkpoints/step_0000002")
        one, two = ((run / "preprocessor_config.json").read_text() for run in (whole, resumed))
        assert one == two
