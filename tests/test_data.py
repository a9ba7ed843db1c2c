"""Reading images from every kind of source, and batches of crops from there; all through real files."""

import io
import itertools
import pickle
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from scipy import stats

from evaluation.decoding import BrokenImageError, Reading, decode_image, image_content
from evaluation.images import load_images
from training import data
from training.arguments import TrainingArguments
from training.augmentation import finish_crops
from training.check import check_from_command_line
from training.data import CropLoader, order_of_epoch


NUM_IMAGES = 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def encoded(picture: np.ndarray, suffix: str = "png", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, suffix, **options)
    return file.getvalue()


def numbered_picture(number: int) -> np.ndarray:
    """(20, 24, 3): red is the number, which no crop of it can change; green and blue show where a crop is from."""
    picture = np.random.default_rng(number).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    picture[..., 0] = number
    return picture


def numbered_images(numbers, column: str = "image") -> Dataset:
    labels = [number % 2 for number in numbers]
    rows = {column: [{"bytes": encoded(numbered_picture(i)), "path": None} for i in numbers], "label": labels}
    return Dataset.from_dict(
        rows, features=Features({column: datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    )


def numbers_of(dataset) -> list[int]:
    return [int(decode_image(row["image"], Reading(3))[0, 0, 0]) for row in dataset]


# load_images


def write_class_folders(folder: Path) -> Path:
    for i in range(NUM_IMAGES):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(encoded(numbered_picture(i)))
    return folder


def write_flat_folder(folder: Path) -> Path:
    folder.mkdir()
    for i in range(NUM_IMAGES):
        (folder / f"{i}.png").write_bytes(encoded(numbered_picture(i)))
    return folder


def write_parquet_folder(folder: Path) -> Path:
    folder.mkdir()
    numbered_images(range(NUM_IMAGES)).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def write_parquet_file(folder: Path) -> Path:
    numbered_images(range(NUM_IMAGES)).to_parquet(f"{folder}.parquet")
    return folder.with_suffix(".parquet")


def write_saved_dataset(folder: Path) -> Path:
    numbered_images(range(NUM_IMAGES)).save_to_disk(folder)
    return folder


def write_saved_dataset_dict(folder: Path) -> Path:
    DatasetDict(train=numbered_images(range(NUM_IMAGES)), test=numbered_images([7])).save_to_disk(folder)
    return folder


LABELLED = [
    write_class_folders,
    write_parquet_folder,
    write_parquet_file,
    write_saved_dataset,
    write_saved_dataset_dict,
]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("write", LABELLED)
def test_images_and_labels_are_found(tmp_path, write, streaming):
    dataset = load_images(str(write(tmp_path / "images")), streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else Dataset)
    assert set(dataset.column_names) == {"image", "label"}
    rows = list(dataset)
    assert sorted(numbers_of(rows)) == list(range(NUM_IMAGES))
    assert [row["label"] for row in rows] == [number % 2 for number in numbers_of(rows)]
    assert dataset.features["label"].names == ["a", "b"]


def write_tars(folder: Path, num_images: int = NUM_IMAGES, num_shards: int = 2) -> Path:
    """WebDataset: `7.png` and `7.cls`, its label, are one sample."""
    folder.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(num_images), num_shards)):
        with tarfile.open(folder / f"train-{shard:05}.tar", "w") as tar:
            for number in numbers.tolist():
                for suffix, content in (("png", encoded(numbered_picture(number))), ("cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_images_and_labels_of_webdataset_tars_are_found(tmp_path, streaming):
    folder = write_tars(tmp_path / "images")
    for path, number in ((folder, NUM_IMAGES), (folder / "train-00000.tar", NUM_IMAGES // 2)):
        rows = list(load_images(str(path), label_column="cls", streaming=streaming))
        assert sorted(numbers_of(rows)) == list(range(number))
        assert [row["label"] for row in rows] == [number % 2 for number in numbers_of(rows)]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_flat_folder_has_images_without_labels(tmp_path, streaming):
    dataset = load_images(str(write_flat_folder(tmp_path / "images")), streaming=streaming)
    assert dataset.column_names == ["image"]
    assert sorted(numbers_of(dataset)) == list(range(NUM_IMAGES))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("column", ["image", "img"])
def test_images_stay_encoded(tmp_path, column, streaming):
    """JPEG, which a decoding and encoding on the way would change."""
    contents = [encoded(numbered_picture(i), "jpeg") for i in range(NUM_IMAGES)]
    rows = {column: [{"bytes": content, "path": None} for content in contents]}
    Dataset.from_dict(rows, features=Features({column: datasets.Image()})).to_parquet(tmp_path / "images.parquet")
    dataset = load_images(str(tmp_path / "images.parquet"), streaming=streaming)
    assert [image_content(row["image"]) for row in dataset] == contents


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.png", "b.png", "my-test.png", "train_1.png", "validation.png"], None),
        (["cat/1.png", "dog/2.png", "train/3.png", "train/4.png", "test-1/5.png"], {"cat", "dog", "train", "test-1"}),
    ],
)
def test_no_word_in_a_file_name_takes_an_image_away(tmp_path, names, labels, streaming):
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(numbered_picture(number)))
    dataset = load_images(str(tmp_path), streaming=streaming, folder_layout="classes" if labels else "auto")
    assert sorted(numbers_of(dataset)) == list(range(5))
    assert (set(dataset.features["label"].names) if labels else dataset.column_names) == (labels or ["image"])


def test_folders_of_splits_are_splits(tmp_path):
    for number, name in enumerate(["train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/my-test.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(numbered_picture(number)))
    splits = {split: load_images(str(tmp_path), split=split) for split in ("train", "validation")}
    assert {split: sorted(numbers_of(part)) for split, part in splits.items()} == {
        "train": [0, 1],
        "validation": [2, 3],
    }
    assert splits["validation"].features["label"].names == ["a", "b"]


def test_one_file_is_no_split_to_evaluate_on(tmp_path):
    """It would be the same images as those that it is measured against."""
    with pytest.raises(ValueError, match="has no split test; its splits are train"):
        load_images(str(write_parquet_file(tmp_path / "images")), split="test")


def test_content_of_an_image_in_a_folder_is_its_file(tmp_path):
    dataset = load_images(str(write_flat_folder(tmp_path / "images")))
    assert {image_content(row["image"]) for row in dataset} == {
        encoded(numbered_picture(i)) for i in range(NUM_IMAGES)
    }


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("column", ["image", "img", "Foto des Tages"])
def test_image_column_is_found_under_any_name(tmp_path, column, streaming):
    numbered_images(range(NUM_IMAGES), column).to_parquet(tmp_path / "images.parquet")
    dataset = load_images(str(tmp_path / "images.parquet"), streaming=streaming)
    assert sorted(numbers_of(dataset)) == list(range(NUM_IMAGES))


def two_image_columns(folder: Path) -> str:
    both = numbered_images([0, 1], "left").add_column("number", [5, 6])
    right = numbered_images([2, 3], "right").remove_columns("label")
    datasets.concatenate_datasets([both, right], axis=1).to_parquet(folder / "images.parquet")
    return str(folder / "images.parquet")


def test_two_image_columns_are_an_error_that_names_them(tmp_path):
    with pytest.raises(ValueError, match="left.*right") as error:
        load_images(two_image_columns(tmp_path))
    assert "number" not in str(error.value) and "--image_column" in str(error.value)


def test_chosen_columns_are_taken(tmp_path):
    dataset = load_images(two_image_columns(tmp_path), image_column="right", label_column="number")
    assert numbers_of(dataset) == [2, 3] and list(dataset["label"]) == [5, 6]


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"image_column": "middle"}, r"middle.*left.*right"),
        ({"image_column": "number"}, r"number holds no images"),
        ({"image_column": "left", "label_column": "class"}, r"class.*number"),
    ],
)
def test_wrong_choice_of_columns_is_an_error_that_says_what_there_is(tmp_path, choice, message):
    with pytest.raises(ValueError, match=message):
        load_images(two_image_columns(tmp_path), **choice)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_no_image_column_is_an_error_that_lists_the_columns(tmp_path, streaming):
    Dataset.from_dict({"text": ["a"], "number": [1]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no image column.*text, number"):
        load_images(str(tmp_path / "text.parquet"), streaming=streaming)


@pytest.mark.parametrize(
    ("feature", "rows", "message"),
    [
        (datasets.Image(), [{"bytes": b"x", "path": None}], "column other holds Image"),
        (datasets.Sequence(Value("int64")), [[1, 2]], "column other holds lists, and labels must be one an image"),
    ],
)
def test_column_that_is_no_label_is_an_error(tmp_path, feature, rows, message):
    features = Features({"image": datasets.Image(), "other": feature})
    image = [{"bytes": encoded(numbered_picture(0)), "path": None}]
    Dataset.from_dict({"image": image, "other": rows}, features=features).to_parquet(tmp_path / "images.parquet")
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "images.parquet"), image_column="image", label_column="other")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_array_columns_keep_their_type_and_values(tmp_path, dtype, streaming):
    values = np.array([0, 1, 40_000, 65_535, 300, 7]).astype(dtype) * np.ones((2, 4, 1), dtype)
    features = Features({"image": Array3D(values.shape, dtype)})
    Dataset.from_dict({"image": [values]}, features=features).to_parquet(tmp_path / "images.parquet")
    dataset = load_images(str(tmp_path / "images.parquet"), streaming=streaming)
    [row] = dataset
    decoded = decode_image(row["image"], Reading(2).of(dataset.features))
    np.testing.assert_array_equal(decoded, values)
    assert decoded.dtype == dtype


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere.parquet", "a/b/c"])
def test_missing_path_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match=f"no file or folder {name}"):
        load_images(name)


