import json
import math
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PillowImage
from safetensors.torch import load_file
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

from evaluation import few_shot, finetune
from evaluation.__main__ import evaluate_from_command_line
from evaluation.decoding import Reading
from evaluation.finetune import learning_rate_at, load_classifier, make_mixing, make_transform, parameter_groups, train
from evaluation.labels import draw_per_class
from evaluation.supervised import AugmentedImages, Batches
from modeling_dino import DINOForImageClassification, DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command
from .original import tiny_config


PLAIN = ("--mixup", 0, "--cutmix", 0, "--drop_path_rate", 0)  # what a process draws for its images together


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    DINOModel(tiny_config(hidden_size=24, num_hidden_layers=2, image_size=16)).save_pretrained(folder)
    make_image_processor(16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Images of horizontal and of vertical stripes: 43 for training, 12 to test on."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("stripes")

    def stripe(kind):
        pixels = np.zeros((24, 24), np.float32) + 200 * (np.arange(24) // 4 % 2)
        pixels = (pixels if kind else pixels.T)[..., None] + rng.normal(20, 20, (24, 24, 3))
        return PillowImage.fromarray(pixels.clip(0, 255).astype(np.uint8))

    features = Features({"image": Image(), "label": ClassLabel(names=["horizontal", "vertical"])})
    splits = {
        name: Dataset.from_dict(
            {"image": [stripe(i % 2) for i in range(n)], "label": [i % 2 for i in range(n)]}, features
        )
        for name, n in (("train", 43), ("test", 12))
    }
    DatasetDict(splits).save_to_disk(folder)
    return folder


def arguments(model, data, *argv):
    return ["finetune", "--model", str(model), "--dataset_name", str(data), "--batch_size", "16", *map(str, argv)]


def run(*argv):
    evaluate_from_command_line(arguments(*argv))


def read(path):
    (report,) = json.loads(path.read_text())
    return report


@pytest.fixture(scope="module")
def finetuned(model_folder, stripes, tmp_path_factory):
    """The whole recipe, forty epochs; its folder."""
    folder = tmp_path_factory.mktemp("finetuned")
    argv = ("--epochs", 40, "--warmup_epochs", 1, "--learning_rate", 0.15)
    run(model_folder, stripes, *argv, "--output_dir", folder / "o", "--output", folder / "r.json")
    return folder, argv


def test_result_opens_as_a_pipeline_with_the_accuracy_that_is_reported(finetuned, model_folder, stripes):
    folder, _ = finetuned
    values = read(folder / "r.json")["values"]
    assert values.keys() == {"finetune_top1"}  # of two classes, no top-5
    assert values["finetune_top1"] >= 75
    classify = pipeline("image-classification", model=str(folder / "o"))
    test = DatasetDict.load_from_disk(stripes)["test"]
    names = test.features["label"].names
    found = [classify(row["image"], top_k=1)[0]["label"] == names[row["label"]] for row in test]
    assert 100 * np.mean(found) == pytest.approx(values["finetune_top1"])
    model = AutoModelForImageClassification.from_pretrained(folder / "o")
    assert isinstance(model, DINOForImageClassification) and model.config.id2label == {0: "horizontal", 1: "vertical"}
    before = DINOModel.from_pretrained(model_folder).state_dict()
    for name, tensor in model.dino.state_dict().items():
        assert not torch.equal(tensor, before[name]), f"{name} was not trained"


def test_stopped_run_goes_on_to_the_same_weights(finetuned, model_folder, stripes, tmp_path, monkeypatch):
    folder, argv = finetuned

    def stopping(folder, settings, losses, **state):
        save_checkpoint(folder, settings, losses, **state)
        if len(losses) == 5:
            raise KeyboardInterrupt

    save_checkpoint = finetune.save_checkpoint
    monkeypatch.setattr(finetune, "save_checkpoint", stopping)
    argv = (model_folder, stripes, *argv, "--output_dir", tmp_path / "o", "--output", tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        run(*argv)
    monkeypatch.undo()
    run(*argv)
    ours, expected = (load_file(path / "o/model.safetensors") for path in (tmp_path, folder))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    assert (tmp_path / "o/log.jsonl").read_text() == (folder / "o/log.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run with another mixup .0.8, not 0.2."):
        run(*argv, "--mixup", 0.2)


@pytest.mark.slow
def test_two_processes_train_as_one(model_folder, stripes, tmp_path):
    """Of the 43 images, the last batch of 20 has three: two for one process, one for the other."""
    argv = (model_folder, stripes, *PLAIN, "--epochs", 2, "--learning_rate", 0.01)
    run(*argv, "--batch_size", 20, "--output_dir", tmp_path / "one", "--output", tmp_path / "one.json")
    argv = (*argv, "--batch_size", 10, "--output_dir", tmp_path / "two", "--output", tmp_path / "two.json")
    finished = command(*arguments(*argv), processes=2, module="evaluation")
    assert finished.returncode == 0, finished.stderr
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in one.items():
        if not name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding noise
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    two, one = (read(tmp_path / f"{name}.json") for name in ("two", "one"))
    assert two["values"] == one["values"] and two["data"] == one["data"]


def test_training_is_a_plain_loop_of_adamw(model_folder, stripes):
    """Without anything that is drawn but the order: AdamW of PyTorch on the mean of the smoothed cross-entropy."""
    dataset = DatasetDict.load_from_disk(stripes)["train"].cast_column("image", Image(decode=False))
    targets = np.array(dataset["label"])
    transform = v2.Compose([v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images = AugmentedImages(dataset, targets, transform, make_image_processor(16), Reading(3), seed=0)
    torch.manual_seed(0)
    model = load_classifier(str(model_folder), ["a", "b"], drop_path_rate=0.0)
    torch.manual_seed(0)
    expected = load_classifier(str(model_folder), ["a", "b"], drop_path_rate=0.0)

    trained, losses, _ = train(
        model, images, Batches(np.arange(43), 16, 0), make_mixing(2, 0, 0), num_epochs=4, warmup_epochs=1,
        learning_rate=0.1, weight_decay=0.2, label_smoothing=0.1,
    )  # fmt: skip

    order = Batches(np.arange(43), 16, 0)
    decayed = [p for n, p in expected.named_parameters() if n.endswith("weight") and "norm" not in n]
    others = [p for n, p in expected.named_parameters() if not (n.endswith("weight") and "norm" not in n)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0}])
    peak, step = 0.1 * 16 / 512, 0
    expected.train()
    for epoch in range(4):
        order.epoch, total = epoch, 0.0
        for batch in order:
            if step < 3:
                rate = 1e-6 + (peak - 1e-6) * step / 3
            else:
                rate = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - 3) / 9))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixel_values, classes = zip(*(images[key][:2] for key in batch))
            log_probabilities = expected(torch.stack(pixel_values)).logits.log_softmax(1)
            smoothed = 0.9 * torch.eye(2)[list(classes)] + 0.1 / 2
            loss = -(smoothed * log_probabilities).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, step = total + loss.item() * len(batch), step + 1
    assert losses[-1] == pytest.approx(total / 43, rel=1e-5)
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters()):
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_learning_rate_is_the_one_of_timms_schedule():
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=17, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False
    )
    scheduler.step_update(0)
    for step in range(22):
        scheduler.step_update(step)
        assert learning_rate_at(step, 22, 5, 0.02) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert learning_rate_at(3, 10, 0, 1e-8) == 1e-8


