"""Images for a first try that need no download: `python -m training.quickstart FOLDER`.

Real handwritten digits (scikit-learn's, 8 x 8 pixels), each put at a random place, size and contrast on a cloudy
background of 32 x 32. Pixels alone no longer tell the digits apart well, and an untrained network hardly does.
"""

import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from sklearn.datasets import load_digits

from evaluation.command_line import run


SIDE = 32
SCENES_PER_DIGIT = 4
NUM_TRAIN_DIGITS = 1297  # of 1797; the digits of the test scenes are others


def resize(values: np.ndarray, side: int) -> np.ndarray:
    image = PillowImage.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((side, side), PillowImage.Resampling.BICUBIC))


def draw_scene(digit: np.ndarray, rng: np.random.Generator) -> PillowImage.Image:
    """A digit (8, 8) of values 0 to 16, somewhere on a background of its own."""
    dark, bright = 0.1, rng.uniform(0.65, 1)
    scene = dark + 0.03 * resize(rng.normal(size=(5, 5)), SIDE) + 0.03 * rng.normal(size=(SIDE, SIDE))
    side = int(rng.integers(15, 23))
    top, left = rng.integers(0, SIDE - side + 1, 2)
    place = np.s_[top : top + side, left : left + side]
    stroke = np.clip(resize(digit / 16, side), 0, 1)
    scene[place] = scene[place] * (1 - stroke) + bright * stroke
    return PillowImage.fromarray((np.clip(scene, 0, 1) * 255).astype(np.uint8))


def write_quickstart_images(folder: Path) -> None:
    """Writes `train` (5188 scenes) and `test` (500) as parquet, always the same ones."""
    digits = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.images))
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    splits = {"train": np.repeat(order[:NUM_TRAIN_DIGITS], SCENES_PER_DIGIT), "test": order[NUM_TRAIN_DIGITS:]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, indices in splits.items():
        rows = {
            "image": [draw_scene(digits.images[i], rng) for i in indices],
            "label": digits.target[indices].tolist(),
        }
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        print(f"wrote {len(indices)} images to {folder} ({split})")


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise ValueError(f"give one folder to write to, got {len(argv)} arguments")
    write_quickstart_images(Path(argv[0]))


if __name__ == "__main__":
    run("quickstart", main, sys.argv[1:])