def test_folder_without_images_is_an_error_that_says_what_was_sought_and_found(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("notes.txt", "table.csv", "deep/more.txt"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(ValueError, match="no images in") as error:
        load_images(str(tmp_path))
    for part in (str(tmp_path), ".parquet", ".tar", "3 files", ".csv", ".txt"):
        assert part in str(error.value)


def test_file_of_another_kind_is_an_error_that_says_what_is_allowed(tmp_path):
    (tmp_path / "images.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"images.csv.*\.parquet"):
        load_images(str(tmp_path / "images.csv"))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_missing_split_is_an_error_that_lists_the_splits(tmp_path, streaming):
    folder = str(write_saved_dataset_dict(tmp_path / "images"))
    with pytest.raises(ValueError, match="no split validation.*train, test"):
        load_images(folder, split="validation", streaming=streaming)
    assert numbers_of(load_images(folder, split="test", streaming=streaming)) == [7]


# decode_image


def undecoded(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def test_photograph_is_turned_upright():
    upright = np.zeros((24, 16, 3), dtype=np.uint8)
    upright[:12, :, 0] = 255  # red above, black below
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side, to be turned clockwise
    content = encoded(np.rot90(upright).copy(), "jpeg", quality=100, subsampling=0, exif=exif)
    assert Image.open(io.BytesIO(content)).size == (24, 16)
    pixels = decode_image(undecoded(content), Reading(3))
    assert pixels.shape == (3, 24, 16)
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), upright, atol=8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "CMYK"])
@pytest.mark.parametrize("num_channels, target", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_file_of_any_mode_gets_the_channels_of_the_model(mode, num_channels, target):
    image = Image.fromarray(numbered_picture(200)).convert(mode)
    file = io.BytesIO()
    image.save(file, "tiff")
    pixels = decode_image(undecoded(file.getvalue()), Reading(num_channels))
    assert pixels.dtype == np.uint8 and pixels.shape == (num_channels, 20, 24)
    for channel, expected in zip(pixels, image.convert(target).split(), strict=True):
        np.testing.assert_array_equal(channel, np.array(expected))


def test_file_is_read_from_its_path_or_from_bytes_at_hand(tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(numbered_picture(3)))
    from_path = decode_image({"bytes": None, "path": str(tmp_path / "image.png")}, Reading(3))
    np.testing.assert_array_equal(from_path, numbered_picture(3).transpose(2, 0, 1))
    at_hand = {"bytes": encoded(numbered_picture(4)), "path": str(tmp_path / "image.png")}
    np.testing.assert_array_equal(decode_image(at_hand, Reading(3)), numbered_picture(4).transpose(2, 0, 1))


DEEP_PPM = b"P6 4 4 65535\n" + bytes(96)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP_PPM, "photo.png has 16 bits a channel, of which Pillow reads 8"),
        (encoded(numbered_picture(0))[:200], "photo.png cannot be decoded: "),
        (b"no image at all", "photo.png cannot be decoded: no image file"),
        (b"", "photo.png cannot be decoded: "),
    ],
)
def test_image_that_cannot_be_decoded_faithfully_is_an_error_that_names_it(content, message):
    with pytest.raises(ValueError, match=message):
        decode_image({"bytes": content, "path": "photo.png"}, Reading(3))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "no image"),
        (b"text", "no image"),
        (encoded(numbered_picture(0))[:300], "damaged"),
        (encoded(numbered_picture(0), "jpeg")[:-200], "damaged"),  # half of it would be grey
        (DEEP_PPM, "16 bits"),
        (encoded(np.zeros((300, 300, 3), np.uint8)), "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kind_of_a_fault(content, kind):
    with pytest.raises(BrokenImageError) as error:
        decode_image({"bytes": content, "path": "photo.png"}, Reading(3, max_image_pixels=80_000))
    assert error.value.kind == kind and "photo.png" in str(error.value)


def test_file_that_is_gone_is_a_fault_too(tmp_path):
    with pytest.raises(BrokenImageError, match="gone.png cannot be read: No such file"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")}, Reading(3))


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (2, 900)])
def test_image_of_any_shape_is_cropped(shape, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    rows = {"image": [{"bytes": encoded(picture), "path": None}] * BATCH_SIZE}
    Dataset.from_dict(rows, features=Features({"image": datasets.Image()})).to_parquet(tmp_path / "a.parquet")
    [batch] = take(CropLoader(arguments(tmp_path / "a.parquet"), 3), 1)
    assert [crops.shape[-2:] for crops in batch.crops] == [(32, 32), (16, 16)] and not batch.skipped


def test_first_picture_of_an_animation_is_taken():
    file = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (30, 200)]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    assert (decode_image({"bytes": file.getvalue(), "path": None}, Reading(1)) == 30).all()


