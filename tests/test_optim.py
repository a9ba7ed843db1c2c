"""The optimisers against plain loops, skipped steps, and learning rates by layer."""

import copy
import sys

import pytest
import torch
from accelerate import Accelerator

from modeling_dino import DINOConfig, DINOForPreTraining
from training import DINOLoss, TrainingArguments, train
from training.augmentation import CropBatch
from training.guard import Guard
from training.loss import koleo_loss
from training.networks import make_teacher
from training.optim import LARS, drop_gradients, make_optimizer, parameter_groups
from training.schedules import Hyperparameters
from training.state import prepare_state
from training.train import train_step

from .commands import command, trained
from .original import tiny_config
from .test_training import losses, recipe  # noqa: F401


train_module = sys.modules[train.__module__]


def arguments(**changes) -> TrainingArguments:
    return TrainingArguments(dataset_name="x", output_dir="y", **changes)


def made(name, **changes):
    """A network and its optimiser, as the loop has them in a step."""
    torch.manual_seed(0)
    student = DINOForPreTraining(tiny_config(num_hidden_layers=1))
    optimizer = make_optimizer(student, arguments(optimizer=name, **changes))
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.01, 0.1 * group["is_decayed"]
    return student, optimizer


def step(student, optimizer, seed=None):
    """One step by random gradients, or by such as are no numbers."""
    generator = torch.Generator().manual_seed(seed or 0)
    for parameter in student.parameters():
        random = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.full_like(parameter, torch.nan) if seed is None else random
    optimizer.step()


