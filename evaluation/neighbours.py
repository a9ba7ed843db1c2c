"""Images and those of the training split that are most similar to a model, as a picture."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch.nn import functional as F

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model
from .decoding import Reading, decode_image
from .features import (
    Features,
    extract_features,
    features_of,
    find_eval_split,
    has_labels,
    images_of,
    load_model_of,
    reading_settings,
)
from .labels import match_names
from .models import reading_of, to_values
from .pictures import (
    add_caption,
    add_picture,
    check_files,
    choose_images,
    find_images,
    image_label,
    short_label,
    start_figure,
    to_picture,
    write_files,
)


COLORS = {True: "tab:green", False: "tab:red"}  # of the frame: of the query's class, or not


def nearest_images(
    queries: torch.Tensor, features: torch.Tensor, k: int, own: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar features to each query by cosine similarity, the most similar first.

    Args:
        queries: (queries, hidden); need not be normalised.
        features: (images, hidden).
        k: At most the number of images, less one with `own`.
        own: For each query, its own index in `features`, which is no neighbour.

    Returns:
        Indices and similarities, each (queries, k).

    Raises:
        ValueError: a k out of bounds.
    """
    num_images = len(features) - (own is not None)
    if not 1 <= k <= num_images:
        raise ValueError(f"k must be between 1 and the {num_images} images to choose from, got {k}")
    similarities = F.normalize(queries.float(), dim=1) @ F.normalize(features.float(), dim=1).T
    if own is not None:
        similarities[range(len(queries)), own] = -torch.inf
    values, indices = similarities.topk(k, dim=1)
    return indices.numpy(), values.numpy()


def draw_neighbours(
    queries: Sequence[np.ndarray],
    neighbours: Sequence[Sequence[np.ndarray]],
    similarities: np.ndarray,
    query_names: Sequence[str],
    names: Sequence[Sequence[str]] | None = None,
    same_class: np.ndarray | None = None,
):
    """A figure with a row for each query and its neighbours.

    Args:
        queries: (height, width, 3) each.
        neighbours: k images for each query.
        similarities: (queries, k), written under the neighbours.
        query_names: Written under the queries; may have several lines.
        names: Of each neighbour, written under it too.
        same_class: Booleans (queries, k); a neighbour's frame is green where it is true, and red elsewhere.
    """
    num_rows, k = similarities.shape
    figure = start_figure(figsize=(1.1 * (k + 1), 1.5 * num_rows + 0.2), layout="constrained")
    axes = figure.subplots(num_rows, k + 1, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    for row, query in enumerate(queries):
        axes[row, 0].imshow(query)
        axes[row, 0].set_xlabel(query_names[row], fontsize=6, labelpad=2, parse_math=False)
        for column, (axis, neighbour) in enumerate(zip(axes[row, 1:], neighbours[row])):
            axis.imshow(neighbour)
            name = "" if names is None else f"{names[row][column]}\n"
            axis.set_xlabel(f"{name}{similarities[row, column]:.3f}", fontsize=6, labelpad=2, parse_math=False)
            if same_class is not None:
                axis.spines[:].set(color=COLORS[bool(same_class[row, column])], linewidth=2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], anchor="N")
    for axis in axes[:, 0] if same_class is not None else axes.flat:
        axis.spines[:].set_visible(False)
    axes[0, 0].set_title("query", fontsize=8)
    axes[0, 1].set_title("most similar", fontsize=8)
    return figure


def _name(features: Features, index: int) -> str:
    """The file of an image, or its number in the dataset, and under it its class, if it has one."""
    file = features.names[index].rpartition("/")[2]
    lines = [f"number {file}" if file.isdigit() else short_label(file, 18)]
    label = features.labels[index]
    if label is not None and not isinstance(label, (list, np.ndarray)):
        lines.append(short_label(features.class_names[label] if features.class_names else str(label), 18))
    return "\n".join(lines)


