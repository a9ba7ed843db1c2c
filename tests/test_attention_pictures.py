"""Figures, arrays and videos of CLS attention, through the real command."""

import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import transforms as T
from transformers import AutoModel, ResNetConfig, TimmWrapperConfig

from evaluation.__main__ import evaluate_from_command_line
from evaluation.attention import cls_attention, fit_to_patches, mass_masks
from evaluation.attention_figures import OPACITY, colored_heads, enlarge, head_colors, mask_overlay
from evaluation.attention_video import Video
from evaluation.models import load_model
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .original import FIXTURES, our_names, tiny_config
from .test_bad_input import answer


PATCH = tiny_config().patch_size
KINDS = ("heads", "mean", "mask", "colors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = DINOModel(tiny_config())
    model.load_state_dict(our_names(torch.load(FIXTURES / "backbone.pth", weights_only=True)))
    model.save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    return folder


def scene(height: int, width: int, time: int = 0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    disk = (y - height / 2) ** 2 + (x - width / 3 - 3 * time) ** 2 < (height / 4) ** 2
    return np.stack([np.where(disk, 230, x % 50), np.where(disk, 40, y % 90), 90 + 0 * x], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A portrait and a landscape, and a file that is no image by its ending."""
    photos = tmp_path_factory.mktemp("photos")
    Image.fromarray(scene(90, 60)).save(photos / "portrait.png")
    Image.fromarray(scene(50, 101)).save(photos / "landscape.png")
    (photos / "notes.txt").write_text("none")
    return photos


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """13 frames of 66x98 pixels, 12 a second."""
    return write(tmp_path_factory.mktemp("film") / "in.mp4", [scene(66, 98, time) for time in range(13)])


def write(path, frames, rotation=0):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, width=98, height=66, pix_fmt="yuv420p")
        if rotation:  # a phone's, as players are told to show it
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def read(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def attend(folder, *argv):
    evaluate_from_command_line(["attention", "--model", str(folder), *map(str, argv)])


def expected_of(folder, path, short_side):
    """By torchvision's transforms on a PIL image and a crop, as in the original."""
    image = T.Resize(short_side)(Image.open(path))
    height, width = (side - side % PATCH for side in image.size[::-1])
    image = T.ToTensor()(image)[:, :height, :width]
    pixel_values = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(image)[None]
    model, _ = load_model(str(folder))
    return image, cls_attention(model, pixel_values)[0]


def test_figures_and_arrays_of_a_folder_keep_aspect_and_attention(folder, photos, tmp_path):
    attend(folder, "--image", photos, "--image_size", 44, "--mass", 0.5, "--output", tmp_path, "--save_arrays")
    names = {path.stem for path in photos.glob("*.png")}
    assert {path.name for path in tmp_path.iterdir()} == (
        {f"{name}_{kind}.png" for name in names for kind in KINDS} | {f"{name}.npz" for name in names}
    )
    for name, shape in (("portrait", (66, 44)), ("landscape", (44, 88))):
        rows, columns = (side // PATCH for side in shape)
        image, attention = expected_of(folder, photos / f"{name}.png", 44)
        arrays = np.load(tmp_path / f"{name}.npz")
        assert arrays["attention"].shape == (attention.shape[0], rows, columns)
        # torchvision resizes tensors and PIL images alike, but for the last of 255 levels
        assert np.abs(arrays["image"] - 255 * image.permute(1, 2, 0).numpy()).max() < 1.01
        np.testing.assert_allclose(arrays["attention"], attention, atol=2e-3)
        assert np.array_equal(arrays["masks"], mass_masks(torch.from_numpy(arrays["attention"]), 0.5))
        times = 240 // (min(rows, columns) * PATCH)
        for kind in ("mean", "colors"):
            with Image.open(tmp_path / f"{name}_{kind}.png") as picture:
                assert picture.size == (columns * PATCH * times, rows * PATCH * times)


def test_mean_figure_is_the_image_under_inferno(folder, photos, tmp_path):
    import matplotlib

    attend(folder, "--image", photos / "portrait.png", "--image_size", 240, "--output", tmp_path, "--save_arrays")
    arrays = np.load(tmp_path / "portrait.npz")
    picture = np.asarray(Image.open(tmp_path / "portrait_mean.png")).astype(float)
    mean = torch.from_numpy(arrays["attention"]).mean(0)
    mean = F.interpolate(mean[None, None], scale_factor=PATCH, mode="nearest")[0, 0].numpy()
    colors = matplotlib.colormaps["inferno"]((mean - mean.min()) / (mean.max() - mean.min()))[..., :3] * 255
    assert np.abs(picture - (OPACITY * colors + (1 - OPACITY) * arrays["image"])).max() < 2
    with Image.open(tmp_path / "portrait_mask.png") as masks:  # each head in its colour
        found = {tuple(color) for color in np.asarray(masks.convert("RGB")).reshape(-1, 3)}
    assert found >= {tuple(color) for color in head_colors(len(arrays["attention"]))}


def test_colours_lie_where_masks_are():
    picture = np.full((48, 80, 3), 100, dtype=np.uint8)
    attention = torch.zeros(2, 3, 5)
    attention[0, 0, :2] = torch.tensor([0.2, 0.3])
    attention[1, 0, 1:3] = torch.tensor([0.4, 0.1])
    masks = attention > 0
    red, cyan = head_colors(2).astype(int)
    assert red.argmax() == 0 and cyan.argmin() == 0
    overlay = mask_overlay(picture, masks[0].numpy(), head_colors(2)[0]).astype(int)
    inside = np.zeros((48, 80), dtype=bool)
    inside[:16, :32] = True
    assert (overlay[~inside] == 100).all() and (overlay[:15, :31] == np.round(0.4 * 100 + 0.6 * red)).all()
    assert (overlay[15, :32] == red).all() and (overlay[:16, 31] == red).all()  # the contour, not at the image's edge
    colored = colored_heads(picture, attention, masks).astype(int)
    assert (colored[5, 40 - 30] == np.round(40 + 0.6 * red)).all()
    # 0.4 of 0.5 is more than 0.3 of 0.5
    assert all((colored[5, x] == np.round(40 + 0.6 * cyan)).all() for x in (24, 40))
    assert (colored[20:, :] == 40).all() and (colored[:, 50:] == 40).all()  # of no head, darkened


def test_cells_are_enlarged_by_nearest_and_stay_where_they_belong():
    cells = np.arange(6).reshape(2, 3)
    reference = F.interpolate(torch.from_numpy(cells)[None, None].float(), size=(7, 11), mode="nearest-exact")
    assert np.array_equal(enlarge(cells, (7, 11)), reference[0, 0])
    assert np.array_equal(
        enlarge(cells, (5, 8), (2, 2))[[0, 1, 2, 4]][:, [1, 2, 5, 7]], cells[[0, 0, 1, 1]][:, [0, 1, 2, 2]]
    )


def test_sheet_has_a_row_an_image_in_its_aspect(folder, photos, tmp_path):
    attend(folder, "--image", *photos.glob("*.png"), "--output", tmp_path / "sheet.png", "--save_arrays")
    with Image.open(tmp_path / "sheet.png") as sheet:
        height = 1.3 * (48 / 32 + 32 / 64) + 0.25  # 32 is the network's own size; a title, and names below and beside
        width = 1.3 * (2 + tiny_config().num_attention_heads)
        assert sheet.width == pytest.approx(150 * (width + 0.15), rel=0.02)
        assert 150 * height < sheet.height < 150 * (height + 0.3)
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.png", "sheet.npz"}


def test_data_sets_are_seen_as_the_image_processor_makes_them_or_whole(folder, flat_folder, tmp_path):
    argv = ("--dataset_name", flat_folder, "--num_images", 2, "--save_arrays", "--seed", 3, "--output")
    attend(folder, *argv, tmp_path / "own/sheet.png")
    attend(folder, *argv, tmp_path / "whole/sheet.png", "--image_size", 64)
    sizes = {}
    for kind in ("own", "whole"):
        arrays = np.load(tmp_path / kind / "sheet.npz")
        sizes[kind] = [arrays[name].shape for name in arrays if name.endswith("_image")]
    assert sizes == {"own": [(32, 32, 3)] * 2, "whole": [(64, 64, 3)] * 2}


@pytest.mark.parametrize(("batch_size", "overlay"), [(1, False), (4, False), (4, True)])
def test_video_goes_in_and_comes_out(folder, film, tmp_path, batch_size, overlay):
    output = tmp_path / "new" / "out.mp4"
    argv = ("--video", film, "--output", output, "--image_size", 40, "--batch_size", batch_size)
    attend(folder, *argv, *(["--overlay"] if overlay else []))
    (frames, rate), (given, _) = read(output), read(film)
    assert frames.shape == given.shape == (13, 66, 98, 3) and rate == 12
    model, processor = load_model(str(folder))
    for number in (0, 7):
        seen = fit_to_patches(given[number].transpose(2, 0, 1), 40, PATCH)
        mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        std = torch.tensor(processor.image_std).view(3, 1, 1)
        attention = cls_attention(model, ((torch.from_numpy(seen) / 255 - mean) / std)[None])[0].mean(0).numpy()
        row, column = np.unravel_index(attention.argmax(), attention.shape)
        scale = 66 / 40 * PATCH  # of a cell in the frame
        brightest = frames[number, int((row + 0.5) * scale), int((column + 0.5) * scale)].astype(int)
        weight = OPACITY if overlay else 1  # the end of inferno is a light yellow
        under = given[number, int((row + 0.5) * scale), int((column + 0.5) * scale)]
        assert np.abs(brightest - (weight * np.array([252, 255, 164]) + (1 - weight) * under)).max() < 40
        assert frames[number].std() > 10


def test_video_that_lies_on_its_side_is_turned(tmp_path):
    path = write(tmp_path / "phone.mp4", [scene(66, 98)] * 2, rotation=90)
    upright = np.rot90(scene(66, 98))  # counterclockwise
    frames = list(Video(path, 3))
    assert len(frames) == 2 and frames[0].shape == (3, 98, 66)
    assert np.abs(frames[0].transpose(1, 2, 0).astype(int) - upright).mean() < 20
    assert Video(path, 1).rate == 12 and next(iter(Video(path, 1))).shape == (1, 98, 66)
    with pytest.raises(ValueError, match="1 or 3 channels, the model takes 4"):
        Video(path, 4)


def test_video_without_pyav_names_the_extra(folder, film, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    argv = ("attention", "--model", folder, "--video", film, "--output", tmp_path / "out.mp4")
    assert "pip install 'dino-hf[video]'" in answer(evaluate_from_command_line, argv, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "give one of --image, --video and --dataset_name, got none"),
        (("--image", "a.png", "--video", "b.mp4"), "got --image and --video"),
        (("--image", "{tmp}/a.png"), "images are missing, such as"),
        (("--image", "{tmp}/broken.png"), "broken.png cannot be decoded"),
        (("--image", "{tmp}/empty"), "there is no image in the folder"),
        (("--image", "{photos}", "--image_size", 3), "image_size must be at least a patch"),
        (("--image", "{photos}", "--mass", 1), "mass must be between 0 and 1"),
        (
            ("--image", "{photos}", "--output", "a.mp4"),
            "or a folder, got a.mp4; a video needs --video",
        ),
        (("--image", "{photos}", "--output", "a.jpg"), "a .png, .pdf or .svg, or a folder, got a.jpg"),
        (("--dataset_name", "{photos}", "--num_images", 0), "num_images must be at least 1, got 0"),
        (("--video", "{film}", "--output", "a.png"), "the output of --video ends in .mp4"),
        (("--video", "{film}", "--output", "{film}"), "cannot be its own output"),
        (("--video", "{film}", "--batch_size", 0), "batch_size must be at least 1"),
        (("--video", "{tmp}/absent.mp4"), "there is no video"),
        (("--video", "{tmp}/broken.mp4"), "cannot be read as a video"),
        (("--video", "{tmp}/sound.wav"), "has no video in it"),
        (("--video", "{tmp}/none.avi"), "has no frames"),
    ],
)
def test_mistakes_are_told_in_a_line(argv, message, folder, photos, film, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"nothing")
    if "sound" in str(argv):
        with av.open(str(tmp_path / "sound.wav"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
    if "none.avi" in str(argv):
        write(tmp_path / "none.avi", [])
    argv = [str(arg).format(tmp=tmp_path, photos=photos, film=film) for arg in argv]
    before = set(tmp_path.iterdir())
    assert message in answer(evaluate_from_command_line, ["attention", "--model", folder, *argv], capsys)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["resnet", "raw_pixels"])
def test_what_has_no_cls_attention_is_refused(kind, folder, photos, tmp_path, capsys):
    name = f"raw_pixels:{folder}"
    if kind == "resnet":
        name = tmp_path
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic")
        AutoModel.from_config(config).save_pretrained(name)
        make_image_processor(32).save_pretrained(name)
    argv = ("attention", "--model", name, "--image", photos, "--image_size", 32, "--output", tmp_path / "a.png")
    assert "attention" in answer(evaluate_from_command_line, argv, capsys)
    assert not (tmp_path / "a.png").exists()


def test_attention_compiles_nothing(folder):
    """Of a network whose blocks are compiled, as they may be in training."""
    compiled = []
    model = DINOModel.from_pretrained(folder)
    pixel_values = torch.randn(1, 3, 32, 32)
    expected = cls_attention(model, pixel_values)
    for block in model.layers:
        block.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    torch.testing.assert_close(cls_attention(model, pixel_values), expected)
    assert not compiled
    with torch.no_grad():
        model(pixel_values)
    assert compiled


def test_attention_keeps_no_whole_matrix(folder):
    """That of the large image would be all tokens by all tokens, a head and block."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            largest.extend(leaf.numel() for leaf in tree_leaves(output) if torch.is_tensor(leaf))
            return output

    model = DINOModel.from_pretrained(folder)
    with Watch():
        cls_attention(model, torch.randn(1, 3, 512, 512))
    assert max(largest) < 4097**2


def test_networks_of_timm_are_taken_at_any_size(photos, film, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    processing = {"mean": [0.4] * 3, "std": [0.3] * 3, "input_size": [3, 32, 32]}
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):
        config = TimmWrapperConfig(architecture=name, model_args=sizes, pretrained_cfg=processing)
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
    argv = ["attention", "--image_size", "48"]
    vit = [*argv, "--model", str(tmp_path / "vit_tiny_patch16_224")]
    evaluate_from_command_line([*vit, "--image", str(photos), "--save_arrays", "--output", str(tmp_path / "figures")])
    evaluate_from_command_line([*vit, "--video", str(film), "--output", str(tmp_path / "film.mp4")])
    for name, rows, columns in (("portrait", 9, 6), ("landscape", 6, 12)):
        arrays = np.load(tmp_path / f"figures/{name}.npz")
        pixel_values = (torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None] / 255 - 0.4) / 0.3
        reference = AutoModel.from_pretrained(tmp_path / "vit_tiny_patch16_224")  # of timm's own resizing
        reference.timm_model.set_input_size(img_size=tuple(pixel_values.shape[-2:]))
        assert arrays["attention"].shape == (3, rows, columns)
        expected = cls_attention(reference.eval(), pixel_values)[0]
        np.testing.assert_allclose(arrays["attention"], expected, rtol=0, atol=1e-6)
    beit = [*argv, "--model", tmp_path / "beit_base_patch16_224", "--image", photos, "--output", tmp_path / "b.png"]
    assert "does not take images of (48, 96): Input height" in answer(evaluate_from_command_line, beit, capsys)
