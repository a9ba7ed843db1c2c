"""A model and images -> features, each image exactly once whatever the number of processes; kept on disk if wanted.

Kept features lie in parts of as many images each. A part that is written is never computed again, so that extraction
goes on where it was stopped, with any number of processes.
"""

import json
import math
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_dino.command_line import Parser, check_files

from .arguments import add_dataset, add_extraction, add_model
from .images import content_of, decode_image, load_images, pixel_hash, split_names
from .models import describe_model, load_model, num_channels, pooled, run_model, to_pixel_values
from .outputs import check_outputs, replacing, write_text
from .processes import of_all_processes
from .workers import Loader


MANIFEST = "manifest.json"  # of kept features
PART_SIZE = 4096  # images in a file of kept features
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Features:
    """Features of a split, and where they come from.

    Args:
        features: (images, hidden) in fp32 on the CPU.
        labels: (images,), of any kind that numpy can sort; None for images without.
        hashes: (images,) in int64, equal for images of equal pixels.
        class_names: Of the labels, where the data set has them.
        names: (images,) file names, or row numbers as text. Empty for kept features without names.
        model: What `describe_model` says.
        data: Name, configuration and split of the data set, number and hash of all images.
    """

    features: torch.Tensor
    labels: np.ndarray
    hashes: np.ndarray
    class_names: list[str] | None = None
    names: list[str] = field(default_factory=list)
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


class ImageCollator:
    """Rows of `load_images` -> pixel values, as the image processor makes them, labels, hashes and file names."""

    def __init__(self, image_processor, num_channels: int):
        self.image_processor = image_processor
        self.num_channels = num_channels

    def __call__(self, rows: list[dict]) -> tuple[torch.Tensor, list, list[int], list[str | None]]:
        images = [decode_image(row["image"], self.num_channels) for row in rows]
        hashes = [pixel_hash(image) for image in images]
        names = [row["image"]["path"] if isinstance(row["image"], dict) else None for row in rows]
        return to_pixel_values(self.image_processor, images), [row.get("label") for row in rows], hashes, names


def extract_features(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    image_processor,
    batch_size: int = 64,
    num_workers: int = 0,
    description: str = "features",
) -> Features:
    """Features of all images of a data set of `load_images`, in evaluation mode.

    Args:
        model: A backbone; the mode of each of its modules is put back afterwards.
        dataset: Rows with `image` and, perhaps, `label`.
        image_processor: Makes pixel values of (channels, height, width) uint8 arrays.
        batch_size: Images per forward pass and process.
        num_workers: Worker processes that decode.
        description: Text of the progress bar.

    Returns:
        The same on all processes. Their order is the data set's with one process, and with several where it is not a
        stream; of a stream, each process's share follows the one before.

    Raises:
        ValueError: on all processes, no images, or features that are not finite (names the image); or what else one
            of them fails with, which the others call a ValueError.
    """
    state = PartialState()

    def share() -> Features:
        part = dataset
        if state.num_processes > 1:
            part = split_dataset_by_node(dataset, state.process_index, state.num_processes)
        return _extract_share(model, part, image_processor, batch_size, num_workers, description)

    features = _join(of_all_processes(share, description))
    if not len(features):
        raise ValueError(f"there are no images to compute {description} of")
    features.class_names = class_names(dataset)
    return features


def _join(parts: list[Features]) -> Features:
    parts = [part for part in parts if len(part)] or parts[:1]
    return Features(
        torch.cat([part.features for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.hashes for part in parts]),
        # a share does not know the number of its first row
        names=[name or str(row) for row, name in enumerate(name for part in parts for name in part.names)],
    )


def class_names(dataset: Dataset | IterableDataset) -> list[str] | None:
    labels = dataset.features.get("label")
    return labels.names if isinstance(labels, ClassLabel) else None


def describe_data(args: Namespace, split: str, dataset: Dataset | IterableDataset) -> dict:
    """What tells a split from another, before its images are read; of a stream, not whether its files have changed."""
    data = {"name": args.dataset_name, "config": args.dataset_config_name, "split": split}
    data |= {"image_column": args.image_column, "label_column": args.label_column}
    return data | ({"fingerprint": dataset._fingerprint} if isinstance(dataset, Dataset) else {})


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module in the mode that it had."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = module in training