def test_layers_learn_more_slowly_the_earlier_they_are():
    model = DINOForImageClassification(tiny_config(n_last_blocks=1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        names[parameter]: (group["scale"], group["weight_decay"])
        for group in parameter_groups(model, 0.05, 0.5)
        for parameter in group["params"]
    }
    assert groups.keys() == set(names.values())
    for name, expected in {
        "classifier.weight": (1, 0.05),
        "classifier.bias": (1, 0),
        "dino.layernorm.weight": (1, 0),
        "dino.layers.2.mlp.fc1.weight": (0.5, 0.05),
        "dino.layers.0.attention.qkv.bias": (0.125, 0),
        "dino.embeddings.cls_token": (0.0625, 0),
        "dino.embeddings.position_embeddings": (0.0625, 0),
        "dino.embeddings.patch_embeddings.projection.weight": (0.0625, 0.05),
    }.items():
        assert groups[name] == expected, name
    assert {group["scale"] for group in parameter_groups(model, 0.05)} == {1}
    swin = SwinForImageClassification(SwinConfig(image_size=32, embed_dim=4, depths=[1, 1], num_heads=[1, 1]))
    with pytest.raises(ValueError, match="layer_decay is for one row of blocks"):
        parameter_groups(swin, 0.05, 0.5)


def test_mixed_images_have_mixed_classes():
    torch.manual_seed(0)
    images, classes = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 32, 32).clone(), torch.arange(4)
    kinds = set()
    for _ in range(20):
        mixed, soft = make_mixing(4)(images, classes)
        # the mean of an image tells how much of which is in it
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(4.0), rtol=0, atol=1e-4)
        kinds.add("mixup" if len(mixed[1].unique()) == 1 else "cutmix")
    assert kinds == {"mixup", "cutmix"}
    assert torch.equal(make_mixing(4, 0, 0)(images, classes)[1], classes)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_crops_have_the_size_and_scale_of_what_is_evaluated(num_channels):
    processor = make_image_processor(16, num_channels, [0.5], [0.25])
    grey = torch.full((num_channels, 30, 40), 128, dtype=torch.uint8)
    image = grey if num_channels == 5 else v2.functional.to_pil_image(grey)
    transform = make_transform(processor, num_channels, rand_augment=0, random_erasing=0)
    expected = torch.full((num_channels, 16, 16), (128 / 255 - 0.5) / 0.25)
    torch.testing.assert_close(transform(image), expected)
    if num_channels == 5:
        with pytest.raises(ValueError, match="1 or 3 channels, got 5; give --rand_augment 0"):
            make_transform(processor, num_channels)
    else:
        assert not torch.allclose(make_transform(processor, num_channels, 9, 1.0)(image), expected)


