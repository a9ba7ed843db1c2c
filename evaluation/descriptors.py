"""Descriptors of images that a protocol resizes by its own rule, in order, whatever the number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image as PillowImage
from torch.utils.data import Subset
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .decoding import BrokenImageError, Reading, decode_8_bits, pixel_hash
from .models import mean_and_std, num_channels
from .processes import of_all_processes
from .skipped import DecodableImages, refuse_incomplete, say_skipped
from .workers import Loader


@dataclass
class Descriptors:
    """features: (images, hidden) in fp32 on the CPU. hashes: (images,) in int64, equal for images of equal pixels."""

    features: torch.Tensor
    hashes: np.ndarray


def image_rows(paths: Sequence[Path]) -> list[dict]:
    """Rows of `describe_images` for image files.

    Raises:
        ValueError: files that are missing.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} images are missing, such as {missing[0]}")
    return [{"image": {"path": str(path), "bytes": None}} for path in paths]


class _Collator:
    def __init__(self, resize: Callable, image_processor, num_channels: int):
        self.resize, self.num_channels = resize, num_channels
        self.mean, self.std = mean_and_std(image_processor, num_channels)

    def __call__(self, rows: list[dict]) -> tuple[list[torch.Tensor], list[int], list[str]]:
        images, hashes, names = [], [], []
        for row in rows:
            pixels = decode_8_bits(row["image"], Reading(self.num_channels))
            picture = PillowImage.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            picture = self.resize(picture.crop(row["box"]) if "box" in row else picture)
            images.append((to_tensor(picture) - self.mean) / self.std)
            hashes.append(pixel_hash(pixels))
            names.append(row["image"]["path"] if isinstance(row["image"], dict) else "without a file name")
        return images, hashes, names


@torch.no_grad()
def describe_images(
    model: PreTrainedModel,
    image_processor,
    rows: Sequence[dict],
    resize: Callable[[PillowImage.Image], PillowImage.Image],
    describe: Callable[[list[torch.Tensor]], torch.Tensor],
    batch_size: int,
    num_workers: int,
    description: str,
    is_benchmark: bool = True,
) -> Descriptors:
    """Descriptors in the rows' order, on all processes; each row is computed by one.

    Args:
        model: Says how many channels images have.
        image_processor: Says what to normalise by.
        rows: Each with `image`, as of `load_images`, and, perhaps, `box`: left, top, right and bottom of the part to
            see, in pixels. A list, or a data set that is no stream.
        resize: Applied to each image.
        describe: Normalised images (channels, height, width) -> (images, hidden).
        batch_size: Images that `describe` gets at once.
        num_workers: Worker processes that decode.
        description: What it is, for the progress bar and errors.
        is_benchmark: Whether an image that cannot be decoded is an error; else it is skipped and warned of.

    Raises:
        ValueError: no images, a broken one, a descriptor that is not finite.
    """
    state = PartialState()
    collate = DecodableImages(_Collator(resize, image_processor, num_channels(model.config)))

    def share() -> tuple[torch.Tensor, list[int], list[dict]]:
        mine = np.array_split(np.arange(len(rows)), state.num_processes)[state.process_index].tolist()
        loader = Loader(Subset(rows, mine), batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
        features, hashes, failed = [], [], []
        # on a terminal alone
        for collated, reasons in tqdm(
            loader, description, leave=False, disable=None if state.is_main_process else True
        ):
            if isinstance(collated, BrokenImageError):
                raise collated
            first = mine[0] + len(hashes) + len(failed)
            failed += [
                {"name": path, "reason": reason, "row": first + position}
                for position, (path, reason) in reasons.items()
            ]
            if collated is None:
                continue
            images, batch_hashes, names = collated
            batch = describe(images).float().cpu()
            for name, is_finite in zip(names, batch.isfinite().all(1).tolist()):
                if not is_finite:
                    raise ValueError(f"{description}: the model's features of image {name} are not finite")
            features.append(batch)
            hashes += batch_hashes
        return torch.cat(features) if features else torch.empty(0, 0), hashes, failed

    if not len(rows):
        raise ValueError(f"there are no images to compute {description} of")
    parts = of_all_processes(share, description)
    failed = [image for part in parts for image in part[2]]
    if is_benchmark:
        refuse_incomplete(failed)
    say_skipped(failed, len(rows), description, is_any_share=True)
    features, hashes, _ = zip(*(part for part in parts if len(part[1])))
    return Descriptors(torch.cat(features), np.array([number for part in hashes for number in part], dtype=np.int64))
