"""`dino-convert`: what the original, transformers and timm hold of DINO becomes ours, and ours theirs, unchanged."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import onnxruntime
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTImageProcessorPil, ViTModel

from modeling_dino import DINOConfig, DINOForImageClassification, DINOForPreTraining, DINOModel
from modeling_dino.command_line import run
from modeling_dino.convert_dino_checkpoint import convert, convert_from_command_line
from modeling_dino.image_processing_dino import DINOPillowImageProcessor, make_image_processor

from .original import FIXTURES, recorded, tiny_config


BACKBONE, CHECKPOINT = FIXTURES / "backbone.pth", FIXTURES / "checkpoint.pth"
HEADS = {"num_attention_heads": 3}  # of 16, not of 64


def original(path) -> dict:
    """A file of the original's, read as anybody would who trusts it."""
    return torch.load(path, weights_only=False)


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """`backbone.pth`, converted by the command."""
    folder = tmp_path_factory.mktemp("converted") / "backbone"
    argv = [BACKBONE, folder, "--num_attention_heads", "3"]
    command = [sys.executable, "-m", "modeling_dino.convert_dino_checkpoint", *map(str, argv)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"wrote {folder}\n"
    return folder


@pytest.mark.parametrize("size", ["native", "local", "wide", "large"])
def test_backbone_computes_what_it_did(backbone, size):
    expected = recorded("backbone_io")
    with torch.no_grad():
        output = AutoModel.from_pretrained(backbone)(expected[f"{size}.pixel_values"])
    torch.testing.assert_close(output.pooler_output, expected[f"{size}.cls"], rtol=0, atol=1e-5)


def test_backbone_goes_there_and_back_unchanged(backbone, tmp_path):
    convert(str(backbone), str(tmp_path / "again.pth"), to="original")
    assert_equal(original(tmp_path / "again.pth"), original(BACKBONE))


def test_training_checkpoint_becomes_both_networks_and_their_centre(tmp_path):
    convert(str(CHECKPOINT), str(tmp_path / "ours"), **HEADS)
    theirs = original(CHECKPOINT)
    images = torch.randn(2, 3, 32, 32)
    for name in ("student", "teacher"):
        model = DINOForPreTraining.from_pretrained(tmp_path / "ours" / name)
        state = {key.removeprefix("module."): tensor for key, tensor in theirs[name].items()}
        assert torch.equal(model.head.last_layer.weight_v, state["head.last_layer.weight_v"])
        with torch.no_grad():  # the head, by hand
            hidden = model.dino(images).pooler_output
            for layer in (0, 2, 4):
                weight, bias = state[f"head.mlp.{layer}.weight"], state[f"head.mlp.{layer}.bias"]
                hidden = torch.nn.functional.linear(hidden, weight, bias)
                hidden = torch.nn.functional.gelu(hidden) if layer < 4 else hidden / hidden.norm(dim=1, keepdim=True)
            prototypes = state["head.last_layer.weight_v"]
            logits = (
                hidden @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T * state["head.last_layer.weight_g"].T
            )
            torch.testing.assert_close(model(images).logits, logits, rtol=0, atol=1e-5)
    state = torch.load(tmp_path / "ours" / "state.pt")
    assert torch.equal(state["center"], theirs["dino_loss"]["center"])


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_one_backbone_of_a_training_checkpoint_goes_there_and_back_unchanged(key, tmp_path):
    convert(str(CHECKPOINT), str(tmp_path / "ours"), key=key, **HEADS)
    convert(str(tmp_path / "ours"), str(tmp_path / "again.pth"), to="original")
    expected = {
        name.removeprefix("module.").removeprefix("backbone."): tensor
        for name, tensor in original(CHECKPOINT)[key].items()
        if "head." not in name
    }
    assert_equal(original(tmp_path / "again.pth"), expected)


def test_training_checkpoint_goes_there_and_back_unchanged(tmp_path):
    convert(str(CHECKPOINT), str(tmp_path / "ours"), **HEADS)
    convert(str(tmp_path / "ours"), str(tmp_path / "again.pth"), to="original")
    again, theirs = original(tmp_path / "again.pth"), original(CHECKPOINT)
    for name in ("student", "teacher"):
        assert_equal(again[name], theirs[name])
    assert torch.equal(again["dino_loss"]["center"], theirs["dino_loss"]["center"])


def test_stock_vit_computes_the_same_and_comes_back_unchanged(backbone, tmp_path):
    convert(str(backbone), str(tmp_path / "vit"), to="vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert config["model_type"] == "vit" and "auto_map" not in config
    vit, info = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = recorded("backbone_io")
    with torch.no_grad():
        output = vit.eval()(expected["native.pixel_values"])
    torch.testing.assert_close(output.last_hidden_state[:, 0], expected["native.cls"], rtol=0, atol=1e-5)
    convert(str(tmp_path / "vit"), str(tmp_path / "again"))
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), load_file(backbone / "model.safetensors"))


