"""All protocols: each is a module with `add_arguments(parser)` and `measure(args)`.

The first line of a module's docstring is its command's help. `measure` returns a report, or None where a command only
writes files. With several processes it is called on all of them.
"""

from argparse import Namespace
from pathlib import Path

from modeling_dino.command_line import Parser

from . import (
    attention,
    clustering,
    copy_detection,
    duplicates,
    embedding,
    features,
    few_shot,
    finetune,
    knn,
    landmarks,
    linear,
    logistic,
    neighbours,
    pca,
    retrieval,
    segmentation_masks,
    video_segmentation,
)
from .outputs import check_outputs
from .report import Report


MEASUREMENTS = {
    "knn": knn,
    "linear": linear,
    "logistic": logistic,
    "few_shot": few_shot,
    "clustering": clustering,
    "finetune": finetune,
    "retrieval": retrieval,
    "landmarks": landmarks,
    "copy_detection": copy_detection,
    "video_segmentation": video_segmentation,
    "segmentation_masks": segmentation_masks,
}
PICTURES = {
    "attention": attention,
    "pca": pca,
    "neighbours": neighbours,
    "embedding": embedding,
}
PROTOCOLS = {"features": features, "duplicates": duplicates, **MEASUREMENTS, **PICTURES}


def add_protocols(commands) -> None:
    """Adds each as a sub-command to what `add_subparsers` returned."""
    for name, module in PROTOCOLS.items():
        add_command(commands, name, module)


def add_command(commands, name: str, module) -> None:
    summary = module.__doc__.partition("\n")[0].rstrip(".")
    command: Parser = commands.add_parser(name, help=summary, description=summary)
    module.add_arguments(command)
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replacement of files, features and runs at the output that are not from this command and its settings. "
        "Default: an error",
    )
    command.add_argument("--debug", action="store_true", help="show a traceback instead of one line")


def measure_model(args: Namespace) -> Report | None:
    """Runs a command with its one model."""
    if getattr(args, "batch_size", 1) < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    if args.protocol in MEASUREMENTS and args.output:
        check_outputs(args, [Path(args.output)])
    return PROTOCOLS[args.protocol].measure(args)
