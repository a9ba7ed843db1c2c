"""What the commands of dino-eval write and refuse to replace, and how they answer damaged files."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluation import features
from evaluation.__main__ import evaluate_from_command_line
from evaluation.outputs import filling, is_from, replacing
from evaluation.report import Report, format_table, in_words
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command, scripted
from .original import tiny_config
from .test_bad_input import answer


FOREIGN = b"not from dino-eval"
COPY_AGAIN = "Copy, download or convert the model again."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)  # untrained:M has seed 0
    DINOModel(tiny_config()).save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(model, parquet_folder, flat_folder, tmp_path_factory):
    """Values of the placeholders in `COMMANDS`."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    with av.open(str(folder / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for kind, mode in (("JPEGImages", "RGB"), ("Annotations", "L")):
        (folder / "davis" / kind / "480p/one").mkdir(parents=True)
        for number in range(3):
            picture = Image.new(mode, (64, 64))
            picture.paste(1, (8, 8, 40, 40))
            suffix = {"RGB": "jpg", "L": "png"}[mode]
            picture.save(folder / "davis" / kind / f"480p/one/{number:05d}.{suffix}")
    knn = {"protocol": "knn", "dataset_name": "images", "k": [1], "show": ["knn_1_top1"]}
    config = {"data": {"images": str(parquet_folder)}, "measure": [knn]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(config))
    return {"model": model, "labelled": parquet_folder, "images": flat_folder, "inputs": folder}


LINEAR = "linear --dataset_name {labelled} --epochs 1 --n_last_blocks 1 --output_dir {out}"
# command, the place that it is given, and a file that it writes there
COMMANDS = {
    "report": ("knn --dataset_name {labelled} --k 1 --output {out}/r.json", "r.json"),
    "sheet": ("attention --image {images}/0.png --output {out}/a.png", "a.png"),
    "arrays": ("attention --image {images}/0.png --save_arrays --output {out}/a.png", "a.npz"),
    "figures": ("attention --image {images}/0.png --output {out}", "0_mean.png"),
    "figure arrays": ("attention --image {images}/0.png --save_arrays --output {out}", "0.npz"),
    "mp4": ("attention --video {inputs}/in.mp4 --output {out}/v.mp4", "v.mp4"),
    "mkv": ("attention --video {inputs}/in.mp4 --output {out}/v.mkv", "v.mkv"),
    "pca": ("pca --image {images}/0.png --image_size 32 --output {out}/p.png", "p.png"),
    "embedding": ("embedding --dataset_name {images} --save_arrays --output {out}/e.png", "e.npz"),
    "duplicates": ("duplicates --dataset_name {images} --output {out}/d.csv", "d.csv"),
    "duplicate pairs": ("duplicates --dataset_name {images} --output {out}/d.csv", "d.png"),
    "assignments": ("clustering --dataset_name {labelled} --num_init 1 --assignments {out}/c.csv", "c.csv"),
    "masks": (
        "video_segmentation --dataset_name {inputs}/davis --sequences one --image_size 64 --output_dir {out}",
        "one/00001.png",
    ),
    "features": ("features --dataset_name {images} --features {out}", "train.parquet"),
    "kept features": ("knn --dataset_name {labelled} --k 1 --features {out}", "test.parquet"),
    "npz features": ("features --dataset_name {images} --features {out} --format npz", "train.npz"),
    "csv features": ("features --dataset_name {images} --features {out} --format csv", "train.csv"),
    "failed images": ("features --dataset_name {images} --features {out} --format csv", "train.failed.csv"),
    "manifest": ("features --dataset_name {images} --features {out} --format csv", "train.manifest.json"),
    "suite": ("suite --config {inputs}/suite.yaml --output_dir {out}", "table.md"),
    "suite csv": ("suite --config {inputs}/suite.yaml --output_dir {out}", "table.csv"),
    "suite png": ("suite --config {inputs}/suite.yaml --output_dir {out}", "table.png"),
    "linear": (LINEAR, "model.safetensors"),
    "finetune": ("finetune --dataset_name {labelled} --epochs 1 --output_dir {out}", "config.json"),
    "checkpoint": (LINEAR, "checkpoint.pt"),
}