def test_published_vit_gets_its_epsilon_back_and_leaves_its_pooler(tmp_path):
    """Like facebook/dino-*: epsilon 1e-12 in the config, a pooler that nobody trained."""
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    published = ViTModel(ViTConfig(intermediate_size=192, **sizes))
    assert published.config.layer_norm_eps == 1e-12
    published.save_pretrained(tmp_path / "vit")
    vit = ViTModel.from_pretrained(tmp_path / "vit", layer_norm_eps=1e-6)
    assert "pooler.dense.weight" in load_file(tmp_path / "vit" / "model.safetensors")
    convert(str(tmp_path / "vit"), str(tmp_path / "ours"))
    model, images = DINOModel.from_pretrained(tmp_path / "ours"), torch.randn(2, 3, 32, 32)
    assert model.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        expected = vit(images).last_hidden_state
        torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["file", "folder"])
def test_timm_model_computes_the_same(wrapped, tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0)
    network.eval()
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    if wrapped == "folder":
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224.dino"}))
        path = tmp_path
    convert(str(path), str(tmp_path / "ours"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path / "ours")(images).pooler_output
        torch.testing.assert_close(output, network(images), rtol=0, atol=1e-5)


def linear_classifier(path, num_labels: int, width: int) -> torch.nn.Linear:
    linear = torch.nn.Linear(width, num_labels)
    state = {f"module.linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    torch.save({"epoch": 100, "state_dict": state}, path)
    return linear


def test_one_network_of_our_training_folder(tmp_path):
    convert(str(CHECKPOINT), str(tmp_path / "ours"), **HEADS)
    convert(str(tmp_path / "ours"), str(tmp_path / "teacher"), key="teacher")
    convert(str(CHECKPOINT), str(tmp_path / "expected"), key="teacher", **HEADS)
    teacher, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "expected"))
    assert_equal(teacher, expected)


def test_vit_keeps_its_activation_its_epsilon_and_its_image_processor(tmp_path):
    config = tiny_config(hidden_act="relu", layer_norm_eps=1e-3)
    torch.manual_seed(0)
    DINOModel(config).save_pretrained(tmp_path / "ours")
    make_image_processor(config.image_size, config.num_channels, [0.3], [0.4]).save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), str(tmp_path / "vit"), to="vit")
    convert(str(tmp_path / "vit"), str(tmp_path / "again"))
    again = DINOConfig.from_pretrained(tmp_path / "again")
    assert (again.hidden_act, again.layer_norm_eps) == ("relu", 1e-3)
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "again").image_mean) == [0.3] * 3


def test_grey_backbone_gets_an_image_processor_of_one_channel(tmp_path):
    state = original(BACKBONE)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.save(state, tmp_path / "grey.pth")
    convert(str(tmp_path / "grey.pth"), str(tmp_path / "ours"), **HEADS)
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "ours")) is DINOPillowImageProcessor
    convert(str(tmp_path / "ours"), str(tmp_path / "vit"), to="vit")
    assert not list((tmp_path / "vit").glob("*.py"))
    stock = AutoImageProcessor.from_pretrained(tmp_path / "vit", backend="pil")
    assert type(stock) is ViTImageProcessorPil and list(stock.image_mean) == [0.5]


