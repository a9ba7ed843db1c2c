"""What a protocol found: values with confidence intervals, and all that one needs to find them again."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .outputs import write_text


LEVEL = 0.95  # of the intervals
NUM_RESAMPLES = 1000
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


def short_name(model: str) -> str:
    """The end of a long name, and what stands before it: what tells models apart."""
    kind, colon, source = model.rpartition(":")
    return f"{kind}{colon}{source if len(source) < 33 else '…' + source[-32:]}"


def format_table(reports: list[Report]) -> str:
    """A row for each value and a column for each model, with intervals."""
    columns = [report.model["name"] for report in reports]
    rows = list(dict.fromkeys(name for report in reports for name in report.values))
    cells = [["", *map(short_name, columns)]]
    cells += [[row, *(format_value(report, row) for report in reports)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in cells
    )


def write_reports(reports: list[Report], output: str) -> None:
    path = Path(output)
    write_text(path, json.dumps([asdict(report) for report in reports], indent=2, default=str))
    print(f"wrote {path}")
