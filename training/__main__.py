"""`accelerate launch -m training --config configs/X.yaml ...`, or `dino-train ...`."""

from evaluation.interruption import EXIT_CODE, interruption
from modeling_dino.command_line import run_process

from .arguments import parse_arguments
from .train import train


def train_from_command_line(argv: list[str]) -> None:
    train(parse_arguments(argv))


def main() -> None:
    interruption.listen("dino-train", EXIT_CODE, " before the first step")
    run_process("dino-train", train_from_command_line)


if __name__ == "__main__":
    main()