@pytest.mark.parametrize("frozen", [True, False])
def test_arguments_of_the_training_say_whether_the_gain_is_frozen(frozen, tmp_path):
    """The gain itself cannot in the first epoch, when nothing has moved it yet."""
    theirs = original(CHECKPOINT)
    theirs["args"].norm_last_layer = frozen
    torch.save(theirs, tmp_path / "checkpoint.pth")
    convert(str(tmp_path / "checkpoint.pth"), str(tmp_path / "ours"), **HEADS)
    assert DINOConfig.from_pretrained(tmp_path / "ours" / "student").norm_last_layer is frozen


def test_linear_classifier_of_last_blocks_joins_its_backbone(tmp_path):
    linear = linear_classifier(tmp_path / "linear.pth", 7, 2 * 48)
    convert(str(BACKBONE), str(tmp_path / "ours"), linear=str(tmp_path / "linear.pth"), **HEADS)
    model = DINOForImageClassification.from_pretrained(tmp_path / "ours")
    expected = recorded("linear_inputs")
    with torch.no_grad():
        logits = linear(expected["cls_last2_concat"])
        torch.testing.assert_close(model(expected["pixel_values"]).logits, logits, rtol=0, atol=1e-5)


def test_linear_classifier_of_vit_base_interleaves_cls_and_mean(tmp_path, capsys):
    torch.manual_seed(0)
    config = DINOConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, image_size=32)
    backbone = DINOModel(config)
    backbone.save_pretrained(tmp_path / "base")
    linear = linear_classifier(tmp_path / "linear.pth", 5, 1536)
    convert(str(tmp_path / "base"), str(tmp_path / "ours"), linear=str(tmp_path / "linear.pth"))
    assert (
        "CLS of the last block and the mean of its patches, alternating channel by channel" in capsys.readouterr().out
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = backbone(images).last_hidden_state
        features = torch.cat([tokens[:, :1], tokens[:, 1:].mean(1, keepdim=True)], 1).transpose(1, 2).reshape(2, 1536)
        logits = DINOForImageClassification.from_pretrained(tmp_path / "ours")(images).logits
        torch.testing.assert_close(logits, linear(features), rtol=0, atol=1e-5)


def test_linear_classifier_with_mean_interleaves_as_recorded(tmp_path, capsys):
    linear, expected = linear_classifier(tmp_path / "linear.pth", 7, 2 * 48), recorded("linear_inputs")
    options = {"linear": str(tmp_path / "linear.pth"), "avgpool_patchtokens": True, **HEADS}
    convert(str(BACKBONE), str(tmp_path / "ours"), **options)
    assert "alternating channel by channel" in capsys.readouterr().out
    with torch.no_grad():
        logits = DINOForImageClassification.from_pretrained(tmp_path / "ours")(expected["pixel_values"]).logits
        interleaved = linear(expected["cls_avgpool_interleaved"])
        torch.testing.assert_close(logits, interleaved, rtol=0, atol=1e-5)


def test_linear_classifier_of_two_blocks_and_mean_concatenates(tmp_path, capsys):
    linear, expected = linear_classifier(tmp_path / "linear.pth", 7, 3 * 48), recorded("linear_inputs")
    options = {"linear": str(tmp_path / "linear.pth"), "avgpool_patchtokens": True, **HEADS}
    convert(str(BACKBONE), str(tmp_path / "ours"), **options)
    printed = capsys.readouterr().out
    assert "CLS of the last 2 blocks, one after another, then the mean of the last block's patches" in printed
    with torch.no_grad():
        logits = DINOForImageClassification.from_pretrained(tmp_path / "ours")(expected["pixel_values"]).logits
        features = [expected["cls_last2_concat"], expected["cls_avgpool_interleaved"][:, 1::2]]
        torch.testing.assert_close(logits, linear(torch.cat(features, 1)), rtol=0, atol=1e-5)


def test_last_layer_without_weight_norm_gives_the_same_logits(tmp_path):
    """As in the released ResNet-50's head."""
    theirs = original(CHECKPOINT)
    weight = torch.randn(96, 24)
    for name in ("student", "teacher"):
        for key in [key for key in theirs[name] if "last_layer" in key]:
            prefix = key.rpartition("last_layer")[0]
            theirs[name].pop(key)
        theirs[name][f"{prefix}last_layer.weight"] = weight
    torch.save(theirs, tmp_path / "checkpoint.pth")
    convert(str(tmp_path / "checkpoint.pth"), str(tmp_path / "ours"), **HEADS)
    head = DINOForPreTraining.from_pretrained(tmp_path / "ours" / "student").head
    hidden = torch.randn(4, 24)
    torch.testing.assert_close(head.last_layer(hidden), hidden @ weight.T)


def answer(capsys, *argv) -> str:
    capsys.readouterr()  # what the test itself has printed, as transformers' progress bars
    with pytest.raises(SystemExit) as stopped:
        run("dino-convert", convert_from_command_line, [*map(str, argv)])
    stderr = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(stderr.splitlines()) == 1, stderr
    return stderr


def test_file_that_would_run_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    with (tmp_path / "old.pth").open("wb") as file:
        pickle.dump({"cls_token": Evil()}, file)
    torch.save({"cls_token": Evil()}, tmp_path / "new.pth")
    assert "is refused: reading it would call posix.system" in answer(capsys, tmp_path / "new.pth", tmp_path / "out")
    assert "none that can be read without running code" in answer(capsys, tmp_path / "old.pth", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_all_listed(tmp_path, capsys):
    state = original(BACKBONE)
    del state["blocks.1.attn.proj.bias"]
    state["norm.weight"] = torch.ones(47)
    state["mask_token"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pth")
    argv = (tmp_path / "odd.pth", tmp_path / "out", "--num_attention_heads", "3")
    message = answer(capsys, *argv)
    assert "missing: layers.1.attention.o_proj.bias; unexpected: mask_token; misshapen: layernorm.weight" in message
    assert not (tmp_path / "out").exists()
    convert_from_command_line([*map(str, argv), "--allow_partial"])
    assert "these stay random: layers.1.attention.o_proj.bias, layernorm.weight" in capsys.readouterr().out
    model = DINOModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.embeddings.cls_token, state["cls_token"])


def test_other_mistakes_say_what_is_allowed(backbone, tmp_path, capsys):
    for name, width in (("linear", 50), ("one", 48), ("two", 96)):
        linear_classifier(tmp_path / f"{name}.pth", 7, width)
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({k: v for k, v in original(BACKBONE).items() if k != "blocks.0.mlp.fc1.weight"}, tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes((backbone / "model.safetensors").read_bytes()[:500])
    torch.save({"teacher": original(CHECKPOINT)["teacher"]}, tmp_path / "half.pth")
    torch.save({"state_dict": {"module.other": torch.zeros(1)}}, tmp_path / "nothing.pth")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "config.json").write_text("{")
    out, heads = tmp_path / "out", ("--num_attention_heads", "3")
    for argv, message in [
        ((tmp_path / "none.pth", out), "there is no file or folder"),
        ((tmp_path / "empty", out), "must hold a config.json, or student and teacher, got neither"),
        ((tmp_path / "bert", out), "is a bert; allowed are dino, vit, and timm's Vision Transformers"),
        ((tmp_path / "list.pth", out), "holds a list, no dictionary of tensors"),
        ((tmp_path / "text.pth", out), "is no file of PyTorch's"),
        (
            (tmp_path / "other.pth", out),
            "there is no pos_embed, patch_embed.proj.weight, blocks.0.mlp.fc1.weight; the keys begin with a.weight",
        ),
        ((tmp_path / "linear.pth", out), "is a linear classifier: convert its backbone, with --linear"),
        ((BACKBONE, out), "give --num_attention_heads: the width 48 is not made of heads of 64"),
        ((BACKBONE, out, "--key", "teacher", *heads), "--key teacher is for training checkpoints"),
        ((BACKBONE, out, "--linear", tmp_path / "linear.pth", *heads), "width 50, no multiple of the backbone's 48"),
        ((BACKBONE, out, "--linear", BACKBONE, *heads), "is no linear classifier of the original"),
        ((CHECKPOINT, out, "--linear", tmp_path / "linear.pth", *heads), "--linear needs a backbone"),
        (
            (BACKBONE, out, "--linear", tmp_path / "two.pth", "--n_last_blocks", "3", *heads),
            "n_last_blocks must be 2 for features of width 96, got 3. Leave it out",
        ),
        (
            (BACKBONE, out, "--linear", tmp_path / "two.pth", "--n_last_blocks", "0", *heads),
            "n_last_blocks must be 2 for features of width 96, got 0. Leave it out",
        ),
        (
            (BACKBONE, out, "--linear", tmp_path / "one.pth", "--avgpool_patchtokens", *heads),
            "the width of features must be at least 96 with avgpool_patchtokens, got 48",
        ),
        ((BACKBONE, out, "--n_last_blocks", "2", *heads), "are of a classifier. Give it by --linear"),
        ((CHECKPOINT, out, "--to", "vit", *heads), "--to vit needs a backbone: give --key teacher"),
        ((backbone, BACKBONE), "is there already; give another folder to write"),
        ((backbone, backbone, "--to", "vit"), "is there already; give another folder to write"),
        ((BACKBONE, BACKBONE, "--to", "original"), "is there already; give another file to write"),
        ((tmp_path / "cut.pth", out, *heads), "there is no blocks.0.mlp.fc1.weight"),
        ((tmp_path / "cut.safetensors", out), "is damaged, or no safetensors"),
        ((tmp_path / "half.pth", out, *heads), "has no student, but a teacher: give --key teacher"),
        (
            (tmp_path / "half.pth", out, *heads, "--key", "student"),
            "has no student, but a teacher: give --key teacher",
        ),
        ((BACKBONE, out, "--linear", tmp_path / "nothing.pth", *heads), "is no linear classifier of the original"),
        ((backbone, out, "--key", "teacher"), "--key teacher is for training checkpoints"),
        ((tmp_path / "json", out), "config.json is not JSON"),
        ((backbone, out, "--too", "vit"), "there is no option --too, did you mean --to?"),
    ]:
        assert message in answer(capsys, *argv), argv
    assert not out.exists()


def test_arguments_of_the_original_are_read_without_trust():
    assert isinstance(original(CHECKPOINT)["args"], argparse.Namespace)


def with_numbers(network: torch.nn.Module) -> torch.nn.Module:
    """As after training: batch norms have seen images, and no two channels are alike."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def xcit_of_the_original(network: torch.nn.Module) -> dict:
    """The tensors of timm's XCiT by the names of the original's code, where one layer makes q, k and v of a block."""
    state = {name.replace("pos_embed.", "pos_embeder."): tensor for name, tensor in network.state_dict().items()}
    for block in ("cls_attn_blocks.0.attn", "cls_attn_blocks.1.attn"):
        for kind in ("weight", "bias"):
            state[f"{block}.qkv.{kind}"] = torch.cat([state.pop(f"{block}.{part}.{kind}") for part in "qkv"])
    return state


@pytest.fixture(scope="module", params=["resnet50", "resnet18", "xcit_nano_12_p16_224", "xcit_nano_12_p8_224"])
def other_network(request):
    """A network of the original's that is no Vision Transformer, as others compute it, and its tensors."""
    if request.param.startswith("resnet"):
        network = with_numbers(torchvision.models.get_model(request.param))
        network.fc = torch.nn.Identity()
        return network, network.state_dict()
    network = with_numbers(timm.create_model(request.param, num_classes=0))
    return network, xcit_of_the_original(network)


def test_resnet_and_xcit_compute_the_same_and_come_back_unchanged(other_network, tmp_path):
    network, state = other_network
    torch.save(state, tmp_path / "backbone.pth")
    convert(str(tmp_path / "backbone.pth"), str(tmp_path / "ours"))
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path / "ours")(images).pooler_output
        torch.testing.assert_close(output, network(images), rtol=1e-5, atol=1e-5)
    convert(str(tmp_path / "ours"), str(tmp_path / "again.pth"), to="original")
    assert_equal(original(tmp_path / "again.pth"), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [("downsample_in_bottleneck", True), ("hidden_act", "gelu"), ("downsample_in_first_stage", True)],
)
def test_resnet_that_computes_something_else_is_not_the_originals(name, value, tmp_path, capsys):
    """Names and shapes of its tensors are the same."""
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], name: value}
    DINOModel(DINOConfig(backbone_config=resnet)).save_pretrained(tmp_path / "ours")
    argv = (tmp_path / "ours", tmp_path / "theirs.pth", "--to", "original")
    assert f"the original has no resnet with this {name}" in answer(capsys, *argv)
    assert not (tmp_path / "theirs.pth").exists()


