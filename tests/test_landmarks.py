"""Retrieval of landmarks on a small benchmark in the layout of Revisited Oxford and Paris."""

import json
import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from evaluation.__main__ import evaluate_from_command_line
from evaluation.landmarks import crop_to_patches, embed, ranking_scores, read_ground_truth
from modeling_dino import DINOModel
from modeling_dino.command_line import run

from .original import META
from .test_retrieval import model  # noqa: F401


SIZES = [(100, 75), (75, 100), (90, 90), (41, 100)]


def landmark(rng, seed, size):
    """A coarse pattern of its own for each seed, with noise over it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(size), dtype=np.int64) + rng.integers(
        -140, 140, (*size[::-1], 3)
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """16 images of 4 landmarks, and 4 queries: the third without hard positives, the fourth without any."""
    root, rng = tmp_path_factory.mktemp("benchmark") / "roxford5k", np.random.default_rng(0)
    (root / "jpg").mkdir(parents=True)
    names = [f"image_{number}" for number in range(16)]
    for number, name in enumerate(names):
        landmark(rng, number % 4, SIZES[number // 4]).save(root / "jpg" / f"{name}.jpg")
    for query in range(4):
        landmark(rng, query, (80, 60)).save(root / "jpg" / f"query_{query}.jpg")
    ground_truth = [
        {"easy": [0, 4], "hard": np.array([8]), "junk": [12, 1], "bbx": [50.2, 5.0, 70.0, 49.6]},
        {"easy": [], "hard": [np.int64(1), 5, 9], "junk": np.array([2, 13]), "bbx": [0.0, 0.0, 20.0, 60.0]},
        {"easy": [2, 6], "hard": [], "junk": [], "bbx": np.array([0.0, 0.0, 80.0, 60.0])},
        {"easy": [], "hard": [], "junk": [3], "bbx": [0, 0, 80, 60]},
    ]
    content = {"imlist": names, "qimlist": [f"query_{query}" for query in range(4)], "gnd": ground_truth}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return root, content


def command(benchmark_root, model, output, *flags):  # noqa: F811
    argv = ["landmarks", "--model", str(model), "--dataset_name", str(benchmark_root), "--image_size", "48"]
    return [*argv, "--output", str(output), *flags]


def measured(benchmark_root, model, output, *flags):  # noqa: F811
    with pytest.warns(UserWarning, match="2 of the 4 queries have nothing to find"):
        evaluate_from_command_line(command(benchmark_root, model, output, *flags))
    (report,) = json.loads(output.read_text())
    return report


def test_scores_of_rankings_are_the_originals():
    case = META["retrieval"]
    positives, junk = ([query[key] for query in case["ground_truth"]] for key in ("ok", "junk"))
    scores = ranking_scores(np.array(case["ranks_columns_are_queries"]).T, positives, junk)
    expected = [np.nan if value is None else value for value in case["aps"]]
    np.testing.assert_allclose(scores["mAP"], expected, rtol=0, atol=1e-12)
    assert np.nanmean(scores["mAP"]) == pytest.approx(case["map"], abs=1e-12)
    precisions = [np.nanmean(scores[f"mP@{k}"]) for k in (1, 5, 10)]
    assert precisions == pytest.approx(case["mean_precision_at_1_5_10"], abs=1e-12)


def by_hand(root, content, folder, multiscale, query_boxes):
    """mAP of each level: one image at a time, and the precision after each positive by counting."""
    network, processor = DINOModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))

    def feature(name, box=None):
        with Image.open(root / "jpg" / f"{name}.jpg") as image:
            image = image.convert("RGB").crop(box)
        image.thumbnail((48, 48), Image.Resampling.LANCZOS)
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        total = 0
        for scale in (1, 2**-0.5, 0.5) if multiscale else (1,):
            scaled = pixels[None]
            if scale != 1:
                scaled = torch.nn.functional.interpolate(scaled, scale_factor=scale, mode="bilinear")
            height, width = (side - side % 8 for side in scaled.shape[-2:])
            with torch.no_grad():
                total = total + network(scaled[..., :height, :width]).last_hidden_state[0, 0]
        return (total / total.norm()).numpy()

    database = np.stack([feature(name) for name in content["imlist"]])
    means = {}
    for level, wanted, ignored in [
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["junk", "easy"]),
        ("easy", ["easy"], ["junk", "hard"]),
    ]:
        values = []
        for name, truth in zip(content["qimlist"], content["gnd"]):
            positives = {int(index) for key in wanted for index in truth[key]}
            junk = {int(index) for key in ignored for index in truth[key]}
            if not positives:
                continue
            box = [round(float(side)) for side in truth["bbx"]] if query_boxes else None
            order = np.argsort(-(database @ feature(name, box)))
            before, value, hits = 1.0, 0.0, 0
            for place, index in enumerate((index for index in order if index not in junk), start=1):
                if index in positives:
                    hits += 1
                    value += (before + hits / place) / 2 / len(positives)
                before = hits / place
            values.append(value)
        means[f"{level}_mAP"] = 100 * np.mean(values)
    return means


@pytest.mark.parametrize("flags", [(), ("--multiscale",), ("--query_boxes", "--batch_size", "3")])
def test_command_measures_what_a_loop_does(benchmark, model, tmp_path, flags):  # noqa: F811
    report = measured(benchmark[0], model, tmp_path / "report.json", *flags)
    expected = by_hand(*benchmark, model, "--multiscale" in flags, "--query_boxes" in flags)
    assert len(set(expected.values())) == 3
    if flags:  # they change what is expected at all
        assert expected != by_hand(*benchmark, model, False, False)
    for name, value in expected.items():
        assert report["values"][name] == pytest.approx(value, abs=1e-4)
        assert report["intervals"][name][0] <= value <= report["intervals"][name][1]
    assert set(report["values"]) == {
        f"{level}_{name}" for level in ("medium", "hard", "easy") for name in ("mAP", "mP@1", "mP@5", "mP@10")
    }
    assert report["data"]["name"] == "roxford5k" and report["data"]["database"]["num_images"] == 16
    assert report["data"]["queries_without_positives"] == {"medium": 1, "hard": 2, "easy": 2}


def test_crop_is_what_the_patches_of_the_original_see(model):  # noqa: F811
    network = DINOModel.from_pretrained(model).eval()
    pixels = torch.randn(1, 3, 45, 37)
    projection = network.embeddings.patch_embeddings.projection
    with torch.no_grad():
        assert torch.equal(projection(pixels), projection(crop_to_patches(pixels, 8)))
    assert crop_to_patches(pixels, 8).shape == (1, 3, 40, 32)
    with pytest.raises(ValueError, match="an image of 45x37 pixels is smaller than a patch of 40"):
        crop_to_patches(pixels, 40)


def test_features_come_in_the_images_order_whatever_their_sizes(model):  # noqa: F811
    network = DINOModel.from_pretrained(model).eval()
    images = [torch.randn(3, *size) for size in ((16, 24), (24, 16), (16, 24), (8, 8))]
    together, alone = embed(network, images), torch.cat([embed(network, [image]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


class _Calls:
    """What a pickle may hold: a call, made by whoever loads it."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_no_code(benchmark, tmp_path, protocol):
    root, content = benchmark
    path = tmp_path / "gnd_bad.pkl"
    for call in (_Calls(os.mkdir, str(tmp_path / "made")), _Calls(eval, "1 + 1"), _Calls(getattr, "", "join")):
        path.write_bytes(pickle.dumps(content | {"gnd": [call]}, protocol))
        with pytest.raises(ValueError, match="may hold nothing but plain values"):
            read_ground_truth(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])
