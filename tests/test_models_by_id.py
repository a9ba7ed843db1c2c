"""`dino-eval` with models given by Hub id, of a Hub on 127.0.0.1 and of its cache."""

import json
import shutil

import pytest
import torch
import yaml

from evaluation.protocols import MEASUREMENTS, PROTOCOLS
from modeling_dino import DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import scripted
from .hub import Hub
from .original import tiny_config
from .test_copy_detection import copydays  # noqa: F401
from .test_hub import client
from .test_landmarks import benchmark  # noqa: F401
from .test_segmentation_masks import voc  # noqa: F401
from .test_video_segmentation import davis  # noqa: F401


NAME = "tester/tiny"
LABELED = "--dataset_name {labeled}"
ARGUMENTS = {
    "features": f"{LABELED} --features {{out}}/features",
    "duplicates": f"{LABELED} --output {{out}}/duplicates.csv",
    "knn": f"{LABELED} --k 1",
    "linear": f"{LABELED} --epochs 1 --n_last_blocks 2",
    "logistic": LABELED,
    "few_shot": f"{LABELED} --shots 1 --num_draws 1",
    "clustering": f"{LABELED} --num_init 1",
    "finetune": f"{LABELED} --epochs 1",
    "retrieval": LABELED,
    "landmarks": "--dataset_name {landmarks} --image_size 48",
    "copy_detection": "--dataset_name {copies} --image_size 32",
    "video_segmentation": "--dataset_name {videos} --image_size 64",
    "segmentation_masks": "--dataset_name {masks} --image_size 36",
    "attention": "--image {image} --output {out}/attention.png",
    "pca": "--image {image} --image_size 32 --output {out}/pca.png",
    "neighbours": f"{LABELED} --output {{out}}/neighbours.png",
    "embedding": f"{LABELED} --output {{out}}/embedding.png",
    "suite": "--config {suite} --output_dir {out}/suite",
}
RUN_ALL = """
import json, sys
from evaluation.__main__ import evaluate_from_command_line
from modeling_dino.command_line import run
for argv in json.loads(sys.argv[1]):
    run("dino-eval " + argv[0], evaluate_from_command_line, argv)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    DINOModel(tiny_config()).save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    with Hub() as hub:
        hub.add_model(NAME, folder)
        yield hub


def evaluate(protocols, places, out, **environment) -> None:
    """Run each protocol on the model, in one process; the reports are in `out`."""
    out.mkdir()
    commands = []
    for protocol in protocols:
        argv = [protocol, "--model", NAME, *ARGUMENTS[protocol].format(**places, out=out).split()]
        commands.append(argv + ["--output", str(out / f"{protocol}.json")] * (protocol in MEASUREMENTS))
    finished = scripted(RUN_ALL, out, json.dumps(commands), **environment)
    assert finished.returncode == 0, finished.stderr


def revision(path) -> str:
    (report,) = json.loads(path.read_text())
    assert report["model"]["name"] == NAME
    return report["model"]["revision"]


def test_report_names_the_commit_online_and_offline(hub, parquet_folder, tmp_path):
    commit, places = hub.repositories[f"models/{NAME}"].commit, {"labeled": parquet_folder}
    environment = client(hub.url, tmp_path / "home")
    evaluate(["knn"], places, tmp_path / "online", **environment)
    evaluate(["knn"], places, tmp_path / "offline", **environment | {"HF_HUB_OFFLINE": "1"})
    assert revision(tmp_path / "online/knn.json") == revision(tmp_path / "offline/knn.json") == commit


@pytest.mark.slow
def test_every_protocol_takes_a_hub_id(
    hub, parquet_folder, flat_folder, benchmark, copydays, davis, voc, tmp_path  # noqa: F811
):  # fmt: skip
    assert ARGUMENTS.keys() == PROTOCOLS.keys() | {"suite"}
    knn = {"protocol": "knn", "dataset_name": "images", "k": [1]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"data": {"images": str(parquet_folder)}, "measure": [knn]}))
    places = {
        "labeled": parquet_folder, "landmarks": benchmark[0], "copies": copydays, "videos": davis, "masks": voc,
        "image": flat_folder / "0.png", "suite": tmp_path / "suite.yaml",
    }  # fmt: skip
    evaluate(ARGUMENTS, places, tmp_path / "out", **client(hub.url, tmp_path / "home"))
    commit = hub.repositories[f"models/{NAME}"].commit
    assert {protocol: revision(tmp_path / f"out/{protocol}.json") for protocol in MEASUREMENTS} == dict.fromkeys(
        MEASUREMENTS, commit
    )
    assert commit in (tmp_path / "out/suite/table.csv").read_text()
    for name in ("attention", "pca", "neighbours", "embedding"):
        assert (tmp_path / f"out/{name}.png").is_file()
    hub_home, offline = tmp_path / "home", {"HF_HUB_OFFLINE": "1"}
    shutil.rmtree(tmp_path / "out")
    evaluate(ARGUMENTS, places, tmp_path / "out", **client("http://127.0.0.1:9", hub_home) | offline)
    assert {revision(tmp_path / f"out/{protocol}.json") for protocol in MEASUREMENTS} == {commit}
