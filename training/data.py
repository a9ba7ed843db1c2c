"""Batches of crops, and where they stand: endless, and the same whatever the number of workers.

The training process decides which images are next, all processes by the same rule: the images of a global batch follow
one another in the epoch's order, and every process takes its slice of them. So none is lost or repeated, no process
runs out before the others, and a resume needs no more than the place in that order. Workers only decode and crop.

Map-style data is in a new random order every epoch. Streams are read by one thread, in windows of consecutive images
that are shuffled among each other; shards, of local parquet its row groups, change their order every epoch.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from evaluation.images import BrokenImageError, EncodedImage, is_path, load_images

from .arguments import TrainingArguments
from .augmentation import CropBatch, MultiCrop, collate


SHUFFLE_WINDOW = 1024  # images of a stream that are shuffled among each other
READ_AHEAD = 4  # batches of a stream that are read before they are needed


class Images(NamedTuple):
    """This process's images of a step: indices of map-style data, or rows of a stream."""

    epoch: int
    images: list[int] | list[dict]
    state: dict  # from which the next step goes on


class CropDataset(TorchDataset):
    """Crops of an image in an epoch: of the row at an index, or of a row that has been read already."""

    def __init__(self, dataset: Dataset | None, multi_crop: MultiCrop, num_channels: int):
        self.dataset = dataset
        self.multi_crop = multi_crop
        self.num_channels = num_channels

    def __getitem__(self, epoch_and_image: tuple[int, int | dict]):
        epoch, image = epoch_and_image
        row = image if isinstance(image, dict) else self.dataset[image]
        try:
            return self.multi_crop(EncodedImage(row["image"], self.num_channels), epoch)
        except BrokenImageError as error:
            return error


def collate_what_decodes(samples: list) -> CropBatch:
    """A batch in which every broken image has been replaced by the next one of the batch that is whole.

    Raises:
        ValueError: if none of them is.
    """
    whole = [sample for sample in samples if not isinstance(sample, BrokenImageError)]
    if len(whole) == len(samples):
        return collate(samples)
    if not whole:
        raise ValueError(f"none of the {len(samples)} images of a batch can be decoded; the first: {samples[0]}")
    skipped, following = [], whole[0]
    for place in reversed(range(len(samples))):
        if isinstance(samples[place], BrokenImageError):
            error, samples[place] = samples[place], following
            skipped.insert(0, {"image": error.name, "kind": error.kind, "reason": str(error)})
        following = samples[place]
    return collate(samples)._replace(skipped=skipped)


def read_ahead(items: Iterator, depth: int) -> Iterator:
    """The same items, of an endless iterator, read by a thread up to `depth` of them before they are asked for."""
    pool = ThreadPoolExecutor(1)
    try:
        ahead = deque(pool.submit(next, items) for _ in range(depth))
        while True:
            item = ahead.popleft().result()
            ahead.append(pool.submit(next, items))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class CropLoader:
    """Endless batches of crops: `num_images` an epoch (unknown for some streams), `state_dict` of where it stands."""

    def __init__(self, args: TrainingArguments, num_channels: int):
        self.args = args
        self.num_channels = num_channels
        self.dataset = load_images(
            args.dataset_name, args.dataset_config_name, args.train_split, args.image_column, None, args.streaming
        ).select_columns("image")
        self.is_map_style = isinstance(self.dataset, Dataset)
        if self.is_map_style:
            self.num_images = len(self.dataset)
        else:
            known = (self.dataset.info.splits or {}).get(args.train_split)
            if is_path(args.dataset_name):
                # row groups of parquet then change their order, not only files; on the Hub each costs requests
                self.dataset = self.dataset.reshard()
            self.num_images = args.num_examples or (known.num_examples if known else None)
        process, batch_size = PartialState(), args.per_device_train_batch_size
        self.global_batch_size = batch_size * process.num_processes
        self.slice = slice(batch_size * process.process_index, batch_size * (process.process_index + 1))
        self.state = {"epoch": 0, "position": 0, "window": None}

    def batches(self, num_batches: int, state: dict | None = None) -> Iterator[CropBatch]:
        """The next `num_batches`; from the start, or from where a `state_dict` was taken."""
        self.state = state or self.state
        images = self._map_style(**self.state) if self.is_map_style else self._stream(**self.state)
        if not self.is_map_style:
            images = read_ahead(images, READ_AHEAD)
        states = deque()  # of batches that workers are at

        def next_images() -> Iterator[list[tuple[int, int | dict]]]:
            for _ in range(num_batches):
                step = next(images)
                states.append(step.state)
                yield [(step.epoch, image) for image in step.images]

        crops = CropDataset(
            self.dataset if self.is_map_style else None, MultiCrop(self.args, self.args.seed), self.num_channels
        )
        loader = DataLoader(
            crops,
            batch_sampler=next_images(),
            collate_fn=collate_what_decodes,
            num_workers=self.args.num_workers,
            pin_memory=torch.cuda.is_available(),
            # of its own, so that making a loader draws nothing from the generator that drops paths
            generator=torch.Generator(),
        )
        for batch in loader:
            self.state = states.popleft()
            yield batch

    def _map_style(self, epoch: int, position: int, window: None) -> Iterator[Images]:
        """The images that do not fill the last global batch of an epoch are left out; which these are changes."""
        while True:
            order = np.random.default_rng([self.args.seed, epoch]).permutation(self.num_images)
            while position + self.global_batch_size <= self.num_images:
                images = order[position:][self.slice].tolist()
                position += self.global_batch_size
                yield Images(epoch, images, {"epoch": epoch, "position": position, "window": None})
            epoch, position = epoch + 1, 0

    def _stream(self, epoch: int, position: int, window: dict | None) -> Iterator[Images]:
        """Windows are read as Arrow tables, so that only the images of this process are ever copied.

        Of a window, the state holds where the stream stood before it, and how many of its images were taken.
        """
        dataset = self.dataset.with_format("arrow")
        while True:
            dataset.set_epoch(epoch + 1)  # shuffles the shards; the library leaves them in order in epoch 0
            before, taken, images, filled = None, 0, [], 0
            if window is not None:
                before, taken = window["stream"], window["taken"]
                if before is not None:
                    dataset.load_state_dict(before)
            for table in dataset.iter(SHUFFLE_WINDOW):
                first = position + filled - taken  # which image of the epoch the window begins with
                order = np.random.default_rng([self.args.seed, epoch, first]).permutation(len(table))
                while taken < len(table):
                    part = order[taken : taken + self.global_batch_size - filled]
                    places = filled + np.arange(len(part))  # in the global batch
                    mine = part[(self.slice.start <= places) & (places < self.slice.stop)]
                    images += table.take(mine).to_pylist()
                    filled, taken = filled + len(part), taken + len(part)
                    if filled == self.global_batch_size:
                        position += filled
                        state = {"stream": before, "taken": taken}
                        yield Images(epoch, images, {"epoch": epoch, "position": position, "window": state})
                        images, filled = [], 0
                before, taken = dataset.state_dict(), 0
            if not position:
                raise ValueError(
                    f"{self.args.dataset_name} has fewer images than one batch of {self.global_batch_size} for all "
                    "processes"
                )
            epoch, position, window = epoch + 1, 0, None

    def state_dict(self) -> dict:
        """Where the last batch that was taken left the data; the same on every process."""
        return self.state