@pytest.mark.parametrize("flags", [(), ("--streaming",), ("--num_workers", "2")])
def test_check_finds_what_training_would_skip(tmp_path, capsys, flags):
    folder = write_flat_folder(tmp_path / "images")
    (folder / "9.png").write_bytes(encoded(numbered_picture(9))[:300])
    (folder / "8.jpg").write_bytes(b"")
    (folder / "7.png").write_bytes(encoded(np.zeros((3, 90, 3), np.uint8), "jpeg"))  # by its content, not its name
    with pytest.raises(SystemExit) as end:
        check_from_command_line([str(folder), *flags])
    account, total, *faults, sizes = capsys.readouterr().out.strip().splitlines()
    number = NUM_IMAGES + 3
    splits = f"train {number}, no labels: all in one folder"
    assert account == f"{folder}: {number} image files found, {number} listed ({splits})"
    assert (
        total == f"{NUM_IMAGES + 3} images, 2 of them would be skipped: 1 no image, 1 damaged" and end.value.code == 1
    )
    assert sizes == f"24 to 90 pixels wide, 3 to 20 high; {NUM_IMAGES + 1} of uint8"
    assert "8.jpg cannot be decoded: no image file" in faults[0] and "9.png cannot be decoded" in faults[1]


def test_check_groups_equal_findings(tmp_path, capsys):
    folder = write_flat_folder(tmp_path / "images")
    for number in range(20):
        (folder / f"broken_{number}.png").write_bytes(b"text")
    for flags, num_lines in (((), 7), (("--all",), 27)):
        with pytest.raises(SystemExit):
            check_from_command_line([str(folder), *flags])
        lines = capsys.readouterr().out.strip().splitlines()
        assert len(lines) == num_lines and "  and 17 more (--all lists them)" in lines


