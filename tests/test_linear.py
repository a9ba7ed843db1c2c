import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PillowImage
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torchvision import transforms
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextModel, ViTConfig, ViTModel

from evaluation import linear
from evaluation.__main__ import evaluate_from_command_line
from evaluation.decoding import Reading, decode_image
from evaluation.linear import hold_out, linear_accuracy, linear_inputs, train_classifiers
from evaluation.models import load_model, to_pixel_values
from evaluation.supervised import AugmentedImages, Batches, index_classes, normalize, seed_of
from modeling_dino import DINOForImageClassification, DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command
from .original import our_names, recorded, tiny_config


@pytest.fixture(scope="module")
def network():
    """The network that the original's numbers were recorded with."""
    model = DINOModel(tiny_config()).eval()
    model.load_state_dict(our_names(torch.load("tests/fixtures/backbone.pth")))
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Three blocks, images of 16 pixels."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    DINOModel(tiny_config(hidden_size=24, image_size=16)).save_pretrained(folder)
    make_image_processor(16).save_pretrained(folder)
    return folder


def shade(rng, kind):
    """Noise about a grey level of its class."""
    return PillowImage.fromarray(rng.normal(40 + 35 * kind, 25, (20, 28, 3)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Images of six classes: 63 for training, 18 to test on."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shades")
    features = Features({"image": Image(), "label": ClassLabel(names=list("abcdef"))})
    splits = {
        name: Dataset.from_dict(
            {"image": [shade(rng, i % 6) for i in range(size)], "label": [i % 6 for i in range(size)]}, features
        )
        for name, size in (("train", 63), ("test", 18))
    }
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture
def gaussians():
    """Features and labels of five overlapping classes: 300 for training, 200 to test on."""
    rng = torch.Generator().manual_seed(0)
    centres, labels = torch.randn(5, 12, generator=rng), torch.arange(500) % 5
    features = centres[labels] + 0.9 * torch.randn(500, 12, generator=rng)
    return features[:300], labels[:300].numpy(), features[300:], labels[300:].numpy()


def run(protocol, model, data, *argv):
    """The real command, in this process."""
    evaluate_from_command_line([protocol, "--model", str(model), "--dataset_name", str(data), *map(str, argv)])


def read(path):
    (report,) = json.loads(path.read_text())
    return report


def test_inputs_are_the_originals(network):
    expected = recorded("linear_inputs")
    for name, options in (
        ("cls_last2_concat", {"n_last_blocks": 2}),
        ("cls_avgpool_interleaved", {"n_last_blocks": 1, "avgpool_patchtokens": True, "interleave_features": True}),
    ):
        inputs = linear_inputs(network, expected["pixel_values"], **options)
        torch.testing.assert_close(inputs, expected[name], rtol=0, atol=1e-5)


def test_mean_of_the_patches_follows_the_cls_tokens(network):
    expected = recorded("linear_inputs")
    inputs = linear_inputs(network, expected["pixel_values"], n_last_blocks=2, avgpool_patchtokens=True)
    by_turns = expected["cls_avgpool_interleaved"].unflatten(1, (-1, 2))
    torch.testing.assert_close(inputs[:, :96], expected["cls_last2_concat"], rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs[:, 96:], by_turns[..., 1], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="interleave_features needs .* got True and 2"):
        linear_inputs(network, expected["pixel_values"], 2, True, True)


def plain_training(features, targets, order, learning_rate, num_epochs, weight):
    """The original's loop, in PyTorch's own words; also the mean loss of the last epoch."""
    classifier = torch.nn.Linear(features.shape[1], 5)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(
        classifier.parameters(), learning_rate * order.batch_size / 256, momentum=0.9, weight_decay=0
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs, eta_min=0)
    for epoch in range(num_epochs):
        order.epoch, total = epoch, 0.0
        for batch in order:
            indices = [index for _, index in batch]
            loss = torch.nn.functional.cross_entropy(classifier(features[indices]), targets[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
        scheduler.step()
    return classifier, total / len(targets)


def in_memory(features, targets, order):
    def batches(epoch):
        for batch in order:
            indices = [index for _, index in batch]
            yield features[indices], targets[indices]

    return batches


def test_training_is_a_plain_loop_of_sgd_for_every_learning_rate(gaussians):
    features, labels = gaussians[0], torch.from_numpy(gaussians[1])
    order = Batches(np.arange(300), 32, seed=3)  # the last batch has 12 images
    rates = [0.03, 1.0, 5.0]
    classifiers, losses = train_classifiers(in_memory(features, labels, order), order, 12, 5, rates, num_epochs=7)
    initial = train_classifiers(in_memory(features, labels, order), order, 12, 5, [1.0], num_epochs=0)[0][0]
    assert initial.weight.std().item() == pytest.approx(0.01, rel=0.2) and not initial.bias.any()
    for rate, classifier, loss in zip(rates, classifiers, losses[-1]):
        expected, expected_loss = plain_training(features, labels, order, rate, 7, initial.weight)
        torch.testing.assert_close(classifier.weight, expected.weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(classifier.bias, expected.bias, rtol=1e-6, atol=1e-6)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert np.shape(losses) == (7, 3)


def test_each_classifier_is_what_it_would_be_alone(gaussians):
    features, labels = gaussians[0], torch.from_numpy(gaussians[1])
    order = Batches(np.arange(300), 32, seed=0)
    together = train_classifiers(in_memory(features, labels, order), order, 12, 5, [0.1, 3.0], num_epochs=3)[0]
    alone = train_classifiers(in_memory(features, labels, order), order, 12, 5, [3.0], num_epochs=3)[0]
    assert torch.equal(together[1].weight, alone[0].weight) and not torch.equal(together[0].weight, alone[0].weight)


def test_accuracy_on_separable_and_on_overlapping_features(gaussians):
    train_features, train_labels, test_features, test_labels = gaussians
    reference = LogisticRegression(C=1e3, max_iter=1000).fit(train_features, train_labels)
    expected = 100 * reference.score(test_features, test_labels)
    accuracies = linear_accuracy(*gaussians, learning_rate=1.0, batch_size=64)
    assert 60 < expected < 99.5 and accuracies["linear_top1"] == pytest.approx(expected, abs=2)
    assert accuracies.keys() == {"linear_top1"}  # of five classes, no top-5
    names = np.array(list("vwxyz"))
    assert (
        linear_accuracy(
            train_features, names[train_labels], test_features, names[test_labels], learning_rate=1.0, batch_size=64
        )
        == accuracies
    )


def test_held_out_images_are_a_part_of_every_class():
    targets = np.repeat([0, 1, 2, 3], [100, 40, 10, 1])
    held_out = hold_out(targets, 0.1, seed=0)
    assert np.bincount(targets[held_out], minlength=4).tolist() == [10, 4, 1, 0]
    assert len(set(held_out)) == 15
    assert not np.array_equal(held_out, hold_out(targets, 0.1, seed=1))
    with pytest.raises(ValueError, match="val_fraction = 0.1 of 8 images in 4 classes holds out none"):
        hold_out(np.arange(8) % 4, 0.1, seed=0)


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ([], [1], None, "no training images"),
        ([0, 1, None], [1], None, "1 of the 3 training images have no label"),
        ([0, 1, 0], [-1, -1], ["a", "b"], "2 of the 2 test images have no label"),
        ([1, 1], [1], ["a", "b"], "all training images are of class 1"),
        (["a", "b"], ["b", "c", "d", "c"], None, "3 of the 4 test images are of classes .* lack .2, such as c"),
        ([0, 1], [2], ["a", "b", "c"], "1 of the 1 test images are of classes .* lack .1, such as c"),
    ],
)
def test_labels_that_cannot_be_are_refused(train, test, names, message):
    with pytest.raises(ValueError, match=message):
        index_classes(train, test, names)


def test_crops_are_those_of_the_originals_transforms(shades):
    dataset = DatasetDict.load_from_disk(shades)["train"].cast_column("image", Image(decode=False))
    processor = make_image_processor(16)
    ours = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), *normalize(processor, 3)])
    images = AugmentedImages(dataset, np.arange(63), ours, processor, Reading(3), seed=5)
    original = transforms.Compose(
        [
            transforms.RandomResizedCrop(16),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    state = torch.get_rng_state()
    crops = {key: images[key][0] for key in [(0, 7), (1, 7), (0, 8), (0, 9)]}
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(crops[0, 7], crops[1, 7])
    for (epoch, index), crop in crops.items():
        torch.manual_seed(seed_of(5, "image", epoch, index))
        pixels = decode_image(dataset[index]["image"], Reading(3)).transpose(1, 2, 0)
        torch.testing.assert_close(crop, original(PillowImage.fromarray(pixels)), rtol=0, atol=1e-6)
    assert [images[0, 7][1], images[3, 7][1]] == [7, 7]


FAST = ("--epochs", 4, "--batch_size", 16)


@pytest.fixture(scope="module")
def measured(model_folder, shades, tmp_path_factory):
    """The command with three learning rates; its folder."""
    folder = tmp_path_factory.mktemp("linear")
    argv = ("--n_last_blocks", 2, "--avgpool_patchtokens", "--learning_rates", 1e-6, 1.0, 3.0, "--val_fraction", 0.2)
    run("linear", model_folder, shades, *FAST, *argv, "--output_dir", folder / "o", "--output", folder / "r.json")
    return folder, argv


def test_saved_classifier_gives_the_accuracies_that_are_reported(measured, shades):
    folder, _ = measured
    report = read(folder / "r.json")
    values = report["values"]
    assert {f"linear_lr{rate}_top{top}" for rate in ("1e-06", "1", "3") for top in (1, 5)} < set(values)
    best = max((1e-6, 1.0, 3.0), key=lambda rate: values[f"held_out_lr{rate:g}_top1"])
    assert report["data"]["selected_learning_rate"] == best > 0.1
    assert values["linear_top1"] == values[f"linear_lr{best:g}_top1"] > 30  # of six classes, chance is 17
    low, high = report["intervals"]["linear_top1"]
    assert low < values["linear_top1"] < high
    assert report["data"]["num_held_out"] == 12 and report["data"]["num_trained"] == 51
    assert report["data"]["train"]["augmentation"]

    model = AutoModelForImageClassification.from_pretrained(folder / "o").eval()
    assert isinstance(model, DINOForImageClassification) and model.config.id2label[5] == "f"
    assert not any(parameter.requires_grad for parameter in model.train().dino.parameters())
    test = DatasetDict.load_from_disk(shades)["test"].cast_column("image", Image(decode=False))
    _, processor = load_model(str(folder / "o"))
    pixel_values = to_pixel_values(processor, [decode_image(row["image"], Reading(3)) for row in test])
    with torch.no_grad():
        logits = model.eval()(pixel_values).logits
    accuracy = 100 * (logits.argmax(1) == torch.tensor(test["label"])).double().mean().item()
    assert accuracy == pytest.approx(values["linear_top1"])


def test_stopped_training_goes_on_to_the_same_classifier(measured, model_folder, shades, tmp_path, monkeypatch):
    folder, argv = measured

    def stopping(folder, settings, losses, **state):
        save_checkpoint(folder, settings, losses, **state)
        if len(losses) == 2:
            raise KeyboardInterrupt

    save_checkpoint = linear.save_checkpoint
    monkeypatch.setattr(linear, "save_checkpoint", stopping)
    argv = (*FAST, *argv, "--output_dir", tmp_path / "o", "--output", tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        run("linear", model_folder, shades, *argv)
    monkeypatch.undo()
    assert len((tmp_path / "o/log.jsonl").read_text().splitlines()) == 2
    run("linear", model_folder, shades, *argv, "--num_workers", 1)
    states = [load_file(path / "o/model.safetensors") for path in (tmp_path, folder)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert read(tmp_path / "r.json")["values"] == read(folder / "r.json")["values"]
    assert (tmp_path / "o/log.jsonl").read_text() == (folder / "o/log.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run with another seed .0, not 1."):
        run("linear", model_folder, shades, *argv, "--seed", 1)


@pytest.mark.slow
def test_two_processes_train_as_one(measured, model_folder, shades, tmp_path):
    """Of the 51 images, the last batch of 16 has three: two for one process, one for the other."""
    folder, argv = measured
    argv = (*argv, "--epochs", 4, "--batch_size", 8, "--output_dir", tmp_path / "o", "--output", tmp_path / "r.json")
    argv = ("linear", "--model", model_folder, "--dataset_name", shades, *argv)
    finished = command(*argv, processes=2, module="evaluation")
    assert finished.returncode == 0, finished.stderr
    two, one = (load_file(path / "o/model.safetensors") for path in (tmp_path, folder))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    two, one = (read(path / "r.json") for path in (tmp_path, folder))
    assert two["values"] == one["values"] and two["data"] == one["data"]


def test_a_process_without_a_share_of_the_last_batch_changes_nothing(gaussians):
    """Shares of three processes add up to the plain gradient, also where a batch has two images."""
    state = PartialState()
    order = Batches(np.arange(18), 8, seed=0)
    whole = list(order)
    parts = []
    for index in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(state.__dict__, "num_processes", 3)
            patch.setitem(state.__dict__, "process_index", index)
            parts.append((list(order), list(order.sizes())))
    for number, batch in enumerate(whole):
        own = [part[number] for part, _ in parts]
        shares = [sizes[number][1] for _, sizes in parts]
        assert sum(shares) == pytest.approx(1)
        used = [key for keys, share in zip(own, shares) if share for key in keys]
        assert sorted(used) == sorted(batch) and all(own)
    assert [sizes[-1] for _, sizes in parts] == [(2, 0.5), (2, 0.5), (2, 0)]


@pytest.mark.filterwarnings("ignore:kept features are those of whole images")
def test_kept_features_train_without_augmentation(model_folder, shades, tmp_path):
    argv = (
        "--learning_rates",
        1.0,
        "--features",
        tmp_path / "f",
        "--n_last_blocks",
        1,
        "--output",
        tmp_path / "r.json",
    )
    run("linear", model_folder, shades, *FAST, *argv)
    first = read(tmp_path / "r.json")
    assert not first["data"]["train"]["augmentation"] and first["data"]["num_held_out"] == 0
    evaluate_from_command_line(
        ["linear", "--epochs", "4", "--batch_size", "16", "--learning_rates", "1.0", "--features", str(tmp_path / "f"),
         "--output", str(tmp_path / "again.json")]
    )  # fmt: skip
    assert read(tmp_path / "again.json")["values"] == first["values"]
    model, processor = load_model(str(model_folder))
    splits = DatasetDict.load_from_disk(shades).cast_column("image", Image(decode=False))
    parts = []
    for split in ("train", "test"):
        images = [decode_image(row["image"], Reading(3)) for row in splits[split]]
        parts += [linear_inputs(model, to_pixel_values(processor, images), 1), splits[split]["label"]]
    expected = linear_accuracy(*parts, learning_rate=1.0, num_epochs=4, batch_size=16)
    assert first["values"] == pytest.approx(expected)
    run("linear", model_folder, shades, *FAST, *argv[:-4], "--n_last_blocks", 3)
    assert (tmp_path / "f/train-last3.parquet").exists()


@pytest.mark.parametrize("kind", ["stock ViT", "ConvNeXt"])
def test_other_networks_leave_weight_and_bias(kind, shades, tmp_path):
    torch.manual_seed(0)
    if kind == "stock ViT":
        vit = ViTConfig(
            hidden_size=8,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        model, width = ViTModel(vit, add_pooling_layer=False), 4 * 8
    else:
        model, width = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)), 8
    model.save_pretrained(tmp_path / "m")
    make_image_processor(16).save_pretrained(tmp_path / "m")
    run(
        "linear",
        tmp_path / "m",
        shades,
        "--epochs",
        1,
        "--output_dir",
        tmp_path / "o",
        "--output",
        tmp_path / "r.json",
    )
    state = load_file(tmp_path / "o/classifier.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {"weight": (6, width), "bias": (6,)}
    assert read(tmp_path / "r.json")["data"]["inputs"]["n_last_blocks"] == (4 if kind == "stock ViT" else 1)


def test_images_in_both_splits_are_warned_of(model_folder, shades, tmp_path):
    splits = DatasetDict.load_from_disk(shades)
    splits["test"] = splits["train"].select(range(8))
    splits.save_to_disk(tmp_path / "d")
    with pytest.warns(UserWarning, match="8 of the 8 test images are training images, too"):
        run("linear", model_folder, tmp_path / "d", "--epochs", 1, "--n_last_blocks", 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--learning_rates", 0.1, 0), "learning_rates must be above 0 and differ, got 0.1, 0"),
        (("--learning_rates", 0.1, 0.1), "differ, got 0.1, 0.1"),
        (("--epochs", 0), "epochs must be at least 1 .* got 0"),
        (("--n_last_blocks", 5), "3 blocks, got 5"),
        (("--streaming",), "leave --streaming out"),
        (("--eval_split", "train"), "trains on train and needs another split"),
        (("--learning_rates", 1e38, "--n_last_blocks", 1, "--epochs", 3), "1e.38 is not finite; lower it"),
    ],
)
def test_what_cannot_be_is_refused(argv, message, model_folder, shades):
    with pytest.raises(ValueError, match=message):
        run("linear", model_folder, shades, "--epochs", 1, *argv)


def test_images_without_labels_are_refused(model_folder, flat_folder):
    with pytest.raises(ValueError, match="linear trains on train and needs another split|and split .* has none"):
        run("linear", model_folder, flat_folder)
