"""What users of transformers do with a checkpoint: auto classes and pipelines, with our package and without it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoProcessor,
    ViTImageProcessorPil,
    pipeline,
)

from modeling_dino import DINOBackbone, DINOConfig, DINOForImageClassification, DINOForPreTraining, DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .original import tiny_config
from .without_package import run_without_package


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pretraining checkpoint with an image processor, two blocks for the classifier, three classes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = tiny_config(n_last_blocks=2, num_labels=3)
    DINOForPreTraining(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, do_convert_rgb=True).save_pretrained(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def outputs(folder, images: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """What every auto class makes of a checkpoint."""
    with torch.no_grad():
        torch.manual_seed(1)
        classifier = AutoModelForImageClassification.from_pretrained(folder, **options)
        torch.manual_seed(1)
        torch.nn.init.normal_(classifier.classifier.weight)  # which the checkpoint does not have
        return {
            "features": AutoModel.from_pretrained(folder, **options)(images).last_hidden_state,
            "logits": AutoModelForPreTraining.from_pretrained(folder, **options)(images).logits,
            "classes": classifier(images).logits,
        }


def test_auto_classes_find_ours(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is DINOConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is DINOModel
    assert type(AutoModelForPreTraining.from_pretrained(checkpoint)) is DINOForPreTraining
    assert type(AutoModelForImageClassification.from_pretrained(checkpoint)) is DINOForImageClassification
    assert type(AutoBackbone.from_config(AutoConfig.from_pretrained(checkpoint))) is DINOBackbone
    assert AutoImageProcessor.from_pretrained(checkpoint, backend="pil").size == {"height": 32, "width": 32}


WITHOUT_PACKAGE = """
import torch
from transformers import *
folder, images = sys.argv[1], torch.load(sys.argv[2])
trust = {"trust_remote_code": True}
torch.manual_seed(1)
classifier = AutoModelForImageClassification.from_pretrained(folder, **trust)
torch.manual_seed(1)
torch.nn.init.normal_(classifier.classifier.weight)
model = AutoModel.from_pretrained(folder, **trust)
with torch.no_grad():
    outputs = {
        "features": model(images).last_hidden_state,
        "logits": AutoModelForPreTraining.from_pretrained(folder, **trust)(images).logits,
        "classes": classifier(images).logits,
    }
    backbone = AutoBackbone.from_config(model.config, **trust)
    outputs["map"] = backbone(images).feature_maps[-1]
extract = pipeline("image-feature-extraction", folder, **trust)
outputs["pooled"] = torch.tensor(extract(folder + "/image.png", pool=True)[0])
torch.save(outputs, sys.argv[2])
model.save_pretrained(sys.argv[3])  # as a consumer who changed it
AutoModelForPreTraining.from_pretrained(folder, **trust).save_pretrained(sys.argv[4])
"""


@pytest.fixture(scope="module")
def without_package(checkpoint, images, tmp_path_factory):
    """Outputs of a process without our package, and what it saved again: a backbone, a pretraining model."""
    folder = tmp_path_factory.mktemp("without")
    torch.save(images, folder / "tensors.pt")
    argv = (checkpoint, folder / "tensors.pt", folder / "backbone", folder / "pretraining")
    run_without_package(WITHOUT_PACKAGE, folder, *argv)
    return torch.load(folder / "tensors.pt"), folder


def test_outputs_without_the_package_are_bit_equal(checkpoint, images, without_package):
    theirs, _ = without_package
    for name, ours in outputs(checkpoint, images).items():
        assert torch.equal(ours, theirs[name]), name
    assert theirs["map"].shape == (2, 48, 4, 5)


def test_what_a_consumer_saves_again_opens_as_everything(checkpoint, images, without_package):
    _, folder = without_package
    ours = outputs(checkpoint, images)
    assert all(torch.equal(ours[name], tensor) for name, tensor in outputs(folder / "pretraining", images).items())
    assert torch.equal(AutoModel.from_pretrained(folder / "backbone")(images).last_hidden_state, ours["features"])
    for name in ("backbone", "pretraining"):
        assert {"configuration_dino.py", "modeling_dino.py"} <= {path.name for path in (folder / name).iterdir()}
        auto_map = json.loads((folder / name / "config.json").read_text())["auto_map"]
        assert auto_map == json.loads((checkpoint / "config.json").read_text())["auto_map"] and len(auto_map) == 5


def test_feature_extraction_pipeline(checkpoint, without_package):
    extract = pipeline("image-feature-extraction", str(checkpoint))
    path = str(checkpoint / "image.png")
    pooled = torch.tensor(extract(path, pool=True)[0])
    assert torch.equal(pooled, without_package[0]["pooled"])
    tokens = torch.tensor(extract(path)[0])
    assert tokens.shape == (1 + 16, 48) and torch.equal(tokens[0], pooled)
    assert torch.tensor(extract([path] * 3, batch_size=3)).shape == (3, 1, 1 + 16, 48)
    larger = extract(path, image_processor_kwargs={"size": {"height": 64, "width": 48}})
    assert torch.tensor(larger[0]).shape == (1 + 8 * 6, 48)


def test_image_classification_pipeline(checkpoint, tmp_path):
    model = DINOForImageClassification(tiny_config(n_last_blocks=1, id2label={0: "cat", 1: "dog", 2: "owl"}))
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(checkpoint, backend="pil").save_pretrained(tmp_path)
    [*answers] = pipeline("image-classification", str(tmp_path))(str(checkpoint / "image.png"))
    assert {answer["label"] for answer in answers} == {"cat", "dog", "owl"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_local_models_never_ask_to_run_their_code(num_channels, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    config = tiny_config(num_channels=num_channels, n_last_blocks=1, num_labels=2)
    for model_class in (DINOModel, DINOForImageClassification):
        model_class(config).save_pretrained(tmp_path / model_class.__name__)
        processor = make_image_processor(32, num_channels, [0.5], [0.25], is_deep=num_channels == 5)
        processor.save_pretrained(tmp_path / model_class.__name__)
    extract = pipeline("image-feature-extraction", str(tmp_path / "DINOModel"))
    classify = pipeline("image-classification", str(tmp_path / "DINOForImageClassification"))
    expected = type(AutoImageProcessor.from_pretrained(tmp_path / "DINOModel"))
    assert type(extract.image_processor) is type(classify.image_processor) is expected
    assert type(AutoProcessor.from_pretrained(tmp_path / "DINOModel")) is expected
    assert not asked


def test_only_the_classifier_of_a_pretraining_checkpoint_is_new(checkpoint):
    _, info = DINOForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["mismatched_keys"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_is_loaded_as_asked(checkpoint, images, dtype, tolerance):
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = AutoModel.from_pretrained(checkpoint)(images).pooler_output
    torch.testing.assert_close(model(images.to(dtype)).pooler_output.float(), expected, rtol=0, atol=tolerance)
