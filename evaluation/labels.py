"""Labels as data frames and datasets hold them: unknown ones are not a class, and classes have names."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from accelerate import PartialState
from datasets import ClassLabel, Dataset


_UNKNOWN = ("", "nan", "NaN", "NaT", "<NA>")  # what pandas writes for a label that is missing


def plain_labels(labels: Sequence, class_names: Sequence[str] | None = None) -> np.ndarray:
    """Labels (images,) of one kind that numpy can sort; None for each that is unknown.

    Args:
        labels: Numbers, strings or booleans. Unknown ones are None, NaN, an empty string, the word that pandas writes
            for NaN, or with `class_names`, -1. Whole numbers in floats, as pandas makes them beside NaN, are integers.
        class_names: Of the classes that numbers stand for.

    Raises:
        ValueError: lists of labels, or labels of several kinds.
    """
    plain = []
    for label in labels:
        if isinstance(label, np.generic):
            label = label.item()
        if isinstance(label, (list, tuple, dict, np.ndarray)):
            raise ValueError("labels must be one an image, got lists of them. Name another column by --label_column.")
        is_unknown = label is None or (isinstance(label, float) and math.isnan(label))
        is_unknown = is_unknown or (isinstance(label, str) and label.strip() in _UNKNOWN)
        is_unknown = is_unknown or (class_names is not None and label == -1)
        plain.append(None if is_unknown else label)
    known = [label for label in plain if label is not None]
    if known and all(isinstance(label, float) and label.is_integer() for label in known):
        plain = [None if label is None else int(label) for label in plain]
    kinds = {"text" if isinstance(label, str) else "numbers" for label in known}
    if len(kinds) > 1:
        raise ValueError("labels must be numbers or text, got both. Name another column by --label_column.")
    if len(known) < len(plain):
        array = np.empty(len(plain), dtype=object)
        array[:] = plain
        return array
    return np.array(plain)


def known_labels(labels: np.ndarray, split: str) -> np.ndarray:
    """Return which labels (images,) are known, as indices; warn of the number of others.

    Raises:
        ValueError: if none is.
    """
    known = np.flatnonzero([label is not None for label in labels])
    if not len(known):
        raise ValueError(
            f"split {split} has no labels: all {len(labels)} are unknown. Name their column by --label_column, also "
            "when features are extracted."
        )
    if len(known) < len(labels) and PartialState().is_main_process:
        warnings.warn(
            f"{len(labels) - len(known)} of the {len(labels)} images of {split} have no label and do not count"
        )
    return known


def match_names(labels: np.ndarray, names: list[str] | None, like: list[str] | None) -> np.ndarray:
    """Number labels of one split as those of another, whose classes have the same names.

    Args:
        labels: (images,), numbers of classes.
        names: Of these classes.
        like: Names of the other split's classes. Names that differ by case alone are the same, if that is unambiguous.

    Returns:
        (images,), numbers of classes of `like`; of a class that is not there, a number beyond.
    """
    if not names or not like or names == like:
        return labels
    is_exact = any(len({name.casefold() for name in each}) < len(each) for each in (names, like))
    numbers = {name if is_exact else name.casefold(): number for number, name in enumerate(like)}
    table = [numbers.setdefault(name if is_exact else name.casefold(), len(numbers)) for name in names]
    return np.array([None if label is None else table[label] for label in labels])


def labeled_rows(dataset: Dataset, split: str, like: list[str] | None = None) -> tuple[Dataset, list]:
    """The rows of a dataset whose label is known, and their labels, numbered as the classes of `like`.

    Raises:
        ValueError: no label is known; see also `plain_labels`.
    """
    feature = dataset.features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else None
    labels = plain_labels(dataset["label"][:], names)
    known = known_labels(labels, split)
    if len(known) < len(labels):
        dataset, labels = dataset.select(known), labels[known]
    return dataset, match_names(labels, names, like).tolist()


def top_numbers(num_classes: int) -> tuple[int, ...]:
    """Return the k of the top-k accuracies to report: top-5 of up to 5 classes is always 100 %."""
    return (1, 5) if num_classes > 5 else (1,)


def draw(labels: np.ndarray, numbers: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the indices of `numbers[c]` images of each class c, drawn without replacement.

    Args:
        labels: (images,), classes from 0.
        numbers: (classes,), each at most the images of its class.
        generator: The source of chance.
    """
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, at random within
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[rank < np.repeat(numbers, counts)]


def draw_per_class(
    labels: np.ndarray, number: int, setting: str, names: Sequence | None = None, seed: int = 0, repetition: int = 0
) -> np.ndarray:
    """Return the indices of `number` images of each class, drawn without replacement.

    The same labels, seed and repetition give the same images in every protocol.

    Args:
        labels: (images,), of any kind that numpy can sort.
        number: Images of each class.
        setting: Name of the setting that `number` is from, for the error.
        names: Names of classes by their labels. Default: the labels.
        seed: Of the draw.
        repetition: Number of the draw, from 0.

    Raises:
        ValueError: a class with fewer images, or a number below 1.
    """
    if number < 1:
        raise ValueError(f"{setting} must be at least 1, got {number}")
    classes, numbered, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < number:
        smallest = classes[counts.argmin()]
        name = names[smallest] if names is not None else smallest
        raise ValueError(
            f"{setting} must be at most {counts.min()}, the number of training images of class {name}, got {number}. "
            "Lower it."
        )
    return draw(numbered, np.full(len(classes), number), np.random.default_rng([seed, repetition]))
