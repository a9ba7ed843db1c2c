"""Near-duplicates, against scipy and scikit-learn on the full matrix, and planted in image files."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import DBSCAN
from sklearn.metrics.pairwise import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import duplicates
from evaluation.__main__ import evaluate_from_command_line
from evaluation.duplicates import draw_pairs, find_duplicates, kept_images
from evaluation.features import read_features
from evaluation.outputs import is_from

from .commands import command
from .test_bad_input import answer
from .test_features import ours  # noqa: F401


def evaluate(*argv) -> None:
    evaluate_from_command_line(list(map(str, argv)))


def clustered(num_images: int = 400, seed: int = 0) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Features in clusters of different widths, of any length, with hashes and splits; some pixels are identical."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(num_images // 4, 32))
    of = rng.integers(0, len(centers), num_images)
    features = centers[of] + rng.uniform(0.05, 0.6, (num_images, 1)) * rng.normal(size=(num_images, 32))
    features *= rng.uniform(0.1, 10, (num_images, 1))
    hashes = rng.integers(-(2**63), 2**63, num_images)
    hashes[rng.permutation(num_images)[:20]] = hashes[0]
    return torch.from_numpy(features).float(), hashes, rng.integers(0, 3, num_images)


def partition(groups: np.ndarray) -> set[frozenset]:
    return {frozenset(np.flatnonzero(groups == number).tolist()) for number in set(groups.tolist()) - {-1}}


@pytest.mark.parametrize("block_size", [7, 64, 400, 4096])
@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_groups_equal_those_of_the_full_matrix(block_size, threshold):
    features, hashes, splits = clustered()
    similarities = cosine_similarity(features.double().numpy())
    similarities[hashes[:, None] == hashes] = 1
    _, labels = connected_components(similarities >= threshold)
    found = find_duplicates(features, hashes, splits, threshold, 220, block_size)
    groups = {group for group in partition(labels) if len(group) > 1}
    assert len(groups) > 3 and partition(found.groups) == groups
    by_density = DBSCAN(eps=1 - threshold, min_samples=2, metric="precomputed").fit((1 - similarities).clip(0))
    assert partition(found.groups) == partition(by_density.labels_)

    first, second = np.nonzero(np.triu(similarities >= threshold, 1))
    assert found.num_pairs == len(first) and found.num_across == (splits[first] != splits[second]).sum()
    values = similarities[first, second]
    order = np.argsort(-values, kind="stable")[:220]  # 190 pairs of identical pixels, in order
    np.testing.assert_allclose(found.similarities, values[order], atol=1e-6)
    np.testing.assert_array_equal(found.pairs, np.stack([first, second], axis=1)[order])


def test_groups_are_numbered_by_their_first_image():
    features = torch.eye(4)[[0, 1, 2, 1, 3, 2, 2]]
    found = find_duplicates(features, np.arange(7), block_size=2)
    assert found.groups.tolist() == [-1, 0, 1, 0, -1, 1, 1] and kept_images(found.groups).tolist() == [1, 2]
    assert found.pairs.tolist() == [[1, 3], [2, 5], [2, 6], [5, 6]] and found.num_across == 0


def test_chains_join_a_group():
    angles = torch.arange(20) * 0.1  # cos(0.1) = 0.995, cos(0.2) = 0.980
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = find_duplicates(features, np.arange(20), threshold=0.99, block_size=3)
    assert (found.groups == 0).all() and found.num_pairs == 19


def test_no_images_alike_gives_no_groups():
    for num_images in (1, 5):
        found = find_duplicates(torch.eye(5)[:num_images], np.arange(num_images))
        assert (found.groups == -1).all() and found.pairs.shape == (0, 2) and found.num_pairs == 0


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("alike", [False, True])
def test_memory_is_bounded_by_blocks_and_images(alike, monkeypatch):
    """Where all images are alike, too, nothing grows with the number of pairs."""
    waiting = []

    class Watched(duplicates._Components):
        def add(self, first, second):
            super().add(first, second)
            waiting.append(sum(edges.shape[1] for edges in self.waiting))

    monkeypatch.setattr(duplicates, "_Components", Watched)
    features, hashes, _ = clustered(900)
    features = torch.ones_like(features) if alike else features
    with Largest() as largest:
        found = find_duplicates(features, hashes, num_pairs=5, block_size=16)
    assert largest.num_elements <= 2 * 16 * max(16, features.shape[1])  # indices of pairs, or rows of features
    assert max(waiting) <= 900 and len(found.pairs) == 5
    assert not alike or (found.num_pairs == 900 * 899 // 2 and (found.groups == 0).all())


def test_images_that_are_all_alike_give_one_line_error(ours, parquet_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(duplicates, "MAX_NEIGHBORS", 20)
    argv = "duplicates", "--model", ours, "--dataset_name", parquet_folder, "--threshold", 0.001
    message = answer(evaluate_from_command_line, [*argv, "--output", tmp_path / "d.csv"], capsys)
    assert "threshold must be above the similarity of unrelated images, got 0.001, where images have more" in message
    assert message.endswith("Raise --threshold, or use a trained model.") and not list(tmp_path.iterdir())


def test_large_group_gives_a_warning(ours, parquet_folder, tmp_path):  # noqa: F811
    argv = "duplicates", "--model", ours, "--dataset_name", parquet_folder, "--threshold", 0.001
    with pytest.warns(UserWarning, match="one group has 5[0-2] of the 52 images. If they are not alike, raise"):
        evaluate(*argv, "--output", tmp_path / "d.csv")


def scene(rng: np.random.Generator) -> PillowImage.Image:
    """A smooth picture, of which compression keeps the most."""
    coarse = PillowImage.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((160, 120), PillowImage.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """20 training and 8 test images and, of some, copies that are compressed, resized or in another format."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 8)):
        (folder / split).mkdir()
        for index in range(number):
            scene(rng).save(folder / split / f"{index}.png")
    train, test = folder / "train", folder / "test"
    PillowImage.open(train / "3.png").save(train / "3_again.bmp")  # identical pixels
    PillowImage.open(train / "5.png").save(test / "5_compressed.jpg", quality=30)
    PillowImage.open(train / "5.png").resize((100, 75)).save(test / "5_small.png")
    PillowImage.open(test / "1.png").resize((80, 60)).save(test / "1_small.jpg", quality=60)
    return folder