def test_file_cannot_have_five_channels():
    with pytest.raises(ValueError, match="model takes 5"):
        decode_image(undecoded(encoded(numbered_picture(0))), Reading(5))


FIVE_CHANNELS = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 9)).astype(np.uint8)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["CHW", "HWC"])
def test_array_column_becomes_channels_first(tmp_path, axes, streaming):
    arrays = FIVE_CHANNELS.transpose(axes)
    features = Features({"bands": Array3D(arrays.shape[1:], "uint8"), "number": Value("int64")})
    stored = Dataset.from_dict({"bands": list(arrays), "number": [0, 1]}, features=features)
    stored.to_parquet(tmp_path / "images.parquet")
    rows = list(load_images(str(tmp_path / "images.parquet"), streaming=streaming))
    np.testing.assert_array_equal([decode_image(row["image"], Reading(5)) for row in rows], FIVE_CHANNELS)
    with pytest.raises(ValueError, match="takes 3 channels"):
        decode_image(rows[0]["image"], Reading(3))


# CropLoader


BATCH_SIZE = 4


def arguments(dataset_name, **changes) -> TrainingArguments:
    settings = {
        "global_crop_size": 32,
        "local_crop_size": 16,
        "num_local_crops": 2,
        "num_workers": 0,
        "per_device_train_batch_size": BATCH_SIZE,
        "output_dir": "unused",
    }
    return TrainingArguments(dataset_name=str(dataset_name), **settings | changes)


def numbers_in(batch) -> list[int]:
    """Which images a batch is of; checks that all their crops are in the same order."""
    orders = [order for crops in batch.crops for order in crops[:, 0, 0, 0].view(-1, BATCH_SIZE).tolist()]
    assert len(orders) == 4 and orders.count(orders[0]) == 4
    return orders[0]


def assert_equal_batches(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        for crops, expected in zip(a.crops, b.crops, strict=True):
            assert torch.equal(crops, expected)
        for drawn, expected in zip(a.photometrics, b.photometrics, strict=True):
            assert all(torch.equal(field, value) for field, value in zip(drawn, expected, strict=True))


def write_shards(folder: Path, num_images: int, num_shards: int, row_group: int = 1000) -> Path:
    folder.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(num_images), num_shards)):
        path = folder / f"train-{shard:05}-of-{num_shards:05}.parquet"
        numbered_images(numbers.tolist()).to_parquet(path, batch_size=row_group)
    return folder


