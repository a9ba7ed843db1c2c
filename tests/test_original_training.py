"""`dino-convert --to original` of a whole checkpoint: the reference implementation, restated here, resumes from it."""

import argparse
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from timm.models.vision_transformer import Block
from torch import nn

from modeling_dino import DINOConfig, DINOForPreTraining, DINOModel
from modeling_dino.convert_dino_checkpoint import convert, convert_from_command_line, in_original_names
from modeling_dino.image_processing_dino import make_image_processor
from modeling_dino.original_training import optimizer_state
from training.agreement import Agreement
from training.arguments import TrainingArguments
from training.checkpoint import save_checkpoint
from training.optim import make_optimizer

from .original import FIXTURES, META, our_names, tiny_config
from .test_convert import answer
from .test_trajectory import Trajectory


class ViT(nn.Module):
    """The reference implementation's Vision Transformer, by its names; the blocks are timm's."""

    def __init__(self):
        super().__init__()
        width, patch, side = META["dim"], META["patch"], META["img"] // META["patch"]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, width))
        blocks = [Block(width, META["heads"], qkv_bias=True, norm_layer=norm) for _ in range(META["depth"])]
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(width)
        self.side = side

    def forward(self, images):
        patches = self.patch_embed["proj"](images)
        rows, columns = patches.shape[-2:]
        positions = self.pos_embed
        if (rows, columns) != (self.side, self.side):
            grid = positions[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
            scale = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
            grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
            positions = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        return self.norm(self.blocks(tokens + positions))[:, 0]


class Head(nn.Module):
    def __init__(self, width: int, hidden: int, bottleneck: int, out_dim: int, norm_last_layer: bool):
        super().__init__()
        layers = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch has another one now, with other names
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, features):
        return self.last_layer(nn.functional.normalize(self.mlp(features), dim=-1))


class MultiCrop(nn.Module):
    """Backbone and head, for crops of each size (views * batch, 3, side, side)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops):
        return self.head(torch.cat([self.backbone(of_size) for of_size in crops]))


class Wrapped(nn.Module):
    """A network as DistributedDataParallel names it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, crops):
        return self.module(crops)


class Loss(nn.Module):
    def __init__(self, out_dim: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_logits, teacher_logits, teacher_temp: float, num_crops: int):
        targets = ((teacher_logits - self.center) / teacher_temp).softmax(-1).chunk(2)
        views = (student_logits / 0.1).log_softmax(-1).chunk(num_crops)
        terms = [-(q * p).sum(-1).mean() for t, q in enumerate(targets) for v, p in enumerate(views) if v != t]
        self.center = 0.9 * self.center + 0.1 * teacher_logits.mean(0, keepdim=True)
        return sum(terms) / len(terms)


class LARS(torch.optim.Optimizer):
    def __init__(self, params):
        defaults = {"lr": 0, "weight_decay": 0, "momentum": 0.9, "eta": 0.001}
        super().__init__(params, defaults | {"weight_decay_filter": None, "lars_adaptation_filter": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if update is None:
                    continue
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    update = update * group["eta"] * parameter.norm() / update.norm()
                state = self.state[parameter]
                state["mu"] = group["momentum"] * state.get("mu", 0) + update
                parameter -= group["lr"] * state["mu"]


OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, lr=0, momentum=0.9), "lars": LARS}


def optimizer_of(student: nn.Module, name: str) -> torch.optim.Optimizer:
    decayed, others = [], []
    for key, parameter in student.named_parameters():
        if parameter.requires_grad:
            (others if key.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return OPTIMIZERS[name]([{"params": decayed}, {"params": others, "weight_decay": 0.0}])


class Original:
    """Networks, loss and optimizer as `main_dino.py` builds them, resumed from a file."""

    def __init__(self, path: Path, trajectory: Trajectory):
        self.settings, self.expected = trajectory.settings, trajectory.expected
        sizes = META["dim"], META["hid"], META["bott"], META["K"]
        self.student = Wrapped(MultiCrop(ViT(), Head(*sizes, self.settings["norm_last_layer"])))
        self.teacher = MultiCrop(ViT(), Head(*sizes, True)).requires_grad_(False)
        self.loss = Loss(META["K"])
        self.optimizer = optimizer_of(self.student, self.settings["optimizer"])
        content = torch.load(path, weights_only=False)
        self.epoch, self.args = content["epoch"], content["args"]
        parts = (("student", self.student), ("teacher", self.teacher), ("dino_loss", self.loss))
        for name, part in parts:
            part.load_state_dict(content[name], strict=True)
        self.optimizer.load_state_dict(content["optimizer"])

    def take_step(self, step: int, crops: list[torch.Tensor]) -> None:
        expected = {name: self.expected[name][step].item() for name in ("lr", "weight_decay", "momentum")}
        decayed, others = self.optimizer.param_groups
        decayed["lr"] = others["lr"] = expected["lr"]
        decayed["weight_decay"] = expected["weight_decay"]
        temperature = self.expected["teacher_temp"][step].item()
        loss = self.loss(self.student(crops), self.teacher(crops[:1]), temperature, 2 + META["L"])
        self.optimizer.zero_grad()
        loss.backward()
        for name, parameter in self.student.named_parameters():
            if parameter.grad is not None and self.settings["clip_grad"]:
                parameter.grad *= min(1, self.settings["clip_grad"] / (parameter.grad.norm() + 1e-6))
            if "last_layer" in name and step // self.settings["steps_per_epoch"] < 1:
                parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters()):
                ours.mul_(expected["momentum"]).add_((1 - expected["momentum"]) * theirs)