@pytest.mark.parametrize("timms", [False, True])
def test_xcit_by_either_names(timms, tmp_path):
    network = with_numbers(timm.create_model("xcit_nano_12_p16_224", num_classes=0))
    torch.save(network.state_dict() if timms else xcit_of_the_original(network), tmp_path / "xcit.pth")
    convert(str(tmp_path / "xcit.pth"), str(tmp_path / "ours"))
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert_equal({name.removeprefix("backbone.timm_model."): t for name, t in ours.items()}, network.state_dict())


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("conv1.weight", "of its ResNet, there is no conv1.weight"),
        ("layer1.0.conv2.weight", "of its ResNet, there is no layer1.0.conv2.weight"),
        ("cls_token", "of its XCiT, there is no cls_token"),
    ],
)
def test_network_that_lacks_what_tells_its_size(lacking, message, tmp_path, capsys):
    if "XCiT" in message:
        state = xcit_of_the_original(timm.create_model("xcit_nano_12_p16_224", num_classes=0))
    else:
        state = torchvision.models.resnet18().state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != lacking}, tmp_path / "a.pth")
    assert message in answer(capsys, tmp_path / "a.pth", tmp_path / "out")


def test_linear_classifier_joins_a_network_with_pooled_features(other_network, tmp_path):
    network, state = other_network
    torch.save(state, tmp_path / "backbone.pth")
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        features = network(images)
        linear = linear_classifier(tmp_path / "linear.pth", 7, features.shape[1])
        convert(str(tmp_path / "backbone.pth"), str(tmp_path / "ours"), linear=str(tmp_path / "linear.pth"))
        logits = DINOForImageClassification.from_pretrained(tmp_path / "ours")(images).logits
        torch.testing.assert_close(logits, linear(features), rtol=1e-5, atol=1e-4)


