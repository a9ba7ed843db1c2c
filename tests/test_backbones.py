"""`DINOConfig(backbone_config=...)`: networks of transformers and timm in the place of DINO's own."""

import json

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from transformers import AutoModel, ConvNextConfig, Dinov2Config, SwinConfig, TimmWrapperConfig

from modeling_dino import DINOBackbone, DINOConfig, DINOForImageClassification, DINOForPreTraining, DINOModel
from modeling_dino.convert_dino_checkpoint import convert
from training.arguments import TrainingArguments
from training.batch_norm import share_batch_norms_
from training.networks import make_student, make_teacher

from .commands import command, trained
from .test_training import RECIPE, losses, recipe  # noqa: F401
from .without_package import run_without_package


RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
NETWORKS = {
    "resnet": RESNET,
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": {"model_type": "swin", "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2]},
    "xcit": {"model_type": "timm_wrapper", "architecture": "xcit_nano_12_p16_224"},
    "mobilenet": {"model_type": "timm_wrapper", "architecture": "mobilenetv3_small_050"},  # wider after its pooling
}
HEAD = {"out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}


def make_config(network: str, **fields) -> DINOConfig:
    return DINOConfig(backbone_config=NETWORKS[network], **HEAD | fields)


def test_features_are_the_pooled_ones_of_the_network_itself():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    for network in ("resnet", "convnext", "swin"):
        model = DINOModel(make_config(network)).eval()
        itself = AutoModel.from_config(model.config.backbone_config).eval()
        for parameter in model.parameters():  # position biases start at zero
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        itself.load_state_dict(model.backbone.state_dict())
        for sides in ((64, 64), (56, 56)):  # of Swin, more than a window, and just one
            images = torch.randn(2, 3, *sides)
            assert torch.equal(model(images).pooler_output, itself(images).pooler_output.flatten(1)), network
    for network in ("xcit", "mobilenet"):
        model = DINOModel(make_config(network)).eval()
        itself = timm.create_model(NETWORKS[network]["architecture"], num_classes=0).eval()
        itself.load_state_dict(model.backbone.timm_model.state_dict())
        assert torch.equal(model(images).pooler_output, itself(images))


@pytest.mark.parametrize("network", NETWORKS)
def test_crops_of_two_sizes_train_every_parameter(network):
    model = DINOForPreTraining(make_config(network))
    output = model([torch.randn(2, 3, 64, 64), torch.randn(4, 3, 32, 32)])
    assert output.logits.shape == (6, 32) and output.pooler_output.shape == (6, model.dino.num_features)
    output.logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("network", NETWORKS)
def test_saved_network_opens_as_everything_with_equal_outputs(network, tmp_path):
    torch.manual_seed(0)
    model = DINOForPreTraining(make_config(network, n_last_blocks=1)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(DINOForPreTraining.from_pretrained(tmp_path)(images).logits, model(images).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is DINOModel
    assert torch.equal(backbone(images).pooler_output, model.dino(images).pooler_output)
    classifier, info = DINOForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    linear = classifier.classifier
    expected = torch.nn.functional.linear(model.dino(images).pooler_output, linear.weight, linear.bias)
    assert torch.equal(classifier(images, labels=torch.tensor([0, 4])).logits, expected)


ELSEWHERE = """
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
images = torch.load("images.pt")
for name in ("resnet", "xcit"):
    classifier = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    torch.save(model(images).pooler_output.detach(), name + ".pt")
    assert classifier(images).logits.shape == (2, 2)
"""


@pytest.mark.slow
def test_networks_load_by_the_code_beside_them_without_our_package(tmp_path):
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    models = {name: DINOForPreTraining(make_config(name)).eval() for name in ("resnet", "xcit")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    run_without_package(ELSEWHERE, tmp_path)
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), model.dino(images).pooler_output)


def test_network_of_timm_starts_as_timm_starts_it():
    """`TimmWrapperModel` would draw all its convolutions with a standard deviation of 0.02."""
    torch.manual_seed(0)
    ours = DINOForPreTraining(make_config("xcit")).dino.backbone.timm_model.state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=0).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_network_of_timm_that_lacks_weights_gets_new_ones(tmp_path):
    model = DINOModel(make_config("xcit"))
    state = model.state_dict()
    del state["backbone.timm_model.blocks.3.attn.qkv.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = DINOModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"backbone.timm_model.blocks.3.attn.qkv.weight"}
    assert loaded.backbone.timm_model.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_small_crops_leave_the_windows_of_swin_as_they_are():
    """`SwinModel` shrinks them to the first crop that is smaller, for good, and then fails."""
    model = DINOModel(make_config("swin")).eval()
    large, small = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 16, 16)
    before = model(large).pooler_output, model(small).pooler_output
    assert torch.equal(model(large).pooler_output, before[0]) and torch.equal(model(small).pooler_output, before[1])


@pytest.mark.parametrize("backbone_config", [
    SwinConfig(embed_dim=12, depths=[2, 2], num_heads=[1, 2], drop_path_rate=0.5),
    SwinConfig(embed_dim=12, depths=[2, 2], num_heads=[1, 2], drop_path_rate=0.0, hidden_dropout_prob=0.5),
    ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], drop_path_rate=0.5),
    TimmWrapperConfig(architecture="xcit_nano_12_p16_224", model_args={"drop_path_rate": 0.5}),
])  # fmt: skip
def test_only_the_student_drops_anything(backbone_config):
    torch.manual_seed(0)
    student = DINOForPreTraining(DINOConfig(backbone_config=backbone_config, **HEAD))
    teacher = make_teacher(student)
    images = torch.randn(4, 3, 64, 64)
    assert not torch.equal(student(images).logits, student(images).logits)
    assert torch.equal(teacher(images).logits, teacher(images).logits)


