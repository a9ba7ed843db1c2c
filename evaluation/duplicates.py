"""Near-duplicate images within and across splits, by the cosine similarity of their features.

Two images are near-duplicates if their similarity is at least a threshold, or if their pixels are identical. Groups
are the connected components of such pairs. Pairs are found block by block and are not kept, so that memory grows only
with the number of images.
"""

import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image as PillowImage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.nn import functional as F
from tqdm import tqdm

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model
from .decoding import Reading, decode_image
from .features import (
    Features,
    check_features,
    features_of,
    images_of,
    kept_splits,
    load_model_of,
    reading_settings,
    splits_of,
)
from .models import reading_of, to_values
from .outputs import FIGURE_SUFFIXES, check_outputs, is_from, is_table, mark, write_figure, write_table
from .pictures import add_caption, add_display_channels, short_label, start_figure, to_picture
from .processes import of_all_processes


BLOCK_SIZE = 4096  # rows and columns of the similarities held at once: 64 MiB in fp32
MAX_NEIGHBORS = 1000  # near-duplicates of an image, on average: beyond, the threshold tells no images apart
MAX_DRAWN = 300  # pairs in a picture
COLUMNS = ("group", "split", "name", "similarity", "keep")
SIDE = 320  # pixels of a drawn image


@dataclass
class Duplicates:
    """Near-duplicates among images.

    Args:
        groups: (images,) number of each image's group, by the group's first image; -1 for an image without any.
        pairs: (num, 2) indices of the most similar pairs, the smaller index first; the most similar pair first.
        similarities: (num,) similarities of `pairs`.
        num_pairs: Number of all pairs at or above the threshold.
        num_across: Number of those whose images are from different splits.
    """

    groups: np.ndarray
    pairs: np.ndarray
    similarities: np.ndarray
    num_pairs: int
    num_across: int


class _Components:
    """Connected components of a graph whose edges arrive in batches.

    Edges within a known component are dropped. The others are merged once there are more of them than nodes, so that
    memory is bounded by the nodes and one batch.
    """

    def __init__(self, num_nodes: int):
        self.labels = np.arange(num_nodes)
        self.waiting: list[np.ndarray] = []  # (2, edges) of labels each

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        edges = np.stack([self.labels[first], self.labels[second]])
        self.waiting.append(edges[:, edges[0] != edges[1]])
        if sum(edges.shape[1] for edges in self.waiting) > len(self.labels):
            self.merge()

    def merge(self) -> np.ndarray:
        """Return the component of each node."""
        if self.waiting:
            first, second = np.concatenate(self.waiting, axis=1)
            shape = len(self.labels), len(self.labels)
            _, components = connected_components(coo_array((np.ones(len(first)), (first, second)), shape=shape), False)
            self.labels, self.waiting = components.astype(np.int64)[self.labels], []
        return self.labels


