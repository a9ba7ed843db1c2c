"""How much memory the data loader's workers will take, told from the headers of some images before the first step."""

import logging
import os
from pathlib import Path

import numpy as np
import psutil
from datasets import Dataset

from evaluation.images import BrokenImageError, EncodedImage

from .arguments import TrainingArguments


NUM_IMAGES = 64  # whose headers are read, evenly spread over the data
# Pillow's pixels, their copy in NumPy and the largest crop: 10.2 measured for a PNG of 13000 x 13000 and 3 channels
BYTES_PER_PIXEL = 10
LARGE = 2**30  # bytes that a worker may take without a warning

logger = logging.getLogger(__name__)


def warn_of_memory(dataset: Dataset, args: TrainingArguments, num_channels: int) -> None:
    """Warn once if images are so large that workers take more than 1 GiB each, or half of the free memory together."""
    sizes = [_size(dataset[int(index)]["image"], args, num_channels) for index in _spread(len(dataset))]
    width, height, needed = max(filter(None, sizes), key=lambda size: size[2], default=(0, 0, 0))
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_workers, free = max(args.num_workers, 1) * num_processes, free_memory()
    if needed > LARGE or needed * num_workers > free / 2:
        logger.warning(
            "images of %d x %d pixels take about %.1f GiB in each of %d workers, %.1f GiB in all, and %.1f GiB are "
            "free: lower --num_workers, or store the images smaller",
            *(width, height, needed / 2**30, num_workers, needed * num_workers / 2**30, free / 2**30),
        )


def _spread(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, min(NUM_IMAGES, length)).astype(int))


def _size(image, args: TrainingArguments, num_channels: int) -> tuple[int, int, int] | None:
    """Width, height and peak bytes of an image; None for one that is broken or an array, which is there already."""
    if not isinstance(image, dict):
        return None
    try:
        encoded = EncodedImage(image, num_channels)
    except BrokenImageError:
        return None
    pixels = encoded.width * encoded.height
    if encoded.is_jpeg:  # decoded as large as the smallest local crop needs it
        smallest = np.sqrt(args.local_crops_scale[0] if args.num_local_crops else args.global_crops_scale[0])
        size = args.local_crop_size if args.num_local_crops else args.global_crop_size
        spare = smallest * min(encoded.width, encoded.height) / size
        pixels //= max(reduction for reduction in (1, 2, 4, 8) if reduction <= max(spare, 1)) ** 2
    return encoded.width, encoded.height, pixels * BYTES_PER_PIXEL


def free_memory() -> int:
    """Bytes that processes may still take: of the machine and, in a container, of its control group."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (bound := limit.read_text().strip()) != "max":
        free = min(free, int(bound) - int(used.read_text()))
    return max(free, 0)
