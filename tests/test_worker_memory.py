"""What workers will take, and what is free for them, before the first step."""

from functools import partial

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from evaluation.decoding import Reading
from training import worker_memory
from training.arguments import TrainingArguments
from training.worker_memory import _control_groups, free_memory, warn_of_memory


@pytest.mark.parametrize(("version", "path"), [(2, "/slurm/job_1/step_0"), (1, "/slurm/job_1/step_0"), (2, "/")])
def test_free_memory_is_bounded_by_control_groups(tmp_path, monkeypatch, version, path):
    """By the one of them that leaves least: a job's limit bounds its steps, whose own is "max"."""
    root, groups = tmp_path / "cgroup", tmp_path / "groups"
    groups.write_text(f"0::{path}\n" if version == 2 else f"9:name=systemd:/\n4:cpu,memory:{path}\n0::/\n")
    limit, used, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    step = (root if version == 2 else root / "memory") / path.lstrip("/")
    job = step if path == "/" else step.parent
    step.mkdir(parents=True)
    (step / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (job / limit).write_text(f"{100 * 2**20}\n")
    for folder in {step, job}:
        (folder / used).write_text(f"{60 * 2**20}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{cached} {20 * 2**20}\n")
    monkeypatch.setattr(worker_memory, "_control_groups", partial(_control_groups, root, groups))
    assert free_memory() == 60 * 2**20


@pytest.mark.parametrize(
    ("name", "mode", "options", "bytes_per_pixel"),
    [
        ("0.png", "RGB", {}, 10),
        ("0.png", "RGBA", {}, 14),
        ("0.png", "L", {}, 11),
        ("0.webp", "RGB", {}, 18),
        ("0.jpg", "RGB", {}, 10 / 64),
        ("0.jpg", "L", {}, 10 / 64),
        ("0.jpg", "RGB", {"progressive": True}, 3 + 10 / 64),
    ],
)
def test_memory_of_an_image_is_as_measured(tmp_path, monkeypatch, caplog, name, mode, options, bytes_per_pixel):
    """Peaks measured at 7000 x 7000 pixels, beside the file itself: 10.2, 14.2, 11.1, 18.5, 0.2, 0.1 and 3.1."""
    Image.fromarray(np.zeros((4096, 4096, 3), np.uint8)).convert(mode).save(tmp_path / name, **options)
    dataset = Dataset.from_dict({"image": [str(tmp_path / name)]}).cast_column("image", ImageColumn(decode=False))
    args = TrainingArguments(dataset_name="x", output_dir="y", num_workers=4)
    needed = bytes_per_pixel * 4096**2 + (tmp_path / name).stat().st_size
    for free, is_warned in ((8.2 * needed, False), (7.8 * needed, True)):
        caplog.clear()
        monkeypatch.setattr(worker_memory, "free_memory", lambda free=free: free)
        warn_of_memory(dataset, args, Reading(3))
        assert bool(caplog.records) == is_warned
