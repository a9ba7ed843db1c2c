"""Folders, tables and tars as users have them: every image file is read with its label, or counted with the reason."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation import folders, images
from evaluation.decoding import EncodedImage, Reading, image_content
from evaluation.folders import list_folder
from evaluation.images import describe_folder, load_images, local_files, split_names
from evaluation.pictures import find_images
from modeling_dino import DINOConfig, DINOImageProcessor, DINOModel
from training.check import check_from_command_line

from .commands import command, trained
from .test_training import recipe  # noqa: F401


STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def content(number: int = 0, kind: str = "jpeg", **options) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


JPEGS = [content(number) for number in range(6)]


def write(folder, *names) -> str:
    """A folder with JPEGs of these names; `8*a` stands for a/0.jpg to a/7.jpg."""
    for name in names:
        star = re.match(r"(\d+)\*(.*)", name)
        for path in [f"{star[2]}/{i}.jpg" for i in range(int(star[1]))] if star else [name]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(JPEGS[0])
    return str(folder)


def load(name, **options) -> tuple[list[tuple[str, str | None]], str]:
    """(Name below the folder, class) of each image, sorted, and all that is warned of."""
    images._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_images(str(name), **options)
        rows = list(dataset)
    feature = dataset.features.get("label")
    text = feature.int2str if isinstance(feature, datasets.ClassLabel) else lambda label: label
    found = [
        (os.path.relpath(row["image"]["path"], name), None if row.get("label") is None else text(row["label"]))
        for row in rows
    ]
    return sorted(found), "\n".join(str(one.message) for one in caught)


def by_folder(*names) -> list[tuple[str, str]]:
    return sorted((name, name.split("/")[-2]) for name in names)


CLASSES = ("a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")


# what lies beside the images


@STREAMING
@pytest.mark.parametrize("archive", ["images.zip", "images.tar.gz", "images.7z", "a/images.zip"])
def test_archive_beside_class_folders_is_not_read(tmp_path, archive, streaming):
    folder = write(tmp_path, *CLASSES)
    with zipfile.ZipFile(tmp_path / archive, "w") as file:
        for name in CLASSES:
            file.write(tmp_path / name, name)
    rows, warned = load(folder, streaming=streaming)
    assert rows == by_folder(*CLASSES)
    assert warned == f"{folder}: skipped 1 archive, such as {archive}. Unpack archives to read their images."


def test_tar_of_the_images_beside_them_is_not_read(tmp_path):
    folder = write(tmp_path, *CLASSES)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "a", "a")
        tar.add(tmp_path / "b", "b")
    rows, warned = load(folder)
    assert rows == by_folder(*CLASSES)
    assert warned == f"{folder}: skipped 1 table, such as images.tar. Give the path of a table to read it."


def test_table_without_images_beside_class_folders_is_not_read(tmp_path):
    folder = write(tmp_path, *CLASSES)
    pd.DataFrame({"box": range(9999), "image": ["a/0.jpg"] * 9999}).to_parquet(tmp_path / "boxes.parquet")
    rows, warned = load(folder)
    assert rows == by_folder(*CLASSES) and "skipped 1 table, such as boxes.parquet" in warned


def test_few_images_beside_tables_are_not_read(tmp_path):
    write(tmp_path, "assets/sample.jpg")
    pd.DataFrame({"image": JPEGS * 9, "label": [*range(6)] * 9}).to_parquet(tmp_path / "train.parquet")
    with pytest.warns(UserWarning, match="skipped 1 image files beside tables, such as assets/sample.jpg"):
        assert len(load_images(str(tmp_path))) == 54


def test_images_beside_tables_of_images_are_ambiguous(tmp_path):
    folder = write(tmp_path, *CLASSES)
    pd.DataFrame({"image": JPEGS}).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(ValueError, match="has 4 image files beside 1 table of images, such as more.parquet. Give "):
        load_images(folder)
    assert load(folder, allow_unread=True)[0] == by_folder(*CLASSES)


@STREAMING
def test_zip_alone_is_read_without_labels(tmp_path, streaming):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as file:
        for number, name in enumerate(CLASSES):
            file.writestr(name, JPEGS[number])
    with pytest.warns(UserWarning, match="zips are read without labels. Unpack them"):
        dataset = load_images(str(tmp_path), streaming=streaming)
    assert len(list(dataset)) == 4 and "label" not in dataset.features


def test_files_that_are_not_images_are_counted(tmp_path, capsys):
    write(tmp_path, *CLASSES)
    for name in ("a/0.txt", "a/1.txt", "b/0.xml", "README", "b/.hidden.jpg", "b/._0.jpg"):
        (tmp_path / name).write_bytes(b"mine")
    check_from_command_line([str(tmp_path)])
    account, total, _ = capsys.readouterr().out.splitlines()
    assert account == (
        f"{tmp_path}: 4 image files found, 4 listed (train 4, 2 classes); other files: 2 .txt, 1 .xml, 1 no ending"
    ) or account.startswith(f"{tmp_path}: 4 image files found, 4 listed (train 4, 2 classes); other files: 2 .txt, 1 ")
    assert total == "4 images, 0 of them would be skipped"


# splits


@STREAMING
@pytest.mark.parametrize("odd", ["scan_test_1.jpg", "val.jpg", "a/test.jpg", "a/train-0001-of-0002.jpg"])
def test_word_in_a_file_name_makes_no_split(tmp_path, odd, streaming):
    folder = write(tmp_path, *CLASSES, odd)
    assert split_names(folder, streaming=streaming) == ["train"]
    assert [name for name, _ in load(folder, streaming=streaming)[0]] == sorted([*CLASSES, odd])


SPLITS = {
    "plain": (("2*train/a", "2*train/b", "2*val/a", "2*val/b"), {"train": 4, "validation": 4}),
    "capitals": (("2*Train/a", "2*Train/b", "2*VAL/a", "2*VAL/b"), {"train": 4, "validation": 4}),
    "numbers": (("2*train2017/a", "2*train2017/b", "2*val2017/a", "2*val2017/b"), {"train": 4, "validation": 4}),
    "third": (("2*train/a", "2*train/b", "2*val/a", "2*unlabeled"), {"train": 4, "validation": 2, "unlabeled": 2}),
    "odd third": (("2*train/a", "2*train/b", "2*val/a", "1*extra-(1)"), {"train": 4, "validation": 2, "extra-(1)": 1}),
    "macos": (("2*train/a", "2*train/b", "2*val/a", "4*__MACOSX/train/a"), {"train": 4, "validation": 2}),
    "hidden": (("2*train/a", "2*train/b", "2*val/a", "4*.thumbnails/a"), {"train": 4, "validation": 2}),
    "wrapper": (("2*data/set/train/a", "2*data/set/train/b", "2*data/set/test/a"), {"train": 4, "test": 2}),
    "flat val": (("2*train/a", "2*train/b", "3*val"), {"train": 4, "validation": 3}),
    "only test": (("2*test/a", "2*test/b"), {"test": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_folders_of_splits(tmp_path, case):
    names, expected = SPLITS[case]
    folder = write(tmp_path, *names)
    assert split_names(folder) == list(expected)
    for split, number in expected.items():
        rows, warned = load(folder, split=split)
        assert len(rows) == number and warned == ""
        labels = {label for _, label in rows}
        assert labels <= {"a", "b"} if rows[0][0].count("/") > rows[0][0].count("set/") * 2 + 1 else labels == {None}


def test_third_folder_without_images_changes_nothing(tmp_path):
    folder = write(tmp_path, "2*train/a", "2*train/b", "2*val/a", "annotations/0.xml", "annotations/test/1.json")
    assert split_names(folder) == ["train", "validation"]


def test_imagenet_layout_has_labels_for_training_only(tmp_path):
    base = "ILSVRC/Data/CLS-LOC"
    folder = write(
        tmp_path, f"2*{base}/train/n01", f"2*{base}/train/n02", f"3*{base}/val", f"3*{base}/test",
        "ILSVRC/Annotations/CLS-LOC/val/0.xml", "LOC_sample_submission.csv",
    )  # fmt: skip
    assert {label for _, label in load(folder)[0]} == {"n01", "n02"}
    assert describe_folder(folder).startswith(
        f"{folder}: 10 image files found, 10 listed (train 4, 2 classes; validation 3, no labels: all in one folder; "
        "test 3, no labels: all in one folder)"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("2*cats", "2*dogs", "2*test"), "has the folder test beside others with images (cats, dogs), so that it may"),
        (("2*train/a", "2*unlabeled"), "has the folder train beside others with images (unlabeled), so that it may"),
        (("2*cats/test", "2*cats/train", "2*dogs/a"), "has folders of the name test within others, so that test"),
        (("2*train/cats/test", "2*train/dogs", "2*val"), "has folders of the name test within others, so that test"),
        (("x.jpg", "2*data/train/a", "2*data/val/a"), "has folders of the name val within others, so that test"),
    ],
)
def test_ambiguous_layout_is_an_error_with_its_flag(tmp_path, names, message):
    folder = write(tmp_path, *names)
    num_images = len(list(tmp_path.rglob("*.jpg")))
    with pytest.raises(ValueError) as error:
        load_images(folder)
    assert message in str(error.value) and "--folder_layout" in str(error.value)
    assert len(load(folder, folder_layout="classes")[0]) == num_images


def test_layout_of_splits_is_given(tmp_path):
    folder = write(tmp_path, "2*cats/a", "2*cats/b", "2*dogs/a", "2*test/a")
    assert split_names(folder, folder_layout="splits") == ["test", "cats", "dogs"]
    assert load(folder, split="cats", folder_layout="splits")[0] == by_folder(
        "cats/a/0.jpg", "cats/a/1.jpg", "cats/b/0.jpg", "cats/b/1.jpg"
    )
    assert load(folder, folder_layout="classes")[1].count("\n") == 0
    nested = write(tmp_path / "nested", "2*train/cats/test", "2*train/dogs/a", "2*val/dogs")
    assert len(load(nested, folder_layout="splits")[0]) == 4


def test_images_beside_splits_are_not_read(tmp_path):
    folder = write(tmp_path, "8*train/a", "8*train/b", "4*val/a", "0.jpg")
    rows, warned = load(folder)
    assert len(rows) == 16
    assert warned == f"{folder}: skipped 1 image file: images beside the folders of splits, such as 0.jpg"


# labels


@pytest.mark.parametrize("case", ["loose", "depths", "deep", "one", "flat"])
def test_labels_are_names_of_folders(tmp_path, case):
    names, labels, said = {
        "loose": (
            (*CLASSES, "x.jpg"),
            ["a", "a", "b", "b", None],
            "no label for 1 of 5 images of train, beside class folders",
        ),
        "depths": (("a/0.jpg", "b/x/0.jpg", "b/y/z/0.jpg"), ["a", "b", "b"], "images lie at 3 depths; labels are the"),
        "deep": (("a/x/0.jpg", "a/y/0.jpg"), ["x", "y"], ""),
        "one": (("a/0.jpg", "a/1.jpg"), [None, None], ""),
        "flat": (("0.jpg", "1.jpg"), [None, None], ""),
    }[case]
    rows, warned = load(write(tmp_path, *names))
    assert [label for _, label in rows] == labels and len(rows) == len(names)
    assert said in warned and warned.count("\n") == 0 and bool(warned) == bool(said)


def test_case_of_class_names(tmp_path):
    letters = write(tmp_path / "letters", "1*train/a", "1*train/A", "1*val/a")
    if len(os.listdir(tmp_path / "letters/train")) == 2:  # not on a disk that ignores case
        assert {label for _, label in load(letters)[0]} == {"a", "A"}
    pets = write(tmp_path / "pets", "1*train/Cat", "1*train/dog", "1*test/cat", "1*test/Dog")
    features = [load_images(pets, split=split).features["label"].names for split in ("train", "test")]
    assert features == [["Cat", "dog"]] * 2
    assert [label for _, label in load(pets, split="test")[0]] == ["dog", "Cat"]


# metadata


def test_metadata_of_some_images_keeps_all_of_them(tmp_path):
    folder = write(tmp_path, "8*a", "8*b")
    (tmp_path / "metadata.csv").write_text("file_name,weight\na/0.jpg,2\nb/3.jpg,5\ngone.jpg,1\n")
    rows, warned = load(folder)
    assert len(rows) == 16 and {label for _, label in rows} == {"a", "b"}
    assert "metadata.csv names 2 of 16 images; the others are read without it" in warned
    assert "metadata.csv names images that do not exist: 1" in warned and warned.count("\n") == 1
    weights = {name: label for name, label in load(folder, label_column="weight")[0] if label is not None}
    assert weights == {"a/0.jpg": 2, "b/3.jpg": 5}


def test_metadata_without_file_names_is_said(tmp_path):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "metadata.csv").write_text("id,weight\n0,2\n")
    rows, warned = load(folder)
    assert rows == by_folder(*CLASSES)
    assert warned == f"{tmp_path / 'metadata.csv'} has no column file_name and is not used; its columns are id, weight"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_labels_of_all_images_are_used(tmp_path, kind):
    folder = write(tmp_path, "train/001.jpg", "train/002.jpg", "test/001.jpg")
    table = {"train": ["cat", "dog"], "test": ["dog"]}
    for split, labels in table.items():
        frame = pd.DataFrame({"file_name": [f"00{i + 1}.jpg" for i in range(len(labels))], "label": labels})
        file = tmp_path / split / f"metadata.{kind}"
        if kind == "csv":
            frame.to_csv(file, index=False)
        elif kind == "jsonl":
            frame.to_json(file, orient="records", lines=True)
        else:
            frame.to_parquet(file)
    for split, labels in table.items():
        rows, warned = load(folder, split=split)
        assert [label for _, label in rows] == labels and warned == ""
    assert "train 2, labels of metadata; test 1, labels of metadata" in describe_folder(folder)


@pytest.mark.parametrize(("lines", "label", "said"), [
    ("a/0.jpg,x\n", "a", "metadata has no label for some images; labels are the names of folders"),
    ("a/0.jpg,x\na/1.jpg,y\nb/0.jpg,x\nb/1.jpg,y\n", "x", "labels are those of metadata, not the names of folders"),
])  # fmt: skip
def test_metadata_labels_beside_class_folders(tmp_path, lines, label, said):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + lines)
    rows, warned = load(folder)
    assert rows[0] == ("a/0.jpg", label) and None not in dict(rows).values() and said in warned


def test_nested_metadata_is_kept_and_mixed_said(tmp_path):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a/0.jpg", "objects": {"bbox": [[0, 1]]}, "odd": 1}\n{"file_name": "b/0.jpg", "odd": "x"}\n'
    )
    rows, warned = load(folder)
    assert rows == by_folder(*CLASSES) and "columns of metadata that mix types are not used: odd" in warned


def test_metadata_that_cannot_be_read_is_named(tmp_path):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "metadata.csv").write_text('a,b\n"')
    rows, warned = load(folder)
    assert rows == by_folder(*CLASSES) and "metadata.csv cannot be read and is not used: " in warned


# endings and names


@pytest.mark.parametrize(
    ("name", "kind"),
    [("0.avif", "avif"), ("0.mpo", "mpo"), ("0.JPEG", "jpeg"), ("0.WebP", "webp"), ("0.jfif", "jpeg"), ("0", "jpeg"),
     ("0.tiff", "tiff"), ("0.bmp", "bmp"), ("0.gif", "gif"), ("0.ppm", "ppm"), ("0.jp2", "jpeg2000")],
)  # fmt: skip
def test_image_of_any_ending_is_read(tmp_path, name, kind):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er" / name).write_bytes(content(0, kind))
    [row] = load_images(str(tmp_path))
    assert EncodedImage(row["image"], Reading(3)).decode().shape == (3, 20, 24)
    assert len(find_images([str(tmp_path)], 8, 0)) == 1


def test_heif_is_read_with_pillow_heif(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    write(tmp_path, "1.jpg")
    pillow_heif.from_pillow(Image.new("RGB", (24, 20))).save(tmp_path / "0.HEIC")
    assert [EncodedImage(row["image"], Reading(3)).decode().shape for row in load_images(str(tmp_path))] == [
        (3, 20, 24)
    ] * 2


def test_heif_without_pillow_heif_is_counted(tmp_path):
    write(tmp_path, "20*a", "a/0.heic", "a/1.HEIF", "b/0.jpg")
    script = "import sys; sys.modules['pillow_heif'] = None; from training.check import main; main()"
    checked = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": os.getcwd()})  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith(f"{tmp_path}: 23 image files found, 21 listed (train 21, 2 classes)\n")
    assert checked.stderr.count("skipped 2 image files: HEIF, which needs pillow-heif, such as a/0.heic") == 1


def test_heif_over_a_tenth_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "IMAGE_SUFFIXES", folders.IMAGE_SUFFIXES - {".heic"})
    monkeypatch.setattr(folders, "UNREAD_HEIF", {".heic"})
    folder = write(tmp_path, "8*a", "b/0.heic")
    with pytest.raises(ValueError) as error:
        load_images(folder)
    assert str(error.value) == (
        f"{folder}: 1 of 9 image files cannot be read, more than a tenth: HEIF, which needs pillow-heif, such as "
        "b/0.heic. Give --allow_unread to skip them."
    )
    assert len(load(folder, allow_unread=True)[0]) == 8
    for path in tmp_path.glob("a/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no images in .*found 1 files \(1 HEIF, which needs pillow-heif\)"):
        load_images(folder)


def test_text_without_an_ending_is_not_read(tmp_path):
    folder = write(tmp_path, *CLASSES, "a/2")
    for name, text in (
        ("LICENSE", b"MIT License"),
        ("a/Makefile", b"all:\n"),
        ("a/empty", b""),
        ("grib", b"GRIB\0\0\0\1"),
    ):
        (tmp_path / name).write_bytes(text)
    assert load(folder)[0] == by_folder(*CLASSES, "a/2")
    (tmp_path / "a/Makefile").write_bytes(JPEGS[0])
    assert len(load(folder)[0]) == 6


@STREAMING
@pytest.mark.parametrize("name", ["set[1]", "[ab]", "a*b?", "50%", "#1", "new\nline", "ünï", "x::y", "https:::z"])
def test_characters_in_names_do_not_matter(tmp_path, name, streaming):
    folder = write(tmp_path / name, *CLASSES, f"a/{name}.jpg")
    rows, warned = load(folder, streaming=streaming)
    assert rows == by_folder(*CLASSES, f"a/{name}.jpg") and warned == ""
    dataset = load_images(folder, streaming=streaming)
    assert {image_content(row["image"]) for row in dataset} == {JPEGS[0]}


@STREAMING
@pytest.mark.parametrize("name", ["set[1]", "a*b?", "50%", "#1"])
def test_characters_in_names_of_tables_do_not_matter(tmp_path, name, streaming):
    for kind in ("parquet", "tar", "zip"):
        (tmp_path / name / kind).mkdir(parents=True)
    pd.DataFrame({"image": JPEGS}).to_parquet(tmp_path / name / "parquet/train.parquet")
    pd.DataFrame({"image": JPEGS[:2]}).to_parquet(tmp_path / name / "parquet/test.parquet")
    write_tar(tmp_path / name / "tar/train-0[0].tar", {f"{i}.jpg": image for i, image in enumerate(JPEGS)})
    for path in ("parquet", "parquet/train.parquet", "tar", "tar/train-0[0].tar"):
        dataset = load_images(str(tmp_path / name / path), streaming=streaming)
        assert [image_content(row["image"]) for row in dataset] == JPEGS
    assert len(list(load_images(str(tmp_path / name / "parquet"), split="test", streaming=streaming))) == 2


@pytest.mark.parametrize("name", ["a::b", "a::b.parquet"])
def test_colons_in_the_path_of_a_table_are_an_error(tmp_path, name):
    (tmp_path / "a::b").mkdir()
    path = tmp_path / name if name.endswith("t") else tmp_path / name / "train.parquet"
    pd.DataFrame({"image": JPEGS}).to_parquet(path)
    with pytest.raises(ValueError, match="has :: in its name, which the datasets library takes apart. Rename it."):
        load_images(str(tmp_path / name))


# links, and what cannot be opened


def test_links_are_followed(tmp_path):
    folder = write(tmp_path / "data", "2*a")
    write(tmp_path / "elsewhere", "2*b", "c.jpg")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere/b")
    (tmp_path / "data/a/2.jpg").symlink_to(tmp_path / "elsewhere/c.jpg")
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, str(tmp_path / "link")):
        assert load(name) == (by_folder("a/0.jpg", "a/1.jpg", "a/2.jpg", "b/0.jpg", "b/1.jpg"), "")


def test_links_in_a_circle_end(tmp_path):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "b/self").symlink_to("self")
    (tmp_path / "b/here").symlink_to(".")
    assert load(folder)[0] == by_folder(*CLASSES)


def test_second_link_to_a_folder_is_said(tmp_path):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "c").symlink_to("a")
    rows, warned = load(folder)
    assert rows == by_folder(*CLASSES, "c/0.jpg", "c/1.jpg")
    assert "followed 1 second link, such as " in warned and warned.endswith("with two names are read twice.")


def test_links_to_nothing_are_counted(tmp_path):
    folder = write(tmp_path, "20*a", "1*b")
    for name in ("gone.jpg", "loop.png"):
        (tmp_path / "a" / name).symlink_to(name if name == "loop.png" else "nowhere")
    (tmp_path / "a/notes").symlink_to("nowhere")
    rows, warned = load(folder)
    assert len(rows) == 21
    assert warned == f"{folder}: skipped 2 image files: broken links, such as a/gone.jpg"


def test_pipe_is_not_waited_for(tmp_path):
    folder = write(tmp_path, "20*a", "1*b")
    for name in ("a/pipe.jpg", "a/pipe", "metadata.csv", "x.parquet"):
        os.mkfifo(tmp_path / name)
    rows, warned = load(folder)
    assert len(rows) == 21
    assert warned == f"{folder}: skipped 1 image file: pipes, sockets or devices, such as a/pipe.jpg"


def test_folder_that_cannot_be_opened_is_counted(tmp_path, monkeypatch):
    folder, scandir = write(tmp_path, "20*a", "1*b", "2*c"), os.scandir

    def refusing(path):  # also where the tests run as root
        if path.endswith("/c/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", lambda path: refusing(os.path.join(path, "")))
    rows, warned = load(folder)
    assert len(rows) == 21
    assert warned == f"{folder}: skipped 1 folder: cannot be opened (Permission denied), such as c/"


@pytest.mark.parametrize("where", [b"a/gr\xfcn.jpg", b"gr\xfcn/0.jpg"])
def test_name_that_is_not_utf8_is_counted(tmp_path, where):
    path = os.fsencode(tmp_path) + b"/" + where
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(JPEGS[0])
    folder = write(tmp_path, "4*a")
    with pytest.raises(
        ValueError, match=r"1 of 5 image files cannot be read, .*names that are not UTF-8, such as \S*gr\\udcfcn"
    ):
        load_images(folder)
    write(tmp_path, "20*a", "20*b")
    rows, warned = load(folder)
    assert len(rows) == 40 and "skipped 1 image file: names that are not UTF-8" in warned


@pytest.mark.parametrize("names", [(), ("empty/", "deep/empty/"), (".hidden/0.jpg",), ("__MACOSX/0.jpg",)])
def test_folder_without_images_says_what_it_has(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir(parents=True) if name.endswith("/") else write(tmp_path, name)
    with pytest.raises(ValueError, match=f"^no images in {tmp_path}: looked in all folders .* found 0 files$"):
        load_images(str(tmp_path))
    (tmp_path / "a.rar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"found 1 files \(1 \.rar\)$"):
        load_images(str(tmp_path))


def test_empty_folder_beside_classes_changes_nothing(tmp_path):
    folder = write(tmp_path, *CLASSES)
    (tmp_path / "c").mkdir()
    (tmp_path / "test").mkdir()
    assert load(folder) == (by_folder(*CLASSES), "")


# the fingerprint and the files of a split


def test_fingerprint_tells_changed_files_and_labels(tmp_path):
    folder = write(tmp_path, "2*train/a", "2*train/b", "1*val/a")

    def fingerprint():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_images(folder)._fingerprint

    found = [fingerprint()]
    assert fingerprint() == found[0]
    write(tmp_path, "val/a/1.jpg")
    assert fingerprint() == found[0]
    (tmp_path / "train/a/0.jpg").write_bytes(JPEGS[1])
    found.append(fingerprint())
    os.utime(tmp_path / "train/a/0.jpg", (0, 0))
    found.append(fingerprint())
    (tmp_path / "metadata.csv").write_text("file_name,age\ntrain/a/0.jpg,3\n")
    found.append(fingerprint())
    (tmp_path / "metadata.csv").write_text("file_name,age\ntrain/a/0.jpg,4\n")
    found.append(fingerprint())
    assert len(set(found)) == len(found)


def test_files_of_a_split_have_sizes_and_times(tmp_path):
    folder = write(tmp_path, "1*train/a", "1*val/a")
    os.utime(tmp_path / "train/a/0.jpg", (7, 7))
    assert local_files(folder, "train") == [("train/a/0.jpg", len(JPEGS[0]), 7)]


# tables


def tables():
    """Tables as pandas writes them: of each, the six images one after another, and their labels."""
    paths = [f"pictures/{i}.jpg" for i in range(6)]
    files, references = ([{"bytes": image, "path": None} for image in JPEGS],
                         [{"bytes": None, "path": path} for path in paths])  # fmt: skip
    single, double = {"label": [*range(6)], "text": ["x"] * 6}, {"label": ["a", "b"]}
    repeated = ["a"] * 4 + ["b"] * 2
    return {
        "files": ({"image": files} | single, single["label"]),
        "references": ({"image": references} | single, single["label"]),
        "bytes": ({"photo": JPEGS} | single, single["label"]),
        "path": ({"path": paths} | single, single["label"]),
        "img before path": ({"path": single["text"], "img": paths} | single, single["label"]),
        "lists of files": ({"image": [files[:4], files[4:]]} | double, repeated),
        "lists of bytes": ({"image": [JPEGS[:4], JPEGS[4:]]} | double, repeated),
        "lists of paths": ({"image": [paths[:4], paths[4:]]} | double, repeated),
    }


@STREAMING
@pytest.mark.parametrize("place", ["data/train/table.parquet", "data/train", "data"])
@pytest.mark.parametrize("kind", ["files", "bytes", "lists of files", "lists of bytes"])
def test_table_of_files_is_read_unchanged(tmp_path, kind, place, streaming):
    columns, labels = tables()[kind]
    (tmp_path / "data/train").mkdir(parents=True)
    pd.DataFrame(columns).to_parquet(tmp_path / "data/train/table.parquet")
    rows = list(load_images(str(tmp_path / place), streaming=streaming))
    assert [image_content(row["image"]) for row in rows] == JPEGS and [row["label"] for row in rows] == labels


@STREAMING
@pytest.mark.parametrize("kind", ["references", "path", "img before path", "lists of paths"])
def test_table_of_paths_is_read_relative_to_it(tmp_path, kind, streaming):
    columns, labels = tables()[kind]
    write(tmp_path, *(f"pictures/{number}.jpg" for number in range(6)))
    for number, image in enumerate(JPEGS):
        (tmp_path / f"pictures/{number}.jpg").write_bytes(image)
    pd.DataFrame(columns).to_parquet(tmp_path / "table.parquet")
    rows = list(load_images(str(tmp_path / "table.parquet"), streaming=streaming))
    assert [image_content(row["image"]) for row in rows] == JPEGS and [row["label"] for row in rows] == labels


@STREAMING
def test_absolute_paths_in_a_folder_of_tables_are_read(tmp_path, streaming):
    write(tmp_path / "pictures", "0.jpg", "1.jpg")
    (tmp_path / "tables").mkdir()
    for i in range(2):
        pd.DataFrame({"file_name": [str(tmp_path / f"pictures/{i}.jpg")]}).to_parquet(tmp_path / f"tables/{i}.parquet")
    assert [name for name, _ in load(tmp_path / "tables", streaming=streaming)[0]] == [
        "../pictures/0.jpg",
        "../pictures/1.jpg",
    ]


@STREAMING
def test_paths_in_another_column_need_its_name(tmp_path, streaming):
    write(tmp_path, "0.jpg")
    pd.DataFrame({"where": ["0.jpg"], "text": ["x"]}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="no image column; the columns are where, text. Name it by --image_column."):
        load_images(str(tmp_path / "table.parquet"), streaming=streaming)
    [row] = load_images(str(tmp_path / "table.parquet"), image_column="where", streaming=streaming)
    assert image_content(row["image"]) == JPEGS[0]


def test_typed_image_column_comes_before_bytes(tmp_path):
    features = datasets.Features({"hash": datasets.Value("binary"), "photo": datasets.Image()})
    rows = {"hash": [b"x"], "photo": [{"bytes": JPEGS[1], "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table.parquet")
    [row] = load_images(str(tmp_path / "table.parquet"))
    assert image_content(row["image"]) == JPEGS[1]


@STREAMING
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"photo": JPEGS, "label": range(6)}, "1.parquet has the columns photo, label, and 0.parquet image, label. "),
        ({"image": [{"bytes": JPEGS[0], "path": "x"}], "label": [0]},
         "1.parquet has the columns image (struct<bytes: binary, path: string>), label, and 0.parquet image (binary)"),
        ({"image": JPEGS, "label": [*"abcdef"]}, "and 0.parquet image, label (int64). Give all files the same "),
    ],
)  # fmt: skip
def test_unlike_shards_are_named(tmp_path, second, message, streaming):
    pd.DataFrame({"image": JPEGS, "label": range(6)}).to_parquet(tmp_path / "0.parquet")
    pd.DataFrame(second).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(ValueError) as error:
        load_images(str(tmp_path), streaming=streaming)
    assert message in str(error.value) and "\n" not in str(error.value)


@STREAMING
def test_unlike_columns_of_another_split_do_not_matter(tmp_path, streaming):
    pd.DataFrame({"image": JPEGS, "label": range(6)}).to_parquet(tmp_path / "train.parquet")
    pd.DataFrame({"image": JPEGS}).to_parquet(tmp_path / "test.parquet")
    assert [row["label"] for row in load_images(str(tmp_path), streaming=streaming)] == [*range(6)]


def test_rows_without_an_image_are_counted(tmp_path):
    pd.DataFrame({"image": JPEGS + [None] * 3}).to_parquet(tmp_path / "images.parquet")
    with pytest.warns(UserWarning, match="3 of 9 rows of train have no image in column image$"):
        assert len(load_images(str(tmp_path / "images.parquet"))) == 9


# tars


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@STREAMING
def test_tars_of_unlike_endings_are_counted(tmp_path, streaming):
    write_tar(tmp_path / "0.tar", {f"{i}.jpg": JPEGS[0] for i in range(20)})
    write_tar(tmp_path / "1.tar", {f"{i}.png": JPEGS[0] for i in range(2)} | {"notes.txt": b"x"})
    said = "3 of 23 rows of train have no image in column jpg; images of other endings: 2 .png"
    with pytest.raises(ValueError, match=said + ". Give --allow_unread to skip these rows."):
        load_images(str(tmp_path), streaming=streaming)
    with pytest.warns(UserWarning, match=said):
        rows = list(load_images(str(tmp_path), streaming=streaming, allow_unread=True))
    assert sum(row["image"] is None for row in rows) == 3


@STREAMING
def test_tar_that_begins_with_several_endings_is_an_error(tmp_path, streaming):
    write_tar(tmp_path / "0.tar", {"0.JPG": JPEGS[0], "1.jpg": JPEGS[1], "2.jpg": JPEGS[2]})
    with pytest.raises(ValueError, match="tars mix images of several endings: 1 .JPG, 2 .jpg. Rename to one ending$"):
        load_images(str(tmp_path), streaming=streaming)


@STREAMING
def test_tar_of_macos_and_of_masks_has_no_missing_images(tmp_path, streaming):
    members = {f"{i}.{ending}": JPEGS[i] for i in range(4) for ending in ("jpg", "png")}
    write_tar(tmp_path / "0.tar", {"._0.jpg": b"x"} | members)
    assert load(tmp_path / "0.tar", image_column="jpg", streaming=streaming)[1] == ""


# the commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    DINOModel(
        DINOConfig(image_size=16, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(folder)
    DINOImageProcessor(size=16, crop_size=16).save_pretrained(folder)
    return folder


def test_knn_measures_on_val_beside_a_third_folder(tmp_path, model):
    folder = write(tmp_path / "data", "4*Train/a", "4*Train/b", "2*Val/A", "2*Val/b", "3*unlabeled", "0.jpg")
    with zipfile.ZipFile(tmp_path / "data/all.zip", "w") as file:
        file.writestr("x/0.jpg", JPEGS[0])
    argv = ("knn", "--model", model, "--dataset_name", folder, "--k", "1", "--output", tmp_path / "knn.json")
    finished = command(*argv, module="evaluation")
    assert finished.returncode == 0, finished.stderr
    [entry] = pd.read_json(tmp_path / "knn.json").to_dict("records")
    assert "validation" in str(entry) and "'num_images': 4" in str(entry)
    warned = finished.stderr.splitlines()
    assert [sum(word in line for line in warned) for word in ("images beside the folders", "1 archive")] == [1, 1], (
        warned
    )


def test_metadata_label_reaches_knn(tmp_path, model):
    folder = write(tmp_path / "data", "8*images")
    lines = [f"images/{i}.jpg,{'xy'[i % 2]}" for i in range(8)]
    (tmp_path / "data/metadata.csv").write_text("\n".join(["file_name,species", *lines]))
    argv = ("knn", "--model", model, "--dataset_name", folder, "--k", "1", "--eval_split", "train")
    finished = command(*argv, "--label_column", "species", "--output", tmp_path / "knn.json", module="evaluation")
    assert finished.returncode == 0 and finished.stderr.count("\n") == 1, finished.stderr  # the account


def test_attention_of_a_folder_skips_files_of_macos(tmp_path, model):
    folder = write(tmp_path / "data", "2*a")
    (tmp_path / "data/a/._0.jpg").write_bytes(b"\0\5\x16\7")
    argv = ("attention", "--model", model, "--image", folder, "--output", tmp_path / "a.png")
    finished = command(*argv, module="evaluation")
    assert finished.returncode == 0, finished.stderr


def test_training_on_a_folder_says_what_is_not_read(recipe, tmp_path):  # noqa: F811
    folder = write(tmp_path / "data", "20*train/a", "20*train/b", "4*val/a", "0.jpg")
    argv = ("--config", recipe, "--dataset_name", folder, "--output_dir", tmp_path / "run", "--report_to", "none")
    finished = command(*argv, "--max_steps", "1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == (f"{folder}: skipped 1 image file: images beside the folders of splits, such as 0.jpg\n")
    shutil.rmtree(tmp_path / "run")
    write(tmp_path / "data", *(f"{i}.jpg" for i in range(20)))
    refused = command(*argv, "--max_steps", "1")
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].endswith("Give --allow_unread to skip them.")
    trained(*argv, "--max_steps", "1", "--allow_unread")
    log = (tmp_path / "run/train.log").read_text()
    assert "64 image files found, 44 listed (train 40, 2 classes; validation 4, 1 class)" in log


def test_large_folder_is_listed_without_reading_files(tmp_path, monkeypatch):
    folder = write(tmp_path, "30*a", "30*b")
    calls = []
    monkeypatch.setattr(folders, "_size_and_time", lambda path: calls.append(path) or (1, 1))
    assert split_names(folder) == ["train"] and not calls
    assert len(list_folder(tmp_path).images) == 60 and not calls
    load_images(folder)
    assert len(calls) == 60


def test_folders_that_make_one_split_are_said(tmp_path):
    folder = write(tmp_path, "train/a/0.jpg", "train/b/0.jpg", "test/a/1.jpg", "eval/b/1.jpg")
    _, warned = load(folder)
    assert warned == f"{tmp_path}: split test joins the folders eval, test"
