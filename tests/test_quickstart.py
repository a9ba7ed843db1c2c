import json
import os
import subprocess
import sys

import pytest

from evaluation.images import load_images
from training.verdict import LEARNING, TOO_EARLY


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, "-m", "training.quickstart", folder], check=True, capture_output=True)
    return folder


def test_digits_are_split_without_overlap(digits):
    train, test = (load_images(str(digits), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1297, 500)
    assert set(train["label"]) == set(test["label"]) == set(range(10))


def test_recipe_takes_a_few_steps(digits, tmp_path):
    """The recipe itself, cut short."""
    argv = ["--config", "quickstart", "--dataset_name", digits, "--output_dir", tmp_path, "--max_steps", "4"]
    limits = ["--warmup_epochs", "0", "--eval_steps", "4", "--max_eval_samples", "100", "--logging_steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "training", *argv, *limits], check=True, capture_output=True, env=environment
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 4]
    assert all(0 < lines[i]["knn_10_top1"] < 100 for i in (0, -1))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_recipe_learns_without_labels(digits, tmp_path):
    """What `make quickstart` runs, in fewer steps; then k-NN on digits that neither it nor its choice has seen. It is
    never told that it fails."""
    data = ["--dataset_name", digits]
    argv = ["--config", "quickstart", *data, "--output_dir", tmp_path, "--max_steps", "320"]
    argv += ["--logging_steps", "5", "--eval_steps", "320", "--stop_on_collapse", "true"]
    subprocess.run([sys.executable, "-m", "training", *argv], check=True)
    models = [tmp_path, f"untrained:{tmp_path}"]
    measure = ["knn", "--model", *models, *data, "--k", "10", "20", "--output", tmp_path / "knn.json"]
    subprocess.run([sys.executable, "-m", "evaluation", *measure], check=True)
    trained, untrained = json.loads((tmp_path / "knn.json").read_text())
    for k in ("knn_10_top1", "knn_20_top1"):
        assert trained["values"][k] >= untrained["values"][k] + 20
    steps = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(steps) == 320 / 5 and steps[-1]["loss_over_ln_k"] < 0.8
    assert {line["verdict"] for line in steps} == {TOO_EARLY, LEARNING}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_training_goes_on_from_a_backbone_without_making_it_worse(digits, tmp_path):
    """Its heads are new, so the backbone is frozen for an epoch of 20 steps: k-NN stays, and then rises."""

    def train(name: str, steps: int, *flags) -> dict[int, float]:
        command = [sys.executable, "-m", "training", "--config", "quickstart", "--dataset_name", digits, *flags]
        command += ["--output_dir", tmp_path / name, "--max_steps", str(steps)]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["knn_10_top1"] for line in lines if "knn_10_top1" in line}

    *_, before = train("first", 120, "--eval_steps", "120").values()
    knn = train("second", 120, "--eval_steps", "20", "--init_from", tmp_path / "first")
    assert knn[0] == knn[20] == before
    assert knn[40] != before
    assert knn[100] >= before
