"""Batches of crops, as a function of the step.

Map-style data: the images of step s are a slice of the epoch's permutation, so nothing has to be remembered to go on
from there, whatever the number of processes and workers. Streams: shards change their order every epoch, images theirs
within a window, and the loader's own state says where it is.
"""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from evaluation.images import decode_image, image_content, load_images

from .arguments import TrainingArguments
from .augmentation import CropBatch, MultiCrop, collate


SHUFFLE_WINDOW = 1024  # images of a stream that are shuffled among each other


class CropDataset(TorchDataset):
    """Crops of the image at (epoch, index)."""

    def __init__(self, dataset: Dataset, multi_crop: MultiCrop, num_channels: int):
        self.dataset = dataset
        self.multi_crop = multi_crop
        self.num_channels = num_channels

    def __getitem__(self, epoch_and_index: tuple[int, int]):
        epoch, index = epoch_and_index
        return crop(self.dataset[index], epoch, self.multi_crop, self.num_channels)


class CropStream(TorchIterableDataset):
    """Crops of the images of a stream. Its `epoch` lives in shared memory, where persistent workers see it change."""

    def __init__(self, dataset: IterableDataset, multi_crop: MultiCrop, num_channels: int):
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.dataset = dataset.map(self._shuffle_window, batched=True, batch_size=SHUFFLE_WINDOW, with_indices=True)
        self.multi_crop = multi_crop
        self.num_channels = num_channels

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch + 1)  # shuffles the shards; the library leaves them in order in epoch 0

    def _shuffle_window(self, rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        """A permutation with a seed of its own: no buffer that a resume would lose."""
        order = np.random.default_rng([self.multi_crop.seed, int(self.epoch), indices[0]]).permutation(len(indices))
        return {name: [column[i] for i in order] for name, column in rows.items()}

    def __iter__(self):
        for row in self.dataset:
            yield crop(row, int(self.epoch), self.multi_crop, self.num_channels)

    def state_dict(self) -> dict:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.dataset.load_state_dict(state)


def crop(row: dict, epoch: int, multi_crop: MultiCrop, num_channels: int):
    content = image_content(row["image"])
    return multi_crop(decode_image(row["image"], num_channels, content), content, epoch)


class StepSampler:
    """For every one of `steps`, this process's (epoch, index) pairs: its slice of the epoch's permutation.

    The images that do not fill the last global batch of an epoch are left out of it; which these are changes.
    """

    def __init__(self, num_images: int, batch_size: int, steps: range, seed: int):
        state = PartialState()
        self.num_images = num_images
        self.batch_size = batch_size
        self.global_batch_size = batch_size * state.num_processes
        self.offset = batch_size * state.process_index
        self.steps = steps
        self.seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.global_batch_size
        order, order_epoch = None, None
        for step in self.steps:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.num_images), epoch
            start = position * self.global_batch_size + self.offset
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]

    def __len__(self) -> int:
        return len(self.steps)


class CropLoader:
    """Endless batches of crops: `num_images` an epoch (unknown for some streams), `state_dict` of where it stands."""

    def __init__(self, args: TrainingArguments, num_channels: int):
        self.args = args
        self.num_channels = num_channels
        self.dataset = load_images(
            args.dataset_name, args.dataset_config_name, args.train_split, args.image_column, None, args.streaming
        ).select_columns("image")
        if isinstance(self.dataset, Dataset):
            self.num_images = len(self.dataset)
        else:
            known = (self.dataset.info.splits or {}).get(args.train_split)
            self.num_images = args.num_examples or (known.num_examples if known else None)

    def batches(self, num_steps: int, first_step: int = 0, state: dict | None = None) -> Iterator[CropBatch]:
        """Batches of steps `first_step` to `num_steps`; a stream goes on from the `state` of its `state_dict`."""
        multi_crop = MultiCrop(self.args, self.args.seed)
        options = {
            "num_workers": self.args.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.args.num_workers > 0,
            "collate_fn": collate,
            # of its own, so that making a loader draws nothing from the generator that drops paths
            "generator": torch.Generator(),
        }
        batch_size = self.args.per_device_train_batch_size
        if isinstance(self.dataset, Dataset):
            crops = CropDataset(self.dataset, multi_crop, self.num_channels)
            sampler = StepSampler(self.num_images, batch_size, range(first_step, num_steps), self.args.seed)
            yield from DataLoader(crops, batch_sampler=sampler, **options)
            return

        process = PartialState()
        shard = split_dataset_by_node(self.dataset, process.process_index, process.num_processes)
        stream = CropStream(shard, multi_crop, self.num_channels)
        self.loader = StatefulDataLoader(stream, batch_size=batch_size, drop_last=True, **options)
        self.epoch = 0
        if state is not None:
            if state["num_workers"] != self.args.num_workers:
                raise ValueError(
                    f"the stream was left by {state['num_workers']} workers a process and goes on with as many; "
                    f"num_workers is {self.args.num_workers}"
                )
            self.epoch = state["epoch"]
            self.loader.load_state_dict(state["loader"])
        while True:
            stream.set_epoch(self.epoch)
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty and state is None:
                raise ValueError(
                    f"{self.args.dataset_name} has fewer images per process and worker than one batch of {batch_size}"
                )
            self.epoch, state = self.epoch + 1, None

    def state_dict(self) -> dict | None:
        """Where a stream stands after the last batch taken; map-style data needs nothing but the step."""
        if isinstance(self.dataset, Dataset):
            return None
        return {"epoch": self.epoch, "num_workers": self.args.num_workers, "loader": self.loader.state_dict()}
