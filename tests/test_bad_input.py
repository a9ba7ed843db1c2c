"""Every mistake: one line on stderr that says what was given and what is allowed, and exit code 2."""

import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import save_file

from evaluation.__main__ import evaluate_from_command_line
from modeling_dino import DINOConfig, DINOModel
from modeling_dino.command_line import run
from modeling_dino.convert_dino_checkpoint import convert_from_command_line
from training.__main__ import train_from_command_line
from training.arguments import parse_arguments
from training.networks import load_config

from .commands import command
from .test_training import RECIPE


def answer(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        run("dino", main, list(map(str, argv)))
    lines = capsys.readouterr().err.strip().splitlines()
    stderr = "\n".join(line for line in lines if "image files found" not in line)  # the account of a folder
    assert stopped.value.code == 2 and len(stderr.splitlines()) == 1, stderr
    return stderr


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | changes))
        return "--config", tmp_path / "r.yaml"

    return write


@pytest.fixture
def out(tmp_path):
    return "--output_dir", tmp_path / "out"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "there is no option --lerning_rate, did you mean --"),
        (["--warmup_epoch", "1"], "there is no option --warmup_epoch, did you mean --warmup_epochs?"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (
            ["--config", "nothing.yaml"],
            "no file nothing.yaml; those that come with the package are cifar10_cpu, ",
        ),
        (["--global_crops_scale", "0.9", "0.1"], "0 < lowest <= highest <= 1, got [0.9, 0.1]"),
        (["--blur_probability", "0.5"], "blur_probability must be 3 numbers"),
        (["--flip_probability", "1.5"], "flip_probability must be between 0 and 1, got 1.5"),
        (
            ["--dataset_name", "x", "--output_dir", "y", "--num_train_epochs", "0"],
            "num_train_epochs must be at least 1, got 0",
        ),
        (["--output_dir", "x"], "dataset_name must be given"),
        (["--max_steps", "9" * 19], "argument --max_steps: must be below 2**63, got 999999"),
        (["--seed", "x" * 5000], f"argument --seed: invalid int value: '{'x' * 199}...xxx"),
        (["--dataset_name", "x", "--output_dir", "y", "--num_workers", "9999"], "num_workers must be at most 1024"),
        (["--dataset_name", "x", "--output_dir", "y", "--eval_crop_pct", "0.01"], "must be between 0.1 and 1, got"),
    ],
)
def test_flags(argv, message, capsys):
    assert message in answer(train_from_command_line, argv, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "there is no setting learning_rat, did you mean"),
        ({"num_train_epochs": "many"}, "invalid int value: 'many'"),
        (
            {"config_overrides": {"hiden_size": 3}},
            "the model's config has no field hiden_size, did you mean hidden_size?",
        ),
        ({"config_overrides": {"hidden_size": "wide"}}, "Field 'hidden_size' expected int, got str"),
        ({"seed": [1, 2]}, "seed must be one value, got [1, 2]"),
        ({"image_mean": []}, "--image-mean: expected at least one argument"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate must be at least 0 and finite, got nan"),
        ({"config_overrides": {"hidden_act": "foo"}}, "hidden_act must be one of "),
        ({"config_overrides": {"mlp_ratio": 0}}, "mlp_ratio must be above 0, got 0"),
        ({"config_overrides": ["out_dim=[1"]}, "Field 'out_dim' expected int, got str"),
        (
            {"config_overrides": {"num_hidden_layers": 10**9}},
            "num_hidden_layers must be at most 10000, got 1000000000",
        ),
        ({"config_overrides": {"head_num_layers": 10**9}}, "head_num_layers must be at most 10000, got 1000000000"),
        ({"config_overrides": ["out_dim"]}, "config_overrides must be written as field=value, got out_dim"),
        ({"local_crop_size": 12}, "local_crop_size must be a multiple of the patch size 16, got 12"),
        (
            {"model_config": "vit_huge"},
            "there is no file vit_huge. Give timm/NAME for a network of timm, or one of convnext_tiny, ",
        ),
    ],
)
def test_recipe(changes, message, recipe, parquet_folder, out, capsys):
    if "config_overrides" not in changes:
        changes = changes | {"config_overrides": {}}
    argv = (*recipe(**changes), "--dataset_name", parquet_folder, *out)
    assert message in answer(train_from_command_line, argv, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--per_device_train_batch_size", "64"],
            "there are 40 images, fewer than one batch of 64 = 1 process x 64 images. Give",
        ),
        (
            ["--warmup_epochs", "3"],
            "warmup_epochs must be at most 2, got 3: the training has only 10 steps, 5 an epoch.",
        ),
        (["--train_split", "validation"], "has no split validation; its splits are train, test"),
        (["--image_column", "photo"], "there is no column photo (--image_column); the columns are picture, kind"),
        (["--image_column", "kind"], "column kind holds no images"),
        (["--resume_from_checkpoint", "latest", "--resume", "must"], "there is no checkpoint in"),
        (["--eval_steps", "5", "--eval_split", "val"], "has no split val; its splits are train, test"),
        (["--image_mean", "0.5", "0.5"], "image_mean must have one value or one for each of the 3 channels"),
    ],
)
def test_run(flags, message, recipe, parquet_folder, out, capsys):
    argv = (*recipe(), "--dataset_name", parquet_folder, *out, *flags)
    assert message in answer(train_from_command_line, argv, capsys)