def _most_similar(pairs: np.ndarray, similarities: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The most similar pairs, in order; equal similarities by their indices."""
    if num == 0:
        return pairs[:0], similarities[:0]
    if len(pairs) > num:  # sorts a few pairs instead of a block of them
        lowest = np.partition(similarities, -num)[-num]
        ties = np.flatnonzero(similarities == lowest)
        ties = ties[np.lexsort((pairs[ties, 1], pairs[ties, 0]))[:num]]
        chosen = np.concatenate([np.flatnonzero(similarities > lowest), ties])
        pairs, similarities = pairs[chosen], similarities[chosen]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -similarities))[:num]
    return pairs[order], similarities[order]


@torch.no_grad()
def find_duplicates(
    features: torch.Tensor,
    hashes: np.ndarray,
    splits: np.ndarray | None = None,
    threshold: float = 0.95,
    num_pairs: int = 12,
    block_size: int = BLOCK_SIZE,
) -> Duplicates:
    """Find near-duplicates, by blocks of rows times blocks of columns that the processes share.

    The same as: normalize the features, take all pairs i < j with `features[i] @ features[j] >= threshold` or with
    identical pixels (whose similarity is 1), and number the connected components.

    Args:
        features: (images, hidden); need not be normalized.
        hashes: (images,) in int64, equal for images of equal pixels.
        splits: (images,) number of each image's split. Default: one split.
        threshold: Cosine similarity, above 0 and at most 1.
        num_pairs: Pairs to return.
        block_size: Rows and columns of a block.

    Returns:
        The same on all processes.

    Raises:
        ValueError: more than 1000 near-duplicates per image on average, as with an untrained network.
    """
    num_images, state = len(features), PartialState()
    splits = np.zeros(num_images, dtype=np.int64) if splits is None else splits
    starts = range(0, num_images, block_size)
    max_pairs = num_images * MAX_NEIGHBORS // 2

    def check(num_found: int) -> None:
        if num_found > max_pairs:
            raise ValueError(
                f"threshold must be above the similarity of unrelated images, got {threshold:g}, where images have "
                f"more than {MAX_NEIGHBORS} near-duplicates on average. Raise --threshold, or use a trained model."
            )

    def block(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(start, start + block_size)
        normalized = F.normalize(features[rows].to(state.device).float(), dim=1)
        return normalized, torch.from_numpy(hashes[rows]).to(state.device)

    def share() -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        """The components, most similar pairs and numbers of pairs in this process's blocks of rows."""
        components, num_found, num_across = _Components(num_images), 0, 0
        best, best_similarities = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32)
        disable = None if state.is_main_process else True  # on a terminal alone
        for row in tqdm(starts[state.process_index :: state.num_processes], "pairs", leave=False, disable=disable):
            rows, row_hashes = block(row)
            for column in starts[row // block_size :]:
                columns, column_hashes = (rows, row_hashes) if column == row else block(column)
                similarities = (rows @ columns.T).clamp_(max=1)  # (rows, columns)
                similarities.masked_fill_(row_hashes[:, None] == column_hashes, 1)
                if column == row:
                    similarities.triu_(1)
                is_pair = similarities >= threshold
                num_found += int(is_pair.sum())
                check(num_found)
                pairs = (is_pair.nonzero() + torch.tensor([row, column], device=state.device)).cpu().numpy()
                if not len(pairs):
                    continue
                components.add(*pairs.T)
                num_across += int((splits[pairs[:, 0]] != splits[pairs[:, 1]]).sum())
                found = np.concatenate([best_similarities, similarities[is_pair].cpu().numpy()])
                best, best_similarities = _most_similar(np.concatenate([best, pairs]), found, num_pairs)
        return components.merge(), best, best_similarities, num_found, num_across

    parts = of_all_processes(share, "near-duplicates")
    check(sum(num_found for _, _, _, num_found, _ in parts))
    components = _Components(num_images)
    for labels, *_ in parts:
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        components.add(np.arange(num_images), first[inverse])
    pairs, similarities = _most_similar(
        np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts]), num_pairs
    )
    return Duplicates(
        _number_groups(components.merge()),
        pairs,
        similarities,
        num_pairs=sum(part[3] for part in parts),
        num_across=sum(part[4] for part in parts),
    )


def _number_groups(labels: np.ndarray) -> np.ndarray:
    """Components -> numbers from 0 in the order of their first images; -1 for components of one image."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    numbers = np.full(len(first), -1)
    groups = np.flatnonzero(counts > 1)
    numbers[groups[np.argsort(first[groups])]] = np.arange(len(groups))
    return numbers[inverse]


def kept_images(groups: np.ndarray) -> np.ndarray:
    """Return the kept image of each group (num_groups,): its first one."""
    numbers, first = np.unique(groups, return_index=True)
    return first[numbers >= 0]


def _similarities_to(features: torch.Tensor, hashes: np.ndarray, images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine similarities (num,) of images and others, by their indices; 1 for identical pixels."""
    values = [
        F.cosine_similarity(features[first].float(), features[second].float(), dim=1).clamp(max=1)
        for first, second in zip(
            torch.from_numpy(images).split(BLOCK_SIZE), torch.from_numpy(others).split(BLOCK_SIZE)
        )
    ]
    similarities = torch.cat(values).numpy() if values else np.empty(0)
    return np.where(hashes[images] == hashes[others], 1, similarities)


