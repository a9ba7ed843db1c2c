"""DINO pretraining. `python -m training --help`, or from Python `train(TrainingArguments(...))`."""

import os
import sys

from evaluation.interruption import EXIT_CODE, interruption


if os.path.basename(sys.argv[0]) in ("-m", "dino-train"):  # a command, and the libraries take seconds to import
    interruption.listen("dino-train", EXIT_CODE, " before the first step")

from .arguments import TrainingArguments  # noqa: E402
from .loss import DINOLoss  # noqa: E402
from .train import train  # noqa: E402


__all__ = ["DINOLoss", "TrainingArguments", "train"]
