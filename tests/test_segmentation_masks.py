import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from sklearn.metrics import jaccard_score
from transformers import ResNetConfig

from evaluation.__main__ import evaluate_from_command_line
from evaluation.segmentation_masks import object_jaccards, resized_to_square
from evaluation.video_segmentation import voc_palette
from modeling_dino import DINOConfig, DINOModel
from modeling_dino.command_line import run
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command
from .original import FIXTURES, our_names, tiny_config


SIZES = (40, 60), (64, 48), (50, 50)


@pytest.fixture(scope="module")
def model():
    model = DINOModel(tiny_config())
    model.load_state_dict(our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True)))
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    make_image_processor(32, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def shapes(number: int) -> tuple[Image.Image, Image.Image]:
    """An image of two objects, or one, and its mask, with void around them."""
    height, width = SIZES[number]
    y, x = np.mgrid[:height, :width]
    indices = np.zeros((height, width), dtype=np.uint8)
    indices[4:22, 3:25] = 255
    indices[6:20, 5:23] = 1
    if number != 1:
        indices[(y - 30) ** 2 + (x - 35) ** 2 < 9**2] = 255
        indices[(y - 30) ** 2 + (x - 35) ** 2 < 7**2] = 2
    colors = np.array([[30, 90, 60], [250, 60, 40], [40, 80, 250]])[np.where(indices == 255, 0, indices)]
    noise = np.random.default_rng(number).integers(0, 50, colors.shape)
    mask = Image.fromarray(indices)
    mask.putpalette(voc_palette())
    return Image.fromarray((colors + noise).clip(0, 255).astype(np.uint8)), mask


@pytest.fixture
def voc(tmp_path):
    """Three images in the layout of PASCAL VOC 2012."""
    root = tmp_path / "VOC2012"
    for kind in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (root / kind).mkdir(parents=True)
    for number in range(3):
        image, mask = shapes(number)
        image.save(root / f"JPEGImages/2007_{number}.jpg", quality=95)
        mask.save(root / f"SegmentationObject/2007_{number}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_0\n2007_1\n2007_2\n")
    return root


def evaluate(root, model, *argv):
    evaluate_from_command_line(
        ["segmentation_masks", "--model", str(model), "--dataset_name", str(root), "--image_size", "36",
         *map(str, argv)]
    )  # fmt: skip


def refusal(root, model, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        run("dino-eval", lambda _: evaluate(root, model, *argv), [])
    stderr = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(stderr.splitlines()) == 1, stderr
    return stderr


def test_each_object_is_measured_by_its_best_head_with_and_without_void():
    indices = np.zeros((4, 6), dtype=np.uint8)
    indices[:2, :2] = 1
    indices[:2, 2] = 255
    indices[2:, 4:] = 7
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)  # cells of 2 x 2 pixels
    masks[0, 0, 0] = masks[0, 0, 1] = True  # object 1 and void
    masks[1, 1, 2] = masks[1, 1, 1] = True  # object 7 and background
    assert object_jaccards(masks, indices) == [
        (pytest.approx(4 / 8), pytest.approx(4 / 6)),
        (pytest.approx(4 / 8), pytest.approx(4 / 8)),
    ]
    assert object_jaccards(masks, np.where(indices == 255, indices, 0)) == []


def by_hand(model, root, number: int, mass: float = 0.6) -> list[float]:
    """Best Jaccard of each object: masks by `searchsorted`, scikit-learn's index."""
    with Image.open(root / f"JPEGImages/2007_{number}.jpg") as image:
        square = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = torch.from_numpy((square - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]).permute(2, 0, 1)[None].float()
    model.set_attn_implementation("eager")
    attention = model(pixels, output_attentions=True).attentions[-1][0, :, 0, 1:].detach().numpy()
    with Image.open(root / f"SegmentationObject/2007_{number}.png") as mask:
        indices = np.array(mask)
    found = []
    for index in set(indices.flatten()) - {0, 255}:
        per_head = []
        for weights in attention:
            order = np.argsort(weights)
            dropped = np.searchsorted(np.cumsum(weights[order]) / weights.sum(), 1 - mass, side="right")
            kept = np.ones(16, dtype=np.uint8)
            kept[order[:dropped]] = 0
            rows, columns = ((2 * np.arange(side) + 1) * 4 // (2 * side) for side in indices.shape)  # nearest of 4
            enlarged = kept.reshape(4, 4)[rows][:, columns]
            per_head.append(jaccard_score((indices == index).flatten(), enlarged.flatten().astype(bool)))
        found.append(max(per_head))
    return found


def test_command_on_pascal_voc(voc, folder, model, tmp_path):
    evaluate(voc, folder, "--output", tmp_path / "report.json")
    [report] = json.loads((tmp_path / "report.json").read_text())
    expected = np.mean([100 * np.mean(by_hand(model, voc, number)) for number in range(3)])
    assert 5 < expected < 60
    assert report["values"]["jaccard"] == pytest.approx(expected, abs=1e-4)
    assert report["values"]["jaccard_without_void"] > report["values"]["jaccard"]
    low, high = report["intervals"]["jaccard"]
    assert low < expected < high
    assert report["data"]["num_objects"] == 5 and report["data"]["num_images"] == 3

    evaluate(voc, folder, "--mass", 0.2, "--output", tmp_path / "report.json")
    [report] = json.loads((tmp_path / "report.json").read_text())
    expected = np.mean([100 * np.mean(by_hand(model, voc, number, 0.2)) for number in range(3)])
    assert report["values"]["jaccard"] == pytest.approx(expected, abs=1e-4)


def test_command_on_columns(voc, folder, tmp_path):
    rows = {"photo": [], "objects": [], "number": []}
    for number in range(3):
        rows["photo"].append(str(voc / f"JPEGImages/2007_{number}.jpg"))
        rows["objects"].append(str(voc / f"SegmentationObject/2007_{number}.png"))
        rows["number"].append(number)
    empty = Image.new("L", (10, 10))
    empty.save(tmp_path / "empty.png")
    for column in ("photo", "objects"):
        rows[column].append(str(tmp_path / "empty.png"))
    rows["number"].append(3)
    dataset = Dataset.from_dict(rows)
    features = Features({**dataset.features, "photo": ImageColumn(), "objects": ImageColumn()})
    (tmp_path / "columns").mkdir()
    dataset.cast(features).to_parquet(tmp_path / "columns/validation.parquet")

    columns = "--image_column", "photo", "--mask_column", "objects", "--eval_split", "validation"
    evaluate(tmp_path / "columns", folder, *columns, "--output", tmp_path / "columns.json")
    evaluate(voc, folder, "--output", tmp_path / "voc.json")
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())[0] for name in ("columns", "voc"))
    assert ours["values"] == theirs["values"]
    assert ours["data"]["num_images"] == 3 and ours["data"]["num_images_without_objects"] == 1


