"""The metrics for `evaluate`, loaded without a network: numbers, batches, cards, and its evaluator."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.metrics import adjusted_rand_score, jaccard_score, normalized_mutual_info_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoImageProcessor, pipeline

import evaluation.metrics
from modeling_dino import DINOForImageClassification
from modeling_dino.image_processing_dino import make_image_processor

from .conftest import noise
from .original import recorded, tiny_config


FOLDER = Path(evaluation.metrics.__file__).parent
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


def inputs_of(name: str) -> tuple[dict, dict]:
    """What a metric takes of 24 images, queries or masks; and what only `compute` takes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 24)
    if name == "knn_accuracy":
        bank = recorded("knn")
        inputs = {"predictions": bank["test_features"][:24], "references": bank["test_labels"][:24]}
        return inputs, {"train_features": bank["train_features"], "train_labels": bank["train_labels"], "k": [1, 20]}
    if name == "top_k_accuracy":
        return {"predictions": rng.normal(size=(24, 4)), "references": labels}, {"k": [1, 2, 4]}
    if name in ("mean_average_precision", "recall_at_k"):
        relevance = rng.choice([-1, 0, 1], p=[0.2, 0.6, 0.2], size=(24, 15))
        return {"predictions": rng.normal(size=(24, 15)), "references": relevance}, {}
    if name in ("jaccard", "boundary_f"):
        masks = torch.from_numpy(rng.random((24, 3, 4))).repeat_interleave(9, 1).repeat_interleave(9, 2) > 0.4
        return {"predictions": masks, "references": masks.roll(1, 2).logical_or(masks.roll(5, 1)).numpy()}, {}
    assert name == "clustering_scores"
    return {"predictions": rng.integers(0, 5, 24), "references": [f"class {label}" for label in labels]}, {}


def expected_of(name: str, predictions, references, **kwargs) -> dict[str, float]:
    """By scikit-learn and plain loops."""
    if name == "knn_accuracy":
        nearest = KNeighborsClassifier(1, metric="cosine").fit(kwargs["train_features"], kwargs["train_labels"])
        return {"knn_1_top1": nearest.score(predictions, references)}
    if name == "top_k_accuracy":
        return {
            f"top_{k}_accuracy": top_k_accuracy_score(references, predictions, k=k, labels=range(4)) if k < 4 else 1
            for k in (1, 2, 4)
        }
    if name in ("mean_average_precision", "recall_at_k"):
        areas, found_by = [], {1: [], 5: [], 10: []}
        for similarity, relevance in zip(predictions, references):
            ranking = [wanted for _, wanted in sorted(zip(-similarity, relevance)) if wanted >= 0]
            area, found = 0.0, 0
            for rank, wanted in enumerate(ranking):
                before = found / rank if rank else 1.0
                found += wanted
                area += wanted * (before + found / (rank + 1)) / 2
            areas.append(area / found)
            for k, values in found_by.items():
                values.append(sum(ranking[:k]) > 0)
        if name == "recall_at_k":
            return {f"recall_at_{k}": np.mean(found) for k, found in found_by.items()}
        return {"mean_average_precision": np.mean(areas)}
    if name == "jaccard":
        return {"jaccard": np.mean([jaccard_score(b.ravel(), a.ravel()) for a, b in zip(predictions, references)])}
    if name == "clustering_scores":
        scores = (score(references, predictions) for score in (normalized_mutual_info_score, adjusted_rand_score))
        return dict(zip(("nmi", "ari"), scores))
    return {}


def direct_class(name: str) -> type[evaluate.Metric]:
    module = importlib.import_module(f"evaluation.metrics.{name}.{name}")
    return getattr(module, "".join(word.title() for word in name.split("_")))


