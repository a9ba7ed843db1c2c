"""The classifier and the backbone of dense heads, against the original's numbers."""

import copy

import pytest
import torch

from modeling_dino import DINOBackbone, DINOForImageClassification, DINOForPreTraining, DINOModel

from .original import FIXTURES, our_names, recorded, tiny_config


@pytest.fixture(scope="module")
def weights():
    return our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True))


def classifier_of(weights, **config) -> DINOForImageClassification:
    model = DINOForImageClassification(tiny_config(num_labels=5, **config)).eval()
    model.dino.load_state_dict(weights)
    return model


def inputs_of_classifier(model: DINOForImageClassification, images: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("size", ["native", "local", "wide", "large"])
def test_intermediate_layers_are_the_originals(weights, size):
    model = DINOModel(tiny_config()).eval()
    model.load_state_dict(weights)
    expected = recorded("backbone_io")
    with torch.no_grad():
        layers = model.get_intermediate_layers(expected[f"{size}.pixel_values"], 2)
    assert len(layers) == 2
    for number, tokens in zip((1, 2), layers):
        torch.testing.assert_close(tokens, expected[f"{size}.normed_hidden.{number}"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="from 1 to the network's 3 blocks, got 4"):
        model.get_intermediate_layers(expected["native.pixel_values"], 4)


def test_inputs_of_the_linear_classifier_are_the_originals(weights):
    expected = recorded("linear_inputs")
    for layout, config in {
        "cls_last2_concat": {"n_last_blocks": 2},
        "cls_avgpool_interleaved": {"n_last_blocks": 1, "avgpool_patchtokens": True, "interleave_features": True},
    }.items():
        with torch.no_grad():
            features = inputs_of_classifier(classifier_of(weights, **config), expected["pixel_values"])
        torch.testing.assert_close(features, expected[layout], rtol=0, atol=1e-5)


def test_average_follows_the_cls_tokens_without_interleaving(weights):
    images = recorded("backbone_io")["native.pixel_values"]
    model = classifier_of(weights, n_last_blocks=2, avgpool_patchtokens=True)
    with torch.no_grad():
        features, layers = inputs_of_classifier(model, images), model.dino.get_intermediate_layers(images, 2)
    cls_second, cls_last, mean = features.split(48, dim=1)
    assert torch.equal(cls_second, layers[0][:, 0]) and torch.equal(cls_last, layers[1][:, 0])
    assert torch.equal(mean, layers[1][:, 1:].mean(1))


def test_loss_is_the_cross_entropy_of_the_labels(weights):
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 4, 2, 2])
    output = classifier_of(weights, n_last_blocks=1)(images, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("reloaded", [False, True])
def test_frozen_backbone_does_not_learn(weights, reloaded, tmp_path):
    """Also after `from_pretrained`, which makes every parameter trainable, and also what `train()` would switch on."""
    model = classifier_of(weights, n_last_blocks=1, freeze_backbone=True, drop_path_rate=0.9)
    if reloaded:
        model.save_pretrained(tmp_path)
        model = DINOForImageClassification.from_pretrained(tmp_path)
    model.train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"classifier.weight", "classifier.bias"}
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 4, 2, 2])
    before, optimizer = copy.deepcopy(model.dino.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.dino.state_dict().items())
    assert torch.equal(model(images).logits, model(images).logits)  # no path is dropped


def test_fine_tuning_reaches_every_parameter(weights):
    model = classifier_of(weights, n_last_blocks=2).train()
    model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 4, 2, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_classifier_starts_as_the_originals_does():
    model = DINOForImageClassification(tiny_config(num_labels=1000, n_last_blocks=3))
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_last_blocks": 4}, "n_last_blocks must be at most the network's 3 blocks, got 4"),
        ({"n_last_blocks": 2, "avgpool_patchtokens": True, "interleave_features": True}, "n_last_blocks = 1"),
        ({"n_last_blocks": 1, "interleave_features": True}, "interleave_features needs avgpool_patchtokens"),
    ],
)
def test_layout_that_does_not_exist_is_an_error(config, message):
    with pytest.raises(Exception) as error:
        DINOForImageClassification(tiny_config(**config))
    assert message in str(error.value.__cause__ or error.value)


def test_feature_maps_are_normed_patch_tokens_in_their_places(weights):
    expected = recorded("backbone_io")
    model = DINOBackbone(tiny_config(out_indices=[1, 3])).eval()
    model.dino.load_state_dict(weights)
    with torch.no_grad():
        output = model(expected["wide.pixel_values"])
    height, width = (side // 8 for side in expected["wide.pixel_values"].shape[-2:])
    assert height != width and model.out_features == ["stage1", "stage3"] and model.channels == [48, 48]
    for feature_map, block in zip(output.feature_maps, (0, 2), strict=True):
        tokens = expected[f"wide.normed_hidden.{block}"][:, 1:]
        for row, column in ((0, 0), (0, width - 1), (height - 1, 0)):
            torch.testing.assert_close(
                feature_map[:, :, row, column], tokens[:, row * width + column], rtol=0, atol=1e-5
            )


def test_feature_maps_of_a_saved_checkpoint(weights, tmp_path):
    backbone = DINOModel(tiny_config()).eval()
    backbone.load_state_dict(weights)
    backbone.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        [feature_map] = DINOBackbone.from_pretrained(tmp_path)(images).feature_maps
        tokens = backbone(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens, rtol=0, atol=1e-6)


def test_classifier_shows_hidden_states_and_attentions_when_asked(weights):
    model, images = classifier_of(weights, n_last_blocks=1), torch.randn(2, 3, 32, 32)
    model.set_attn_implementation("eager")
    output = model(images, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and [a.shape for a in output.attentions] == [(2, 3, 17, 17)] * 3
    assert model(images).hidden_states is None and not model(images).attentions


def test_every_parameter_is_initialised_and_frozen_gain_stays_frozen(tmp_path):
    """Filled with NaN first, so that one that nothing initialises shows."""
    model = DINOForPreTraining(tiny_config())
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path)
    loaded = DINOForPreTraining.from_pretrained(tmp_path)
    assert "head.last_layer.weight_g" not in dict(loaded.named_parameters())
    assert torch.equal(loaded.head.last_layer.weight_g, torch.ones(96, 1))


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_exports():
    images = torch.randn(2, 3, 32, 32)
    model = DINOModel(tiny_config()).eval()
    with torch.no_grad():
        expected = model(images).pooler_output
        compiled = torch.compile(model, fullgraph=True)(images).pooler_output
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        more = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(exported.module()(more).pooler_output, model(more).pooler_output, rtol=0, atol=1e-6)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # by the newest releases only
def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = DINOForPreTraining(tiny_config()).train()
    crops = [torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 16)]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(crops).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients))
