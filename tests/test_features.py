"""Any model's features, and how they are kept."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, DatasetDict, Value
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from torchvision import transforms as T
from transformers import (
    AutoModel,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ResNetConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from evaluation import features, models
from evaluation.__main__ import evaluate_from_command_line
from evaluation.attention import cls_attention, mass_masks
from evaluation.features import extract_features, keep_features, read_features
from evaluation.images import load_images
from evaluation.knn import knn_hits
from evaluation.models import load_model, mean_and_std, tokens
from evaluation.report import bootstrap, mean_intervals
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command
from .original import FIXTURES, our_names, recorded, tiny_config
from .test_bad_input import answer


SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8, "image_size": 32}
NETWORKS = {
    "vit": ViTConfig(**SMALL, intermediate_size=48),
    "deit": DeiTConfig(**SMALL, intermediate_size=48),
    "dinov2": Dinov2Config(**SMALL, mlp_ratio=2),
    "registers": Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=4),
    "dinov3": DINOv3ViTConfig(**SMALL, intermediate_size=48, num_register_tokens=4),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic"),
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder with the network that the original's numbers were recorded with."""
    folder = tmp_path_factory.mktemp("ours")
    model = DINOModel(tiny_config())
    model.load_state_dict(our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True)))
    model.save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    return folder


def save_network(name: str, folder):
    torch.manual_seed(0)
    model = AutoModel.from_config(NETWORKS[name])
    for parameter in model.parameters():  # not one answer for all images
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_transformers_are_taken_at_any_size(name, tmp_path):
    save_network(name, tmp_path)
    model, processor = load_model(str(tmp_path))
    pixel_values = torch.randn(2, 3, 40, 64)
    if name == "resnet":
        output = model(pixel_values)
        [found] = tokens(model, pixel_values)
        torch.testing.assert_close(found.patches.mean((1, 2)), found.pooled)
        assert found.patches.shape == (*output.last_hidden_state.shape[:1], 5, 8, 24)
        with pytest.raises(ValueError, match="no CLS attention"):
            cls_attention(model, pixel_values)
        with pytest.raises(ValueError, match="no 2 last blocks"):
            tokens(model, pixel_values, 2)
        return
    kwargs = {} if name in ("registers", "dinov2", "dinov3") else {"interpolate_pos_encoding": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True, output_attentions=True, **kwargs)
    earlier, last = tokens(model, pixel_values, 2)
    torch.testing.assert_close(last.patches.flatten(1, 2), output.last_hidden_state[:, -40:])
    torch.testing.assert_close(last.pooled, output.last_hidden_state[:, 0])
    norm = model.norm if name == "dinov3" else model.layernorm
    torch.testing.assert_close(earlier.pooled, norm(output.hidden_states[-2])[:, 0])
    assert last.patches.shape == (2, 5, 8, 24)
    assert len(tokens(model, pixel_values, 3)) == 3
    with pytest.raises(ValueError, match="no 4 last blocks"):
        tokens(model, pixel_values, 4)
    model.set_attn_implementation("sdpa")
    maps = cls_attention(model, pixel_values)
    torch.testing.assert_close(maps.flatten(2), output.attentions[-1][:, :, 0, -40:], atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "sdpa"


def test_network_of_timm_is_taken_with_its_image_processor(tmp_path, parquet_folder):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    processing = {"mean": [0.4] * 3, "std": [0.3] * 3, "input_size": [3, 32, 32]}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, pretrained_cfg=processing)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path))
    assert [values.flatten().tolist() for values in mean_and_std(processor, 3)] == [
        pytest.approx([0.4] * 3), pytest.approx([0.3] * 3)
    ]  # fmt: skip
    pixel_values = torch.randn(2, 3, 32, 32)
    network = model.timm_model
    with torch.no_grad():
        whole = network.forward_features(pixel_values)
        blocks = network.get_intermediate_layers(pixel_values, 2, return_prefix_tokens=True, norm=True)
    earlier, last = tokens(model, pixel_values, 2)
    torch.testing.assert_close(last.pooled, whole[:, 0])
    torch.testing.assert_close(last.patches.flatten(1, 2), whole[:, 1:])
    torch.testing.assert_close(earlier.pooled, blocks[0][1][:, 0])
    assert torch.allclose(cls_attention(model, pixel_values).sum((2, 3)), torch.ones(2, 3), atol=0.5)
    assert len(extract_features(model, load_images(str(parquet_folder)), processor)) == 40


