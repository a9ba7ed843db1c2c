"""Accuracy with 1, 5 and 10 labelled images a class, and with 1 and 10 percent of the labels."""

import warnings
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model, add_output
from .labels import draw, draw_per_class
from .logistic import add_max_iter_and_seed, encode_labels, fit, normalize, two_splits, warn_of_unfinished
from .report import Report, make_report


C = 400.0


def few_shot_hits(
    train_features: torch.Tensor,
    train_labels: Sequence,
    test_features: torch.Tensor,
    test_labels: Sequence,
    shots: int | None = None,
    percent: float | None = None,
    num_draws: int = 5,
    c: float = C,
    max_iter: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Whether two classifiers that see a few labelled images find the class of each test image; several draws of them.

    One is a logistic regression on features of length one with a fixed strength of regularisation, as in
    `logistic_eval.py` of MSN, whose lambda of 0.0025 is scikit-learn's C = 400: choosing it would take labels that one
    does not have. The other takes the class whose mean feature is the most similar by cosine (nearest centroid, as in
    SimpleShot), and has nothing to choose at all.

    Args:
        train_features: (train images, hidden); need not be normalised.
        train_labels: Their labels, of any kind that numpy can sort.
        test_features: (test images, hidden).
        test_labels: Their labels.
        shots: Labelled images a class. Or:
        percent: Labelled share of each class's images in percent, rounded, one image at least.
        num_draws: How often the labelled images are drawn.
        c: Of the logistic regression.
        max_iter: Steps of L-BFGS at most.
        seed: Of the draws; a larger `num_draws` begins with the same ones.

    Returns:
        `logistic` and `class_mean`: booleans (draws, test images).

    Raises:
        ValueError: labels that `encode_labels` refuses; neither or both of `shots` and `percent`; a class with fewer
            images than `shots`; other numbers that cannot be.

    Warns:
        UserWarning: fits that `max_iter` ended before they had converged, in one line.
    """
    if (shots is None) == (percent is None):
        raise ValueError(f"give either shots or percent, got {shots} and {percent}")
    if (shots is not None and shots < 1) or (percent is not None and not 0 < percent <= 100):
        raise ValueError(f"shots must be at least 1 and percent above 0 and at most 100, got {shots} and {percent}")
    if num_draws < 1 or c <= 0 or max_iter < 1:
        raise ValueError(
            f"num_draws and max_iter must be at least 1 and c above 0, got {num_draws}, {max_iter} and {c}"
        )
    classes, train_labels, test_labels = encode_labels(train_labels, test_labels)
    numbers = None if shots else np.maximum(1, np.round(percent / 100 * np.bincount(train_labels)))
    train_features, test_features = normalize(train_features), normalize(test_features)

    hits, unfinished = {"logistic": [], "class_mean": []}, []
    disable = None if PartialState().is_main_process else True  # on a terminal alone
    setting = f"{shots} shots" if shots else f"{percent:g} %"
    for number in tqdm(range(num_draws), setting, leave=False, disable=disable):
        if shots:
            drawn = draw_per_class(train_labels, shots, "shots", classes, seed, number)
        else:
            drawn = draw(train_labels, numbers, np.random.default_rng([seed, number]))
        features, labels = train_features[drawn], train_labels[drawn]
        model, has_converged = fit(features, labels, c, max_iter)
        unfinished += [] if has_converged else [c]
        hits["logistic"].append(model.predict(test_features) == test_labels)
        means = normalize(torch.from_numpy(np.stack([features[labels == k].mean(0) for k in range(len(classes))])))
        hits["class_mean"].append((test_features @ means.T).argmax(1) == test_labels)
    warn_of_unfinished(unfinished, max_iter)
    return {name: np.stack(values) for name, values in hits.items()}


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument(
        "--shots", type=int, nargs="*", default=[1, 5, 10], help="labelled images a class (default: 1 5 10)"
    )
    parser.add_argument(
        "--percent", type=float, nargs="*", default=[1.0, 10.0], help="labelled share of each class (default: 1 10)"
    )
    parser.add_argument("--num_draws", type=int, default=5, help="draws of labelled images (default: %(default)s)")
    parser.add_argument(
        "--c", type=float, default=C, help="inverse strength of the regularisation (default: %(default)s)"
    )
    add_max_iter_and_seed(parser)
    add_output(parser)


def measure(args: Namespace) -> Report:
    """Values are means over the draws, with intervals over the test images; `_std` is the deviation of the draws."""
    if not args.shots and not args.percent:
        raise ValueError("give --shots or --percent")
    train, test = two_splits(args)
    classes, counts = np.unique(train.labels, return_counts=True)
    smallest = classes[counts.argmin()]
    smallest = train.class_names[smallest] if train.class_names else smallest
    settings = {f"{percent:g}_percent": {"percent": percent} for percent in args.percent}
    for shots in sorted(args.shots, reverse=True):
        if shots <= counts.min():
            settings = {f"{shots}_shot": {"shots": shots}} | settings
        elif shots == min(args.shots) and not settings:
            draw_per_class(train.labels, shots, "shots", train.class_names)  # whose error names the class
        else:
            warnings.warn(f"no {shots} shots: class {smallest} has only {counts.min()} training images")
    scores, values = {}, {}
    for name, setting in settings.items():
        hits = few_shot_hits(
            train.features, train.labels, test.features, test.labels, **setting, num_draws=args.num_draws, c=args.c,
            max_iter=args.max_iter, seed=args.seed,
        )  # fmt: skip
        for classifier, drawn in hits.items():
            scores[f"{classifier}_{name}"] = 100.0 * drawn.mean(0)
            if args.num_draws > 1:
                values[f"{classifier}_{name}_std"] = 100.0 * float(drawn.mean(1).std(ddof=1))
    return make_report(args, train.model, {"train": train.data, "test": test.data}, scores, values)
