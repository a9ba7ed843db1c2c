"""Retrieval of landmarks: Revisited Oxford and Paris, medium, hard and easy, mAP and mP@{1, 5, 10}.

A folder holds `gnd_roxford5k.pkl` or `gnd_rparis6k.pkl` (or one of your own of that kind) and `jpg/NAME.jpg`, as the
benchmark has them.
"""

import pickle
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_dino.command_line import Parser, check_files

from .arguments import add_extraction, add_model, add_output
from .descriptors import describe_images, image_rows
from .features import DTYPES
from .images import content_of
from .models import RawPixels, describe_model, load_model, patch_size, pooled, run_model
from .report import Report, make_report
from .retrieval import average_precision, in_percent, precision_at_k


IMAGE_SIZE = 224
SCALES = (1, 2**-0.5, 0.5)  # of --multiscale
# level -> the lists of a query's ground truth that are positives, and those that are taken out of the ranking
LEVELS = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}


def ranking_scores(
    rankings: np.ndarray,
    positives: Sequence[Sequence[int]],
    junk: Sequence[Sequence[int]],
    k: Sequence[int] = (1, 5, 10),
) -> dict[str, np.ndarray]:
    """Average precision and precision at k of every query, as the evaluation of Revisited Oxford and Paris has them.

    Args:
        rankings: (queries, database), each row the database's indices, the most similar first.
        positives: For each query, the indices that it should find.
        junk: For each query, the indices that are taken out of its ranking.
        k: Of the precisions.

    Returns:
        `mAP` and `mP@{k}`, each (queries,) in [0, 1]; nan for a query without positives.
    """
    names = ["mAP"] + [f"mP@{top}" for top in k]
    scores = {name: np.full(len(rankings), np.nan) for name in names}
    for query, (ranking, wanted, ignored) in enumerate(zip(rankings, positives, junk, strict=True)):
        if len(wanted):
            kept = ranking[~np.isin(ranking, ignored)]
            ranks = np.flatnonzero(np.isin(kept, wanted))
            scores["mAP"][query] = average_precision(ranks, len(wanted))
            for top in k:
                scores[f"mP@{top}"][query] = precision_at_k(ranks, top)
    return scores


def crop_to_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The upper left part (..., height, width) that whole patches cover: all that a convolution with a kernel and a
    stride of `patch_size` sees, which is what the original's network starts with.

    Raises:
        ValueError: an image smaller than a patch.
    """
    height, width = (side // patch_size * patch_size for side in pixel_values.shape[-2:])
    if not height or not width:
        shape = "x".join(map(str, pixel_values.shape[-2:]))
        raise ValueError(f"an image of {shape} pixels is smaller than a patch of {patch_size}; use larger images")
    return pixel_values[..., :height, :width]


@torch.no_grad()
def embed(model: PreTrainedModel, images: Sequence[torch.Tensor], multiscale: bool = False) -> torch.Tensor:
    """Features (images, hidden) in fp32 of images (channels, height, width) of any sizes; equal ones share a pass.

    Args:
        model: In evaluation mode.
        images: Normalised.
        multiscale: Take the mean of the features at the scales 1, 1/sqrt(2) and 1/2, divided by its norm.
    """
    by_size = defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.shape].append(index)
    features = [None] * len(images)
    for indices in by_size.values():
        pixel_values = torch.stack([images[index] for index in indices]).to(model.device)
        feature = 0
        for scale in SCALES if multiscale else SCALES[:1]:
            scaled = pixel_values if scale == 1 else F.interpolate(pixel_values, scale_factor=scale, mode="bilinear")
            feature += pooled(model, run_model(model, crop_to_patches(scaled, patch_size(model)))).float()
        feature = F.normalize(feature, dim=1) if multiscale else feature
        for index, row in zip(indices, feature.cpu()):
            features[index] = row
    return torch.stack(features)


def thumbnail(picture: PillowImage.Image, size: int) -> PillowImage.Image:
    """The picture made to fit in a square of `size` where it does not, with its aspect."""
    picture.thumbnail((size, size), PillowImage.Resampling.LANCZOS)
    return picture


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and numpy arrays, and knows no other name: a pickle may call what it names."""

    KNOWN = {
        (module, function.__name__): function
        for function in (np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0], np.ndarray, np.dtype)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    }
    # how protocols before 3 write bytes
    KNOWN["_codecs", "encode"] = lambda text, encoding: text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and may hold nothing but plain values")
        return self.KNOWN[module, name]


