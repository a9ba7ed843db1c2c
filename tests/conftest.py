import os


# before transformers, datasets and accelerate are imported: nothing in the tests may ask the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # sums then come out the same in every process

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage


def noise(rng: np.random.Generator, side: int = 24) -> PillowImage.Image:
    return PillowImage.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def accelerate_restored():
    """Undo what transformers' Trainer leaves in Accelerate's state, such as bf16, and in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory):
    """40 training and 12 test images of noise in two classes, as parquet, two shards for training."""
    folder, rng = tmp_path_factory.mktemp("parquet"), np.random.default_rng(0)
    features = Features({"picture": Image(), "kind": ClassLabel(names=["a", "b"])})
    for name, number in (("train-00000-of-00002", 20), ("train-00001-of-00002", 20), ("test-00000-of-00001", 12)):
        rows = {"picture": [noise(rng) for _ in range(number)], "kind": [i % 2 for i in range(number)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def flat_folder(tmp_path_factory):
    """12 PNGs without labels."""
    folder, rng = tmp_path_factory.mktemp("flat"), np.random.default_rng(1)
    for i in range(12):
        noise(rng).save(folder / f"{i}.png")
    return folder
