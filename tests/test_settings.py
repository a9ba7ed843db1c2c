"""Settings mean what they say: their sizes follow one another, and what other programs call them is answered."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file

from evaluation.__main__ import evaluate_from_command_line
from evaluation.arguments import EvaluationParser
from evaluation.models import load_model, mean_and_std, to_pixel_values
from evaluation.protocols import add_protocols
from modeling_dino import DINOConfig, DINOModel
from modeling_dino.command_line import CONFIGS
from training.__main__ import train_from_command_line
from training.arguments import SYNONYMS, TrainingArguments, parse_arguments
from training.networks import load_config

from .commands import command, trained
from .test_bad_input import answer
from .test_training import RECIPE, metrics, recipe  # noqa: F401


DATA = ["--dataset_name", "x", "--output_dir", "y"]


def config_of(*flags) -> DINOConfig:
    return load_config(parse_arguments([*map(str, flags), *DATA]))


# ----------------------------------------------------------------------------------------------------- image_size


@pytest.fixture(scope="module")
def unsized(tmp_path_factory):
    """The recipe without an image_size."""
    fields = {name: value for name, value in RECIPE["config_overrides"].items() if name != "image_size"}
    path = tmp_path_factory.mktemp("unsized") / "unsized.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"config_overrides": fields}))
    return path


MISMATCH = "image_size is {} and global_crop_size {}: "


@pytest.fixture(scope="module")
def followed(unsized, parquet_folder, tmp_path_factory):
    """A run whose image_size nobody named; and one, as earlier versions had it, whose config has 24."""
    folder = tmp_path_factory.mktemp("followed")
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--max_steps", 4)
    finished = command(*argv, "--output_dir", folder / "run")
    assert finished.returncode == 0 and "image_size" not in finished.stderr, finished.stderr
    finished = command(*argv, "--output_dir", folder / "earlier", "--config_overrides", "image_size=24")
    assert finished.returncode == 0, finished.stderr
    assert MISMATCH.format(24, 16) in finished.stderr and "Leave out image_size" in finished.stderr
    return folder


def processed_size(folder) -> tuple[int, int]:
    crop = json.loads((folder / "preprocessor_config.json").read_text())["crop_size"]
    return crop["height"], crop["width"]


def test_image_size_follows_the_global_crops(followed):
    assert processed_size(followed / "run") == (16, 16)
    assert json.loads((followed / "run/config.json").read_text())["image_size"] == 16
    assert processed_size(followed / "earlier") == (24, 24)
    assert config_of("--global_crop_size", 96).image_size == 96
    assert config_of("--global_crop_size", 96, "--config_overrides", "image_size=224").image_size == 224
    assert config_of("--global_crop_size", 33, "--model_config", "resnet50").image_size == 33


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("models/*.json")), ids=lambda path: path.stem)
def test_models_of_ours_leave_the_size_to_the_crops(path):
    assert "image_size" not in json.loads(path.read_text())


def test_image_size_of_a_named_json_counts(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"image_size": 64}))
    assert config_of("--model_config", tmp_path / "mine.json", "--global_crop_size", 32).image_size == 64


def test_mismatch_is_warned_of_in_a_dry_run(unsized, parquet_folder, tmp_path):
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    finished = command(*argv, "--config_overrides", "image_size=[24,16]")
    assert finished.returncode == 0 and MISMATCH.format("[24, 16]", 16) in finished.stderr, finished.stderr
    assert finished.stderr.count("image_size is") == 1


def test_crops_that_patches_do_not_divide_are_named(unsized, parquet_folder, tmp_path, capsys):
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    message = answer(train_from_command_line, (*argv, "--global_crop_size", 20), capsys)
    assert "global_crop_size must be a multiple of the patch size 8, got 20" in message
    message = answer(train_from_command_line, (*argv, "--config_overrides", "image_size=20"), capsys)
    assert "image_size must be a multiple of patch_size, got 20 and 8" in message


def test_resumed_run_keeps_the_size_of_its_checkpoint(followed, unsized, parquet_folder, tmp_path):
    """Of an earlier version, whose image_size did not follow the crops, too: it is resumed by the same command."""
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--max_steps", 4, "--output_dir", tmp_path)
    finished = command(*argv, "--resume_from_checkpoint", followed / "earlier/checkpoints/step_0000003")
    assert finished.returncode == 0, finished.stderr
    assert MISMATCH.format(24, 16) in finished.stderr and "Leave out" not in finished.stderr
    assert json.loads((tmp_path / "config.json").read_text())["image_size"] == 24
    assert [line["step"] for line in metrics(tmp_path)] == [4]


def test_rectangular_run_publishes_what_is_evaluated(unsized, parquet_folder, tmp_path):
    """k-NN sees nearly all of an image of the same aspect ratio; so does a stock network that is made of it."""
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--max_steps", 1, "--eval_crop_pct", 0.8)
    finished = command(*argv, "--output_dir", tmp_path / "run", "--config_overrides", "image_size=[24,16]")
    assert finished.returncode == 0 and MISMATCH.format("[24, 16]", 16) in finished.stderr, finished.stderr
    arguments = (tmp_path / "run", tmp_path / "vit", "--to", "vit")
    assert "stretches images" in trained(*arguments, module="modeling_dino.convert_dino_checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.array(image.resize((20, 30), Image.Resampling.BICUBIC))[3:27, 2:18].transpose(2, 0, 1) / 255
    for name in ("run", "vit"):
        _, processor = load_model(str(tmp_path / name))
        [found] = to_pixel_values(processor, [pixels.transpose(2, 0, 1)])
        mean, std = mean_and_std(processor, 3)
        np.testing.assert_allclose(found * std + mean, expected, rtol=0, atol=1e-6)
        assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], found)
    _, scaling = load_model(str(tmp_path / "run"), value_range=("0", "255"))
    [found] = to_pixel_values(scaling, [pixels.transpose(2, 0, 1)])
    np.testing.assert_allclose(found * std + mean, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("start", ["--resume_from_checkpoint", "--init_from"])
def test_other_networks_keep_the_size_of_their_weights(start, parquet_folder, tmp_path):
    """As of an earlier version, whose configs had 224 whatever the crops; only the image processor has the size."""
    network = {"backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}}
    (tmp_path / "small.json").write_text(json.dumps(network | {"out_dim": 8, "head_hidden_dim": 8}))
    fields = {name: value for name, value in RECIPE.items() if name != "config_overrides"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields | {"model_config": str(tmp_path / "small.json")}))
    argv = ("--config", tmp_path / "r.yaml", "--dataset_name", parquet_folder, "--max_steps", 2, "--save_steps", 1)
    trained(*argv, "--output_dir", tmp_path / "earlier", "--config_overrides", "image_size=224")
    finished = command(*argv, "--output_dir", tmp_path / "run", start, tmp_path / "earlier/checkpoints/step_0000001")
    assert finished.returncode == 0 and MISMATCH.format(224, 16) in finished.stderr, finished.stderr
    assert ("--config_overrides image_size=16 changes it." in finished.stderr) is (start == "--init_from")
    assert json.loads((tmp_path / "run/config.json").read_text()).get("image_size", 224) == 224
    assert processed_size(tmp_path / "run") == (224, 224)


STILL = ("--max_steps", 1, "--base_learning_rate", 0, "--min_learning_rate", 0, "--momentum_teacher", 1)


def test_weights_to_start_from_keep_their_grid(followed, unsized, parquet_folder, tmp_path):
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--output_dir", tmp_path, *STILL)
    finished = command(*argv, "--init_from", followed / "earlier")
    assert finished.returncode == 0, finished.stderr
    assert MISMATCH.format(24, 16) in finished.stderr
    assert "--config_overrides image_size=16 resamples the position embeddings" in finished.stderr
    ours, theirs = (DINOModel.from_pretrained(folder) for folder in (tmp_path, followed / "earlier"))
    assert torch.equal(ours.embeddings.position_embeddings, theirs.embeddings.position_embeddings)


@pytest.mark.parametrize("start", ["earlier", "earlier/checkpoints/step_0000004"])
def test_weights_are_resampled_to_a_size_that_is_named(followed, unsized, parquet_folder, tmp_path, start):
    """At that size, features are what they were; from a backbone, and from both networks with their heads."""
    argv = ("--config", unsized, "--dataset_name", parquet_folder, "--output_dir", tmp_path, *STILL)
    trained(*argv, "--init_from", followed / start, "--config_overrides", "image_size=16")
    ours, theirs = (DINOModel.from_pretrained(folder).eval() for folder in (tmp_path, followed / "earlier"))
    assert ours.embeddings.position_embeddings.shape[1] == 1 + (16 // 8) ** 2
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(pixels).pooler_output, theirs(pixels).pooler_output, rtol=0, atol=1e-6)
    assert processed_size(tmp_path) == (16, 16)


# ------------------------------------------------------------------------------------------------------ 0 is off


def test_zero_switches_evaluation_and_checkpoints_on_the_way_off(recipe, parquet_folder, tmp_path):  # noqa: F811
    """In a recipe, too: its k-NN is on, and off by the flag; and the other way round."""
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(RECIPE | {"eval_steps": 5}))
    (tmp_path / "off.yaml").write_text(yaml.safe_dump(RECIPE | {"eval_steps": 0, "save_steps": 0}))
    argv = ("--dataset_name", parquet_folder, "--eval_split", "test")
    trained("--config", tmp_path / "on.yaml", *argv, "--output_dir", tmp_path / "a", "--eval_steps", 0)
    trained("--config", tmp_path / "off.yaml", *argv, "--output_dir", tmp_path / "b")
    for name, steps in (("a", [3, 6, 9, 10]), ("b", [10])):
        assert not [line for line in metrics(tmp_path / name) if "knn_10_top1" in line]
        assert sorted(int(path.name[5:]) for path in (tmp_path / name / "checkpoints").iterdir()) == steps
    assert parse_arguments(["--config", str(tmp_path / "off.yaml"), *DATA, "--eval_steps", "7"]).eval_steps == 7


@pytest.mark.parametrize("name", ["clip_grad", "num_local_crops", "save_steps", "eval_steps"])
def test_help_says_what_zero_does(name, capsys):
    assert re.search(rf"--{name} .*? 0 (switches|turns|does not|writes)", help_of("training", capsys))


# --------------------------------------------------------------------------------------- names of other programs

# every argument of the reference implementation's main_dino.py and run_with_submitit.py, and the setting to use
MAIN_DINO = {
    "arch": "model_config", "patch_size": "config_overrides patch_size", "out_dim": "config_overrides out_dim",
    "norm_last_layer": "config_overrides norm_last_layer", "momentum_teacher": None,
    "use_bn_in_head": "config_overrides use_bn_in_head", "warmup_teacher_temp": None, "teacher_temp": None,
    "warmup_teacher_temp_epochs": None, "use_fp16": "mixed_precision", "weight_decay": None, "weight_decay_end": None,
    "clip_grad": None, "batch_size_per_gpu": "per_device_train_batch_size", "epochs": "num_train_epochs",
    "freeze_last_layer": "freeze_last_layer_epochs", "lr": "base_learning_rate", "warmup_epochs": None,
    "min_lr": "min_learning_rate", "optimizer": None, "drop_path_rate": "config_overrides drop_path_rate",
    "global_crops_scale": None, "local_crops_number": "num_local_crops", "local_crops_scale": None,
    "data_path": "dataset_name", "output_dir": None, "saveckp_freq": "save_steps", "seed": None, "num_workers": None,
    "dist_url": "num_processes", "local_rank": "num_processes", "ngpus": "num_processes", "nodes": "num_processes",
    "timeout": "configs/slurm/train.sbatch", "partition": "configs/slurm/train.sbatch",
    "use_volta32": "configs/slurm/train.sbatch", "comment": "configs/slurm/train.sbatch",
}  # fmt: skip
# of lightly-train, timm's train.py and scripts of transformers: those that people try first
OTHERS = {
    "learning_rate": "base_learning_rate", "batch_size": "per_device_train_batch_size",
    "batch-size": "per_device_train_batch_size", "img_size": "global_crop_size", "img-size": "global_crop_size",
    "image_size": "global_crop_size", "model": "model_config", "data": "dataset_name", "data-dir": "dataset_name",
    "out": "output_dir", "output": "output_dir", "devices": "num_processes", "num_nodes": "num_processes",
    "precision": "mixed_precision", "amp": "mixed_precision", "fp16": "mixed_precision", "bf16": "mixed_precision",
    "embed_dim": "config_overrides hidden_size", "overwrite": "overwrite_output_dir", "loggers": "report_to",
    "opt": "optimizer", "optim": "optimizer", "workers": "num_workers",
    "grad-accum-steps": "gradient_accumulation_steps",
    "grad-checkpointing": "gradient_checkpointing", "drop-path": "config_overrides drop_path_rate",
    "in-chans": "config_overrides num_channels", "num_train_steps": "max_steps", "max_train_steps": "max_steps",
    "dataloader_num_workers": "num_workers", "max_grad_norm": "clip_grad", "checkpointing_steps": "save_steps",
    "train_dir": "dataset_name", "image_column_name": "image_column", "model_name_or_path": "init_from",
    "pretrained": "init_from", "torchcompile": "dynamo_backend", "crop-pct": "eval_crop_pct", "mean": "image_mean",
    "warmup_steps": "warmup_epochs", "log-interval": "logging_steps", "checkpoint-hist": "save_total_limit",
    "seeed": "seed", "global_crop_sizes": "global_crop_size",
}  # fmt: skip


def proposed(message: str) -> set[str]:
    """Settings that an answer names, each of which must exist here or in the launcher."""
    fields = set(re.findall(r"--config_overrides (\w+)=VALUE", message))
    flags = set(re.findall(r"--(\w+)", message)) - {"config_overrides"}
    paths = set(re.findall(r"configs/[\w/.]+\w", message))
    assert fields <= DINOConfig().to_dict().keys() and all((CONFIGS.parent / path).is_file() for path in paths)
    ours = TrainingArguments.__dataclass_fields__.keys()
    launchers = {name[2:] for name in launch_command_parser()._option_string_actions}
    assert all(flag in ours or flag in launchers for flag in flags), flags
    return flags | {f"config_overrides {field}" for field in fields} | paths


@pytest.mark.parametrize("name", [*MAIN_DINO, *OTHERS])
def test_names_of_other_programs_are_answered(name, tmp_path, capsys):
    expected = (MAIN_DINO | OTHERS)[name]
    if expected is None:  # it is ours
        assert name in TrainingArguments.__dataclass_fields__
        return
    message = answer(train_from_command_line, (f"--{name}", "1", *DATA), capsys)
    message = message.partition(f"there is no option --{name}")[2]
    assert expected in proposed(message) and "; there are " not in message, message
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({name: 1}))
    message = answer(train_from_command_line, ("--config", tmp_path / "r.yaml", *DATA), capsys)
    assert expected.removeprefix("config_overrides ") in message.partition(f"there is no setting {name}")[2]


def test_every_synonym_names_something_that_exists_and_no_setting():
    settings = TrainingArguments.__dataclass_fields__.keys()
    for name, meaning in SYNONYMS.items():
        if name not in settings:  # `resume` of lightly-train is a setting of ours, for instance
            assert meaning in settings or proposed(meaning), name


@pytest.mark.parametrize(
    ("given", "ours"),
    [("momentum", "momentum_teacher"), ("ema", "momentum_teacher"), ("center", "centering"), ("solarize_prob", None),
     ("warmup_teacher", "warmup_teacher_temp"), ("seeds", "seed"), ("centre_momentum", "center_momentum")],
)  # fmt: skip
def test_settings_that_begin_as_what_was_given_come_first(given, ours, capsys):
    message = answer(train_from_command_line, (f"--{given}", "0.9", *DATA), capsys)
    assert message.endswith(f"there is no option --{given}, did you mean --{ours or 'solarize_probability'}?")


def test_name_of_a_recipe_is_answered_by_the_nearest(capsys):
    message = answer(train_from_command_line, ("--config", "own_images", *DATA), capsys)
    assert message.endswith("there is no file own_images, did you mean own_images_cpu?")


UNUSUAL = {
    ("teacher_temp", 2): "teacher_temp should be at most student_temp = 0.1, got 2.",
    ("warmup_teacher_temp", 0.2): "warmup_teacher_temp should be at most student_temp = 0.1, got 0.2.",
    ("local_crop_size", 24): "local_crop_size should be at most global_crop_size = 16, got 24.",
    ("local_crops_scale", (0.5, 1)): "local_crops_scale should end at most at 0.9, where global_crops_scale ends, got",
}


def test_senseless_settings_are_warned_of_in_a_line_each(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--dry_run")
    argv += ("--global_crops_scale", 0.4, 0.9, "--num_local_crops", 1, "--student_temp", 0.1)
    assert command(*argv, "--teacher_temp", 0.1).stderr == ""
    values = [(value if isinstance(value, tuple) else (value,)) for _, value in UNUSUAL]
    flags = sum(((f"--{name}", *value) for (name, _), value in zip(UNUSUAL, values)), ())
    finished = command(*argv, *flags)
    assert finished.returncode == 0
    for line, expected in zip(finished.stderr.splitlines(), UNUSUAL.values(), strict=True):
        assert line.startswith(expected) and line.endswith(".")
    trained(*argv[:-8], "--max_steps", 1, "--teacher_temp", 2, "--report_to", "none")
    assert f"WARNING training.train: {UNUSUAL['teacher_temp', 2]}" in (tmp_path / "run/train.log").read_text()


def test_fields_of_the_config_are_answered_by_meaning(capsys):
    for field, ours in (("embed_dim", "hidden_size"), ("depth", "num_hidden_layers"), ("img_size", "image_size")):
        message = answer(train_from_command_line, ("--config_overrides", f"{field}=8", *DATA), capsys)
        assert f"the model's config has no field {field}, did you mean {ours}?" in message


# arguments of the reference implementation's eval_*.py and visualize_attention.py
EVALUATIONS = {
    ("knn", "nb_knn"): "k", ("knn", "batch_size_per_gpu"): "batch_size", ("knn", "data_path"): "dataset_name",
    ("knn", "pretrained_weights"): "model", ("knn", "arch"): "model", ("knn", "patch_size"): "model",
    ("knn", "checkpoint_key"): "key", ("knn", "dump_features"): "features", ("knn", "load_features"): "features",
    ("knn", "use_cuda"): "num_processes", ("knn", "dist_url"): "num_processes", ("knn", "local_rank"): "num_processes",
    ("linear", "lr"): "learning_rates", ("linear", "num_labels"): "label_column", ("linear", "arch"): "model",
    ("linear", "pretrained_weights"): "model", ("linear", "batch_size_per_gpu"): "batch_size",
    ("linear", "checkpoint_key"): "key", ("finetune", "lr"): "learning_rate", ("landmarks", "imsize"): "image_size",
    ("landmarks", "data_path"): "dataset_name", ("video_segmentation", "n_last_frames"): "num_last_frames",
    ("video_segmentation", "size_mask_neighborhood"): "neighborhood", ("attention", "image_path"): "image",
    ("attention", "threshold"): "mass", ("attention", "output_dir"): "output", ("attention", "resize"): "image_size",
    ("knn", "fp16"): "dtype", ("finetune", "fp16"): "mixed_precision", ("embedding", "max_samples"): "max_images",
}  # fmt: skip


@pytest.fixture(scope="module")
def protocols():
    commands = EvaluationParser(prog="dino-eval").add_subparsers(parser_class=EvaluationParser)
    add_protocols(commands)
    return {name: command._option_string_actions.keys() for name, command in commands.choices.items()}


@pytest.mark.parametrize(("protocol", "name"), EVALUATIONS)
def test_names_of_the_original_evaluations_are_answered(protocol, name, protocols, capsys):
    expected = EVALUATIONS[protocol, name]
    message = answer(evaluate_from_command_line, (protocol, f"--{name}", "1", "--model", "m"), capsys)
    message = message.partition(f"there is no option --{name}")[2]
    assert f"--{expected}" in re.findall(r"--\w+", message) and "; there are " not in message, message
    elsewhere = {"key", "num_processes", "mixed_precision"}  # of dino-convert and the launcher
    assert expected in elsewhere or f"--{expected}" in protocols[protocol]


def test_every_synonym_of_evaluations_names_an_option(protocols):
    options = {option for command in protocols.values() for option in command}
    for name, meaning in EvaluationParser.synonyms.items():
        assert all(" " in each or f"--{each}" in options for each in meaning.split("|")), name


# --------------------------------------------------------------------------------------------------- model_config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "model_config: there is no file resnet18. Did you mean timm/resnet18?"),
        ("resnet101", "there is no file resnet101. Did you mean timm/resnet101?"),
        ("vit_smal_patch16", "there is no file vit_smal_patch16. Did you mean vit_small_patch16?"),
        ("vit_tiny", "Did you mean vit_tiny_patch16 or vit_tiny_patch8?"),
        ("vit_small", "Did you mean vit_small_patch16 or vit_small_patch8?"),
        ("facebook/dino-vits16", "dino-convert facebook/dino-vits16 FOLDER, then --init_from FOLDER --model_config "),
        ("timm/resnet19", "model_config must be a network of timm, got timm/resnet19. Did you mean timm/resnet"),
        ("timm/vit_small", "got timm/vit_small. Did you mean timm/vit_small_patch8_224 or timm/vit_small_"),
        ("timm/nope", "model_config must be a network of timm, got timm/nope. timm.list_models() lists them all."),
        ("timm/", "model_config must be a network of timm, got timm/. timm.list_models() lists them all."),
        ("vit_huge", "Give timm/NAME for a network of timm, or one of convnext_tiny, "),
        ("FOLDER", "FOLDER/config.json"),
    ],
)
def test_model_config_that_is_not_ours_is_answered(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    assert message in answer(train_from_command_line, ("--model_config", name, *DATA), capsys)


def test_network_of_timm_without_timm_is_answered(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = answer(train_from_command_line, ("--model_config", "timm/resnet18", *DATA), capsys)
    assert "model_config timm/resnet18 needs timm. Install it: pip install timm." in message
    message = answer(train_from_command_line, ("--model_config", "resnet18", *DATA), capsys)
    assert "there is no file resnet18. Give timm/NAME for a network of timm, or one of convnext_tiny, " in message


def test_network_of_timm_is_trained_by_its_name(recipe, parquet_folder, tmp_path):  # noqa: F811
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"config_overrides": {"out_dim": 8}}))
    argv = ("--config", tmp_path / "r.yaml", "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    argv += ("--global_crop_size", 32, "--local_crop_size", 16, "--max_steps", 1)
    trained(*argv, "--model_config", "timm/test_resnet")
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["backbone_config"]["architecture"] == "test_resnet" and saved["image_size"] == 32


def test_converted_weights_train_by_their_own_config(recipe, parquet_folder, tmp_path):  # noqa: F811
    """As the answer to a Hub id says: exactly these weights are what a run starts from."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, image_size=16,
                       patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    trained(tmp_path / "vit", tmp_path / "ours", module="modeling_dino.convert_dino_checkpoint")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"config_overrides": {"out_dim": 8}}))
    argv = ("--config", tmp_path / "r.yaml", "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    argv += ("--model_config", tmp_path / "ours/config.json", "--init_from", tmp_path / "ours", *STILL)
    trained(*argv)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "ours"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ----------------------------------------------------------------------------------------------------------- help

# by the name of a command, the module behind it
SCRIPTS = dict(re.findall(r'"(dino-\w+) = ([\w.]+):main"', (CONFIGS.parent / "setup.py").read_text()))
COMMANDS = [module.removesuffix(".__main__") for module in SCRIPTS.values()]


def help_of(module: str, capsys, *argv) -> str:
    finished = command(*argv, "--help", module=module)
    assert finished.returncode == 0, finished.stderr
    return " ".join(finished.stdout.split())


def test_every_command_is_a_module_that_runs():
    assert SCRIPTS.keys() == {f"dino-{name}" for name in ("train", "eval", "check", "publish", "convert")}
    for name, module in SCRIPTS.items():
        finished = command("--help", module=module)
        assert finished.returncode == 0 and finished.stdout.startswith(f"usage: {name} "), module


def test_module_of_dino_publish_runs_without_a_warning():
    finished = command("--help", module="training.publish", launcher=("-m",))
    assert finished.returncode == 0 and finished.stderr == "" and "usage: dino-publish" in finished.stdout


def test_help_shows_no_default_where_there_is_none(protocols, capsys):
    texts = [help_of(module, capsys) for module in COMMANDS]
    texts += [help_of("evaluation", capsys, name) for name in (*protocols, "suite")]
    for text in texts:
        assert "default: None" not in text and "default: []" not in text
        assert not re.search(r"Default: ((?! --).)*\(default: ", text)  # told twice
    for name in ("dataset_name", "output_dir"):
        assert re.search(rf"--{name.replace('_', '-')} {name.upper()} ((?! --).)*Required\. --", texts[0]), name
