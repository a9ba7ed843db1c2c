"""`accelerate launch -m training --config configs/X.yaml ...`, or `dino-train ...`."""

from datasets.utils.logging import disable_progress_bar as disable_datasets_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from evaluation.interruption import EXIT_CODE, interruption
from modeling_dino.command_line import run_process

from .arguments import parse_arguments
from .train import train


def train_from_command_line(argv: list[str]) -> None:
    args = parse_arguments(argv)
    disable_datasets_progress_bar()  # one bar is enough
    disable_transformers_progress_bar()
    train(args)


def main() -> None:
    interruption.listen("dino-train", EXIT_CODE, " before the first step")
    run_process("dino-train", train_from_command_line)


if __name__ == "__main__":
    main()
