"""Batches of crops, and where they stand: endless, and the same whatever the number of workers.

The training process decides which images are next, all processes by the same rule: the images of a global batch follow
one another in the epoch's order, and every process takes its slice of them. So none is lost or repeated, no process
runs out before the others, and a resume needs no more than the place in that order. Workers only decode and crop.

Map-style data is in a new random order every epoch. Streams are read by one thread, in windows of consecutive images
that are shuffled among each other; shards, of local parquet its row groups, change their order every epoch.
"""

import atexit
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cached_property, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import Table
from torch.utils.data import Dataset as TorchDataset

from evaluation.decoding import BrokenImageError, EncodedImage, Reading
from evaluation.images import is_path, load_images
from evaluation.workers import Loader
from modeling_dino.command_line import one_line

from .agreement import Agreement
from .arguments import TrainingArguments
from .augmentation import CropBatch, MultiCrop, collate, finish_crops
from .start import count, explain_too_few


SHUFFLE_WINDOW = 1024  # images of a stream that are shuffled among each other
READ_AHEAD = 4  # batches of a stream that are read before they are needed
NETWORK_ERRORS = (OSError, *CONNECTION_ERRORS_TO_RETRY)

logger = logging.getLogger(__name__)


class Images(NamedTuple):
    """This process's images of a step: indices of map-style data, or rows of a stream."""

    epoch: int
    positions: list[int]  # in the epoch
    images: list[int] | list[dict]
    state: dict | None  # from which the next step goes on; None before the last batch of a step


class DataError(ValueError):
    """Why there is no next batch."""


class CropDataset(TorchDataset):
    """Crops of an image in an epoch: of the row at an index, or of a row that has been read already."""

    def __init__(self, dataset: Dataset | None, multi_crop: MultiCrop, reading: Reading):
        self.dataset = dataset
        self.multi_crop = multi_crop
        self.reading = reading

    def __getitem__(self, epoch_position_image: tuple[int, int, int | dict]):
        epoch, position, image = epoch_position_image
        row = image if isinstance(image, dict) else self.dataset[image]
        try:
            encoded = EncodedImage(row["image"], self.reading)
            notes = [{"image": encoded.name, "note": note} for note in encoded.notes]
            return *self.multi_crop(encoded, epoch, position), notes
        except BrokenImageError as error:
            return error


def collate_what_decodes(samples: list, args: TrainingArguments) -> CropBatch:
    """A batch in which every broken image has been replaced by the next one of the batch that is whole.

    Raises:
        ValueError: if none of them is.
    """
    skipped = replace_broken_(samples)
    noted = [note for sample in {id(sample): sample for sample in samples}.values() for note in sample[2]]
    batch = collate(samples)._replace(skipped=skipped, noted=noted)
    if args.augmentation_device == "host":
        return batch._replace(crops=finish_crops(batch, "cpu", args), photometrics=None)
    return batch


def replace_broken_(samples: list) -> list[dict[str, str]]:
    """Puts the next whole sample in the place of each that is broken; returns what was wrong with these."""
    whole = [sample for sample in samples if not isinstance(sample, BrokenImageError)]
    if not whole:
        raise ValueError(f"none of the {len(samples)} images of a batch can be decoded; the first: {samples[0]}")
    skipped, following = [], whole[0]
    for place in reversed(range(len(samples))):
        if isinstance(samples[place], BrokenImageError):
            error, samples[place] = samples[place], following
            skipped.insert(0, {"image": error.name, "kind": error.kind, "reason": str(error)})
        following = samples[place]
    return skipped


class StreamTimeoutError(Exception):
    """An image was waited for in vain."""


def read_ahead(
    items: Iterator, depth: int, timeout: float, stopped: Event, is_interrupted: Callable[[], bool]
) -> Iterator:
    """The same items, of an endless iterator, read by a thread up to `depth` of them before they are asked for.

    Sets `stopped` when no more are wanted.

    Raises:
        StreamTimeoutError: when one does not come within `timeout` seconds, or until `is_interrupted`.
    """
    wanted, found, patience = SimpleQueue(), SimpleQueue(), 5

    def read() -> None:
        while wanted.get() and not stopped.is_set():
            try:
                found.put((next(items), None))
            except Exception as error:  # is raised where the item is asked for
                found.put((None, error))

    # its end is waited for a while, as a Python that ends within Arrow's reader is aborted
    reader = Thread(target=read, daemon=True)
    reader.start()

    def stop() -> None:
        stopped.set()
        wanted.put(False)
        reader.join(patience)

    def next_found():
        end = time.monotonic() + timeout
        while (rest := end - time.monotonic()) > 0:
            with suppress(Empty):
                return found.get(timeout=min(rest, 0.5))
            if is_interrupted():
                break
        raise StreamTimeoutError

    atexit.register(stop)
    try:
        for _ in range(depth):
            wanted.put(True)
        while True:
            try:
                item, error = next_found()
            except StreamTimeoutError:
                patience = 0  # it waits for a network
                raise
            if error is not None:
                raise error
            wanted.put(True)
            yield item
    finally:
        atexit.unregister(stop)
        stop()


