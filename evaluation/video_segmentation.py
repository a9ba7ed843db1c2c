"""DAVIS-2017 video object segmentation: the first frame's masks, carried on by patch features alone.

Nothing is trained: each patch takes its label from the patches most like it in the first frame and the frames just
before. Memory does not grow with the square of the frame, as the original's does, which needs more than 16 GB for
frames 1152 pixels wide. The measures J and F are those of the official evaluation, computed here.
"""

import difflib
import math
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image as PillowImage
from scipy.spatial import cKDTree
from torch.nn import functional as F
from tqdm import tqdm
from transformers.image_utils import IMAGENET_DEFAULT_STD

from modeling_dino.command_line import Parser, nearest

from .arguments import add_model, add_output
from .images import BrokenImageError, EncodedImage, image_content
from .models import describe_model, load_model, mean_and_std, num_channels, patch_size, tokens
from .processes import of_all_processes
from .report import Report, make_report


TEMPERATURE = 0.1  # of the affinities
VOID = 255  # an annotation's pixels that belong to no object, and not to the background either
TILE = 16  # rows and columns of patches that are labelled at once; larger ones look at more that is too far away


# ---------------------------------------------------------------------------------------------------------------------
# Labels through a video


def propagate_labels(
    target: torch.Tensor,
    context: torch.Tensor,
    labels: torch.Tensor,
    neighborhood: int = 12,
    topk: int = 5,
) -> torch.Tensor:
    """Labels of a frame, from those of the frames before.

    For each patch of the target: of all patches of the context that are at most `neighborhood` rows and columns away,
    the `topk` most similar (and those that tie with the last of them) vote with exp(cosine / 0.1). Done in tiles, each
    with the part of the context that its patches can reach, so that the affinities of all pairs never exist.

    Args:
        target: Features (rows, columns, hidden), of length 1.
        context: Features (frames, rows, columns, hidden), of length 1.
        labels: Soft labels (frames, rows, columns, classes) of the context.
        neighborhood: In patches; 0 is no limit, as in the original.
        topk: Voters.

    Returns:
        Soft labels (rows, columns, classes), of the sum that the context's have.
    """
    rows, columns, _ = target.shape
    reach = neighborhood or max(rows, columns)
    index = torch.arange(max(rows, columns), device=target.device)
    result = target.new_empty(rows, columns, labels.shape[-1])
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            y, x = slice(top, min(top + TILE, rows)), slice(left, min(left + TILE, columns))
            near_y, near_x = (slice(max(0, own.start - reach), own.stop + reach) for own in (y, x))
            too_far_y = (index[y, None] - index[:rows][None, near_y]).abs() > reach
            too_far_x = (index[x, None] - index[:columns][None, near_x]).abs() > reach
            too_far = too_far_y[:, None, :, None] | too_far_x[None, :, None, :]
            # (patches of the tile, patches of the context)
            similarity = target[y, x].flatten(0, 1) @ context[:, near_y, near_x].flatten(0, 2).T
            similarity.unflatten(1, (len(context), -1)).masked_fill_(
                too_far.flatten(2).flatten(0, 1)[:, None], -torch.inf
            )
            weakest = similarity.topk(min(topk, similarity.shape[1]), dim=1).values[:, -1:]
            votes = similarity.masked_fill_(similarity < weakest, -torch.inf).div_(TEMPERATURE).softmax(1)
            result[y, x] = (votes @ labels[:, near_y, near_x].flatten(0, 2)).unflatten(0, too_far.shape[:2])
    return result


def propagate_through_video(
    features: Iterable[torch.Tensor],
    first_labels: torch.Tensor,
    num_last_frames: int = 7,
    neighborhood: int = 12,
    topk: int = 5,
) -> Iterator[torch.Tensor]:
    """Soft labels (rows, columns, classes) of all frames but the first.

    Section 4.2.2 of the paper, `eval_video_segmentation.py` of the original.

    Args:
        features: Of one frame after the other, (rows, columns, hidden).
        first_labels: (rows, columns, classes), one-hot.
        num_last_frames: How many frames before the target are its context, with the labels given here to them, beside
            the first frame.
        neighborhood, topk: See `propagate_labels`.
    """
    frames = (F.normalize(frame, dim=-1) for frame in features)
    first = next(frames), first_labels
    before = deque(maxlen=num_last_frames)
    for target in frames:
        context, labels = (torch.stack(parts) for parts in zip(first, *before))
        target_labels = propagate_labels(target, context, labels, neighborhood, topk)
        before.append((target, target_labels))
        yield target_labels