@torch.no_grad()
def _extract_share(
    model: PreTrainedModel, dataset: Dataset | IterableDataset, image_processor, batch_size: int, num_workers: int,
    description: str,
) -> Features:  # fmt: skip
    """`extract_features` of what one process gets."""
    collate = ImageCollator(image_processor, num_channels(model.config))
    # a generator of its own: without one, evaluation in the midst of training changes what training draws next
    loader = Loader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator()
    )
    num_batches = math.ceil(len(dataset) / batch_size) if isinstance(dataset, Dataset) else None
    features, labels, hashes, all_names = [], [], [], []
    # on a terminal alone
    disable = None if PartialState().is_main_process else True
    with evaluating(model):
        for pixel_values, batch_labels, batch_hashes, names in tqdm(
            loader, description, num_batches, leave=False, disable=disable
        ):
            rows = pooled(model, run_model(model, pixel_values)).float().cpu()
            is_finite = rows.isfinite().all(1)
            if not is_finite.all():
                row = int((~is_finite).nonzero()[0])
                name = names[row] or f"number {len(labels) + row} (from 0) of this process's share"
                raise ValueError(f"{description}: the model's features of image {name} are not finite")
            features.append(rows)
            labels.extend(batch_labels)
            hashes.extend(batch_hashes)
            all_names.extend(name or "" for name in names)
    return Features(
        torch.cat(features) if features else torch.empty(0, 0),
        np.array(labels),
        np.array(hashes, dtype=np.int64),
        names=all_names,
    )


def keep_features(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    dataset: Dataset,
    image_processor,
    data: dict,
    batch_size: int = 64,
    num_workers: int = 0,
    overwrite: bool = False,
) -> Features:
    """`extract_features` with `folder` to keep them in: what is there already is not computed again.

    Every process computes parts of its own, in the order of the data set; a file that is there is whole. Features are
    kept in the model's dtype.

    Args:
        folder: `part-00000.safetensors` and on (features, hashes, and labels as JSON in the metadata) and
            `manifest.json`, whose `num_images` is there when all are.
        name: The model's, for the manifest.
        data: What is known of the data set beforehand, for the manifest.
        overwrite: Whether to replace features of another model, dataset, image processor or dtype.
        Others: see `extract_features`.

    Raises:
        ValueError: a stream, of which no part can be read alone; features of another model, dataset, image processor
            or dtype in `folder`, or damaged ones.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("features of a stream cannot be kept: leave out --streaming or --features")
    state = PartialState()
    manifest = {
        "model": describe_model(model, name),
        "data": data,
        "image_processor": json.loads(json.dumps(image_processor.to_dict(), default=str)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "class_names": class_names(dataset),
        "part_size": PART_SIZE,
        "num_images": None,
    }
    path = folder / MANIFEST
    try:
        is_complete = _check_kept(folder, manifest)
    except ValueError:
        if not overwrite:
            raise
        is_complete = None
    state.wait_for_everyone()  # all have looked before the first one writes
    if state.is_main_process and not is_complete:
        if is_complete is None:
            for file in folder.glob("part-*.safetensors"):
                file.unlink()
        write_text(path, json.dumps(manifest, indent=2))
    state.wait_for_everyone()

    num_parts = math.ceil(len(dataset) / PART_SIZE)

    def share() -> None:
        """Computes this process's parts."""
        for part in range(state.process_index, num_parts, state.num_processes):
            file = folder / f"part-{part:05d}.safetensors"
            if file.exists():
                continue
            rows = dataset.select(range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(dataset))))
            description = f"{data['split']}, part {part + 1} of {num_parts}"
            computed = _extract_share(model, rows, image_processor, batch_size, num_workers, description)
            tensors = {"features": computed.features.to(model.dtype), "hashes": torch.from_numpy(computed.hashes)}
            with replacing(file) as temporary:
                save_file(tensors, temporary, {"labels": json.dumps(computed.labels.tolist())})

    of_all_processes(share, f"features of {data['split']}")
    if state.is_main_process and not is_complete:
        write_text(path, json.dumps(manifest | {"num_images": len(dataset)}, indent=2))
    state.wait_for_everyone()
    return read_features(folder)


