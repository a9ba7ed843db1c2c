"""What a protocol found: values with confidence intervals, and all that one needs to find them again."""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .outputs import write_text


LEVEL = 0.95  # of the intervals
NUM_RESAMPLES = 1000
MAX_WIDTH = 80  # of a printed table, in characters
_WORDS = (  # patterns of names of values, and what tables call them
    (r"^knn_(\d+)", r"k-NN, k = \1"),
    (r"_T([\d.e-]+)", r", temperature \1"),
    (r"^linear", "linear classifier"),
    (r"^held_out", "held-out images"),
    (r"_lr([\d.e-]+)", r", learning rate \1"),
    (r"^finetune", "fine-tuning"),
    (r"^logistic_top", "logistic regression_top"),
    (r"^class_mean", "class mean"),
    (r"_1_shot", ", 1 label a class"),
    (r"_(\d+)_shot", r", \1 labels a class"),
    (r"_([\d.e-]+)_percent", r", \1 % of labels"),
    (r"_std$", ", std of draws"),
    (r"_top(\d+)$", r", top-\1"),
    (r"^kmeans", "k-means"),
    (r"_nmi$", ", normalized mutual information"),
    (r"_ari$", ", adjusted Rand index"),
    (r"^R@", "recall at "),
    (r"mP@", "mean precision at "),
    (r"^jf_", "J and F, "),
    (r"^([jf])_", lambda match: f"{match[1].upper()}, "),
    (r"^jaccard", "Jaccard index"),
    (r"_without_void$", ", without void"),
)
_NOT_SETTINGS = ("protocol", "output", "overwrite", "model", "assignments")
VERSIONS = ("torch", "torchvision", "transformers", "datasets", "dino-hf")


@dataclass
class Report:
    """A protocol's result for one model.

    Args:
        protocol: Name of the command.
        model: Name, revision (the Hub's commit, or the hash of the weights), class, number of parameters.
        data: What was measured on: name, split, number of images and a hash of them, or the benchmark.
        values: What was found, by name.
        intervals: 95 % confidence interval of values, by bootstrap over the items that they average.
        settings: The command's.
        versions: Of the packages.
        date: Of the measurement, in UTC.
    """

    protocol: str
    model: dict
    data: dict
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    settings: dict
    versions: dict[str, str]
    date: str


def bootstrap(
    num_items: int, statistic: Callable[[np.ndarray], dict[str, float]], num_resamples: int = NUM_RESAMPLES
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the values that `statistic` gives for the indices of resampled items."""
    rng = np.random.default_rng(0)
    drawn = [statistic(rng.integers(0, num_items, num_items)) for _ in range(num_resamples)]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return {
        name: tuple(float(bound) for bound in np.nanquantile([values[name] for values in drawn], tails))
        for name in drawn[0]
    }


def mean_intervals(scores: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the means of `scores`, whose entries may have different numbers of items."""
    by_length: dict[int, dict[str, np.ndarray]] = {}
    for name, values in scores.items():
        by_length.setdefault(len(values), {})[name] = np.asarray(values, dtype=np.float64)
    found = {}
    for length, group in by_length.items():
        stacked = np.stack(list(group.values()))  # (values, items)

        def means(indices: np.ndarray, stacked=stacked, group=group) -> dict[str, float]:
            return dict(zip(group, stacked[:, indices].mean(1)))

        found |= bootstrap(length, means)
    return {name: found[name] for name in scores}


def make_report(
    args: Namespace,
    model: dict,
    data: dict,
    scores: dict[str, np.ndarray],
    values: dict[str, float] | None = None,
    intervals: dict[str, tuple[float, float]] | None = None,
) -> Report:
    """The report of a command.

    Args:
        args: Its arguments.
        model: What `describe_model` says.
        data: What was measured on.
        scores: By name, a number for each item (image, query, object), of which the mean is the value and gets an
            interval; in percent where the field reports percent.
        values: Values that are no means, and those that replace one.
        intervals: Theirs, where there are any.
    """
    return Report(
        protocol=args.protocol,
        model=model,
        data=data,
        values={name: float(np.mean(items)) for name, items in scores.items()} | (values or {}),
        intervals=mean_intervals(scores) | (intervals or {}),
        settings={name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS},
        versions={package: version(package) for package in VERSIONS},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def format_value(report: Report, name: str) -> str:
    """A value with its interval; nothing if the report does not have it."""
    if name not in report.values:
        return ""
    low, high = report.intervals.get(name, (None, None))
    return f"{report.values[name]:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def short_name(model: str, length: int = 33) -> str:
    """The end of a name of more than `length` letters, and what stands before it: what tells models apart."""
    kind, colon, source = model.rpartition(":")
    return f"{kind}{colon}{source if len(source) <= length else '…' + source[1 - length :]}"


def in_words(name: str) -> str:
    """Return what tables call a value: "k-NN, k = 20, top-1" for `knn_20_top1`."""
    for pattern, words in _WORDS:
        name = re.sub(pattern, words, name)
    return name.replace("_", ", ")


def format_table(reports: list[Report], rows: Sequence[str] | None = None) -> str:
    """A row for each value and a column for each model, with intervals; in several parts where 80 columns are full.

    Args:
        reports: One for each model.
        rows: Names of values. Default: all.
    """
    rows = rows or list(dict.fromkeys(name for report in reports for name in report.values))
    first = ["in percent, 95 % interval", *map(in_words, rows)]
    width = max(map(len, first))
    length = min(33, MAX_WIDTH - width - len("  raw_pixels:"))  # of a model's name
    columns = [
        [short_name(report.model["name"], length), *(format_value(report, row) for row in rows)] for report in reports
    ]
    parts, left = [], 0
    for column in columns:
        cells = [cell.rjust(max(map(len, column))) for cell in column]
        if left < 2 + len(cells[0]):
            parts.append([])
            left = MAX_WIDTH - width
        parts[-1].append(cells)
        left -= 2 + len(cells[0])
    return "\n\n".join(
        "\n".join("  ".join([name.ljust(width), *cells]) for name, *cells in zip(first, *part)) for part in parts
    )


def write_reports(reports: list[Report], output: str) -> None:
    path = Path(output)
    write_text(path, json.dumps([asdict(report) for report in reports], indent=2, default=str))
    print(f"wrote {path}")