def is_network_trouble(error: Exception) -> bool:
    """Whether it may pass: not what the Hub refuses, and not a file that is not there."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return not isinstance(error, (FileNotFoundError, PermissionError))


def load_training_images(args: TrainingArguments) -> tuple[Dataset | IterableDataset, list[int | None], list[str]]:
    """The images of all datasets that are trained on, how many each has, where that is known, and accounts of folders.

    Map-style data sets follow one another; streams are mixed. By `mix_weights`, the epoch of a stream lasts until
    every image has been seen, and those of small data sets come several times.
    """
    parts, lengths, accounts = [], [], []
    for number, name in enumerate((args.dataset_name, *args.mix_with)):
        config_name, column = (None, None) if number else (args.dataset_config_name, args.image_column)
        part = load_images(
            name, config_name, args.train_split, column, None, args.streaming, False, args.folder_layout,
            args.tiff_pages, args.allow_unread,
        )  # fmt: skip
        accounts += [part.info.description] if part.info.description and is_path(name) else []
        if isinstance(part, Dataset):
            lengths.append(len(part))
        else:
            known = (part.info.splits or {}).get(args.train_split)
            lengths.append(known.num_examples if known else None)
            if is_path(name):
                # row groups of parquet then change their order, not only files; on the Hub each costs requests
                part = part.reshard()
        parts.append(part)
        if part.features != parts[0].features:
            raise ValueError(
                f"images of {name} and {args.dataset_name} are stored differently: {part.features['image']} and "
                f"{parts[0].features['image']}"
            )
    if len(parts) == 1:
        return parts[0], lengths, accounts
    if isinstance(parts[0], Dataset):
        return concatenate_datasets(parts), lengths, accounts
    if not args.mix_weights and None in lengths:
        raise ValueError(
            "how many images these streams have is not known; to mix them, give --mix_weights, and --num_examples or "
            "--max_steps"
        )
    weights = np.array(args.mix_weights or lengths, dtype=float)
    mixed = interleave_datasets(
        parts,
        probabilities=(weights / weights.sum()).tolist(),
        seed=args.seed,
        stopping_strategy="all_exhausted" if args.mix_weights else "all_exhausted_without_replacement",
    )
    return mixed, lengths, accounts


def value_types(dataset: Dataset | IterableDataset, reading: Reading, first: list[dict] | None) -> list[str]:
    """Return the types of the values of images, by some of their headers.

    Args:
        dataset: The images.
        reading: How to read them.
        first: Of a stream, its first rows; of a run that is done, None.
    """
    types = set()
    if isinstance(dataset, Dataset):
        first = [dataset[int(index)] for index in np.linspace(0, len(dataset) - 1, min(16, len(dataset)))]
    for row in dataset.take(1) if first is None else first:
        with suppress(BrokenImageError):
            types.add(str(EncodedImage(row["image"], reading).dtype))
    return sorted(types)


def example_of(dataset: Dataset | IterableDataset, first: list[dict] | None) -> str:
    """Return the ending of an image's file, as .tif; nothing for images without a file name."""
    row = dataset[0] if isinstance(dataset, Dataset) else (first or [{"image": None}])[0]
    path = row["image"].get("path") if isinstance(row["image"], dict) else None
    return Path(path or "").suffix.lower()


