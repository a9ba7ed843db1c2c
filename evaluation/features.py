"""A model and images -> features, each image exactly once whatever the number of processes; kept on disk if wanted.

`--features DIR` holds one file for each split: a Parquet file, which pandas, polars and datasets read in one line (see
`feature_files`), or an .npz or CSV. During the extraction, finished parts lie in `DIR/{split}.parts`. A stopped
extraction resumes at the first missing part, with any number of processes.
"""

import json
import math
import os
import re
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from glob import escape
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_dino.command_line import Parser

from .arguments import READING, add_dataset, add_extraction, add_model
from .decoding import BrokenImageError, Reading, decode_image, image_name, pixel_hash
from .feature_files import (
    WRITERS,
    files_of,
    is_from_features,
    make_table,
    read_manifest,
    read_tables,
    to_labels,
    to_matrix,
    write_part,
)
from .images import content_of, how_to_label, is_path, load_images, split_names
from .labels import known_labels, match_names, plain_labels
from .models import describe_model, load_model, num_channels, pooled, reading_of, run_model, to_pixel_values, tokens
from .outputs import check_outputs
from .processes import of_all_processes
from .skipped import DecodableImages, say_skipped
from .workers import Loader


PART_SIZE = 4096  # images in a part of kept features
PATCH_PART_SIZE = 256  # the same of patch tokens, which are larger by the number of patches
TOKENS = ("cls", "mean", "patch")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Features:
    """Features of a split, and where they come from.

    Args:
        features: (images, hidden) in fp32 on the CPU; (images, patches, hidden) of patch tokens.
        labels: (images,), of any kind that numpy can sort; None for images without.
        hashes: (images,) in int64, equal for images of equal pixels.
        names: Name of each image: its path relative to the dataset's folder, else its path or number as text.
        class_names: Of the labels, where the data set has them.
        model: What `describe_model` says.
        data: Name, configuration and split of the data set, number and hash of all images.
        failed: Images of kept features that could not be decoded and have no row, as {name, reason, row}.
    """

    features: torch.Tensor
    labels: np.ndarray
    hashes: np.ndarray
    names: list[str] = field(default_factory=list)
    class_names: list[str] | None = None
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    failed: list[dict] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def rows(self) -> np.ndarray:
        """(images,) number of each image in the dataset, where images that could not be decoded count, too."""
        numbers = np.arange(len(self) + len(self.failed))
        return np.setdiff1d(numbers, [image["row"] for image in self.failed])


class ImageCollator:
    """Rows of `load_images` -> pixel values, as the image processor makes them, labels, hashes and file names."""

    def __init__(self, image_processor, reading: Reading):
        self.image_processor = image_processor
        self.reading = reading

    def __call__(self, rows: list[dict]) -> tuple[torch.Tensor, list, list[int], list[str | None]]:
        images = [decode_image(row["image"], self.reading) for row in rows]
        hashes = [pixel_hash(image) for image in images]
        names = [image_name(row["image"]) for row in rows]
        return to_pixel_values(self.image_processor, images), [row.get("label") for row in rows], hashes, names


def extract_features(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    image_processor,
    batch_size: int = 64,
    num_workers: int = 0,
    description: str = "features",
    folder: str | None = None,
    reading: Reading | None = None,
) -> Features:
    """Features of all images of a dataset of `load_images` that can be decoded, in evaluation mode.

    Images that cannot be decoded are skipped and warned of; they are in `failed`.

    Args:
        model: A backbone; the mode of each of its modules is put back afterwards.
        dataset: Rows with `image` and, perhaps, `label`.
        image_processor: Makes pixel values of (channels, height, width) uint8 arrays.
        batch_size: Images per forward pass and process.
        num_workers: Worker processes that decode.
        description: Text of the progress bar.
        folder: The dataset's, which names are relative to.
        reading: How images are read. Default: for the channels that the model takes.

    Returns:
        The same on all processes. Their order is the data set's with one process, and with several where it is not a
        stream; of a stream, each process's share follows the one before.

    Raises:
        ValueError: on all processes, no images, or features that are not finite (names the image); or what else one
            of them fails with, which the others call a ValueError. See also `say_skipped`.
    """
    state = PartialState()
    reading = reading or Reading(num_channels(model.config))

    def share() -> Features:
        part = dataset
        if state.num_processes > 1:
            part = split_dataset_by_node(dataset, state.process_index, state.num_processes)
        return _extract_share(model, part, image_processor, batch_size, num_workers, description, reading=reading)

    features = _join(of_all_processes(share, description))
    num_images = len(features) + len(features.failed)
    if not num_images:
        raise ValueError(f"there are no images to compute {description} of")
    features.class_names = class_names(dataset)
    features.names = [name_of(path, int(row), folder) for row, path in zip(features.rows, features.names)]
    features.failed = [image | {"name": name_of(image["name"], image["row"], folder)} for image in features.failed]
    say_skipped(features.failed, num_images, description, reading.allow_unread)
    return features


