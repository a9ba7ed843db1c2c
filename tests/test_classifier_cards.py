"""Classifiers of `dino-eval linear` and `finetune`: their card, `dino-publish`, and what others get from the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

from evaluation.__main__ import evaluate_from_command_line
from evaluation.cards import ADDRESS
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor
from training.publish import publish_from_command_line

from .commands import command
from .conftest import noise
from .hub import Hub
from .original import tiny_config
from .test_hub import client
from .without_package import run_without_package


KINDS = ("finetune", "linear", "stock")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A network of ours and a stock ViT."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    stock = ViTModel(ViTConfig(**small, image_size=16, patch_size=8), add_pooling_layer=False)
    for name, model in (("ours", DINOModel(tiny_config(hidden_size=24, image_size=16))), ("stock", stock)):
        model.save_pretrained(folder / name)
        make_image_processor(16).save_pretrained(folder / name)
    return folder


def train(protocol, model, data, folder, *argv):
    argv = ("--epochs", 2, "--batch_size", 16, "--output_dir", folder, "--output", f"{folder}.json", *argv)
    evaluate_from_command_line([protocol, "--model", str(model), "--dataset_name", str(data), *map(str, argv)])


@pytest.fixture(scope="module")
def trained(models, parquet_folder, tmp_path_factory):
    """The folders of three classifiers; beside each, its report."""
    folder = tmp_path_factory.mktemp("classifiers")
    train("finetune", models / "ours", parquet_folder, folder / "finetune", "--labels_per_class", 6)
    train("linear", models / "ours", parquet_folder, folder / "linear", "--n_last_blocks", 2)
    train("finetune", models / "stock", parquet_folder, folder / "stock")
    return folder


def publish(folder, name, environment) -> subprocess.CompletedProcess:
    line = [Path(sys.executable).parent / "dino-publish", folder, name]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """A Hub with the three, of copies that have files of others in them, and the copies."""
    folder = tmp_path_factory.mktemp("published")
    with Hub() as hub:
        for kind in KINDS:
            shutil.copytree(trained / kind, folder / kind)
            for name in ("secret.txt", "metrics.jsonl", "image.png", "my_dino.py"):
                (folder / kind / name).write_text("not for others")
            finished = publish(folder / kind, f"tester/{kind}", client(hub.url, folder / "home"))
            assert finished.returncode == 0, finished.stderr
            assert finished.stdout == f"uploaded to {hub.url}/tester/{kind}\n"
        yield hub, folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_classifier_is_published_with_its_card_alone(published, kind):
    hub, folder = published
    files = hub.repositories[f"models/tester/{kind}"].files
    code = {"configuration_dino.py", "modeling_dino.py", "network_dino.py"}
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert files.keys() == expected | (code if kind != "stock" else set())
    card = files["README.md"].decode()
    assert ADDRESS not in card and f'"tester/{kind}"' in card
    assert (folder / kind / "README.md").read_text() == card


@pytest.mark.parametrize("kind", KINDS)
def test_card_says_what_was_measured_and_no_path(trained, parquet_folder, models, kind):
    (report,) = json.loads((trained / f"{kind}.json").read_text())
    card = ModelCard.load(trained / kind / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-classification"
    [result] = card.data.eval_results
    accuracy = report["values"]["linear_top1" if kind == "linear" else "finetune_top1"]
    assert result.metric_value == pytest.approx(accuracy / 100, abs=1e-4)
    assert (result.metric_type, result.dataset_name, result.dataset_split) == ("accuracy", "own images", "test")
    trained_on = "12 of split `train`, 6 of each class" if kind == "finetune" else "40 of split `train`"
    for fact in (
        f"| trained on | own images, {trained_on} |",
        "| measured on | own images, 12 of split `test` |",
        "| training | 2 epochs in batches of 16 images, seed 0 |",
        "| start | weights of a local folder |",
        f"| top-1 accuracy | {accuracy:.2f} [",
        "Classes (2): a, b.",
    ):
        assert fact in card.text, fact
    for path in (parquet_folder, trained, models):
        assert str(path) not in card.text


RUN_CARD = """
import contextlib, io, json, os, re, sys, torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForImageClassification
outputs = {}
for kind in ("finetune", "linear", "stock"):
    card = open(hf_hub_download(f"tester/{kind}", "README.md")).read()
    printed = []
    for code in re.findall(r"```python\\n(.*?)```", card, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code)
        printed.append(said.getvalue())
    model = AutoModelForImageClassification.from_pretrained(f"tester/{kind}", trust_remote_code=kind != "stock")
    with torch.no_grad():
        logits = model(torch.load("images.pt")).logits
    outputs[kind] = {"printed": printed, "logits": logits, "names": dict(model.config.id2label)}
