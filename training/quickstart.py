"""Images for a first try that need no download: `python -m training.quickstart FOLDER`.

Pictures of 32 x 32 pixels: an ellipse with one of ten textures (stripes four ways, coarse and fine, checks, dots, rings,
blobs) somewhere on a plain ground. Colours, place, size, phase and a little rotation are random, so that pixels tell
next to nothing about the texture, and an untrained network no more.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from PIL import ImageFilter

from evaluation.command_line import run


SIDE = 32
COARSE, FINE = 7.0, 4.0  # periods in pixels


def stripes(angle: float, period: float) -> Callable:
    """Stripes across the direction `angle` (degrees)."""
    turn = np.deg2rad(angle)
    return lambda x, y, rng: np.sin(2 * np.pi * (x * np.cos(turn) + y * np.sin(turn)) / period)


def checks(x, y, rng):
    return np.sign(np.sin(2 * np.pi * x / COARSE) * np.sin(2 * np.pi * y / COARSE))


def dots(x, y, rng):
    return 2 * (np.cos(2 * np.pi * x / COARSE) + np.cos(2 * np.pi * y / COARSE) > 0.9) - 1.0


def rings(x, y, rng):
    return np.sin(2 * np.pi * np.hypot(x - x.mean(), y - y.mean()) / COARSE)


def blobs(x, y, rng):
    noise = PillowImage.fromarray(rng.normal(size=x.shape).astype(np.float32))
    smooth = np.asarray(noise.resize((6, 6)).resize(x.shape, PillowImage.Resampling.BICUBIC))
    return np.clip(1.5 * smooth / smooth.std(), -1, 1)


TEXTURES = {
    "stripes_0": stripes(0, COARSE),
    "stripes_45": stripes(45, COARSE),
    "stripes_90": stripes(90, COARSE),
    "stripes_135": stripes(135, COARSE),
    "fine_stripes_0": stripes(0, FINE),
    "fine_stripes_90": stripes(90, FINE),
    "checks": checks,
    "dots": dots,
    "rings": rings,
    "blobs": blobs,
}


def draw(texture: Callable, rng: np.random.Generator) -> PillowImage.Image:
    """An ellipse of `texture` on plain ground."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(float)
    turn, zoom = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.9, 1.1)
    x = zoom * (columns * np.cos(turn) + rows * np.sin(turn)) + rng.uniform(0, SIDE)
    y = zoom * (rows * np.cos(turn) - columns * np.sin(turn)) + rng.uniform(0, SIDE)
    radii = rng.uniform(0.3, 0.48, 2) * SIDE
    centre = rng.uniform(radii * 0.8, SIDE - radii * 0.8)
    inside = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
    paint = (texture(x, y, rng)[..., None] + 1) / 2
    first, second, ground = rng.uniform(0, 1, (3, 3))  # colours
    while not 0.25 < abs((first - second).mean()) < 0.6:
        first, second = rng.uniform(0, 1, (2, 3))
    picture = np.where(inside[..., None], paint * first + (1 - paint) * second, ground)
    picture += rng.normal(0, 0.03, picture.shape)
    image = PillowImage.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.4))


def write_quickstart_images(folder: Path) -> None:
    """Writes `train` (4000 pictures) and `test` (500) as parquet, the same ones every time."""
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=list(TEXTURES))})
    textures = list(TEXTURES.values())
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", 4000), ("test", 500)):
        labels = rng.integers(0, len(textures), number).tolist()
        rows = {"image": [draw(textures[label], rng) for label in labels], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        print(f"wrote {number} pictures to {folder} ({split})")


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise ValueError(f"give one folder to write to, got {len(argv)} arguments")
    write_quickstart_images(Path(argv[0]))


if __name__ == "__main__":
    run("quickstart", main, sys.argv[1:])