def everything(student, optimizer):
    state = optimizer.state_dict()["state"]
    buffers = {f"{number}.{name}": tensor for number, of in state.items() for name, tensor in of.items()}
    return copy.deepcopy(dict(student.named_parameters()) | buffers)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_found_inf_skips_a_step_whatever_the_gradients_are(name):
    """The first as well, of which PyTorch's fused SGD alone would keep momentum out of uninitialised memory."""
    student, optimizer = made(name)
    for seed in (1, 2):
        before = everything(student, optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        step(student, optimizer)
        after = everything(student, optimizer)
        assert_same({key: after[key] for key in before}, before)  # Adam's moments are made in the first step
        optimizer.found_inf = torch.tensor(0.0)
        step(student, optimizer, seed)

    never_skipped = made(name)
    for seed in (1, 2):
        step(*never_skipped, seed)
    assert_same(everything(student, optimizer), everything(*never_skipped))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_prototypes_that_join_later_start_as_if_from_the_first_step(name):
    """PyTorch's fused SGD alone would fail here."""
    late, at_once = made(name), made(name)
    for number in range(2):
        for parameter in late[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        if number == 0:
            drop_gradients(late[0].head.last_layer)
        late[1].step()
    for parameter in at_once[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    at_once[1].step()
    theirs, ours = (student.head.last_layer.weight_v for student, _ in (at_once, late))
    assert torch.equal(ours, theirs)


def test_lars_equals_the_plain_loop():
    torch.manual_seed(0)
    shapes = [(5, 3), (4,), (2, 3, 2, 2), (1, 7), ()]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [torch.zeros(3, 2, dtype=torch.float64)]
    expected, buffers = [weight.clone() for weight in weights], [torch.zeros_like(weight) for weight in weights]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = LARS(parameters, lr=0.5, weight_decay=0.1, momentum=0.8)
    for number in range(4):
        for parameter, weight, buffer in zip(parameters, expected, buffers, strict=True):
            gradient = torch.randn_like(weight) * (weight.ndim != 0 or number > 0)
            parameter.grad = gradient.clone()
            if weight.ndim != 1:
                gradient = gradient + 0.1 * weight
                if weight.norm() > 0 and gradient.norm() > 0:
                    gradient = gradient * 0.001 * weight.norm() / gradient.norm()
            buffer.copy_(0.8 * buffer + gradient)
            weight -= 0.5 * buffer
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_gradient_scaler_scales_and_skips(name):
    scaled, plain = made(name), made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for worst in (1.0, torch.inf, 1.0):
        for parameters, scale in ((scaled[0].parameters(), scaler.get_scale()), (plain[0].parameters(), 1.0)):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.25 * scale * worst)
        scaler.scale(torch.zeros(()))
        scaler.step(scaled[1])
        scaler.update()
        if worst == 1.0:
            plain[1].step()
    assert scaler.get_scale() == 512
    assert_same(everything(*scaled), everything(*plain))


SCALES = {  # of 3 blocks, at a decay of 0.5 and a factor of 0.2 for the patch projection
    "dino.embeddings.cls_token": 0.0625,
    "dino.embeddings.position_embeddings": 0.0625,
    "dino.embeddings.patch_embeddings.projection.weight": 0.0125,
    "dino.embeddings.patch_embeddings.projection.bias": 0.0125,
    "dino.layers.0": 0.125,
    "dino.layers.1": 0.25,
    "dino.layers.2": 0.5,
    "dino.layernorm": 1.0,
    "head": 1.0,
}


def test_learning_rates_by_layer_are_those_computed_by_hand():
    student = DINOForPreTraining(tiny_config(norm_last_layer=False))
    groups = parameter_groups(student, layer_decay=0.5, patch_embed_lr_multiplier=0.2)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    seen = []
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            (expected,) = (scale for prefix, scale in SCALES.items() if f"{name}.".startswith(f"{prefix}."))
            assert group["lr_scale"] == pytest.approx(expected, rel=1e-15), name
            assert group["is_decayed"] == (not name.endswith("bias") and "layernorm" not in name), name
            seen.append(name)
    assert sorted(seen) == sorted(names.values())
    assert [group["lr_scale"] for group in parameter_groups(student)] == [1.0, 1.0]


@pytest.mark.parametrize("setting", ["layer_decay", "patch_embed_lr_multiplier"])
def test_other_networks_have_no_layers_to_decay(setting):
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    student = DINOForPreTraining(DINOConfig(backbone_config=backbone, out_dim=8))
    with pytest.raises(ValueError, match=f"{setting} is for Vision Transformers; of a resnet it must be 1, got 0.5"):
        make_optimizer(student, arguments(**{setting: 0.5}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be adamw or sgd or lars, got adam"),
        ({"centering": "mean"}, "centering must be ema or sinkhorn_knopp, got mean"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"patch_embed_lr_multiplier": -1.0}, "patch_embed_lr_multiplier must be at least 0 and finite, got -1.0"),
        ({"koleo_weight": float("nan")}, "koleo_weight must be at least 0 and finite, got nan"),
        ({"koleo_weight": 0.1, "per_device_train_batch_size": 1}, "koleo_weight needs neighbours"),
    ],
)
def test_settings_that_do_not_do_are_told_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


@pytest.fixture
def in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_step_scales_learning_rates_and_adds_koleo_of_each_global_crop(monkeypatch, in_double_precision):
    """Against the step written out, by SGD without momentum of steps before; in double precision."""
    monkeypatch.setattr(train_module, "finish_crops", lambda batch, device, args: batch.crops)
    args = arguments(
        optimizer="sgd", clip_grad=0.0, koleo_weight=0.7, layer_decay=0.5, num_local_crops=1,
        per_device_train_batch_size=3,
    )  # fmt: skip
    torch.manual_seed(0)
    student = DINOForPreTraining(tiny_config())
    teacher, dino_loss = make_teacher(student), DINOLoss(96)
    crops = [torch.randn(2 * 3, 3, 32, 32), torch.randn(3, 3, 16, 16)]

    expected = copy.deepcopy(student)
    output = expected(crops)
    loss = dino_loss(output.logits, teacher(crops[0]).logits, 0.04, 3)
    (loss + 0.7 * (koleo_loss(output.pooler_output[:3]) + koleo_loss(output.pooler_output[3:6]))).backward()
    scales = {parameter: 0.1 * group["lr_scale"] for group in parameter_groups(expected, 0.5) for parameter in
              group["params"]}  # fmt: skip
    with torch.no_grad():
        for parameter, rate in scales.items():
            decay = 0.2 if parameter.ndim != 1 else 0.0
            parameter -= rate * (parameter.grad + decay * parameter)

    now = Hyperparameters(0.1, 0.2, 0.9, 0.04, freeze_last_layer=False, freeze_backbone=False)
    batch = CropBatch(crops, [None, None])
    accelerator = Accelerator(cpu=True)
    state = prepare_state(accelerator, args, student, teacher)
    train_step(accelerator, args, state, [batch], 1, now, Guard(accelerator, state.optimizer))
    for (name, ours), theirs in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14, msg=name)
    assert state.signals.sums[0].item() == pytest.approx(loss.item(), rel=1e-6)  # what is logged is DINO's alone


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_run_goes_on_from_a_checkpoint(recipe, parquet_folder, tmp_path, optimizer):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--optimizer", optimizer, "--koleo_weight", 0.1)
    argv += ("--centering", "sinkhorn_knopp", "--layer_decay", 0.7, "--patch_embed_lr_multiplier", 0.2)
    trained(*argv, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole/checkpoints/step_0000006"
    trained(*argv, "--output_dir", tmp_path / "rest", "--resume_from_checkpoint", checkpoint)
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[6:]
    finished = command(*argv, "--output_dir", tmp_path / "no", "--resume_from_checkpoint", checkpoint,
                       "--optimizer", "adamw")  # fmt: skip
    assert finished.returncode == 2 and f"was trained with optimizer {optimizer}, not adamw" in finished.stderr


@pytest.mark.slow
def test_two_processes_balance_prototypes_as_one_with_twice_the_batch(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--config_overrides", "drop_path_rate=0.0")
    argv += ("--centering", "sinkhorn_knopp")
    trained(*argv, "--output_dir", tmp_path / "one")
    trained(*argv, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", "4", processes=2)
    trained(*argv, "--output_dir", tmp_path / "centred", "--centering", "ema")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "centred") != pytest.approx(losses(tmp_path / "one"), rel=1e-3)
