import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import video_segmentation
from evaluation.__main__ import evaluate_from_command_line
from evaluation.models import tokens
from evaluation.video_segmentation import (
    boundary_f_measure,
    frame_size,
    hard_labels,
    jaccard,
    mean_recall_decay,
    object_scores,
    propagate_labels,
    propagate_through_video,
    read_annotation,
    read_frame,
    video_mean_and_std,
    voc_palette,
)
from modeling_dino import DINOModel
from modeling_dino.command_line import run
from modeling_dino.image_processing_dino import make_image_processor

from .commands import command
from .original import FIXTURES, META, our_names, recorded, tiny_config


SIZE = 64, 100  # of the frames: landscape, and no multiple of the patches


@pytest.fixture(scope="module")
def model():
    model = DINOModel(tiny_config())
    model.load_state_dict(our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True)))
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    return folder


def shapes(time: int) -> tuple[np.ndarray, np.ndarray]:
    """A frame of a disk and a square that move over noise, and its object indices."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    indices = np.zeros(SIZE, dtype=np.uint8)
    indices[(y - 30) ** 2 + (x - 25 - 2 * time) ** 2 < 18**2] = 1
    indices[30:58, 60 - time : 88 - time] = 2
    noise = np.random.default_rng(0).integers(0, 60, (*SIZE, 3))
    colors = np.array([[90, 90, 90], [250, 60, 40], [40, 80, 250]])
    return (colors[indices] * (0.8 + 0.2 * np.sin(y / 2)[..., None]) + noise).clip(0, 255).astype(np.uint8), indices


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    """Two sequences in the layout of DAVIS-2017, of 6 and 4 frames."""
    root = tmp_path_factory.mktemp("davis")
    for name, times in (("one", range(6)), ("two", range(8, 4, -1))):
        for number, time in enumerate(times):
            frame, indices = shapes(time)
            for kind, array, suffix in (("JPEGImages", frame, "jpg"), ("Annotations", indices, "png")):
                path = root / kind / "480p" / name / f"{number:05d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(array)
                if suffix == "png":
                    image.putpalette(voc_palette())
                image.save(path, **({"quality": 95} if suffix == "jpg" else {}))
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("one\ntwo\n")
    return root


@pytest.fixture
def broken(davis, tmp_path):
    """A copy of the data, to break."""
    return shutil.copytree(davis, tmp_path / "broken")


def evaluate(root, model, *argv):
    evaluate_from_command_line(
        ["video_segmentation", "--model", str(model), "--dataset_name", str(root), "--image_size", "64",
         *map(str, argv)]
    )  # fmt: skip


def refusal(root, model, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        run("dino-eval", lambda _: evaluate(root, model, *argv), [])
    stderr = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(stderr.splitlines()) == 1, stderr
    return stderr


@torch.no_grad()
def test_soft_labels_are_the_originals(model):
    data, settings = recorded("video"), META["video"]
    frames = (tokens(model, frame[None])[0].patches[0] for frame in data["frames"])
    first = data["first_segmentation_one_hot"][0].permute(1, 2, 0)
    labels = propagate_through_video(
        frames, first, settings["n_last_frames"], settings["size_mask_neighborhood"], settings["topk"]
    )
    ours = torch.stack([frame.permute(2, 0, 1) for frame in labels])
    torch.testing.assert_close(ours, data["soft_segmentations"], rtol=0, atol=1e-5)


def dense_propagation(target, context, labels, neighborhood, topk):
    """All affinities at once, one target after the other."""
    rows, columns, _ = target.shape
    result = torch.zeros(rows, columns, labels.shape[-1])
    for y in range(rows):
        for x in range(columns):
            affinity = (context @ target[y, x] / 0.1).exp()  # (frames, rows, columns)
            for other_y in range(rows):
                for other_x in range(columns):
                    if neighborhood and max(abs(y - other_y), abs(x - other_x)) > neighborhood:
                        affinity[:, other_y, other_x] = 0
            weakest = affinity.flatten().sort(descending=True).values[: topk or None][-1]
            affinity = torch.where(affinity >= weakest, affinity, 0)
            result[y, x] = (affinity[..., None] / affinity.sum() * labels).sum((0, 1, 2))
    return result


@pytest.mark.parametrize(("neighborhood", "topk"), [(2, 5), (0, 5), (1, 1), (3, 1000)])
@pytest.mark.parametrize("tied", [False, True])
def test_tiles_are_the_dense_propagation_ties_included(neighborhood, topk, tied, monkeypatch):
    monkeypatch.setattr(video_segmentation, "TILE", 4)
    generator = torch.Generator().manual_seed(0)
    target, context = torch.randn(7, 9, 6, generator=generator), torch.randn(3, 7, 9, 6, generator=generator)
    if tied:  # frames that stand still, and few kinds of patches
        kinds = torch.eye(6)[torch.arange(63) % 6].view(7, 9, 6)
        target, context = kinds, kinds.expand(3, 7, 9, 6)
    target, context = F.normalize(target, dim=-1), F.normalize(context, dim=-1)
    labels = torch.rand(3, 7, 9, 4, generator=generator)
    ours = propagate_labels(target, context, labels, neighborhood, topk)
    torch.testing.assert_close(ours, dense_propagation(target, context, labels, neighborhood, topk))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.largest = max(self.largest, tensor.nbytes)
        return result


def test_frames_of_1152_pixels_need_little_memory():
    context = F.normalize(torch.randn(8, 60, 144, 64), dim=-1)  # patches of 8 pixels
    labels = torch.rand(8, 60, 144, 4)
    with LargestTensor() as made:
        result = propagate_labels(context[7], context, labels)
    # of a tile's affinities, 256 x 12800; those of all pairs are 2278 MiB
    assert 8 * 2**20 < made.largest < 16 * 2**20
    assert result.isfinite().all()


def test_hard_labels_are_the_originals():
    def original(labels, patch, size):  # step by step, a class and a pixel at a time
        labels = F.interpolate(labels.permute(2, 0, 1)[None], scale_factor=patch, mode="bilinear")[0]
        for index in range(len(labels)):
            if labels[index].max() > 0:
                labels[index] -= labels[index].min()
                labels[index] /= labels[index].max()
        return np.array(Image.fromarray(labels.max(0).indices.numpy().astype(np.uint8)).resize(size[::-1], 0))

    generator = torch.Generator().manual_seed(0)
    random = torch.rand(4, 7, 3, generator=generator)
    without = F.pad(random, (0, 1))  # an object that is gone
    constant = torch.cat([random[..., :2] * 0.5, torch.full((4, 7, 1), 0.5)], dim=2)  # one that is all over the frame
    for labels in (random, without, constant):
        ours = hard_labels(labels, (32, 56), (30, 61))
        np.testing.assert_array_equal(ours, original(labels.clone(), 8, (30, 61)))
    assert set(np.unique(hard_labels(constant, (32, 56), (30, 61)))) == {2}


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((480, 854), 16, (480, 832)),
        ((480, 854), 8, (480, 832)),
        ((480, 1152), 8, (480, 1152)),
        ((854, 480), 16, (832, 480)),
        ((480, 480), 16, (480, 448)),
        ((720, 1280), 16, (480, 832)),
        ((480, 854), 14, (476, 854 // 14 * 14)),
    ],
)
def test_size_of_frames(size, patch, expected):
    assert frame_size(size, 480, patch) == expected


def test_frames_are_resized_bilinearly_without_antialiasing(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    height, width = 8, 24
    expected = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            place = [(y + 0.5) * 10 / height - 0.5, (x + 0.5) * 13 / width - 0.5]
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                cell = [math.floor(p) + c for p, c in zip(place, corner)]
                weight = math.prod(1 - abs(p - c) for p, c in zip(place, cell))
                expected[y, x] += weight * pixels[min(max(cell[0], 0), 9), min(max(cell[1], 0), 12)]
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    ours = read_frame(tmp_path / "frame.png", (height, width), mean, std)[0]
    levels = ((ours * std + mean) * 255).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)  # whole ones, as OpenCV's
    assert np.abs(levels - expected).max() < 0.501


def test_red_is_divided_as_in_the_original():
    mean, std = video_mean_and_std(make_image_processor(32), 3)
    assert mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert std.flatten().tolist() == pytest.approx([0.228, 0.224, 0.225])
    _, std = video_mean_and_std(make_image_processor(32, image_std=[0.229, 0.3, 0.225]), 3)
    assert std.flatten().tolist() == pytest.approx([0.229, 0.3, 0.225])  # not ImageNet's: left alone


def box(top, left, height, width, shape=(40, 60)):
    mask = np.zeros(shape, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_jaccard():
    empty = box(0, 0, 0, 0)
    assert jaccard(empty, empty) == 1
    assert jaccard(empty, box(0, 0, 3, 3)) == jaccard(box(0, 0, 3, 3), empty) == 0
    assert jaccard(box(5, 5, 10, 10), box(5, 5, 10, 10)) == 1
    assert jaccard(box(5, 5, 10, 10), box(5, 10, 10, 10)) == pytest.approx(50 / 150)
    assert jaccard(box(5, 5, 10, 10), box(5, 15, 10, 10)) == 0


def test_boundary_f_measure():
    empty, square = box(0, 0, 0, 0), box(10, 10, 20, 20)
    assert boundary_f_measure(empty, empty) == 1
    assert boundary_f_measure(empty, square) == boundary_f_measure(square, empty) == 0
    assert boundary_f_measure(square, square) == 1
    # the diagonal is 72.1 pixels, so the tolerance is rounded up to 1 pixel
    assert boundary_f_measure(box(11, 10, 20, 20), square) == 1
    assert boundary_f_measure(box(12, 12, 20, 20), square) < 0.2
    assert boundary_f_measure(box(12, 12, 20, 20), square, tolerance=0.04) == 1  # 3 pixels
    assert boundary_f_measure(box(10, 40, 20, 20), square) == 0
    # the boundary of a square of 20 runs one pixel above and to the left of it, and has 4 * 20 pixels; if one square
    # lies 5 to the right of the other, of each long side 16 pixels coincide and 1 is next to the other's corner, and
    # 1 of a short side is next to a long one at either end
    matched = 2 * (16 + 1) + 2 * 1
    assert boundary_f_measure(box(10, 15, 20, 20), square) == pytest.approx(matched / 80)


def test_boundary_f_measure_is_that_of_boundaries_enlarged_by_a_disk():
    """The official evaluation's way, pixel by pixel."""

    def boundary(mask):
        height, width = mask.shape
        found = np.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
                inside = [place for place in neighbours if place[0] < height and place[1] < width]
                found[y, x] = any(mask[place] != mask[y, x] for place in inside)
        return found

    rng = np.random.default_rng(0)
    y, x = np.mgrid[-3:4, -3:4]
    for _ in range(5):
        masks = [ndimage.gaussian_filter(rng.normal(size=(40, 60)), 3) > 0.02 for _ in range(2)]
        ours, theirs = map(boundary, masks)
        disk = x**2 + y**2 <= 3**2
        precision = (ours & ndimage.binary_dilation(theirs, disk)).sum() / ours.sum()
        recall = (theirs & ndimage.binary_dilation(ours, disk)).sum() / theirs.sum()
        assert 0.05 < precision < 0.95
        expected = 2 * precision * recall / (precision + recall)
        assert boundary_f_measure(*masks, tolerance=0.04) == pytest.approx(expected)


