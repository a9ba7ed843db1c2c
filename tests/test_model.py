import json
import math
import weakref

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForPreTraining
from transformers.integrations import flash_attention

from evaluation.attention import cls_attention
from modeling_dino import DINOConfig, DINOForPreTraining, DINOModel
from modeling_dino.command_line import CONFIGS

from .original import FIXTURES, our_names, recorded, tiny_config


@pytest.fixture(scope="module")
def original_backbone():
    model = DINOModel(tiny_config()).eval()
    model.load_state_dict(our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True)))
    return model


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("size", ["native", "local", "wide", "large"])
def test_outputs_equal_the_originals(original_backbone, size, attn_implementation):
    original_backbone.set_attn_implementation(attn_implementation)
    expected = recorded("backbone_io")
    with torch.no_grad():
        output = original_backbone(
            expected[f"{size}.pixel_values"],
            output_hidden_states=True,
            output_attentions=attn_implementation == "eager",
        )
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(output.pooler_output, expected[f"{size}.cls"], **close)
    torch.testing.assert_close(output.last_hidden_state[:, 0], output.pooler_output, rtol=0, atol=0)
    for i, hidden_states in enumerate(output.hidden_states[1:]):
        normed = original_backbone.layernorm(hidden_states)
        torch.testing.assert_close(normed, expected[f"{size}.normed_hidden.{i}"], **close)
    if attn_implementation == "eager":
        torch.testing.assert_close(output.attentions[-1], expected[f"{size}.last_attention"], **close)


@pytest.mark.slow  # flex attention compiles itself
@pytest.mark.parametrize("size", ["native", "wide"])
def test_flex_attention_computes_the_same(original_backbone, size):
    original_backbone.set_attn_implementation("flex_attention")
    expected = recorded("backbone_io")
    with torch.no_grad():
        output = original_backbone(expected[f"{size}.pixel_values"])
    torch.testing.assert_close(output.pooler_output, expected[f"{size}.cls"], rtol=0, atol=1e-5)