FLAGS = ("--max_steps", "3", "--save_steps", "3", "--global_crop_size", "64", "--local_crop_size", "32")


@pytest.mark.slow
@pytest.mark.parametrize("model_config", ["resnet50", "xcit_small_12_p16"])
def test_row_of_the_papers_table_pretrains_saves_loads_and_evaluates(model_config, parquet_folder, recipe, tmp_path):  # noqa: F811
    overrides = json.dumps({**HEAD, "image_size": 32})
    overrides = ("--config_overrides", *(f"{name}={value}" for name, value in json.loads(overrides).items()))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({k: v for k, v in RECIPE.items() if k not in ("model_config", "config_overrides")}))
    argv = ("--config", path, "--model_config", model_config, "--dataset_name", parquet_folder)
    trained(*argv, *FLAGS, *overrides, "--output_dir", tmp_path / "run", "--eval_split", "test", "--eval_steps", "3")
    assert len(losses(tmp_path / "run")) == 3
    model = AutoModel.from_pretrained(tmp_path / "run").eval()
    width = {"resnet50": 2048, "xcit_small_12_p16": 384}[model_config]
    assert model(torch.randn(1, 3, 64, 64)).pooler_output.shape == (1, width)
    checkpoint = load_file(tmp_path / "run/checkpoints/step_0000003/teacher/model.safetensors")
    assert all(torch.equal(tensor, checkpoint[f"dino.{name}"]) for name, tensor in model.state_dict().items())
    argv = ("knn", "--model", tmp_path / "run", "--dataset_name", parquet_folder, "--k", "1")
    finished = command(*argv, "--output", tmp_path / "knn.json", module="evaluation")
    assert finished.returncode == 0, finished.stderr
    assert "1_top1" in (tmp_path / "knn.json").read_text()


TINY_RESNET = ("--model_config", "resnet50", "--config_overrides", "image_size=16", "use_bn_in_head=true",
               *(f"{name}={value}" for name, value in HEAD.items()),
               *(f"backbone_config.{name}={value}" for name, value in RESNET.items()))  # fmt: skip


@pytest.fixture
def resnet_recipe(tmp_path):
    path = tmp_path / "resnet.yaml"
    path.write_text(json.dumps({k: v for k, v in RECIPE.items() if k not in ("model_config", "config_overrides")}))
    return path


@pytest.mark.slow
def test_batch_norms_of_two_processes_are_those_of_one_with_twice_the_batch(resnet_recipe, parquet_folder, tmp_path):
    argv = ("--config", resnet_recipe, "--dataset_name", parquet_folder, *TINY_RESNET)
    trained(*argv, "--output_dir", tmp_path / "one")
    trained(*argv, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "4", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for network in ("student", "teacher"):
        two, one = (
            load_file(tmp_path / name / f"checkpoints/step_0000010/{network}/model.safetensors")
            for name in ("two", "one")
        )
        assert any("running_var" in name for name in one)
        for name, tensor in one.items():
            # a bias in front of a batch norm has no gradient but rounding noise, which the running mean then holds
            if name not in {f"head.mlp.{noise}" for noise in ("0.bias", "1.running_mean", "3.bias", "4.running_mean")}:
                torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_bf16_of_two_processes_stays_near_fp32_of_one(resnet_recipe, parquet_folder, tmp_path):
    argv = ("--config", resnet_recipe, "--dataset_name", parquet_folder, *TINY_RESNET, "--max_steps", "3")
    trained(*argv, "--output_dir", tmp_path / "one")
    argv += ("--output_dir", tmp_path / "two", "--per_device_train_batch_size", "4")
    trained(*argv, processes=2, ACCELERATE_MIXED_PRECISION="bf16")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0.03)


def test_parameters_without_a_use_are_frozen():
    """Else several processes wait for their gradients."""
    network = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8)
    args = TrainingArguments(dataset_name="x", output_dir="y", global_crop_size=64, local_crop_size=32)
    student = make_student(DINOConfig(backbone_config=network, **HEAD), args)
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == ["dino.backbone.embeddings.mask_token"]