def test_mean_recall_decay():
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    # 8 frames are cut at 0, 1.75, 3.5, 5.25 and 7, that is at 0, 2, 4, 5 and 7
    assert mean_recall_decay(values) == pytest.approx((0.65, 5 / 8, 0.9 - 0.4))
    assert mean_recall_decay(np.array([0.7])) == pytest.approx((0.7, 1, 0))


def test_first_and_last_frame_are_left_out_and_later_objects_too():
    truth = np.where(box(5, 5, 10, 10), 1, 0) + np.where(box(20, 20, 10, 10), 3, 0)
    late = np.where(box(5, 40, 9, 9), 4, truth)
    shifted = np.roll(truth, 5, axis=1)
    nothing = np.zeros_like(truth)
    scores = object_scores([nothing, shifted, shifted, nothing], [truth, late, late, truth])
    assert [round(scores["j_mean"], 2) for scores in scores] == [33.33, 100, 33.33]  # there is no object 2: right
    assert scores[0]["j_recall"] == 0 and scores[1]["f_recall"] == 100
    assert scores[0]["jf_mean"] == pytest.approx((scores[0]["j_mean"] + scores[0]["f_mean"]) / 2)
    with pytest.raises(ValueError, match="this one has 2"):
        object_scores([truth] * 2, [truth] * 2)


