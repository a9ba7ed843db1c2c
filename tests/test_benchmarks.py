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
    results = json.loads(output.read_text())["results"]
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
