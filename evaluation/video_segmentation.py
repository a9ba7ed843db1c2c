"""DAVIS-2017 video object segmentation: the first frame's masks, carried on by patch features alone.

Nothing is trained: each patch takes its label from the patches most like it in the first frame and the frames just
before. Memory does not grow with the square of the frame, as the original's does, which needs more than 16 GB for
frames 1152 pixels wide. The measures J and F are those of the official evaluation, computed here.
"""

import hashlib
import io
import math
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image as PillowImage
from scipy.spatial import cKDTree
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_STD

from modeling_dino.command_line import Parser, nearest

from .arguments import add_model, add_output
from .decoding import IMAGE_SUFFIXES, BrokenImageError, EncodedImage, Reading, decode_8_bits, image_content
from .models import describe_model, load_model, mean_and_std, num_channels, patch_size, tokens
from .outputs import check_outputs, mark, write_picture
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


# ---------------------------------------------------------------------------------------------------------------------
# Files in the layout of DAVIS-2017


class Video(NamedTuple):
    """A sequence: its frames, and an annotation of each of them, or of the first alone."""

    name: str
    frames: list[Path]
    annotations: list[Path]
    size: tuple[int, int]

    @property
    def is_annotated(self) -> bool:
        return len(self.annotations) == len(self.frames)


def find_videos(root: Path, split: str = "val", names: Sequence[str] | None = None) -> list[Video]:
    """The sequences of a split, in the order of its list.

    Args:
        root: Folder with `JPEGImages/480p/NAME/00000.jpg`, `Annotations/480p/NAME/00000.png` (object indices, as
            palette or grey images) and `ImageSets/2017/SPLIT.txt`.
        split: Name of the list.
        names: These sequences instead of the split's.

    Raises:
        ValueError: whatever is missing, cannot be read, or has another size than its sequence's first frame.
    """
    folder = root / "JPEGImages/480p"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; the layout must be that of DAVIS-2017")
    there = [path.name for path in folder.iterdir() if path.is_dir()]
    if names is None:
        file = root / f"ImageSets/2017/{split}.txt"
        if not file.is_file():
            raise ValueError(
                f"there is no list {file}; lists are there for {[path.stem for path in file.parent.glob('*.txt')]}"
            )
        names = file.read_text().split()
        if not names:
            raise ValueError(f"the list {file} is empty")
    for name in names:
        if name not in there:
            raise ValueError(f"there is no sequence {name} in {folder}{nearest(name, there)}")
    return [_find_video(root, name) for name in names]


