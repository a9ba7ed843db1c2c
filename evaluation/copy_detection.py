"""Copy detection: originals found by their distorted copies, on Copydays or pairs of your own.

Data are a folder in the layout of Copydays, `original/` and, as far as they are there, `strong/`,
`jpegqual/QUALITY/` and `crops/PERCENT/`; or a CSV file with the columns `query` and `positive`, paths of a copy and of
its original from the file's folder. A copy with several originals has several lines.
"""

import csv
import warnings
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image as PillowImage
from torch.nn import functional as F

from modeling_dino.command_line import Parser

from .arguments import add_extraction, add_model, add_output
from .decoding import IMAGE_SUFFIXES
from .descriptors import describe_images, image_rows
from .features import DTYPES
from .images import content_of, load_images
from .models import Tokens, describe_model, load_model, tokens
from .report import Report, make_report
from .retrieval import average_precision, in_percent


IMAGE_SIZE = 320
NUM_RETRIEVED = 20  # what lies beyond was not found
GEM_EXPONENT = 4
BLOCKS = [
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
]


def copy_descriptor(tokens: Tokens, exponent: float = GEM_EXPONENT) -> torch.Tensor:
    """(batch, 2 hidden): the CLS token, then the generalised mean of the patches, (mean of p^exponent)^(1/exponent)
    with p no less than 1e-6. Section 4.2 of the paper, `eval_copy_detection.py` of the original."""
    patches = tokens.patches.float().flatten(1, 2).clamp(min=1e-6)  # (batch, patches, hidden)
    return torch.cat([tokens.pooled.float(), patches.pow(exponent).mean(1).pow(1 / exponent)], dim=1)


class Whitening(NamedTuple):
    """x -> projection (x - mean).

    mean: (hidden,)
    projection: (hidden, hidden)
    """

    mean: torch.Tensor
    projection: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) @ self.projection.T


def fit_whitening(features: torch.Tensor) -> Whitening:
    """The original's whitening, from features (images, hidden) of other images than those that are searched.

    The rows of the projection are eigenvectors of the features' second moment, largest eigenvalue first, each divided
    by the square root of its eigenvalue, none taken for less than 1e-5 of the largest. The moment is about zero, and
    not about the mean that is subtracted, as in the original.
    """
    features = features.double()
    eigenvalues, eigenvectors = torch.linalg.eigh(features.T @ features / len(features))  # ascending
    eigenvalues = eigenvalues.clamp(min=1e-5 * eigenvalues.max())
    projection = (eigenvectors / eigenvalues.sqrt()).T.flip(0)
    return Whitening(features.mean(0).float(), projection.float())


@torch.no_grad()
def copy_detection_scores(
    queries: torch.Tensor, database: torch.Tensor, positives: Sequence[Sequence[int]], retrieved: int = NUM_RETRIEVED
) -> np.ndarray:
    """Average precision (queries,) in [0, 1] of the positives found among the first `retrieved`; nan without any.

    Args:
        queries: (queries, hidden); need not be normalised.
        database: (images, hidden).
        positives: For each query, the indices in the database that it should find.
        retrieved: Images that a query returns, by cosine similarity.
    """
    database = F.normalize(database, dim=1)
    scores = np.full(len(queries), np.nan)
    query = 0
    for chunk in F.normalize(queries, dim=1).split(1024):
        similarity = chunk @ database.T  # (chunk, images)
        for found in similarity.topk(min(retrieved, len(database)), dim=1).indices.tolist():
            if wanted := positives[query]:
                ranks = [rank for rank, index in enumerate(found) if index in wanted]
                scores[query] = average_precision(ranks, len(wanted))
            query += 1
    return scores


class Copies(NamedTuple):
    """What is searched, and what is to be found there.

    originals: Their files.
    queries: Name of a block -> for each copy, its file and the indices of its originals.
    absent: Blocks of the layout that are not there.
    """

    originals: list[Path]
    queries: dict[str, list[tuple[Path, list[int]]]]
    absent: list[str]


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def read_copydays(root: Path) -> Copies:
    """Reads Copydays as its archives unpack, or a part of it.

    The original of a JPEG or a crop has the same name, the one of a strong copy a name with the same first four
    characters. Originals as queries, which the original's command has as well, would only find themselves.

    Raises:
        ValueError: no originals, or no copies.
    """
    originals = _images_in(root / "original")
    if not originals:
        raise ValueError(
            f"{root} is not in the layout of Copydays, original/, strong/, jpegqual/3/, ..., crops/80/: there are no "
            "images in original/"
        )
    queries = {}
    for block in BLOCKS:
        length = 4 if block == "strong" else None
        by_name: dict[str, list[int]] = {}
        for index, path in enumerate(originals):
            by_name.setdefault(path.stem[:length], []).append(index)
        if copies := _images_in(root / block):
            queries[block] = [(path, by_name.get(path.stem[:length], [])) for path in copies]
    if not queries:
        raise ValueError(f"there are no copies in {root}: no images in {', '.join(BLOCKS)}")
    return Copies(originals, queries, [block for block in BLOCKS if block not in queries])


