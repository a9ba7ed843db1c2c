"""Run transformers' own tests of models, backbones and pipelines on the models of this package."""

import json
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import ViTImageProcessor

from modeling_dino import DINOForImageClassification, DINOModel

from .original import tiny_config


TRANSFORMERS = version("transformers")
# transformers' reason for a skip, as a pattern: why the test does not apply to the models
SKIPS = {
    "test requires (accelerator|multiple accelerators|MPS)|test is slow": "The tests run on the CPU.",
    "test requires (Flash Attention|deepspeed|the kernels library).*": "The package needs an accelerator.",
    "test requires PyTesseract": "The pipeline reads documents.",
    "Do not take a cache .*|No (decoder-only|sequence-to-sequence) .*|.*sliding window.*": "They generate no text.",
    ".*(RoPE|sparse experts|router_logits|grouped_mm).*": "They have learned positions and no experts.",
    ".*inputs_embeds.*|test_resize_embeddings .*|.*with gradient checkpointing[.]": "They have no embedding of words.",
    "Model does not have position embeddings": "Position embeddings follow the size of the images.",
    ".* composite.*|.* does not support SDPA|Parts of .* don't support sdpa": "They have one configuration each.",
    "No conversion found .*": "Checkpoints need no renaming of weights.",
    ".*_keep_in_fp32_modules.*|.* TP plan.*": "They need neither fp32 modules nor a plan for tensor parallelism.",
    ".* is not in `self.pipeline_model_mapping` .*|.* currently not implemented.*": "The pipeline has another task.",
    ".* not (output|support) (output_)?attentions": "A ResNet has none.",
    "no .*: .*": "`transformers_suite.py` says why.",
    "Not a prioritized model for now[.]": "transformers 5.17 asks for a year in the file of the configuration.",
}


@pytest.fixture(scope="module")
def folder(request) -> Path:
    """A folder in pytest's cache with `transformers_tests`, the tests of the installed version, downloaded once."""
    folder = request.config.cache.mkdir(f"transformers-{TRANSFORMERS}")
    with FileLock(folder / "lock"):
        if not (folder / "complete").exists():
            download = ["-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--dest", folder]
            finished = subprocess.run(
                [sys.executable, *download, f"transformers=={TRANSFORMERS}"], capture_output=True, text=True
            )
            if finished.returncode != 0:
                lines = finished.stderr.strip().splitlines()
                pytest.skip(f"no source distribution of transformers {TRANSFORMERS}: {lines[-1]}")
            name = f"transformers-{TRANSFORMERS}"
            with tarfile.open(folder / f"{name}.tar.gz") as archive:
                archive.extractall(folder, filter="data", members=[
                    member.replace(name=f"transformers_{member.name.removeprefix(f'{name}/')}")
                    for member in archive if member.name.startswith(f"{name}/tests/")
                ])  # fmt: skip
            for package in ("transformers_tests", "src/transformers"):  # which the tests look for
                (folder / package).mkdir(parents=True, exist_ok=True)
                (folder / package / "__init__.py").touch()
            (folder / "complete").touch()
    return folder


@pytest.fixture
def tiny_models(tmp_path) -> Path:
    """Models for the tests of pipelines, laid out as by `utils/create_dummy_models.py` of transformers."""
    summary = {}
    for model_class in (DINOModel, DINOForImageClassification):
        name = model_class.__name__
        summary[name] = {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessor"]}
        model_class(tiny_config(n_last_blocks=1, num_labels=3)).save_pretrained(tmp_path / "dino" / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dino" / name)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/tiny_model_summary.json").write_text(json.dumps(summary))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["DINOTest", "DINOBackboneTest", "ResNetTest"])
def test_transformers_own_tests_pass(suite, folder, tiny_models):
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-q", "-rfs", "--tb=short"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/transformers_suite.py::{suite}"],
        capture_output=True, text=True, env=os.environ | {
            "PYTHONPATH": os.pathsep.join([os.getcwd(), str(folder), os.environ.get("PYTHONPATH", "")]),
            "TRANSFORMERS_TEST_DEVICE": "cpu",
            "TRANSFORMERS_TINY_MODEL_PATH": str(tiny_models),
        },
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", finished.stdout, re.MULTILINE)
    assert {reason for reason in reasons if not any(re.fullmatch(pattern, reason) for pattern in SKIPS)} == set()
