"""`python -m evaluation PROTOCOL --model M ...`, or `dino-eval PROTOCOL --model M ...`."""

import os
import sys
import warnings
from argparse import Namespace

from .interruption import interruption


if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "dino-eval":  # the libraries take seconds to import
    interruption.listen("dino-eval")
    interruption.announce("importing PyTorch and transformers")

from accelerate import PartialState  # noqa: E402
from datasets.utils.logging import disable_progress_bar as disable_datasets_progress_bar  # noqa: E402
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar  # noqa: E402

from modeling_dino.command_line import Parser, run_process  # noqa: E402

from . import suite  # noqa: E402
from .arguments import EvaluationParser  # noqa: E402
from .processes import connect_processes, lost_process_explained  # noqa: E402
from .protocols import add_command, add_protocols, measure_model  # noqa: E402
from .report import format_table, write_reports  # noqa: E402


def measure(args: Namespace) -> None:
    """Runs a protocol for each of its models; prints what it finds, and writes it to --output."""
    models = args.model or [None]
    for place in ("features", "output_dir", "assignments"):
        if len(models) > 1 and getattr(args, place, None):
            raise ValueError(f"--{place} is for one model, got {len(models)}; give each a place of its own")
    reports = [measure_model(Namespace(**vars(args) | {"model": model})) for model in models]
    reports = [report for report in reports if report is not None]
    if reports and PartialState().is_main_process:
        print(format_table(reports))
        if args.output:
            write_reports(reports, args.output)
        if args.protocol in ("linear", "finetune") and args.output_dir:
            print(f"wrote {args.output_dir}")


def evaluate_from_command_line(argv: list[str]) -> None:
    parser = Parser(prog="dino-eval", description="Measure what a vision model has learned.")
    commands = parser.add_subparsers(dest="protocol", required=True, parser_class=EvaluationParser, metavar="PROTOCOL")
    add_protocols(commands)
    add_command(commands, "suite", suite)
    args = parser.parse_args(argv)
    del args.debug  # which `run` has seen to
    connect_processes()
    if not PartialState().is_main_process:
        warnings.simplefilter("ignore")  # which the main process says
    disable_datasets_progress_bar()
    disable_transformers_progress_bar()
    with lost_process_explained("see what it says"):
        (suite.measure if args.protocol == "suite" else measure)(args)


def main() -> None:
    interruption.listen("dino-eval")
    run_process("dino-eval", evaluate_from_command_line)


if __name__ == "__main__":
    main()