@pytest.mark.slow
def test_two_processes_measure_what_one_does(voc, folder, tmp_path):
    evaluate(voc, folder, "--output", tmp_path / "one.json")
    argv = ["segmentation_masks", "--model", folder, "--dataset_name", voc, "--image_size", 36]
    finished = command(*argv, "--output", tmp_path / "two.json", processes=2, module="evaluation")
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())[0] for name in ("one", "two"))
    assert one["values"] == pytest.approx(two["values"]) and one["data"] == two["data"]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_are_resized_as_pillow_does(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 30, 50), dtype=np.uint8)
    ours = resized_to_square(pixels, 16)
    assert ours.shape == (channels, 16, 16) and ours.dtype == np.uint8
    if channels == 3:
        image = Image.fromarray(pixels.transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(ours, np.asarray(image).transpose(2, 0, 1))


def test_networks_without_attention_in_one_line(voc, tmp_path, capsys):
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    DINOModel(DINOConfig(backbone_config=resnet)).save_pretrained(tmp_path / "resnet")
    make_image_processor(32).save_pretrained(tmp_path / "resnet")
    assert "ResNetModel has no CLS attention" in refusal(voc, tmp_path / "resnet", capsys)


def test_mistakes_in_one_line(voc, folder, tmp_path, capsys):
    message = refusal(voc, folder, capsys, "--eval_split", "test")
    assert "ImageSets/Segmentation/test.txt" in message and "--mask_column" in message
    assert "mass must be between 0 and 1, got 1.0" in refusal(voc, folder, capsys, "--mass", "1")
    assert "image_size must be at least 8" in refusal(voc, folder, capsys, "--image_size", "5")
    mask = voc / "SegmentationObject/2007_1.png"
    Image.new("L", (60, 40), 1).save(mask)
    assert "2007_1.png is 60x40, and its image 48x64" in refusal(voc, folder, capsys)
    mask.write_bytes(b"no image")
    assert "2007_1.png cannot be decoded" in refusal(voc, folder, capsys)
    mask.unlink()
    assert "there is no " in refusal(voc, folder, capsys) and not mask.exists()
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_0\n")
    shapes(0)[1].point(lambda index: 0).save(voc / "SegmentationObject/2007_0.png")
    assert "there are no objects in the 1 masks of" in refusal(voc, folder, capsys)
    (voc / "ImageSets/Segmentation/val.txt").write_text("")
    assert "there are no objects in the 0 masks of" in refusal(voc, folder, capsys)
