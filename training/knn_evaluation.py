"""k-NN of the teacher while it trains."""

import warnings

from datasets import ClassLabel, Dataset

from evaluation.features import extract_features
from evaluation.images import load_images
from evaluation.knn import knn_accuracy

from .arguments import TrainingArguments


class KNNEvaluation:
    """Loads its images before the first step, so that errors come early.

    With `max_eval_samples`, a stream is drawn from through a window of a thousand images, so one that is sorted by
    class may lack classes.
    """

    def __init__(self, args: TrainingArguments, image_processor):
        self.args = args
        self.image_processor = image_processor
        self.splits = []
        for split in (args.train_split, args.eval_split):
            dataset = load_images(
                args.dataset_name,
                args.dataset_config_name,
                split,
                args.image_column,
                args.label_column,
                args.streaming,
            )
            if "label" not in dataset.column_names:
                raise ValueError(f"--eval_steps needs labels, and {args.dataset_name} has no label column")
            if args.max_eval_samples is not None:
                if isinstance(dataset, Dataset):
                    number = min(args.max_eval_samples, len(dataset))
                    dataset = dataset.shuffle(seed=args.seed).select(range(number))
                else:
                    dataset = dataset.shuffle(seed=args.seed).take(args.max_eval_samples)
            self.splits.append(dataset)

    def __call__(self, backbone) -> dict[str, float]:
        banks = []
        for dataset, description in zip(self.splits, ("k-NN bank", "k-NN test")):
            bank = extract_features(
                backbone,
                dataset,
                self.image_processor,
                self.args.per_device_eval_batch_size,
                self.args.num_workers if isinstance(dataset, Dataset) else 0,
                description,
            )
            banks += bank.features, bank.labels
        labels = self.splits[0].features["label"]
        num_classes = len(set(banks[1].tolist()))
        if isinstance(labels, ClassLabel) and num_classes < labels.num_classes:
            warnings.warn(
                f"the k-NN bank has images of {num_classes} of the {labels.num_classes} classes: raise "
                "--max_eval_samples, or do without --streaming"
            )
        k = [k for k in (10, 20, 100, 200) if k <= len(banks[0])] or [1]
        return knn_accuracy(*banks, k=k)