def read_pairs(path: Path) -> Copies:
    """Reads pairs from a CSV file with the columns `query` and `positive`, paths from its folder.

    Raises:
        ValueError: other columns, no pairs, a line without one of the two, or an image that is both.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, lines = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is neither a folder nor a CSV file: {error}") from error
    if not {"query", "positive"} <= set(columns):
        raise ValueError(f"{path} needs the columns query and positive, its first line has {', '.join(columns)}")
    if not lines:
        raise ValueError(f"{path} holds no pairs")
    positives: dict[Path, list[Path]] = {}
    for number, line in enumerate(lines, start=1):
        if not line["query"] or not line["positive"]:
            raise ValueError(f"pair {number} of {path} lacks its query or its positive")
        positives.setdefault(path.parent / line["query"], []).append(path.parent / line["positive"])
    originals = list(dict.fromkeys(chain.from_iterable(positives.values())))
    index = {original: number for number, original in enumerate(originals)}
    if both := [query for query in positives if query in index]:
        raise ValueError(f"{both[0]} is a query and a positive in {path}; a copy cannot be an original, too")
    pairs = [(query, sorted({index[original] for original in found})) for query, found in positives.items()]
    return Copies(originals, {"pairs": pairs}, [])


def means_of_blocks(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over all copies in the blocks of JPEGs, and in those of crops.

    Copies of one original are not independent, and so these means get no interval.
    """
    grouped: dict[str, list[np.ndarray]] = {}
    for block, values in scores.items():
        if "/" in block:
            grouped.setdefault(block.partition("/")[0], []).append(values)
    return {f"{name}_mAP": float(np.nanmean(np.concatenate(parts))) for name, parts in grouped.items()}


def add_arguments(parser: Parser) -> None:
    add_model(parser, IMAGE_SIZE, "side of the squares that images become")
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="folder in the layout of Copydays, or CSV file of pairs (query, positive)",
    )
    parser.add_argument(
        "--distractors", help="folder or data set of images to search, too (the paper: 10k of YFCC100M)"
    )
    parser.add_argument(
        "--whitening", help="folder or data set of other images to learn a whitening from (the paper: 20k of YFCC100M)"
    )
    add_extraction(parser)
    add_output(parser)


def measure(args: Namespace) -> Report:
    path, size = Path(args.dataset_name).expanduser(), args.image_size
    if not args.model or size < 1:
        raise ValueError(f"give --model, and an image_size of at least 1, got {args.model} and {size}")
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}")
    copies = read_copydays(path) if path.is_dir() else read_pairs(path)
    rows = {
        "originals": image_rows(copies.originals),
        "copies": image_rows([copy for group in copies.queries.values() for copy, _ in group]),
    }
    for name, source in (("distractors", args.distractors), ("whitening", args.whitening)):
        if source:
            rows[name] = load_images(source, with_labels=False)
    model, image_processor = load_model(args.model, dtype=DTYPES[args.dtype])

    square = partial(PillowImage.Image.resize, size=(size, size), resample=PillowImage.Resampling.BICUBIC)

    def describe(images: list[torch.Tensor]) -> torch.Tensor:
        return copy_descriptor(tokens(model, torch.stack(images))[0])

    found = {
        name: describe_images(
            model, image_processor, images, square, describe, args.batch_size, args.num_workers,
            f"{args.model}, {name}", is_benchmark=name in ("originals", "copies"),
        )
        for name, images in rows.items()
    }  # fmt: skip
    queries, database = found["copies"].features, found["originals"].features
    if args.distractors:
        num_shared = int(np.isin(found["distractors"].hashes, found["originals"].hashes).sum())
        if num_shared:
            warnings.warn(f"{num_shared} of the distractors are originals, and count as wrong where they are found")
        database = torch.cat([database, found["distractors"].features])
    if args.whitening:
        features = found["whitening"].features
        if len(features) < features.shape[1]:
            warnings.warn(
                f"a whitening of {features.shape[1]} numbers wants more images than the {len(features)} of "
                f"{args.whitening}: what they do not vary in is amplified most"
            )
        whitening = fit_whitening(features)
        queries, database = whitening(queries), whitening(database)

    positives = [originals for group in copies.queries.values() for _, originals in group]
    scores = copy_detection_scores(queries, database, positives)
    starts = np.cumsum([len(group) for group in copies.queries.values()])[:-1]
    by_block = dict(zip(copies.queries, np.split(scores, starts)))
    data = {
        "name": args.dataset_name,
        **{name: content_of(images.hashes) for name, images in found.items()},
        "blocks_absent": copies.absent,
        "queries_without_positives": int(np.isnan(scores).sum()),
    }
    if copies.absent and PartialState().is_main_process:
        print(f"left out, as there are no images: {', '.join(copies.absent)}")
    scores = in_percent({f"{block}_mAP": values for block, values in by_block.items()})
    values = {name: 100 * value for name, value in means_of_blocks(by_block).items()}
    return make_report(args, describe_model(model, args.model), data, scores, values)
