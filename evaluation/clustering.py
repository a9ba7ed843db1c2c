"""K-means on the features of a split: how well its clusters agree with the classes.

Without labels, the clusters are written and not scored.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch.nn import functional as F
from tqdm import trange

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model, add_output
from .features import Features, features_of, find_eval_split, images_of
from .images import how_to_label
from .labels import known_labels, plain_labels
from .outputs import check_outputs, is_table, print_table, write_table
from .report import LEVEL, NUM_RESAMPLES, Report, make_report


COLUMNS = ("name", "cluster", "label")  # of --assignments; the last one only where there are labels


def k_means(features: torch.Tensor, num_clusters: int, num_init: int = 10, seed: int = 0) -> np.ndarray:
    """Each image's cluster, by scikit-learn's k-means on features of length one.

    Args:
        features: (images, hidden); need not be normalised.
        num_clusters: From 2 to the number of images.
        num_init: Runs, each from another k-means++ start; the one with the smallest distances counts.
        seed: Of the starts.

    Returns:
        (images,), from 0 to `num_clusters` - 1.

    Raises:
        ValueError: numbers that cannot be.
    """
    if not 2 <= num_clusters <= len(features) or num_init < 1:
        raise ValueError(
            f"num_clusters must be from 2 to the {len(features)} images and num_init at least 1, got "
            f"{num_clusters} and {num_init}"
        )
    features = F.normalize(features.float().cpu(), dim=1).numpy()
    return KMeans(num_clusters, n_init=num_init, random_state=seed).fit_predict(features)


def clustering_scores(labels: Sequence, clusters: Sequence) -> dict[str, float]:
    """How well clusters agree with classes, whatever the clusters' names.

    Args:
        labels: Each image's class, of any kind that numpy can sort.
        clusters: Each image's cluster, likewise.

    Returns:
        Three numbers that are 1 where clusters and classes are the same: `nmi`, the mutual information over the mean
        of both entropies; `ari`, the Rand index, adjusted so that chance has 0 on average; `accuracy`, of the best
        one-to-one assignment of clusters to classes (Hungarian method; a cluster without a class is all misses).

    Raises:
        ValueError: no images, another number of clusters than of labels, or an image without a label.
    """
    if not len(labels) or len(labels) != len(clusters):
        raise ValueError(f"every image needs a label and a cluster, got {len(labels)} and {len(clusters)}")
    if any(label is None for label in labels):
        raise ValueError("every image needs a label, and there are some without")
    _, labels = np.unique(labels, return_inverse=True)
    _, clusters = np.unique(clusters, return_inverse=True)
    table = contingency_matrix(labels, clusters)  # (classes, clusters)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "accuracy": float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels)),
    }


def clustering_intervals(labels: np.ndarray, clusters: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % intervals of `clustering_scores`, by bootstrap over the images.

    Where resamples lie by themselves says nothing: two copies of an image agree with each other, so that nearly every
    resample has more mutual information than the images. Their spread does, and it is laid around the value.
    """
    rng, disable = np.random.default_rng(0), None if PartialState().is_main_process else True
    drawn = []
    for _ in trange(NUM_RESAMPLES, desc="intervals", leave=False, disable=disable):  # on a terminal alone
        indices = rng.integers(0, len(labels), len(labels))
        drawn.append(clustering_scores(labels[indices], clusters[indices]))
    intervals = {}
    for name, value in clustering_scores(labels, clusters).items():
        resampled = np.array([scores[name] for scores in drawn])
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - resampled.mean() + value
        intervals[name] = float(low), float(high)
    return intervals


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument(
        "--num_clusters",
        type=int,
        help="number of clusters; needed for images without labels. Default: the number of classes",
    )
    parser.add_argument("--num_init", type=int, default=10, help="runs; the best one counts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters' starts (default: %(default)s)")
    add_output(parser)
    parser.add_argument(
        "--assignments",
        metavar="FILE",
        help="CSV to write: the cluster of each image, and its label if there is one. Default: none, but printed for "
        "images without labels",
    )


def _check_labels(args: Namespace, split: str, has_labels: bool) -> None:
    """Check the settings that depend on whether images have labels.

    Raises:
        ValueError: no labels, and no number of clusters, or a file of scores.
    """
    if has_labels:
        return
    if args.num_clusters is None:
        raise ValueError(
            f"num_clusters must be given for images without labels, got none: split {split} of "
            f"{args.dataset_name or args.features} has no labels. Give --num_clusters. Or: "
            f"{how_to_label(args.dataset_name or args.features)}"
        )
    if args.output:
        raise ValueError(
            f"output must be left out for images without labels, which have no scores, got {args.output}. Give "
            "--assignments instead."
        )


def _check_outputs(args: Namespace) -> None:
    if args.assignments is None:
        return
    path = Path(args.assignments)
    if path.suffix != ".csv":
        raise ValueError(f"assignments must end in .csv, got {args.assignments}. Choose another name.")
    check_outputs(args, [path], lambda file: is_table(file, COLUMNS) or is_table(file, COLUMNS[:2]))


def _write_assignments(args: Namespace, images: Features, clusters: np.ndarray) -> None:
    """Write or print the cluster of each image; the label of an image without one is empty."""
    names = images.names or list(map(str, range(len(images))))
    columns = [names, clusters]
    if any(label is not None for label in images.labels):
        class_names = images.class_names
        texts = [label if label is None or not class_names else class_names[label] for label in images.labels]
        columns.append(["" if text is None else text for text in texts])
    header, rows = COLUMNS[: len(columns)], zip(*columns)
    if args.assignments is None:
        print_table(header, rows)
    else:
        write_table(Path(args.assignments), header, rows)
        print(f"wrote {args.assignments}")


def measure(args: Namespace) -> Report | None:
    """Return a report where images have labels, else None."""
    _check_outputs(args)
    split = find_eval_split(args)
    if args.model and args.dataset_name:  # before features are computed
        dataset = images_of(args, split)
        _check_labels(args, split, "label" in dataset.column_names)
    images = features_of(args, split)
    images.labels = plain_labels(images.labels, images.class_names)
    has_labels = any(label is not None for label in images.labels)
    _check_labels(args, split, has_labels)
    num_clusters = args.num_clusters
    if has_labels:
        known = known_labels(images.labels, split)
        classes, labels = np.unique(images.labels[known].tolist(), return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"split {images.data['split']} of {images.data['name']} has images of one class only, {classes[0]}"
            )
        num_clusters = len(classes) if num_clusters is None else num_clusters
    clusters = k_means(images.features, num_clusters, args.num_init, args.seed)
    if PartialState().is_main_process and (args.assignments or not has_labels):
        _write_assignments(args, images, clusters)
    if not has_labels:
        return None
    values = {f"kmeans_{name}": 100 * value for name, value in clustering_scores(labels, clusters[known]).items()}
    intervals = {
        f"kmeans_{name}": (100 * low, 100 * high)
        for name, (low, high) in clustering_intervals(labels, clusters[known]).items()
    }
    return make_report(args, images.model, {"test": images.data}, {}, values, intervals)
