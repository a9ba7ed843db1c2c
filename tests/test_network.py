"""Training from a Hub on 127.0.0.1 whose network fails, by the real commands."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from .commands import TWO, command, trained
from .hub import Hub
from .test_hub import client
from .test_interruption import has_done, start, wait_until
from .test_training import losses, metrics, recipe  # noqa: F401


@pytest.fixture
def hub(parquet_folder):
    with Hub() as hub:
        hub.add_dataset("tester/noise", {path.name: path.read_bytes() for path in parquet_folder.glob("*.parquet")})
        yield hub


@pytest.fixture
def streamed(hub, recipe, tmp_path):  # noqa: F811
    """Runs of three epochs of ten steps: flags, output folder, environment."""
    argv = ("--config", recipe, "--dataset_name", "tester/noise", "--streaming", "--num_examples", 40)
    argv += ("--per_device_train_batch_size", 4, "--num_train_epochs", 3, "--save_steps", 100)
    environment = client(hub.url, tmp_path / "home") | {"HF_HUB_DOWNLOAD_TIMEOUT": "2"}

    def flags(name: str, *more) -> tuple:
        return *argv, "--output_dir", tmp_path / name, *more

    return flags, tmp_path, environment


# requests of the start, for what columns there are, and of the first epoch, which is read before the first step
BEFORE = ["", "", "", ""]


@pytest.mark.slow
def test_faults_are_tried_again_visibly_and_change_nothing(hub, streamed):
    flags, folder, environment = streamed
    trained(*flags("whole"), **environment)
    hub.faults.extend([*BEFORE, "reset", "500", "stall", "429"])
    finished = command(*flags("faults"), **environment)
    assert finished.returncode == 0, finished.stderr
    assert not hub.faults
    for words in ("HTTP Error 500 thrown", "HTTP Error 429 thrown", "timed out", "Retrying in 1s"):
        assert words in finished.stderr
    assert losses(folder / "faults") == losses(folder / "whole")


@pytest.mark.slow
def test_stream_is_read_anew_after_an_outage_that_the_library_gives_up_at(hub, streamed):
    flags, folder, environment = streamed
    trained(*flags("whole"), **environment)
    hub.faults.extend([*BEFORE, *["503"] * 7])  # six tries in 23 seconds, and one more
    finished = command(*flags("outage"), **environment)
    assert finished.returncode == 0, finished.stderr
    assert "the stream broke off, HfHubHTTPError: " in finished.stderr and "reading on in 1 s" in finished.stderr
    assert losses(folder / "outage") == losses(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "stall"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_network_that_stays_away_ends_the_run_with_a_checkpoint(hub, streamed, num_processes, fault):
    flags, folder, environment = streamed
    options = environment | ({"launcher": TWO} if num_processes == 2 else {})
    trained(*flags("whole"), **options)
    hub.faults.extend(BEFORE * num_processes)
    hub.last_fault = fault
    finished = command(*flags("stopped", "--stream_timeout", 5), **options)
    assert finished.returncode != 0
    message = next(line for line in finished.stderr.splitlines() if line.startswith("dino-train: error: "))
    assert "no image came from the stream for stream_timeout = 5 s" in message
    assert str(folder / f"stopped/checkpoints/step_{10 // num_processes:07}") in message
    hub.last_fault = ""
    trained(*flags("stopped", "--resume_from_checkpoint", "latest"), **options)
    assert losses(folder / "stopped") == losses(folder / "whole")


@pytest.mark.parametrize("fault", ["503", "stall"])
def test_run_that_waits_for_the_network_can_be_told_to_stop(hub, streamed, fault):
    flags, folder, environment = streamed
    hub.faults.extend(BEFORE)
    hub.last_fault = fault
    running = start(*flags("stopped"), **environment)
    wait_until(lambda: has_done(folder / "stopped", 10), running)
    os.kill(running.pid, signal.SIGTERM)
    asked = time.monotonic()
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 75 and "Stopped by SIGTERM after step 10 of 30" in printed, printed
    assert time.monotonic() - asked < 15  # the library tries for longer, and stream_timeout is half an hour
    assert (folder / "stopped/checkpoints/step_0000010/manifest.json").is_file()


def test_imagenet_streams_by_its_recipe(hub, parquet_folder, tmp_path):
    """The recipe as it is, but for a small network, batch and number of steps."""
    files = {f"data/{path.name}": path.read_bytes() for path in parquet_folder.glob("train-*.parquet")}
    hub.add_dataset("ILSVRC/imagenet-1k", files)
    small = ("hidden_size=24", "num_hidden_layers=1", "num_attention_heads=2", "out_dim=32", "head_hidden_dim=16")
    argv = ("--config", "imagenet_vit_small_patch16", "--output_dir", tmp_path / "run", "--config_overrides", *small)
    argv += ("--per_device_train_batch_size", 4, "--max_steps", 2, "--warmup_epochs", 0, "--logging_steps", 1)
    trained(*argv, **client(hub.url, tmp_path / "home"))
    lines = metrics(tmp_path / "run")
    assert [line["epoch"] * (1281167 // 4) for line in lines] == pytest.approx([1, 2])
    card = (tmp_path / "run/README.md").read_text()
    assert "https://huggingface.co/datasets/ILSVRC/imagenet-1k" in card


@pytest.mark.parametrize(("name", "words"), [("tester/closed", "gated"), ("tester/nothing", "doesn't exist")])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_data_that_the_hub_does_not_give_says_how_to_log_in(hub, recipe, tmp_path, name, words, streaming):  # noqa: F811
    hub.add_dataset("tester/closed", {"train.parquet": b"secret"}, gated=True)
    argv = ("--config", recipe, "--dataset_name", name, "--output_dir", tmp_path / "run", "--num_examples", 40)
    finished = command(*argv, *["--streaming"] * streaming, **client(hub.url, tmp_path / "home"))
    assert finished.returncode == 2
    [message] = finished.stderr.strip().splitlines()
    assert name in message and words in message and "hf auth login" in message
    assert not (tmp_path / "run").exists()


def test_other_columns_of_a_stream_are_not_read(hub, parquet_folder, tmp_path):
    """Masks ten times as large as the images, and so far apart that reading ahead does not reach over them."""
    rng = np.random.default_rng(0)
    rows = {name: [{"bytes": rng.bytes(size), "path": None} for _ in range(60)]
            for name, size in (("image", 30_000), ("mask", 300_000))}  # fmt: skip
    features = Features({"image": Image(), "mask": Image(), "label": ClassLabel(names=["a"])})
    Dataset.from_dict(rows | {"label": [0] * 60}, features=features).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    hub.add_dataset("tester/masks", {"train.parquet": content})
    script = "from evaluation.images import load_images; import sys; rows = list(load_images(" \
        "'tester/masks', image_column='image', streaming=True, with_labels=False)); " \
        "print(len(rows), *rows[0], sum(len(row['image']['bytes']) for row in rows))"  # fmt: skip
    environment = {**os.environ, **client(hub.url, tmp_path / "home")}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=90
    )
    assert printed.stdout.split() == ["60", "image", "1800000"], printed.stderr
    assert hub.bytes_sent < 0.5 * len(content)