def hard_labels(labels: torch.Tensor, frame_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Object indices (height, width) in uint8 from soft labels (rows, columns, classes).

    Each class is stretched to [0, 1] before the largest wins, as in the original.

    Args:
        labels: Soft labels.
        frame_size: (height, width) of the frame that the network saw, to which labels are enlarged bilinearly.
        size: (height, width) of the result, its nearest pixels.
    """
    labels = labels.permute(2, 0, 1)[None]  # (1, classes, rows, columns)
    labels = F.interpolate(labels, size=frame_size, mode="bilinear", align_corners=False)[0]
    present = labels.amax((1, 2), keepdim=True) > 0
    risen = labels - labels.amin((1, 2), keepdim=True)
    # 0 / 0 of a class that is equally likely everywhere: the original's NaN, which is larger than all else there too
    stretched = (risen / risen.amax((1, 2), keepdim=True)).nan_to_num(nan=torch.inf)
    indices = torch.where(present, stretched, 0).argmax(0).to(torch.uint8)
    return resized_to_nearest(indices.cpu().numpy(), size)


def resized_to_nearest(indices: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Object indices (height, width) in another size."""
    return np.array(PillowImage.fromarray(indices).resize(size[::-1], PillowImage.Resampling.NEAREST))


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 if both are empty. J of the official evaluation."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def boundary_f_measure(prediction: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F of the boundaries of two boolean masks (height, width); 1 if both have none, 0 if one has.

    Precision is the share of the prediction's boundary that lies within the tolerance of the truth's, recall the share
    of the truth's that lies within it of the prediction's. F of the official evaluation, which enlarges boundaries by
    a disk of that radius instead of measuring distances.

    Args:
        prediction, truth: Masks.
        tolerance: Share of the image's diagonal; rounded up to pixels.
    """
    ours, theirs = (np.argwhere(_boundary(mask)) for mask in (prediction, truth))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    precision, recall = (
        np.mean(cKDTree(others).query(points)[0] <= radius) for points, others in ((ours, theirs), (theirs, ours))
    )
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or below to the right: lines one pixel wide."""
    boundary = np.zeros_like(mask)
    boundary[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    boundary[:-1] |= mask[:-1] ^ mask[1:]
    boundary[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return boundary


def mean_recall_decay(values: np.ndarray) -> tuple[float, float, float]:
    """Of a measure of an object in each frame: the mean, the share above 0.5, and what is lost from the first quarter
    of the frames to the last; quarters share the frames at their ends, as in the official evaluation."""
    ends = np.round(np.linspace(0, len(values) - 1, 5) + 1e-10).astype(int)
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean())


def object_scores(predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Scores of each object of a video in percent: `jf_mean` and the mean, recall and decay of J and F.

    Args:
        predictions: Object indices (height, width) of each frame.
        truths: The annotations. Objects are those up to the largest index in the first.

    Raises:
        ValueError: fewer than 3 frames: the first, which is given, and the last are left out.
    """
    if len(truths) < 3:
        raise ValueError(f"a video is measured between its first and last frame, and this one has {len(truths)}")
    found = []
    for index in range(1, int(truths[0].max()) + 1):
        masks = [(ours == index, theirs == index) for ours, theirs in zip(predictions[1:-1], truths[1:-1])]
        scores = {}
        for name, measure_frame in (("j", jaccard), ("f", boundary_f_measure)):
            statistics = mean_recall_decay(np.array([measure_frame(*pair) for pair in masks]))
            scores |= {f"{name}_{key}": 100 * value for key, value in zip(("mean", "recall", "decay"), statistics)}
        found.append({"jf_mean": (scores["j_mean"] + scores["f_mean"]) / 2} | scores)
    return found
