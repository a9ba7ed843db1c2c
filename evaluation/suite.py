"""Several protocols on several models, of whatever data is at hand: one table, as Markdown, CSV and picture.

A config names the data and what to measure on it:

    data:
      imagenet: ILSVRC/imagenet-1k    # Hub id or path; `--data imagenet=PATH` says where it lies here
    measure:
      - protocol: knn                 # then the flags of `dino-eval knn`
        dataset_name: imagenet
        show: [knn_20_top1]           # rows of the table; all without it

Every report is written when it is there, and a suite that is started again goes on after the last one, unless model,
data or settings have changed. A measurement that fails leaves its cell empty, and is told at the end.
"""

import csv
import hashlib
import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from accelerate import PartialState
from datasets import load_dataset_builder

from modeling_dino.command_line import CONFIGS, Parser, find_config, nearest, one_line

from .arguments import READING, EvaluationParser
from .images import is_path
from .models import revision_of
from .outputs import FIGURE_SUFFIXES, check_outputs, is_from, mark, replacing, write_figure, write_text
from .processes import of_all_processes
from .protocols import MEASUREMENTS, add_protocols, measure_model
from .report import Report, format_table, format_value, in_words, short_name


# see other crops of an image in every epoch, so that kept features are not for them
_AUGMENTED = ("linear", "finetune")
_ABOUT_FEATURES = (
    *("dataset_name", "dataset_config_name", "image_column", "label_column", "image_size", "dtype"),
    *READING,
)


# how tables begin, by which they are recognized
_HEAD = "| protocol, data | value | "
_COLUMNS = ("measurement", "name", "model", "revision", "value", "low", "high")


@dataclass
class Entry:
    """A measurement of the config: what the table calls it, its parsed flags without a model, the name and place of
    the data that it needs, the values to show."""

    name: str
    args: Namespace
    data: str
    place: str
    show: list[str] | None


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict) or config.keys() != {"data", "measure"}:
        raise ValueError(f"{path} must have `data` and `measure`, got {list(config) if config else 'nothing'}")
    entries = config["measure"] if isinstance(config["measure"], list) else [None]
    if not all(isinstance(given, dict) for given in (config["data"], *entries)):
        raise ValueError(f"{path} must have a mapping in `data` and a list of mappings in `measure`")
    for name in places:
        if name not in config["data"]:
            raise ValueError(f"{path} has no data named {name}{nearest(name, config['data'])}")
    for place in places.values():
        if is_path(place) and not Path(place).expanduser().exists():
            raise ValueError(f"there is no {place}, given by --data")
    places = config["data"] | places
    parser = Parser(prog=str(path))
    add_protocols(parser.add_subparsers(dest="protocol", parser_class=EvaluationParser))
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
        del args.debug, args.overwrite
        name = f"{protocol}, {used[0]}"
        if sum(other.get("protocol") == protocol and used[0] in other.values() for other in config["measure"]) > 1:
            name += "".join(f", {flag} {value}" for flag, value in flags.items() if value != used[0])
        entries.append(Entry(name, args, used[0], places[used[0]], show))
    return entries


def is_at_hand(place: str) -> bool:
    """Whether data can be read: a path that is there, or a data set that the Hub or its cache has."""
    if Path(place).expanduser().exists():
        return True
    if is_path(place):
        return False
    try:
        load_dataset_builder(place)
    except ValueError:  # it is there, and wants a configuration, which an entry may name
        return True
    except Exception:  # whatever the Hub, the network or their libraries raise: it is not at hand
        return False
    return True


def state_of(place: str) -> str | None:
    """A hash of the names, sizes and times of all files of a path; None of a data set of the Hub."""
    path = Path(place).expanduser()
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def measure_all(entries: list[Entry], models: list[str], folder: Path, overwrite: bool = False) -> tuple[dict, dict]:
    """Reports and reasons of failures, both by model and number of the entry; see the module."""
    reports, failures = {}, {}
    revisions = {model: revision_of(model) for model in models}  # a mistyped name is told before hours of work
    states = {place: state_of(place) for place in {entry.place for entry in entries}}
    is_main = PartialState().is_main_process
    for model in models:
        for number, entry in enumerate(entries):
            args = Namespace(**vars(entry.args) | {"model": model})
            path = (
                folder / "reports" / f"{args.protocol}-{_key(vars(args), revisions[model], states[entry.place])}.json"
            )
            if path.exists():
                try:
                    reports[model, number] = Report(**json.loads(path.read_text()))
                except (ValueError, TypeError):  # not JSON, or other fields
                    failures[model, number] = f"{path} is damaged. Delete it and run the command again"
                else:
                    if is_main:
                        print(f"{entry.name}: {model} (was there already)")
                continue
            args.overwrite = overwrite
            if "features" in vars(args) and args.protocol not in _AUGMENTED:
                source = {name: getattr(args, name) for name in _ABOUT_FEATURES}
                source_key = _key(source, model, revisions[model], states[entry.place])
                args.features = str(folder / "features" / source_key)
            if is_main:
                print(f"{entry.name}: {model}", flush=True)
            try:
                report = measure_model(args)
                if report is None:
                    raise ValueError("there was nothing to measure")
            except Exception as error:  # a network of any library may not take an image: the others go on
                failures[model, number] = one_line(error)
                continue
            reports[model, number] = report
            if is_main:
                write_text(path, json.dumps(asdict(report), indent=2, default=str))
    return reports, failures