def argv_of(kind: str, inputs: dict, out: Path) -> list[str]:
    line = f"{COMMANDS[kind][0]} --model {{model}}"
    return [word.format(**inputs, out=out) for word in line.split()]


def refusal(*argv) -> str:
    """What a command says that ends with exit code 2 and one line."""
    finished = command(*argv, module="evaluation")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    return finished.stderr


def succeed(*argv) -> None:
    finished = command(*argv, module="evaluation")
    assert finished.returncode == 0, finished.stderr


def place_foreign_file(kind: str, out: Path) -> Path:
    path = out / COMMANDS[kind][1]
    path.parent.mkdir(parents=True)
    path.write_bytes(FOREIGN)
    return path


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", COMMANDS)
def test_foreign_file_survives(kind, inputs, tmp_path):
    path = place_foreign_file(kind, tmp_path / "out")
    message = refusal(*argv_of(kind, inputs, tmp_path / "out"))
    assert str(path) in message and ("--overwrite" in message or "Delete" in message)
    assert path.read_bytes() == FOREIGN and files_in(tmp_path) == {path}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_own_file_is_replaced(kind, inputs, tmp_path):
    path, argv = place_foreign_file(kind, tmp_path / "out"), argv_of(kind, inputs, tmp_path / "out")
    succeed(*argv, "--overwrite")
    assert path.read_bytes() != FOREIGN
    written, first = files_in(tmp_path), path.stat().st_mtime_ns
    succeed(*argv)
    assert files_in(tmp_path) == written and not list(tmp_path.rglob(".*.incomplete"))
    is_complete = "features" in kind or kind in ("failed images", "manifest", "checkpoint")
    assert is_complete or path.stat().st_mtime_ns > first


def test_report_of_another_command_survives(inputs, tmp_path):
    argv = argv_of("report", inputs, tmp_path)
    (tmp_path / "r.json").write_text('[{"protocol": "linear"}]')
    assert "r.json exists and is not from dino-eval knn" in refusal(*argv)
    (tmp_path / "r.json").write_text('[{"protocol": "knn"}]')
    succeed(*argv)
    assert json.loads((tmp_path / "r.json").read_text())[0]["values"]


def test_failed_write_leaves_the_old_file(inputs, tmp_path):
    script = (
        "from matplotlib.figure import Figure\n"
        "def fail(self, path, **options):\n"
        "    open(path, 'w').write('half')\n"
        "    raise OSError(28, 'No space left on device')\n"
        "Figure.savefig = fail\n"
        "from evaluation.__main__ import main\n"
        "main()\n"
    )
    path = place_foreign_file("sheet", tmp_path / "out")
    finished = scripted(script, tmp_path, *argv_of("sheet", inputs, tmp_path / "out"), "--overwrite")
    assert finished.returncode == 2 and "No space left on device" in finished.stderr
    assert path.read_bytes() == FOREIGN and list(path.parent.iterdir()) == [path]


def test_replacing_is_atomic(tmp_path):
    (tmp_path / "a").write_text("old")
    for context, name in ((replacing(tmp_path / "a"), ""), (filling(tmp_path), "a")):
        with pytest.raises(RuntimeError), context as temporary:
            (temporary / name).write_text("half")
            raise RuntimeError
        assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "new"


