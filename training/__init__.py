"""DINO pretraining. `python -m training --help`, or from Python `train(TrainingArguments(...))`."""

import multiprocessing
import os
import sys
import warnings

from evaluation.interruption import EXIT_CODE, interruption


def _is_command() -> bool:
    """Return whether this process is `python -m training` or `dino-train`, and neither a worker nor other people's."""
    words = sys.orig_argv
    is_module = "-m" in words and words[words.index("-m") + 1 :][:1] == ["training"]
    is_ours = is_module or os.path.basename(sys.argv[0]) == "dino-train"
    return is_ours and multiprocessing.parent_process() is None


if _is_command():  # the libraries take seconds to import
    interruption.listen("dino-train", EXIT_CODE, " before the first step")
    interruption.announce("importing PyTorch and transformers")

# by `python -m training.publish`, which this package imports itself
warnings.filterwarnings("ignore", "'training.publish' found in sys.modules", RuntimeWarning)

from .arguments import TrainingArguments  # noqa: E402
from .loss import DINOLoss  # noqa: E402
from .train import train  # noqa: E402


__all__ = ["DINOLoss", "TrainingArguments", "train"]
