"""Logistic regression on frozen features, regularised as a held-out part of the training images says."""

import warnings
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from tqdm import tqdm

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model, add_output
from .features import Features, find_eval_split, labelled_features
from .labels import draw, top_numbers
from .report import Report, make_report


C = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
HOLDOUT = 0.1  # of each class's training images
# of L-BFGS, as in DINOv2. The more classes and dimensions, the smaller are gradients from the first step on: with
# scikit-learn's 1e-4, 1000 classes would end there, and a large C of any number of classes soon after.
TOLERANCE = 1e-12


def logistic_hits(
    train_features: torch.Tensor,
    train_labels: Sequence,
    test_features: torch.Tensor,
    test_labels: Sequence,
    c: Sequence[float] = C,
    max_iter: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], float]:
    """Whether a logistic regression finds the class of each test image, regularised as the training images say.

    As in `log_regression.py` of DINOv2: fit without a tenth of the training images for every C; take the C that does
    best on that tenth; fit on all training images; look at the test images once. Here the tenth is stratified, and
    features have length one, as in `logistic_eval.py` of MSN, so that one range of C suits all networks (DINOv2:
    features as they are, 45 values of C from 1e-6 to 1e5).

    Args:
        train_features: (train images, hidden); need not be normalised.
        train_labels: Their labels, of any kind that numpy can sort.
        test_features: (test images, hidden).
        test_labels: Their labels.
        c: Inverse strengths of the regularisation to choose from, scikit-learn's `C`: the sum of the images'
            cross-entropies counts C times as much as half the squared norm of the weights. Of equally good ones the
            smallest. With a single one nothing is held out; else a tenth of each class, an image at least of
            those that have two.
        max_iter: Steps of L-BFGS at most.
        seed: Of the choice of the images held out.

    Returns:
        `logistic_top1` and, with more than 5 classes, `logistic_top5`: booleans (test images,). And the C chosen.

    Raises:
        ValueError: labels that `encode_labels` refuses; a C that is not above 0; several C but no class with two
            images.

    Warns:
        UserWarning: fits that `max_iter` ended before they had converged, in one line; a C chosen that is the smallest
            or the largest.
    """
    c = sorted(set(c))
    if c[0] <= 0 or max_iter < 1:
        raise ValueError(f"c must be above 0 and max_iter at least 1, got {c[0]:g} and {max_iter}")
    classes, train_labels, test_labels = encode_labels(train_labels, test_labels)
    train_features, test_features = normalize(train_features), normalize(test_features)

    best, unfinished = choose_c(train_features, train_labels, c, max_iter, seed) if len(c) > 1 else (c[0], [])
    model, has_converged = fit(train_features, train_labels, best, max_iter)
    warn_of_unfinished(unfinished + ([] if has_converged else [best]), max_iter)
    scores = model.predict_proba(test_features)
    tops = top_numbers(len(classes))
    return {f"logistic_top{k}": top_k_hits(scores, test_labels, k) for k in tops}, best


def choose_c(
    features: np.ndarray, labels: np.ndarray, c: Sequence[float], max_iter: int, seed: int
) -> tuple[float, list[float]]:
    """The C that is best on a tenth of each class when fitted on the rest, and those whose fits did not converge."""
    counts = np.bincount(labels)
    numbers = np.where(counts > 1, np.maximum(1, np.round(HOLDOUT * counts)), 0)
    if not numbers.any():
        raise ValueError("no class has two training images, so none can be held out to choose c; give one by --c")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[draw(labels, numbers, np.random.default_rng(seed))] = True
    accuracies, unfinished = [], []
    # on a terminal alone
    for value in tqdm(c, "C", leave=False, disable=None if PartialState().is_main_process else True):
        model, has_converged = fit(features[~held_out], labels[~held_out], value, max_iter)
        accuracies.append(model.score(features[held_out], labels[held_out]))
        unfinished += [] if has_converged else [value]
    best = c[int(np.argmax(accuracies))]
    if accuracies.count(max(accuracies)) == 1 and best in (c[0], c[-1]):
        end = "smallest" if best == c[0] else "largest"
        warnings.warn(f"the {end} C of all, {best:g}, is the best: give others beyond it by --c", stacklevel=3)
    return best, unfinished


