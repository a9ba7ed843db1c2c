"""How much memory the data loader's workers will take, told from the headers of some images before the first step."""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from datasets import Dataset

from evaluation.decoding import BrokenImageError, EncodedImage, Reading

from .arguments import TrainingArguments


NUM_IMAGES = 64  # whose headers are read, evenly spread over the data
LARGE = 2**30  # bytes that a worker may take without a warning

logger = logging.getLogger(__name__)


def warn_of_memory(dataset: Dataset, args: TrainingArguments, reading: Reading) -> None:
    """Warn once if images are so large that workers take more than 1 GiB each, or half of the free memory together."""
    sizes = [_size(dataset[int(index)]["image"], args, reading) for index in _spread(len(dataset))]
    width, height, needed = max(filter(None, sizes), key=lambda size: size[2], default=(0, 0, 0))
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_workers, free = max(args.num_workers, 1) * num_processes, free_memory()
    if needed > LARGE or needed * num_workers > free / 2:
        logger.warning(
            "images of %d x %d pixels take about %.1f GiB in each of %d workers, %.1f GiB in all, and %.1f GiB are "
            "free: %sstore the images smaller",
            *(width, height, needed / 2**30, num_workers, needed * num_workers / 2**30, free / 2**30),
            "lower --num_workers, or " if args.num_workers > 1 else "",
        )


def _spread(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(NUM_IMAGES, length)).astype(int))


def _size(image, args: TrainingArguments, reading: Reading) -> tuple[int, int, int] | None:
    """Width, height and peak bytes of an image; None for one that is broken or an array, which is there already."""
    if not isinstance(image, dict):
        return None
    try:
        encoded = EncodedImage(image, reading)
    except BrokenImageError:
        return None
    pixels = encoded.width * encoded.height
    content = os.path.getsize(image["path"]) if image["bytes"] is None else len(image["bytes"])
    content += pixels * encoded.decoder_bytes
    if encoded.is_jpeg:  # decoded as large as the smallest local crop needs it
        smallest = np.sqrt(args.local_crops_scale[0] if args.num_local_crops else args.global_crops_scale[0])
        size = args.local_crop_size if args.num_local_crops else args.global_crop_size
        spare = smallest * min(encoded.width, encoded.height) / size
        pixels //= max(reduction for reduction in (1, 2, 4, 8) if reduction <= max(spare, 1)) ** 2
    # Pillow's pixels, their copy in NumPy, and the largest crop; measured for RGB: 10.2 bytes
    num_channels = reading.num_channels
    if encoded.dtype != np.uint8:  # and its copies in fp32
        num_channels *= 4
    return encoded.width, encoded.height, content + pixels * ((1 if num_channels == 1 else 4) + 2 * num_channels)


def free_memory() -> int:
    """Bytes that processes may still take: of the machine and of all control groups, as of a container or Slurm."""
    free = psutil.virtual_memory().available
    for folder, limit, used, cached in _control_groups():
        with suppress(OSError, ValueError):  # there is no such file, or its limit is "max"
            bound = int((folder / limit).read_text())
            kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # pages of files count as used, and give way
            free = min(free, bound - int((folder / used).read_text()) + int(kept.get(cached, 0)))
    return max(free, 0)


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of this process's groups, up to the root, and the names of limit, use and cached files in them."""
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        base, names = (root, second) if not controllers else (root / "memory", first)
        if not controllers or "memory" in controllers.split(","):
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(base):
                    yield folder, *names
