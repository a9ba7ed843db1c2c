"""The paper's weighted k-nearest-neighbour classifier: k and temperature grids from one pass, or leave-one-out.

No training at all: features and labels in, accuracies out.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from torch.nn import functional as F

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model, add_output
from .features import labelled_features
from .labels import top_numbers
from .report import Report, make_report


CHUNK_BYTES = 256 * 2**20  # of similarities held at once


@torch.no_grad()
def knn_hits(
    train_features: torch.Tensor,
    train_labels: Sequence,
    test_features: torch.Tensor | None = None,
    test_labels: Sequence | None = None,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float | Sequence[float] = 0.07,
) -> dict[str, np.ndarray]:
    """Whether a vote of the k most similar training images finds the class of each test image.

    A neighbour with cosine similarity s votes for its class with exp(s / temperature). One top-k of the largest k
    serves all. Section 4.1 of the paper, `eval_knn.py` of the original; unlike there, any number of classes and of
    test images will do.

    Args:
        train_features: (train images, hidden); need not be normalised.
        train_labels: Their labels, of any kind that numpy can sort.
        test_features: (test images, hidden). None: each training image is classified by all others.
        test_labels: Their labels.
        k: Numbers of neighbours. One that exceeds the training images is clipped to them, with a warning.
        temperature: Of the votes, one or several.

    Returns:
        `knn_{k}_top1` and, with more than 5 classes, `knn_{k}_top5` for every k, and with `_T{temperature}` before
        `_top` for several temperatures: booleans (test images,). Top-5 means the min(5, k) classes with most votes. A
        class without a vote is no hit; in the original it can be one, by the order in which ties are sorted.

    Raises:
        ValueError: no images, no labels, a k below 1, or a temperature that is not above 0.
    """
    leave_one_out = test_features is None
    if leave_one_out:
        test_features, test_labels = train_features, train_labels
    num_train, num_test = len(train_features), len(test_features)
    num_neighbours = num_train - leave_one_out
    if num_neighbours < 1 or not num_test:
        raise ValueError(f"k-NN needs training and test images, got {num_train} and {num_test}")
    if any(label is None for label in [*train_labels, *test_labels]):
        raise ValueError("k-NN needs a label of every image, and there are some without")
    temperatures = [temperature] if isinstance(temperature, (int, float)) else list(temperature)
    if min(k) < 1 or min(temperatures) <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got {min(k)} and {min(temperatures)}")
    if max(k) > num_neighbours:
        warnings.warn(
            f"k = {max(k)} exceeds the {num_neighbours} training images and is clipped to them", stacklevel=3
        )  # past no_grad
    ks = sorted({min(neighbours, num_neighbours) for neighbours in k})

    device = train_features.device
    classes, labels = np.unique(
        np.concatenate([np.asarray(train_labels), np.asarray(test_labels)]), return_inverse=True
    )
    train_labels, test_labels = torch.from_numpy(labels).to(device).split([num_train, num_test])
    train_features = F.normalize(train_features.float(), dim=1)
    test_features = F.normalize(test_features.to(device).float(), dim=1)

    def name(neighbours: int, temperature: float, top: int) -> str:
        return f"knn_{neighbours}" + (f"_T{temperature:g}" if len(temperatures) > 1 else "") + f"_top{top}"

    tops = top_numbers(len(classes))
    hits = {name(n, t, top): np.empty(num_test, dtype=bool) for n in ks for t in temperatures for top in tops}
    chunk = max(1, CHUNK_BYTES // (4 * max(num_train, len(classes))))
    for start in range(0, num_test, chunk):
        rows = slice(start, start + chunk)
        features, targets = test_features[rows], test_labels[rows]
        similarities = features @ train_features.T  # (chunk, train images)
        if leave_one_out:
            own = torch.arange(start, start + len(features), device=device)
            similarities.scatter_(1, own[:, None], -torch.inf)
        similarity, nearest = similarities.topk(ks[-1], dim=1)  # (chunk, largest k)
        del similarities  # before the next ones are there
        neighbour_labels = train_labels[nearest]
        for temperature in temperatures:
            # a common factor, so that exp cannot overflow
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
            for neighbours in ks:
                votes = weights.new_zeros(len(features), len(classes))
                votes.scatter_add_(1, neighbour_labels[:, :neighbours], weights[:, :neighbours])
                ranked = votes.topk(min(5, neighbours, len(classes)), dim=1)
                found = ((ranked.indices == targets[:, None]) & (ranked.values > 0)).cpu().numpy()
                for top in tops:
                    hits[name(neighbours, temperature, top)][rows] = found[:, :top].any(1)
    return hits


def knn_accuracy(*args, **kwargs) -> dict[str, float]:
    """Accuracies in percent: the means of `knn_hits`, of the same arguments."""
    return {name: 100 * float(hits.mean()) for name, hits in knn_hits(*args, **kwargs).items()}


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default: 10 20 100 200)"
    )
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.07], help="of the votes, one or several (default: 0.07)"
    )
    add_output(parser)


def measure(args: Namespace) -> Report:
    if min(args.k) < 1 or min(args.temperature) <= 0:
        raise ValueError(f"k must be at least 1 and temperature above 0, got {args.k} and {args.temperature}")
    train, test = labelled_features(args)
    against = (None, None) if test is None else (test.features, test.labels)
    num_unknown = 0 if test is None else int((~np.isin(test.labels, train.labels)).sum())
    if num_unknown and PartialState().is_main_process:
        warnings.warn(f"{num_unknown} of the {len(test)} test images are of classes that no training image has")
    bank = train.features.to(PartialState().device)
    hits = knn_hits(bank, train.labels, *against, args.k, args.temperature)
    data = {"train": train.data} | ({"leave_one_out": True} if test is None else {"test": test.data})
    return make_report(args, train.model, data, {name: 100.0 * hit for name, hit in hits.items()})