def test_flash_attention_is_given_what_it_needs(original_backbone, monkeypatch):
    """Its kernel runs on GPUs only; here all of transformers' path to it runs, and a kernel that follows its rules."""
    calls = []

    def kernel(query, key, value, attention_mask, query_length, is_causal, dropout, softmax_scale, **kwargs):
        calls.append((attention_mask, query_length, is_causal, dropout))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # tokens come before heads
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
        return attended.transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    AttentionInterface.register("double_of_its_kernel", flash_attention.flash_attention_forward)
    original_backbone.set_attn_implementation("double_of_its_kernel")
    expected = recorded("backbone_io")
    with torch.no_grad():
        output = original_backbone(expected["native.pixel_values"])
    assert calls == [(None, 17, False, 0.0)] * 3
    torch.testing.assert_close(output.pooler_output, expected["native.cls"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", ["native", "wide"])
def test_attention_maps_are_what_cls_looks_at_in_the_original(original_backbone, size):
    original_backbone.set_attn_implementation("sdpa")
    expected = recorded("backbone_io")
    pixel_values = expected[f"{size}.pixel_values"]
    maps = cls_attention(original_backbone, pixel_values)
    rows, columns = (side // 8 for side in pixel_values.shape[-2:])
    assert maps.shape == (len(pixel_values), 3, rows, columns)
    flat = expected[f"{size}.last_attention"][:, :, 0, 1:]  # of CLS, to all but itself
    for row in range(rows):
        torch.testing.assert_close(maps[:, :, row], flat[:, :, row * columns : (row + 1) * columns], rtol=0, atol=1e-6)
    assert original_backbone.config._attn_implementation == "sdpa"


def test_interpolation_by_size_is_the_one_of_transformers_vit():
    from transformers import ViTConfig, ViTModel

    model = DINOModel(tiny_config(position_interpolation="size"))
    vit = ViTModel(ViTConfig(hidden_size=48, num_attention_heads=3, image_size=32, patch_size=8, num_hidden_layers=1))
    vit.embeddings.position_embeddings.data.copy_(model.embeddings.position_embeddings)
    expected = vit.embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 5 * 3, 48), 40, 24)
    torch.testing.assert_close(model.embeddings.interpolate_pos_encoding(5, 3), expected)
    assert not torch.allclose(DINOModel(tiny_config()).embeddings.interpolate_pos_encoding(5, 3), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("vit_tiny_patch16", 5_524_416),
        ("vit_small_patch16", 21_665_664),
        ("vit_small_patch8", 21_670_272),
        ("vit_base_patch16", 85_798_656),
        ("vit_base_patch8", 85_807_872),
    ],
)
def test_model_jsons_have_the_papers_sizes(name, num_parameters):
    config = DINOConfig(**json.loads((CONFIGS / "models" / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = DINOModel(config)
    assert model.num_parameters() == num_parameters
    assert config.out_dim == 65536 and config.layer_norm_eps == 1e-6 and config.drop_path_rate == 0.1


def test_head_of_vit_small_has_the_originals_number_of_parameters():
    with torch.device("meta"):
        model = DINOForPreTraining(DINOConfig(norm_last_layer=False))
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 22_352_128


def test_initialisation_is_the_originals():
    model = DINOForPreTraining(DINOConfig(num_hidden_layers=2, out_dim=1000, norm_last_layer=False))
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if name.endswith("projection.weight"):  # PyTorch's default for a convolution
            bound = 1 / math.sqrt(parameter[0].numel())
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        elif name.endswith("projection.bias"):
            assert 0 < parameter.abs().max() <= 1 / math.sqrt(3 * 16 * 16)
        elif name.endswith("weight_v"):  # PyTorch's default for a linear layer
            assert parameter.abs().max() <= 1 / 16
            assert parameter.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.05)
        elif name.endswith("weight_g") or "layernorm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_from_pretrained_initialises_what_a_checkpoint_lacks(tmp_path):
    """A backbone opened for pretraining gets a head; all of it must be initialised, buffers too."""
    config = tiny_config(use_bn_in_head=True)
    DINOModel(config).save_pretrained(tmp_path)
    model = DINOForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(model.head.last_layer.weight_g, torch.ones(96, 1))
    assert 0 < model.head.last_layer.weight_v.abs().max() <= 1 / math.sqrt(24)
    assert model.head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.head.mlp[1].running_var, torch.ones(64))
    assert torch.equal(model.head.mlp[1].running_mean, torch.zeros(64))


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_gain_is_frozen_only_when_it_should_be_also_after_loading(tmp_path, norm_last_layer):
    DINOForPreTraining(tiny_config(norm_last_layer=norm_last_layer)).save_pretrained(tmp_path)
    model = DINOForPreTraining.from_pretrained(tmp_path)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ("head.last_layer.weight_g" in trainable) != norm_last_layer
    assert "head.last_layer.weight_g" in model.state_dict()


def test_auto_classes_open_a_checkpoint_and_find_its_backbone(tmp_path):
    saved = DINOForPreTraining(tiny_config()).eval()
    saved.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DINOConfig
    assert torch.equal(AutoModelForPreTraining.from_pretrained(tmp_path)(images).logits, saved(images).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is DINOModel
    assert torch.equal(backbone(images).pooler_output, saved.dino(images).pooler_output)


def test_list_of_crops_gives_crop_major_logits():
    model = DINOForPreTraining(tiny_config()).eval()
    crops = [torch.randn(2, 3, size, size) for size in (32, 32, 16, 16, 16)]
    one_by_one = torch.cat([model(crop).logits for crop in crops])
    torch.testing.assert_close(model(crops).logits, one_by_one)
    by_resolution = [torch.cat(crops[:2]), torch.cat(crops[2:])]
    torch.testing.assert_close(model(by_resolution).logits, one_by_one)
    assert model(crops, return_dict=False)[0].shape == (10, 96)


def test_crops_of_equal_width_and_other_height_are_told_apart():
    model = DINOForPreTraining(tiny_config()).eval()
    assert model([torch.randn(2, 3, 32, 16), torch.randn(2, 3, 16, 16)]).logits.shape == (4, 96)


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    model = DINOModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.4))
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    drop_path = model.layers[-1].drop_path
    dropped = drop_path(torch.ones(20_000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))  # whole samples
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop_path.eval()(torch.ones(8, 2, 3)), torch.ones(8, 2, 3))