@pytest.mark.parametrize(
    "batch_norm", [torch.nn.BatchNorm2d(3, momentum=None), torch.nn.BatchNorm2d(3, affine=False), BatchNormAct2d(3)]
)
def test_batch_norms_that_are_not_the_usual_are_not_shared(batch_norm):
    with pytest.raises(ValueError, match=f"cannot share the batch norm 0, {type(batch_norm).__name__}"):
        share_batch_norms_(torch.nn.Sequential(batch_norm), torch.device("cpu"))


def test_teacher_keeps_running_statistics_of_its_own(resnet_recipe, parquet_folder, tmp_path):
    """They are not averaged with the student's: with momentum 1 its parameters stay, and they move."""
    still = ("--momentum_teacher", "1", "--max_steps", "2", "--save_steps", "1", "--save_total_limit", "2")
    argv = ("--config", resnet_recipe, "--dataset_name", parquet_folder, *TINY_RESNET, *still)
    trained(*argv, "--output_dir", tmp_path / "run")
    first, second = (
        load_file(tmp_path / f"run/checkpoints/step_000000{step}/teacher/model.safetensors") for step in (1, 2)
    )
    student = load_file(tmp_path / "run/checkpoints/step_0000002/student/model.safetensors")
    for name, tensor in first.items():
        moves = "running" in name or "num_batches" in name
        assert torch.equal(second[name], tensor) != moves, name
        if "running" in name:
            assert not torch.equal(second[name], student[name])


@pytest.mark.slow
def test_training_goes_on_from_a_resnet_of_the_originals(resnet_recipe, parquet_folder, tmp_path):
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    convert(str(tmp_path / "resnet18.pth"), str(tmp_path / "converted"))
    resnet18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    argv = ("--config", resnet_recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    still = ("--max_steps", "1", "--base_learning_rate", "0", "--min_learning_rate", "0")
    overrides = [f"backbone_config.{name}={value}" for name, value in resnet18.items()]
    overrides += [f"{name}={value}" for name, value in HEAD.items()]
    start = ("--init_from", tmp_path / "converted")
    trained(*argv, *start, *still, "--model_config", "resnet50", "--config_overrides", *overrides)
    published = load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(published["backbone.embedder.embedder.convolution.weight"], network.conv1.weight)
    finished = command(*argv, *start, "--overwrite_output_dir", "--model_config", "resnet50")
    assert finished.returncode == 2 and "backbone_config.layer_type basic, not bottleneck" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_config": {"depths": [1]}}, "needs the model_type of a network in transformers, got None"),
        ({"backbone_config": {"model_type": "resent"}}, "needs the model_type .* got resent"),
        ({"backbone_config": RESNET, "num_channels": 1}, "num_channels must be the backbone's too, got 1 and, .* 3"),
        ({"backbone_config": NETWORKS["xcit"], "num_channels": 1}, "num_channels must be the backbone's too"),
        ({"backbone_config": {"model_type": "dino"}}, "networks other than DINO's own"),
    ],
)
def test_config_refuses_networks_that_cannot_be(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DINOConfig(**fields)


def test_what_only_the_vision_transformer_can_do_is_refused():
    model = DINOModel(make_config("resnet"))
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="ResNetModel has no blocks of a Vision Transformer"):
        model.get_intermediate_layers(images)
    with pytest.raises(ValueError, match="output_hidden_states is for DINO's own Vision Transformer"):
        model(images, output_hidden_states=True)
    with pytest.raises(ValueError, match="feature maps of a resnet"):
        DINOBackbone(model.config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone_config.deepths=[1,1]"], "the config of a resnet has no field deepths, did you mean depths?"),
        (["drop_path_rate=0.1"], "drop_path_rate is a field of the Vision Transformer"),
        (["num_channels=1"], "num_channels must be the backbone's too, got 1 and, in backbone_config, 3"),
        (["backbone_config.model_type=resent"], "needs the model_type of a network in transformers, got resent"),
        (["backbone_config.model_type=[1]"], "needs the model_type of a network in transformers, got [1]"),
        (["out_dim=64", "out_dim.x=1"], "config_overrides: out_dim has no fields, got out_dim.x=1"),
        (["backbone_config.depths=[1,1]"], "the resnet of backbone_config cannot be trained on these crops"),
        (["backbone_config.hidden_act=foo"], "cannot be trained on these crops: KeyError: 'foo'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_networks_settings_end_in_one_line(overrides, message, parquet_folder, tmp_path):
    argv = ("--dataset_name", parquet_folder, "--output_dir", tmp_path / "run", "--model_config", "resnet50")
    small = ("--per_device_train_batch_size", "8", "--global_crop_size", "64", "--local_crop_size", "32")
    finished = command(*argv, *small, "--config_overrides", *overrides)
    assert finished.returncode == 2 and not (tmp_path / "run").exists()
    assert message in finished.stderr and len(finished.stderr.strip().splitlines()) == 1