def test_colours_are_those_of_pascal_voc():
    colours = np.frombuffer(voc_palette(), dtype=np.uint8).reshape(256, 3).tolist()
    assert colours[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[8] == [64, 0, 0] and colours[20] == [0, 64, 128] and colours[255] == [224, 224, 192]


@torch.no_grad()
def test_command_measures_and_writes_masks(davis, folder, model, tmp_path, capsys):
    evaluate(davis, folder, "--output_dir", tmp_path / "masks", "--output", tmp_path / "report.json")
    [report] = json.loads((tmp_path / "report.json").read_text())
    assert "wrote the masks of 2 sequences" in capsys.readouterr().out
    objects = []
    for name, number in (("one", 6), ("two", 4)):
        written = sorted((tmp_path / "masks" / name).iterdir())
        assert [path.name for path in written] == [f"{i:05d}.png" for i in range(number)]
        with Image.open(written[1]) as image:
            assert image.mode == "P" and image.size == SIZE[::-1]
            assert bytes(image.getpalette())[:768] == voc_palette()[: len(image.getpalette())]
        truths = [read_annotation(davis / "Annotations/480p" / name / path.name) for path in written]
        masks = [read_annotation(path) for path in written]
        np.testing.assert_array_equal(masks[0], truths[0])
        objects += object_scores(masks, truths)

        # the same masks from first principles: frames as the network sees them, all affinities, first labels
        size = frame_size(SIZE, 64, 8)
        assert size == (64, 64)
        mean, std = video_mean_and_std(make_image_processor(32), 3)
        features = [
            F.normalize(tokens(model, read_frame(path, size, mean, std))[0].patches[0], dim=-1)
            for path in sorted((davis / "JPEGImages/480p" / name).iterdir())
        ]
        small = np.array(Image.fromarray(truths[0]).resize((8, 8), 0))
        labels = [torch.eye(3)[torch.from_numpy(small).long()]]
        for time in range(1, number):
            labels.append(
                dense_propagation(features[time], torch.stack(features[:time]), torch.stack(labels[:time]), 12, 5)
            )
            np.testing.assert_array_equal(masks[time], hard_labels(labels[time], size, SIZE))
    for value in ("jf_mean", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay"):
        assert report["values"][value] == pytest.approx(np.mean([scores[value] for scores in objects])), value
    low, high = report["intervals"]["j_mean"]
    assert low < report["values"]["j_mean"] < high
    assert report["values"]["j_mean"] > 50  # colours are enough for it
    assert report["data"]["num_objects"] == 4 and report["data"]["sequences"] == ["one", "two"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(davis, folder, tmp_path):
    argv = ["video_segmentation", "--model", folder, "--dataset_name", davis, "--image_size", 64]
    evaluate(davis, folder, "--output", tmp_path / "one.json")
    finished = command(
        *argv, "--output", tmp_path / "two.json", "--output_dir", tmp_path / "masks", processes=2, module="evaluation"
    )
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())[0] for name in ("one", "two"))
    assert one["values"] == pytest.approx(two["values"]) and one["data"] == two["data"]
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 10


def test_sequences_can_be_chosen(davis, folder, tmp_path):
    evaluate(davis, folder, "--sequences", "two", "--output", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())[0]["data"]["sequences"] == ["two"]


def test_masks_are_written_where_nothing_can_be_measured(broken, folder, tmp_path, capsys):
    for path in (broken / "Annotations/480p/two").iterdir():
        if path.name != "00000.png":
            path.unlink()
    masks = tmp_path / "masks"
    evaluate(broken, folder, "--sequences", "two", "--output_dir", masks, "--output", tmp_path / "report.json")
    assert "not measured, annotated in the first frame alone: two" in capsys.readouterr().out
    assert len(list(masks.rglob("*.png"))) == 4 and not (tmp_path / "report.json").exists()
    assert "name a folder for the masks by --output_dir" in refusal(broken, folder, capsys, "--sequences", "two")
    evaluate(broken, folder, "--output", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())[0]["data"]["sequences"] == ["one"]


def test_bad_settings_in_one_line(davis, folder, tmp_path, capsys):
    assert "there is no folder" in refusal(tmp_path, folder, capsys)
    message = refusal(davis, folder, capsys, "--eval_split", "test-dev")
    assert "ImageSets/2017/test-dev.txt" in message and "lists are there for ['val']" in message
    assert "there is no sequence tow" in refusal(davis, folder, capsys, "--sequences", "tow")
    assert "did you mean two?" in refusal(davis, folder, capsys, "--sequences", "tow")
    assert "topk must be at least 1" in refusal(davis, folder, capsys, "--topk", "0")
    message = refusal(davis, folder, capsys, "--model", folder, folder, "--output_dir", tmp_path / "masks")
    assert "--output_dir is for one model, got 2" in message


def test_bad_files_in_one_line(broken, folder, tmp_path, capsys):
    frames, annotations = (broken / kind / "480p/one" for kind in ("JPEGImages", "Annotations"))
    (frames / "00003.jpg").rename(tmp_path / "kept.jpg")
    (frames / "00003.jpg").write_bytes(b"no image")
    assert "00003.jpg cannot be decoded" in refusal(broken, folder, capsys)
    (frames / "00003.jpg").write_bytes((tmp_path / "kept.jpg").read_bytes()[:700])
    assert "00003.jpg cannot be decoded" in refusal(broken, folder, capsys)
    (tmp_path / "kept.jpg").rename(frames / "00003.jpg")

    Image.fromarray(np.ones((50, 100), np.uint8)).save(annotations / "00002.png")
    assert "00002.png is 100x50, but the first frame of its sequence is 100x64" in refusal(broken, folder, capsys)
    (annotations / "00002.png").unlink()
    assert "sequence one lacks 1 of 6 annotations, such as" in refusal(broken, folder, capsys)
    Image.fromarray(np.ones((*SIZE, 3), np.uint8)).save(annotations / "00002.png")
    assert "00002.png has Pillow's mode RGB" in refusal(broken, folder, capsys)
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(annotations / "00002.png")
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(annotations / "00000.png")
    assert "00000.png has no objects; they have the indices 1 to 254" in refusal(broken, folder, capsys)
    (annotations / "00000.png").unlink()
    assert "the annotation that sequence one starts from" in refusal(broken, folder, capsys)
    for path in list(frames.iterdir())[2:]:
        path.unlink()
    assert "sequence one has 2 frames" in refusal(broken, folder, capsys)
