"""Features of many images in two dimensions, by t-SNE or UMAP, with a colour for each class."""

import warnings
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model
from .features import features_of, find_eval_split, has_labels
from .pictures import add_caption, add_files, check_files, choose_images, short_label, start_figure, write_files


MAX_IN_LEGEND = 20  # classes that colours can tell apart
METHODS = {"tsne": "t-SNE", "umap": "UMAP"}  # by name in commands, the name in pictures


def embed_in_plane(
    features: torch.Tensor, method: str = "tsne", perplexity: float = 30, num_neighbors: int = 15, seed: int = 0
) -> np.ndarray:
    """Coordinates (images, 2) of features, divided by their norms: near for images of high cosine similarity.

    Args:
        features: (images, hidden).
        method: `tsne` (scikit-learn's, from the first two principal components) or `umap`.
        perplexity: Of t-SNE; at most a third of the other images, else it is clipped, with a warning.
        num_neighbors: Of UMAP; clipped to the other images, with a warning.
        seed: With the same seed, the same coordinates.

    Raises:
        ValueError: fewer than 4 images, or a perplexity or number of neighbours that is too small.
        ImportError: UMAP is not installed.
    """
    num_others = len(features) - 1
    if num_others < 3:
        raise ValueError(f"an embedding needs at least 4 images, got {len(features)}")
    if not perplexity >= 1 or num_neighbors < 2:
        raise ValueError(
            f"perplexity must be at least 1 and num_neighbors at least 2, got {perplexity} and {num_neighbors}"
        )
    points = normalize(features.float().numpy())
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise ImportError("UMAP is not installed: pip install 'dino-hf[umap]'") from error
        num_neighbors = _clip("num_neighbors", num_neighbors, num_others, len(features))
        # a single thread, without which there is no same result
        return UMAP(n_neighbors=num_neighbors, random_state=seed, n_jobs=1).fit_transform(points)
    perplexity = _clip("perplexity", perplexity, num_others / 3, len(features))
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


def _clip(name: str, value: float, highest: float, num_images: int) -> float:
    if value > highest:
        warnings.warn(f"{name} = {value:g} is too much for {num_images} images and is clipped to {highest:g}")
    return min(value, highest)


def draw_embedding(
    coordinates: np.ndarray,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "",
):
    """A figure of points (images, 2): a colour a class, and a legend of up to 20 classes; of more, a colour scale
    over their order. All of one colour without labels."""
    from matplotlib import colormaps  # chooses no backend

    figure = start_figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.add_subplot(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    style = {"s": float(np.clip(6000 / len(coordinates), 2, 24)), "linewidths": 0, "alpha": 0.8}
    x, y = coordinates.T
    if labels is None:
        axis.scatter(x, y, color="tab:blue", **style)
    else:
        classes, numbers = np.unique(labels, return_inverse=True)
        order = np.random.default_rng(0).permutation(len(labels))  # no class lies over all others
        if len(classes) <= MAX_IN_LEGEND:
            palette = np.array(colormaps["tab10" if len(classes) <= 10 else "tab20"].colors)
            axis.scatter(x[order], y[order], color=palette[numbers[order]], **style)
            for number, label in enumerate(classes):
                name = class_names[label] if class_names else str(label)
                axis.scatter([], [], color=palette[number], s=18, label=short_label(name))
            figure.legend(loc="outside right center", fontsize=7, frameon=False, handletextpad=0.2)
        else:
            points = axis.scatter(x[order], y[order], c=numbers[order], cmap="turbo", **style)
            bar = figure.colorbar(points, ax=axis, shrink=0.6, aspect=30)
            bar.set_label(f"class, of {len(classes)}", fontsize=7)
            bar.ax.tick_params(labelsize=7)
            bar.solids.set_alpha(1)
    axis.spines[:].set(linewidth=0.5, color="0.6")
    axis.set_title(title, fontsize=8)
    return figure


def add_arguments(parser: Parser) -> None:
    add_model(parser, several=False)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument("--method", choices=METHODS, default="tsne", help="(default: %(default)s)")
    parser.add_argument("--perplexity", type=float, default=30, help="of t-SNE (default: %(default)s)")
    parser.add_argument("--num_neighbors", type=int, default=15, help="of UMAP (default: %(default)s)")
    parser.add_argument(
        "--max_images", type=int, default=5000, help="points; of more images, as many by chance (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the method (default: %(default)s)")
    add_files(parser, "embedding.png")


def measure(args: Namespace) -> None:
    check_files(args)
    if args.max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {args.max_images}")
    if not args.features and not (args.model and args.dataset_name):
        raise ValueError(
            "give --model and --dataset_name, or --features, a folder that `dino-eval features` has filled"
        )
    features = features_of(args, find_eval_split(args))
    if not PartialState().is_main_process:
        return
    sample = np.sort(choose_images(len(features), args.max_images, args.seed, "max_images"))
    coordinates = embed_in_plane(
        features.features[sample], args.method, args.perplexity, args.num_neighbors, args.seed
    )
    labels = features.labels[sample]
    is_labeled = has_labels(features)
    title = f"{METHODS[args.method]} of the features of {len(sample):,} images"
    figure = draw_embedding(coordinates, labels if is_labeled else None, features.class_names, title)
    add_caption(figure, features.model["name"], f"{features.data['name']}, {features.data['split']}")
    arrays = {"images": features.rows[sample], "coordinates": coordinates} | ({"labels": labels} if is_labeled else {})
    write_files(args, figure, arrays)
