"""Several protocols on several models, of whatever data is at hand: one table, as Markdown, CSV and PNG.

A config names the data and what to measure on it:

    data:
      imagenet: ILSVRC/imagenet-1k    # Hub id or path; `--data imagenet=PATH` says where it lies here
    measure:
      - protocol: knn                 # then the flags of `dino-eval knn`
        dataset_name: imagenet
        show: [knn_20_top1]           # rows of the table; all without it

Every report is written when it is there, and a suite that is started again goes on after the last one.
"""

import csv
import hashlib
import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from accelerate import PartialState

from modeling_dino.command_line import CONFIGS, Parser, find_config, nearest

from .models import revision_of
from .protocols import MEASUREMENTS, add_protocols, measure_model
from .report import Report


# see other crops of an image in every epoch, so that kept features are not for them
_AUGMENTED = ("linear", "finetune")


@dataclass
class Entry:
    """A measurement of the config: its parsed flags without a model, the data that it needs, the values to show."""

    args: Namespace
    data: str
    show: list[str] | None

    @property
    def name(self) -> str:
        return f"{self.args.protocol}, {self.data}"


@dataclass
class Row:
    """A value of the table: reports by model, where there are any."""

    entry: Entry
    value: str
    reports: dict[str, Report]


def read_config(path: Path, places: dict[str, str]) -> list[Entry]:
    """The measurements of a config, with `places`, name of the data -> Hub id or path, over the config's own.

    Raises:
        ValueError: no such YAML, or an unknown name of a protocol, a flag or data (names the nearest one).
    """
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict) or config.keys() != {"data", "measure"}:
        raise ValueError(f"{path} must have `data` and `measure`, got {list(config) if config else 'nothing'}")
    for name in places:
        if name not in config["data"]:
            raise ValueError(f"{path} has no data named {name}{nearest(name, config['data'])}")
    places = config["data"] | places
    parser = Parser(prog=str(path))
    add_protocols(parser.add_subparsers(dest="protocol", parser_class=Parser))
    entries = []
    for number, given in enumerate(config["measure"], start=1):
        flags = dict(given)
        protocol, show = flags.pop("protocol", None), flags.pop("show", None)
        if protocol not in MEASUREMENTS:
            raise ValueError(
                f"{path}, entry {number}: there is no protocol {protocol}{nearest(str(protocol), MEASUREMENTS)}"
            )
        used = [value for value in flags.values() if isinstance(value, str) and value in places]
        if len(used) != 1:
            raise ValueError(f"{path}, entry {number}: it must name one entry of `data`, got {used or 'none'}")
        argv = [protocol]
        for name, value in flags.items():
            if value is True:
                argv.append(f"--{name}")
                continue
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(places[used[0]] if item == used[0] else str(item) for item in values)]
        args = parser.parse_args(argv)
        del args.debug
        entries.append(Entry(args, used[0], show))
    return entries


def is_at_hand(entry: Entry) -> bool:
    """Whether an entry's data can be read: a path that is there, or a data set that the Hub or its cache has."""
    place = next(value for name, value in vars(entry.args).items() if name in ("dataset_name", "root") and value)
    if Path(place).expanduser().exists():
        return True
    if getattr(entry.args, "dataset_name", None) != place:
        return False
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(place, entry.args.dataset_config_name)
    except Exception:  # whatever the Hub, the network or their libraries raise: it is not at hand
        return False
    return True


def measure_all(entries: list[Entry], models: list[str], folder: Path) -> tuple[dict, dict[str, str]]:
    """Reports by model and number of the entry, and what failed, with its reason; see the module."""
    reports, failures = {}, {}
    revisions = {model: revision_of(model) for model in models}  # a mistyped name is told before hours of work
    for model in models:
        for number, entry in enumerate(entries):
            args = Namespace(**vars(entry.args) | {"model": model})
            settings = {"flags": vars(args), "revision": revisions[model]}
            key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
            path = folder / "reports" / f"{args.protocol}-{key}.json"
            if path.exists():
                reports[model, number] = _checked(Report(**json.loads(path.read_text())), entry)
                continue
            if "features" in vars(args) and args.protocol not in _AUGMENTED and args.dataset_name:
                source = f"{model} {args.dataset_name} {args.dataset_config_name} {args.image_size} {args.dtype}"
                args.features = str(folder / "features" / hashlib.sha256(source.encode()).hexdigest()[:12])
            if PartialState().is_main_process:
                print(f"{entry.name}: {model}", flush=True)
            try:
                report = measure_model(args)
            except (ValueError, OSError, ImportError) as error:
                failures[f"{entry.name}: {model}"] = str(error)
                continue
            reports[model, number] = report
            if PartialState().is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(asdict(report), indent=2, default=str) + "\n")
            _checked(report, entry)
    return reports, failures


