"""Any model's features, and how they are kept."""

import contextlib
import io
import json
import shutil

import numpy as np
import pandas
import polars
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from torchvision import transforms as T
from transformers import (
    AutoImageProcessor,
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
from evaluation.decoding import BrokenImageError
from evaluation.feature_files import read_manifest
from evaluation.features import extract_features, keep_features, read_features
from evaluation.images import load_images
from evaluation.knn import knn_hits
from evaluation.models import load_model, mean_and_std, tokens
from evaluation.outputs import is_from
from evaluation.report import bootstrap, mean_intervals
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import Background, command, scripted
from .conftest import noise
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
    with pytest.raises(ValueError, match="must be 1 for a .* no 4 last blocks, got 4. Give --n_last_blocks 1."):
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
        return keep_features(tmp_path / "train.parquet", str(ours), model, dataset, processor, data, batch_size=5)

    return keep


def test_kept_features_are_the_computed_ones(ours, parquet_folder, kept):
    model, processor = load_model(str(ours))
    expected = extract_features(model, load_images(str(parquet_folder)), processor)
    for found in (kept(), kept()):
        torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-6)
        assert np.array_equal(found.labels, expected.labels) and np.array_equal(found.hashes, expected.hashes)
        assert found.names == expected.names == list(map(str, range(40)))
        assert found.class_names == ["a", "b"] and found.data["num_images"] == 40


def test_kept_features_of_something_else_are_refused(ours, kept, tmp_path, monkeypatch):
    """Whether they are complete or in parts."""
    model = load_model(str(ours), dtype=torch.bfloat16)[0]

    def refused():
        with pytest.raises(ValueError, match="features of another data .*Choose another --features"):
            kept(fingerprint="other")
        with pytest.raises(ValueError, match=r"another dtype \(float32, not bfloat16\)"):
            kept(model=model)

    monkeypatch.setattr(features, "_remove_parts", lambda path: None)
    kept()
    refused()
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(ValueError, match="are not complete"):
        read_features(tmp_path / "train.parquet")
    refused()
    (tmp_path / "train.parts/part-00001.parquet").unlink()
    monkeypatch.setattr(features, "PART_SIZE", 8)
    with pytest.raises(ValueError, match=r"features of another part_size \(16, not 8\)"):
        kept()
    with pytest.raises(ValueError, match="features of a stream cannot be kept"):
        kept(streaming=True)