def _join(parts: list[Features]) -> Features:
    failed, first = [], 0
    for part in parts:
        failed += [image | {"row": first + image["row"]} for image in part.failed]
        first += len(part) + len(part.failed)
    parts = [part for part in parts if len(part)] or parts[:1]
    return Features(
        torch.cat([part.features for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.hashes for part in parts]),
        [name for part in parts for name in part.names],
        failed=failed,
    )


def name_of(path: str | None, number: int, folder: str | None) -> str:
    """Return the name of an image: its path, relative to the dataset's folder if it lies there, or its number."""
    if path is None:
        return str(number)
    if folder is not None:
        folder = os.path.expanduser(folder)
        for root in (os.path.abspath(folder), os.path.realpath(folder)):
            if path.startswith(root + os.sep):
                return path[len(root) + 1 :]
    return path


def class_names(dataset: Dataset | IterableDataset) -> list[str] | None:
    labels = dataset.features.get("label")
    return labels.names if isinstance(labels, ClassLabel) else None


def images_of(args: Namespace, split: str, with_labels: bool = True) -> Dataset | IterableDataset:
    """A split by a command's arguments, see `load_images`; says once what was found in a folder of images."""
    dataset = load_images(
        args.dataset_name, args.dataset_config_name, split, args.image_column,
        args.label_column if with_labels else None, args.streaming, with_labels, args.folder_layout, args.tiff_pages,
        args.allow_unread,
    )  # fmt: skip
    if is_path(args.dataset_name):
        _say_account(dataset.info.description)
    return dataset


@lru_cache
def _say_account(account: str) -> None:
    if account and PartialState().is_main_process:
        print(account, file=sys.stderr)


def reading_settings(features: Features) -> dict:
    """How the images of features were read, as far as it is not the default."""
    return {name: value for name, value in features.data.items() if name in READING}


def splits_of(args: Namespace) -> list[str]:
    return split_names(args.dataset_name, args.dataset_config_name, args.streaming, args.folder_layout)


def load_model_of(args: Namespace) -> tuple:
    """Model and image processor by a command's arguments, see `load_model`."""
    return load_model(args.model, args.image_size, DTYPES[args.dtype], args.value_range and tuple(args.value_range))


