"""Pictures of features: principal components of patches, neighbours, embeddings in the plane."""

import html
import io
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image as PillowImage
from sklearn.manifold import TSNE, trustworthiness
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from transformers import AutoModel, TimmWrapperConfig

from evaluation import neighbours
from evaluation.__main__ import evaluate_from_command_line
from evaluation.embedding import draw_embedding, embed_in_plane
from evaluation.features import read_features
from evaluation.images import load_images
from evaluation.models import load_model, mean_and_std
from evaluation.neighbours import draw_neighbours, nearest_images
from evaluation.pca import draw_colors, patch_map, principal_components, resize_and_crop
from evaluation.pictures import choose_images, find_images, short_label, write_files

from .conftest import noise
from .test_bad_input import answer
from .test_features import ours, save_network  # noqa: F401


def evaluate(*argv) -> None:
    evaluate_from_command_line(list(map(str, argv)))


@pytest.fixture(scope="module")
def kept(ours, parquet_folder, tmp_path_factory):  # noqa: F811
    """Features of both splits."""
    folder = tmp_path_factory.mktemp("features")
    evaluate("features", "--model", ours, "--dataset_name", parquet_folder, "--features", folder)
    return folder


def drawn(figure, path) -> np.ndarray:
    """The PNG of a figure."""
    write_files(Namespace(protocol="pca", output=str(path), save_arrays=False), figure, {})
    return np.asarray(PillowImage.open(path).convert("RGB"), dtype=int)


def places(picture: np.ndarray, color) -> np.ndarray:
    """(row, column) of all pixels of a color in [0, 1]."""
    return np.argwhere((abs(picture - 255 * np.array(to_rgb(color))) < 2).all(-1))


def by_svd(vectors: np.ndarray) -> np.ndarray:
    """The first three principal components; the largest weight of each is positive."""
    centred = vectors - vectors.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    signs = [np.sign(axis[abs(axis).argmax()]) for axis in axes]
    return centred @ (axes * np.array(signs)[:, None]).T


def scaled(components: np.ndarray) -> np.ndarray:
    low, high = np.percentile(components, 2, axis=0), np.percentile(components, 98, axis=0)
    return ((components - low) / (high - low)).clip(0, 1)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    scale = np.linspace(3, 1, 16)
    return [rng.normal(size=(rows, columns, 16)) * scale for rows, columns in ((7, 9), (8, 5))]


def test_components_are_those_of_all_maps_together(maps):
    components, colors = principal_components(maps)
    expected = by_svd(np.concatenate([features.reshape(-1, 16) for features in maps]))
    for values, wanted in ((components, expected), (colors, scaled(expected))):
        assert [part.shape for part in values] == [(7, 9, 3), (8, 5, 3)]
        np.testing.assert_allclose(np.concatenate([part.reshape(-1, 3) for part in values]), wanted, atol=1e-9)


def test_foreground_is_one_side_of_the_first_component_and_has_components_of_its_own(maps):
    vectors = np.concatenate([features.reshape(-1, 16) for features in maps])
    first = by_svd(vectors)[:, 0]
    for side, kept in (("above", first > 0), ("below", first < 0)):  # noqa: F402
        components, colors = (
            np.concatenate([part.reshape(-1, 3) for part in values]) for values in principal_components(maps, side)
        )
        np.testing.assert_allclose(components[kept], by_svd(vectors[kept]), atol=1e-9)
        assert np.isnan(components[~kept]).all() and (colors[~kept] == 1).all()


def test_sheet_has_each_image_over_its_colors(tmp_path):
    images = [np.full((40, width, 3), grey, dtype=np.uint8) for width, grey in ((80, 51), (40, 102))]
    quarters = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=float)
    picture = drawn(draw_colors(images, [quarters, np.full((1, 1, 3), [0.0, 1, 1])]), tmp_path / "sheet.png")
    first, second = places(picture, [0.2] * 3), places(picture, [0.4] * 3)
    height = np.ptp(first[:, 0])
    assert abs(np.ptp(first[:, 1]) - 2 * height) < 3 and abs(np.ptp(second[:, 1]) - height) < 3  # their aspects
    centre = first.mean(0)
    for color, (down, right) in (("red", (-1, -1)), ("lime", (-1, 1)), ("blue", (1, -1)), ("yellow", (1, 1))):
        away = places(picture, color).mean(0) - centre
        assert away == pytest.approx([1.04 * height + down * height / 4, right * height / 2], abs=4)
    assert places(picture, "cyan").mean(0) - second.mean(0) == pytest.approx([1.04 * height, 0], abs=4)