def fit(features: np.ndarray, labels: np.ndarray, c: float, max_iter: int) -> tuple[LogisticRegression, bool]:
    """Multinomial logistic regression by scikit-learn, and whether it converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=max_iter, tol=TOLERANCE).fit(features, labels)
    return model, not caught


def warn_of_unfinished(c: Sequence[float], max_iter: int) -> None:
    if c:
        which = f"C = {min(c):g}" + (f" to {max(c):g}" if min(c) < max(c) else "")
        warnings.warn(
            f"{len(c)} logistic regressions ({which}) stopped after {max_iter} steps, before they had converged; "
            "allow more by --max_iter",
            stacklevel=3,
        )


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the right class is among those with the k highest scores; of equal scores, the first class counts more.

    Args:
        scores: (images, classes).
        labels: (images,), indices of classes.
        k: At least 1; all are hits where it is no less than the classes.

    Returns:
        (images,) of bool.

    Raises:
        ValueError: a k below 1, or labels that are no index of a class.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {scores.shape[1] - 1}, as there are scores of {scores.shape[1]} classes, got "
            f"{labels.min()} to {labels.max()}"
        )
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # (images, 1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(axis=1) < k


def encode_labels(train_labels: Sequence, test_labels: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes in order, and both splits' labels as indices into them.

    Raises:
        ValueError: no images, images without a label, a single class, or test images of a class that no training image
            has.
    """
    train_labels, test_labels = (np.asarray(list(labels)) for labels in (train_labels, test_labels))
    if not len(train_labels) or not len(test_labels):
        raise ValueError(f"training and test images are needed, got {len(train_labels)} and {len(test_labels)}")
    if any(label is None for label in [*train_labels, *test_labels]):
        raise ValueError("every image needs a label, and there are some without")
    classes, train_labels = np.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"two classes at least are needed, and all training images are of class {classes[0]}")
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise ValueError(
            f"there are no training images of {len(unknown)} of the test images' classes, such as {unknown[0]}"
        )
    return classes, train_labels, np.searchsorted(classes, test_labels)


def normalize(features: torch.Tensor) -> np.ndarray:
    """Features of length one, in float64: scikit-learn's L-BFGS may stop early in less."""
    return F.normalize(features.double().cpu(), dim=1).numpy()


def two_splits(args: Namespace) -> tuple[Features, Features]:
    """Features of the training and the test split, with a label for every image.

    Raises:
        ValueError: the same split for both; see also `labelled_features`.
    """
    if find_eval_split(args) == args.train_split:
        raise ValueError(
            f"{args.protocol} learns from one split and is measured on another, and both would be {args.train_split}; "
            "name another by --train_split or --eval_split"
        )
    return labelled_features(args)


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument(
        "--c",
        type=float,
        nargs="+",
        default=list(C),
        help="inverse strengths of the regularisation to choose from (default: 0.01, 0.03, 0.1, ..., 1000)",
    )
    add_max_iter_and_seed(parser)
    add_output(parser)


def add_max_iter_and_seed(parser: Parser) -> None:
    parser.add_argument("--max_iter", type=int, default=1000, help="steps of L-BFGS at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn (default: %(default)s)")


def measure(args: Namespace) -> Report:
    train, test = two_splits(args)
    hits, c = logistic_hits(train.features, train.labels, test.features, test.labels, args.c, args.max_iter, args.seed)
    scores = {name: 100.0 * hit for name, hit in hits.items()}
    return make_report(args, train.model, {"train": train.data, "test": test.data, "selected_c": c}, scores)