def take(loader: CropLoader, num_batches: int, state=None) -> list:
    return list(loader.batches(num_batches, state))


WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def test_epoch_visits_as_many_images_as_fill_batches_and_none_twice(tmp_path):
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 14, 1)), 3)
    assert loader.num_images == 14
    batches = take(loader, 9)
    epochs = [sum(map(numbers_in, batches[start : start + 3]), []) for start in (0, 3, 6)]
    for visited in epochs:
        assert len(set(visited)) == 12 and set(visited) <= set(range(14))
    assert len({tuple(visited) for visited in epochs}) == 3
    assert len({frozenset(visited) for visited in epochs}) > 1  # it is not always the same images that are left out


def test_map_style_batches_end_with_the_last_step(tmp_path):
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 8, 1)), 3)
    assert len(list(loader.batches(5))) == 5


def test_another_seed_gives_another_order(tmp_path):
    folder = write_shards(tmp_path / "images", 12, 1)
    orders = [sum(map(numbers_in, take(CropLoader(arguments(folder, seed=seed), 3), 3)), []) for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("num_channels", [1, 5])
def test_batches_have_the_channels_of_the_model(tmp_path, num_channels):
    if num_channels == 5:
        features = Features({"image": Array3D((5, 20, 24), "uint8")})
        arrays = np.random.default_rng(0).integers(0, 256, (4, 5, 20, 24)).astype(np.uint8)
        Dataset.from_dict({"image": list(arrays)}, features=features).to_parquet(tmp_path / "images.parquet")
    else:
        numbered_images(range(4)).to_parquet(tmp_path / "images.parquet")
    [batch] = take(CropLoader(arguments(tmp_path / "images.parquet"), num_channels), 1)
    assert [tuple(crops.shape) for crops in batch.crops] == [(8, num_channels, 32, 32), (8, num_channels, 16, 16)]


@WORKERS
def test_epoch_of_a_stream_visits_every_image_once_in_another_order_each_time(tmp_path, num_workers):
    folder = write_shards(tmp_path / "images", 16, 2)
    loader = CropLoader(arguments(folder, streaming=True, num_workers=num_workers), 3)
    batches = take(loader, 12)
    epochs = [sum(map(numbers_in, batches[start : start + 4]), []) for start in (0, 4, 8)]
    for visited in epochs:
        assert sorted(visited) == list(range(16))
    assert len({tuple(visited) for visited in epochs}) == 3
    assert list(range(16)) not in epochs


def test_epoch_of_a_stream_leaves_out_what_does_not_fill_a_batch(tmp_path):
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 14, 2), streaming=True), 3)
    batches = take(loader, 6)
    for start in (0, 3):
        visited = sum(map(numbers_in, batches[start : start + 3]), [])
        assert len(set(visited)) == 12
    assert loader.state_dict()["epoch"] == 1


def test_images_of_a_stream_are_cropped_differently_in_every_epoch(tmp_path):
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 4, 1), streaming=True), 3)
    batches = take(loader, 3)
    factors = [batch.photometrics[0].factors.sort(0).values for batch in batches]
    assert not torch.isclose(factors[0], factors[1]).any() and not torch.isclose(factors[1], factors[2]).any()


