"""PEFT, Trainer and dense heads of transformers with DINO models, in a few steps each."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_dino import DINOBackbone, DINOConfig, DINOForImageClassification, DINOForPreTraining, DINOModel


pytestmark = pytest.mark.usefixtures("accelerate_restored")


def make_config(**fields) -> DINOConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return DINOConfig(**sizes, out_dim=32, head_hidden_dim=32, head_bottleneck_dim=16, **fields)


def draw_images(num_images: int = 4, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(0))


# PEFT


def train_adapter(model: nn.Module, compute_loss) -> list[float]:
    """Return the loss before each of four steps."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.005, weight_decay=0)
    losses = []
    for _ in range(4):
        losses.append(compute_loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    DINOForPreTraining(make_config(num_labels=3)).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft reads
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapter_of_classifier_trains_saves_and_merges(use_dora, checkpoint, tmp_path):
    base = DINOForImageClassification.from_pretrained(checkpoint)
    options = peft.LoraConfig(target_modules=["qkv", "o_proj"], modules_to_save=["classifier"], use_dora=use_dora)
    model = peft.get_peft_model(base, options)
    images, labels = draw_images(), torch.tensor([0, 1, 2, 1])
    losses = train_adapter(model, lambda: model(pixel_values=images, labels=labels).loss)
    assert losses[-1] < losses[0] - 0.1
    check_saved_and_merged(model.eval(), DINOForImageClassification, checkpoint, tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft reads
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapter_of_features_trains_saves_and_merges(use_dora, checkpoint, tmp_path):
    options = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["qkv", "fc1", "fc2"], use_dora=use_dora)
    model = peft.get_peft_model(DINOModel.from_pretrained(checkpoint), options)
    assert isinstance(model, peft.PeftModelForFeatureExtraction)
    images, targets = draw_images(), torch.randn(4, 32)
    losses = train_adapter(model, lambda: -(model(pixel_values=images).pooler_output * targets).mean())
    assert losses[-1] < losses[0] - 0.1
    check_saved_and_merged(model.eval(), DINOModel, checkpoint, tmp_path)


def check_saved_and_merged(model: peft.PeftModel, base_class: type, checkpoint, tmp_path) -> None:
    """Adapter and merged network are saved, and give the outputs of `model` when loaded; the base gives others."""
    with torch.no_grad():
        expected = model(pixel_values=draw_images())[0]
        model.save_pretrained(tmp_path / "adapter")
        base = base_class.from_pretrained(checkpoint).eval()
        assert not torch.allclose(base(draw_images())[0], expected, atol=1e-3)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(loaded(pixel_values=draw_images())[0], expected)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged, info = base_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(merged.eval()(draw_images())[0], expected, rtol=1e-4, atol=1e-5)


# Trainer


@pytest.fixture
def make_trainer(tmp_path):
    images, labels = draw_images(16), torch.arange(16) % 3
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]

    def make(name: str, **options) -> Trainer:
        torch.manual_seed(0)
        model = DINOForImageClassification(make_config(num_labels=3, drop_path_rate=0.2))
        arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
                     "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}  # fmt: skip
        args = TrainingArguments(output_dir=str(tmp_path / name), **arguments | options)
        return Trainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)

    return make


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_trainer_evaluates_while_it_trains(make_trainer):
    trainer = make_trainer("run", eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert len(logged(trainer, "loss")) == 6 and logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    rows = trainer.eval_dataset
    with torch.no_grad():
        logits = trainer.model.eval()(torch.stack([row["pixel_values"] for row in rows])).logits
    labels = torch.stack([row["labels"] for row in rows])
    assert len(logged(trainer, "eval_accuracy")) == 2
    assert logged(trainer, "eval_accuracy")[-1] == (logits.argmax(-1) == labels).float().mean().item()
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert logged(trainer, "eval_loss")[-1] == pytest.approx(expected, rel=1e-5)


def test_resumed_trainer_equals_an_uninterrupted_one(make_trainer, tmp_path):
    whole = make_trainer("whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_trainer_smooths_labels(make_trainer):
    trainer = make_trainer("run", label_smoothing_factor=0.1)
    batch = trainer.data_collator(trainer.train_dataset[:4])
    model = trainer.model.eval()
    expected = nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)
    trainer.train()
    assert len(logged(trainer, "loss")) == 6


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"bf16": True}, 0.02, id="bf16"),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, 1e-4, id="compiled", marks=pytest.mark.slow
        ),
    ],
)
def test_trainer_learns_the_same(options, tolerance, make_trainer):
    plain = make_trainer("plain")
    plain.train()
    other = make_trainer("other", **options)
    other.train()
    assert logged(other, "loss") == pytest.approx(logged(plain, "loss"), rel=tolerance)
    assert {parameter.dtype for parameter in other.model.parameters()} == {torch.float32}


# Dense heads


def make_dpt() -> nn.Module:
    backbone_config = make_config(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
    return DPTForDepthEstimation(DPTConfig(backbone_config=backbone_config, **sizes))


def make_depth_anything() -> nn.Module:
    backbone_config = make_config(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 32, "patch_size": 8, "neck_hidden_sizes": [8, 8, 16, 16],
             "fusion_hidden_size": 16, "head_hidden_size": 8}  # fmt: skip
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone_config, **sizes))


def make_upernet() -> nn.Module:
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "num_labels": 3}
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=make_config(out_indices=[1, 2, 3, 4]), **sizes)
    )


def make_mask2former() -> nn.Module:
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16,
             "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
             "num_queries": 5, "train_num_points": 16, "num_labels": 3}  # fmt: skip
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=make_config(out_indices=[1, 2, 3, 4]), **sizes)
    )


def make_detr() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
             "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
             "num_labels": 3}  # fmt: skip
    return DetrForObjectDetection(DetrConfig(backbone_config=make_config(), **sizes))


def masks() -> torch.Tensor:
    return (torch.arange(2 * 32 * 48) % 3).view(2, 32, 48)


DENSE = {
    "dpt": (make_dpt, {}),
    "depth_anything": (make_depth_anything, {}),
    "upernet": (make_upernet, {"labels": masks()}),
    "mask2former": (
        make_mask2former,
        {
            "mask_labels": [torch.stack([mask == kind for kind in range(3)]).float() for mask in masks()],
            "class_labels": [torch.arange(3)] * 2,
        },
    ),
    "detr": (
        make_detr,
        {"labels": [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}] * 2},
    ),
}


@pytest.mark.parametrize("head", DENSE)
def test_dense_head_trains_saves_and_loads_the_backbone(head, checkpoint, tmp_path):
    make, labels = DENSE[head]
    torch.manual_seed(0)
    model = make()
    [backbone] = [module for module in model.modules() if isinstance(module, DINOBackbone)]
    backbone.load_state_dict(DINOBackbone.from_pretrained(checkpoint).state_dict())
    images = draw_images(2)
    output = model.train()(images, **labels)
    loss = output.loss if labels else output.predicted_depth.square().mean()
    assert loss.isfinite()
    loss.backward()
    without_gradient = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without_gradient == []
    model.eval().save_pretrained(tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        for found, expected in zip(loaded(images).to_tuple(), model(images).to_tuple()):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