def _check_kept(folder: Path, manifest: dict) -> bool | None:
    """Return whether kept features are complete, None if there are none.

    Raises:
        ValueError: features that the manifest given does not describe.
    """
    kept = read_manifest(folder)
    if kept is None:
        return None
    for key in manifest.keys() - {"num_images", "class_names"}:
        if kept[key] != manifest[key]:
            raise ValueError(
                f"{folder} has features of another {key} ({_difference(kept[key], manifest[key])}); choose another "
                "folder, or give --overwrite"
            )
    return kept["num_images"] is not None


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of kept features, None if there is none.

    Raises:
        ValueError: a manifest that is damaged or is not one of features, or parts without a manifest.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        if parts := sorted(folder.glob("part-*.safetensors")):
            raise ValueError(f"{parts[0]} has no {MANIFEST} beside it. Delete {folder}, or choose another --features.")
        return None
    try:
        check_files(folder)
        manifest = json.loads(path.read_text())
        names = ("model", "image_processor", "dtype", "class_names", "part_size", "num_images")
        range(0, manifest["num_images"] or 0, manifest["part_size"])  # fails unless they are numbers
        return {name: manifest[name] for name in names} | {"data": dict(manifest["data"])}
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged, or is not a manifest of features. Delete {folder} and run the command that made it "
            "again, or choose another --features."
        ) from error


def _read_part(path: Path) -> Features:
    try:
        with safe_open(path, "pt") as opened:
            labels = np.array(json.loads(opened.metadata()["labels"]))
            part = Features(opened.get_tensor("features").float(), labels, opened.get_tensor("hashes").numpy())
        if not (part.features.ndim == 2 and len(part.features) == len(part.labels) == len(part.hashes)):
            raise ValueError(f"{len(part.labels)} labels")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is missing or damaged. Delete it and run the command that made it again, with --model and "
            "--dataset_name."
        ) from error
    return part


def _difference(kept, given) -> str:
    if not isinstance(kept, dict):
        return f"{kept}, not {given}"
    names = [name for name in dict.fromkeys([*kept, *given]) if kept.get(name) != given.get(name)]
    return ", ".join(f"{name} {kept.get(name)}, not {given.get(name)}" for name in names)