def _find_video(root: Path, name: str) -> Video:
    frames = sorted(
        path for path in (root / "JPEGImages/480p" / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if len(frames) < 3:
        raise ValueError(f"sequence {name} has {len(frames)} frames; needed are 3, of which the second is measured")
    annotations = [root / "Annotations/480p" / name / f"{frame.stem}.png" for frame in frames]
    missing = [path for path in annotations if not path.is_file()]
    if annotations[0] in missing:
        raise ValueError(f"there is no {annotations[0]}, the annotation that sequence {name} starts from")
    if missing and len(missing) < len(frames) - 1:
        raise ValueError(
            f"sequence {name} lacks {len(missing)} of {len(frames)} annotations, such as {missing[0]}; "
            "allowed are all of them, or that of the first frame alone"
        )
    annotations = annotations[:1] if missing else annotations
    sizes = {path: _size(path) for path in frames + annotations}
    size = sizes[frames[0]]
    for path, (height, width) in sizes.items():
        if (height, width) != size:
            raise ValueError(f"{path} is {width}x{height}, but the first frame of its sequence is {size[1]}x{size[0]}")
    return Video(name, frames, annotations, size)


def _size(path: Path) -> tuple[int, int]:
    image = EncodedImage({"path": str(path), "bytes": None}, Reading(3))
    return image.height, image.width


def read_indices(image: dict) -> np.ndarray:
    """Object indices (height, width) in uint8 of a mask: a palette or grey image.

    Args:
        image: What a row of `load_images` holds in `image`.

    Raises:
        BrokenImageError: another kind of image, or one that cannot be decoded.
    """
    if not isinstance(image, dict):
        raise BrokenImageError(
            "without a file name", "no mask", "is no palette or grey image, but missing or an array"
        )
    name = image["path"] or "without a file name"
    try:
        with PillowImage.open(io.BytesIO(image_content(image))) as opened:
            if opened.mode not in ("P", "L"):
                reason = f"has Pillow's mode {opened.mode}; object indices are in palette or grey images (P, L)"
                raise BrokenImageError(name, "no mask", reason)
            return np.array(opened)
    except (OSError, SyntaxError) as error:
        raise BrokenImageError(name, "damaged", f"cannot be decoded: {error}") from error


def read_annotation(path: Path) -> np.ndarray:
    """Object indices (height, width); void is background, as in the official evaluation."""
    indices = read_indices({"path": str(path), "bytes": None})
    indices[indices == VOID] = 0
    return indices


def write_indices(indices: np.ndarray, path: Path) -> None:
    """Writes object indices (height, width) as DAVIS does, in the colours of PASCAL VOC."""
    image = PillowImage.fromarray(indices)
    image.putpalette(voc_palette())
    write_picture(image, path, mark("video_segmentation"))


def voc_palette() -> bytes:
    """The colours of PASCAL VOC and DAVIS: bits 0, 1 and 2 of an index are bit 7 of red, green and blue, bits 3, 4 and
    5 their bit 6, and so on."""
    index = np.arange(256)
    channels = [sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def frame_size(size: tuple[int, int], short_side: int = 480, patch: int = 16) -> tuple[int, int]:
    """(height, width) of a frame for the network: the short side, the other rounded down to a multiple of 64.

    Of patches that do not divide these, both sides become multiples.
    """
    height, width = size
    multiple = 64 if 64 % patch == 0 else patch
    short = short_side // patch * patch
    long = short_side * max(size) // min(size) // multiple * multiple
    return (short, long) if height <= width else (long, short)


def read_frame(path: Path, size: tuple[int, int], mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Pixel values (1, channels, height, width) of a frame, resized bilinearly without antialiasing, as OpenCV does.

    OpenCV computes in fixed point: by its formula, 0.04 % of the values differ, by one of 255 levels.
    """
    pixels = decode_8_bits({"path": str(path), "bytes": None}, Reading(len(mean)))
    frame = torch.from_numpy(np.ascontiguousarray(pixels))[None].float()
    frame = F.interpolate(frame, size=size, mode="bilinear", align_corners=False).round()
    return (frame / 255 - mean) / std


def video_mean_and_std(image_processor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model's image processor normalises by, but for ImageNet's red: the original divides it by 0.228."""
    mean, std = mean_and_std(image_processor, channels)
    if std.flatten().tolist() == torch.tensor(IMAGENET_DEFAULT_STD).tolist():
        std = torch.tensor([0.228, *IMAGENET_DEFAULT_STD[1:]]).view(-1, 1, 1)
    return mean, std


@torch.no_grad()
def segment_video(
    model: PreTrainedModel,
    video: Video,
    mean: torch.Tensor,
    std: torch.Tensor,
    short_side: int = 480,
    num_last_frames: int = 7,
    neighborhood: int = 12,
    topk: int = 5,
) -> Iterator[np.ndarray]:
    """Object indices (height, width) of all frames but the first, whose annotation is given.

    Args:
        model: A network of `tokens`.
        video: Of `find_videos`.
        mean, std: Of `video_mean_and_std`.
        short_side: Of the frames that the network sees.
        num_last_frames, neighborhood, topk: See `propagate_through_video`.

    Raises:
        ValueError: features that are not finite; a first annotation without objects.
    """
    seen = frame_size(video.size, short_side, patch_size(model))

    def features() -> Iterator[torch.Tensor]:
        for path in video.frames:
            patches = tokens(model, read_frame(path, seen, mean, std))[0].patches[0].float()
            if not patches.isfinite().all():
                raise ValueError(f"the model's features of {path} are not finite")
            yield patches

    indices = read_annotation(video.annotations[0])
    if not indices.any():
        raise ValueError(f"{video.annotations[0]} has no objects; they have the indices 1 to {VOID - 1}")
    frames = features()
    first = next(frames)
    small = torch.from_numpy(resized_to_nearest(indices, first.shape[:2])).long()
    labels = F.one_hot(small, int(indices.max()) + 1).to(first)
    for soft in propagate_through_video(chain([first], frames), labels, num_last_frames, neighborhood, topk):
        yield hard_labels(soft, seen, video.size)


def add_arguments(parser: Parser) -> None:
    add_model(parser, 480, "short side of the frames that the network sees; the other becomes a multiple of 64")
    parser.add_argument("--dataset_name", required=True, help="folder in the layout of DAVIS-2017")
    parser.add_argument("--eval_split", default="val", help="list in ImageSets/2017 (default: %(default)s)")
    parser.add_argument("--sequences", nargs="+", help="names of sequences, instead of a list's")
    parser.add_argument(
        "--num_last_frames", type=int, default=7, help="frames to learn from beside the first (default: %(default)s)"
    )
    parser.add_argument(
        "--neighborhood",
        type=int,
        default=12,
        help="patches to look away; 0 is no limit (default: %(default)s)",
    )
    parser.add_argument("--topk", type=int, default=5, help="patches that vote (default: %(default)s)")
    parser.add_argument("--output_dir", help="folder for the masks, as PNGs that the official evaluation reads")
    add_output(parser)


def measure(args: Namespace) -> Report | None:
    """Masks of all videos, shared out to the processes; scores of those that are annotated."""
    if args.model is None:
        raise ValueError("give --model")
    if args.topk < 1 or args.neighborhood < 0 or args.num_last_frames < 0 or args.image_size < 64:
        raise ValueError(
            "topk must be at least 1, neighborhood and num_last_frames at least 0, image_size at least 64, got "
            f"{args.topk}, {args.neighborhood}, {args.num_last_frames}, {args.image_size}"
        )
    videos = find_videos(Path(args.dataset_name), args.eval_split, args.sequences)
    unknown = [video.name for video in videos if not video.is_annotated]
    if len(unknown) == len(videos) and not args.output_dir:
        raise ValueError(
            f"{args.dataset_name} has annotations of first frames alone, so that nothing can be measured; name a "
            "folder for the masks by --output_dir"
        )
    masks_folder = Path(args.output_dir or "")
    files = [masks_folder / video.name / f"{frame.stem}.png" for video in videos for frame in video.frames]
    if args.output_dir:
        check_outputs(args, files)
    model, image_processor = load_model(args.model)
    mean, std = video_mean_and_std(image_processor, num_channels(model.config))
    state = PartialState()

    def share() -> dict[str, list[dict[str, float]]]:
        """Scores of the objects of this process's videos."""
        own = videos[state.process_index :: state.num_processes]
        num_frames = sum(len(video.frames) - 1 for video in own)
        # on a terminal alone
        bar = tqdm(total=num_frames, desc="frames", leave=False, disable=None if state.is_main_process else True)
        found = {}
        for video in own:
            masks = [read_annotation(video.annotations[0])]
            for mask in segment_video(
                model, video, mean, std, args.image_size, args.num_last_frames, args.neighborhood, args.topk
            ):
                masks.append(mask)
                bar.update()
            if args.output_dir:
                for frame, mask in zip(video.frames, masks):
                    write_indices(mask, masks_folder / video.name / f"{frame.stem}.png")
            if video.is_annotated:
                found[video.name] = object_scores(masks, [read_annotation(path) for path in video.annotations])
        bar.close()
        return found

    found = {name: scores for part in of_all_processes(share, "masks") for name, scores in part.items()}
    if state.is_main_process and args.output_dir:
        print(f"wrote the masks of {len(videos)} sequences to {args.output_dir}")
    if state.is_main_process and unknown:
        print(f"not measured, annotated in the first frame alone: {', '.join(unknown)}")
    if not found:
        return None
    measured = [video for video in videos if video.is_annotated]
    objects = [scores for video in measured for scores in found[video.name]]
    digest = hashlib.sha256()
    for video in measured:
        for path in video.frames + video.annotations:
            digest.update(path.read_bytes())
    data = {
        "name": args.dataset_name,
        "split": args.eval_split if args.sequences is None else None,
        "sequences": [video.name for video in measured],
        "num_objects": len(objects),
        "revision": f"sha256:{digest.hexdigest()[:16]}",
    }
    scores = {name: np.array([scores[name] for scores in objects]) for name in objects[0]}
    return make_report(args, describe_model(model, args.model), data, scores)
