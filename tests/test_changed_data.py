"""A run that resumes on other images, by another version or with other threads is told so."""

import json
import os
import shutil

import numpy as np
import pytest
from datasets import load_dataset

from .commands import command, trained
from .conftest import noise
from .hub import Hub
from .test_training import losses, recipe  # noqa: F401


@pytest.fixture
def images(tmp_path):
    folder, rng = tmp_path / "images", np.random.default_rng(3)
    for i in range(24):
        (folder / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise(rng).save(folder / "train" / "ab"[i % 2] / f"{i}.png")
    (folder / "test" / "a").mkdir(parents=True)
    noise(rng).save(folder / "test" / "a" / "0.png")
    return folder


@pytest.fixture
def begun(recipe, images, tmp_path):  # noqa: F811
    """Half of a run; the command that resumes it."""
    argv = ("--config", recipe, "--dataset_name", images, "--output_dir", tmp_path / "run", "--report_to", "none")
    argv += ("--max_steps", 6)
    trained(*argv)
    for folder in (tmp_path / "run/checkpoints").iterdir():
        if folder.name != "step_0000003":
            shutil.rmtree(folder)
    return (*argv, "--resume_from_checkpoint", "latest")


def add(images):
    noise(np.random.default_rng(4)).save(images / "train/a/new.png")


def replace(images):
    (images / "train/a/0.png").write_bytes((images / "train/b/1.png").read_bytes())


def touch(images):
    os.utime(images / "train/a/0.png", (0, 0))


def rename(images):
    (images / "train/a/0.png").rename(images / "train/a/zero.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add, "had 24 images, and has 25"),
        (replace, "have been replaced since: their sizes or modification times differ"),
        (touch, "have been replaced since: their sizes or modification times differ"),
        (rename, "have been added, removed or renamed"),
    ],
)
def test_changed_images_are_refused_unless_allowed(begun, images, change, said):
    change(images)
    refused = command(*begun)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "step_0000003 was trained on other data: " in refused.stderr and said in refused.stderr
    trained(*begun, "--allow_changed", "data")


def test_other_files_and_splits_are_no_change_of_the_data(begun, images, tmp_path):
    (images / "train/notes.txt").write_text("mine")
    shutil.copy(images / "test/a/0.png", images / "test/a/1.png")
    shutil.move(images, tmp_path / "moved")
    argv = [str(word).replace(str(images), str(tmp_path / "moved")) for word in begun]
    resumed = command(*argv, "--allow_changed", "dataset_name")
    assert resumed.returncode == 0 and resumed.stderr == ""


@pytest.mark.parametrize("kind", ["parquet", "saved", "stream"])
def test_data_in_tables_is_identified_by_its_files(recipe, parquet_folder, tmp_path, kind):  # noqa: F811
    data = tmp_path / "data"
    if kind == "saved":
        load_dataset(str(parquet_folder), split="train", cache_dir=str(tmp_path / "cache")).save_to_disk(data)
    else:
        shutil.copytree(parquet_folder, data)
    argv = ("--config", recipe, "--dataset_name", data, "--output_dir", tmp_path / "run", "--report_to", "none")
    argv += ("--streaming", "--num_examples", 40) if kind == "stream" else ()
    trained(*argv, "--resume_from_checkpoint", "latest")
    trained(*argv, "--resume_from_checkpoint", "latest")
    for file in data.glob("*.arrow" if kind == "saved" else "train-*.parquet"):
        os.utime(file, (0, 0))
    refused = command(*argv, "--resume_from_checkpoint", "latest")
    assert refused.returncode == 2 and "was trained on other data: files of" in refused.stderr


def edit_manifests(run, edit) -> None:
    for path in (run / "checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        edit(manifest)
        path.write_text(json.dumps(manifest))


def test_checkpoint_of_an_earlier_version_has_the_defaults_of_newer_settings(begun, tmp_path):
    def of_earlier_version(manifest):
        del manifest["arguments"]["koleo_weight"], manifest["data"], manifest["num_threads"]

    edit_manifests(tmp_path / "run", of_earlier_version)
    refused = command(*begun, "--koleo_weight", 0.1)
    assert refused.returncode == 2 and "was trained with koleo_weight 0.0, not 0.1" in refused.stderr
    resumed = command(*begun)
    assert resumed.returncode == 0 and resumed.stderr == ""
    assert "does not say what its data was" in (tmp_path / "run/train.log").read_text()


def test_other_versions_and_threads_are_said_in_one_line(begun, tmp_path):
    def elsewhere(manifest):
        manifest["versions"]["torch"] = "2.0.0"
        manifest["num_threads"] = 7

    edit_manifests(tmp_path / "run", elsewhere)
    resumed = command(*begun)
    assert resumed.returncode == 0 and resumed.stderr.count("\n") == 1
    assert (
        "was saved with torch 2.0.0, not " in resumed.stderr and "7 threads (OMP_NUM_THREADS), not 1" in resumed.stderr
    )


@pytest.mark.parametrize("key", ["files", "arguments", "mixed_precision"])
def test_manifest_that_lacks_a_key_is_damaged(begun, tmp_path, key):
    edit_manifests(tmp_path / "run", lambda manifest: manifest.pop(key))
    refused = command(*begun)
    assert refused.returncode == 2 and "there is no whole checkpoint in" in refused.stderr
    assert "is damaged, its manifest.json is not what was written" in refused.stderr


def test_data_of_the_hub_is_identified_by_its_commit(recipe, parquet_folder, tmp_path):  # noqa: F811
    files = {f"data/{path.name}": path.read_bytes() for path in parquet_folder.iterdir()}
    argv = ("--config", recipe, "--dataset_name", "tester/images", "--output_dir", tmp_path / "run")
    argv += ("--report_to", "none", "--resume_from_checkpoint", "latest", "--streaming", "--num_examples", 40)
    with Hub() as hub:
        hub.add_dataset("tester/images", files)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        trained(*argv, "--max_steps", 2, **environment)
        hub.repositories["datasets/tester/images"].change(files | {"README.md": b"# Now with a card"})
        refused = command(*argv, "--max_steps", 4, "--allow_changed", "max_steps", **environment)
    assert refused.returncode == 2 and "tester/images was at commit " in refused.stderr
    assert len(losses(tmp_path / "run")) == 2