def make_rows(entries: list[Entry], models: list[str], reports: dict) -> list[Row]:
    rows = []
    for number, entry in enumerate(entries):
        found = {model: reports[model, number] for model in models if (model, number) in reports}
        names = list(dict.fromkeys(name for report in found.values() for name in report.values))
        for name in entry.show or names:
            rows.append(Row(entry, name, {m: report for m, report in found.items() if name in report.values}))
    return rows


def to_markdown(rows: list[Row], models: list[str]) -> str:
    lines = [_HEAD + " | ".join(models) + " |", "|---|---|" + "---:|" * len(models)]
    for row in rows:
        cells = [format_value(row.reports[model], row.value) if model in row.reports else "" for model in models]
        lines.append(f"| {row.entry.name} | {in_words(row.value)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_table(path: Path) -> bool:
    if path.suffix in FIGURE_SUFFIXES:
        return is_from(path, "suite")
    return path.is_file() and path.read_bytes().startswith((_HEAD.encode(), ",".join(_COLUMNS).encode()))


def write_csv(rows: list[Row], path: Path) -> None:
    """A line for each value of each model."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in rows:
            for model, report in row.reports.items():
                low, high = report.intervals.get(row.value, ("", ""))
                writer.writerow(
                    [row.entry.name, row.value, model, report.model["revision"], report.values[row.value], low, high]
                )


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
        sharex=True, layout="constrained",
    )  # fmt: skip
    colors = plt.get_cmap("tab10").colors
    for axis, row in zip(axes.flat, rows):
        for place, model in enumerate(models):
            if model not in row.reports:
                continue
            value = row.reports[model].values[row.value]
            low, high = row.reports[model].intervals.get(row.value, (value, value))
            axis.barh(place, value, color=colors[place % 10], height=0.7)
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], color="black", linewidth=1, capsize=2)
            axis.text(high + 1.5, place, f"{value:.1f}", fontsize=7, va="center")
        axis.set_title(f"{row.entry.name}\n{in_words(row.value)}", fontsize=8)
        axis.set_xlim(0, 115)
        axis.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        axis.set_yticks(range(len(models)), [short_name(model) for model in models], fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    write_figure(figure, path, mark("suite"), dpi=200)


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
    pictures = [folder / f"table{suffix}" for suffix in FIGURE_SUFFIXES]
    files = [folder / "table.md", folder / "table.csv", *pictures]
    inputs = Namespace(**vars(args) | {"places": [entry.place for entry in entries]})
    check_outputs(inputs, files, is_ours=_is_table)
    # one process asks the Hub, lest the others hear something else
    places = of_all_processes(lambda: {e.place: is_at_hand(e.place) for e in entries} if is_main else {}, "the data")[
        0
    ]
    at_hand = [entry for entry in entries if places[entry.place]]
    if is_main:
        for name in dict.fromkeys(entry.data for entry in entries if not places[entry.place]):
            print(f"left out: there is no {name} here; say where it lies by --data {name}=PLACE")
    if not at_hand:
        raise ValueError(f"none of the data of {path} is at hand")
    reports, failures = measure_all(at_hand, args.model, folder, args.overwrite)
    rows = make_rows(at_hand, args.model, reports)
    if is_main and reports:
        table = to_markdown(rows, args.model)
        write_text(folder / "table.md", table)
        write_csv(rows, folder / "table.csv")
        for path in pictures:
            draw(rows, args.model, path)
        for number, entry in enumerate(at_hand):
            if found := [reports[model, number] for model in args.model if (model, number) in reports]:
                print(f"\n{entry.name}\n{format_table(found, entry.show)}")
        print(f"\nwrote {folder}/{', '.join(file.name for file in files)} and reports/")
    reasons = [f"{at_hand[number].name}: {model}: {reason}" for (model, number), reason in failures.items()]
    if reasons:
        of = len(at_hand) * len(args.model)
        raise ValueError(f"{len(reasons)} of {of} measurements failed: {'; '.join(reasons)}")
    for row in rows:
        if not row.reports:
            names = list(dict.fromkeys(name for (_, number), report in reports.items()
                                       if at_hand[number] is row.entry for name in report.values))  # fmt: skip
            raise ValueError(f"{row.entry.name} has no value {row.value} to show{nearest(row.value, names)}")