def test_model_config_that_is_none(recipe, parquet_folder, out, tmp_path, capsys):
    for content, message in (("[1, 2]", "must map names of the config's fields"), ("{", "model.json is not JSON")):
        (tmp_path / "model.json").write_text(content)
        argv = (*recipe(model_config=str(tmp_path / "model.json")), "--dataset_name", parquet_folder, *out)
        assert message in answer(train_from_command_line, argv, capsys)


def test_flags_add_to_the_overrides_of_a_recipe(recipe):
    args = parse_arguments([*map(str, recipe()), "--config_overrides", "out_dim=8", "layer_norm_eps=1e-5",
                            "--dataset_name", "x", "--output_dir", "y"])  # fmt: skip
    config = load_config(args)
    assert (config.out_dim, config.layer_norm_eps, config.hidden_size) == (8, 1e-5, 24)


def test_data_of_which_nothing_can_be_decoded_is_no_start(recipe, flat_folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for path in flat_folder.iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes()[:100])
    for num_workers in (0, 1):
        argv = (
            *recipe(),
            "--dataset_name",
            tmp_path / "images",
            "--output_dir",
            tmp_path / "out",
            "--num_workers",
            num_workers,
        )
        message = answer(train_from_command_line, argv, capsys)
        assert "none of the 8 images of a batch can be decoded; the first: image " in message
        assert ".png cannot be decoded: " in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "must be no, bf16 or fp16, got fp8"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16 needs a GPU; on CPU there is bf16"),
    ],
)
def test_settings_of_the_launcher_that_training_would_not_follow(
    variable, value, message, recipe, parquet_folder, out
):
    finished = command(*recipe(), "--dataset_name", parquet_folder, *out, **{variable: value})
    assert finished.returncode == 2 and message in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_checkpoint_of_another_network(recipe, parquet_folder, out, capsys):
    argv = ("--dataset_name", parquet_folder, *out)
    assert command(*recipe(max_steps=1), *argv).returncode == 0
    changed = (
        "--resume_from_checkpoint",
        "latest",
        "--allow_changed",
        "max_steps",
        "--config_overrides",
        "out_dim=16",
    )
    assert "is another network: it has out_dim 32, not 16" in answer(
        train_from_command_line, (*recipe(), *argv, *changed), capsys
    )


def test_data(recipe, flat_folder, tmp_path, out, capsys):
    def ask(dataset_name, *flags):
        return answer(train_from_command_line, (*recipe(), "--dataset_name", dataset_name, *out, *flags), capsys)

    assert "there is no file or folder" in ask(tmp_path / "nothing")
    for name in ("nobody/nothing", "user/imagenet-v2.0"):
        assert f"{name} is no local path, and the Hub could not be asked" in ask(name)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.doc").write_text("no image")
    message = ask(tmp_path / "texts")
    assert "no images in" in message and "looked in all folders" in message and "found 1 files (1 .doc)" in message
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(flat_folder / "0.png", "0.png")
    assert "the length of this stream is unknown: give --num_examples" in ask(tmp_path / "shard.tar", "--streaming")
    assert "--eval_steps needs labels" in ask(flat_folder, "--eval_steps", "1", "--eval_split", "train")


def test_damaged_data_is_named(recipe, flat_folder, tmp_path, out, capsys):
    Dataset.from_dict({"image": [str(flat_folder / "0.png")] * 8}).cast_column("image", ImageColumn()).save_to_disk(
        tmp_path / "saved"
    )
    capsys.readouterr()  # the progress bar of datasets
    state = json.loads((tmp_path / "saved/state.json").read_text())
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for name, reason in (("_fingerprint", "KeyError: '_fingerprint'"), ("_data_files", "KeyError: '_data_files'")):
        rest = {key: value for key, value in state.items() if key != name}
        (tmp_path / "saved/state.json").write_text(json.dumps(rest))
        argv = (*recipe(), "--dataset_name", tmp_path / "saved", *out)
        assert f"{tmp_path / 'saved'} cannot be read: {reason}" in answer(train_from_command_line, argv, capsys)
    argv = (*recipe(), "--dataset_name", tmp_path / "cut.parquet", *out)
    assert f"{tmp_path / 'cut.parquet'} cannot be read: " in answer(train_from_command_line, argv, capsys)