def read_ground_truth(path: Path) -> dict[str, list]:
    """Reads a `gnd_*.pkl` of Revisited Oxford and Paris without running any code that it might hold.

    Returns:
        `imlist` and `qimlist`, names of images without ending, and `gnd`, for each query a dict of the indices
        `easy`, `hard` and `junk` of images, and `bbx`, (left, top, right, bottom) of the query in pixels.

    Raises:
        ValueError: anything else.
    """
    check_files(path)
    with open(path, "rb") as file:
        try:
            content = _PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # whatever a broken file makes of the machine that a pickle is
            raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        images, queries = ([str(name) for name in content[key]] for key in ("imlist", "qimlist"))
        ground_truth = [
            {key: np.asarray(query[key], dtype=np.int64).reshape(-1).tolist() for key in ("easy", "hard", "junk")}
            | {"bbx": np.asarray(query["bbx"], dtype=np.float64).reshape(4).tolist()}
            for query in content["gnd"]
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is no ground truth of Revisited Oxford or Paris, a dict of imlist, qimlist and gnd, the last a "
            f"list of dicts of easy, hard, junk and bbx: {type(error).__name__} {error}"
        ) from error
    if len(ground_truth) != len(queries):
        raise ValueError(f"{path} has {len(queries)} queries and {len(ground_truth)} entries of ground truth")
    indices = [index for query in ground_truth for key in ("easy", "hard", "junk") for index in query[key]]
    if any(not 0 <= index < len(images) for index in indices):
        raise ValueError(f"{path} has indices from {min(indices)} to {max(indices)} for {len(images)} images")
    return {"imlist": images, "qimlist": queries, "gnd": ground_truth}


def revisited_scores(
    query_features: torch.Tensor, database_features: torch.Tensor, ground_truth: Sequence[dict]
) -> dict[str, np.ndarray]:
    """Average precision and precision at 1, 5 and 10 of every query at each level of Revisited Oxford and Paris.

    Medium looks for easy and hard images and takes junk out of the ranking, hard looks for hard ones and takes out
    easy ones too, easy the other way round. `eval_image_retrieval.py` of the original reports medium and hard.

    Args:
        query_features: (queries, hidden); need not be normalised.
        database_features: (images, hidden).
        ground_truth: `gnd` of `read_ground_truth`.

    Returns:
        `{level}_mAP` and `{level}_mP@{k}`, each (queries,) in [0, 1]; nan for a query without positives.
    """
    similarity = F.normalize(query_features, dim=1) @ F.normalize(database_features, dim=1).T
    rankings = similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy()
    scores = {}
    for level, names in LEVELS.items():
        positives, junk = ([list(chain(*map(query.get, part))) for query in ground_truth] for part in names)
        level_scores = ranking_scores(rankings, positives, junk)
        scores |= {f"{level}_{name}": values for name, values in level_scores.items()}
    return scores


def add_arguments(parser: Parser) -> None:
    add_model(parser, IMAGE_SIZE, "side of the square that images fit in, with their aspect")
    parser.add_argument("--dataset_name", required=True, help="folder with gnd_*.pkl and jpg/")
    parser.add_argument(
        "--multiscale", action="store_true", help="mean feature of each image at the scales 1, 0.7, 0.5"
    )
    parser.add_argument(
        "--query_boxes", action="store_true", help="cut queries to their boxes (the original does not)"
    )
    add_extraction(parser)
    add_output(parser)


def measure(args: Namespace) -> Report:
    root, size = Path(args.dataset_name).expanduser(), args.image_size
    if not args.model or size < 1:
        raise ValueError(f"give --model, and an image_size of at least 1, got {args.model} and {size}")
    paths = sorted(root.glob("gnd_*.pkl"))
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise ValueError(
            f"{root} must hold one gnd_*.pkl beside jpg/, as Revisited Oxford and Paris do; found {found}"
        )
    benchmark = read_ground_truth(paths[0])
    database = image_rows([root / "jpg" / f"{name}.jpg" for name in benchmark["imlist"]])
    queries = image_rows([root / "jpg" / f"{name}.jpg" for name in benchmark["qimlist"]])
    if args.query_boxes:
        queries = [row | {"box": query["bbx"]} for row, query in zip(queries, benchmark["gnd"])]
    model, image_processor = load_model(args.model, dtype=DTYPES[args.dtype])
    if isinstance(model, RawPixels):
        raise ValueError("images of different sizes have different numbers of pixels, which cannot be compared raw")

    describe = partial(embed, model, multiscale=args.multiscale)
    query_images, database_images = (
        describe_images(
            model, image_processor, rows, partial(thumbnail, size=size), describe, args.batch_size, args.num_workers,
            f"{args.model}, {name}",
        )
        for name, rows in (("queries", queries), ("database", database))
    )  # fmt: skip
    scores = revisited_scores(query_images.features, database_images.features, benchmark["gnd"])
    data = {
        "name": paths[0].stem.removeprefix("gnd_"),
        "queries": content_of(query_images.hashes),
        "database": content_of(database_images.hashes),
        "queries_without_positives": {level: int(np.isnan(scores[f"{level}_mAP"]).sum()) for level in LEVELS},
    }
    return make_report(args, describe_model(model, args.model), data, in_percent(scores))
