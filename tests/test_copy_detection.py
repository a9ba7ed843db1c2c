"""Copy detection on small trees in the layout of Copydays, and on pairs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from transformers import AutoImageProcessor

from evaluation.__main__ import evaluate_from_command_line
from evaluation.copy_detection import copy_descriptor, copy_detection_scores, fit_whitening, read_copydays, read_pairs
from evaluation.models import tokens
from modeling_dino import DINOModel
from modeling_dino.command_line import run

from . import test_landmarks
from .commands import trained
from .original import FIXTURES, our_names, recorded, tiny_config
from .test_landmarks import benchmark, landmark  # noqa: F401
from .test_retrieval import model  # noqa: F401


def strong(image, number):
    """A copy that is hard to find: small, blurred, cut, and turned a little."""
    image = image.filter(ImageFilter.GaussianBlur(2)).rotate(15 * number)
    return image.crop((10, 10, 50, 45))


@pytest.fixture(scope="module")
def copydays(tmp_path_factory):
    """8 originals with JPEGs of two qualities, a block of crops, and 12 strong copies."""
    root, rng = tmp_path_factory.mktemp("data") / "copydays", np.random.default_rng(0)
    for block in ("original", "strong", "jpegqual/3", "jpegqual/75", "crops/50"):
        (root / block).mkdir(parents=True)
    for number in range(8):
        image = landmark(rng, number, (60, 48))
        name = f"20{number:02d}00.jpg"
        image.save(root / "original" / name, quality=95)
        for quality in (3, 75):
            image.save(root / f"jpegqual/{quality}" / name, quality=quality)
        image.crop((15, 12, 45, 36)).save(root / "crops/50" / name)
        for copy in range(1, 3 if number < 4 else 2):
            strong(image, copy).save(root / "strong" / f"20{number:02d}{copy:02d}.jpg")
    for folder, number in (("distractors", 10), ("whitening", 110)):
        (root.parent / folder).mkdir()
        for index in range(number):
            landmark(rng, 100 + index, (24, 20)).save(root.parent / folder / f"{index}.png")
    return root


def command(dataset, model, output, *flags):  # noqa: F811
    argv = ["copy_detection", "--model", str(model), "--dataset_name", str(dataset), "--image_size", "32"]
    return [*argv, "--output", str(output), *map(str, flags)]


def measured(dataset, model, output, *flags):  # noqa: F811
    evaluate_from_command_line(command(dataset, model, output, *flags))
    (report,) = json.loads(output.read_text())
    return report


def test_descriptor_is_the_originals():
    network = DINOModel(tiny_config()).eval()
    network.load_state_dict(our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True)))
    expected = recorded("copy_descriptor")
    with torch.no_grad():
        found = copy_descriptor(tokens(network, expected["pixel_values"])[0])
    torch.testing.assert_close(found, expected["cls_gem4"], rtol=0, atol=1e-5)


def test_whitening_is_the_originals():
    expected = recorded("whitening")
    whitening = fit_whitening(expected["whitening_features"])
    torch.testing.assert_close(whitening.mean, expected["mean"], rtol=0, atol=1e-5)
    found = whitening(expected["queries"])
    signs = (found * expected["whitened"]).sum(0).sign()  # of an eigenvector, either is right
    torch.testing.assert_close(found * signs, expected["whitened"], rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.nn.functional.normalize(features) for features in (found, expected["whitened"]))
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-5)


def test_whitening_floors_what_the_images_do_not_vary_in():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 0
    whitening = fit_whitening(features)
    moment = features.T.double() @ features.double() / 50
    largest = np.linalg.eigvalsh(moment.numpy()).max()
    assert whitening.projection[3].abs().max().item() == pytest.approx((1e-5 * largest) ** -0.5, rel=1e-5)


def test_only_the_first_twenty_count():
    generator = torch.Generator().manual_seed(0)
    database = torch.eye(30)
    query = torch.arange(30, 0, -1.0)[None]  # finds 0, 1, 2, ...
    scores = copy_detection_scores(query.repeat(5, 1), database, [[0], [1, 25], [19], [20], []])
    assert scores[:4].tolist() == pytest.approx([1, 0.25 / 2, (0 + 1 / 20) / 2, 0])
    assert np.isnan(scores[4])
    many = torch.randn(1100, 8, generator=generator)  # more than a chunk: each image finds itself
    assert copy_detection_scores(many, many, [[index] for index in range(1100)]).tolist() == [1] * 1100


def test_copies_belong_to_originals_as_in_the_original(copydays):
    copies = read_copydays(copydays)
    assert [path.name for path in copies.originals] == [f"20{number:02d}00.jpg" for number in range(8)]
    assert list(copies.queries) == ["strong", "jpegqual/3", "jpegqual/75", "crops/50"]
    assert [positives for _, positives in copies.queries["jpegqual/3"]] == [[number] for number in range(8)]
    strong_positives = {path.name: positives for path, positives in copies.queries["strong"]}
    assert len(strong_positives) == 12
    assert strong_positives["200201.jpg"] == strong_positives["200202.jpg"] == [2]
    assert len(copies.absent) == 15 and "crops/10" in copies.absent


def by_hand(folder, copydays, distractors=False, whitening=False):
    """mAP of each block, with torchvision's transforms, loops, and numpy's whitening."""
    network, processor = DINOModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    transform = transforms.Compose([
        transforms.Resize((32, 32), transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
        transforms.Normalize(processor.image_mean, processor.image_std),
    ])  # fmt: skip

    def descriptor(path):
        with Image.open(path) as image, torch.no_grad():
            output = network(transform(image.convert("RGB"))[None]).last_hidden_state[0].numpy().astype(np.float64)
        return np.concatenate([output[0], (np.maximum(output[1:], 1e-6) ** 4).mean(0) ** 0.25])

    def descriptors(folder):
        return np.stack([descriptor(path) for path in sorted(folder.iterdir())])

    blocks = {block: descriptors(copydays / block) for block in ("strong", "jpegqual/3", "jpegqual/75", "crops/50")}
    database = descriptors(copydays / "original")
    if distractors:
        database = np.concatenate([database, descriptors(copydays.parent / "distractors")])
    if whitening:
        learned = descriptors(copydays.parent / "whitening")
        values, vectors = np.linalg.eigh(learned.T @ learned / len(learned))
        values = np.maximum(values, 1e-5 * values.max())
        database, *rest = [
            (features - learned.mean(0)) @ vectors / np.sqrt(values) for features in (database, *blocks.values())
        ]
        blocks = dict(zip(blocks, rest))
    scores = {}
    for block, queries in blocks.items():
        names = [path.name for path in sorted((copydays / block).iterdir())]
        for name, query in zip(names, queries):
            similarity = database @ query / np.linalg.norm(database, axis=1)
            place = list(np.argsort(-similarity)).index(int(name[2:4])) + 1
            # one positive: the precisions before and after it are 0 (1 at the first place) and 1 / place
            scores.setdefault(block, []).append((float(place == 1) + 1 / place) / 2 if place <= 20 else 0)
    return {f"{block}_mAP": 100 * np.mean(values) for block, values in scores.items()}


@pytest.mark.parametrize("options", [{}, {"distractors": True}, {"distractors": True, "whitening": True}])
def test_command_measures_what_a_loop_does(copydays, model, tmp_path, options, capsys):  # noqa: F811
    flags = [part for name in options for part in (f"--{name}", copydays.parent / name)]
    report = measured(copydays, model, tmp_path / "report.json", *flags)
    values, expected = report["values"], by_hand(model, copydays, **options)
    assert expected["strong_mAP"] < 100
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-4), name
    assert values["jpegqual_mAP"] == pytest.approx((values["jpegqual/3_mAP"] + values["jpegqual/75_mAP"]) / 2)
    assert values["crops_mAP"] == pytest.approx(values["crops/50_mAP"])
    assert list(values)[0] == "strong_mAP" and not {"jpegqual_mAP", "crops_mAP"} & report["intervals"].keys()
    low, high = report["intervals"]["strong_mAP"]
    assert low < values["strong_mAP"] < high
    assert "left out, as there are no images: jpegqual/5, jpegqual/8" in capsys.readouterr().out
    assert "jpegqual/5" in report["data"]["blocks_absent"] and report["data"]["copies"]["num_images"] == 36
    assert ("distractors" in report["data"]) == ("distractors" in options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:2 of the 4 queries have nothing to find")
def test_two_processes_measure_the_same(copydays, benchmark, model, tmp_path):  # noqa: F811
    """Copies and landmarks, in one launch."""
    others = ("--distractors", copydays.parent / "distractors", "--whitening", copydays.parent / "whitening")
    argvs = {}
    for number in ("one", "two"):
        argvs[number] = [
            command(copydays, model, tmp_path / f"copies_{number}.json", *others, "--batch_size", 7),
            test_landmarks.command(benchmark[0], model, tmp_path / f"landmarks_{number}.json", "--batch_size", "3"),
        ]
    for argv in argvs["one"]:
        evaluate_from_command_line(argv)
    script = tmp_path / "both.py"
    script.write_text(
        "from evaluation.__main__ import evaluate_from_command_line\n"
        f"for argv in {argvs['two']}:\n    evaluate_from_command_line(argv)\n"
    )
    trained(module=script, processes=2)
    for name in ("copies", "landmarks"):
        (one,), (two,) = (json.loads((tmp_path / f"{name}_{number}.json").read_text()) for number in ("one", "two"))
        assert two["values"] == pytest.approx(one["values"], abs=1e-6) and two["data"] == one["data"]
        assert len(two["values"]) > 5


def test_few_images_for_a_whitening_are_warned_of_and_originals_among_distractors(copydays, model, tmp_path):  # noqa: F811
    with pytest.warns(UserWarning, match="wants more images than the 10"):
        measured(copydays, model, tmp_path / "few.json", "--whitening", copydays.parent / "distractors")
    with pytest.warns(UserWarning, match="8 of the distractors are originals"):
        measured(copydays, model, tmp_path / "same.json", "--distractors", copydays / "original")


def test_pairs_of_ones_own(copydays, model, tmp_path):  # noqa: F811
    (tmp_path / "images").symlink_to(copydays)
    lines = ["query,positive,source"]
    for path in sorted((copydays / "strong").iterdir()):
        lines.append(f"images/strong/{path.name},images/original/{path.name[:4]}00.jpg,phone")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    report = measured(tmp_path / "pairs.csv", model, tmp_path / "pairs.json")
    assert report["values"] == {"pairs_mAP": pytest.approx(by_hand(model, copydays)["strong_mAP"], abs=1e-4)}

    (tmp_path / "two.csv").write_text("query,positive\na,x\nb,y\na,y\na,x\n")
    copies = read_pairs(tmp_path / "two.csv")
    assert copies.originals == [tmp_path / "x", tmp_path / "y"]
    assert copies.queries == {"pairs": [(tmp_path / "a", [0, 1]), (tmp_path / "b", [1])]}


def test_convolutional_network(copydays, tmp_path):
    from transformers import ResNetConfig, ResNetModel

    from modeling_dino.image_processing_dino import make_image_processor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    network = ResNetModel(config).eval()
    network.save_pretrained(tmp_path / "resnet")
    make_image_processor(32).save_pretrained(tmp_path / "resnet")
    report = measured(copydays, tmp_path / "resnet", tmp_path / "report.json")
    assert report["values"]["jpegqual/75_mAP"] > 50
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = network(pixels)
        found = copy_descriptor(tokens(network, pixels)[0])
    gem = output.last_hidden_state.clamp(min=1e-6).pow(4).mean((2, 3)).pow(0.25)
    torch.testing.assert_close(found, torch.cat([output.pooler_output.flatten(1), gem], dim=1))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": ""}, "is not in the layout of Copydays"),
        ({"original/200000.jpg": "image"}, "there are no copies in"),
        ({"original/200000.jpg": "image", "strong/300000.jpg": "image"}, "no query has a positive"),
        ({"original/200000.jpg": "image", "strong/200001.jpg": "text"}, "cannot be decoded"),
        (
            {"data.csv": "copy,original\na,b\n"},
            "the columns query and positive, its first line has copy, original",
        ),
        ({"data.csv": "query,positive\n"}, "holds no pairs"),
        ({"data.csv": "query,positive\na.jpg,\n"}, "pair 1 of"),
        ({"data.csv": "query,positive\na.jpg,b.jpg\nb.jpg,c.jpg\n"}, "is a query and a positive"),
        ({"data.csv": "query,positive\na.jpg,b.jpg\n"}, "1 of 1 images are missing"),
        ({"data.csv": b"\xff\xd8\xff"}, "is neither a folder nor a CSV file"),
    ],
)
def test_mistakes_are_told_in_one_line(model, tmp_path, capsys, files, message):  # noqa: F811
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "image":
            Image.new("RGB", (20, 20), "red").save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    csv = tmp_path / "data" / "data.csv"
    dataset = csv if csv.exists() else tmp_path / "data"
    with pytest.raises(SystemExit) as exit:
        run("dino-eval", evaluate_from_command_line, command(dataset, model, tmp_path / "report.json"))
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_data_and_model_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no file or folder"):
        evaluate_from_command_line(["copy_detection", "--model", "x", "--dataset_name", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="give --model"):
        evaluate_from_command_line(["copy_detection", "--dataset_name", str(tmp_path)])
