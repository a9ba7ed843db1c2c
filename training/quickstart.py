"""Images for a first try that need no download: `python -m training.quickstart FOLDER`.

scikit-learn's 1797 handwritten digits, 8 x 8 pixels each, enlarged to 32 x 32: crops of so few pixels would otherwise
have a handful of places to be. The digits are centred and scaled alike, which is why raw pixels tell them apart so
well; what DINO shows here is how far it takes an untrained network without a label.
"""

import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from datasets.utils.logging import disable_progress_bar
from PIL import Image as PillowImage
from sklearn.datasets import load_digits

from modeling_dino.command_line import run


NUM_TRAIN = 1297
SIZE = (32, 32)


def write_digits(folder: Path) -> None:
    """Write `train` (1297 images) and `test` (500) as parquet, always the same ones; files that are there stay."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, indices in (("train", order[:NUM_TRAIN]), ("test", order[NUM_TRAIN:])):
        pixels = (digits.images[indices] * 255 / 16).astype(np.uint8)
        images = [PillowImage.fromarray(image).resize(SIZE, PillowImage.Resampling.BICUBIC) for image in pixels]
        rows = {"image": images, "label": digits.target[indices].tolist()}
        file = folder / f"{split}-00000-of-00001.parquet"
        if file.exists():
            print(f"{file} is there already")
            continue
        Dataset.from_dict(rows, features=features).to_parquet(file.with_suffix(".incomplete"))
        file.with_suffix(".incomplete").replace(file)
        print(f"wrote {len(indices)} images to {folder} ({split})")


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise ValueError(f"give one folder to write to, got {len(argv)} arguments")
    disable_progress_bar()  # of so few images it says nothing
    write_digits(Path(argv[0]))


if __name__ == "__main__":
    run("quickstart", main, sys.argv[1:])
