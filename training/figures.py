"""`figures/` of a run: its curves, and what the teacher's CLS token looks at. On the main process; see `Figures`."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torchvision.transforms.v2 import functional as F

from evaluation.attention import draw_attention_of
from evaluation.decoding import BrokenImageError, Reading, decode_image
from modeling_dino import DINOModel

from .arguments import TrainingArguments
from .augmentation import CropBatch
from .log import RunLog
from .monitor import draw_curves, to_pictures


NUM_IMAGES = 4  # in the attention figure
MAX_SIDE = 2048  # of these images, in pixels
SHARE_OF_TIME = 0.05  # that drawing may take


class Figures:
    """Draws the curves and, of a Vision Transformer, the attention anew; one that fails does not stop the training.

    Args:
        output_dir: Folder of the run.
        out_dim: Number of prototypes.
        image_processor: Makes its pixel values.
        images: Whose attention is drawn, (channels, height, width).
        run_log: Where failures are logged.
        display_channels: See `to_picture`.
    """

    def __init__(
        self,
        output_dir: Path,
        out_dim: int,
        image_processor,
        images: list[np.ndarray],
        run_log: RunLog,
        display_channels: Sequence[int] = (),
    ):
        self.output_dir = output_dir
        self.out_dim = out_dim
        self.image_processor = image_processor
        self.images = images
        self.run_log = run_log
        self.display_channels = display_channels
        self.drawn, self.took = time.perf_counter(), 1.0  # seconds

    def draw(self, backbone: DINOModel, at_end: bool = False) -> None:
        """`backbone` is the teacher's. Before the end, only if it takes no more than its share of the time."""
        start = time.perf_counter()
        if not at_end and self.took > SHARE_OF_TIME * (start - self.drawn):
            return
        with self.run_log.tolerated("drawing curves.png"):
            draw_curves(self.output_dir, self.out_dim)
        if self.images and backbone.config.backbone_config is None:
            with self.run_log.tolerated("drawing attention.png"):
                path = self.output_dir / "figures" / "attention.png"
                draw_attention_of(backbone, self.image_processor, self.images, path, self.display_channels)
        self.drawn = time.perf_counter()
        self.took = self.drawn - start


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    """An image (channels, height, width) of at most MAX_SIDE pixels a side, as it is kept for the whole run."""
    factor = MAX_SIDE / max(pixels.shape[1:])
    if factor >= 1:
        return pixels
    size = [max(1, round(side * factor)) for side in pixels.shape[1:]]
    if pixels.dtype == np.uint8:
        return F.resize(torch.from_numpy(pixels), size, antialias=True).numpy()
    resized = F.resize(torch.from_numpy(pixels.astype(np.float32)), size, antialias=True).numpy()
    return (resized if pixels.dtype.kind == "f" else resized.round()).astype(pixels.dtype)


def choose_images(
    dataset: Dataset | IterableDataset, first_batch: CropBatch | None, reading: Reading, args: TrainingArguments
) -> list[np.ndarray]:
    """A few whole images (channels, height, width), by the seed; of a stream, crops of the first batch.

    A stream is not read a second time: this would cost requests, or be other images.
    """
    if not isinstance(dataset, Dataset):
        if first_batch is None:
            return []
        crops = first_batch.crops[0][:NUM_IMAGES]
        return list((crops if first_batch.photometrics else to_pictures(crops, args)).numpy())
    images = []
    for index in np.random.default_rng(args.seed).permutation(len(dataset)).tolist():
        with suppress(BrokenImageError):
            images.append(_shrunk(decode_image(dataset[index]["image"], reading)))
        if len(images) == NUM_IMAGES:
            break
    return images
