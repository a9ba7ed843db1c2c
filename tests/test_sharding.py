"""Runs of two processes whose networks FSDP2 has cut up, against runs of two that are whole.

Accelerate does FSDP2 on accelerators alone; PyTorch does it on processors, too, so Accelerate is told that it may.
"""

import pytest
import torch
from safetensors.torch import load_file

from .commands import command, scripted, trained
from .test_training import losses, metrics, recipe  # noqa: F401


CUT_UP = """
import sys
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from training.__main__ import main, train
module = sys.modules[train.__module__]
def make_accelerator(gradient_accumulation_steps):
    accelerator = Accelerator(gradient_accumulation_steps=gradient_accumulation_steps)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert accelerator.is_fsdp2
    return accelerator
module.make_accelerator = make_accelerator
state = sys.modules["training.state"]
shard_ = state.shard_
def shard_and_look(accelerator, student, teacher):
    shard_(accelerator, student, teacher)
    for network in (student, teacher):
        whole = sum(parameter.numel() for parameter in network.parameters())
        part = sum(parameter.to_local().numel() for parameter in network.parameters())
        assert 0.4 < part / whole < 0.6
state.shard_ = shard_and_look
main()
"""


def assert_near(one, other, noise: tuple[str, ...] = ("qkv.bias",)) -> None:
    """But for `noise`: parameters, such as the biases of keys, whose gradient is nothing but rounding."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith(noise):
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_networks_that_are_cut_up_train_as_whole_ones_and_resume(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--per_device_train_batch_size", 4)
    argv += ("--config_overrides", "drop_path_rate=0", "--eval_steps", 5)
    trained(*argv, "--output_dir", tmp_path / "whole", processes=2)
    finished = scripted(CUT_UP, tmp_path, *argv, "--output_dir", tmp_path / "cut", processes=2)
    assert finished.returncode == 0, finished.stderr
    assert_near(tmp_path / "cut", tmp_path / "whole")
    knn = [[line["knn_10_top1"] for line in metrics(tmp_path / n) if "knn_10_top1" in line] for n in ("cut", "whole")]
    assert knn[0] == pytest.approx(knn[1], abs=100 / 12 + 1e-6)  # 12 images; one may sit on the border
    argv += ("--resume_from_checkpoint", tmp_path / "cut/checkpoints/step_0000006")
    again = scripted(CUT_UP, tmp_path, *argv, "--output_dir", tmp_path / "again", processes=2)
    assert again.returncode == 0, again.stderr
    # to the last digit but one: parts lie elsewhere in memory than before, and are summed in another order
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "cut")[6:], rel=1e-6)
    # a checkpoint is the same, whoever wrote it
    trained(*argv, "--output_dir", tmp_path / "whole_again", processes=2)
    assert losses(tmp_path / "whole_again") == pytest.approx(losses(tmp_path / "whole")[6:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "lars"),
        ("--gradient_accumulation_steps", "2", "--gradient_checkpointing"),
        ("--config_overrides", "drop_path_rate=0", "use_bn_in_head=true"),
        ("--config_overrides", "drop_path_rate=0", "norm_last_layer=false", "--layer_decay", "0.8"),
        ("bf16",),
    ],
)
def test_networks_that_are_cut_up_train_alike_in_other_settings(recipe, parquet_folder, tmp_path, flags):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--per_device_train_batch_size", 4)
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16"} if flags == ("bf16",) else {}
    argv += ("--config_overrides", "drop_path_rate=0") + (flags if not precision else ())
    trained(*argv, "--output_dir", tmp_path / "whole", processes=2, **precision)
    finished = scripted(CUT_UP, tmp_path, *argv, "--output_dir", tmp_path / "cut", processes=2, **precision)
    assert finished.returncode == 0, finished.stderr
    if precision:  # rounds what is rounding noise in fp32 up to something
        assert losses(tmp_path / "cut")[:3] == pytest.approx(losses(tmp_path / "whole")[:3], rel=1e-5)
        assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=0.01)
        return
    # a batch norm takes away what the bias of the norm before the head adds
    noise = ("qkv.bias", "layernorm.bias") if "use_bn_in_head=true" in flags else ("qkv.bias",)
    assert_near(tmp_path / "cut", tmp_path / "whole", noise)


@pytest.mark.slow
def test_what_cannot_be_cut_up_is_refused(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path)
    finished = scripted(CUT_UP, tmp_path, *argv, "--optimizer", "sgd", processes=2)
    assert finished.returncode != 0 and "FSDP trains with optimizer adamw or lars, got sgd" in finished.stderr
    finished = command(*argv, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert finished.returncode == 2 and "FSDP must be fsdp_version 2, on several GPUs" in finished.stderr
