"""The tests that transformers runs on its own models, for the models of this package.

`test_transformers_suite.py` runs this file. `transformers_tests` is the folder `tests` of the source distribution of
the installed version; its modules that the distribution lacks are empty.
"""

import json
import sys
import unittest
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

import torch
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, ResNetConfig
from transformers.models.auto import modeling_auto

from modeling_dino import DINOBackbone, DINOConfig, DINOForImageClassification, DINOForPreTraining, DINOModel


class MissingModules(MetaPathFinder, Loader):
    """Import a module that `transformers_tests` lacks as one whose every name is an empty class."""

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("transformers_tests.") else None

    def exec_module(self, module):
        module.__getattr__ = lambda name: type(name, (), {})


sys.meta_path.append(MissingModules())

from transformers_tests import test_pipeline_mixin  # noqa: E402
from transformers_tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor  # noqa: E402


# the tests look up in these tables which labels a class takes, and whether it has a loss
modeling_auto.MODEL_MAPPING_NAMES["dino"] = "DINOModel"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["dino"] = "DINOBackbone"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["dino"] = "DINOForImageClassification"
modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES["dino"] = "DINOForPreTraining"


class PipelineTests:
    """Replace the tests of one pipeline, which the source distribution lacks."""

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32"):
        images = [Image.new("RGB", (40, 30), color) for color in ("red", "navy")]
        return self.pipeline_class(model=model, image_processor=image_processor, dtype=dtype), images


class ImageFeatureExtractionTests(PipelineTests):
    pipeline_class = ImageFeatureExtractionPipeline

    def run_pipeline_test(self, extract, images):
        config = extract.model.config
        num_tokens = 1 + (config.image_size // config.patch_size) ** 2
        assert torch.tensor(extract(images)).shape == (2, 1, num_tokens, config.hidden_size)
        assert torch.tensor(extract(images, pool=True)).shape == (2, 1, config.hidden_size)


class ImageClassificationTests(PipelineTests):
    pipeline_class = ImageClassificationPipeline

    def run_pipeline_test(self, classify, images):
        labels = set(classify.model.config.id2label.values())
        for answers in classify(images):
            assert {answer["label"] for answer in answers} == labels
            assert abs(sum(answer["score"] for answer in answers) - 1) < 1e-2


for task, tests in (
    ("image-feature-extraction", ImageFeatureExtractionTests),
    ("image-classification", ImageClassificationTests),
):
    entry = test_pipeline_mixin.pipeline_test_mapping[task]
    entry["test"] = f"{__name__}.{tests.__name__}" if isinstance(entry["test"], str) else tests


class ModelTester:
    """A small Vision Transformer and a batch of images."""

    batch_size = 4
    num_channels = 3
    image_size = 32
    patch_size = 8
    seq_length = 1 + (image_size // patch_size) ** 2
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = True
    backbone_config = None

    def get_config(self) -> DINOConfig:
        return DINOConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            n_last_blocks=2,
            out_dim=32,
            head_hidden_dim=32,
            head_bottleneck_dim=16,
            backbone_config=self.backbone_config,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DINOConfig, dict[str, torch.Tensor]]:
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixel_values}


class ResNetTester(ModelTester):
    backbone_config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])


def criterion(bottleneck: torch.Tensor, last_layer: torch.nn.Module) -> torch.Tensor:
    return last_layer(bottleneck).square().mean()


def skip(reason: str):
    return unittest.skip(reason)(lambda self: None)


class ImageModelTests(ModelTesterMixin):
    test_resize_embeddings = False  # of words
    test_can_init_all_missing_weights_before_2023 = True  # no year stands in our files

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is DINOForPreTraining:
            inputs["criterion"] = criterion
        return inputs

    test_inputs_embeds = skip("no inputs_embeds: the models take images")


class DINOTest(ImageModelTests, test_pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (DINOModel, DINOForPreTraining, DINOForImageClassification, DINOBackbone)
    pipeline_model_mapping = {
        "image-feature-extraction": DINOModel,
        "image-classification": DINOForImageClassification,
    }

    def setUp(self):
        self.model_tester = ModelTester()

    def test_config(self):
        ConfigTester(self, config_class=DINOConfig, has_text_modality=False, hidden_size=36).run_common_tests()

    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())


class DINOBackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (DINOBackbone,)
    config_class = DINOConfig

    def setUp(self):
        self.model_tester = ModelTester()


no_hidden_states = skip("no hidden states: `model.backbone` gives those of another network")
no_checkpointing = skip("no gradient checkpointing of a ResNet: the test asks the class, not the model")


class ResNetTest(ImageModelTests, unittest.TestCase):
    all_model_classes = (DINOModel, DINOForPreTraining, DINOForImageClassification)
    has_attentions = False
    test_model_get_set_embeddings = skip("no input embeddings: a ResNet starts with convolutions")
    test_batching_equivalence = no_hidden_states
    test_can_capture_specific_layers_hidden_states = no_hidden_states
    test_capture_outputs_decorator = no_hidden_states
    test_hidden_states_output = no_hidden_states
    test_model_outputs_equivalence = no_hidden_states
    test_retain_grad_hidden_states_attentions = no_hidden_states
    test_gradient_checkpointing_backward_compatibility = no_checkpointing
    test_gradient_checkpointing_enable_disable = no_checkpointing
    test_peft_gradient_checkpointing_enable_disable = no_checkpointing
    test_training_gradient_checkpointing = no_checkpointing
    test_training_gradient_checkpointing_use_reentrant_false = no_checkpointing
    test_training_gradient_checkpointing_use_reentrant_true = no_checkpointing

    def setUp(self):
        self.model_tester = ResNetTester()

    def test_config(self):
        network = json.loads(self.model_tester.get_config().to_json_string())["backbone_config"]
        tester = ConfigTester(self, config_class=DINOConfig, has_text_modality=False, backbone_config=network)
        tester.run_common_tests()
