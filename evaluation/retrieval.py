"""Retrieval of images of the same class: mAP over the whole data set, and recall at k.

A query's images are ranked by cosine similarity. One average precision serves here, for landmarks and in copy
detection: the one of those benchmarks' own evaluation, the area under the line between the points of the
precision-recall curve.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch.nn import functional as F

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model, add_output
from .features import labelled_features
from .report import Report, make_report


CHUNK_BYTES = 256 * 2**20  # of similarities and their order held at once


def average_precision(ranks: Sequence[int], num_positives: int) -> float:
    """Area under the precision-recall curve by trapezoids, as Holidays, Oxford, Paris and Copydays measure it.

    Sum over the positives found, the j-th of them (from 0) at rank r (from 0), of the mean of the precisions before
    and after it, j / r (or 1 for r = 0) and (j + 1) / (r + 1), over the number of positives. scikit-learn and
    retrieval by class elsewhere often take the second precision alone, which is no less.

    Args:
        ranks: Of the positives that were found, ascending, the best rank being 0.
        num_positives: Positives there are, found or not.

    Raises:
        ValueError: no positives, or more found than there are.
    """
    if not num_positives or num_positives < len(ranks):
        raise ValueError(f"{len(ranks)} of {num_positives} positives were found; there must be some, and all counted")
    ranks, found = np.asarray(ranks, dtype=np.float64), np.arange(len(ranks))
    before = np.where(ranks == 0, 1, found / np.maximum(ranks, 1))
    return float((before + (found + 1) / (ranks + 1)).sum() / 2 / num_positives)


def precision_at_k(ranks: Sequence[int], k: int) -> float:
    """Share of positives among the first k, or as far as the last positive where that comes earlier: the mP@k of
    Revisited Oxford and Paris. `ranks` of all positives, from 0."""
    last = min(max(ranks) + 1, k)
    return sum(rank < last for rank in ranks) / last


def recall_at_k(ranks: Sequence[int], k: int) -> float:
    """1 if any positive is among the first k, else 0: the R@k of retrieval by class. `ranks` of positives, from 0."""
    return float(any(rank < k for rank in ranks))


@torch.no_grad()
def class_retrieval_scores(
    query_features: torch.Tensor,
    query_labels: Sequence,
    database_features: torch.Tensor | None = None,
    database_labels: Sequence | None = None,
    k: Sequence[int] = (1, 5, 10),
) -> dict[str, np.ndarray]:
    """Average precision over the whole database and recall at k of every query; positive is what has its label.

    Args:
        query_features: (queries, hidden); need not be normalised.
        query_labels: Their labels, of any kind that numpy can sort.
        database_features: (database, hidden). Default: every query looks for all other queries.
        database_labels: Their labels.
        k: Of the recalls.

    Returns:
        `mAP` and `R@{k}`, each (queries,) in [0, 1]; nan for a query without positives. Equal similarities keep the
        database's order.

    Raises:
        ValueError: no images, a label missing, one class only, a k below 1.
    """
    alone = database_features is None
    if alone:
        database_features, database_labels = query_features, query_labels
    num_queries, num_database = len(query_features), len(database_features)
    if not num_queries or not num_database:
        raise ValueError(f"retrieval needs queries and a database, got {num_queries} and {num_database} images")
    if any(label is None for label in chain(query_labels, database_labels)):
        raise ValueError("retrieval by class needs a label of every image, and there are some without")
    if min(k) < 1:
        raise ValueError(f"k must be at least 1, got {min(k)}")
    labels = np.concatenate([np.asarray(query_labels), np.asarray(database_labels)])
    classes, labels = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"retrieval by class needs two classes or more, and all images are of class {classes[0]}")

    device = database_features.device
    wanted, labels = torch.from_numpy(labels).to(device).split([num_queries, num_database])
    database = F.normalize(database_features.float(), dim=1)
    queries = F.normalize(query_features.to(device).float(), dim=1)
    scores = {name: np.full(num_queries, np.nan) for name in ["mAP"] + [f"R@{top}" for top in k]}
    # bytes of a similarity, its place in the order (and while it is sorted, of both again) and its verdict
    for indices in torch.arange(num_queries, device=device).split(max(1, CHUNK_BYTES // (25 * num_database))):
        similarity = queries[indices] @ database.T  # (chunk, database)
        if alone:
            similarity[torch.arange(len(indices)), indices] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)
        if alone:  # the query itself came last
            order = order[:, :-1]
        hits = (labels[order] == wanted[indices, None]).cpu().numpy()
        for query, row in zip(indices.tolist(), hits):
            ranks = np.flatnonzero(row)
            if len(ranks):
                scores["mAP"][query] = average_precision(ranks, len(ranks))
                for top in k:
                    scores[f"R@{top}"][query] = recall_at_k(ranks[:1], top)
    return scores


def in_percent(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores in percent of the queries that have positives; names that no query has a value of are left out.

    Raises:
        ValueError: no query has a positive.
    """
    answered = {name: 100 * values[~np.isnan(values)] for name, values in scores.items()}
    answered = {name: values for name, values in answered.items() if len(values)}
    if not answered:
        raise ValueError("no query has a positive among the images to be found, so there is nothing to measure")
    idle = max(int(np.isnan(values).sum()) for values in scores.values())
    if 0 < idle and PartialState().is_main_process:
        number = len(next(iter(scores.values())))
        warnings.warn(f"{idle} of the {number} queries have nothing to find, at least at one level, and are left out")
    return answered


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10], help="of the recalls (default: 1 5 10)")
    add_extraction(parser)
    add_output(parser)


def measure(args: Namespace) -> Report:
    """Queries are the test split's images and the database is the training split, or all images of the only split."""
    if min(args.k) < 1:
        raise ValueError(f"k must be at least 1, got {args.k}")
    if args.dataset_name and any(Path(args.dataset_name).glob("gnd_*.pkl")):
        raise ValueError(
            f"{args.dataset_name} is in the layout of Revisited Oxford and Paris; use `dino-eval landmarks`"
        )
    database, queries = labelled_features(args)
    features = database.features.to(PartialState().device)  # where whole rankings are sorted
    if queries is None:
        scores = class_retrieval_scores(features, database.labels, k=args.k)
        data = {"queries": database.data, "leave_one_out": True}
    else:
        scores = class_retrieval_scores(queries.features, queries.labels, features, database.labels, k=args.k)
        data = {"queries": queries.data, "database": database.data}
    data["queries_without_positives"] = int(np.isnan(scores["mAP"]).sum())
    return make_report(args, database.model, data, in_percent(scores))