@pytest.mark.parametrize(("num_files", "row_group"), [(4, 1000), (1, BATCH_SIZE)])
def test_shards_of_a_stream_change_their_order_every_epoch(tmp_path, monkeypatch, num_files, row_group):
    """Files, and the row groups of a single one."""
    monkeypatch.setattr(data, "SHUFFLE_WINDOW", BATCH_SIZE)
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 16, num_files, row_group), streaming=True), 3)
    shards = [{number // BATCH_SIZE for number in numbers_in(batch)} for batch in take(loader, 16)]
    assert all(len(shard) == 1 for shard in shards)  # a window is a shard here, so these are not mixed
    orders = [tuple(shard.pop() for shard in shards[start : start + 4]) for start in range(0, 16, 4)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) > 1


# one shard, fewer than workers, not divisible by them, more; windows that hold less than a batch, and all images
SHARDS = pytest.mark.parametrize("num_shards", [1, 3, 5])
WINDOWS = pytest.mark.parametrize("window", [3, 7, 1024])


@WINDOWS
@SHARDS
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_processes_share_an_epoch_without_loss_or_repetition(
    tmp_path, monkeypatch, streaming, num_processes, num_shards, window
):
    """The reader alone: which images are whose does not depend on what workers do with them."""
    monkeypatch.setattr(data, "SHUFFLE_WINDOW", window)
    folder = write_shards(tmp_path / "images", 50, num_shards)
    steps_per_epoch = 50 // (BATCH_SIZE * num_processes)
    visited = []
    for process in range(num_processes):
        state = SimpleNamespace(num_processes=num_processes, process_index=process)
        monkeypatch.setattr(data, "PartialState", lambda state=state: state)
        loader = CropLoader(arguments(folder, streaming=streaming), 3)
        visited.append(list(itertools.islice(images_of(loader), 2 * steps_per_epoch)))
    for epoch in (0, 1):
        steps = [step for of_process in visited for step in of_process if step[0] == epoch]
        numbers = [number for _, numbers in steps for number in numbers]
        assert len(steps) == steps_per_epoch * num_processes
        assert len(numbers) == len(set(numbers)) == steps_per_epoch * num_processes * BATCH_SIZE
    if num_processes == 2:  # together they are one with twice the batch
        monkeypatch.setattr(data, "PartialState", lambda: SimpleNamespace(num_processes=1, process_index=0))
        loader = CropLoader(arguments(folder, streaming=streaming, per_device_train_batch_size=2 * BATCH_SIZE), 3)
        alone = [numbers for _, numbers in itertools.islice(images_of(loader), 2 * steps_per_epoch)]
        assert alone == [one[1] + other[1] for one, other in zip(*visited)]


def images_of(loader: CropLoader, state=None):
    """Epoch and numbers of the images of each step."""
    for step in (loader._map_style if loader.is_map_style else loader._stream)(**(state or loader.state)):
        rows = [loader.dataset[i] for i in step.images] if loader.is_map_style else step.images
        yield step.epoch, numbers_of(rows)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on few cores
@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_run_goes_on_as_if_uninterrupted_also_with_other_workers(tmp_path, monkeypatch, streaming, num_workers):
    """Stopped twice: within the first epoch and within the second."""
    monkeypatch.setattr(data, "SHUFFLE_WINDOW", 5)
    folder = write_shards(tmp_path / "images", 14, 3)
    uninterrupted, resumed, state = take(CropLoader(arguments(folder, streaming=streaming), 3), 8), [], None
    for num_batches in (2, 3, 3):
        loader = CropLoader(arguments(folder, streaming=streaming, num_workers=num_workers), 3)
        resumed += take(loader, num_batches, state)
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    assert_equal_batches(resumed, uninterrupted)


@WINDOWS
@SHARDS
@pytest.mark.parametrize("row_group", [4, 1000])
def test_stream_can_be_stopped_after_any_step(tmp_path, monkeypatch, num_shards, window, row_group):
    monkeypatch.setattr(data, "SHUFFLE_WINDOW", window)
    args = arguments(write_shards(tmp_path / "images", 23, num_shards, row_group), streaming=True)
    steps = list(itertools.islice(CropLoader(args, 3)._stream(0, 0, None), 12))
    for stopped, step in enumerate(steps[:-1]):
        goes_on = next(CropLoader(args, 3)._stream(**pickle.loads(pickle.dumps(step.state))))
        assert goes_on.epoch == steps[stopped + 1].epoch and goes_on.images == steps[stopped + 1].images


def test_stream_of_tars_can_be_stopped_after_any_step(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_WINDOW", 5)
    args = arguments(write_tars(tmp_path / "images", 23, 3), streaming=True)
    steps = list(itertools.islice(CropLoader(args, 3)._stream(0, 0, None), 11))
    numbers = [numbers_of(step.images) for step in steps]
    assert all(len(set(sum(numbers[start : start + 5], []))) == 20 for start in (0, 5))
    for stopped, step in enumerate(steps[:-1]):
        goes_on = next(CropLoader(args, 3)._stream(**pickle.loads(pickle.dumps(step.state))))
        assert goes_on.epoch == steps[stopped + 1].epoch and goes_on.images == steps[stopped + 1].images


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_broken_images_are_replaced_by_the_next_of_the_batch_and_told(tmp_path, streaming, num_workers):
    folder = tmp_path / "images"
    folder.mkdir()
    faults = {3: b"", 7: encoded(numbered_picture(7))[:300], 8: b"text", 11: DEEP_PPM}
    for i in range(16):
        (folder / f"{i:02}.png").write_bytes(faults.get(i) or (b"" if i in faults else encoded(numbered_picture(i))))
    whole = arguments(folder, streaming=streaming, num_workers=num_workers)
    order = [numbers for _, numbers in itertools.islice(names_of(CropLoader(whole, 3)), 4)]
    for batch, numbers in zip(take(CropLoader(whole, 3), 4), order):
        good = [number for number in numbers if number not in faults]
        following = [
            next(other for other in numbers[place:] + numbers if other not in faults) for place in range(len(numbers))
        ]
        assert numbers_in(batch) == following and set(good) <= set(following)
        assert [Path(image["image"]).name for image in batch.skipped] == [
            f"{number:02}.png" for number in numbers if number in faults
        ]
        kinds = {3: "no image", 7: "damaged", 8: "no image", 11: "16 bits"}
        assert [image["kind"] for image in batch.skipped] == [kinds[n] for n in numbers if n in faults]


def names_of(loader: CropLoader):
    """Epoch and numbers, by the names of their files, of each step."""
    for step in (loader._map_style if loader.is_map_style else loader._stream)(**loader.state):
        rows = [loader.dataset[i] for i in step.images] if loader.is_map_style else step.images
        yield step.epoch, [int(Path(row["image"]["path"]).stem) for row in rows]


def test_state_is_of_the_batch_that_was_taken_last_not_of_what_was_read_ahead(tmp_path):
    args = arguments(write_shards(tmp_path / "images", 16, 2), streaming=True, num_workers=2)
    loader = CropLoader(args, 3)
    batches = loader.batches(6)
    first = [next(batches)]
    state = loader.state_dict()
    assert state["position"] == BATCH_SIZE
    assert_equal_batches(first + take(CropLoader(args, 3), 5, state), [*first, *batches])


def test_stream_with_too_few_images_for_a_batch_is_an_error(tmp_path):
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 3, 1), streaming=True), 3)
    with pytest.raises(ValueError, match=r"fewer images than one batch of 4"):
        take(loader, 1)