def test_images_keep_their_aspect_and_are_cut_to_patches():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 50, 83), dtype=np.uint8)
    expected = PillowImage.fromarray(pixels.transpose(1, 2, 0)).resize((53, 32), PillowImage.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_and_crop(pixels, 32, 8), np.asarray(expected)[:, :48].transpose(2, 0, 1))


def test_pca_command_colors_the_models_patches(ours, tmp_path, capsys):  # noqa: F811
    (tmp_path / "images").mkdir()
    for name, size in (("b", (40, 32)), ("a", (32, 48))):
        noise(np.random.default_rng(0), 64).crop((0, 0, *size)).save(tmp_path / f"images/{name}.png")
    out = tmp_path / "new/pca.png", tmp_path / "new/pca.npz"
    flags = "--image", tmp_path / "images", "--image_size", 32, "--output", out[0], "--save_arrays"
    evaluate("pca", "--model", ours, *flags)
    assert f"wrote {out[0]} and {out[1]}" in capsys.readouterr().out
    model, processor = load_model(str(ours))
    mean, std = mean_and_std(processor, 3)
    vectors = []
    for name in "ab":
        pixels = np.array(PillowImage.open(tmp_path / f"images/{name}.png")).transpose(2, 0, 1)
        with torch.no_grad():
            output = model((torch.from_numpy(pixels) / 255 - mean)[None] / std)
        vectors.append(output.last_hidden_state[0, 1:].double().numpy())
    arrays = np.load(out[1])
    components = np.concatenate([arrays[f"components_{number}"].reshape(-1, 3) for number in range(2)])
    np.testing.assert_allclose(components, by_svd(np.concatenate(vectors)), atol=1e-4)
    np.testing.assert_allclose(arrays["colors_1"].reshape(-1, 3), scaled(components)[len(vectors[0]) :], atol=1e-6)
    with PillowImage.open(out[0]) as picture:
        assert picture.width > 300 and picture.height > 300


def test_networks_of_others_are_taken_at_any_size(parquet_folder, tmp_path):
    save_network("resnet", tmp_path / "resnet")
    save_network("dinov3", tmp_path / "dinov3")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    processing = {"mean": [0.4] * 3, "std": [0.3] * 3, "input_size": [3, 32, 32]}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, pretrained_cfg=processing)
    AutoModel.from_config(config).save_pretrained(tmp_path / "timm")
    for name in ("resnet", "dinov3", "timm"):
        flags = "--dataset_name", parquet_folder, "--image_size", 64, "--num_images", 3
        files = "--output", tmp_path / f"{name}.png", "--save_arrays"
        evaluate("pca", "--model", tmp_path / name, *flags, *files)
        shapes = [values.shape for key, values in np.load(tmp_path / f"{name}.npz").items() if "colors" in key]
        assert shapes == 3 * [(8, 8, 3)], name