def test_there_are_these_metrics():
    assert NAMES == [
        "boundary_f", "clustering_scores", "jaccard", "knn_accuracy", "mean_average_precision", "recall_at_k",
        "top_k_accuracy",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_right_at_once_in_batches_and_one_by_one(name):
    inputs, kwargs = inputs_of(name)
    metric = evaluate.load(str(FOLDER / name))
    assert metric.name == name
    at_once = metric.compute(**inputs, **kwargs)
    expected = expected_of(name, **inputs, **kwargs)
    assert {key: at_once[key] for key in expected} == pytest.approx(expected)
    assert all(0 <= value <= 1 or key == "ari" for key, value in at_once.items())
    assert any(0 < value < 1 for value in at_once.values())

    for start in range(0, 24, 7):
        metric.add_batch(**{key: values[start : start + 7] for key, values in inputs.items()})
    assert metric.compute(**kwargs) == at_once

    direct = direct_class(name)()
    for prediction, reference in zip(inputs["predictions"], inputs["references"]):
        plain = (value.tolist() if hasattr(value, "tolist") else value for value in (prediction, reference))
        direct.add(**dict(zip(("prediction", "reference"), plain)))
    assert direct.compute(**kwargs) == pytest.approx(at_once)


def test_boundaries_a_pixel_apart_are_the_same_and_farther_ones_are_not():
    metric = evaluation.metrics.load("boundary_f")
    masks = np.zeros((3, 60, 80), dtype=int)  # 0.8 % of the diagonal of 100 is one pixel
    for mask, left in zip(masks, (20, 21, 23)):
        mask[:, left:] = 1
    assert metric.compute(predictions=masks[1:2], references=masks[:1]) == {"boundary_f": 1}
    assert metric.compute(predictions=masks[2:], references=masks[:1]) == {"boundary_f": 0}
    assert metric.compute(predictions=masks[2:], references=masks[:1], tolerance=0.03) == {"boundary_f": 1}


@pytest.mark.parametrize("names", [["mean_average_precision", "recall_at_k"], ["jaccard", "boundary_f"]])
def test_metrics_of_the_same_inputs_are_combined(names):
    inputs, _ = inputs_of(names[0])
    combined = evaluate.combine([str(FOLDER / name) for name in names])
    single = [evaluation.metrics.load(name).compute(**inputs) for name in names]
    assert combined.compute(**inputs) == single[0] | single[1]


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("top_k_accuracy", {"predictions": [1, 0], "references": [1, 1], "k": 5}, "k must be 1"),
        ("top_k_accuracy", {"predictions": [[1.0, 0.0]], "references": [2]}, "labels must be from 0 to 1"),
        ("recall_at_k", {"predictions": [[0.1]], "references": [[1]], "k": 0}, "k must be at least 1"),
        ("recall_at_k", {"predictions": [[0.1]], "references": [[0]]}, "no query has anything to find"),
        ("mean_average_precision", {"predictions": [[0.1]], "references": [[-1]]}, "no query has anything to find"),
        ("mean_average_precision", {"predictions": [[0.1]], "references": [[1, 0]]}, "1 similarities and 2 entries"),
        ("mean_average_precision", {"predictions": [[0.1]], "references": [[3]]}, r"-1, 0 or 1, got \[3\]"),
        ("jaccard", {"predictions": [[[True]]], "references": [[[True, True]]]}, r"got \(1, 1\) and \(1, 2\)"),
    ],
)
def test_inputs_that_cannot_be_are_refused(name, inputs, message):
    with pytest.raises(ValueError, match=message):
        evaluation.metrics.load(name).compute(**inputs)


def test_a_name_that_there_is_not_names_the_nearest():
    with pytest.raises(ValueError, match="no metric knn_acuracy, did you mean knn_accuracy"):
        evaluation.metrics.load("knn_acuracy")


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_complete_and_their_examples_true(name, monkeypatch):
    _, front, text = (FOLDER / name / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert {"evaluate", "metric"} <= set(card["tags"]) and card["sdk"] and card["description"]
    assert f"# {card['title']}\n" in text
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["How to use", "Inputs", "Output values", "Citation"]
    example, output = re.search(r"```python\n(.*?)```\n```text\n(.*?)```", text, re.DOTALL).groups()
    monkeypatch.chdir(FOLDER.parent.parent)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(example, {})
    assert printed.getvalue() == output
    citation = re.search(r"```bibtex\n(.*?)\n```", text, re.DOTALL)[1]
    assert evaluation.metrics.load(name).citation == citation
    assert f"import {direct_class(name).__name__}`" in text


@pytest.fixture
def classifier(tmp_path):
    """A folder with a classifier of noise that gives one class names of its own, and a data set."""
    torch.manual_seed(0)
    names = ["cat", "dog", "eel"]
    config = tiny_config(
        n_last_blocks=1, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    model = DINOForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=1)
    model.save_pretrained(tmp_path)
    make_image_processor(32, 3).save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [noise(rng) for _ in range(9)], "label": [0, 1, 2] * 3}
    return tmp_path, Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("given", ["path", "model", "pipeline's model"])
def test_the_evaluator_of_image_classification_takes_our_models_and_metrics(classifier, given):
    folder, dataset = classifier
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pipe = pipeline("image-classification", model=str(folder), image_processor=processor, device="cpu")
    model, kwargs = {
        "path": (str(folder), {}),
        "model": (DINOForImageClassification.from_pretrained(folder), {"feature_extractor": processor}),
        "pipeline's model": (pipe.model, {"feature_extractor": pipe.image_processor}),
    }[given]
    result = evaluate.evaluator("image-classification").compute(
        model,
        dataset,
        metric=evaluation.metrics.load("top_k_accuracy"),
        label_mapping={"cat": 0, "dog": 1, "eel": 2},
        strategy="bootstrap",
        n_resamples=20,
        random_state=0,
        **kwargs,
    )
    with torch.no_grad():
        pixel_values = processor(dataset["image"][:], return_tensors="pt")["pixel_values"]
        predictions = DINOForImageClassification.from_pretrained(folder).eval()(pixel_values).logits.argmax(1)
    expected = np.mean(predictions.numpy() == np.array(dataset["label"][:]))
    assert 0 < expected < 1
    assert result["top_1_accuracy"]["score"] == pytest.approx(expected)
    low, high = result["top_1_accuracy"]["confidence_interval"]
    assert low <= expected <= high and result["samples_per_second"] > 0
