"""Labelled images for training a classifier: the same for any number of processes and workers, and after a stop.

Whatever is drawn, is drawn from a seed of its own: of the epoch, and of the image or batch that it is for. So nothing
random has to be kept in a checkpoint.
"""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from torchvision.transforms import v2
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_dino.command_line import Parser
from modeling_dino.image_processing_dino import PILLOW_MODES

from .cards import write_classifier_card
from .decoding import Reading, decode_image, pixel_hash
from .features import class_names, find_eval_split, images_of, name_of
from .images import how_to_label
from .labels import draw_per_class, labeled_rows, top_numbers
from .models import mean_and_std, to_pixel_values, to_values
from .outputs import check_outputs, replacing, write_text
from .processes import of_all_processes
from .report import Report
from .skipped import find_broken, say_skipped
from .workers import Loader


CHECKPOINT = "checkpoint.pt"
# other files that runs write to their folders
_RUN_FILES = ("log.jsonl", "README.md", "config.json", "preprocessor_config.json", "*.safetensors", "*.py")
# settings of a run that another machine may have differently, and the numbers are the same
_ABOUT_THE_MACHINE = ("protocol", "output", "output_dir", "overwrite", "num_workers", "features")


def seed_of(*key: int | str) -> int:
    """A seed of 64 bits for anything that is named by strings and integers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Within, what PyTorch draws on the host is drawn from the key's seed; afterwards it goes on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*key))
        yield


class ComputedFeatures(nn.Module):
    """For `extract_features`: a network in the shape of one whose pooled features are what a function returns.

    Args:
        model: The network, which is put into evaluation mode with this one.
        compute: Pixel values (images, channels, height, width) -> (images, features).
    """

    def __init__(self, model: PreTrainedModel, compute: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.compute = model, compute
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        rows = self.compute(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=rows[:, None], pooler_output=rows)


class AugmentedImages(torch.utils.data.Dataset):
    """(epoch, number of an image) -> the image as that epoch sees it, its class, and a hash of its pixels.

    Args:
        dataset: Rows of `load_images`.
        targets: (images,), classes from 0.
        transform: From torchvision; gets a Pillow image, or a tensor (channels, height, width) where Pillow does not
            know the number of channels or the type: of uint8, or of fp32 from 0 to 1.
        image_processor: Says how to scale values.
        reading: How images are read.
        seed: Of the run.
    """

    def __init__(
        self,
        dataset: Dataset,
        targets: np.ndarray,
        transform: nn.Module,
        image_processor,
        reading: Reading,
        seed: int,
    ):
        self.dataset, self.targets, self.transform = dataset, targets, transform
        self.image_processor, self.reading, self.seed = image_processor, reading.of(dataset.features), seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = key
        pixels = decode_image(self.dataset[index]["image"], self.reading)
        image = torch.from_numpy(to_values(self.image_processor, pixels))
        if self.reading.num_channels in PILLOW_MODES and image.dtype == torch.uint8:
            image = v2.functional.to_pil_image(image, PILLOW_MODES[self.reading.num_channels])
        with seeded(self.seed, "image", epoch, index):
            return self.transform(image), int(self.targets[index]), pixel_hash(pixels)


class Batches:
    """The batches of an epoch, in a random order, each shared out over the processes: a batch sampler.

    All images are in one batch of an epoch, the last of which may be smaller. A process that gets none of it, gets
    its first image as well, with share 0.

    Args:
        indices: Of the images to train on.
        batch_size: Images a batch, of all processes.
        seed: Of the run.

    Attributes:
        epoch: Of the batches to come, from 0. They are pairs (epoch, index), as `AugmentedImages` takes them.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int):
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        state = PartialState()
        order = np.random.default_rng(seed_of(self.seed, "order", self.epoch)).permutation(self.indices)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            own = batch[state.process_index :: state.num_processes]
            yield [(self.epoch, int(index)) for index in (own if len(own) else batch[:1])]

    def sizes(self) -> Iterator[tuple[int, float]]:
        """Of each batch the number of its images, and this process's share of them."""
        state = PartialState()
        for start in range(0, len(self.indices), self.batch_size):
            size = min(self.batch_size, len(self.indices) - start)
            yield size, len(range(state.process_index, size, state.num_processes)) / size


def make_loader(images: AugmentedImages, order: Batches, num_workers: int) -> Loader:
    """Batches of pixel values, classes and hashes; set `order.epoch` before each epoch."""
    return Loader(
        images,
        batch_sampler=order,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=PartialState().device.type == "cuda",
        generator=torch.Generator(),
    )


def input_size(image_processor, num_channels: int) -> list[int]:
    """Height and width of what an image processor makes of an image."""
    return list(to_pixel_values(image_processor, [np.zeros((num_channels, 64, 64), np.uint8)]).shape[-2:])


