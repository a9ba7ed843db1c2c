"""Resumes on other images, by other versions and with other threads."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import load_dataset

from training import data_identity
from training.arguments import TrainingArguments
from training.checkpoint import find_damage, saved_arguments
from training.data_identity import explain_change, identify_data

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
        (add, "had 24 images, and has 25 (in 1 file, such as train/a/new.png)"),
        (
            replace,
            "have been replaced since: their sizes or modification times differ (in 1 file, such as train/a/0.png)",
        ),
        (
            touch,
            "have been replaced since: their sizes or modification times differ (in 1 file, such as train/a/0.png)",
        ),
        (rename, "have been added, removed or renamed (in 2 files, such as train/a/0.png)"),
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


def identity(folder, *mixed, lengths=None):
    args = TrainingArguments(dataset_name=str(folder), mix_with=list(map(str, mixed)), output_dir="x")
    return identify_data(args, lengths or [24] * (1 + len(mixed)))


def test_only_files_that_are_read_identify_the_data(images):
    before = identity(images)
    for name in ("notes.txt", ".hidden.png", "cache-1.arrow", "tmp1.arrow"):
        (images / "train/a" / name).write_bytes(b"mine")
    for folder in (".cache", "__MACOSX"):
        (images / "train" / folder).mkdir()
        (images / "train" / folder / "0.png").write_bytes(b"mine")
    (images / "train/a/gone.png").symlink_to("nowhere.png")
    assert identity(images) == before and before[0]["num_files"] == 24
    for name in ("tmp1.png", "cache-1.png", "__1.PNG"):
        (images / "train/a" / name).write_bytes(b"a picture")
        assert f"added, removed or renamed (in 1 file, such as train/a/{name})" in explain_change(
            before, identity(images)
        )
        (images / "train/a" / name).unlink()


def test_each_data_set_of_a_mixture_is_identified(images, tmp_path):
    shutil.copytree(images, tmp_path / "more")
    shutil.copy(images / "train/a/0.png", tmp_path / "shard.tar")
    before = identity(images, tmp_path / "more", tmp_path / "shard.tar")
    assert explain_change(before, identity(images, tmp_path / "more", tmp_path / "shard.tar")) is None
    os.utime(tmp_path / "shard.tar", (0, 0))
    after = identity(images, tmp_path / "more", tmp_path / "shard.tar")
    assert f"files of {tmp_path / 'shard.tar'} have been replaced" in explain_change(before, after)
    (tmp_path / "more/train/a/0.png").unlink()
    after = identity(images, tmp_path / "more", tmp_path / "shard.tar")
    assert f"files of {tmp_path / 'more'} have been added, removed or renamed" in explain_change(before, after)


def test_number_of_images_that_a_stream_learns_is_no_change(images):
    unknown, known = identity(images, lengths=[None]), identity(images, lengths=[24])
    assert explain_change(unknown, known) is None and explain_change(known, unknown) is None
    assert "had 24 images, and has 25" in explain_change(known, identity(images, lengths=[25]))


def test_files_of_large_data_are_not_listed(images, monkeypatch):
    monkeypatch.setattr(data_identity, "MAX_LISTED", 23)
    before = identity(images)
    assert "files" not in before[0]
    touch(images)
    assert explain_change(before, identity(images)).endswith("modification times differ")


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


def test_settings_that_a_checkpoint_lacks_are_defaults(begun, tmp_path):
    edit_manifests(tmp_path / "run", lambda manifest: manifest["arguments"].pop("freeze_backbone_steps"))
    saved = saved_arguments(tmp_path / "run/checkpoints/step_0000003")
    assert saved["freeze_backbone_steps"] is None and saved["max_steps"] == 6
    assert trained(*begun)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data", [{}]), ("data", "x"), ("data", [{"num_images": 24, "files": 3}]), ("versions", 3), ("files", {})],
)
def test_manifest_with_wrong_values_is_damaged(tmp_path, key, value):
    whole = {"step": 1, "global_batch_size": 1, "mixed_precision": "no", "arguments": {}, "files": {}}
    (tmp_path / "state.pt").write_bytes(b"x")
    whole["files"]["state.pt"] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    whole["data"] = [{"num_images": 24}]
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    assert find_damage(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {key: value}))
    assert "its manifest.json is not what was written" in find_damage(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100000)
    assert "its manifest.json is not what was written" in find_damage(tmp_path)


@pytest.mark.parametrize("content", [b"no file of PyTorch's", {"step": 3}])
@pytest.mark.parametrize("name", ["state.pt", "rank_0.pt"])
def test_state_that_torch_cannot_load_is_named(begun, tmp_path, name, content):
    file = tmp_path / "run/checkpoints/step_0000003" / name
    torch.save(content, file) if isinstance(content, dict) else file.write_bytes(content)
    fits = {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    edit_manifests(tmp_path / "run", lambda manifest: manifest["files"].update({name: fits}))
    refused = command(*begun)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"{file} is " in refused.stderr


@pytest.mark.parametrize("key", ["files", "arguments", "mixed_precision"])
def test_manifest_that_lacks_a_key_is_damaged(begun, tmp_path, key):
    edit_manifests(tmp_path / "run", lambda manifest: manifest.pop(key))
    refused = command(*begun)
    assert refused.returncode == 2 and "there is no whole checkpoint in" in refused.stderr
    assert "is damaged, its manifest.json is not what was written" in refused.stderr


@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_data_of_the_hub_is_identified_by_its_commit(recipe, parquet_folder, tmp_path, streaming):  # noqa: F811
    """Also by a run that resumes one which read its data, offline, from the cache."""
    files = {f"data/{path.name}": path.read_bytes() for path in parquet_folder.iterdir()}
    argv = ("--config", recipe, "--dataset_name", "tester/images", "--output_dir", tmp_path / "run")
    argv += ("--report_to", "none", "--resume_from_checkpoint", "latest", "--allow_changed", "max_steps")
    argv += ("--streaming", "--num_examples", 40) if streaming else ()
    with Hub() as hub:
        hub.add_dataset("tester/images", files)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        trained(*argv, "--max_steps", 2, **environment)
        if not streaming:
            trained(*argv, "--max_steps", 3, **environment | {"HF_HUB_OFFLINE": "1"})
        hub.repositories["datasets/tester/images"].change(files | {"README.md": b"# Now with a card"})
        refused = command(*argv, "--max_steps", 4, **environment)
    assert refused.returncode == 2 and "tester/images was at commit " in refused.stderr
    assert len(losses(tmp_path / "run")) == (2 if streaming else 3)