def test_parts_have_the_names_of_the_paper_when_printed():
    printed = str(DINOForPreTraining(tiny_config()))
    for part in (
        "(dino): DINOModel(", "(patch_embeddings): DINOPatchEmbeddings(", "(0-2): 3 x DINOLayer(",
        "(attention): DINOAttention(", "(mlp): DINOMLP(", "(drop_path): DINODropPath(drop_prob=0.000)",
        "(head): DINOHead(", "(last_layer): DINOPrototypes(24, 96, frozen_gain=True)",
    ):  # fmt: skip
        assert part in printed, part


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32.5}, "expected int, got float"),
        ({"image_size": 30}, "image_size must be a multiple of patch_size, got 30 and 8"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 48 and 5"),
        ({"position_interpolation": "cubic"}, "'scale_factor' or 'size', got 'cubic'"),
        ({"out_dim": 0}, "out_dim must be at least 1, got 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
    ],
)
def test_config_refuses_what_cannot_be(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 1, 32, 32), "takes images of 3 channels, got 1"), ((1, 3, 30, 32), "multiples of 8, got 30x32")],
)
def test_model_refuses_images_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        DINOModel(tiny_config())(torch.zeros(shape))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_cls_alone_is_what_it_is_among_all_tokens(attn_implementation, is_checkpointed, qkv_bias):
    """Through the gradients of all parameters, while paths are dropped."""
    torch.manual_seed(0)
    model = DINOModel(tiny_config(drop_path_rate=0.5, qkv_bias=qkv_bias)).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation(attn_implementation)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    images = torch.randn(5, 3, 32, 24, dtype=torch.float64)
    results = []
    for cls_only in (False, True):
        torch.manual_seed(1)
        output = model(images, cls_only=cls_only)
        gradients = torch.autograd.grad(output.pooler_output.sin().sum(), list(model.parameters()))
        results.append((output.pooler_output, *gradients))
        assert output.last_hidden_state.shape[1] == (1 if cls_only else 1 + 4 * 3)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_network_whose_weights_are_in_bf16_trains(attn_implementation):
    torch.manual_seed(0)
    model = DINOModel(tiny_config(num_hidden_layers=3, drop_path_rate=0.5)).to(torch.bfloat16).train()
    model.set_attn_implementation(attn_implementation)
    output = model(torch.randn(4, 3, 32, 24, dtype=torch.bfloat16))
    output.pooler_output.float().square().sum().backward()
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_eager_attention_tells_shapes_on_the_meta_device():
    with torch.device("meta"):
        model = DINOModel(tiny_config(attn_implementation="eager"))
        assert model(torch.zeros(2, 3, 32, 24)).last_hidden_state.shape == (2, 1 + 4 * 3, model.config.hidden_size)


def test_dropped_paths_are_drawn_as_the_original_draws_them():
    """A block's two branches, one after the other: floor(keep + U[0, 1)) of each sample, over keep."""
    model = DINOModel(tiny_config(num_hidden_layers=2, drop_path_rate=0.4)).train()
    torch.nn.init.normal_(model.layers[1].attention.o_proj.bias)
    tokens = torch.randn(64, 5, model.config.hidden_size)
    block = model.layers[1]
    torch.manual_seed(3)
    actual = block(tokens)
    torch.manual_seed(3)
    scales = [torch.floor(0.6 + torch.rand(64, 1, 1)) / 0.6 for _ in range(2)]
    assert all(0 < (scale == 0).sum() < 64 for scale in scales)
    expected = tokens + block.attention(block.layernorm_before(tokens))[0] * scales[0]
    expected = expected + block.mlp(block.layernorm_after(expected)) * scales[1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_training_does_not_keep_activations_and_has_the_same_gradients():
    """Bit for bit; what goes into fc2 is gone until the backward pass."""
    torch.manual_seed(0)
    model = DINOModel(tiny_config(num_hidden_layers=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 3, 32, 24)
    results, kept, given = [], [], []
    for layer in model.layers:
        layer.mlp.fc2.register_forward_pre_hook(lambda _, inputs: given.append(weakref.ref(inputs[0])))
    for is_training in (False, True):
        given.clear()
        output = model.train(is_training)(images).pooler_output
        kept.append([tensor() is not None for tensor in given])
        results.append((output, *torch.autograd.grad(output.sin().sum(), list(model.parameters()))))
    assert kept == [[True, True], [False, False]]
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_training_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model = DINOModel(tiny_config()).train()
    images, parameters = torch.randn(2, 3, 32, 32), list(model.parameters())
    expected, ours = (
        torch.autograd.grad(run(images).pooler_output.sin().sum(), parameters)
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    )
    for gradient, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, its, rtol=1e-4, atol=1e-6)