def normalize(image_processor, num_channels: int) -> list[nn.Module]:
    """The end of a transform: an image -> pixel values, normalised as the image processor does it."""
    mean, std = (values.flatten().tolist() for values in mean_and_std(image_processor, num_channels))
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]


def load_splits(args: Namespace) -> tuple[Dataset, Dataset, list, list]:
    """Images with a label of the training and the test split by a command's arguments, and the labels of both.

    Nothing is decoded; see `drop_broken`.

    Raises:
        ValueError: a stream, no split to evaluate on but the training split, or no column of labels.
    """
    if not args.model or not args.dataset_name:
        raise ValueError("give --model and --dataset_name")
    if args.streaming:
        raise ValueError(f"{args.protocol} draws images in a random order: leave --streaming out")
    splits, labels, names = [], [], None
    for split in (args.train_split, evaluation_split(args)):
        dataset = images_of(args, split)
        if "label" not in dataset.column_names:
            raise ValueError(
                f"{args.protocol} needs labels, and split {split} of {args.dataset_name} has none. "
                f"{how_to_label(args.dataset_name)}"
            )
        dataset, numbers = labeled_rows(dataset, split, like=names)
        names = names or class_names(dataset)
        splits.append(dataset)
        labels.append(numbers)
    choose_labeled(args, np.asarray(labels[0]), names)  # whose error shall not come after minutes of work
    return *splits, *labels


def drop_broken(args: Namespace, split: str, dataset: Dataset, labels: list, reading: Reading) -> tuple:
    """Return the images of a split that can be decoded, their labels, and the number of others; see `say_skipped`.

    All images are decoded once, a share by each process, so that every epoch is of the same images.
    """
    state = PartialState()

    def share() -> list[dict]:
        own = np.array_split(np.arange(len(dataset)), state.num_processes)[state.process_index]
        found = find_broken(dataset.select(own), reading.of(dataset.features), args.num_workers, state.is_main_process)
        return [image | {"row": int(own[image["row"]])} for image in found]

    what = f"{args.model}, {split}"
    failed = sum(of_all_processes(share, what), [])
    failed = [image | {"name": name_of(image["name"], image["row"], args.dataset_name)} for image in failed]
    say_skipped(failed, len(dataset), what, reading.allow_unread)
    if failed:
        kept = np.setdiff1d(np.arange(len(dataset)), [image["row"] for image in failed])
        dataset, labels = dataset.select(kept), [labels[row] for row in kept]
    return dataset, labels, len(failed)


def evaluation_split(args: Namespace) -> str:
    """The split to evaluate on, see `find_eval_split`.

    Raises:
        ValueError: the training split.
    """
    split = find_eval_split(args)
    if split == args.train_split:
        raise ValueError(f"{args.protocol} trains on {split} and needs another split to evaluate on, by --eval_split")
    return split