def test_timms_position_embeddings_are_those_of_the_trained_size_every_time(tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes)
    model = AutoModel.from_config(config).eval()
    large, usual = torch.randn(3, 64, 40), torch.randn(3, 32, 32)
    with torch.no_grad():
        expected = model(usual[None]).last_hidden_state[0, 1:].unflatten(0, (4, 4))
        maps = patch_map(model, large), patch_map(model, usual), patch_map(model, large)
        model.timm_model.set_input_size(img_size=(64, 40))
        expected_of_large = model(large[None]).last_hidden_state[0, 1:].unflatten(0, (8, 5))
    for found, wanted in zip(maps, (expected_of_large, expected, expected_of_large)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("alone", [False, True])
def test_neighbours_are_scikit_learns(kept, ours, parquet_folder, tmp_path, alone):  # noqa: F811
    source = ["--features", kept] if not alone else ["--model", ours, "--dataset_name", parquet_folder]
    files = "--output", tmp_path / "n.png", "--save_arrays"
    split = ["--eval_split", "train"] if alone else []
    evaluate("neighbours", *source, *split, "--num_images", 5, "--k", 3, "--seed", 1, *files)
    arrays = np.load(tmp_path / "n.npz")
    train, test = (read_features(kept / f"{name}.parquet").features.numpy() for name in ("train", "test"))
    reference = NearestNeighbors(n_neighbors=4, metric="cosine").fit(train)
    distances, indices = reference.kneighbors((train if alone else test)[arrays["queries"]])
    own = slice(1, 4) if alone else slice(0, 3)  # the nearest of all is the image itself
    np.testing.assert_array_equal(arrays["indices"], indices[:, own])
    np.testing.assert_allclose(arrays["similarities"], 1 - distances[:, own], atol=1e-5)
    assert len(set(arrays["queries"])) == 5
    with PillowImage.open(tmp_path / "n.png") as picture:
        assert picture.width < picture.height


def test_files_as_queries_find_themselves(ours, flat_folder, tmp_path):  # noqa: F811
    flags = "--dataset_name", flat_folder, "--image", flat_folder, flat_folder / "7.png", "--k", 2, "--num_images", 12
    files = "--output", tmp_path / "n.png", "--save_arrays"
    evaluate("neighbours", "--model", ours, *flags, *files)
    arrays = np.load(tmp_path / "n.npz")
    assert (arrays["similarities"][:, 0] > 1 - 1e-5).all() and (arrays["similarities"][:, 1] < 1 - 1e-5).all()
    assert sorted(arrays["indices"][:12, 0]) == list(range(12)) and len(arrays["indices"]) == 13


def test_frames_tell_the_class(tmp_path):
    blue, others = np.full((20, 20, 3), (0, 0, 255), np.uint8), [[np.full((20, 20, 3), 102, np.uint8)] * 2] * 2
    same_class = np.array([[True, False], [False, True]])
    arguments = [blue] * 2, others, np.full((2, 2), 0.5), ["a", "b"]
    picture = drawn(draw_neighbours(*arguments, [["a", "b"]] * 2, same_class), tmp_path / "n.png")
    middle = np.array(picture.shape[:2]) // 2
    for color, is_right_above in (("tab:green", False), ("tab:red", True)):
        rows, columns = places(picture, color).T
        above = columns[rows < middle[0]], columns[rows > middle[0]]
        right, left = above if is_right_above else above[::-1]
        assert len(left) > 100 and left.max() < right.min()
        assert left.min() > places(picture, "blue")[:, 1].max()  # no frame around the query
    without = drawn(draw_neighbours(*arguments), tmp_path / "n.png")
    assert not len(places(without, "tab:green")) and not len(places(without, "tab:red"))


def test_pictures_are_those_of_the_indices(kept, ours, parquet_folder, tmp_path, monkeypatch):  # noqa: F811
    given = []
    monkeypatch.setattr(neighbours, "draw_neighbours", lambda *args: given.extend(args) or draw_neighbours(*args))
    files = "--output", tmp_path / "n.png", "--save_arrays"
    evaluate("neighbours", "--features", kept, "--num_images", 3, "--k", 2, *files)
    arrays = np.load(tmp_path / "n.npz")
    labels = [read_features(kept / f"{name}.parquet").labels for name in ("test", "train")]
    sets = [load_images(str(parquet_folder), split=split) for split in ("test", "train")]

    def pixels(rows, index):
        return np.asarray(PillowImage.open(io.BytesIO(rows[int(index)]["image"]["bytes"])))

    queries, shown, _, query_names, names, same_class = given
    for number, (query, indices) in enumerate(zip(arrays["queries"], arrays["indices"])):
        np.testing.assert_array_equal(queries[number], pixels(sets[0], query))
        assert query_names[number] == f"number {query}\n{'ab'[labels[0][query]]}"
        for column, index in enumerate(indices):
            np.testing.assert_array_equal(shown[number][column], pixels(sets[1], index))
            assert names[number][column] == f"number {index}\n{'ab'[labels[1][index]]}"
            assert same_class[number, column] == (labels[1][index] == labels[0][query])


def test_embedding_is_scikit_learns_and_the_same_again(kept, tmp_path):
    for name in ("one", "two"):
        files = "--output", tmp_path / f"{name}.png", "--save_arrays"
        flags = "--features", kept, "--eval_split", "train", "--perplexity", 5, "--seed", 3, "--max_images", 30
        evaluate("embedding", *flags, *files)
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    features = read_features(kept / "train.parquet")
    assert len(set(one["images"])) == 30
    points = normalize(features.features.numpy()[one["images"]])
    expected = TSNE(perplexity=5, init="pca", random_state=3).fit_transform(points)
    np.testing.assert_array_equal(one["coordinates"], expected)
    np.testing.assert_array_equal(one["coordinates"], two["coordinates"])
    np.testing.assert_array_equal(one["labels"], features.labels[one["images"]])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_points_have_the_colors_of_their_classes(tmp_path):
    coordinates = np.array([[0.0, 0.0], [1, 0], [0, 1], [1, 1]])
    figure = draw_embedding(coordinates, np.array([0, 1, 0, 1]), ["cat", "dog"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog"]
    points = figure.axes[0].collections[0]
    for place, color in zip(points.get_offsets(), points.get_facecolors()):
        assert tuple(color[:3]) == to_rgb("tab:orange" if place[0] == 1 else "tab:blue")
    figure = draw_embedding(coordinates)
    assert not figure.legends and len(np.unique(figure.axes[0].collections[0].get_facecolors(), axis=0)) == 1
    many = draw_embedding(np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 30)
    assert not many.legends and "class, of 30" in [axis.get_ylabel() for axis in many.axes]
    assert drawn(many, tmp_path / "many.png").min() < 200


def test_perplexity_is_clipped_with_a_warning():
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="perplexity = 30 is too much for 10 images and is clipped to 3"):
        coordinates = embed_in_plane(features)
    np.testing.assert_array_equal(coordinates, embed_in_plane(features, perplexity=3))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of numba
def test_umap_is_the_same_again_and_keeps_neighbours():
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(4, 16)).repeat(20, 0) + 0.1 * rng.normal(size=(80, 16)))
    coordinates = embed_in_plane(features, "umap", num_neighbors=5)
    assert trustworthiness(features, coordinates) > 0.9
    np.testing.assert_array_equal(coordinates, embed_in_plane(features, "umap", num_neighbors=5))