def test_parts_that_a_killed_command_has_left_are_removed(kept, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(features, "_remove_parts", lambda path: None)
        kept()
    (tmp_path / "train.parts/part-mine.parquet").write_text("mine")
    first = (tmp_path / "train.parquet").stat().st_mtime_ns
    kept()
    assert [path.name for path in (tmp_path / "train.parts").iterdir()] == ["part-mine.parquet"]
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == first


SMALL_PARTS = """
from evaluation import feature_files, features
features.PART_SIZE = features.PATCH_PART_SIZE = 4
write = features.write_part

def write_part(path, *args):
    write(path, *args)
    print("computed", path.name, flush=True)

features.write_part = write_part
"""
MAIN = "from evaluation.__main__ import main; main()"
STOPPED = """
import time
open_writer = feature_files._open_writer

def stop(path, *args):
    if path.name == "part-00001.parquet":
        path.write_bytes(b"PAR1 half of it")
        print("writing", flush=True)
        time.sleep(600)
    return open_writer(path, *args)

feature_files._open_writer = stop
"""
DAMAGED = "train/a/04.png"


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """13 images in two classes, of which one cannot be decoded; in parts of 4, one part has a single image."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(2)
    for number in range(13):
        path = folder / f"train/{'ab'[number % 2]}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    (folder / DAMAGED).write_bytes((folder / DAMAGED).read_bytes()[:300])
    return folder


def expected_output(model_folder, paths, **options) -> torch.Tensor:
    """What the model itself gives for image files: (images, 1 + patches, hidden)."""
    model = DINOModel.from_pretrained(model_folder, **options).eval()
    processor = AutoImageProcessor.from_pretrained(model_folder, backend="pil")
    pixel_values = processor([PillowImage.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values.to(model.dtype)).last_hidden_state


@pytest.fixture(scope="module")
def expected(ours, class_folder):
    """Columns of the features of `class_folder`, computed without `evaluation`."""
    names = [path for label in "ab" for path in sorted(class_folder.glob(f"train/{label}/*.png"))]
    names = [path for path in names if str(path.relative_to(class_folder)) != DAMAGED]
    return {
        "name": [str(path.relative_to(class_folder)) for path in names],
        "label": ["ab".index(path.parent.name) for path in names],
        "class_name": [path.parent.name for path in names],
        "output": expected_output(ours, names).numpy(),
    }


def features_of_classes(ours, class_folder, folder, *argv) -> tuple:
    return "features", "--model", ours, "--dataset_name", class_folder, "--features", folder, *argv


@pytest.fixture(scope="module")
def written(ours, class_folder, tmp_path_factory):
    """A folder that `dino-eval features` has filled with two processes, and what it has printed."""
    folder = tmp_path_factory.mktemp("written")
    argv = features_of_classes(ours, class_folder, folder / "out", "--batch_size", 3)
    finished = scripted(SMALL_PARTS + MAIN, folder, *argv, processes=2)
    assert finished.returncode == 0, finished.stderr
    return folder / "out", finished


def check_columns(found, rows, expected, tokens="cls"):
    """Compare columns, and features as an array, with those that are expected."""
    for name in ("name", "label", "class_name"):
        assert list(found[name]) == expected[name], name
    output = {"cls": expected["output"][:, 0], "patch": expected["output"][:, 1:]}
    output["mean"] = output["patch"].mean(1)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, output[tokens], atol=1e-5)


READERS = {
    "pandas": lambda path: (table := pandas.read_parquet(path), np.stack(table["features"].map(np.stack))),
    "polars": lambda path: (table := polars.read_parquet(path), table["features"].to_numpy()),
    "datasets": lambda path: (
        table := Dataset.from_parquet(str(path)), np.array(table.with_format("numpy")["features"][:])
    ),
    "read_features": lambda path: (
        {"name": (table := read_features(path)).names, "label": table.labels,
         "class_name": [table.class_names[label] for label in table.labels]}, table.features.numpy(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_features_are_read_in_one_line(reader, written, expected):
    check_columns(*READERS[reader](written[0] / "train.parquet"), expected)


def test_features_file_names_its_origin(written, ours, class_folder, expected):
    file = pyarrow.parquet.ParquetFile(written[0] / "train.parquet")
    assert [path.name for path in written[0].iterdir()] == ["train.parquet"]  # no parts
    assert file.num_row_groups == 4 and [file.metadata.row_group(part).num_rows for part in range(4)] == [3, 4, 4, 1]
    hidden = expected["output"].shape[2]
    assert {field.name: str(field.type) for field in file.schema_arrow} == {
        "name": "string", "label": "int64", "class_name": "string", "pixel_hash": "int64",
        "features": f"fixed_size_list<element: float>[{hidden}]",
    }  # fmt: skip
    [(key, manifest)] = file.schema_arrow.metadata.items()
    manifest = json.loads(manifest)
    assert key == b"dino_hf" and manifest["num_images"] == 12 and manifest["class_names"] == ["a", "b"]
    assert manifest["model"]["name"] == str(ours) and manifest["data"]["name"] == str(class_folder)
    assert manifest["tokens"] == "cls" and manifest["dtype"] == "float32" and "part_size" not in manifest
    assert manifest["image_processor"]["crop_size"]["height"] == 32
    [failed] = manifest["failed"]
    assert failed["name"] == DAMAGED and "cannot be decoded" in failed["reason"] and failed["row"] == 2


def test_damaged_image_is_skipped_and_named(written, ours, class_folder, tmp_path, capsys):
    finished = written[1]
    line = f"skipped 1 of 13 images (split train of {class_folder}): {DAMAGED} cannot be decoded: "
    [warned] = [text for text in finished.stderr.splitlines() if "decoded" in text]
    assert warned.startswith(f"dino-eval: warning: {line}") and warned.endswith("give --overwrite.")
    assert f"features of 12 images of train to {written[0] / 'train.parquet'}" in finished.stdout
    argv = ["--num_images", "99", "--k", "1", "--output", str(tmp_path / "n.png"), "--save_arrays"]
    evaluate_from_command_line(["neighbours", "--features", str(written[0]), *argv])
    assert np.load(tmp_path / "n.npz")["queries"].tolist() == [row for row in range(13) if row != 2]
    capsys.readouterr()
    evaluate_from_command_line(["knn", "--features", str(written[0]), "--k", "1"])
    assert "k = 1, top-1 " in (printed := capsys.readouterr().out) and "top-5" not in printed  # of two classes


@pytest.mark.filterwarnings("ignore:skipped 1 of 13 images")
@pytest.mark.parametrize("tokens", ["mean", "patch"])
def test_tokens_are_those_of_the_last_block(tokens, ours, class_folder, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "PATCH_PART_SIZE", 5)
    for suffix in ("parquet", "npz"):
        argv = features_of_classes(ours, class_folder, tmp_path, "--tokens", tokens, "--format", suffix)
        evaluate_from_command_line(list(map(str, argv)))
    for read in READERS.values():
        check_columns(*read(tmp_path / f"train-{tokens}.parquet"), expected, tokens)
    arrays = np.load(tmp_path / f"train-{tokens}.npz")
    check_columns(arrays, arrays["features"], expected, tokens)
    assert "there are none" in answer(evaluate_from_command_line, ["knn", "--features", tmp_path, "--k", 1], capsys)


@pytest.mark.filterwarnings("ignore:skipped 1 of 13 images")
def test_formats_hold_the_same_features(ours, class_folder, written, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "PART_SIZE", 4)
    for suffix in ("npz", "csv"):
        argv = features_of_classes(ours, class_folder, tmp_path, "--format", suffix)
        evaluate_from_command_line(list(map(str, argv)))
    arrays = np.load(tmp_path / "train.npz")
    check_columns(arrays, arrays["features"], expected)
    assert arrays["pixel_hash"].tolist() == pandas.read_parquet(written[0] / "train.parquet")["pixel_hash"].tolist()
    assert arrays["failed"].shape == (1, 2) and arrays["failed"][0, 0] == DAMAGED
    assert is_from(tmp_path / "train.npz", "features")
    table = pandas.read_csv(tmp_path / "train.csv")
    columns = [f"f{number}" for number in range(expected["output"].shape[2])]
    assert list(table.columns) == ["name", "label", "class_name", *columns]
    check_columns(table, table[columns].to_numpy(np.float32), expected)
    assert np.array_equal(table[columns].to_numpy(np.float32), arrays["features"])  # to the last bit
    failed = pandas.read_csv(tmp_path / "train.failed.csv")
    assert failed["name"].tolist() == [DAMAGED] and "cannot be decoded" in failed["reason"][0]
    argv = features_of_classes(ours, class_folder, tmp_path, "--format", "csv", "--tokens", "patch")
    assert "format must be parquet or npz" in answer(evaluate_from_command_line, argv, capsys)


@pytest.mark.filterwarnings("ignore:skipped 1 of 13 images")
@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_other_formats_are_computed_once(suffix, ours, class_folder, tmp_path, monkeypatch, capsys):
    def run(model, *flags):
        argv = features_of_classes(model, class_folder, tmp_path, "--format", suffix, *flags)
        evaluate_from_command_line(list(map(str, argv)))

    run(ours)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(features, "_extract_share", None)
    run(ours)
    with pytest.raises(ValueError, match=f"train.{suffix} has features of another model"):
        run(f"untrained:{ours}")
    monkeypatch.undo()
    run(f"untrained:{ours}", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == set(first)
    assert (tmp_path / f"train.{suffix}").read_bytes() != first[f"train.{suffix}"]
    assert read_manifest(tmp_path / f"train.{suffix}")["model"]["name"] == f"untrained:{ours}"


def test_killed_extraction_resumes_at_the_first_missing_part(ours, class_folder, expected, tmp_path, capsys):
    (tmp_path / "script.py").write_text(SMALL_PARTS + STOPPED + MAIN)
    argv = features_of_classes(ours, class_folder, tmp_path / "out")
    running = Background(*argv, folder=tmp_path, module=tmp_path / "script.py")
    while "writing" not in running.stdout:
        assert running.poll() is None, running.stderr
    running.send(9)
    assert running.poll(60) == -9
    left = {path.name for path in (tmp_path / "out/train.parts").iterdir() if not path.name.startswith(".")}
    assert left == {"part-00000.parquet"} and not (tmp_path / "out/train.parquet").exists()
    argv_knn = ["knn", "--features", tmp_path / "out", "--eval_split", "train"]
    assert "are not complete" in answer(evaluate_from_command_line, argv_knn, capsys)
    finished = scripted(SMALL_PARTS + MAIN, tmp_path, *argv)
    assert finished.returncode == 0, finished.stderr
    assert [line for line in finished.stdout.splitlines() if line.startswith("computed")] == [
        f"computed part-{number:05d}.parquet" for number in (1, 2, 3)
    ]
    check_columns(*READERS["pandas"](tmp_path / "out/train.parquet"), expected)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]


def test_labels_of_every_kind_are_kept(ours, parquet_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART_SIZE", 16)
    images = load_images(str(parquet_folder)).select_columns("image")
    kinds = {
        "text": [f"class {row % 3}" for row in range(40)],
        "lists": [list(range(row % 3)) for row in range(40)],
        "numbers": [row % 5 for row in range(40)],
        "missing": [None if row % 2 else row for row in range(40)],
    }
    for kind, labels in kinds.items():
        images.add_column("label", labels).to_parquet(tmp_path / f"{kind}.parquet")
        argv = ["features", "--model", str(ours), "--dataset_name", str(tmp_path / f"{kind}.parquet")]
        for suffix in ("parquet", "npz", "csv"):
            evaluate_from_command_line([*argv, "--features", str(tmp_path / kind), "--format", suffix])
        table = polars.read_parquet(tmp_path / kind / "train.parquet")
        assert table["label"].to_list() == labels and "class_name" not in table.columns
        assert read_features(tmp_path / kind / "train.parquet").labels.tolist() == labels
        found = (
            np.load(tmp_path / kind / "train.npz")["label"].tolist(),
            pandas.read_csv(tmp_path / kind / "train.csv"),
        )
        if kind == "lists":
            assert list(map(json.loads, found[0])) == labels == list(map(json.loads, found[1]["label"]))
        else:
            numbers = [-1 if label is None else label for label in labels]
            assert found[0] == numbers == found[1]["label"].fillna(-1).tolist()


def test_names_are_relative_to_the_folder(ours, flat_folder):
    model, processor = load_model(str(ours))
    for folder in (None, flat_folder):
        for streaming in (False, True):
            images = load_images(str(flat_folder), streaming=streaming)
            names = extract_features(model, images, processor, folder=folder and str(folder)).names
            assert sorted(names) == sorted(
                str(path if folder is None else path.name) for path in flat_folder.iterdir()
            )


def test_images_that_all_fail_give_one_line_error(ours, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / f"images/{number}.png").write_bytes(b"damaged")
    argv = ["features", "--model", ours, "--dataset_name", tmp_path / "images", "--features", tmp_path / "out"]
    message = answer(evaluate_from_command_line, argv, capsys)
    assert "can be read, such as 0.png cannot be decoded: " in message
    assert not list((tmp_path / "out").iterdir())
    noise(np.random.default_rng(0)).save(tmp_path / "images/3.png")
    monkeypatch.setattr(features, "PART_SIZE", 3)  # the first part has no rows
    with pytest.warns(UserWarning, match="skipped 3 of 4 images .split train"):
        evaluate_from_command_line([*map(str, argv[:-1]), str(tmp_path / "other"), "--allow_unread"])
    assert pandas.read_parquet(tmp_path / "other/train.parquet")["name"].tolist() == ["3.png"]


def test_kept_features_of_changed_files_are_refused(ours, parquet_folder, tmp_path):
    shutil.copytree(parquet_folder, tmp_path / "data")
    argv = ["features", "--model", str(ours), "--dataset_name", str(tmp_path / "data"), "--features"]
    evaluate_from_command_line([*argv, str(tmp_path / "kept")])
    shutil.copy(tmp_path / "data/train-00000-of-00002.parquet", tmp_path / "data/train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"features of another data \(fingerprint .*Choose another --features"):
        evaluate_from_command_line([*argv, str(tmp_path / "kept")])


def test_labels_of_minus_one_are_none(ours, parquet_folder, tmp_path, capsys):
    images = load_images(str(parquet_folder), split="test")
    images.map(lambda row: {"label": -1}).to_parquet(tmp_path / "test.parquet")
    load_images(str(parquet_folder)).to_parquet(tmp_path / "train.parquet")
    message = answer(
        evaluate_from_command_line, ["knn", "--model", ours, "--dataset_name", tmp_path, "--k", 1], capsys
    )
    assert "split test has no labels: all 12 are unknown" in message


@pytest.mark.parametrize("missing", [None, float("nan"), "", "nan", pandas.NA], ids=repr)
def test_unknown_labels_are_not_a_class(ours, parquet_folder, tmp_path, missing):
    """In whatever form a data frame holds them: k-NN is that of the labeled images alone."""
    reports = []
    for name, keep_all in (("all", True), ("labeled", False)):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            rows = load_images(str(parquet_folder), split=split)
            labels = [f"class {row}" if isinstance(missing, str) else row for row in rows["label"][:]]
            frame = pandas.DataFrame({"image": rows["image"][:], "label": labels})
            unknown = frame.index % 4 == 1
            frame["label"] = frame["label"].astype(object)
            frame.loc[unknown, "label"] = missing
            if not isinstance(missing, str):
                frame["label"] = frame["label"].astype("Int64" if missing is pandas.NA else float)
            (frame if keep_all else frame[~unknown]).to_parquet(folder / f"{split}.parquet")
        output = tmp_path / f"{name}.json"
        argv = ["knn", "--model", str(ours), "--dataset_name", str(folder), "--k", "3", "--output", str(output)]
        with pytest.warns(UserWarning, match="no label") if keep_all else contextlib.nullcontext():
            evaluate_from_command_line(argv)
        reports += json.loads(output.read_text())
    for what in ("values", "intervals"):  # of as many images
        assert reports[0][what] == reports[1][what]


def test_classes_of_splits_are_matched_by_name(ours, parquet_folder, tmp_path):
    splits = {name: load_images(str(parquet_folder), split=name) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "same")
    splits["test"] = splits["test"].map(lambda row: {"label": 1 - row["label"]})
    splits["test"] = splits["test"].cast_column("label", Value("int64"))
    splits["test"] = splits["test"].cast_column("label", ClassLabel(names=["B", "A"]))
    DatasetDict(splits).save_to_disk(tmp_path / "swapped")
    flags_of = {
        "knn": ["--k", "3"],
        "logistic": [],
        "linear": ["--epochs", "1", "--n_last_blocks", "1"],
        "finetune": ["--epochs", "1"],
    }
    for protocol, flags in flags_of.items():
        reports = []
        for name in ("same", "swapped"):
            output = tmp_path / f"{protocol}_{name}.json"
            argv = [protocol, "--model", str(ours), "--dataset_name", str(tmp_path / name), "--output", str(output)]
            evaluate_from_command_line([*argv, *flags])
            reports += json.loads(output.read_text())
        assert reports[0]["values"] == reports[1]["values"]


@pytest.mark.parametrize("protocol", ["knn", "logistic", "linear", "finetune", "few_shot", "retrieval", "clustering"])
def test_lists_of_labels_give_one_line_error(protocol, ours, parquet_folder, tmp_path, capsys):
    for split in ("train", "test"):
        rows = load_images(str(parquet_folder), split=split)
        rows = rows.select_columns("image").add_column("label", [[label, 7] for label in rows["label"]])
        rows.to_parquet(tmp_path / f"{split}.parquet")
    capsys.readouterr()
    argv = [protocol, "--model", ours, "--dataset_name", tmp_path]
    assert "labels must be one an image, got lists" in answer(evaluate_from_command_line, argv, capsys)


def test_features_of_bfloat16_are_kept_in_float32(ours, parquet_folder, tmp_path):
    argv = ["--dataset_name", str(parquet_folder), "--features", str(tmp_path)]
    evaluate_from_command_line(["features", "--model", str(ours), *argv, "--dtype", "bfloat16"])
    rows = np.stack(pandas.read_parquet(tmp_path / "test.parquet")["features"])
    files = pandas.read_parquet(next(parquet_folder.glob("test-*.parquet")))["picture"]
    output = expected_output(ours, [io.BytesIO(file["bytes"]) for file in files], dtype=torch.bfloat16)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, output[:, 0].float().numpy(), atol=0.05)
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_image_that_cannot_be_opened_is_named_by_any_worker(ours, flat_folder, tmp_path, num_workers):
    folder = shutil.copytree(flat_folder, tmp_path / "images")
    model, processor = load_model(str(ours))
    images = load_images(str(folder))
    (folder / "3.png").unlink()
    with pytest.raises(BrokenImageError) as error:
        extract_features(model, images, processor, 4, num_workers)
    assert error.value.name == str(folder / "3.png") and error.value.kind == "unreadable"
    assert str(error.value) == f"image {folder / '3.png'} cannot be read: No such file or directory"
