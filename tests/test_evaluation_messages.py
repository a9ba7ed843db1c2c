"""What `dino-eval` says of a user's mistakes and of what it has written."""

import json

import numpy as np
import pandas
import pytest
import torch

from evaluation.__main__ import evaluate_from_command_line
from evaluation.knn import knn_hits
from evaluation.linear import linear_accuracy
from evaluation.logistic import logistic_hits
from training.monitor import read_metrics

from .commands import command, trained
from .conftest import noise
from .hub import Hub
from .test_features import answer, ours  # noqa: F401
from .test_hub import client
from .test_training import recipe  # noqa: F401


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of three classes, in two splits."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "test"):
        for label in "abc":
            (folder / split / label).mkdir(parents=True)
            for number in range(4):
                noise(rng).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture
def ask(capsys):
    return lambda *argv: answer(evaluate_from_command_line, argv, capsys)


@pytest.mark.parametrize("number", [0, 9])
def test_blocks_that_a_network_lacks_are_named_by_their_flag(number, ask, ours, photos, tmp_path):  # noqa: F811
    """Without the flag, all blocks of a network of three are taken."""
    argv = ["linear", "--model", ours, "--dataset_name", photos, "--epochs", 1]
    message = ask(*argv, "--n_last_blocks", number)
    assert f"n_last_blocks must be from 1 to the network's 3 blocks, got {number}. " in message
    assert message.endswith("Give --n_last_blocks 3, or fewer.")
    evaluate_from_command_line([*map(str, argv), "--output", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())[0]["data"]["inputs"]["n_last_blocks"] == 3


@pytest.mark.parametrize("protocol", ["knn", "logistic", "clustering", "linear", "finetune"])
def test_folders_without_labels_are_told_how_to_get_some(protocol, ask, ours, flat_folder, tmp_path):  # noqa: F811
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for path in sorted(flat_folder.iterdir())[:4]:
            (tmp_path / "flat" / split / path.name).write_bytes(path.read_bytes())
    argv = ["--n_last_blocks", 1] * (protocol == "linear")
    message = ask(protocol, "--model", ours, "--dataset_name", tmp_path / "flat", *argv)
    assert "Put the images of each class into a folder of its own, or write a metadata.csv with the columns" in message
    assert "column" not in message.partition("Put the images")[0]


def test_knn_of_training_without_labels_says_how_to_get_some(recipe, flat_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", flat_folder, "--output_dir", tmp_path / "run", "--eval_steps", 1)
    finished = command(*argv)
    assert finished.returncode == 2 and "Put the images of each class into a folder" in finished.stderr


def test_tables_without_labels_are_asked_for_a_column(ask, ours, parquet_folder, tmp_path):  # noqa: F811
    table = pandas.read_parquet(parquet_folder / "test-00000-of-00001.parquet").drop(columns="kind")
    table.to_parquet(tmp_path / "images.parquet")
    message = ask("knn", "--model", ours, "--dataset_name", tmp_path / "images.parquet")
    assert message.endswith("images.parquet has no labels. Name their column by --label_column.")


def test_knn_line_of_training_names_its_k(recipe, photos, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", photos, "--output_dir", tmp_path / "run", "--eval_steps", 2)
    said = trained(*argv, "--max_steps", 2, "--per_device_train_batch_size", 4)
    lines = [line for line in said.splitlines() if "k-NN" in line]
    metrics = {line["step"]: line for line in read_metrics(tmp_path / "run") if "knn_10_top1" in line}
    assert len(lines) == 2 and not [name for name in metrics[2] if "top5" in name]  # of three classes
    assert lines[1] == f"step 2: k-NN (k = 10) top-1 of the teacher {metrics[2]['knn_10_top1']:.1f} %"


@pytest.mark.parametrize(("num_classes", "tops"), [(3, {1}), (5, {1}), (6, {1, 5})])
def test_top_5_is_measured_of_more_than_five_classes(num_classes, tops):
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    bank = (features[:30], np.arange(30) % num_classes, features[30:], np.arange(30) % num_classes)
    for found in (knn_hits(*bank, k=[3]), logistic_hits(*bank, c=[1])[0], linear_accuracy(*bank, num_epochs=1)):
        assert {int(name.rpartition("top")[2]) for name in found} == tops


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_runs_say_what_they_wrote_and_reuse(protocol, ours, photos, tmp_path, capsys):  # noqa: F811
    argv = [protocol, "--model", ours, "--dataset_name", photos, "--epochs", 2, "--batch_size", 12]
    argv += ["--output_dir", tmp_path / "run", "--output", tmp_path / "r.json"]
    argv = list(map(str, argv + ["--n_last_blocks", 1] * (protocol == "linear")))
    evaluate_from_command_line(argv)
    first = capsys.readouterr().out
    assert first.splitlines()[-1] == f"wrote {tmp_path / 'run'}" and "reused" not in first
    [report] = json.loads((tmp_path / "r.json").read_text())
    assert f"{protocol}_top1" in report["values"] and not [name for name in report["values"] if "top5" in name]
    evaluate_from_command_line(argv)
    again = capsys.readouterr().out
    line = f"{tmp_path / 'run'} has a run of these settings, which is done: its weights are reused. "
    assert again == line + "Retrain with another --output_dir.\n" + first


OFFLINE = "is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or give a folder."  # as conftest.py does


@pytest.mark.parametrize("name", ["nobody/nothing", "untrained:nobody/nothing", "resnet18", "a b c"])
def test_models_that_are_not_there_offline_are_one_line(name, ask, photos):
    message = ask("knn", "--model", name, "--dataset_name", photos, "--k", 1)
    reason = "is neither. Check the name." if name == "a b c" else OFFLINE
    source = name.removeprefix("untrained:")
    assert message == f"dino: error: model must be a folder or a Hub id, got {source}, which {reason}"


@pytest.mark.slow
def test_models_that_the_hub_does_not_give_are_one_line(ours, photos, tmp_path):  # noqa: F811
    with Hub() as hub:
        for name in ("bare", "gated"):
            hub.add_model(f"tester/{name}", ours)
        bare, gated = (hub.repositories[f"models/tester/{name}"] for name in ("bare", "gated"))
        bare.change({name: data for name, data in bare.files.items() if name != "preprocessor_config.json"})
        gated.gated = True
        for name, reason in (
            ("nobody/nothing", "is not on the Hub, or is private. Check the name, or log in with `hf auth login`."),
            ("tester/gated", "is gated. Ask for access on its page, and log in with `hf auth login`."),
            ("tester/bare", "has no preprocessor_config.json. Choose another model, or give a folder with this file."),
        ):
            argv = ("knn", "--model", name, "--dataset_name", photos, "--k", 1)
            finished = command(*argv, module="evaluation", **client(hub.url, tmp_path / "home"))
            line = f"dino-eval: error: model must be a folder or a Hub id, got {name}, which {reason}"
            assert finished.returncode == 2 and finished.stderr.splitlines()[-1] == line, finished.stderr