EXPECTED = [  # group, split, name, keep
    (0, "train", "3.png", "true"),
    (0, "train", "3_again.bmp", "false"),
    (1, "train", "5.png", "true"),
    (1, "test", "5_compressed.jpg", "false"),
    (1, "test", "5_small.png", "false"),
    (2, "test", "1.png", "true"),
    (2, "test", "1_small.jpg", "false"),
]


def read(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def short(rows: list[dict]) -> list[tuple]:
    return [(int(row["group"]), row["split"], row["name"].rpartition("/")[2], row["keep"]) for row in rows]


@pytest.fixture
def argv(ours, planted):  # noqa: F811
    """A command with features that unrelated images do not share."""
    return "duplicates", "--model", f"raw_pixels:{ours}", "--dataset_name", planted, "--threshold", 0.9


def test_planted_duplicates_are_found(argv, planted, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(duplicates, "draw_pairs", lambda *given: drawn.extend(given) or draw_pairs(*given))
    evaluate(*argv, "--output", tmp_path / "new/d.csv")
    said = capsys.readouterr().out
    assert "3 groups of near-duplicates with 7 of 32 images; 2 pairs across splits\n" in said
    assert f"wrote {tmp_path}/new/d.csv and {tmp_path}/new/d.png" in said
    rows = read(tmp_path / "new/d.csv")
    assert short(rows) == EXPECTED and list(rows[0]) == ["group", "split", "name", "similarity", "keep"]
    assert all((planted / row["name"]).parts[-2] == row["split"] for row in rows)
    values = [float(row["similarity"]) for row in rows]
    assert [values[row] for row in (0, 1, 2, 5)] == [1, 1, 1, 1] and all(0.9 < value <= 1 for value in values)

    pictures, names, similarities, identical = drawn
    assert names[0] == ("train\n3.png", "train\n3_again.bmp") and list(identical) == [True] + [False] * 4
    assert similarities[0] == 1 and (np.diff(similarities) <= 0).all() and len(pictures) == 5  # 3 pairs of 5.png
    expected = PillowImage.open(planted / "train/3.png")
    np.testing.assert_array_equal(pictures[0][0], np.asarray(expected))
    with PillowImage.open(tmp_path / "new/d.png") as picture:
        assert picture.width > 1000 and picture.height > 500
    assert is_from(tmp_path / "new/d.png", "duplicates")


def test_order_of_splits_decides_what_is_kept(argv, tmp_path):
    evaluate(*argv, "--splits", "test", "train", "--output", tmp_path / "d.csv")
    rows = short(read(tmp_path / "d.csv"))
    kept = {name: keep for _, _, name, keep in rows}
    assert kept["5.png"] == "false" and kept["5_compressed.jpg"] == "true" and kept["5_small.png"] == "false"
    evaluate(*argv, "--splits", "train", "--num_pairs", 0, "--output", tmp_path / "one.csv")
    assert short(read(tmp_path / "one.csv")) == EXPECTED[:2] and not (tmp_path / "one.png").exists()


def test_kept_features_give_the_same_groups(argv, ours, planted, tmp_path):  # noqa: F811
    kept = tmp_path / "features"
    evaluate(*argv, "--features", kept, "--output", tmp_path / "one.csv")
    evaluate("duplicates", "--features", kept, "--threshold", 0.9, "--output", tmp_path / "two.csv")
    evaluate(*argv, "--output", tmp_path / "three.csv")
    one, two, three = (read(tmp_path / f"{name}.csv") for name in ("one", "two", "three"))
    groups = [[(row["group"], row["split"], row["keep"]) for row in rows] for rows in (one, two, three)]
    assert one == two and groups[0] == groups[2] and len(one) == 7
    train = read_features(kept / "train.parquet")
    features = torch.nn.functional.normalize(train.features, dim=1)
    names = train.names or list(map(str, range(len(train))))
    found = [names.index(row["name"]) for row in one if row["split"] == "train"]
    similarities = [float(row["similarity"]) for row in one if row["split"] == "train"]
    assert features[found[0]] @ features[found[1]] == pytest.approx(similarities[1], abs=1e-4)


@pytest.mark.parametrize("images", ["parquet_folder", "flat_folder"])
def test_no_duplicates_gives_empty_files(images, ours, tmp_path, request, capsys):  # noqa: F811
    """Of parquet with labels, and of one split without."""
    argv = "duplicates", "--model", f"raw_pixels:{ours}", "--dataset_name", request.getfixturevalue(images)
    evaluate(*argv, "--output", tmp_path / "d.csv")
    assert "0 groups of near-duplicates with 0 of" in capsys.readouterr().out
    assert read(tmp_path / "d.csv") == [] and (tmp_path / "d.png").stat().st_size > 1000


def test_parquet_rows_are_named_by_number(ours, parquet_folder, tmp_path):  # noqa: F811
    argv = "duplicates", "--model", f"raw_pixels:{ours}", "--dataset_name", parquet_folder, "--threshold", 0.05
    with pytest.warns(UserWarning, match="one group has"):
        evaluate(*argv, "--output", tmp_path / "d.csv")
    rows = read(tmp_path / "d.csv")
    assert all(int(row["name"]) < {"train": 40, "test": 12}[row["split"]] for row in rows) and len(rows) > 26


def test_picture_marks_identical_pixels(tmp_path):
    wide, high = np.full((20, 60, 3), 200, np.uint8), np.full((60, 20, 3), 200, np.uint8)
    names = [("train\na$b$.png", "test\n_^{.png")] * 2
    figure = draw_pairs([(wide, high)] * 2, names, [1, 0.98], [True, False])
    titles = [panel.get_suptitle() for panel in figure.subfigs]
    assert titles == ["1.  1.0000,  identical pixels", "2.  0.9800"]
    assert figure.axes[0].get_xlabel() == "train\na$b$.png"
    for axis, (height, width) in zip(figure.axes, [(20, 60), (60, 20)] * 2):  # squares around the images
        assert abs(np.ptp(axis.get_xlim())) == pytest.approx(abs(np.ptp(axis.get_ylim())))
        centers = np.mean(axis.get_xlim()), np.mean(axis.get_ylim())
        assert centers == pytest.approx(((width - 1) / 2, (height - 1) / 2))
    figure.savefig(tmp_path / "pairs.png")
    picture = np.asarray(PillowImage.open(tmp_path / "pairs.png").convert("RGB")).astype(int)
    is_red = (abs(picture - (214, 39, 40)) < 12).all(-1)
    assert is_red[:, : picture.shape[1] // 2].sum() > 100 and not is_red[:, picture.shape[1] // 2 :].any()


def test_bad_input(argv, ours, planted, tmp_path, capsys):  # noqa: F811
    def ask(*more, start=argv):
        return answer(evaluate_from_command_line, [*start, *more], capsys)

    for threshold in ("0", "1.01", "-0.5", "nan"):
        assert f"threshold must be above 0 and at most 1, got {threshold}" in ask(f"--threshold={threshold}")
    assert "num_pairs must be from 0 to 300, got -1" in ask("--num_pairs=-1")
    assert "num_pairs must be from 0 to 300, got 301" in ask("--num_pairs", 301)
    assert "output must end in .csv, got x.png" in ask("--output", "x.png")
    assert "splits must be different, got test test" in ask("--splits", "test", "test")
    assert "has no split nope" in ask("--splits", "nope")
    assert "Leave it out." in ask("--streaming")
    assert "Name splits by --splits." in ask("--eval_split", "test")
    assert "--features" in ask(start=["duplicates"]) and "--dataset_name" in ask(start=["duplicates", "--model", ours])
    assert "features must be a folder of" in ask(start=["duplicates", "--features", tmp_path])
    (tmp_path / "d.csv").write_text("name,keep\n")
    assert "d.csv exists and is not from dino-eval duplicates" in ask("--output", tmp_path / "d.csv")
    assert (tmp_path / "d.csv").read_text() == "name,keep\n"


def test_features_of_two_models_give_one_line_error(argv, ours, planted, tmp_path, capsys):  # noqa: F811
    data = "--dataset_name", planted, "--features", tmp_path / "f"
    evaluate("features", "--model", ours, *data, "--splits", "train")
    evaluate("features", "--model", f"raw_pixels:{ours}", *data, "--splits", "test")
    start = ["duplicates", "--features", tmp_path / "f", "--output", tmp_path / "d.csv"]
    assert "features must be of one model, got" in answer(evaluate_from_command_line, start, capsys)


def test_missing_images_stop_only_the_picture(argv, planted, tmp_path, capsys):
    images, kept = tmp_path / "images", tmp_path / "features"
    images.symlink_to(planted)
    evaluate(*argv[:3], "--dataset_name", images, "--features", kept, "--num_pairs", 0, "--output", tmp_path / "d.csv")
    images.unlink()
    start = ["duplicates", "--features", kept, "--output", tmp_path / "e.csv"]
    message = answer(evaluate_from_command_line, start, capsys)
    assert "Give --dataset_name, or --num_pairs 0 for no picture." in message and not (tmp_path / "e.csv").exists()
    evaluate(*start, "--num_pairs", 0)
    assert read(tmp_path / "e.csv") == read(tmp_path / "d.csv")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(argv, tmp_path):
    evaluate(*argv, "--output", tmp_path / "one.csv")
    finished = command(*argv, "--output", tmp_path / "two.csv", processes=2, module="evaluation")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()
    assert finished.stdout.count("3 groups of near-duplicates") == 1
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()


SHARED = """
import numpy as np
from accelerate import PartialState
from evaluation.duplicates import find_duplicates
from evaluation.processes import connect_processes
from tests.test_duplicates import clustered
connect_processes()
features, hashes, splits = clustered()
found = find_duplicates(features, hashes, splits, 0.9, 20, 30)
one = np.load({path!r})
for name in one:
    np.testing.assert_array_equal(one[name], getattr(found, name))
print("equal", PartialState().num_processes)
"""


@pytest.mark.slow
def test_blocks_are_shared_by_processes(tmp_path):
    features, hashes, splits = clustered()
    found = find_duplicates(features, hashes, splits, 0.9, 20, 30)
    np.savez(tmp_path / "one.npz", **vars(found))
    (tmp_path / "script.py").write_text(SHARED.format(path=str(tmp_path / "one.npz")))
    finished = command(module=tmp_path / "script.py", processes=2)
    assert finished.returncode == 0 and finished.stdout.count("equal 2") == 2, finished.stderr