def _checked(report: Report, entry: Entry) -> Report:
    """The report, if it has what the config shows of it."""
    for name in entry.show or []:
        if name not in report.values:
            raise ValueError(f"{entry.name} has no value {name} to show{nearest(name, report.values)}")
    return report


def make_rows(entries: list[Entry], models: list[str], reports: dict) -> list[Row]:
    rows = []
    for number, entry in enumerate(entries):
        found = {model: reports[model, number] for model in models if (model, number) in reports}
        names = list(dict.fromkeys(name for report in found.values() for name in report.values))
        for name in entry.show or names:
            rows.append(Row(entry, name, {m: report for m, report in found.items() if name in report.values}))
    return rows


def to_markdown(rows: list[Row], models: list[str]) -> str:
    lines = ["| protocol, data | value | " + " | ".join(models) + " |", "|---|---|" + "---:|" * len(models)]
    for row in rows:
        cells = []
        for model in models:
            report = row.reports.get(model)
            cell = "" if report is None else f"{report.values[row.value]:.2f}"
            if report is not None and row.value in report.intervals:
                low, high = report.intervals[row.value]
                cell += f" [{low:.2f}, {high:.2f}]"
            cells.append(cell)
        lines.append(f"| {row.entry.name} | {row.value} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_csv(rows: list[Row], path: Path) -> None:
    """A line for each value of each model."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["protocol", "data", "name", "model", "revision", "value", "low", "high"])
        for row in rows:
            for model, report in row.reports.items():
                low, high = report.intervals.get(row.value, ("", ""))
                writer.writerow(
                    [row.entry.args.protocol, row.entry.data, row.value, model, report.model["revision"],
                     report.values[row.value], low, high]
                )  # fmt: skip


def draw(rows: list[Row], models: list[str], path: Path) -> None:
    """A panel for each value, a bar for each model, and the confidence interval on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_columns = min(3, len(rows))
    num_rows = -(-len(rows) // num_columns)
    height = 0.65 + 0.28 * len(models)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(1.5 + 2.6 * num_columns, 0.2 + height * num_rows), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    colors = plt.get_cmap("tab10").colors
    for axis, row in zip(axes.flat, rows):
        for place, model in enumerate(models):
            if model not in row.reports:
                continue
            report = row.reports[model]
            value = report.values[row.value]
            axis.barh(place, value, color=colors[place % 10], height=0.7)
            if row.value in report.intervals:
                low, high = report.intervals[row.value]
                axis.plot([low, high], [place, place], color="black", linewidth=1)
        axis.set_title(f"{row.entry.name}\n{row.value}", fontsize=8)
        axis.set_yticks(range(len(models)), [_short(model) for model in models], fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _short(model: str) -> str:
    """The end of a long name: what tells paths apart."""
    kind, colon, source = model.rpartition(":")
    return f"{kind}{colon}{source if len(source) < 26 else '…' + source[-25:]}"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--config", required=True, help="YAML of what to measure: a path, or a name in configs/eval")
    parser.add_argument("--model", nargs="+", required=True, help="Hub ids or folders, as of every protocol")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PLACE", help="where data of the config lies: path or Hub id"
    )
    parser.add_argument("--output_dir", required=True, help="folder for table, reports and features")


def measure(args: Namespace) -> None:
    for given in args.data:
        if "=" not in given:
            raise ValueError(f"data must be written as name=place, got {given}")
    path = find_config(args.config, CONFIGS / "eval", ".yaml")
    entries = read_config(path, dict(given.split("=", 1) for given in args.data))
    is_main, folder = PartialState().is_main_process, Path(args.output_dir)
    at_hand = [entry for entry in entries if is_at_hand(entry)]
    if is_main:
        for name in dict.fromkeys(entry.data for entry in entries if entry not in at_hand):
            print(f"left out: there is no {name} here; say where it lies by --data {name}=PLACE")
    if not at_hand:
        raise ValueError(f"none of the data of {path} is at hand")
    reports, failures = measure_all(at_hand, args.model, folder)
    if is_main and reports:
        rows = make_rows(at_hand, args.model, reports)
        table = to_markdown(rows, args.model)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table)
        write_csv(rows, folder / "table.csv")
        draw(rows, args.model, folder / "table.png")
        print(f"\n{table}\nwrote {folder}/table.md, table.csv, table.png and reports/")
    if failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise ValueError(f"{len(failures)} of {len(at_hand) * len(args.model)} measurements failed: {reasons}")
