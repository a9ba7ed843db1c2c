"""The suite's measures as metrics of Hugging Face `evaluate`: `evaluate.load("evaluation/metrics/NAME")` or `load`."""

from collections.abc import Sequence
from pathlib import Path

import evaluate
import numpy as np

from modeling_dino.command_line import nearest


def load(name: str, **kwargs) -> evaluate.Metric:
    """`evaluate.load` of one of the metrics here, wherever the package is installed; nothing is downloaded.

    Args:
        name: Of its folder.
        kwargs: Of `evaluate.load`.

    Raises:
        ValueError: a name that there is not.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"there is no metric {name}" + nearest(name, names))
    return evaluate.load(str(folder / name), **kwargs)


def ranks_of_positives(similarities: Sequence[float], relevance: Sequence[int]) -> np.ndarray:
    """Ranks, from 0 and ascending, of what a query should find; equal similarities keep their order.

    Args:
        similarities: Of the query with each entry of the database.
        relevance: 1 for what the query should find, 0 for what it should not, -1 for what is taken out of the ranking.

    Raises:
        ValueError: another number of entries in one than in the other, or other relevance.
    """
    if len(similarities) != len(relevance):
        raise ValueError(f"a query has {len(similarities)} similarities and {len(relevance)} entries of relevance")
    similarities, relevance = np.asarray(similarities), np.asarray(relevance)
    if not np.isin(relevance, (-1, 0, 1)).all():
        raise ValueError(f"relevance must be -1, 0 or 1, got {sorted(set(relevance.tolist()))}")
    ranked = relevance[np.argsort(-similarities, kind="stable")]
    return np.flatnonzero(ranked[ranked >= 0])


def masks(prediction: Sequence, truth: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Two boolean masks (height, width) of lists.

    Raises:
        ValueError: masks of different sizes, or none.
    """
    prediction, truth = np.array(prediction, dtype=bool), np.array(truth, dtype=bool)
    if prediction.shape != truth.shape or prediction.ndim != 2:
        raise ValueError(f"both masks must be (height, width), got {prediction.shape} and {truth.shape}")
    return prediction, truth