@pytest.mark.parametrize("content", [{}, {"cls_token": 1}, {"student": [1], "teacher": {}}, {1: torch.zeros(2)}])
def test_checkpoint_without_tensors_is_named(content, tmp_path, capsys):
    torch.save(content, tmp_path / "checkpoint.pth")
    message = answer(convert_from_command_line, (tmp_path / "checkpoint.pth", tmp_path / "out"), capsys)
    assert f"{tmp_path / 'checkpoint.pth'} must hold names and tensors, got " in message


def test_want_of_memory_is_no_surprise(capsys):
    def take(argv):
        raise MemoryError("Unable to allocate 8 TiB")

    assert "out of memory (Unable to allocate 8 TiB). Lower the batch size" in answer(take, (), capsys)


def test_evaluation(parquet_folder, flat_folder, tmp_path, capsys):
    def ask(*argv):
        return answer(evaluate_from_command_line, argv, capsys)

    assert "there is no option --modle, did you mean --model?" in ask("knn", "--modle", "x")
    assert "has no labels" in ask("knn", "--model", "x", "--dataset_name", flat_folder, "--eval_split", "train")
    assert "no_model" in ask("knn", "--model", tmp_path / "no_model", "--dataset_name", parquet_folder)
    assert "k must be at least 1" in ask("knn", "--model", "x", "--dataset_name", "y", "--k", "0")
    batch_size = ("--batch_size", "0")
    assert "batch_size must be at least 1" in ask("knn", "--model", "x", "--dataset_name", "y", *batch_size)


def test_traceback_only_with_debug(parquet_folder, tmp_path):
    argv = ("--dataset_name", tmp_path / "nothing", "--output_dir", tmp_path / "out")
    plain, debug = (command(*argv, *more, launcher=("-m",)) for more in ([], ["--debug"]))
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1
    assert plain.stdout.startswith("Device: ") and plain.stdout.count("\n") == 1
    assert plain.stderr.startswith("dino-train: error: there is no file or folder")
    assert debug.returncode != 0 and "Traceback" in debug.stderr


def test_launcher_that_accelerate_does_not_see(recipe, parquet_folder, out):
    """torchrun without ACCELERATE_USE_CPU would train two separate models into one folder."""
    argv = (*recipe(), "--dataset_name", parquet_folder, *out)
    finished = command(*argv, WORLD_SIZE="2", RANK="0", LOCAL_RANK="-1", ACCELERATE_USE_CPU="false")
    assert finished.returncode == 2 and "the launcher started 2 processes, Accelerate sees 1" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "none", "tensorboard"], "report_to: none stands alone, got none tensorboard"),
        (["--init_from", "/nowhere/at/all"], "init_from: there is no folder /nowhere/at/all"),
        (["--koleo_weight", "inf"], "koleo_weight must be at least 0 and finite, got inf"),
    ],
)
def test_newer_settings(recipe, parquet_folder, out, flags, message):
    finished = command(*recipe(), "--dataset_name", parquet_folder, *out, *flags)
    assert finished.returncode == 2 and message in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_output_dir_that_is_a_file(recipe, parquet_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    finished = command(*recipe(), "--dataset_name", parquet_folder, "--output_dir", tmp_path / "file")
    assert finished.returncode == 2 and "output_dir must be a folder" in finished.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_file_name_that_is_not_utf8_is_named(recipe, flat_folder, tmp_path, out):
    folder = shutil.copytree(flat_folder, tmp_path / "images")
    (folder / "0.png").rename(os.fsdecode(bytes(folder) + b"/gr\xfcn\x1b[31m.png"))
    finished = command(*recipe(), "--dataset_name", folder, *out)
    assert finished.returncode == 0 and finished.stderr.count("\n") == 1, finished.stderr
    assert r"skipped 1 image file: names that are not UTF-8, such as gr\udcfcn\x1b[31m.png" in finished.stderr


def test_odd_names_of_files_that_are_not_read_do_not_matter(flat_folder, tmp_path):
    folder = shutil.copytree(flat_folder, tmp_path / "images")
    (folder / ".hidden").mkdir()
    for name in (b"gr\xfcn.txt", b".hidden/gr\xfcn.png"):
        (folder / os.fsdecode(name)).write_text("mine")
    assert "12 images, 0 of them would be skipped" in command(folder, module="training.check").stdout


@pytest.mark.parametrize("flags", [(), ("--streaming", "--num_examples", 8)])
def test_member_name_that_is_not_utf8_is_named(recipe, flat_folder, tmp_path, out, flags):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(8):
            tar.add(flat_folder / f"{i}.png", os.fsdecode(b"gr\xfcn.png") if i == 7 else f"{i}.png")
    finished = command(*recipe(), "--dataset_name", tmp_path / "shard.tar", *out, *flags)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    assert r"the name gr\udcfcn.png is not UTF-8. Rename it." in finished.stderr


def test_names_that_a_terminal_would_obey_are_quoted(flat_folder, tmp_path):
    folder = shutil.copytree(flat_folder, tmp_path / "images")
    (folder / "bad\n\x1b[2J.png").write_text("no image")
    finished = command(folder, module="training.check")
    assert r"image " + str(folder) + r"/bad\n\x1b[2J.png cannot be decoded" in finished.stdout
    assert "\x1b" not in finished.stdout + finished.stderr


WRONG_WEIGHTS = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "with a header of petabytes": lambda content: (2**50).to_bytes(8, "little") + content[8:],
    "of other shapes": None,
}