def test_number_of_images_of_a_stream_is_the_one_that_is_given(tmp_path):
    folder = write_shards(tmp_path / "images", 8, 1)
    assert CropLoader(arguments(folder, streaming=True, num_examples=8), 3).num_images == 8
    assert CropLoader(arguments(folder, streaming=True), 3).num_images is None


# several data sets


def write_two(folder: Path) -> list[Path]:
    """12 images, 0 to 11, in two shards, and 4, 100 to 103, in one."""
    write_shards(folder / "many", 12, 2)
    (folder / "few").mkdir()
    numbered_images(range(100, 104), column="photo").to_parquet(folder / "few/train.parquet")
    return [folder / "many", folder / "few"]


def test_mixed_images_come_once_in_an_epoch(tmp_path):
    many, few = write_two(tmp_path)
    loader = CropLoader(arguments(many, mix_with=[str(few)]), 3)
    assert loader.num_images == 16
    batches = take(loader, 12)
    epochs = [sum(map(numbers_in, batches[start : start + 4]), []) for start in (0, 4, 8)]
    assert all(sorted(visited) == [*range(12), *range(100, 104)] for visited in epochs)
    assert len({tuple(visited) for visited in epochs}) == 3


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_mixed_images_come_in_the_shares_of_their_weights(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.02)  # whenever a data set begins anew
    many, few = write_two(tmp_path)
    loader = CropLoader(arguments(many, mix_with=[str(few)], mix_weights=[1.0, 3.0], streaming=streaming), 3)
    numbers = sum(map(numbers_in, take(loader, 100)), [])
    from_few = sum(number >= 100 for number in numbers)
    assert stats.binomtest(from_few, len(numbers), 0.75).pvalue > 1e-3
    assert set(numbers) == {*range(12), *range(100, 104)}


def test_image_that_comes_twice_in_an_epoch_is_cropped_twice(tmp_path):
    many, few = write_two(tmp_path)
    batches = take(CropLoader(arguments(many, mix_with=[str(few)], mix_weights=[1.0, 30.0]), 3), 20)
    factors = torch.cat([batch.photometrics[0].factors[:, 0] for batch in batches])
    numbers = sum(map(numbers_in, batches), [])
    assert len(set(numbers[:40])) < 20 and len(factors.unique()) == len(factors)