def test_stock_vit_keeps_its_weights_and_gets_a_classifier(stripes, tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    vit = ViTModel(config, add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    make_image_processor(32).save_pretrained(tmp_path / "vit")
    model = load_classifier(str(tmp_path / "vit"), ["a", "b", "c"])
    assert isinstance(model, ViTForImageClassification) and model.classifier.out_features == 3
    assert all(torch.equal(tensor, vit.state_dict()[name]) for name, tensor in model.vit.state_dict().items())
    run(tmp_path / "vit", stripes, "--epochs", 1, "--image_size", 16, "--output", tmp_path / "r.json")
    assert 0 <= read(tmp_path / "r.json")["values"]["finetune_top1"] <= 100
    with pytest.raises(ValueError, match="has no stochastic depth; leave --drop_path_rate out"):
        load_classifier(str(tmp_path / "vit"), ["a", "b"], drop_path_rate=0.1)


def test_network_of_timm_learns_and_knows_its_classes(stripes, tmp_path):
    network = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 2}
    scale = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=network, pretrained_cfg=scale, num_labels=0
    )
    TimmWrapperModel(config).save_pretrained(tmp_path / "timm")
    run(tmp_path / "timm", stripes, "--epochs", 1, "--output_dir", tmp_path / "o")
    classify = pipeline("image-classification", model=str(tmp_path / "o"))
    found = classify(DatasetDict.load_from_disk(stripes)["test"][0]["image"])
    assert {row["label"] for row in found} == {"horizontal", "vertical"}


