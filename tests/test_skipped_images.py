"""Broken images in every protocol: skipped, counted and named, and the result is that of the other images."""

import json
import shutil

import numpy as np
import pytest

from evaluation.__main__ import evaluate_from_command_line
from training.monitor import read_metrics

from .commands import command
from .conftest import noise
from .test_features import answer, ours  # noqa: F401
from .test_training import recipe  # noqa: F401


BROKEN = ("train/b/05.jpg", "test/a/02.jpg")
PROTOCOLS = {
    "knn": ("knn", "--k", 3),
    "knn, streaming": ("knn", "--k", 3, "--streaming"),
    "logistic": ("logistic", "--c", 1),
    "few_shot": ("few_shot", "--shots", 2, "--percent"),
    "clustering": ("clustering",),
    "retrieval": ("retrieval",),
    "linear": ("linear", "--n_last_blocks", 2, "--epochs", 2, "--learning_rates", 0.001, 0.1, "--val_fraction", 0.2),
    "finetune": ("finetune", "--epochs", 1, "--batch_size", 8),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of class folders in which one image of either split is cut in half, and the same without those."""
    root, rng = tmp_path_factory.mktemp("broken"), np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 7)):
        for label in "ab":
            (root / "broken" / split / label).mkdir(parents=True)
            for i in range(number):
                noise(rng, 40).save(root / "broken" / split / label / f"{i:02d}.jpg")
    shutil.copytree(root / "broken", root / "whole")
    for name in BROKEN:
        content = (root / "broken" / name).read_bytes()
        (root / "broken" / name).write_bytes(content[: len(content) // 2])
        (root / "whole" / name).unlink()
    return root


def skipped_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "skipped" in line]


@pytest.mark.parametrize(
    ("protocol", "processes"),
    [
        *((protocol, 1) for protocol in PROTOCOLS),
        *((protocol, 2) for protocol in ("knn", "knn, streaming", "linear")),
        pytest.param("finetune", 2, marks=pytest.mark.slow),
    ],
)
def test_protocols_measure_the_images_that_can_be_decoded(protocol, processes, folders, ours, tmp_path):  # noqa: F811
    argv, reports = PROTOCOLS[protocol], []
    for name in ("broken", "whole"):
        output = tmp_path / f"{name}.json"
        argv = (*PROTOCOLS[protocol], "--model", ours, "--dataset_name", folders / name, "--output", output)
        finished = command(*argv, module="evaluation", processes=processes)
        assert finished.returncode == 0, finished.stderr
        reports.append(json.loads(output.read_text())[0])
        lines = skipped_lines(finished.stderr)
        parts = BROKEN[1:] if protocol == "clustering" else BROKEN
        assert len(lines) == (len(parts) if name == "broken" else 0), finished.stderr
        for line, part in zip(lines, parts):
            number = 24 if part.startswith("train") else 14
            start = f"dino-eval: warning: skipped 1 of {number} images ({ours}, {part.split('/')[0]}): "
            assert line.startswith(start + f"{part} cannot be decoded: ")
    broken, whole = reports
    assert broken["values"] == pytest.approx(whole["values"])
    for name, data in whole["data"].items():
        if isinstance(data, dict) and "num_images" in data:
            found = broken["data"][name]
            assert found.pop("num_skipped") == 1 and "num_skipped" not in data
            assert found["num_images"] == data["num_images"] and found.get("revision") == data.get("revision")


@pytest.mark.filterwarnings("ignore:perplexity")
@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (("neighbours", "--num_images", 99, "--k", 2), "queries"),
        (("embedding",), "images"),
        (("pca", "--num_images", 99), None),
        (("attention", "--num_images", 99), None),
        (("pca", "--num_images", 99, "--image", "{folder}/test"), None),
        (("neighbours", "--num_images", 99, "--k", 2, "--image", "{folder}/test"), None),
    ],
)
def test_pictures_skip_and_name_broken_images(argv, key, folders, ours, tmp_path):  # noqa: F811
    output, folder = tmp_path / "out.png", folders / "broken"
    argv = [str(arg).format(folder=folder) for arg in argv]
    given = [] if "pca" in argv and "--image" in argv else ["--dataset_name", folder]
    finished = command(*argv, "--model", ours, *given, "--output", output, "--save_arrays", module="evaluation")
    assert finished.returncode == 0, finished.stderr
    assert any(BROKEN[1] in line for line in skipped_lines(finished.stderr)), finished.stderr
    arrays = np.load(tmp_path / "out.npz")
    if key:  # rows count in the whole dataset
        assert arrays[key].tolist() == [row for row in range(14) if row != 2]
    elif "pca" in argv:
        assert len([name for name in arrays if name.startswith("components")]) == 13
    elif "attention" in argv:
        assert len([name for name in arrays if name.endswith("_masks")]) == 13
    else:
        assert len(arrays["queries"]) == 13


@pytest.mark.parametrize("protocol", ["knn", "linear", "features"])
def test_too_many_broken_images_are_an_error_that_names_a_remedy(protocol, folders, ours, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(folders / "whole", tmp_path / "images")
    argv = [protocol, "--model", ours, "--dataset_name", folder]
    argv += {
        "knn": ["--k", 1],
        "linear": ["--epochs", 1, "--n_last_blocks", 1],
        "features": ["--features", tmp_path / "out"],
    }[protocol]
    for number, path in enumerate(sorted(folder.glob("t*/*/*.jpg"))):
        content = path.read_bytes()
        if number % 4 == 0:
            path.write_bytes(content[: len(content) // 2])
    message = answer(evaluate_from_command_line, argv, capsys)
    assert "more than a tenth, such as " in message and "Repair or remove them, or give --allow_unread" in message
    of_train, of_test = r"skipped 5 of 23 images .*; .*; .*; \.\.\.", "skipped 4 of 13 images"
    with pytest.warns(UserWarning, match=of_train), pytest.warns(UserWarning, match=of_test):
        evaluate_from_command_line([*map(str, argv), "--allow_unread"])
    for path in folder.glob("t*/*/*.jpg"):
        path.write_bytes(b"text")
    argv += ["--overwrite", "--allow_unread"]
    message = answer(evaluate_from_command_line, argv, capsys)
    assert "none of the " in message and ".jpg cannot be decoded: no image file" in message


def test_knn_of_training_skips_broken_images(recipe, folders, tmp_path):  # noqa: F811
    found = []
    for name in ("broken", "whole"):
        argv = ("--config", recipe, "--dataset_name", folders / name, "--output_dir", tmp_path / name)
        argv += ("--max_steps", 1, "--per_device_train_batch_size", 8, "--eval_steps", 1)
        finished = command(*argv)
        assert finished.returncode == 0, finished.stderr
        for part, number, what in ((BROKEN[0], 24, "k-NN bank"), (BROKEN[1], 14, "k-NN test")):
            line = f"skipped 1 of {number} images ({what}): {part} cannot be decoded: "
            assert finished.stderr.count(line) == (name == "broken")
        found.append({key: value for key, value in read_metrics(tmp_path / name)[0].items() if "knn" in key})
    assert found[0] and found[0] == found[1]  # before the first step


def test_benchmark_with_a_broken_image_names_the_remedy(ours, tmp_path, capsys):  # noqa: F811
    """A distractor is none of the benchmark's images, and is skipped."""
    rng = np.random.default_rng(0)
    for name in ("data/original/200000.jpg", "data/strong/200001.jpg", *(f"others/{i}.jpg" for i in range(12))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(rng).save(tmp_path / name)
    (tmp_path / "others/3.jpg").write_bytes(b"text")
    argv = ["copy_detection", "--model", ours, "--dataset_name", tmp_path / "data", "--image_size", 32]
    with pytest.warns(UserWarning, match=r"skipped 1 of 12 images \(.*, distractors\): .*/3.jpg cannot be decoded: "):
        evaluate_from_command_line([*map(str, argv), "--distractors", str(tmp_path / "others")])
    (tmp_path / "data/strong/200001.jpg").write_bytes(b"text")
    message = answer(evaluate_from_command_line, argv, capsys)
    assert "200001.jpg cannot be decoded" in message and message.endswith("Download it again.")
