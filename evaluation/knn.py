"""The paper's weighted k-nearest-neighbour classifier: features and labels in, accuracies out. No training at all."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F


CHUNK_BYTES = 256 * 2**20  # of similarities held at once


@torch.no_grad()
def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: Sequence,
    test_features: torch.Tensor,
    test_labels: Sequence,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent of a vote of the k most similar training images.

    A neighbour with cosine similarity s votes for its class with exp(s / temperature). One top-k of the largest k
    serves all. Section 4.1 of the paper, `eval_knn.py` of the original; unlike there, any number of classes and of
    test images will do.

    Args:
        train_features: (train images, hidden); need not be normalised.
        train_labels: Their labels, of any kind that numpy can sort.
        test_features: (test images, hidden).
        test_labels: Their labels.
        k: Numbers of neighbours. One that exceeds the training images is clipped to them, with a warning.
        temperature: Of the votes.

    Returns:
        `knn_{k}_top1` and `knn_{k}_top5` for every k. Top-5 means the min(5, k) classes with most votes. A
        class without a vote is no hit; in the original it can be one, by the order in which ties are sorted.

    Raises:
        ValueError: no images, no labels, or a k below 1.
    """
    num_train, num_test = len(train_features), len(test_features)
    if not num_train or not num_test:
        raise ValueError(f"k-NN needs training and test images, got {num_train} and {num_test}")
    if any(label is None for label in [*train_labels, *test_labels]):
        raise ValueError("k-NN needs a label of every image, and there are some without")
    if min(k) < 1:
        raise ValueError(f"k must be at least 1, got {min(k)}")
    if max(k) > num_train:
        warnings.warn(
            f"k = {max(k)} exceeds the {num_train} training images and is clipped to them", stacklevel=3
        )  # past no_grad
    ks = sorted({min(neighbours, num_train) for neighbours in k})

    device = train_features.device
    classes, labels = np.unique(
        np.concatenate([np.asarray(train_labels), np.asarray(test_labels)]), return_inverse=True
    )
    train_labels, test_labels = torch.from_numpy(labels).to(device).split([num_train, num_test])
    train_features = F.normalize(train_features.float(), dim=1)
    test_features = F.normalize(test_features.to(device).float(), dim=1)

    correct = {(neighbours, top): 0 for neighbours in ks for top in (1, 5)}
    chunk = max(1, CHUNK_BYTES // (4 * max(num_train, len(classes))))
    for features, targets in zip(test_features.split(chunk), test_labels.split(chunk)):
        similarity, nearest = (features @ train_features.T).topk(ks[-1], dim=1)  # (chunk, largest k)
        weights = (
            (similarity - similarity[:, :1]) / temperature
        ).exp()  # a common factor, so that exp cannot overflow
        neighbour_labels = train_labels[nearest]
        for neighbours in ks:
            votes = weights.new_zeros(len(features), len(classes))
            votes.scatter_add_(1, neighbour_labels[:, :neighbours], weights[:, :neighbours])
            ranked = votes.topk(min(5, neighbours, len(classes)), dim=1)
            hits = (ranked.indices == targets[:, None]) & (ranked.values > 0)
            correct[neighbours, 1] += int(hits[:, 0].sum())
            correct[neighbours, 5] += int(hits.sum())
    return {f"knn_{neighbours}_top{top}": 100 * hits / num_test for (neighbours, top), hits in correct.items()}