def test_checkpoint_of_any_classifier_becomes_one_on_the_last_cls_token(tmp_path):
    config = tiny_config(n_last_blocks=1, avgpool_patchtokens=True, interleave_features=True, freeze_backbone=True)
    saved = DINOForImageClassification(config)
    saved.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), list("abc"))
    assert model.classifier.weight.shape == (3, 48) and model.config.drop_path_rate == 0.1
    assert all(parameter.requires_grad for parameter in model.train().parameters())
    assert all(torch.equal(tensor, model.dino.state_dict()[name]) for name, tensor in saved.dino.state_dict().items())
    untrained = load_classifier(f"untrained:{tmp_path}", list("abc"))
    assert not torch.equal(untrained.dino.layers[0].mlp.fc1.weight, saved.dino.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--features", "f"), "leave --features out"),
        (("--learning_rate", 0), "learning_rate must be above 0, got 0"),
        (("--epochs", 0), "epochs must be at least 1, got 0"),
        (("--layer_decay", 2), "layer_decay must be above 0 and at most 1, got 2"),
        (("--random_erasing", 2), "random_erasing must be from 0 to 1, got 2"),
        (("--learning_rate", 1e30), "the loss of epoch . is not finite; lower --learning_rate"),
    ],
)
def test_what_cannot_be_is_refused(argv, message, model_folder, stripes):
    with pytest.raises(ValueError, match=message):
        run(model_folder, stripes, "--epochs", 2, *argv)


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_labels_per_class_are_those_of_few_shot(protocol, model_folder, stripes, tmp_path, monkeypatch):
    """The same images as in the first draw of `few_shot` with that seed, and no others."""
    module, seen = sys.modules[f"evaluation.{protocol}"], []

    def recorded(images, order, num_workers):
        seen.append(np.sort(order.indices))
        return make_loader(images, order, num_workers)

    make_loader = module.make_loader
    monkeypatch.setattr(module, "make_loader", recorded)
    argv = ["--model", model_folder, "--dataset_name", stripes, "--batch_size", 16, "--seed", 3]
    few = ["--labels_per_class", 4, "--epochs", 1, "--output", tmp_path / "r.json"] + ["--n_last_blocks", 1] * (
        protocol == "linear"
    )
    evaluate_from_command_line([protocol, *map(str, argv + few)])
    report = read(tmp_path / "r.json")
    assert report["settings"]["labels_per_class"] == 4 and report["data"]["num_trained"] == 8
    labels = np.array(DatasetDict.load_from_disk(stripes)["train"]["label"])
    drawn = []

    def draw(*args):
        drawn.append(draw_per_class(*args))
        return drawn[-1]

    monkeypatch.setattr(few_shot, "draw_per_class", draw)
    evaluate_from_command_line(["few_shot", *map(str, argv), "--shots", "4", "--percent", "--num_draws", "2"])
    [indices] = seen
    assert np.bincount(labels[indices]).tolist() == [4, 4]
    assert indices.tolist() == np.sort(drawn[0]).tolist() != np.sort(drawn[1]).tolist()


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            22,
            "labels_per_class must be at most 21, the number of training images of class vertical, got 22.",
        ),
        (0, "labels_per_class must be at least 1, got 0"),
    ],
)
def test_labels_per_class_that_cannot_be_are_refused(protocol, number, message, model_folder, stripes):
    argv = [protocol, "--model", str(model_folder), "--dataset_name", str(stripes)]
    argv += ["--n_last_blocks", "1"] * (protocol == "linear")
    with pytest.raises(ValueError, match=message):
        evaluate_from_command_line([*argv, "--labels_per_class", str(number)])


def test_held_out_images_are_of_the_labeled_ones(model_folder, stripes, tmp_path):
    argv = ["linear", "--model", str(model_folder), "--dataset_name", str(stripes), "--epochs", "1"]
    argv += ["--learning_rates", "0.1", "1", "--labels_per_class", "5", "--val_fraction", "0.4"]
    argv += ["--n_last_blocks", "1"]
    evaluate_from_command_line([*argv, "--output", str(tmp_path / "r.json")])
    data = read(tmp_path / "r.json")["data"]
    assert (data["num_trained"], data["num_held_out"]) == (6, 4)