def test_bad_input(ours, kept, parquet_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    def ask(*argv):
        return answer(evaluate_from_command_line, argv, capsys)

    model, data = ("--model", ours), ("--dataset_name", parquet_folder)
    (tmp_path / "empty").mkdir()
    assert f"no image in the folder {tmp_path / 'empty'}" in ask("pca", *model, "--image", tmp_path / "empty")
    assert "1 of 1 images are missing, such as x.png" in ask("neighbours", *model, *data, "--image", "x.png")
    assert "num_images and image_size must be at least 1, got 0" in ask("pca", *model, *data, "--num_images", 0)
    assert "num_images and k must be at least 1, got 8 and 0" in ask("neighbours", *model, *data, "--k", 0)
    assert "k must be between 1 and the 40 images to choose from, got 41" in ask(
        "neighbours", "--features", kept, "--k", 41
    )
    for command in ("pca", "neighbours", "embedding"):
        assert "output must end in .png, .pdf or .svg, got x.jpg" in ask(command, *model, *data, "--output", "x.jpg")
        assert "give --model" in ask(command, *model)
    assert "leave out --streaming" in ask("neighbours", *model, *data, "--streaming")
    assert "raw pixels have no patches" in ask("pca", "--model", f"raw_pixels:{ours}", *data)
    assert "smaller than a patch of 8" in ask("pca", *model, *data, "--image_size", 7)
    assert "at least 4 images, got 3" in ask("embedding", "--features", kept, "--max_images", 3)
    assert "max_images must be at least 1, got 0" in ask("embedding", "--features", kept, "--max_images", 0)
    assert "perplexity must be at least 1" in ask("embedding", "--features", kept, "--perplexity", 0)
    monkeypatch.setitem(sys.modules, "umap", None)
    assert "pip install 'dino-hf[umap]'" in ask("embedding", "--features", kept, "--method", "umap")


def test_out_of_bounds_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 4 images to choose from, got 5"):
        nearest_images(torch.eye(5), torch.eye(5), 5, range(5))
    with pytest.raises(ValueError, match="three components need 3 patches and 3 features, got 2, 5"):
        principal_components([np.ones((1, 2, 5))])


def test_classes_of_splits_are_matched_in_frames(ours, parquet_folder, tmp_path, monkeypatch):  # noqa: F811
    """Two splits that number the same classes otherwise get the same frames."""
    frames = []
    monkeypatch.setattr(neighbours, "draw_neighbours", lambda *given: frames.append(given[-1]) or plt.figure())
    splits = {name: load_images(str(parquet_folder), split=name) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "same")
    splits["test"] = splits["test"].map(lambda row: {"label": 1 - row["label"]}).cast_column("label", Value("int64"))
    splits["test"] = splits["test"].cast_column("label", ClassLabel(names=["b", "a"]))
    DatasetDict(splits).save_to_disk(tmp_path / "swapped")
    for name in ("same", "swapped"):
        evaluate(
            "neighbours", "--model", ours, "--dataset_name", tmp_path / name, "--output", tmp_path / f"{name}.png"
        )
    np.testing.assert_array_equal(*frames)
    assert frames[0].any() and not frames[0].all()


# what all pictures share


SOURCES = {
    "attention": ("--model", "{ours}", "--dataset_name", "{flat}", "--eval_split", "train", "--num_images", 3),
    "pca": ("--model", "{ours}", "--image", "{flat}", "--image_size", 32, "--num_images", 3),
    "neighbours": ("--features", "{kept}", "--num_images", 3, "--k", 2),
    "embedding": ("--features", "{kept}", "--eval_split", "train", "--perplexity", 5, "--max_images", 30),
    "duplicates": ("--features", "{kept}", "--threshold", 0.9999),
}


@pytest.fixture(scope="module")
def draw(ours, kept, flat_folder):  # noqa: F811
    def draw(command, path, *argv):
        given = [str(each).format(ours=ours, flat=flat_folder, kept=kept) for each in SOURCES[command]]
        output = ("--output", path) if command != "duplicates" else ("--output", "{path}.csv", "--picture", path)
        evaluate(command, *given, *(str(each).format(path=path) for each in output), *argv)

    return draw


def texts(picture) -> list[str]:
    """All that is written in an SVG, which has its letters as comments."""
    return re.findall(r"<!-- (.*?) -->", html.unescape(picture.read_text()))


@pytest.mark.parametrize("command", SOURCES)
def test_picture_is_written_as_pdf_and_svg_and_names_its_model(draw, command, ours, tmp_path):  # noqa: F811
    for suffix in (".pdf", ".svg"):
        path = tmp_path / f"new/picture{suffix}"
        draw(command, path)
        first = path.read_bytes()
        assert first.startswith({".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
        draw(command, path)  # a command replaces its own picture
        assert path.read_bytes() == first
        other = "pca" if command != "pca" else "embedding"
        with pytest.raises(ValueError, match=f"exists and is not from dino-eval {other}"):
            draw(other, path)
    written = texts(tmp_path / "new/picture.svg")
    assert f"model: {ours}" in written or f"model: …{str(ours)[-59:]}" in written


@pytest.mark.parametrize("command", ["attention", "pca"])
def test_pictures_of_given_images_name_their_data(command, ours, flat_folder, tmp_path):  # noqa: F811
    short = tmp_path / "images"
    shutil.copytree(flat_folder, short)
    for given, data in (([short], str(short)), ([short, short / "3.png"], f"{short} and 1 more")):
        flags = "--image", *given, "--num_images", 2, "--image_size", 32, "--output", tmp_path / f"{command}.svg"
        evaluate(command, "--model", ours, *flags)
        [caption] = [text for text in texts(tmp_path / f"{command}.svg") if text.startswith("data: ")]
        assert caption.removeprefix("data: ") == short_label(data, 60)


def test_embedding_names_its_method_model_and_data(draw, kept, tmp_path):
    draw("embedding", tmp_path / "embedding.svg")
    written = texts(tmp_path / "embedding.svg")
    assert "t-SNE of the features of 30 images" in written
    assert any(text.startswith("model: ") for text in written) and any(text.startswith("data: ") for text in written)


def test_long_class_names_are_shortened_alike(ours, tmp_path):  # noqa: F811
    names = [f"a_very_long_class_name_of_{kind}_pears" for kind in ("red", "green")]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            noise(np.random.default_rng(number)).save(tmp_path / "data" / name / f"{number}.png")
    for command, flags in (("embedding", ("--perplexity", 2)), ("neighbours", ("--k", 1))):
        path = tmp_path / f"{command}.svg"
        evaluate(command, "--model", ours, "--dataset_name", tmp_path / "data", "--output", path, *flags)
        ends = {name for name in names for text in texts(path) if text[:1] == "…" and name.endswith(text[1:])}
        assert ends == set(names), command


def test_pictures_name_their_files(draw, flat_folder, tmp_path):
    for command in ("attention", "pca"):
        draw(command, tmp_path / f"{command}.svg")
        found = {text for text in texts(tmp_path / f"{command}.svg") if text.endswith(".png")}
        assert len(found) == 3 and found <= {path.name for path in flat_folder.iterdir()}


def test_name_with_dollars_is_drawn_as_it_is(ours, tmp_path):  # noqa: F811
    (tmp_path / "images").mkdir()
    for name in ("a$^$.png", "写真.png"):  # which is no mathematics, and not in the font
        noise(np.random.default_rng(0)).save(tmp_path / "images" / name)
    for command in ("attention", "pca"):
        flags = "--image", tmp_path / "images", "--image_size", 32, "--output", tmp_path / f"{command}.svg"
        evaluate(command, "--model", ours, *flags)
        assert "a$^$.png" in texts(tmp_path / f"{command}.svg")


@pytest.mark.parametrize("command", ["attention", "pca", "neighbours"])
def test_folder_is_drawn_in_part_unless_asked(command, ours, flat_folder, tmp_path, capsys):  # noqa: F811
    """Of twelve images of a folder, eight; a file that is named is always one of them."""
    flags = ["--model", ours, "--image", flat_folder, flat_folder / "7.png", "--output", tmp_path / "a.png"]
    flags += ["--save_arrays", "--image_size", 32] + ["--dataset_name", flat_folder] * (command == "neighbours")
    counted = {"attention": "attention", "pca": "colors", "neighbours": "queries"}[command]

    def drawn() -> int:
        arrays = np.load(tmp_path / "a.npz")
        return len(arrays["queries"]) if command == "neighbours" else sum(counted in name for name in arrays)

    evaluate(command, *flags)
    assert drawn() == 9 and "drawing 8 of 12 images; --num_images sets how many\n" in capsys.readouterr().out
    evaluate(command, *flags, "--num_images", 100)
    assert drawn() == 13 and "drawing" not in capsys.readouterr().out


def test_images_of_a_folder_are_chosen_by_the_seed_and_come_by_name(flat_folder):
    chosen = [[row["image"]["path"] for row in find_images([str(flat_folder)], 5, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and all(len(set(paths)) == 5 for paths in chosen)
    everything = [row["image"]["path"] for row in find_images([str(flat_folder)], 12, 0)]
    assert all(paths == [path for path in everything if path in paths] for paths in chosen)


def test_dataset_is_drawn_as_datasets_shuffles_it():
    shuffled = Dataset.from_dict({"number": range(50)}).shuffle(seed=3)["number"][:7]
    assert choose_images(50, 7, 3).tolist() == list(shuffled)
