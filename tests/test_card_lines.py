"""Lines of the model card, run where the package is not installed, for every kind of images that a model takes."""

import json
import re

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from evaluation.decoding import EncodedImage, Reading
from evaluation.models import load_model, pooled, run_model, to_pixel_values
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor
from training.arguments import TrainingArguments
from training.publish import publish, write_card

from .original import tiny_config
from .without_package import run_without_package


# channels, bits, and the file that the card names
KINDS = {
    "gray": (1, 8, "image.jpg"),
    "color": (3, 8, "image.jpg"),
    "alpha": (4, 8, "image.png"),
    "bands": (5, 8, None),
    "gray16": (1, 16, "image.tif"),
    "bands16": (5, 16, "image.tif"),
}
RUN = """
import json, os
folder, kinds = os.getcwd(), json.loads(sys.argv[1])
from transformers import pipeline
found = {}
for kind, (lines, call) in kinds.items():
    os.chdir(f"{folder}/{kind}")
    names = {}
    exec(lines, names)
    found[kind] = [names["features"].flatten().tolist()]
    if call:
        for file in ("image.jpg", "image.png"):
            if os.path.exists(file):
                found[kind] += eval(call)(file, pool=True)
with open(f"{folder}/found.json", "w") as file:
    json.dump(found, file)
"""


def write_image(path, num_channels: int, bits: int) -> None:
    rng = np.random.default_rng(0)
    if bits == 16:
        pixels = rng.integers(0, 2**16, (num_channels, 40, 50), dtype=np.uint16)
        tifffile.imwrite(path, pixels, photometric="minisblack")
        return
    pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((50, 40))
    image.convert({1: "L", 3: "RGB", 4: "RGBA"}[num_channels]).save(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """For each kind, features by its card's lines and, where it names one, by its pipeline; and the folder of all."""
    root, kinds = tmp_path_factory.mktemp("cards"), {}
    for kind, (num_channels, bits, file) in KINDS.items():
        folder = root / kind
        folder.mkdir()
        backbone = DINOModel(tiny_config(num_channels=num_channels))
        processor = make_image_processor(32, num_channels, [0.4], [0.2], is_deep=bits > 8)
        publish(backbone, processor, folder)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        args = TrainingArguments(dataset_name="x", output_dir=str(folder))
        ending = ".tif" if bits > 8 else ".jpg"
        write_card(folder / "README.md", backbone, processor, args, None, 1, 1, False, [], ending)
        card = (folder / "README.md").read_text().replace("path/to/this/folder", f"../{kind}")
        call = re.search(r"`(pipeline\(.*trust_remote_code=True\))` gives the same", card)
        kinds[kind] = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], call and call[1]
        assert (call is None) == ("RGB of 8 bits, and so does not fit this model" in card)
        if file:
            write_image(folder / file, num_channels, bits)
    run_without_package(RUN, root, json.dumps(kinds), HF_HUB_OFFLINE="1")
    return json.loads((root / "found.json").read_text()), root


@pytest.mark.parametrize("kind", KINDS)
def test_card_lines_give_the_features_that_commands_compute(found, kind):
    num_channels, bits, file = KINDS[kind]
    features, root = found[0][kind], found[1]
    assert len(features) == (2 if bits == 8 and file else 1)
    model, processor = load_model(str(root / kind))
    if file:
        reading = Reading(num_channels, tiff_pages="channels")
        image = EncodedImage({"path": str(root / kind / file), "bytes": None}, reading).decode()
    else:
        image = np.zeros((num_channels, 32, 32), np.uint8)
    assert features[-1] == pytest.approx(features[0], abs=1e-5)
    with torch.no_grad():
        expected = pooled(model, run_model(model, to_pixel_values(processor, [image])))[0]
    for values in features:
        difference = (torch.tensor(values) - expected).abs().max()
        # AutoImageProcessor takes torchvision's resizing for three channels, which rounds otherwise than Pillow's
        assert difference < (0.05 if kind == "color" else 1e-5), kind


def test_pillow_images_of_any_mode_fit_one_and_four_channels():
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    gray = color.convert("L")
    one, four = (make_image_processor(32, num_channels, [0.5], [0.5]) for num_channels in (1, 4))
    for image in (gray, gray.convert("RGB"), gray.convert("LA"), gray.convert("RGBA")):
        expected = one(np.asarray(gray)[None], return_tensors="pt").pixel_values
        assert torch.equal(one(image, return_tensors="pt").pixel_values, expected)
    half = color.convert("RGBA")
    half.putalpha(128)
    for image, alpha in ((color, 255), (half, 128)):
        pixels = four(image, return_tensors="pt").pixel_values
        assert pixels.shape == (1, 4, 32, 32)
        torch.testing.assert_close(pixels[:, 3], torch.full((1, 32, 32), alpha / 127.5 - 1))