def describe_data(args: Namespace, split: str, dataset: Dataset | IterableDataset) -> dict:
    """What tells a split from another, before its images are read; of a stream, not whether its files have changed."""
    data = {"name": args.dataset_name, "config": args.dataset_config_name, "split": split}
    data |= {"image_column": args.image_column, "label_column": args.label_column}
    reading = {name: getattr(args, name) for name in READING}
    data |= {name: value for name, value in reading.items() if value != READING[name]}
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
    description: str, kind: str = "cls", reading: Reading | None = None,
) -> Features:  # fmt: skip
    """`extract_features` of what one process gets. Names are paths, or None; rows count from the share's first."""
    reading = (reading or Reading(num_channels(model.config))).of(dataset.features)
    collate = DecodableImages(ImageCollator(image_processor, reading))
    # a generator of its own: without one, evaluation in the midst of training changes what training draws next
    loader = Loader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator()
    )
    num_batches = math.ceil(len(dataset) / batch_size) if isinstance(dataset, Dataset) else None
    features, labels, hashes, names, failed = [], [], [], [], []
    # on a terminal alone
    disable = None if PartialState().is_main_process else True
    with evaluating(model):
        for collated, reasons in tqdm(loader, description, num_batches, leave=False, disable=disable):
            first = len(names) + len(failed)
            failed += [
                {"name": path, "reason": reason, "row": first + position}
                for position, (path, reason) in reasons.items()
            ]
            if isinstance(collated, BrokenImageError):
                raise collated
            if collated is None:
                continue
            pixel_values, batch_labels, batch_hashes, batch_names = collated
            rows = _compute(model, pixel_values, kind)
            is_finite = rows.isfinite().flatten(1).all(1)
            if not is_finite.all():
                row = int((~is_finite).nonzero()[0])
                name = batch_names[row] or f"number {len(labels) + row} (from 0) of this process's share"
                raise ValueError(f"{description}: the model's features of image {name} are not finite")
            features.append(rows)
            labels.extend(batch_labels)
            hashes.extend(batch_hashes)
            names.extend(batch_names)
    return Features(
        torch.cat(features) if features else torch.empty(0, 1), to_labels(labels), np.array(hashes, dtype=np.int64),
        names, failed=failed,
    )  # fmt: skip