def checkpoint_of(trajectory: Trajectory, step: int, folder: Path) -> Path:
    save_checkpoint(
        trajectory.accelerator, Agreement(60.0), folder, step, trajectory.state, {}, make_image_processor(META["img"]),
        trajectory.args, META["B"], [{"name": "x", "num_images": META["B"] * trajectory.settings["steps_per_epoch"]}],
    )  # fmt: skip
    return folder / "checkpoints" / f"step_{step:07d}"


@pytest.mark.parametrize("name", ["adamw", "adamw_free_g", "sgd", "lars"])
@pytest.mark.parametrize("num_steps", [2, 8])  # with the last layer still frozen, and not
def test_original_resumes_from_our_checkpoint(name, num_steps, tmp_path):
    ours = Trajectory(name)
    for step in range(num_steps):
        ours.take_step(step, ours.draw_crops())
    folder, path = checkpoint_of(ours, num_steps, tmp_path), tmp_path / "checkpoint.pth"
    convert(str(folder), str(path), to="original")
    theirs, center = Original(path, ours), ours.state.dino_loss.center
    assert theirs.epoch == num_steps // 4 and torch.equal(theirs.loss.center, center)
    crops = ours.draw_crops()
    for network, model in ((ours.state.student, theirs.student), (ours.state.teacher, theirs.teacher)):
        with torch.no_grad():
            logits = network(crops).logits
            torch.testing.assert_close(model(crops), logits, rtol=0, atol=1e-5)

    ours.take_step(num_steps, crops)
    theirs.take_step(num_steps, crops)
    torch.testing.assert_close(theirs.loss.center, center, rtol=0, atol=1e-6)
    learning_rate = ours.schedule(num_steps).learning_rate
    for network, model in ((ours.state.student, theirs.student.module), (ours.state.teacher, theirs.teacher)):
        weights = our_names(model.state_dict())
        assert weights.keys() == network.state_dict().keys()
        for key, weight in network.state_dict().items():
            # the gradient of keys' biases is rounding noise, which Adam turns into steps of the learning rate
            keys = slice(48, 96) if key.endswith("qkv.bias") and "adamw" in name else slice(0)
            difference = (weights[key] - weight).abs()
            assert (difference[keys] <= 2 * learning_rate + 1e-6).all()
            difference[keys] = 0
            assert difference.max() <= 1e-6, key


def test_optimizer_state_is_laid_out_as_recorded(tmp_path):
    ours = Trajectory("adamw")
    for step in range(5):
        ours.take_step(step, ours.draw_crops())
    convert(str(checkpoint_of(ours, 5, tmp_path)), str(tmp_path / "checkpoint.pth"), to="original")
    found, recorded = (
        torch.load(path, weights_only=False) for path in (tmp_path / "checkpoint.pth", FIXTURES / "checkpoint.pth")
    )
    assert found.keys() == recorded.keys()
    for name in ("student", "teacher"):
        assert found[name].keys() == recorded[name].keys()
    shapes, expected = (
        {index: state["exp_avg"].shape for index, state in content["optimizer"]["state"].items()}
        for content in (found, recorded)
    )
    assert shapes == expected
    groups, expected = (content["optimizer"]["param_groups"] for content in (found, recorded))
    for group, theirs in zip(groups, expected, strict=True):
        assert group.keys() == theirs.keys() and group["params"] == theirs["params"]
    assert (
        isinstance(found["args"], argparse.Namespace)
        and vars(recorded["args"]).keys() - {"arch"} <= vars(found["args"]).keys()
    )


class Pooled(nn.Module):
    """One of torchvision's ResNets without its classifier, by its names."""

    def __new__(cls, name: str):
        network = torchvision.models.get_model(name)
        network.fc = nn.Identity()
        return network