def draw_pairs(
    pictures: Sequence[tuple[np.ndarray, np.ndarray]],
    names: Sequence[tuple[str, str]],
    similarities: Sequence[float],
    identical: Sequence[bool],
):
    """A figure of pairs, in rows from left to right.

    Args:
        pictures: Two images (height, width, 3) for each pair.
        names: Written under the two images; may have several lines.
        similarities: Written over the pairs.
        identical: Whether the pixels of a pair are identical: marked by a frame and in the title.
    """
    num_columns = min(3, max(1, len(pictures)))
    num_rows = max(1, -(-len(pictures) // num_columns))
    figure = start_figure(figsize=(2.7 * num_columns, 1.87 * num_rows), layout="constrained")
    panels = figure.subfigures(num_rows, num_columns, squeeze=False, wspace=0.05, hspace=0.03)
    for number, (panel, pair) in enumerate(zip(panels.flat, pictures)):
        color = "tab:red" if identical[number] else "0.75"
        title = f"{number + 1}.  {similarities[number]:.4f}" + ",  identical pixels" * bool(identical[number])
        panel.suptitle(title, fontsize=7.5, color="tab:red" if identical[number] else "black")
        axes = panel.subplots(1, 2)
        for axis, picture, name in zip(axes, pair, names[number]):
            height, width = picture.shape[:2]
            side = max(height, width) * 1.04  # squares, whatever the aspect: all panels are alike
            axis.imshow(picture)  # the centers of the corner pixels are at 0 and at the size - 1
            axis.set_xlim((width - 1 - side) / 2, (width - 1 + side) / 2)
            axis.set_ylim((height - 1 + side) / 2, (height - 1 - side) / 2)
            axis.set(xticks=[], yticks=[], anchor="N")
            axis.set_xlabel(name, fontsize=6, labelpad=3, parse_math=False)
            axis.spines[:].set(color=color, linewidth=1.5 if identical[number] else 0.5)
    return figure


def _short(name: str, split: str) -> str:
    """The end of a file's name, with the folder that it lies in unless that is the split's."""
    folder, _, name = "/".join(name.split("/")[-2:]).rpartition("/")
    return short_label(f"{folder}/{name}" if folder not in ("", split) else name)


def _open_images(args: Namespace, part: Features) -> Dataset:
    """Open the images that features are of, for the picture.

    Raises:
        ValueError: images that are not there, or are not as many as the features.
    """
    data = part.data
    name, config = args.dataset_name or data["name"], args.dataset_config_name or data["config"]
    column = args.image_column or data["image_column"]
    try:
        given = {"dataset_name": name, "dataset_config_name": config, "image_column": column}
        given |= reading_settings(part)
        dataset = images_of(Namespace(**vars(args) | given), data["split"], with_labels=False)
    except ValueError as error:
        raise ValueError(f"{error}. Give --dataset_name, or --num_pairs 0 for no picture.") from error
    num_images = len(part) + len(part.failed)
    if len(dataset) != num_images:
        raise ValueError(
            f"dataset_name must be the {num_images} images of --features, got {len(dataset)} in split {data['split']} "
            f"of {name}. Compute the features again, or give --num_pairs 0 for no picture."
        )
    return dataset


def _thumbnail(dataset: Dataset, row: int, args: Namespace) -> np.ndarray:
    """The pixels (height, width, 3) of an image, of at most 320 pixels a side; gray if they cannot be shown."""
    image, image_processor = dataset[row]["image"], None
    if args.model:
        model, image_processor = load_model_of(args)
        reading = reading_of(args, model)
    else:  # features do not say how many channels the model took
        shape = np.shape(image) or (3,)  # (channels, height, width), (height, width, channels), or of a file
        reading = Reading(min(shape[0], shape[-1]))
    try:
        pixels = to_values(image_processor, decode_image(image, reading.of(dataset.features)))
    except ValueError:
        pixels = np.full((1, SIDE, SIDE), 128, np.uint8)
    picture = PillowImage.fromarray(to_picture(pixels, args.display_channels))
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)


def add_arguments(parser: Parser) -> None:
    add_model(parser, several=False)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument(
        "--splits",
        nargs="+",
        help="splits to search, in the order of preference: the first image of a group is kept. Default: all, the "
        "training split first",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        help="lowest cosine similarity of near-duplicates, above 0 and at most 1. Default: %(default)s",
    )
    parser.add_argument(
        "--num_pairs",
        type=int,
        default=12,
        help=f"most similar pairs in the picture, from 0 (no picture) to {MAX_DRAWN}. Default: %(default)s",
    )
    add_display_channels(parser)
    parser.add_argument(
        "--output",
        default="duplicates.csv",
        help="CSV to write. Default: %(default)s",
    )
    parser.add_argument("--picture", help="picture to write: .png, .pdf or .svg. Default: the .png beside the CSV")


def _check(args: Namespace) -> list[Path]:
    """Return the files to write.

    Raises:
        ValueError: settings out of range, or outputs that cannot be written.
    """
    if not 0 < args.threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {args.threshold:g}. Choose 0.9 to 0.99.")
    if not 0 <= args.num_pairs <= MAX_DRAWN:
        raise ValueError(f"num_pairs must be from 0 to {MAX_DRAWN}, got {args.num_pairs}. Choose fewer pairs.")
    if args.streaming:
        raise ValueError("streaming must be off: images are found by their rows, got --streaming. Leave it out.")
    if args.eval_split:
        raise ValueError(f"eval_split must not be given, got {args.eval_split}. Name splits by --splits.")
    if args.splits and len(set(args.splits)) < len(args.splits):
        raise ValueError(f"splits must be different, got {' '.join(args.splits)}. Name each split once.")
    path = Path(args.output)
    if path.suffix != ".csv":
        raise ValueError(f"output must end in .csv, got {args.output}. Choose another name.")
    picture = Path(args.picture or path.with_suffix(".png"))
    if picture.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"picture must end in .png, .pdf or .svg, got {args.picture}. Choose another name.")
    files = [path, picture] if args.num_pairs else [path]
    check_outputs(args, files, lambda file: is_table(file, COLUMNS) or is_from(file, args.protocol))
    return files