def _compute(model: PreTrainedModel, pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return features in fp32 on the CPU: (batch, hidden), or (batch, patches, hidden) for the kind `patch`."""
    if kind == "cls":
        return pooled(model, run_model(model, pixel_values)).float().cpu()
    patches = tokens(model, pixel_values)[-1].patches.float().flatten(1, 2)
    return (patches if kind == "patch" else patches.mean(1)).cpu()


def write_features(
    path: Path,
    name: str,
    model: PreTrainedModel,
    dataset: Dataset,
    image_processor,
    data: dict,
    batch_size: int = 64,
    num_workers: int = 0,
    overwrite: bool = False,
    kind: str = "cls",
    reading: Reading | None = None,
) -> dict:
    """Write the features of a split to a file, unless they are there already.

    Every process computes parts of its own, in the order of the dataset. The main process then joins them. Images that
    cannot be decoded are skipped and warned of.

    Args:
        path: The file, a .parquet, .npz or .csv.
        name: The model's, for the manifest.
        data: What is known of the data set beforehand, for the manifest.
        overwrite: Whether to replace features of another model, dataset, image processor, dtype or kind of tokens.
        kind: `cls` for pooled features, `mean` for the mean of the last block's patch tokens, `patch` for all of them.
        Others: see `extract_features`.

    Returns:
        The manifest: `num_images` with features, and those that `failed`, each with `name`, `reason` and `row`.

    Raises:
        ValueError: a stream, of which no part can be read alone; features of another model, dataset, image processor,
            dtype or kind at `path`, or damaged ones; see also `say_skipped`.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError("features of a stream cannot be kept: leave out --streaming or --features")
    state = PartialState()
    manifest = {
        "model": describe_model(model, name),
        "data": data,
        "image_processor": json.loads(json.dumps(image_processor.to_dict(), default=str)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": kind,
        "class_names": class_names(dataset),
    }
    part_size = PATCH_PART_SIZE if kind == "patch" else PART_SIZE
    parts = [_part(path, number) for number in range(math.ceil(len(dataset) / part_size))]
    complete = _find_kept(path, manifest, overwrite)
    others = _find_other_parts(path, manifest | {"part_size": part_size}, overwrite or complete is not None)
    state.wait_for_everyone()  # all have looked before the first one writes

    def say(about: dict, is_any_share: bool) -> None:
        what, num_images = f"split {data['split']} of {data['name']}", about["num_images"] + len(about["failed"])
        say_skipped(about["failed"], num_images, what, is_any_share, "When they are repaired, give --overwrite.")

    if complete is not None:
        if state.is_main_process and not others:
            _remove_parts(path)  # of a command that was killed at its end
        say(complete, is_any_share=True)
        return complete
    if state.is_main_process:
        for part in others:
            part.unlink()
    state.wait_for_everyone()
    label_type = dataset.features.arrow_schema.field("label").type if "label" in dataset.column_names else None

    def share() -> None:
        """Compute this process's parts."""
        for number in range(state.process_index, len(parts), state.num_processes):
            if parts[number].exists():
                continue
            first = number * part_size
            rows = dataset.select(range(first, min(first + part_size, len(dataset))))
            description = f"{data['split']}, part {number + 1} of {len(parts)}"
            computed = _extract_share(
                model, rows, image_processor, batch_size, num_workers, description, kind, reading
            )
            failed = [image | {"row": first + image["row"]} for image in computed.failed]
            failed = [image | {"name": name_of(image["name"], image["row"], data["name"])} for image in failed]
            names = [name_of(file, first + int(row), data["name"]) for row, file in zip(computed.rows, computed.names)]
            table = make_table(
                names, computed.labels.tolist(), computed.hashes, computed.features, label_type,
                manifest["class_names"],
            )  # fmt: skip
            about = {"part_size": part_size, "num_images": len(computed), "failed": failed}
            write_part(parts[number], table, manifest | about)

    of_all_processes(share, f"features of {data['split']}")

    def join() -> dict | None:
        """Write the file from all parts, on the main process, and remove them."""
        if not state.is_main_process:
            return None
        found = [read_manifest(part) for part in parts]
        about = {
            "num_images": sum(part["num_images"] for part in found),
            "failed": [image for part in found for image in part["failed"]],
        }
        if not about["num_images"]:
            _remove_parts(path)
        if not len(dataset):
            raise ValueError(f"split {data['split']} of {data['name']} must have images, got none. Choose another.")
        say(about, reading is not None and reading.allow_unread)
        filled = [part for part, one in zip(parts, found) if one["num_images"]]
        WRITERS[path.suffix](path, filled, manifest | about)
        _remove_parts(path)
        return manifest | about

    return of_all_processes(join, f"features of {data['split']}")[0]


def keep_features(path: Path, *args, **kwargs) -> Features:
    """`extract_features` with a Parquet file to keep them in: see `write_features`."""
    write_features(path, *args, **kwargs)
    return read_features(path)


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.parts") / f"part-{number:05d}.parquet"


def _existing_parts(path: Path) -> list[Path]:
    return sorted(part for part in _part(path, 0).parent.glob("*") if re.fullmatch(r"part-\d{5,}\.parquet", part.name))


def _find_kept(path: Path, manifest: dict, overwrite: bool) -> dict | None:
    """Return the manifest of a complete file of the features that a manifest describes, None if there is none."""
    try:
        kept = read_manifest(path)
        if kept is not None:
            _check_kept(path, kept, manifest)
        return kept
    except ValueError:
        if not overwrite:
            raise
        return None


def _find_other_parts(path: Path, manifest: dict, overwrite: bool) -> list[Path]:
    """Return the parts to overwrite, which are not of the features that a manifest describes."""
    others = []
    for part in _existing_parts(path):
        try:
            _check_kept(part, read_manifest(part), manifest)
        except ValueError:
            if not overwrite:
                raise
            others.append(part)
    return others


def _check_kept(path: Path, kept: dict, manifest: dict) -> None:
    """Check that features on disk are those that a manifest describes.

    Raises:
        ValueError: features of something else; names it.
    """
    for key in manifest:
        if key != "class_names" and kept.get(key) != manifest[key]:
            raise ValueError(
                f"{path} has features of another {key} ({_difference(kept.get(key), manifest[key])}). Choose another "
                "--features, or replace them with --overwrite."
            )


def _remove_parts(path: Path) -> None:
    """Remove the parts, and what processes that were killed have left of this file."""
    for part in _existing_parts(path):
        part.unlink()
    folder, target = _part(path, 0).parent, path.resolve()
    for left in (*folder.glob(".part-*.incomplete"), *target.parent.glob(f".{escape(target.name)}.*.incomplete")):
        shutil.rmtree(left, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _difference(kept, given) -> str:
    if not isinstance(kept, dict) or not isinstance(given, dict):
        return f"{kept}, not {given}"
    names = [name for name in dict.fromkeys([*kept, *given]) if kept.get(name) != given.get(name)]
    return ", ".join(f"{name} {kept.get(name)}, not {given.get(name)}" for name in names)


def read_features(path: Path) -> Features:
    """Read a Parquet file of `write_features`.

    Raises:
        ValueError: if there is nothing, or not all of it yet, or a file that is damaged.
    """
    manifest = read_manifest(path)
    if manifest is None:
        if parts := _existing_parts(path):
            raise ValueError(
                f"the features in {parts[0].parent} are not complete; run the command that made them again"
            )
        raise ValueError(f"there are no features in {path}: no such file. Run `dino-eval features` first.")
    names, labels, hashes, features = [], [], [], None
    for table in read_tables(path):
        rows = to_matrix(table["features"])
        if features is None:
            features = torch.empty(manifest["num_images"], *rows.shape[1:])
        features.numpy()[len(names) : len(names) + len(rows)] = rows
        names += table["name"].to_pylist()
        labels += table["label"].to_pylist() if "label" in table.column_names else [None] * len(rows)
        hashes.append(table["pixel_hash"].to_numpy())
    hashes = np.concatenate(hashes)
    found = Features(
        features, to_labels(labels), hashes, names, manifest["class_names"], manifest["model"],
        manifest["data"], manifest["failed"],
    )  # fmt: skip
    found.data |= content(found)
    return found


def features_of(args: Namespace, split: str, with_labels: bool = False) -> Features:
    """Features of a split by a command's arguments: read from `--features`, or computed now, and then kept there.

    Raises:
        ValueError: neither features nor a model and a dataset; no labels, although `with_labels`.
    """
    if args.features and not args.model:
        if args.image_size is not None:
            raise ValueError("image_size is for a --model; these features are what they are")
        features = read_features(Path(args.features) / f"{split}.parquet")
    else:
        features = _new_features(args, split, with_labels)
    if with_labels:
        return labeled(features, split)
    if not any(isinstance(label, (list, np.ndarray)) for label in features.labels):
        features.labels = plain_labels(features.labels, features.class_names)
    return features


def has_labels(features: Features) -> bool:
    """Return whether every image has one label."""
    return all(label is not None and not isinstance(label, (list, np.ndarray)) for label in features.labels)


def labeled(features: Features, split: str, like: Features | None = None) -> Features:
    """The features of images whose label is known, with labels numbered as those of `like`.

    Raises:
        ValueError: no label is known; see also `plain_labels`.
    """
    labels = plain_labels(features.labels, features.class_names)
    known = known_labels(labels, split)
    labels = plain_labels(labels[known])
    class_names = features.class_names
    if like and like.class_names and class_names:
        labels, class_names = match_names(labels, class_names, like.class_names), like.class_names
    return replace(
        features, features=features.features[known], labels=labels, hashes=features.hashes[known],
        names=[features.names[index] for index in known], class_names=class_names,
    )  # fmt: skip


def check_features(args: Namespace, *names: str, suffix: str = ".parquet") -> None:
    """Check the files in --features that a command will write, before any work.

    Raises:
        ValueError: see `check_outputs`; without --overwrite, also files that are damaged.
    """
    if not (args.features and args.model):
        return
    of_features = Namespace(**vars(args) | {"protocol": "features"})  # whose files they are, whatever the command
    for path in (Path(args.features) / f"{name}{suffix}" for name in names):
        check_outputs(of_features, files_of(path), is_ours=lambda _: is_from_features(path))  # noqa: B023
        check_outputs(of_features, [_part(path, 0), *_existing_parts(path)], is_ours=is_from_features)
        if not args.overwrite:
            read_manifest(path)


def _check_given(args: Namespace) -> None:
    if not args.model or not args.dataset_name:
        raise ValueError(
            "give --model and --dataset_name, or --features, a folder that `dino-eval features` has filled"
        )


def _new_features(args: Namespace, split: str, with_labels: bool) -> Features:
    _check_given(args)
    check_features(args, split)
    dataset = images_of(args, split)
    if with_labels and "label" not in dataset.column_names:
        raise ValueError(f"split {split} of {args.dataset_name} has no labels. {how_to_label(args.dataset_name)}")
    model, image_processor = load_model_of(args)
    reading = reading_of(args, model)
    data = describe_data(args, split, dataset)
    if args.features:
        path = Path(args.features) / f"{split}.parquet"
        return keep_features(
            path, args.model, model, dataset, image_processor, data, args.batch_size, args.num_workers, args.overwrite,
            reading=reading,
        )  # fmt: skip
    features = extract_features(
        model, dataset, image_processor, args.batch_size, args.num_workers, f"{args.model}, {split}",
        args.dataset_name, reading,
    )  # fmt: skip
    features.model = describe_model(model, args.model)
    features.data = data | content(features)
    return features


def content(features: Features) -> dict:
    """`content_of`, and the number of images that were skipped, if there are any."""
    return content_of(features.hashes) | ({"num_skipped": len(features.failed)} if features.failed else {})


def labelled_features(args: Namespace) -> tuple[Features, Features | None]:
    """Features of the images with a label of the training and the test split.

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
        test = labeled(test, eval_split, like=train)
        warn_of_shared_images(train.hashes, test.hashes)
    return train, test


def warn_of_shared_images(train_hashes: np.ndarray, test_hashes: np.ndarray) -> None:
    num_shared = int(np.isin(test_hashes, train_hashes).sum())
    if num_shared and PartialState().is_main_process:
        warnings.warn(
            f"{num_shared} of the {len(test_hashes)} test images are training images, too: what is measured on them "
            "says little"
        )


def find_eval_split(args: Namespace) -> str:
    """--eval_split or, without it, see `choose_eval_split`.

    Raises:
        ValueError: see `choose_eval_split`.
    """
    if args.eval_split:
        return args.eval_split
    if args.features and not args.model:
        names = kept_splits(Path(args.features))
    else:
        _check_given(args)
        names = splits_of(args)
    return choose_eval_split(names, args.train_split)


def kept_splits(folder: Path) -> list[str]:
    """The splits whose pooled features a folder holds."""
    return [
        path.stem
        for path in sorted(folder.glob("*.parquet"))
        if is_from_features(path) and read_manifest(path)["data"].get("split") == path.stem
    ]  # else patch tokens, or inputs of `linear`


def choose_eval_split(names: Sequence[str], train_split: str) -> str:
    """The split to evaluate on: `test`, else `validation`, else the training split itself, if there is no other.

    Raises:
        ValueError: others alone.
    """
    for name in ("test", "validation"):
        if name in names:
            return name
    if list(names) == [train_split]:
        return train_split
    raise ValueError(f"choose the split to evaluate on by --eval_split; there are {', '.join(names) or 'none'}")


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument("--splits", nargs="+", help="splits (default: all that there are)")
    parser.add_argument(
        "--tokens",
        choices=TOKENS,
        default="cls",
        help="features of an image: cls, the pooled output that other protocols read; mean, the mean of the last "
        "block's patch tokens; patch, all of them. Default: %(default)s",
    )
    parser.add_argument(
        "--format",
        choices=[suffix.removeprefix(".") for suffix in WRITERS],
        default="parquet",
        help="format of the files, of which other protocols read Parquet. Default: %(default)s",
    )


def measure(args: Namespace) -> None:
    """The command `features`: fills --features."""
    if not args.features:
        raise ValueError("give --features, the folder to write")
    if not args.model or not args.dataset_name:
        raise ValueError("give --model and --dataset_name")
    if args.tokens == "patch" and args.format == "csv":
        raise ValueError(
            "format must be parquet or npz for patch tokens, got csv. Choose another --format or --tokens."
        )
    splits = args.splits or splits_of(args)
    names = {split: split if args.tokens == "cls" else f"{split}-{args.tokens}" for split in splits}
    check_features(args, *names.values(), suffix=f".{args.format}")
    for split in splits:
        dataset = images_of(args, split)
        model, image_processor = load_model_of(args)
        path = Path(args.features) / f"{names[split]}.{args.format}"
        manifest = write_features(
            path, args.model, model, dataset, image_processor, describe_data(args, split, dataset), args.batch_size,
            args.num_workers, args.overwrite, args.tokens, reading_of(args, model),
        )  # fmt: skip
        if PartialState().is_main_process:
            print(f"wrote features of {manifest['num_images']} images of {split} to {path}")