def index_classes(
    train_labels: Sequence, test_labels: Sequence, names: Sequence[str] | None = None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the classes, and the class of each training and test image, from 0.

    Args:
        train_labels: Of any kind that numpy can sort; numbers of classes, if these have names.
        test_labels: Likewise.
        names: Of the classes. Default: the training images' labels.

    Raises:
        ValueError: no images, images without a label (`datasets` also writes -1 for that), training images of one
            class only, or test images of a class that the training images lack.
    """
    for kind, labels in (("training", train_labels), ("test", test_labels)):
        if not len(labels):
            raise ValueError(f"there are no {kind} images")
        missing = sum(label is None or (names is not None and label == -1) for label in labels)
        if missing:
            raise ValueError(f"{missing} of the {len(labels)} {kind} images have no label")
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    known, train_targets = np.unique(train_labels, return_inverse=True)
    if len(known) < 2:
        raise ValueError(f"a classifier needs two classes at least, all training images are of class {known[0]}")
    is_unknown = ~np.isin(test_labels, known)
    if is_unknown.any():
        others = np.unique(test_labels[is_unknown])
        known_name = names is None or others[0] < len(names)  # else a class that the test split alone names
        example = f", such as {others[0] if names is None else names[others[0]]}" if known_name else ""
        raise ValueError(
            f"{is_unknown.sum()} of the {len(test_labels)} test images are of classes that the training images lack "
            f"({len(others)}{example})"
        )
    if names is not None:
        return list(names), train_labels.astype(np.int64), test_labels.astype(np.int64)
    return [str(label) for label in known], train_targets, np.searchsorted(known, test_labels)


def hits(logits: torch.Tensor, targets: torch.Tensor, name: str) -> dict[str, np.ndarray]:
    """`{name}_top1` and, with more than 5 classes, `{name}_top5`: 100 for each image that was right, else 0."""
    tops = top_numbers(logits.shape[1])
    ranked = logits.topk(tops[-1], dim=1).indices == targets[:, None]  # (images, 1 or 5)
    return {f"{name}_top{top}": 100.0 * ranked[:, :top].any(1).cpu().numpy() for top in tops}


def add_labels_per_class(parser: Parser) -> None:
    parser.add_argument(
        "--labels_per_class",
        type=int,
        help="labeled training images of each class to train on, drawn by --seed as those of few_shot. Default: all",
    )


def choose_labeled(args: Namespace, targets: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """Return the indices of the training images to train on, in order: all, or `--labels_per_class` of each class.

    Raises:
        ValueError: a class with fewer images.
    """
    if args.labels_per_class is None:
        return np.arange(len(targets))
    return np.sort(draw_per_class(targets, args.labels_per_class, "labels_per_class", names, args.seed))


def run_settings(args: Namespace, **changes) -> dict:
    """What has to be the same where a run goes on: a command's arguments, with `changes`, as JSON knows them."""
    settings = {name: value for name, value in vars(args).items() if name not in _ABOUT_THE_MACHINE}
    return json.loads(json.dumps(settings | changes))


def save_card(
    args: Namespace, folder: Path, classifier: PreTrainedModel, image_processor, report: Report, method: str
) -> None:
    """Write a classifier's card, unless there is one, which may have been edited, and --overwrite is not given."""
    if args.overwrite or not (folder / "README.md").exists():
        batch_size = report.data["batch_size_of_all"]
        training = f"{args.epochs:,} epochs in batches of {batch_size:,} images, seed {args.seed}"
        write_classifier_card(folder, classifier, image_processor, report, training, method)


def check_run_folder(args: Namespace) -> None:
    """Check --output_dir before any work: a run there is recognized by its checkpoint.

    Raises:
        ValueError: a damaged checkpoint, or files that are not a run's, without --overwrite; see `check_outputs`.
    """
    folder = Path(args.output_dir)
    path = folder / CHECKPOINT
    check_outputs(args, [path], is_ours=lambda path: True)
    if path.exists() and not args.overwrite:
        _read_checkpoint(path, mmap=True)
    elif not path.exists():
        check_outputs(args, [file for name in _RUN_FILES for file in folder.glob(name)], is_ours=lambda path: False)


def discard_other_run(folder: Path, settings: dict) -> None:
    """Set a checkpoint aside that is damaged or of other settings, which the run could not resume from."""
    processes = PartialState()
    if processes.is_main_process:
        try:
            load_checkpoint(folder, settings)
        except ValueError:
            (folder / CHECKPOINT).replace(folder / f"{CHECKPOINT}.replaced")
    processes.wait_for_everyone()


def _read_checkpoint(path: Path, mmap: bool = False) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of pickle, zipfile or PyTorch, whatever the file is
        raise ValueError(
            f"{path} is damaged, or is not a checkpoint. Delete it and run the command again, or choose another "
            "--output_dir."
        ) from error
    if not isinstance(checkpoint, dict) or not {"settings", "losses"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of dino-eval. Choose another --output_dir, or give --overwrite.")
    return checkpoint


def load_checkpoint(folder: Path, settings: dict) -> dict | None:
    """What `save_checkpoint` has written last, on the host; None if nothing was.

    Raises:
        ValueError: a damaged checkpoint, or a run with other settings.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    checkpoint = _read_checkpoint(path)
    saved = checkpoint["settings"]
    for name in settings | saved:
        if saved.get(name) != settings.get(name):
            raise ValueError(
                f"{folder} holds a run with another {name} ({saved.get(name)}, not {settings.get(name)}); choose "
                "another --output_dir, or give --overwrite"
            )
    return checkpoint


def say_resumed(folder: Path, num_done: int, num_epochs: int) -> None:
    """Say on the main process that a run in a folder is resumed, or is done and reused."""
    if PartialState().is_main_process:
        done = f"{folder} has a run of these settings"
        if num_done < num_epochs:
            print(f"{done}: resuming after epoch {num_done} of {num_epochs}", flush=True)
        else:
            print(f"{done}, which is done: its weights are reused. Retrain with another --output_dir.", flush=True)


def save_checkpoint(folder: Path, settings: dict, losses: list, **state) -> None:
    """Writes the main process's `state` in place of what was written before, and `log.jsonl`, a line an epoch."""
    processes = PartialState()
    if processes.is_main_process:
        with replacing(folder / CHECKPOINT) as temporary:
            torch.save({"settings": settings, "losses": losses, **state}, temporary)
        lines = [json.dumps({"epoch": epoch, "loss": loss}) for epoch, loss in enumerate(losses, start=1)]
        write_text(folder / "log.jsonl", "\n".join(lines))
    processes.wait_for_everyone()