def order_of_epoch(seed: int, epoch: int, lengths: list[int], weights: list[float]) -> np.ndarray:
    """Indices of an epoch's images among those of all data sets, one after another.

    An epoch has as many images as all data sets have. Without `weights` it is a permutation of them. With, each data
    set has its share, and goes on in the next epoch where it stopped in this one: all its images come equally often.
    """
    rng, total = np.random.default_rng([seed, epoch]), sum(lengths)
    if not weights:
        return rng.permutation(total)
    ends = np.rint(np.cumsum(weights) / sum(weights) * total).astype(int)
    shares, firsts = np.diff(ends, prepend=0), np.cumsum([0, *lengths])
    indices = []
    for number, (share, length) in enumerate(zip(shares.tolist(), lengths)):
        turns = range(epoch * share // length, -(-(epoch + 1) * share // length))
        in_turns = [np.random.default_rng([seed, number, turn]).permutation(length) for turn in turns]
        skipped = epoch * share - turns.start * length
        indices += [firsts[number] + np.concatenate([[], *in_turns])[skipped : skipped + share].astype(int)]
    return rng.permutation(np.concatenate(indices))


class CropLoader:
    """Endless batches of crops: `num_images` an epoch (unknown for some streams), `state_dict` of where it stands.

    Args:
        args: Where the images come from, and what becomes of them.
        num_channels: Channels that the model takes.
        num_accumulated: Batches of a process that make one step.
    """

    def __init__(self, args: TrainingArguments, num_channels: int, num_accumulated: int = 1):
        self.args = args
        self.dataset, self.lengths, self.accounts = load_training_images(args)
        self.reading = args.reading(num_channels).of(self.dataset.features)
        self.is_map_style = isinstance(self.dataset, Dataset)
        self.num_images = None if None in self.lengths else sum(self.lengths)
        if not self.is_map_style:
            self.num_images = args.num_examples or self.num_images
        self.num_accumulated = num_accumulated
        num_processes = args.dry_run_processes or PartialState().num_processes
        self.global_batch_size = args.per_device_train_batch_size * num_processes * num_accumulated
        self.state = {"epoch": 0, "position": 0, "window": None}
        self.is_remote = not all(map(is_path, (args.dataset_name, *args.mix_with)))
        self.trouble = None  # what the network last failed with
        self.stopped = Event()  # when no more images are wanted
        self.waited = self.waited_for_stream = 0.0  # seconds, since there was advice on it

    @cached_property
    def places(self) -> np.ndarray:
        """Places of this process's images in a global batch. Computed late: only then is the batch known to fit."""
        process = PartialState()
        owners = np.arange(self.global_batch_size) // self.args.per_device_train_batch_size % process.num_processes
        return np.flatnonzero(owners == process.process_index)

    def batches(
        self,
        num_batches: int,
        state: dict | None = None,
        agreement: Agreement | None = None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[CropBatch]:
        """The next `num_batches`; from the start, or from where a `state_dict` was taken, which is between two steps.

        Raises:
            DataError: on all processes, if one of them cannot get its batch, or waits for a stream and is interrupted.
                The state stays that of the last step.
        """
        self.state = state or self.state
        agreement = agreement or Agreement(self.args.stream_timeout)
        images = self._map_style(**self.state) if self.is_map_style else self._stream(**self.state)
        if not self.is_map_style:
            images = read_ahead(images, READ_AHEAD, self.args.stream_timeout, self.stopped, is_interrupted)
        underway = deque()  # batches that workers are at

        def next_images() -> Iterator[list[tuple[int, int, int | dict]]]:
            for _ in range(num_batches):
                asked = time.perf_counter()
                try:
                    step = next(images)
                except StreamTimeoutError:
                    if is_interrupted():
                        raise ValueError("the run was told to stop while it waited for the stream") from None
                    reason = f" ({self.trouble})" if self.trouble else ""
                    raise ValueError(
                        f"no image came from the stream for stream_timeout = {self.args.stream_timeout:g} s{reason}"
                    ) from None
                self.waited_for_stream += time.perf_counter() - asked
                underway.append(step)
                yield [(step.epoch, position, image) for position, image in zip(step.positions, step.images)]

        crops = CropDataset(
            self.dataset if self.is_map_style else None,
            MultiCrop(self.args, self.args.seed),
            self.reading,
        )
        loader = Loader(
            crops,
            batch_sampler=next_images(),
            collate_fn=partial(collate_what_decodes, args=self.args),
            num_workers=self.args.num_workers,
            pin_memory=torch.cuda.is_available(),
            # of its own, so that making a loader draws nothing from the generator that drops paths
            generator=torch.Generator(),
        )
        with closing(images), closing(iter(loader)) as crops_of_batches:
            for _ in range(num_batches):
                asked = time.perf_counter()
                batch = self._next_on_all(crops_of_batches, agreement)
                self.waited += time.perf_counter() - asked
                taken = underway.popleft()
                self.state = taken.state or self.state
                yield batch._replace(images=taken)
            next(crops_of_batches, None)  # there is none: the workers end

    def _next_on_all(self, batches: Iterator[CropBatch], agreement: Agreement) -> CropBatch:
        """The next batch. If a process cannot get one, that is an error on all, so that none waits for another."""
        batch = reason = cause = None
        try:
            batch = next(batches)
        except Exception as error:  # of a library's reader, or that a worker was killed
            reason, cause = one_line(error), error
        reason = agreement.first_of_any(reason)
        if reason is not None:
            raise DataError(reason) from cause
        return batch

    def _map_style(self, epoch: int, position: int, window: None) -> Iterator[Images]:
        """The images that do not fill the last global batch of an epoch are left out; which these are changes."""
        while True:
            order = order_of_epoch(self.args.seed, epoch, self.lengths, self.args.mix_weights)
            while position + self.global_batch_size <= self.num_images:
                images = order[position + self.places].tolist()
                state = {"epoch": epoch, "position": position + self.global_batch_size, "window": None}
                yield from self._batches_of_step(epoch, position, images, state)
                position += self.global_batch_size
            epoch, position = epoch + 1, 0

    def _stream(self, epoch: int, position: int, window: dict | None) -> Iterator[Images]:
        """Windows are read as Arrow tables, so that only the images of this process are ever copied.

        Of a window, the state holds where the stream stood before it, and how many of its images were taken.
        """
        dataset = self.dataset.with_format("arrow")
        while True:
            dataset.set_epoch(epoch + 1)  # shuffles the shards; the library leaves them in order in epoch 0
            taken, images, filled = window["taken"] if window else 0, [], 0
            for before, table in self._windows(dataset, window["stream"] if window else None):
                first = position + filled - taken  # which image of the epoch the window begins with
                order = np.random.default_rng([self.args.seed, epoch, first]).permutation(len(table))
                while taken < len(table):
                    part = order[taken : taken + self.global_batch_size - filled]
                    places = filled + np.arange(len(part))  # in the global batch
                    images += table.take(part[np.isin(places, self.places)]).to_pylist()
                    filled, taken = filled + len(part), taken + len(part)
                    if filled == self.global_batch_size:
                        window = {"stream": before, "taken": taken}
                        state = {"epoch": epoch, "position": position + filled, "window": window}
                        yield from self._batches_of_step(epoch, position, images, state)
                        position += filled
                        images, filled = [], 0
                taken = 0
            if not position:
                raise ValueError(explain_too_few(self.args, filled, self.global_batch_size))
            epoch, position, window = epoch + 1, 0, None

    def _batches_of_step(self, epoch: int, position: int, images: list, state: dict) -> Iterator[Images]:
        """This process's images of a step, which begins at a position of the epoch, batch by batch."""
        size = len(images) // self.num_accumulated
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            is_last = first + size == len(images)
            yield Images(epoch, (position + self.places[part]).tolist(), images[part], state if is_last else None)

    def _windows(self, dataset: IterableDataset, before: dict | None) -> Iterator[tuple[dict | None, Table]]:
        """Consecutive images from a state of the stream on, each time with the state before them.

        When the network fails for longer than `datasets` tries again by itself, the last window is read anew.
        """
        pause = 1
        while True:
            if before is not None:
                dataset.load_state_dict(before)
            try:
                for table in dataset.iter(SHUFFLE_WINDOW):
                    yield before, table
                    before, pause = dataset.state_dict(), 1
                return
            except NETWORK_ERRORS as error:
                if not self.is_remote or not is_network_trouble(error) or self.stopped.is_set():
                    raise
                self.trouble = f"{type(error).__name__}: {error}".partition("\n")[0]
                logger.warning("the stream broke off, %s; reading on in %d s", self.trouble, pause)
                self.stopped.wait(pause)
                pause = min(2 * pause, 60)

    def describe(self, images: Images) -> list[dict[str, int | str]]:
        """Where in the data each is: epoch, position in it, and index in the data set or, where it has one, file."""
        described = []
        for position, image in zip(images.positions, images.images):
            row = image if isinstance(image, dict) else self.dataset[image]
            path = row["image"]["path"] if isinstance(row["image"], dict) else None
            place = {"image": path} if path else {} if isinstance(image, dict) else {"index": image}
            described.append({"epoch": images.epoch, "position": position} | place)
        return described

    def advice(self) -> str:
        """What would have made the batches come faster since this was asked last."""
        waited, waited_for_stream = self.waited, self.waited_for_stream
        self.waited = self.waited_for_stream = 0.0
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = self.args.num_workers
        if waited_for_stream > waited / 2:
            return (
                "the stream is slower than the training; do without --streaming, which reads the data once and for all"
            )
        if workers < cores:
            return f"raise --num_workers, which is {workers}; there are {count(cores, 'core')} for each process"
        if self.args.augmentation_device == "host" and torch.cuda.is_available():
            return "--augmentation_device device takes the colours off the workers"
        return (
            f"{count(workers, 'worker')} on {count(cores, 'core')} cannot go faster; store the images smaller, lower "
            "--num_local_crops or take a machine with more cores"
        )

    def state_dict(self) -> dict:
        """Where the last step whose batches were all taken left the data; the same on every process."""
        return self.state