@pytest.mark.parametrize("weights", [[], [2.0, 1.0]], ids=["once", "weighted"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_mixed_images_go_on_as_if_uninterrupted(tmp_path, monkeypatch, streaming, weights):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.02)  # whenever a data set begins anew
    monkeypatch.setattr(data, "SHUFFLE_WINDOW", 5)
    many, few = write_two(tmp_path)
    for folder, number in ((many, 12), (few, 4)):  # as data sets of the Hub say it
        split = f"  - name: train\n    num_bytes: 1\n    num_examples: {number}\n"
        (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{split}---\n")
    args = arguments(many, mix_with=[str(few)], mix_weights=weights, streaming=streaming)
    uninterrupted, resumed, state = take(CropLoader(args, 3), 9), [], None
    if not weights:
        assert sorted(sum(map(numbers_in, uninterrupted[:4]), [])) == [*range(12), *range(100, 104)]
    for num_batches in (2, 4, 3):
        loader = CropLoader(args, 3)
        resumed += take(loader, num_batches, state)
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    assert_equal_batches(resumed, uninterrupted)


def test_streams_of_unknown_lengths_need_weights(tmp_path):
    many, few = write_two(tmp_path)
    with pytest.raises(ValueError, match="how many images these streams have is not known.*--mix_weights"):
        CropLoader(arguments(many, mix_with=[str(few)], streaming=True), 3)


def test_arrays_and_files_do_not_mix(tmp_path):
    many, _ = write_two(tmp_path)
    features = Features({"image": Array3D((3, 20, 24), "uint8")})
    Dataset.from_dict({"image": [np.zeros((3, 20, 24), np.uint8)]}, features=features).save_to_disk(
        tmp_path / "arrays"
    )
    with pytest.raises(ValueError, match="arrays and .*many are stored differently: Array3D.* and Image"):
        CropLoader(arguments(many, mix_with=[str(tmp_path / "arrays")]), 3)


# colours on the host


@WORKERS
def test_workers_finish_crops_if_they_are_told_to(tmp_path, num_workers):
    folder = write_shards(tmp_path / "images", 8, 1)
    args = [
        arguments(folder, num_workers=num_workers, augmentation_device=device, local_crop_size=24)
        for device in ("device", "host")
    ]
    batches, finished = (take(CropLoader(each, 3), 2) for each in args)
    for batch, other in zip(batches, finished, strict=True):
        assert other.photometrics is None
        for crops, expected in zip(other.crops, finish_crops(batch, "cpu", args[0]), strict=True):
            assert crops.dtype == torch.float32 and torch.equal(crops, expected)
        assert all(crops.dtype == torch.uint8 and crops.is_contiguous() for crops in batch.crops)


# advice


def test_advice_names_the_knob_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(data.os, "cpu_count", lambda: 8)
    folder = write_shards(tmp_path / "images", 8, 1)
    few, all_ = (CropLoader(arguments(folder, num_workers=number), 3) for number in (2, 8))
    assert few.advice() == "raise --num_workers, which is 2; there are 8 cores for each process"
    assert "8 workers keep all 8 cores busy" in all_.advice()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "8 workers keep all 2 cores busy" in all_.advice() and "all 2 cores" in few.advice()


def test_advice_tells_a_slow_stream_from_slow_workers(tmp_path, monkeypatch):
    loader = CropLoader(arguments(write_shards(tmp_path / "images", 8, 1), streaming=True), 3)
    read = loader._stream

    def slowly(**state):
        for step in read(**state):
            time.sleep(0.3)
            yield step

    monkeypatch.setattr(loader, "_stream", slowly)
    take(loader, 4)
    assert "the stream is slower than the training; do without --streaming" in loader.advice()


def test_weighted_images_of_a_data_set_come_equally_often():
    """300 of 600 images an epoch from each, of 500 and of 100: the latter three times."""
    for epoch in range(5):
        indices = order_of_epoch(0, epoch, [500, 100], [1.0, 1.0])
        counts = np.bincount(indices, minlength=600)
        assert counts[:500].sum() == counts[500:].sum() == 300 and (counts[500:] == 3).all()
    indices = np.concatenate([order_of_epoch(0, epoch, [500, 100], [1.0, 1.0]) for epoch in range(5)])
    assert (np.bincount(indices)[:500] == 3).all()


def test_missing_image_of_a_row_is_replaced_and_listed(tmp_path, capsys):
    rows = [{"bytes": encoded(numbered_picture(i)), "path": None} for i in range(7)] + [None]
    Dataset.from_dict({"image": rows}, features=Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "images.parquet"
    )
    with pytest.warns(UserWarning, match="1 of 8 rows of train have no image in column image"):
        loaders = [CropLoader(arguments(tmp_path / "images.parquet", streaming=value), 3) for value in (False, True)]
    for loader in loaders:
        batches = take(loader, 2)
        [skipped] = sum((batch.skipped for batch in batches), [])
        assert skipped["kind"] == "missing"
    with pytest.raises(SystemExit):
        check_from_command_line([str(tmp_path / "images.parquet")])
    assert "8 images, 1 of them would be skipped: 1 missing" in capsys.readouterr().out