torch.save(outputs, "outputs.pt")
"""


@pytest.mark.slow
def test_code_of_the_card_runs_by_id_without_our_package(published, trained, tmp_path):
    """Both ways that the card shows, and the weights are those of the folder."""
    hub, _ = published
    torch.save(images := torch.randn(3, 3, 16, 16), tmp_path / "images.pt")
    noise(np.random.default_rng(5)).save(tmp_path / "image.jpg")
    run_without_package(RUN_CARD, tmp_path, **client(hub.url, tmp_path / "home"))
    outputs = torch.load(tmp_path / "outputs.pt")
    for kind in KINDS:
        by_pipeline, by_model = outputs[kind]["printed"]
        [best, other] = re.findall(r"'label': '(\w)'", by_pipeline)
        assert by_model.strip() == best and {best, other} == {"a", "b"}
        assert outputs[kind]["names"] == {0: "a", 1: "b"}
        with torch.no_grad():
            expected = AutoModelForImageClassification.from_pretrained(trained / kind)(images).logits
        torch.testing.assert_close(outputs[kind]["logits"], expected)


def test_card_of_gray_classifier_runs_with_and_without_pipeline(parquet_folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    DINOModel(tiny_config(hidden_size=24, num_channels=1, image_size=16)).save_pretrained(tmp_path / "gray")
    make_image_processor(16, 1, [0.5], [0.25]).save_pretrained(tmp_path / "gray")
    train("linear", tmp_path / "gray", parquet_folder, tmp_path / "o", "--n_last_blocks", 1)
    codes = re.findall(r"```python\n(.*?)```", (tmp_path / "o/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (20, 30), 99).save("image.jpg")
    by_pipeline, by_model = [], []
    for code, found in zip(codes, (by_pipeline, by_model), strict=True):
        exec(code.replace(ADDRESS, "o").replace("print(", "found.append("), {"found": found})
    assert by_pipeline[0][0]["label"] == by_model[0]


def test_incomplete_classifier_says_what_it_lacks(trained, models, parquet_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "token")
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained / "stock", tmp_path / "early")
    (tmp_path / "early/README.md").unlink()
    train("linear", models / "stock", parquet_folder, tmp_path / "alone")
    for name, message in (
        ("empty", "which has no config.json and no README.md. Give the --output_dir"),
        ("early", "which has no README.md. Run the command that trained"),
        ("alone", "A linear classifier is published with its network"),
    ):
        with pytest.raises(ValueError, match=message):
            publish_from_command_line([str(tmp_path / name), "tester/x"])


def test_edited_card_stays_until_overwritten(trained, models, parquet_folder, tmp_path):
    card = shutil.copytree(trained / "linear", tmp_path / "o") / "README.md"
    card.write_text("Mine.")
    train("linear", models / "ours", parquet_folder, tmp_path / "o", "--n_last_blocks", 2)
    assert card.read_text() == "Mine."
    train("linear", models / "ours", parquet_folder, tmp_path / "o", "--n_last_blocks", 2, "--overwrite")
    assert "# o\n" in card.read_text()


def test_card_of_others_is_not_replaced(models, parquet_folder, tmp_path):
    (tmp_path / "README.md").write_text("Mine.")
    with pytest.raises(ValueError, match="README.md exists and is not from dino-eval linear"):
        train("linear", models / "ours", parquet_folder, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_training_does_not_take_a_classifier_for_its_own_run(trained, parquet_folder):
    for flag in ((), ("--overwrite_output_dir",)):
        argv = ("--dataset_name", parquet_folder, "--output_dir", trained / "linear", "--max_steps", 1, *flag)
        refused = command(*argv)
        assert refused.returncode == 2 and "was not written by a run" in refused.stderr
