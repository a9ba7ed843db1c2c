"""What transformers, PEFT, Trainer and torch expect of a model, of ours."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, Trainer, TrainingArguments

from modeling_dino import DINOBackbone, DINOConfig, DINOForImageClassification, DINOForPreTraining, DINOModel
from modeling_dino.image_processing_dino import PILLOW_MODES, make_image_processor
from training.fused_loss import fused_cross_entropy
from training.loss import DINOLoss

from .original import tiny_config


pytestmark = pytest.mark.usefixtures("accelerate_restored")
CLASSES = [DINOModel, DINOForPreTraining, DINOForImageClassification, DINOBackbone]
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def images(batch: int = 2, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_class", CLASSES)
def test_masks_may_be_none_and_nothing_else(model_class):
    model = model_class(tiny_config(n_last_blocks=2)).eval()
    # the arguments that PEFT passes for feature extraction
    output = model(images(), attention_mask=None, input_ids=None, inputs_embeds=None, output_attentions=None)
    expected = model(images())
    assert all(torch.equal(a, b) for a, b in zip(output.to_tuple(), expected.to_tuple()) if torch.is_tensor(a))
    for name in ("attention_mask", "head_mask", "bool_masked_pos"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            model(images(), **{name: torch.ones(2, 17)})


def test_other_networks_take_masks_of_none():
    model = DINOModel(DINOConfig(backbone_config=RESNET)).eval()
    expected = model(images()).pooler_output
    assert torch.equal(model(images(), attention_mask=None, output_hidden_states=None).pooler_output, expected)


def test_other_networks_refuse_hidden_states_of_the_config():
    model = DINOModel(DINOConfig(backbone_config=RESNET | {"output_hidden_states": True}))
    with pytest.raises(ValueError, match="output_hidden_states is for DINO's own Vision Transformer"):
        model(images())


@pytest.mark.parametrize("crops", ["tensor", "list"])
def test_pretraining_model_returns_hidden_states_and_attentions(crops):
    model = DINOForPreTraining(tiny_config(attn_implementation="eager")).eval()
    expected = model.dino(images(4), output_hidden_states=True, output_attentions=True)
    given = images(4) if crops == "tensor" else list(images(4).split(2))
    output = model(given, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    for found, wanted in zip(output.hidden_states + output.attentions, expected.hidden_states + expected.attentions):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(output.logits, model(images(4)).logits)
    assert model(images(4)).hidden_states is None

    model.config.output_hidden_states = True
    assert len(model(given).hidden_states) == 4
    with pytest.raises(ValueError, match="are for crops of one size, got 2 sizes"):
        model([images(), images(height=16, width=16)])


@pytest.mark.parametrize("model_class", CLASSES)
def test_selected_hidden_states_are_kept_alone(model_class):
    selected = pytest.importorskip("transformers.utils.output_capturing").__dict__.get("selected_hidden_states")
    if selected is None:
        pytest.skip("this transformers does not select hidden states")
    model = model_class(tiny_config(n_last_blocks=2)).eval()
    every = model(images(), output_hidden_states=True).hidden_states
    chosen = model(images(), output_hidden_states=[0, -1]).hidden_states
    assert [tokens is None for tokens in chosen] == [False, True, True, False]
    assert torch.equal(chosen[0], every[0]) and torch.equal(chosen[-1], every[-1])


def test_backbone_gives_tokens_where_dense_heads_reshape_them():
    model = DINOBackbone(tiny_config(out_indices=[0, 1, 3], reshape_hidden_states=False)).eval()
    maps = DINOBackbone(tiny_config(out_indices=[0, 1, 3])).eval()
    maps.load_state_dict(model.state_dict())
    pixel_values = images(height=32, width=48)
    hidden_states = model.dino(pixel_values, output_hidden_states=True).hidden_states
    for number, tokens, grid in zip([0, 1, 3], model(pixel_values).feature_maps, maps(pixel_values).feature_maps):
        assert tokens.shape == (2, 1 + 4 * 6, 48)
        assert torch.equal(tokens, model.dino.layernorm(hidden_states[number]))
        assert torch.equal(grid.flatten(2).transpose(1, 2), tokens[:, 1:])


@pytest.mark.parametrize("model_class", CLASSES)
def test_fresh_models_compile_without_graph_breaks(model_class):
    model = model_class(tiny_config(n_last_blocks=2)).eval()
    with torch.no_grad():
        output = torch.compile(model, fullgraph=True, backend="eager")(images())
        expected = model(images())
    for found, wanted in zip(output.to_tuple(), expected.to_tuple()):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("position_interpolation", ["scale_factor", "size"])
@pytest.mark.parametrize("model_class", [DINOModel, DINOForImageClassification, DINOBackbone])
def test_exported_models_take_any_size(model_class, position_interpolation):
    config = tiny_config(n_last_blocks=2, position_interpolation=position_interpolation, return_dict=True)
    model = model_class(config).eval()
    nn.init.normal_((model if model_class is DINOModel else model.dino).embeddings.position_embeddings)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}}
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": images(3, 40, 56)}, dynamic_shapes=shapes)
        for pixel_values in (images(), images(1, 16, 64), images(4, 120, 88)):
            found, expected = program.module()(pixel_values=pixel_values), model(pixel_values)
            for name, wanted in expected.items():
                torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_export_resamples_in_fp32_whatever_the_default_dtype(dtype):
    config = tiny_config(image_size=224)
    model = DINOModel(config).eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    dynamic, small = torch.export.Dim.DYNAMIC, images(2, 40, 56)
    shapes = {"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}}
    try:
        torch.set_default_dtype(dtype)
        with torch.no_grad():
            program = torch.export.export(model, (), {"pixel_values": small}, dynamic_shapes=shapes)
    finally:
        torch.set_default_dtype(torch.float32)
    pixel_values = images(1, 8 * 37, 8 * 41)
    with torch.no_grad():
        found, expected = program.module()(pixel_values=pixel_values)[0], model(pixel_values)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_crops", [0, 1])
def test_loss_of_less_than_two_crops_is_refused(num_crops):
    dino_loss, logits = DINOLoss(8), torch.randn(max(num_crops, 1) * 2, 8)
    with pytest.raises(ValueError, match=f"num_crops must be at least 2.*got {num_crops}"):
        dino_loss(logits, logits, 0.04, num_crops)
    head = DINOForPreTraining(tiny_config()).head
    targets = torch.softmax(torch.randn(2, head.last_layer.weight_v.shape[0]), dim=-1)
    with pytest.raises(ValueError, match=f"num_crops must be at least 2.*got {num_crops}"):
        fused_cross_entropy(
            torch.randn(2, head.last_layer.weight_v.shape[1]), head.last_layer, targets, num_crops, 0.1
        )


def test_loss_of_more_teacher_than_student_crops_is_refused():
    with pytest.raises(ValueError, match="teacher rows a multiple of the batch, at most num_crops times, got 4 and 6"):
        DINOLoss(8)(torch.randn(4, 8), torch.randn(6, 8), 0.04, 2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft reads
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_in_a_frozen_backbone_train(use_dora):
    peft = pytest.importorskip("peft", reason="peft is an optional package")
    torch.manual_seed(0)
    model = DINOForImageClassification(tiny_config(num_labels=3, freeze_backbone=True, n_last_blocks=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(
        target_modules=["qkv"], modules_to_save=["classifier"], use_dora=use_dora, lora_dropout=0.5
    )
    tuned = peft.get_peft_model(model, config).train()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert sum("lora_A" in name for name in trained) == 3 and not any("base_layer" in name for name in trained)
    dropouts = [module for name, module in tuned.named_modules() if name.endswith("lora_dropout.default")]
    assert len(dropouts) == 3 and all(dropout.training for dropout in dropouts)
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), 0.1)
    for _ in range(2):  # B is zero at first, and A then has no gradient
        tuned(images(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for name, parameter in tuned.named_parameters() if "lora_A" in name)
    merged = tuned.merge_and_unload().train().state_dict()
    assert not torch.equal(merged["dino.layers.0.attention.qkv.weight"], before["dino.layers.0.attention.qkv.weight"])
    assert torch.equal(merged["dino.layers.0.mlp.fc1.weight"], before["dino.layers.0.mlp.fc1.weight"])


FROZEN_NETWORKS = {
    "vit": {"drop_path_rate": 0.9},
    "swin": {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 1], "drop_path_rate": 0.9},
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "drop_path_rate": 0.9},
    "vit_of_transformers": {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                            "image_size": 32, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
}  # fmt: skip
ADAPTED = {"vit": "fc1", "swin": "query|q_proj", "dinov2": "fc1", "vit_of_transformers": "fc1"}


def run_and_measure(model: nn.Module, **inputs):
    """Return the output of a forward pass, and how many bytes autograd keeps for the backward pass."""
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**inputs)
    return output, sum(kept.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft reads
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # by the newest releases only
@pytest.mark.parametrize("network", FROZEN_NETWORKS)
def test_gradient_checkpointing_saves_memory_of_adapters_in_a_frozen_backbone(network):
    """What autograd keeps shrinks; outputs and gradients are those without it, and nothing is dropped."""
    peft = pytest.importorskip("peft", reason="peft is an optional package")
    fields = FROZEN_NETWORKS[network]
    if network != "vit":
        fields = {"backbone_config": {"model_type": network} | fields}
    torch.manual_seed(0)
    model = DINOForImageClassification(tiny_config(num_labels=3, freeze_backbone=True, n_last_blocks=2, **fields))
    config = peft.LoraConfig(target_modules=rf".*({ADAPTED[network]})", init_lora_weights=False)
    tuned, kept, gradients, logits = peft.get_peft_model(model, config), [], [], []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.train()
        output, num_bytes = run_and_measure(tuned, pixel_values=images(4), labels=torch.tensor([0, 2, 1, 1]))
        output.loss.backward()
        kept.append(num_bytes)
        logits.append(output.logits)
        gradients.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
        tuned.zero_grad()
    assert kept[1] < 0.8 * kept[0]
    with torch.no_grad():
        expected = tuned.eval()(images(4)).logits
    assert not any(module.training for module in tuned.modules())
    for found in logits:
        torch.testing.assert_close(found, expected)
    assert gradients[0].keys() == gradients[1].keys() and all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_frozen_backbone_is_thawed_as_its_docstring_says():
    model = DINOForImageClassification(tiny_config(num_labels=3, freeze_backbone=True, n_last_blocks=2))
    [code] = [part for part in DINOForImageClassification.__doc__.split("```")[1::2] if "freeze_backbone" in part]
    exec(inspect.cleandoc(code.removeprefix("python")), {"model": model})
    assert all(module.training for module in model.modules())
    model(images(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_replaced_modules_of_a_frozen_backbone_stay_frozen():
    config = DINOConfig(backbone_config=RESNET, freeze_backbone=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(DINOForImageClassification(config)).train()
    assert model.classifier.training and not any(module.training for module in model.dino.modules())
    model.dino = DINOModel(config)
    trained = {name for name, parameter in model.train().named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_accumulated_losses_of_trainer_equal_those_of_one_batch(tmp_path, problem_type):
    rng = torch.Generator().manual_seed(1)
    labels = {
        "single_label_classification": torch.randint(3, (8,), generator=rng),
        "multi_label_classification": torch.randint(2, (8, 3), generator=rng).float(),
        "regression": torch.randn(8, 3, generator=rng),
    }[problem_type]
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images(8), labels)]
    weights = []
    for num_accumulated in (1, 4):
        torch.manual_seed(0)
        model = DINOForImageClassification(
            tiny_config(num_labels=3, problem_type=problem_type, n_last_blocks=2, drop_path_rate=0.0)
        )
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8 // num_accumulated, use_cpu=True,
            gradient_accumulation_steps=num_accumulated, optim="sgd", learning_rate=0.1, report_to=[],
            save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
            logging_strategy="no",
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # by the newest releases only
@pytest.mark.parametrize("model_class", [DINOModel, DINOForPreTraining, DINOForImageClassification])
def test_gradient_checkpointing_is_supported_where_the_network_does(model_class):
    assert model_class(tiny_config(n_last_blocks=1)).supports_gradient_checkpointing
    model = model_class(DINOConfig(backbone_config=RESNET, out_dim=8, head_hidden_dim=8, head_bottleneck_dim=4))
    assert (
        model.supports_gradient_checkpointing is AutoModel.from_config(ResNetConfig()).supports_gradient_checkpointing
    )
    assert not model.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
        model.gradient_checkpointing_enable()


def test_image_size_may_be_height_and_width(tmp_path):
    config = tiny_config(image_size=(32, 48))
    model = DINOModel(config).eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    assert model.embeddings.position_embeddings.shape == (1, 1 + 4 * 6, 48)
    assert model.embeddings.interpolate_pos_encoding(4, 6) is model.embeddings.position_embeddings
    model.save_pretrained(tmp_path)
    loaded = DINOModel.from_pretrained(tmp_path).eval()
    for height, width in ((32, 48), (48, 32)):
        assert torch.equal(loaded(images(1, height, width))[0], model(images(1, height, width))[0])
    stored = model.embeddings.position_embeddings[0, 1:].detach().unflatten(0, (4, 6)).permute(2, 0, 1)[None]
    expected = nn.functional.interpolate(stored, scale_factor=(5.1 / 4, 3.1 / 6), mode="bicubic")
    found = loaded.embeddings.interpolate_pos_encoding(5, 3)[:, 1:]
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))

    processor = make_image_processor(config.image_size)
    for height, width in ((100, 200), (200, 100)):
        pixels = processor(torch.full((3, height, width), 255, dtype=torch.uint8).numpy(), return_tensors="pt")
        assert pixels.pixel_values.shape == (1, 3, 32, 48)
        assert (pixels.pixel_values > 1).all()  # nothing is padded with black


def covering_crop(image: Image.Image, height: int, width: int, crop_pct: float) -> np.ndarray:
    """By Pillow alone: the side that decides becomes that of the crop over crop_pct; then its center."""
    tall, wide = round(height / crop_pct), round(width / crop_pct)
    if tall * image.width >= wide * image.height:  # the image is the wider one
        wide = max(wide, round(image.width * tall / image.height))
    else:
        tall = max(tall, round(image.height * wide / image.width))
    top, left = (tall - height) // 2, (wide - width) // 2
    resized = image.resize((wide, tall), Image.Resampling.BICUBIC)
    cropped = resized.crop((left, top, left + width, top + height))
    return np.atleast_3d(cropped).transpose(2, 0, 1) / np.float32(255)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("num_channels", [1, 3, 4, 5])
def test_rectangular_crops_are_covered_as_square_ones_are(num_channels, crop_pct, tmp_path):
    """Published or not, in scientific images too: all of an image of that aspect ratio but the border is seen."""
    processor = make_image_processor((56, 40), num_channels, [0.0], [1.0], crop_pct)
    deep = make_image_processor((56, 40), num_channels, [0.0], [1.0], crop_pct, is_deep=True)
    processor.save_pretrained(tmp_path)
    published = [AutoImageProcessor.from_pretrained(tmp_path, backend=backend) for backend in ("pil", "torchvision")]
    rng = np.random.default_rng(0)
    for height, width in ((112, 80), (80, 112), (90, 90), (30, 200), (57, 40)):
        pixels = rng.integers(64, 192, (num_channels, height, width), dtype=np.uint8)  # so that none is clipped
        pixels[3:4] = 255  # Pillow weights colors by alpha
        planes = [covering_crop(Image.fromarray(plane), 56, 40, crop_pct) for plane in pixels]
        expected, apart = np.concatenate(planes), 2e-7 if num_channels < 5 else 1.5 / 255  # 5 are not Pillow's
        for each in (processor, *published):
            found = each([pixels], input_data_format="channels_first", return_tensors="np").pixel_values[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=apart)
        np.testing.assert_allclose(deep(pixels, return_tensors="np").pixel_values[0], expected, rtol=0, atol=1.5 / 255)
        if num_channels != 5:
            image = Image.fromarray(pixels.transpose(1, 2, 0).squeeze(), PILLOW_MODES[num_channels])
            assert np.array_equal(processor(image, return_tensors="np").pixel_values[0], found)
    rows, columns = np.mgrid[0:1:112j, 0:1:80j]  # where a pixel is in its image
    places = np.stack([rows, columns, rows, np.ones_like(rows), columns])[:num_channels]
    seen = processor([(255 * places).astype(np.uint8)], input_data_format="channels_first", return_tensors="np")
    for plane in seen.pixel_values[0][:3]:
        assert np.ptp(plane) == pytest.approx(crop_pct, abs=0.03)


@pytest.mark.parametrize("image_size", [(32,), (32, 40, 48), (0, 32), (32, 36), 0])
def test_impossible_image_sizes_are_refused(image_size):
    with pytest.raises(Exception, match="image_size"):
        tiny_config(image_size=image_size)
