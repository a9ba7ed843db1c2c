"""`python -m evaluation PROTOCOL --model M ...`, or `dino-eval PROTOCOL --model M ...`."""

from argparse import Namespace

from accelerate import PartialState
from datasets.utils.logging import disable_progress_bar as disable_datasets_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from modeling_dino.command_line import Parser, run

from . import attention, features, knn, segmentation_masks, video_segmentation
from .report import Report, format_table, write_reports


# each has `add_arguments(parser)` and `measure(args)`; the first line of its docstring is the command's help
PROTOCOLS = {
    "features": features,
    "knn": knn,
    "attention": attention,
    "video_segmentation": video_segmentation,
    "segmentation_masks": segmentation_masks,
}


def make_parser() -> Parser:
    parser = Parser(prog="dino-eval", description="Measure what a vision model has learned.")
    commands = parser.add_subparsers(dest="protocol", required=True, parser_class=Parser, metavar="PROTOCOL")
    for name, module in PROTOCOLS.items():
        summary = module.__doc__.partition("\n")[0].rstrip(".")
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    return parser


def measure(args: Namespace) -> list[Report]:
    """Runs a command for each of its models; prints what it finds, and writes it to --output."""
    if getattr(args, "batch_size", 1) < 1:
        raise ValueError(f"batch_size must be at least 1, got {args.batch_size}")
    protocol, models = PROTOCOLS[args.protocol], args.model or [None]
    for folder in ("features", "output_dir"):
        if len(models) > 1 and getattr(args, folder, None):
            raise ValueError(f"--{folder} is for one model, got {len(models)}; give each a folder of its own")
    reports = [protocol.measure(Namespace(**vars(args) | {"model": model})) for model in models]
    reports = [report for report in reports if report is not None]
    if reports and PartialState().is_main_process:
        print(format_table(reports))
        if args.output:
            write_reports(reports, args.output)
    return reports


def evaluate_from_command_line(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    del args.debug  # which `run` has seen to
    disable_datasets_progress_bar()
    disable_transformers_progress_bar()
    measure(args)


def main() -> None:
    run("dino-eval", evaluate_from_command_line)


if __name__ == "__main__":
    main()