@pytest.mark.parametrize("kind", WRONG_WEIGHTS)
def test_weights_to_start_from_that_are_damaged_are_named(recipe, parquet_folder, out, tmp_path, kind):
    config = DINOConfig(**RECIPE["config_overrides"])
    DINOModel(config).save_pretrained(tmp_path / "weights")
    file = tmp_path / "weights/model.safetensors"
    if damage := WRONG_WEIGHTS[kind]:
        file.write_bytes(damage(file.read_bytes()))
    else:
        wider = DINOModel(DINOConfig(**RECIPE["config_overrides"] | {"hidden_size": 48}))
        save_file(wider.state_dict(), file, {"format": "pt"})
    finished = command(*recipe(), "--dataset_name", parquet_folder, *out, "--init_from", tmp_path / "weights")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    assert str(tmp_path / "weights") in finished.stderr and "again" in finished.stderr


@pytest.mark.parametrize("content", [b"garbage", pickle.dumps({"a": 1}), pickle.dumps(os.getcwd)])
def test_pickled_weights_that_are_damaged_are_named(recipe, parquet_folder, out, tmp_path, content):
    DINOModel(DINOConfig(**RECIPE["config_overrides"])).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights/model.safetensors").unlink()
    (tmp_path / "weights/pytorch_model.bin").write_bytes(content)
    finished = command(*recipe(), "--dataset_name", parquet_folder, *out, "--init_from", tmp_path / "weights")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    assert f"{tmp_path / 'weights/pytorch_model.bin'} is not a PyTorch file of weights" in finished.stderr


@pytest.mark.parametrize(
    "override",
    ["hidden_size=1000000000", "hidden_size=100000", "out_dim=10000000000",
     "head_hidden_dim=1000000", "mlp_ratio=1e400", "hidden_size=1" + "0" * 400, "image_size=1600000000"],
)  # fmt: skip
def test_size_that_no_memory_holds_is_said(recipe, parquet_folder, out, override):
    """Also where each matrix of the network would fit, and only all of them do not."""
    finished = command(*recipe(), "--dataset_name", parquet_folder, *out, "--config_overrides", override)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    assert "ask for more memory than there is" in finished.stderr


def test_large_images_are_warned_of_before_the_first_step(recipe, tmp_path, out):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (11000, 11000)).save(tmp_path / "images/0.png", compress_level=1)
    for i in range(1, 8):
        os.link(tmp_path / "images/0.png", tmp_path / f"images/{i}.png")
    argv = (*recipe(), "--dataset_name", tmp_path / "images", *out, "--dry_run", "--num_workers", 7)
    finished = command(*argv)
    assert "images of 11000 x 11000 pixels take about 1.1 GiB in each of 7 workers, 7.9 GiB in all" in finished.stderr
    assert "lower --num_workers" in finished.stderr


@pytest.mark.parametrize(("first", "streaming"), [(0, False), (0, True), (6, False), (6, True)])
def test_tar_that_holds_a_pickle_is_refused(recipe, tmp_path, out, first, streaming):
    """Also one that only later samples have, or that torch.load would read; a stream then does not name it."""
    pickled = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, pickled)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(8):
            image = io.BytesIO()
            Image.new("RGB", (24, 24)).save(image, "PNG")
            members = {f"{i}.png": image.getvalue()} | ({f"{i}.pth": pickled.getvalue()} if i >= first else {})
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    flags = ("--streaming", "--num_examples", 8) if streaming else ()
    finished = command(*recipe(), "--dataset_name", tmp_path / "shard.tar", *out, *flags)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1, finished.stderr
    is_late = streaming and first
    assert ("a pickled member (.pth)" if is_late else f"shard.tar holds pickled members, such as {first}.pth") in (
        finished.stderr
    )