def test_ground_truth_of_lists_and_arrays_is_read(benchmark, tmp_path, protocol, numpy):
    root, content = benchmark
    pickled = pickle.dumps(content, protocol)
    assert any(b"numpy" in str(argument).encode() for _, argument, _ in pickletools.genops(pickled))
    if numpy == "numpy.core" and protocol < 4:  # as older versions of numpy wrote it
        pickled = pickled.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "gnd_x.pkl").write_bytes(pickled)
    found = read_ground_truth(tmp_path / "gnd_x.pkl")
    assert found["imlist"] == content["imlist"] and found["qimlist"] == content["qimlist"]
    assert found["gnd"][1] == {"easy": [], "hard": [1, 5, 9], "junk": [2, 13], "bbx": [0, 0, 20, 60]}


def change(content, **changes):
    return content | {"gnd": [content["gnd"][0] | changes, *content["gnd"][1:]]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda content: [1, 2], "is no ground truth of Revisited Oxford or Paris"),
        (lambda content: change(content, easy="no"), "is no ground truth of Revisited Oxford or Paris"),
        (lambda content: change(content, bbx=[1, 2]), "is no ground truth of Revisited Oxford or Paris"),
        (lambda content: change(content, hard=[16]), "has indices from 0 to 16 for 16 images"),
        (lambda content: content | {"gnd": content["gnd"][:3]}, "has 4 queries and 3 entries"),
        (lambda content: content | {"imlist": [*content["imlist"][:-1], "gone"]}, "1 of 16 images are missing"),
        (lambda content: content | {"gnd": [content["gnd"][3]] * 4}, "no query has a positive"),
    ],
)
def test_mistakes_are_told_in_one_line(benchmark, model, tmp_path, capsys, make, message):  # noqa: F811
    root, content = benchmark
    (tmp_path / "jpg").symlink_to(root / "jpg")
    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(make(content)))
    with pytest.raises(SystemExit) as exit:
        run(
            "dino-eval",
            evaluate_from_command_line,
            ["landmarks", "--model", str(model), "--dataset_name", str(tmp_path)],
        )
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_folder_without_ground_truth_and_file_that_is_none(tmp_path):
    argv = ["landmarks", "--model", "x", "--dataset_name", str(tmp_path)]
    with pytest.raises(ValueError, match="must hold one gnd_"):
        evaluate_from_command_line(argv)
    (tmp_path / "gnd_x.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="gnd_x.pkl cannot be read"):
        evaluate_from_command_line(argv)
    with pytest.raises(ValueError, match="give --model"):
        evaluate_from_command_line(["landmarks", "--dataset_name", str(tmp_path)])
