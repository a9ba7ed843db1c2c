"""DINO pretraining. `python -m training --help`, or from Python `train(TrainingArguments(...))`."""

from .arguments import TrainingArguments
from .loss import DINOLoss
from .train import train


__all__ = ["DINOLoss", "TrainingArguments", "train"]