@pytest.mark.parametrize("network", ["vit", "resnet18"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_moments_stay_with_their_parameters(network, optimizer):
    """Each moment is made twice its parameter; so it is after both have been converted."""
    sizes = {"out_dim": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "norm_last_layer": False}
    if network == "vit":
        config, backbone = tiny_config(**sizes), ViT()
    else:
        resnet = {"model_type": "resnet", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512],
                  "depths": [2, 2, 2, 2], "layer_type": "basic"}  # fmt: skip
        config, backbone = DINOConfig(backbone_config=resnet, **sizes), Pooled(network)
    torch.manual_seed(0)
    student = DINOForPreTraining(config)
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    ours = make_optimizer(student, TrainingArguments(dataset_name="x", output_dir="y", optimizer=optimizer))
    key = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    for parameter in student.parameters():
        zeros = {"step": torch.tensor(3.0), "exp_avg_sq": torch.zeros_like(parameter)} if optimizer == "adamw" else {}
        ours.state[parameter] = {key: 2 * parameter.detach(), **zeros}
    theirs = MultiCrop(backbone, Head(student.dino.num_features, 16, 8, 32, norm_last_layer=False))
    theirs.load_state_dict(in_original_names(student), strict=True)
    found = optimizer_of(theirs, optimizer)
    found.load_state_dict(optimizer_state(ours.state_dict(), student))
    key = "mu" if optimizer == "lars" else key
    for name, parameter in theirs.named_parameters():
        assert torch.equal(found.state[parameter][key], 2 * parameter), name


def test_command_says_how_to_resume(tmp_path, capsys):
    folder, path = checkpoint_of(Trajectory("sgd"), 6, tmp_path), tmp_path / "checkpoint.pth"
    state = torch.load(folder / "state.pt", weights_only=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0).state_dict()
    torch.save(state | {"scaler": scaler}, folder / "state.pt")
    convert_from_command_line([str(folder), str(path), "--to", "original"])
    printed = capsys.readouterr().out
    assert "run main_dino.py in its folder, with --patch_size 8 --out_dim 96 --norm_last_layer true" in printed
    assert "--epochs 3 --freeze_last_layer 1 --lr 3.0" in printed
    assert "processes: 1; epochs done: 1, and 2 steps, which are repeated" in printed
    assert "must be changed to have an --arch of this size; image_size 32, not 224" in printed
    content = torch.load(path, weights_only=False)
    assert content["fp16_scaler"] == scaler and content["epoch"] == 1
    assert content["args"].global_crops_scale == [0.4, 1.0] and content["args"].lr == 3.0


def test_settings_without_counterpart_are_said(tmp_path, capsys):
    """With `layer_decay` there are more groups than the two of the reference implementation."""
    ours = Trajectory("adamw")
    ours.args.layer_decay, ours.args.koleo_weight = 0.9, 0.1
    ours.state.optimizer = make_optimizer(ours.state.student, ours.args)
    folder, path = checkpoint_of(ours, 0, tmp_path), tmp_path / "checkpoint.pth"
    convert_from_command_line([str(folder), str(path), "--to", "original"])
    printed = capsys.readouterr().out
    assert (
        "left out: the optimizer's state" in printed and "koleo_weight 0.1, not 0; layer_decay 0.9, not 1" in printed
    )
    assert "optimizer" not in torch.load(path, weights_only=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "state.pt").unlink(), "state.pt is missing. Choose another checkpoint of the run."),
        (
            lambda folder: (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:500]),
            "state.pt is no",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged. Choose another"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is damaged, or not a network of DINO"),
        (lambda folder: shutil.rmtree(folder / "student"), "must hold a config.json, or student and teacher"),
    ],
)
def test_damaged_checkpoint_gives_one_line_error(damage, message, tmp_path, capsys):
    folder, path = checkpoint_of(Trajectory("adamw"), 0, tmp_path), tmp_path / "checkpoint.pth"
    damage(folder)
    assert message in answer(capsys, folder, path, "--to", "original") and not path.exists()


def test_evaluation_scripts_read_the_teacher(tmp_path):
    ours = Trajectory("adamw")
    convert(str(checkpoint_of(ours, 0, tmp_path)), str(tmp_path / "checkpoint.pth"), to="original")
    teacher = torch.load(tmp_path / "checkpoint.pth", weights_only=False)["teacher"]
    network = ViT()
    state = {key.replace("module.", "").replace("backbone.", ""): tensor for key, tensor in teacher.items()}
    found = network.load_state_dict(state, strict=False)
    assert not found.missing_keys and all(key.startswith("head.") for key in found.unexpected_keys)
    model = DINOModel.from_pretrained(tmp_path / "checkpoints/step_0000000/teacher")
    for shape in ((2, 3, 32, 32), (2, 3, 16, 24)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(network(images), model(images).pooler_output, rtol=0, atol=1e-5)