def read_features(folder: Path) -> Features:
    """What `keep_features` has written.

    Raises:
        ValueError: if there is nothing, or not all of it yet, or a file that is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"there are no features in {folder}; `dino-eval features` makes them")
    if manifest["num_images"] is None:
        raise ValueError(f"the features in {folder} are not complete; run the command that made them again")
    num_parts = math.ceil(manifest["num_images"] / manifest["part_size"])
    parts = [_read_part(folder / f"part-{part:05d}.safetensors") for part in range(num_parts)]
    if len({part.features.shape[1] for part in parts}) != 1 or sum(map(len, parts)) != manifest["num_images"]:
        raise ValueError(
            f"the parts in {folder} do not fit its {MANIFEST}. Delete {folder} and run the command that made it again."
        )
    features = _join(parts)
    features.class_names, features.model, features.data = (
        manifest["class_names"],
        manifest["model"],
        manifest["data"] | content_of(features.hashes),
    )
    return features


def features_of(args: Namespace, split: str, with_labels: bool = False) -> Features:
    """Features of a split by a command's arguments: read from `--features`, or computed now, and then kept there.

    Raises:
        ValueError: neither features nor a model and a data set; no label of every image, although `with_labels`.
    """
    no_labels = f"split {split} of {args.dataset_name or args.features} has no labels, or not of every image; name "
    no_labels += "their column by --label_column"
    if args.features and not args.model:
        if args.image_size is not None:
            raise ValueError("image_size is for a --model; these features are what they are")
        features = read_features(Path(args.features) / split)
    else:
        features = _new_features(args, split, no_labels if with_labels else None)
    if features.class_names and (features.labels == -1).any():  # as `datasets` writes that there is none
        features.labels = np.where(features.labels == -1, None, features.labels)
    if with_labels and any(label is None for label in features.labels):
        raise ValueError(no_labels)
    return features


def check_features(args: Namespace, *names: str) -> None:
    """Check the folders in --features that a command will fill, before any work.

    Raises:
        ValueError: see `read_manifest`, without --overwrite; and `check_outputs`.
    """
    if args.features and args.model:
        for folder in (Path(args.features) / name for name in names):
            check_outputs(args, [folder / "part-00000.safetensors"], is_ours=lambda path: True)
            if not args.overwrite:
                read_manifest(folder)


def _check_given(args: Namespace) -> None:
    if not args.model or not args.dataset_name:
        raise ValueError(
            "give --model and --dataset_name, or --features, a folder that `dino-eval features` has filled"
        )


def _new_features(args: Namespace, split: str, no_labels: str | None) -> Features:
    _check_given(args)
    check_features(args, split)
    dataset = load_images(
        args.dataset_name, args.dataset_config_name, split, args.image_column, args.label_column, args.streaming
    )
    if no_labels and "label" not in dataset.column_names:
        raise ValueError(no_labels)
    model, image_processor = load_model(args.model, args.image_size, DTYPES[args.dtype])
    data = describe_data(args, split, dataset)
    if args.features:
        return keep_features(
            Path(args.features) / split, args.model, model, dataset, image_processor, data, args.batch_size,
            args.num_workers, args.overwrite,
        )  # fmt: skip
    features = extract_features(
        model, dataset, image_processor, args.batch_size, args.num_workers, f"{args.model}, {split}"
    )
    features.model = describe_model(model, args.model)
    features.data = data | content_of(features.hashes)
    return features


def labelled_features(args: Namespace) -> tuple[Features, Features | None]:
    """Features of the training and the test split, with a label for every image.

    The second is None where there is no other split, or where `--train_split` and `--eval_split` are the same: each
    image is then measured by all others. Images that are in both splits are warned of.

    Raises:
        ValueError: see `features_of`; images without labels, or one class only.
    """
    eval_split = find_eval_split(args)
    check_features(args, args.train_split, eval_split)
    train = features_of(args, args.train_split, with_labels=True)
    test = features_of(args, eval_split, with_labels=True) if eval_split != args.train_split else None
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"split {train.data['split']} of {train.data['name']} has images of one class only, {train.labels[0]}"
        )
    if test is not None:
        check_class_names(train.class_names, test.class_names)
        warn_of_shared_images(train.hashes, test.hashes)
    return train, test


def check_class_names(train: list[str] | None, test: list[str] | None) -> None:
    """Labels are compared by their numbers."""
    if train and test and train != test:
        differing = [names for names in zip(train, test) if names[0] != names[1]] or [(len(train), len(test))]
        raise ValueError(
            f"the training and the test split name their classes differently: {differing[0][0]} and {differing[0][1]}"
        )


def warn_of_shared_images(train_hashes: np.ndarray, test_hashes: np.ndarray) -> None:
    num_shared = int(np.isin(test_hashes, train_hashes).sum())
    if num_shared and PartialState().is_main_process:
        warnings.warn(
            f"{num_shared} of the {len(test_hashes)} test images are training images, too: what is measured on them "
            "says little"
        )


def find_eval_split(args: Namespace) -> str:
    """--eval_split or, without it, `test`, else `validation`, else the training split itself, if there is no other.

    Raises:
        ValueError: other splits alone.
    """
    if args.eval_split:
        return args.eval_split
    if args.features and not args.model:
        names = [
            path.parent.name
            for path in Path(args.features).glob(f"*/{MANIFEST}")
            if read_manifest(path.parent)["data"]["split"] == path.parent.name
        ]  # else inputs of `linear`
    else:
        _check_given(args)
        names = split_names(args.dataset_name, args.dataset_config_name, args.streaming)
    for name in ("test", "validation"):
        if name in names:
            return name
    if names == [args.train_split]:
        return args.train_split
    raise ValueError(f"choose the split to evaluate on by --eval_split; there are {', '.join(names) or 'none'}")


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument("--splits", nargs="+", help="splits (default: all that there are)")


def measure(args: Namespace) -> None:
    """The command `features`: fills --features."""
    if not args.features:
        raise ValueError("give --features, the folder to write")
    if not args.model or not args.dataset_name:
        raise ValueError("give --model and --dataset_name")
    splits = args.splits or split_names(args.dataset_name, args.dataset_config_name, args.streaming)
    check_features(args, *splits)
    for split in splits:
        features = features_of(args, split)
        if PartialState().is_main_process:
            shape = " x ".join(map(str, features.features.shape))
            print(f"wrote {shape} features of {split} to {Path(args.features) / split}")