def test_links_are_followed(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    link, target = tmp_path / "out/a.png", tmp_path / "target.png"
    link.symlink_to(target)
    argv = argv_of("sheet", inputs, tmp_path / "out")
    assert "a.png exists and is not from" in refusal(*argv) and not target.exists()
    target.write_bytes(FOREIGN)
    assert "a.png exists and is not from" in refusal(*argv) and target.read_bytes() == FOREIGN
    succeed(*argv, "--overwrite")
    succeed(*argv)
    assert link.is_symlink() and is_from(target, "attention")


@pytest.mark.parametrize("kind", ["sheet", "figures", "features", "embedding"])
def test_output_within_the_images_is_refused(kind, inputs, flat_folder, tmp_path):
    shutil.copytree(flat_folder, tmp_path / "images")
    before = files_in(tmp_path)
    argv = argv_of(kind, inputs | {"images": tmp_path / "images"}, tmp_path / "images/out")
    argv = [word.replace("images/0.png", "images") for word in argv]
    message = refusal(*argv, "--overwrite")
    assert "would become a part of the input" in message and files_in(tmp_path) == before


def test_report_may_lie_beside_the_images(inputs, parquet_folder, tmp_path):
    shutil.copytree(parquet_folder, tmp_path / "images")
    argv = argv_of("report", inputs | {"labelled": tmp_path / "images"}, tmp_path / "images")
    succeed(*argv)
    succeed(*argv)
    shard = tmp_path / "images/test-00000-of-00001.parquet"
    argv = [str(shard) if word.endswith(("images", "r.json")) else word for word in argv]
    content = shard.read_bytes()
    assert "cannot be its own output" in refusal(*argv, "--overwrite") and shard.read_bytes() == content


def test_output_that_is_a_folder_is_refused(inputs, tmp_path):
    for name, problem in (("r.json", "r.json is a folder or device"), ("a.png", "a.png is a folder or device")):
        (tmp_path / name).mkdir()
        kind = "report" if name == "r.json" else "sheet"
        assert problem in refusal(*argv_of(kind, inputs, tmp_path), "--overwrite")
    (tmp_path / "file").write_text("text")
    message = refusal(*argv_of("report", inputs, tmp_path / "file"))
    assert "file is not a folder that can be written" in message


@pytest.mark.parametrize(
    "protocol", ["knn", "few_shot", "logistic", "clustering", "retrieval", "linear", "finetune", "embedding"]
)
@pytest.mark.parametrize("features", [False, True])
def test_missing_dataset_name_gives_one_line_error(protocol, features, model, tmp_path, capsys):
    argv = [protocol, "--model", model, *(["--features", tmp_path / "f"] if features else [])]
    if protocol == "finetune" and features:
        return
    assert "--dataset_name" in answer(evaluate_from_command_line, argv, capsys)
    assert "--dataset_name" in answer(evaluate_from_command_line, [*argv, "--eval_split", "test"], capsys)


def misshape(path: Path) -> None:
    state = load_file(path)
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    save_file(state | {name: torch.zeros(3, 3)}, path, {"format": "pt"})


def pickled(path: Path) -> None:
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(b"garbage" * 100)


def with_field(**fields):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), "model.safetensors is damaged: "),
        ("model.safetensors", lambda path: path.write_bytes(b"x" * 5000), "model.safetensors is damaged: "),
        ("model.safetensors", lambda path: path.write_bytes(b"\xff" * 7 + b"{}"), "model.safetensors is damaged: "),
        ("model.safetensors", Path.unlink, "model.safetensors is missing."),
        ("model.safetensors", pickled, "pytorch_model.bin is not a PyTorch file of weights."),
        ("config.json", lambda path: path.write_text("{nope"), "config.json is not a JSON object."),
        ("config.json", lambda path: path.write_text("[1]"), "config.json is not a JSON object."),
        ("config.json", lambda path: path.write_bytes(b"\xff\xfe"), "config.json is not a JSON object."),
        ("config.json", Path.unlink, "config.json is missing."),
        ("config.json", with_field(hidden_size=999999999), "asks for more memory than there is."),
        ("config.json", with_field(model_type="nope"), "config.json cannot be used: "),
        ("preprocessor_config.json", Path.unlink, "preprocessor_config.json is missing."),
        ("preprocessor_config.json", lambda path: path.write_text("{"), "preprocessor_config.json is not a JSON"),
        ("preprocessor_config.json", with_field(image_mean="x"), "preprocessor_config.json cannot be used: "),
        ("preprocessor_config.json", with_field(size=[]), "preprocessor_config.json cannot be used: "),
    ],
)
def test_damaged_model_gives_one_line_error(name, damage, message, model, parquet_folder, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    damage(tmp_path / "model" / name)
    argv = ["knn", "--model", tmp_path / "model", "--dataset_name", parquet_folder]
    found = answer(evaluate_from_command_line, argv, capsys)
    assert f"{tmp_path / 'model'}/" in found and message in found and found.endswith(COPY_AGAIN)


def test_misshapen_weights_give_one_line_error(model, parquet_folder, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    misshape(tmp_path / "model/model.safetensors")
    message = refusal("knn", "--model", tmp_path / "model", "--dataset_name", parquet_folder)
    assert "has the shape (3, 3), and config.json asks for (" in message


@pytest.mark.slow
def test_absurd_size_without_weights_gives_one_line_error(model, parquet_folder, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    with_field(hidden_size=999999999)(tmp_path / "model/config.json")
    argv = ["knn", "--model", f"untrained:{tmp_path / 'model'}", "--dataset_name", parquet_folder]
    assert "asks for more memory than there is." in answer(evaluate_from_command_line, argv, capsys)


@pytest.fixture(scope="module")
def kept(model, parquet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    argv = ["features", "--model", model, "--dataset_name", parquet_folder, "--features", folder]
    evaluate_from_command_line(list(map(str, argv)))
    return folder


def with_manifest(**fields):
    """Return a function that changes the manifest of a Parquet file; a field that becomes None is left out."""

    def change(path: Path) -> None:
        table = pyarrow.parquet.read_table(path)
        manifest = json.loads(table.schema.metadata[b"dino_hf"]) | fields
        manifest = {name: value for name, value in manifest.items() if value is not None}
        pyarrow.parquet.write_table(table.replace_schema_metadata({"dino_hf": json.dumps(manifest)}), path)

    return change


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "garbage": lambda path: path.write_bytes(b"x" * 99),
    "another program's": lambda path: pandas.DataFrame({"label": [1, 2]}).to_parquet(path),
    "a bit": flip_a_bit,
    "without a field": with_manifest(tokens=None),
    "with other rows": with_manifest(num_images=7),
    "no manifest": lambda path: pyarrow.parquet.write_table(
        pyarrow.parquet.read_table(path).replace_schema_metadata({"dino_hf": "["}), path
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_features_give_one_line_error(damage, kept, model, parquet_folder, tmp_path, capsys):
    folder = tmp_path / "kept"
    shutil.copytree(kept, folder)
    DAMAGES[damage](folder / "train.parquet")
    argv = ["knn", "--k", 1, "--features", folder]
    computed = [*argv, "--model", model, "--dataset_name", parquet_folder]
    message = answer(evaluate_from_command_line, argv, capsys)
    if damage != "another program's":  # else there is no split to learn from, only one to evaluate on
        assert str(folder / "train.parquet") in message and "Delete " in message
    message = answer(evaluate_from_command_line, computed, capsys)
    assert str(folder / "train.parquet") in message and ("Delete " in message or "--overwrite" in message)
    (folder / "train.parquet").unlink()  # the remedy
    assert f"there are no features in {folder / 'train.parquet'}" in answer(evaluate_from_command_line, argv, capsys)
    evaluate_from_command_line(list(map(str, computed)))
    evaluate_from_command_line(list(map(str, argv)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_give_one_line_error(damage, model, flat_folder, tmp_path, monkeypatch, capsys):
    argv = ["features", "--model", model, "--dataset_name", flat_folder, "--features", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(features, "_remove_parts", lambda path: None)
        evaluate_from_command_line(list(map(str, argv)))
    expected = pandas.read_parquet(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train.parts/notes.txt").write_text("mine")
    part = tmp_path / "train.parts/part-00000.parquet"
    DAMAGES[damage](part)
    message = answer(evaluate_from_command_line, argv, capsys)
    assert str(part) in message and ("Delete " in message or "--overwrite" in message) and part.exists()
    if damage == "a bit":  # which is noticed when the parts are joined
        part.unlink()
    evaluate_from_command_line([*map(str, argv), "--overwrite"])
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "train.parquet"), expected)
    assert files_in(tmp_path) == {tmp_path / "train.parquet", tmp_path / "train.parts/notes.txt"}


def test_other_features_are_replaced_with_overwrite(kept, model, parquet_folder, tmp_path, capsys):
    shutil.copytree(kept, tmp_path / "kept")
    argv = ["knn", "--k", 1, "--features", tmp_path / "kept", "--dataset_name", parquet_folder]
    argv += ["--model", f"untrained:{model}"]
    assert "has features of another model" in answer(evaluate_from_command_line, argv, capsys)
    evaluate_from_command_line([*map(str, argv), "--overwrite"])
    before, after = (pandas.read_parquet(folder / "train.parquet") for folder in (kept, tmp_path / "kept"))
    assert before["name"].equals(after["name"]) and not np.allclose(before["features"][0], after["features"][0])
    evaluate_from_command_line(list(map(str, argv)))


@pytest.mark.slow
def test_run_of_other_settings_is_replaced_with_overwrite(inputs, tmp_path, capsys):
    argv = argv_of("linear", inputs, tmp_path / "run")
    evaluate_from_command_line(argv)
    other = [*argv, "--seed", "1"]
    assert "holds a run with another seed" in answer(evaluate_from_command_line, other, capsys)
    before = (tmp_path / "run/model.safetensors").read_bytes()
    evaluate_from_command_line([*other, "--overwrite"])
    assert (tmp_path / "run/model.safetensors").read_bytes() != before
    evaluate_from_command_line(other)


def test_damaged_report_of_a_suite_is_named(inputs, tmp_path, capsys):
    argv = argv_of("suite", inputs, tmp_path / "out")
    evaluate_from_command_line(argv)
    [report] = (tmp_path / "out/reports").iterdir()
    report.write_text("{}")
    message = answer(evaluate_from_command_line, argv, capsys)
    assert f"{report} is damaged. Delete it and run the command again" in message
    report.unlink()
    evaluate_from_command_line(argv)


def test_misshapen_config_of_a_suite_gives_one_line_error(inputs, tmp_path, capsys):
    path = tmp_path / "suite.yaml"
    for config in ({"data": {"a": "b"}, "measure": "knn"}, {"data": [], "measure": []}):
        path.write_text(yaml.safe_dump(config))
        argv = ["suite", "--config", path, "--model", "x", "--output_dir", tmp_path / "out"]
        message = answer(evaluate_from_command_line, argv, capsys)
        assert "must have a mapping in `data` and a list of mappings in `measure`" in message


NAMES = {
    "knn_20_top1": "k-NN, k = 20, top-1",
    "knn_100_T0.07_top5": "k-NN, k = 100, temperature 0.07, top-5",
    "linear_lr1e-06_top1": "linear classifier, learning rate 1e-06, top-1",
    "held_out_lr0.001_top1": "held-out images, learning rate 0.001, top-1",
    "finetune_top1": "fine-tuning, top-1",
    "logistic_top1": "logistic regression, top-1",
    "logistic_1_shot": "logistic, 1 label a class",
    "class_mean_10_percent_std": "class mean, 10 % of labels, std of draws",
    "kmeans_ari": "k-means, adjusted Rand index",
    "R@10": "recall at 10",
    "hard_mP@5": "hard, mean precision at 5",
    "jpeg/75_mAP": "jpeg/75, mAP",
    "jf_mean": "J and F, mean",
    "f_decay": "F, decay",
    "jaccard_without_void": "Jaccard index, without void",
}


def test_tables_speak_english():
    assert {name: in_words(name) for name in NAMES} == NAMES


@pytest.mark.parametrize("num_models", [1, 2, 5])
def test_table_fits_a_terminal_of_80_columns(num_models):
    models = ["output/quickstart", "raw_pixels:" + "a/long/folder/" * 9, "untrained:facebook/dino-vits16", "b", "c"]
    values = dict.fromkeys(NAMES, 46.25)
    intervals = {name: (41.5, 100.0) for name in NAMES}
    reports = [Report("knn", {"name": f"{name}"}, {}, values, intervals, {}, {}, "") for name in models[:num_models]]
    lines = format_table(reports).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("46.25 [41.50, 100.00]") for line in lines) == num_models * len(NAMES)
    heads = " ".join(line for line in lines if "in percent" in line)
    assert all(name in heads for name in models[:num_models] if len(name) < 40) and ("…" in heads) == (num_models > 1)
