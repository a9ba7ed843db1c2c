"""Retrieval by class, and the average precision that all retrieval shares."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from evaluation import retrieval
from evaluation.__main__ import evaluate_from_command_line
from evaluation.features import read_features
from evaluation.retrieval import average_precision, class_retrieval_scores, in_percent, precision_at_k, recall_at_k
from modeling_dino.convert_dino_checkpoint import convert

from .original import FIXTURES, META, recorded


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The network that the original's numbers were recorded with."""
    folder = tmp_path_factory.mktemp("model")
    convert(str(FIXTURES / "backbone.pth"), str(folder), num_attention_heads=META["heads"])
    return folder


@pytest.fixture
def bank():
    data = recorded("knn")
    return data["test_features"], data["test_labels"], data["train_features"], data["train_labels"]


def slowly(query, label, features, labels) -> tuple[list[int], float]:
    """Ranks of the positives, and the area under the precision-recall curve, drawn point by point."""
    similarity = torch.nn.functional.cosine_similarity(query[None], features)
    order = sorted(range(len(features)), key=lambda index: -similarity[index].item())
    ranks = [rank for rank, index in enumerate(order) if labels[index] == label]
    points, hits = [(0, 1)], 0  # (recall, precision)
    for rank, index in enumerate(order, start=1):
        hits += int(labels[index] == label)
        points.append((hits / len(ranks), hits / rank))
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:]))
    return ranks, area


def test_average_precision_is_the_originals():
    for case in META["trapezoid_ap"]:
        assert average_precision(case["ranks"], case["num_positives"]) == pytest.approx(case["ap"], abs=1e-12)
    # positives at the second and the fourth place: (0/1 + 1/2) / 2 and (1/3 + 2/4) / 2, halved
    assert average_precision([1, 3], 2) == pytest.approx((0.25 + 5 / 12) / 2)


def test_precision_and_recall_at_k_by_hand():
    assert [precision_at_k([0, 2], k) for k in (1, 2, 5)] == [1, 0.5, pytest.approx(2 / 3)]  # the last is at place 3
    assert [recall_at_k([2, 7], k) for k in (1, 2, 3, 10)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("ranks", "number"), [([], 0), ([0, 1], 1)])
def test_average_precision_wants_all_positives_counted(ranks, number):
    with pytest.raises(ValueError, match="there must be some, and all counted"):
        average_precision(ranks, number)


def test_scores_are_those_of_a_loop(bank):
    scores = class_retrieval_scores(*bank, k=(1, 3))
    for query in range(20):
        ranks, area = slowly(bank[0][query], bank[1][query], *bank[2:])
        assert scores["mAP"][query] == pytest.approx(area, abs=1e-9)
        assert [scores[f"R@{k}"][query] for k in (1, 3)] == [ranks[0] < 1, ranks[0] < 3]
    # with many positives, both definitions of average precision come close
    similarity = torch.nn.functional.normalize(bank[0]) @ torch.nn.functional.normalize(bank[2]).T
    theirs = [average_precision_score(bank[3] == label, row) for label, row in zip(bank[1], similarity)]
    assert scores["mAP"].mean() == pytest.approx(np.mean(theirs), abs=0.01)


def test_leave_one_out_is_each_image_by_all_others(bank):
    features, labels = bank[0][:60], bank[1][:60]
    scores = class_retrieval_scores(features, labels, k=(1,))
    for query in range(60):
        others = [index for index in range(60) if index != query]
        if labels[query] in labels[others]:
            ranks, area = slowly(features[query], labels[query], features[others], labels[others])
            assert scores["mAP"][query] == pytest.approx(area, abs=1e-9)
            assert scores["R@1"][query] == (ranks[0] == 0)
        else:
            assert np.isnan(scores["mAP"][query]) and np.isnan(scores["R@1"][query])


@pytest.mark.parametrize("alone", [True, False])
def test_size_of_chunks_changes_nothing(bank, monkeypatch, alone):
    bank = bank[:2] if alone else bank
    expected = class_retrieval_scores(*bank)
    monkeypatch.setattr(retrieval, "CHUNK_BYTES", 25 * 700 * 7)  # 7 of 200 queries at a time
    found = class_retrieval_scores(*bank)
    for name, values in expected.items():
        # the processor adds in another order in another shape of matrix
        np.testing.assert_allclose(found[name], values, atol=1e-3 if name == "mAP" else 0)


def test_queries_without_positives_are_skipped_and_all_without_are_refused():
    features, labels = torch.eye(4) + 0.1, ["a", "a", "b", "c"]
    scores = class_retrieval_scores(features, labels, k=(1,))
    assert np.isnan(scores["mAP"]).tolist() == [False, False, True, True]
    with pytest.warns(UserWarning, match="2 of the 4 queries have nothing to find"):
        answered = in_percent(scores)
    assert answered.keys() == {"mAP", "R@1"} and len(answered["mAP"]) == 2
    with pytest.raises(ValueError, match="no query has a positive"):
        in_percent(class_retrieval_scores(features, ["a", "b", "c", "d"]))


@pytest.mark.parametrize(
    ("labels", "k", "message"),
    [
        ([1, 1, 1], [1], "all images are of class 1"),
        ([1, None, 2], [1], "some without"),
        ([1, 1, 2], [0], "k must be at least 1"),
        ([], [1], "got 0 and 0 images"),
    ],
)
def test_what_cannot_be_is_refused(labels, k, message):
    with pytest.raises(ValueError, match=message):
        class_retrieval_scores(torch.eye(3)[: len(labels)], labels, k=k)


def test_command_on_two_splits_and_within_one(model, parquet_folder, flat_folder, tmp_path, capsys):
    argv = ["retrieval", "--model", str(model), "--dataset_name", str(parquet_folder), "--k", "1", "7"]
    evaluate_from_command_line(
        [*argv, "--features", str(tmp_path / "features"), "--output", str(tmp_path / "two.json")]
    )
    evaluate_from_command_line([*argv, "--eval_split", "train", "--output", str(tmp_path / "one.json")])
    (two,), (one,) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert "mAP" in capsys.readouterr().out
    assert two["values"].keys() == two["intervals"].keys() == {"mAP", "R@1", "R@7"}
    assert two["data"]["queries"]["num_images"] == 12 and two["data"]["database"]["num_images"] == 40
    assert one["data"]["leave_one_out"] and one["data"]["queries"]["num_images"] == 40
    assert one["data"]["queries_without_positives"] == 0

    train, test = (read_features(tmp_path / f"features/{split}.parquet") for split in ("train", "test"))
    found = [slowly(query, label, train.features, train.labels) for query, label in zip(test.features, test.labels)]
    assert two["values"]["mAP"] == pytest.approx(100 * np.mean([area for _, area in found]), abs=1e-3)
    assert two["values"]["R@1"] == pytest.approx(100 * np.mean([ranks[0] < 1 for ranks, _ in found]))

    (tmp_path / "roxford5k").mkdir()
    (tmp_path / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(b"")
    for folder, message in [(flat_folder, "has no labels"), (tmp_path / "roxford5k", "use `dino-eval landmarks`")]:
        with pytest.raises(ValueError, match=message):
            evaluate_from_command_line(["retrieval", "--model", str(model), "--dataset_name", str(folder)])