def test_blocks_and_masks_are_the_originals(ours):
    model, _ = load_model(str(ours))
    expected = recorded("backbone_io")
    for block, found in enumerate(tokens(model, expected["wide.pixel_values"], 3)):
        hidden = expected[f"wide.normed_hidden.{block}"]
        torch.testing.assert_close(found.patches.flatten(1, 2), hidden[:, 1:], atol=1e-5, rtol=0)
    expected = recorded("attention_masks")
    maps = cls_attention(model, expected["pixel_values"])[0]  # (heads, 4, 4)
    torch.testing.assert_close(maps.flatten(1), expected["cls_attention"], atol=1e-5, rtol=0)
    for mass in (0.6, 0.3):
        assert torch.equal(mass_masks(maps, mass).flatten(1), expected[f"mask_{mass}"].bool())


def test_weights_that_do_not_fit_are_an_error(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "copy")
    weights = load_file(ours / "model.safetensors")
    save_file({f"other.{k}": v for k, v in weights.items()}, tmp_path / "copy/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks .* weights of DINOModel"):
        load_model(str(tmp_path / "copy"))


def test_untrained_networks_and_raw_pixels_take_the_models_image_processor(ours):
    model, _ = load_model(str(ours))
    untrained, processor = load_model(f"untrained:{ours}")
    assert processor.crop_size.height == 32
    weights = [dict(network.named_parameters())["layers.0.mlp.fc1.weight"] for network in (model, untrained)]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)
    pixels, _ = load_model(f"raw_pixels:{ours}")
    assert pixels(torch.ones(1, 3, 32, 32)).pooler_output.numel() == 3 * 32 * 32


def test_image_size_is_the_papers_transform(ours):
    processor = load_model(str(ours), image_size=56)[1]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 80, 120), dtype=np.uint8)
    expected = T.Compose([T.Resize(64, T.InterpolationMode.BICUBIC), T.CenterCrop(56), T.ToTensor()])
    expected = expected(PillowImage.fromarray(pixels.transpose(1, 2, 0)))
    mean, std = mean_and_std(processor, 3)
    found = models.to_pixel_values(processor, [pixels])[0]
    torch.testing.assert_close(found, (expected - mean) / std, atol=1e-5, rtol=0)


@pytest.fixture
def kept(ours, parquet_folder, tmp_path, monkeypatch):
    """How to keep features of the training split, in parts of 16 of 40 images."""
    monkeypatch.setattr(features, "PART_SIZE", 16)
    model, processor = load_model(str(ours))

    def keep(streaming=False, model=model, **data):
        dataset = load_images(str(parquet_folder), streaming=streaming)
        data = {"name": "images", "config": None, "split": "train"} | data
        return keep_features(tmp_path / "train", str(ours), model, dataset, processor, data, batch_size=5)

    return keep


def test_kept_features_are_the_computed_ones(ours, parquet_folder, kept):
    model, processor = load_model(str(ours))
    expected = extract_features(model, load_images(str(parquet_folder)), processor)
    for found in (kept(), kept()):
        torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-6)
        assert np.array_equal(found.labels, expected.labels) and np.array_equal(found.hashes, expected.hashes)
        assert found.class_names == ["a", "b"] and found.data["num_images"] == 40