def test_training_checkpoint_of_resnet_with_its_released_head(tmp_path):
    """Two layers, 4096 wide, prototypes without weight norm; batch norms, so that the teacher was wrapped too."""
    network = with_numbers(torchvision.models.resnet18())
    network.fc = torch.nn.Identity()
    head = torch.nn.Sequential(torch.nn.Linear(512, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 16))
    prototypes = torch.nn.Linear(16, 32, bias=False)
    state = {f"module.backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {f"module.head.mlp.{name}": tensor for name, tensor in head.state_dict().items()}
    state["module.head.last_layer.weight"] = prototypes.weight.detach()
    torch.save({"student": state, "teacher": state, "epoch": 800}, tmp_path / "checkpoint.pth")
    convert(str(tmp_path / "checkpoint.pth"), str(tmp_path / "ours"))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = prototypes(torch.nn.functional.normalize(head(network(images)), dim=1))
        for name in ("student", "teacher"):
            logits = DINOForPreTraining.from_pretrained(tmp_path / "ours" / name)(images).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    convert(str(tmp_path / "ours"), str(tmp_path / "again.pth"), to="original")
    again = original(tmp_path / "again.pth")
    for name in ("student", "teacher"):
        assert_equal({k: v for k, v in again[name].items() if "backbone" in k},
                     {k: v for k, v in state.items() if "backbone" in k})  # fmt: skip


def outputs_of_onnx(path, images: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"pixel_values": images.numpy()})]


