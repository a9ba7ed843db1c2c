"""`--push_to_hub`, against a Hub on 127.0.0.1, and what others get from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from training.publish import publish_from_command_line

from .commands import command
from .hub import Hub
from .test_bad_input import answer
from .test_training import losses, recipe  # noqa: F401
from .without_package import run_without_package


def client(hub_url: str, home) -> dict[str, str]:
    """The environment of somebody who uses that Hub."""
    return {"HF_ENDPOINT": hub_url, "HF_TOKEN": "token", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home)}  # fmt: skip


FLAGS = ("--push_to_hub", "--hub_model_id", "tester/tiny", "--max_steps", "2")


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, recipe, parquet_folder, tmp_path_factory):  # noqa: F811
    """The folder of a run that was pushed, and what was printed."""
    folder = tmp_path_factory.mktemp("pushed")
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", folder / "run", *FLAGS)
    argv += ("--eval_steps", "2")
    (folder / "run").mkdir()
    for name in ("secret.txt", "patients.json", "image.png"):
        (folder / "run" / name).write_text("not for others")
    finished = command(*argv, **client(hub.url, folder / "home"))
    assert finished.returncode == 0, finished.stderr
    return folder / "run", finished.stdout


def test_run_is_pushed_with_its_code_and_card_and_without_its_checkpoints(hub, pushed):
    folder, printed = pushed
    files = hub.repositories["models/tester/tiny"].files
    assert files.keys() == {
        "README.md", "config.json", "configuration_dino.py", "figures/curves.png", "metrics.jsonl",
        "model.safetensors", "modeling_dino.py", "network_dino.py", "preprocessor_config.json",
    }  # fmt: skip
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert f"Uploaded to {hub.url}/tester/tiny" in printed


def test_card_says_what_is_true_of_the_run(pushed, parquet_folder):
    folder, _ = pushed
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    knn = [line["knn_10_top1"] for line in lines if "knn_10_top1" in line]
    for fact in (
        "| images | own images, 40 |", "| training | 2 steps of 8 images |", "2 of 16 and 2 of 8 pixels",
        "| start | random weights |", f"top-1: {knn[-1]:.1f} % (k = 10)", f"before training {knn[0]:.1f} % (k = 10)",
        f"| loss at the end | {losses(folder)[-1]:.3f} |", "2 blocks of width 24, patches of 8 x 8",
    ):  # fmt: skip
        assert fact in card.text, fact
    for path in (parquet_folder, folder):  # they are their owner's
        assert str(path) not in card.text


WITHOUT_PACKAGE = """
import torch
from transformers import *
name, trust = "tester/tiny", {"trust_remote_code": True}
images, path = torch.load("images.pt"), "image.png"
processor = AutoImageProcessor.from_pretrained(name, **trust)
extract = pipeline("image-feature-extraction", name, **trust)
with torch.no_grad():
    outputs = {
        "features": AutoModel.from_pretrained(name, **trust)(images).pooler_output,
        "map": AutoBackbone.from_pretrained(name, **trust)(images).feature_maps[-1],
        "pooled": torch.tensor(extract(path, pool=True)[0]),
    }
outputs["mean"] = list(processor.image_mean)
torch.save(outputs, "outputs.pt")
"""


def test_repository_loads_by_its_id_without_our_package(hub, pushed, tmp_path):
    images = torch.randn(2, 3, 16, 24)
    torch.save(images, tmp_path / "images.pt")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    run_without_package(WITHOUT_PACKAGE, tmp_path, **client(hub.url, tmp_path / "home"))
    outputs = torch.load(tmp_path / "outputs.pt")
    model = AutoModel.from_pretrained(pushed[0])
    assert torch.equal(outputs["features"], model(images).pooler_output)
    assert outputs["map"].shape == (2, 24, 2, 3) and outputs["pooled"].shape == (24,)
    assert outputs["mean"] == [0.485, 0.456, 0.406]


def test_upload_that_fails_loses_nothing_and_says_how_to_try_again(recipe, parquet_folder, tmp_path):  # noqa: F811
    output_dir = tmp_path / "run"
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", output_dir, *FLAGS)
    finished = command(*argv, "--hub_private_repo", **client("http://127.0.0.1:9", tmp_path / "home"))
    assert finished.returncode == 2
    *_, message = finished.stderr.strip().splitlines()
    again = f"dino-publish {output_dir} tester/tiny --private"
    assert f"the run in {output_dir} is whole, but was not uploaded" in message and message.endswith(again)
    assert AutoModel.from_pretrained(output_dir).config.hidden_size == 24
    assert (output_dir / "README.md").is_file()
    with Hub() as hub:
        environment = os.environ | client(hub.url, tmp_path / "home")
        command_line = [Path(sys.executable).parent / again.split()[0], *again.split()[1:]]
        finished = subprocess.run(command_line, capture_output=True, text=True, env=environment)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout == f"uploaded to {hub.url}/tester/tiny\n"
        repository = hub.repositories["models/tester/tiny"]
        assert "model.safetensors" in repository.files and repository.private
        assert b'Auto.from_pretrained("tester/tiny", trust' in repository.files["README.md"]


@pytest.mark.parametrize(
    ("output_dir", "name", "message"),
    [
        ("missing", "a/b", "output_dir must be the folder of a finished run, got missing, which does not exist."),
        (".", "a/b", "output_dir must hold a finished run, got ., which has no config.json and no README.md."),
        ("missing", "a/b/c", "hub_model_id a/b/c is no name for the Hub"),
    ],
)
def test_publish_checks_its_arguments_before_the_login(output_dir, name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.publish.get_token", lambda: None)
    assert message in answer(publish_from_command_line, (output_dir, name), capsys)
    for file in ("config.json", "README.md"):
        Path(file).write_text("{}")
    assert "nobody is logged in to the Hub" in answer(publish_from_command_line, (".", "a/b"), capsys)


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (["--push_to_hub"], "token", "--push_to_hub needs a name: give --hub_model_id"),
        (["--push_to_hub", "--hub_model_id", "a/b/c"], "token", "hub_model_id a/b/c is no name for the Hub"),
        (["--push_to_hub", "--hub_model_id", "a/b"], "", "nobody is logged in to the Hub: run `hf auth login`"),
    ],
)
def test_what_would_fail_at_the_end_is_found_at_the_start(flags, token, message, parquet_folder, tmp_path):
    argv = ("--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", *flags)
    finished = command(*argv, **client("http://127.0.0.1:9", tmp_path) | {"HF_TOKEN": token})
    assert finished.returncode == 2 and message in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()