def test_extraction_goes_on_where_it_was_stopped(kept, tmp_path, monkeypatch):
    computed, share = [], features._extract_share

    def stopped_at_the_second(model, rows, *args):
        if len(computed) == 1:
            raise KeyboardInterrupt
        computed.append(len(rows))
        return share(model, rows, *args)

    monkeypatch.setattr(features, "_extract_share", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        kept()
    with pytest.raises(ValueError, match="are not complete"):
        read_features(tmp_path / "train")
    first = (tmp_path / "train/part-00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(features, "_extract_share", lambda *args: computed.append(len(args[1])) or share(*args))
    assert len(kept()) == 40
    assert computed == [16, 16, 8] and (tmp_path / "train/part-00000.safetensors").stat().st_mtime_ns == first


def test_kept_features_of_something_else_are_refused(ours, kept):
    kept()
    with pytest.raises(ValueError, match="features of another data .*choose another folder"):
        kept(fingerprint="other")
    model = load_model(str(ours), dtype=torch.bfloat16)[0]
    with pytest.raises(ValueError, match=r"another dtype \(float32, not bfloat16\)"):
        kept(model=model)
    with pytest.raises(ValueError, match="features of a stream cannot be kept"):
        kept(streaming=True)


def test_kept_features_of_changed_files_are_refused(ours, parquet_folder, tmp_path):
    shutil.copytree(parquet_folder, tmp_path / "data")
    argv = ["features", "--model", str(ours), "--dataset_name", str(tmp_path / "data"), "--features"]
    evaluate_from_command_line([*argv, str(tmp_path / "kept")])
    shutil.copy(tmp_path / "data/train-00000-of-00002.parquet", tmp_path / "data/train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"features of another data \(fingerprint .*choose another folder"):
        evaluate_from_command_line([*argv, str(tmp_path / "kept")])


def test_labels_of_minus_one_are_none(ours, parquet_folder, tmp_path, capsys):
    images = load_images(str(parquet_folder), split="test")
    images.map(lambda row: {"label": -1}).to_parquet(tmp_path / "test.parquet")
    load_images(str(parquet_folder)).to_parquet(tmp_path / "train.parquet")
    message = answer(
        evaluate_from_command_line, ["knn", "--model", ours, "--dataset_name", tmp_path, "--k", 1], capsys
    )
    assert "split test" in message and "has no labels, or not of every image" in message


def test_classes_that_splits_number_differently_are_refused(ours, parquet_folder, tmp_path, capsys):
    splits = DatasetDict({name: load_images(str(parquet_folder), split=name) for name in ("train", "test")})
    splits["test"] = (
        splits["test"].cast_column("label", Value("int64")).cast_column("label", ClassLabel(names=["b", "a"]))
    )
    splits.save_to_disk(tmp_path / "saved")
    argv = ["knn", "--model", ours, "--dataset_name", tmp_path / "saved", "--k", 1]
    assert "name their classes differently: a and b" in answer(evaluate_from_command_line, argv, capsys)


def test_features_are_kept_in_the_dtype_of_the_network(ours, parquet_folder, tmp_path):
    argv = ["--dataset_name", str(parquet_folder), "--features", str(tmp_path)]
    evaluate_from_command_line(["features", "--model", str(ours), *argv, "--dtype", "bfloat16"])
    assert load_file(tmp_path / "test/part-00000.safetensors")["features"].dtype == torch.bfloat16
    evaluate_from_command_line(["knn", "--features", str(tmp_path), "--k", "1", "--output", str(tmp_path / "k.json")])
    [report] = json.loads((tmp_path / "k.json").read_text())
    assert report["model"]["name"] == str(ours) and report["data"]["test"]["num_images"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["map-style", "streaming"])
def test_two_processes_give_the_numbers_of_one(ours, parquet_folder, tmp_path, streaming):
    """Kept, where it is no stream, and not: each image once."""
    reports = []
    runs = [("one", 1, ()), ("two", 2, ())]
    if not streaming:
        runs.append(("kept", 2, ("--features", tmp_path / "kept")))
    for name, processes, kept in runs:
        argv = ("knn", "--model", ours, "--dataset_name", parquet_folder, "--k", "1", "5", *streaming, *kept)
        finished = command(*argv, "--output", tmp_path / f"{name}.json", processes=processes, module="evaluation")
        assert finished.returncode == 0, finished.stderr
        reports.append(json.loads((tmp_path / f"{name}.json").read_text())[0])
    assert all(report["values"] == reports[0]["values"] for report in reports)
    assert all(report["data"] == reports[0]["data"] for report in reports)


def test_features_that_are_not_finite_are_named_by_the_image(ours, flat_folder):
    _, processor = load_model(str(ours))
    [row] = [i for i, row in enumerate(load_images(str(flat_folder))) if row["image"]["path"].endswith("/7.png")]

    class Broken(DINOModel):
        def forward(self, pixel_values):
            output = super().forward(pixel_values)
            output.pooler_output[row, 3] = torch.nan
            return output

    broken = Broken(tiny_config())
    with pytest.raises(ValueError, match="features of image .*/7.png are not finite"):
        extract_features(broken, load_images(str(flat_folder)), processor)


def test_images_in_both_splits_are_warned_of(ours, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [PillowImage.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(10)]
    for split, images, ending in (("train", pictures[:8], "png"), ("test", pictures[5:], "bmp")):  # another encoding
        for number, picture in enumerate(images):
            folder = tmp_path / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number}.{ending}")
    argv = ["knn", "--model", str(ours), "--dataset_name", str(tmp_path), "--k", "1"]
    with pytest.warns(UserWarning, match="3 of the 5 test images are training images, too"):
        evaluate_from_command_line(argv)


def test_one_split_is_measured_leaving_one_out(ours, parquet_folder, tmp_path, capsys):
    load_images(str(parquet_folder)).rename_column("image", "picture").to_parquet(tmp_path / "all.parquet")
    argv = ["knn", "--model", str(ours), "--dataset_name", str(tmp_path / "all.parquet"), "--k", "5"]
    evaluate_from_command_line([*argv, "--output", str(tmp_path / "knn.json")])
    [report] = json.loads((tmp_path / "knn.json").read_text())
    assert report["data"]["leave_one_out"] and report["data"]["train"]["num_images"] == 40


def test_leaving_one_out_is_scikit_learns():
    data = recorded("knn")
    train, labels = data["train_features"][:150], data["train_labels"][:150]
    hits = knn_hits(train, labels, k=[1])["knn_1_top1"]
    classifier = KNeighborsClassifier(1, metric="cosine")
    assert np.array_equal(hits, cross_val_predict(classifier, train, labels, cv=LeaveOneOut()) == labels.numpy())


def test_grid_of_temperatures_comes_from_one_pass():
    data = recorded("knn")
    bank = (data["train_features"], data["train_labels"], data["test_features"], data["test_labels"])
    grid = knn_hits(*bank, k=[10, 20], temperature=[0.07, 0.2])
    for temperature in (0.07, 0.2):
        for name, hits in knn_hits(*bank, k=[10, 20], temperature=temperature).items():
            assert np.array_equal(grid[name.replace("_top", f"_T{temperature}_top")], hits)


def test_intervals_are_scipys():
    scores = np.random.default_rng(3).integers(0, 2, 400) * 100.0
    expected = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert mean_intervals({"a": scores, "b": scores[:7]})["a"] == pytest.approx(tuple(expected), abs=0.6)
    found = bootstrap(400, lambda chosen: {"median": float(np.median(scores[chosen]))})
    assert found["median"][0] in (0, 50, 100)


def test_bad_input(ours, parquet_folder, flat_folder, tmp_path, capsys):
    def ask(*argv):
        return answer(evaluate_from_command_line, argv, capsys)

    data = ("--dataset_name", parquet_folder)
    assert "give --model and --dataset_name, or --features" in ask("knn", *data)
    assert "there are no features in" in ask("knn", "--features", tmp_path, "--eval_split", "test")
    assert "give --features, the folder to write" in ask("features", "--model", ours, *data)
    assert "--features is for one model, got 2" in ask("knn", "--model", ours, ours, *data, "--features", "x")
    images = load_images(str(parquet_folder))
    images.filter(lambda row: row["label"] == 1).to_parquet(tmp_path / "one.parquet")
    message = ask("knn", "--model", ours, "--dataset_name", tmp_path / "one.parquet", "--k", "1")
    assert message.endswith("has images of one class only, 1")
