"""k-NN of the teacher while it trains."""

import warnings

from datasets import ClassLabel, Dataset

from evaluation.features import choose_eval_split, extract_features, labeled
from evaluation.images import how_to_label, load_images, split_names
from evaluation.knn import knn_accuracy

from .arguments import TrainingArguments


class KNNEvaluation:
    """Loads its images before the first step, so that errors come early.

    With `max_eval_samples`, a stream is drawn from through a window of a thousand images, so one that is sorted by
    class may lack classes. Images without a label do not count.

    Args:
        args: Name the data. Without `eval_split`, it is chosen as `dino-eval` does.
        num_channels: Channels that the network takes.

    Attributes:
        split_names: Of the images that vote, and, unless each is measured by the others, of those that are measured.
    """

    def __init__(self, args: TrainingArguments, num_channels: int):
        self.args = args
        self.reading = args.reading(num_channels)
        eval_split = args.eval_split or choose_eval_split(
            split_names(args.dataset_name, args.dataset_config_name, args.streaming, args.folder_layout),
            args.train_split,
        )
        self.split_names = list(dict.fromkeys([args.train_split, eval_split]))
        self.splits = [self._load(split) for split in self.split_names]

    def _load(self, split: str):
        args = self.args
        dataset = load_images(
            args.dataset_name, args.dataset_config_name, split, args.image_column, args.label_column, args.streaming,
            True, args.folder_layout, args.tiff_pages, args.allow_unread,
        )  # fmt: skip
        if "label" not in dataset.column_names:
            raise ValueError(
                f"--eval_steps needs labels, and {args.dataset_name} has none. {how_to_label(args.dataset_name)} Or "
                "leave --eval_steps out."
            )
        if args.max_eval_samples is None:
            return dataset
        dataset = dataset.shuffle(seed=args.seed)
        if isinstance(dataset, Dataset):
            return dataset.select(range(min(args.max_eval_samples, len(dataset))))
        return dataset.take(args.max_eval_samples)

    def __call__(self, backbone, image_processor) -> dict[str, float]:
        banks, train = [], None
        for dataset, split, description in zip(self.splits, self.split_names, ("k-NN bank", "k-NN test")):
            features = extract_features(
                backbone,
                dataset,
                image_processor,
                self.args.per_device_eval_batch_size,
                self.args.num_workers if isinstance(dataset, Dataset) else 0,
                description,
                self.args.dataset_name,
                self.reading,
            )
            features = labeled(features, split, like=train)
            train = train or features
            banks += features.features, features.labels
        labels = self.splits[0].features["label"]
        num_classes = len(set(banks[1].tolist()))
        if isinstance(labels, ClassLabel) and num_classes < labels.num_classes:
            warnings.warn(
                f"the k-NN bank has images of {num_classes} of the {labels.num_classes} classes: raise "
                "--max_eval_samples, or do without --streaming"
            )
        k = [k for k in (10, 20, 100, 200) if k <= len(banks[0]) - (len(banks) == 2)] or [1]
        return knn_accuracy(*banks, k=k)