def _find_splits(args: Namespace) -> list[str]:
    """Return the names of the splits to search, in the order of preference."""
    if args.splits:
        return args.splits
    if args.model and args.dataset_name:
        names = splits_of(args)
    elif args.features and not args.model:
        names = kept_splits(Path(args.features))
        if not names:
            raise ValueError(
                f"features must be a folder of `dino-eval features`, got {args.features}. Choose another."
            )
    else:
        raise ValueError(
            "give --model and --dataset_name, or --features, a folder that `dino-eval features` has filled"
        )
    return sorted(names, key=lambda name: name != args.train_split)  # stable


def _names(part: Features) -> list[str]:
    """Return names that tell the images of a split apart: file names, or else row numbers."""
    return part.names if len(set(part.names)) == len(part) else list(map(str, range(len(part))))


def measure(args: Namespace) -> None:
    files = _check(args)
    split_order = _find_splits(args)
    check_features(args, *split_order)
    parts = [features_of(args, split) for split in split_order]
    for split, part in zip(split_order, parts):
        if part.model != parts[0].model:
            raise ValueError(
                f"features must be of one model, got {parts[0].model['name']} in split {split_order[0]} and "
                f"{part.model['name']}, or another revision, in {split}. Compute one of them again."
            )
    datasets = [_open_images(args, part) for part in parts] if args.num_pairs else []
    model, source = parts[0].model["name"], f"{parts[0].data['name']}, {' and '.join(split_order)}"
    splits = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    names = [name for part in parts for name in _names(part)]
    hashes = np.concatenate([part.hashes for part in parts])
    features = torch.cat([part.features for part in parts]) if len(parts) > 1 else parts[0].features
    del parts  # whose features are copied

    found = find_duplicates(features, hashes, splits, args.threshold, args.num_pairs)
    if not PartialState().is_main_process:
        return
    images = np.flatnonzero(found.groups >= 0)
    images = images[np.argsort(found.groups[images], kind="stable")]
    groups, kept = found.groups[images], kept_images(found.groups)
    similarities = _similarities_to(features, hashes, images, kept[groups])
    write_table(
        files[0],
        COLUMNS,
        (
            (group, split_order[splits[image]], names[image], f"{similarity:.4f}", str(image == kept[group]).lower())
            for group, image, similarity in zip(groups, images, similarities)
        ),
    )
    for path in files[1:]:
        captions = {
            image: f"{split_order[splits[image]]}\n{_short(names[image], split_order[splits[image]])}"
            for image in set(found.pairs.flat)
        }
        drawn = {image: _thumbnail(datasets[splits[image]], int(rows[image]), args) for image in set(found.pairs.flat)}
        figure = draw_pairs(
            [(drawn[first], drawn[second]) for first, second in found.pairs],
            [(captions[first], captions[second]) for first, second in found.pairs],
            found.similarities,
            hashes[found.pairs[:, 0]] == hashes[found.pairs[:, 1]],
        )
        if not len(found.pairs):
            figure.text(0.5, 0.5, f"no near-duplicates at {args.threshold:g}", ha="center", va="center")
        add_caption(figure, model, source)
        write_figure(figure, path, mark(args.protocol), dpi=200, bbox_inches="tight", pad_inches=0.05)
    largest = int(np.bincount(groups).max()) if len(groups) else 0
    if largest > max(10, len(hashes) / 2):
        warnings.warn(
            f"one group has {largest} of the {len(hashes)} images. If they are not alike, raise --threshold or use a "
            "trained model."
        )
    print(
        f"{len(kept)} groups of near-duplicates with {len(images)} of {len(hashes)} images; {found.num_across} pairs "
        "across splits"
    )
    print(f"wrote {' and '.join(map(str, files))}")
