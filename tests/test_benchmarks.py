"""That what is measured by hand still runs; never how fast."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str, *argv) -> str:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *map(str, argv)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_data_is_measured_beside_the_original_and_lightly_if_it_is_there(parquet_folder, tmp_path):
    output = tmp_path / "data.json"
    printed = benchmark("data", "--dataset_name", parquet_folder, "--rounds", 1, "--seconds", 0.2, "--output", output)
    results = {row["variant"]: row for row in json.loads(output.read_text())["results"]}
    assert {"the original's recipe (PIL)", "host half: decode, crops", "both halves on one core"} <= results.keys()
    for name, row in results.items():
        assert name in printed and row["images_per_second"] > 0 and row["peak_memory_mib"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["whole", "streaming"])
def test_memory_is_printed_on_the_way(parquet_folder, more):
    printed = benchmark("data", "--dataset_name", parquet_folder, "--memory_images", 640, *more)
    counts = [int(count) for count in re.findall(r"(\d+) images +\d+ MiB in 3 processes", printed)]
    assert counts[0] == 64 and counts[-1] == 640


@pytest.mark.slow
def test_knn_is_measured_at_growing_numbers_of_queries(tmp_path):
    output = tmp_path / "knn.json"
    printed = benchmark("knn", "--bank", 3000, "--queries", 400, "--hidden", 8, "--output", output)
    results = json.loads(output.read_text())["results"]
    assert [row["queries"] for row in results] == [10, 20, 40, 10] and results[-1]["variant"] == "scikit-learn"
    assert all(row["seconds"] > 0 and f"{row['mib_on_top']:.0f}" in printed for row in results)


def check_turns(printed: str, output: Path, variants: list[str]) -> list[dict]:
    """A table of the variants, printed and beside the JSON, each compared with the plain one."""
    about = json.loads(output.read_text())
    assert about["command"].startswith("python benchmarks/") and about["date"] and about["processor"]
    rows = [row for row in about["results"] if not row["variant"].startswith("lightly")]  # which may not be there
    assert [row["variant"].partition(",")[0] for row in rows] == variants
    for row in about["results"]:
        line = next(line for line in printed.splitlines() if line.startswith(f"| {row['variant']} |"))
        assert line in output.with_suffix(".md").read_text()
        assert row["images_per_second"] > 0 and row["peak_mib"] > 0 and row["speed_over_plain"] > 0
    return rows


SMALL = ("--batch", 2, "--local_crops", 1, "--out_dim", 512, "--rounds", 1, "--eager_only", "--precision", "no",
         "--threads", 1)  # fmt: skip


@pytest.mark.slow
def test_step_is_measured_beside_the_plain_one(tmp_path):
    output = tmp_path / "step.json"
    printed = benchmark("step", *SMALL, "--output", output)
    rows = check_turns(printed, output, ["plain", "ours"])
    assert all(row["share_of_matrix_rate"] > 0 for row in rows)


@pytest.mark.slow
def test_training_is_measured_from_encoded_images_on(parquet_folder, tmp_path):
    output = tmp_path / "train.json"
    of_data = ("--dataset_name", parquet_folder, "--num_workers", 1, "--steps", 1)
    check_turns(benchmark("train", *of_data, *SMALL, "--output", output), output, ["plain", "ours"])


@pytest.mark.slow
def test_loss_is_measured_beside_the_double_loop(tmp_path):
    output = tmp_path / "loss.json"
    printed = benchmark("loss", "--batch", 4, "--out_dim", 9001, "--rounds", 2, "--output", output)
    check_turns(printed, output, ["plain", "layer then loss", "fused"])


@pytest.mark.slow
def test_memory_of_a_step_is_counted(tmp_path):
    """What is kept: both networks and two moments, in fp32, the prototypes' gains, and a few numbers; the plain step
    keeps its gradients, too."""
    output = tmp_path / "memory.json"
    benchmark("memory", *SMALL[:-2], "--output", output)
    rows = {row["variant"].partition(",")[0]: row for row in json.loads(output.read_text())["results"]}
    backbone, head = 21_665_664, 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 512 * 256
    network = (backbone + head) * 4 / 2**20
    assert rows["ours"]["kept_mib"] == pytest.approx(4 * network, abs=20)  # crops are 3 MiB
    assert rows["plain"]["kept_mib"] == pytest.approx(5 * network, abs=20)
    assert all(row["peak_mib"] > row["kept_mib"] + network / 2 for row in rows.values())
    assert rows["ours"]["peak_over_plain"] == pytest.approx(rows["ours"]["peak_mib"] / rows["plain"]["peak_mib"])