def _find_pictures(args: Namespace, features: Features, split: str, indices: np.ndarray) -> dict[int, np.ndarray]:
    """The pixels of some images of the split that features are of, by index, decoded once each."""
    name, config = (args.dataset_name or features.data["name"]), args.dataset_config_name or features.data["config"]
    given = {"dataset_name": name, "dataset_config_name": config} | reading_settings(features)
    dataset = images_of(Namespace(**vars(args) | given), split)
    num_images = len(features) + len(features.failed)
    if len(dataset) != num_images:
        raise ValueError(f"split {split} of {name} has {len(dataset)} images, and there are features of {num_images}")
    reading, image_processor = Reading(3), None
    if args.model:
        model, image_processor = load_model_of(args)
        reading = reading_of(args, model)
    reading, rows = reading.of(dataset.features), features.rows

    def picture(index: int) -> np.ndarray:
        pixels = decode_image(dataset[int(rows[index])]["image"], reading)
        return to_picture(to_values(image_processor, pixels), args.display_channels)

    return {index: picture(index) for index in np.unique(indices).tolist()}


def add_arguments(parser: Parser) -> None:
    add_model(parser, several=False)
    add_dataset(parser)
    add_extraction(parser)
    add_picture(parser, "neighbours.png", 8, "queries")
    parser.add_argument("--k", type=int, default=8, help="neighbours of each image (default: %(default)s)")


def measure(args: Namespace) -> None:
    check_files(args)
    if args.num_images < 1 or args.k < 1:
        raise ValueError(f"num_images and k must be at least 1, got {args.num_images} and {args.k}")
    if args.streaming:
        raise ValueError("images are shown by their number, which a stream does not have; leave out --streaming")
    if args.image and not args.model:
        raise ValueError("give --model, too, which computes the features of --image")
    if not args.features and not (args.model and args.dataset_name):
        raise ValueError(
            "give --model and --dataset_name, or --features, a folder that `dino-eval features` has filled"
        )
    rows = find_images(args.image, args.num_images, args.seed) if args.image else None
    train = features_of(args, args.train_split)
    own = None
    if rows is not None:
        model, image_processor = load_model_of(args)
        reading = reading_of(args, model)
        queries = extract_features(
            model, Dataset.from_list(rows), image_processor, args.batch_size, args.num_workers, "queries",
            reading=replace(reading, allow_unread=True),
        )  # fmt: skip
        rows, shown = [rows[row] for row in queries.rows], np.arange(len(queries))
    else:
        split = find_eval_split(args)
        queries = train if split == args.train_split else features_of(args, split)
        shown = np.sort(choose_images(len(queries), args.num_images, args.seed))
        own = shown if queries is train else None
    indices, similarities = nearest_images(queries.features[shown], train.features, args.k, own)
    if not PartialState().is_main_process:
        return

    pictures = _find_pictures(args, train, args.train_split, indices)
    if rows is not None:
        query_pictures = [
            to_picture(to_values(image_processor, decode_image(row["image"], reading)), args.display_channels)
            for row in rows
        ]
        query_names = [short_label(image_label(row), 18) for row in rows]
    else:
        by_index = _find_pictures(args, queries, split, shown)
        query_pictures = [by_index[index] for index in shown]
        query_names = [_name(queries, index) for index in shown]
    names = [[_name(train, index) for index in row] for row in indices]
    same_class = None
    if has_labels(train) and has_labels(queries):
        labels = match_names(queries.labels[shown], queries.class_names, train.class_names)
        same_class = labels[:, None] == train.labels[indices]
    figure = draw_neighbours(
        query_pictures, [[pictures[index] for index in row] for row in indices], similarities, query_names, names,
        same_class,
    )  # fmt: skip
    add_caption(figure, train.model["name"], f"{train.data['name']}, {train.data['split']}")
    rows = queries.rows[shown], train.rows[indices]
    write_files(args, figure, {"queries": rows[0], "indices": rows[1], "similarities": similarities})
