import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from evaluation import knn
from evaluation.knn import knn_accuracy

from .original import META, recorded


@pytest.fixture
def bank():
    data = recorded("knn")
    return data["train_features"], data["train_labels"], data["test_features"], data["test_labels"]


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_accuracies_are_the_originals(bank, temperature):
    accuracies = knn_accuracy(*bank, temperature=temperature)
    for k in (10, 20, 100, 200):
        expected = META["knn_top1_top5_percent"][f"k{k}_T{temperature}"]
        assert [accuracies[f"knn_{k}_top1"], accuracies[f"knn_{k}_top5"]] == expected


def test_nearest_neighbour_is_the_one_of_scikit_learn(bank):
    train_features, train_labels, test_features, test_labels = bank
    reference = KNeighborsClassifier(1, metric="cosine").fit(train_features, train_labels)
    expected = 100 * reference.score(test_features, test_labels)
    assert knn_accuracy(*bank, k=[1])["knn_1_top1"] == pytest.approx(expected)


def test_size_of_chunks_changes_nothing(bank, monkeypatch):
    expected = knn_accuracy(*bank)
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 700 * 7)  # 7 of 200 images at a time
    assert knn_accuracy(*bank) == expected


def test_few_test_images_many_classes_and_names_as_labels():
    features = torch.randn(3000, 16)
    labels = np.array([f"class {i}" for i in range(3000)])
    assert knn_accuracy(features, labels, features[:3], labels[:3], k=[1]) == {"knn_1_top1": 100, "knn_1_top5": 100}


def test_classes_that_only_the_test_images_have_are_misses(bank):
    train_features, train_labels, test_features, test_labels = bank
    assert knn_accuracy(train_features, train_labels, test_features, test_labels + 1000)["knn_20_top5"] == 0


def test_low_temperature_does_not_overflow(bank):
    assert knn_accuracy(*bank, k=[20], temperature=0.001)["knn_20_top1"] > 80


def test_more_neighbours_than_images_are_clipped_with_a_warning(bank):
    with pytest.warns(UserWarning, match="k = 1000 exceeds the 700 training images"):
        accuracies = knn_accuracy(*bank, k=[20, 1000])
    assert set(accuracies) == {f"knn_{k}_top{top}" for k in (20, 700) for top in (1, 5)}


@pytest.mark.parametrize(("k", "images", "message"), [([0], 5, "k must be at least 1"), ([5], 0, "got 0 and 200")])
def test_what_cannot_be_is_refused(bank, k, images, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(bank[0][:images], bank[1][:images], *bank[2:], k=k)
