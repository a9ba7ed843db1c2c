"""`accelerate launch -m training --config configs/X.yaml ...`, or `dino-train ...`."""

import os
import sys

from datasets.utils.logging import disable_progress_bar as disable_datasets_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from modeling_dino.command_line import run

from .arguments import parse_arguments
from .data import left_behind
from .train import train


def train_from_command_line(argv: list[str]) -> None:
    args = parse_arguments(argv)
    disable_datasets_progress_bar()  # one bar is enough
    disable_transformers_progress_bar()
    train(args)


def main() -> None:
    code = 0
    try:
        run("dino-train", train_from_command_line)
    except SystemExit as end:
        code = end.code
    if left_behind:  # Python would end under their feet, or wait for them; all that matters is written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