@pytest.mark.parametrize("size", ["native", "local", "wide", "large"])
def test_onnx_of_any_size_computes_what_the_original_did(any_size, size):
    expected = recorded("backbone_io")
    _, cls = outputs_of_onnx(any_size, expected[f"{size}.pixel_values"])
    torch.testing.assert_close(cls, expected[f"{size}.cls"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def any_size(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "any.onnx"
    argv = ["--to", "onnx", "--dynamic_image_size", "--num_attention_heads", "3"]
    convert_from_command_line([str(BACKBONE), str(path), *argv])
    return path


def test_onnx_of_one_size_takes_any_batch(backbone, tmp_path, capsys):
    convert_from_command_line([str(backbone), str(tmp_path / "one.onnx"), "--to", "onnx"])
    difference = float(capsys.readouterr().out.split("within ")[1].split(" of")[0])
    assert difference < 1e-5
    expected = recorded("backbone_io")
    for images, cls in zip(expected["native.pixel_values"].split(1), expected["native.cls"].split(1)):
        tokens, ours = outputs_of_onnx(tmp_path / "one.onnx", images)
        torch.testing.assert_close(ours, cls, rtol=0, atol=1e-4)
        assert torch.equal(tokens[:, 0], ours)


@pytest.mark.slow
@pytest.mark.parametrize("other_network", ["resnet50", "xcit_nano_12_p16_224"], indirect=True)
def test_onnx_of_other_networks(other_network, tmp_path):
    network, state = other_network
    torch.save(state, tmp_path / "backbone.pth")
    convert(str(tmp_path / "backbone.pth"), str(tmp_path / "any.onnx"), to="onnx", dynamic_image_size=True)
    images = torch.rand(5, 3, 64, 96)
    with torch.no_grad():
        features = network(images)
    ours, scale = outputs_of_onnx(tmp_path / "any.onnx", images)[1], features.abs().max()
    torch.testing.assert_close(ours / scale, features / scale, rtol=0, atol=1e-4)


def test_onnx_of_a_classifier_gives_its_logits(tmp_path):
    linear = linear_classifier(tmp_path / "linear.pth", 7, 2 * 48)
    argv = {"linear": str(tmp_path / "linear.pth"), "to": "onnx", **HEADS}
    convert(str(BACKBONE), str(tmp_path / "classes.onnx"), **argv)
    expected = recorded("linear_inputs")
    (logits,) = outputs_of_onnx(tmp_path / "classes.onnx", expected["pixel_values"])
    torch.testing.assert_close(logits, linear(expected["cls_last2_concat"]).detach(), rtol=0, atol=1e-4)


def test_what_cannot_be_exported_is_said_in_one_line(backbone, tmp_path, capsys):
    swin = {"model_type": "swin", "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2]}
    DINOModel(DINOConfig(backbone_config=swin)).save_pretrained(tmp_path / "swin")
    assert "cannot export this network to ONNX" in answer(capsys, tmp_path / "swin", tmp_path / "a", "--to", "onnx")
    assert "a swin is no Vision Transformer" in answer(capsys, tmp_path / "swin", tmp_path / "a", "--to", "vit")
    assert "the original has no swin" in answer(capsys, tmp_path / "swin", tmp_path / "a", "--to", "original")
    argv = (backbone, tmp_path / "a", "--dynamic_image_size")
    assert "--dynamic_image_size is for --to onnx" in answer(capsys, *argv)
    argv = (CHECKPOINT, tmp_path / "a", "--to", "onnx", "--num_attention_heads", "3")
    assert "--to onnx needs a backbone: give --key teacher" in answer(capsys, *argv)
    assert not (tmp_path / "a").exists()
