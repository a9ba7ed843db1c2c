"""DINO pretraining. `python -m training --help`, or from Python `train(TrainingArguments(...))`."""

import multiprocessing
import os
import sys

from evaluation.interruption import EXIT_CODE, interruption


is_module = "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["training"]
is_command = is_module or os.path.basename(sys.argv[0]) == "dino-train"
if is_command and multiprocessing.parent_process() is None:  # the libraries take seconds to import
    interruption.listen("dino-train", EXIT_CODE, " before the first step")

from .arguments import TrainingArguments  # noqa: E402
from .loss import DINOLoss  # noqa: E402
from .train import train  # noqa: E402


__all__ = ["DINOLoss", "TrainingArguments", "train"]
