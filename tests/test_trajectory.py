"""Twelve steps of the original's training, by our own training step, loss, schedules and optimiser."""

import copy
import sys

import pytest
import torch
from accelerate import Accelerator

from modeling_dino import DINOForPreTraining
from training import TrainingArguments, train
from training.augmentation import CropBatch
from training.guard import Guard
from training.networks import make_teacher
from training.optim import clip_gradients_, gradient_norms, parameter_groups
from training.schedules import Schedule
from training.state import prepare_state
from training.train import train_step

from .original import META, our_names, recorded, tiny_config


train_module = sys.modules[train.__module__]


FIRST_PIXELS = [-1.04080117, 0.91660416, -1.30419040, -1.10967839]  # of the first recorded crop


class Trajectory:
    """Our training of the recorded network, by its settings, on the recorded crops."""

    def __init__(self, name: str):
        self.settings, self.expected = META[f"trajectory_{name}"], recorded(f"trajectory_{name}")
        settings = self.settings
        self.args = TrainingArguments(
            dataset_name="x",
            output_dir="y",
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch"],
            base_learning_rate=settings["base_lr"],
            min_learning_rate=settings["min_lr"],
            warmup_epochs=settings["warmup_epochs"],
            num_local_crops=META["L"],
            **{
                name: settings[name]
                for name in (
                    *("weight_decay", "weight_decay_end", "clip_grad", "momentum_teacher", "student_temp"),
                    *("center_momentum", "teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs"),
                    *("freeze_last_layer_epochs", "optimizer"),
                )
            },
        )
        self.num_steps = settings["epochs"] * settings["steps_per_epoch"]
        self.schedule = Schedule(self.args, settings["steps_per_epoch"], self.num_steps, settings["batch"])
        student = DINOForPreTraining(tiny_config(norm_last_layer=settings["norm_last_layer"]))
        student.load_state_dict(our_names(recorded("trajectory_adamw"), "init."))
        self.accelerator = Accelerator(cpu=True)
        self.state = prepare_state(self.accelerator, self.args, student, make_teacher(student))
        self.guard = Guard(self.accelerator, self.state.optimizer)
        self.generator = torch.Generator().manual_seed(2)  # that the recorded crops were drawn with

    def draw_crops(self) -> list[torch.Tensor]:
        """Of the next step: global ones (2 * batch, 3, img, img), and local ones."""
        shapes = [(views, META["B"], 3, size, size) for views, size in ((2, META["img"]), (META["L"], META["loc"]))]
        return [torch.randn(shape, generator=self.generator).flatten(0, 1) for shape in shapes]

    def take_step(self, step: int, crops: list[torch.Tensor]) -> None:
        """Train on crops, which are normalized already."""
        batch = CropBatch(crops, [None, None])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "finish_crops", lambda batch, device, args: batch.crops)
            train_step(
                self.accelerator, self.args, self.state, [batch], step + 1, self.schedule(step), self.guard
            )  # fmt: skip


@pytest.mark.parametrize("trajectory", ["adamw", "adamw_free_g", "sgd", "lars"])
def test_trajectory_is_the_originals(trajectory):
    """`free_g` has trainable gains in the last layer. All four start from the same student."""
    ours = Trajectory(trajectory)
    args, state, expected = ours.args, ours.state, ours.expected
    student, teacher = state.student, state.teacher
    for step in range(ours.num_steps):
        now = ours.schedule(step)
        for name, value in (
            ("lr", now.learning_rate),
            ("weight_decay", now.weight_decay),
            ("momentum", now.teacher_momentum),
            ("teacher_temp", now.teacher_temp),
        ):
            assert value == pytest.approx(expected[name][step].item(), rel=1e-14)
        crops = ours.draw_crops()
        if not step:  # else PyTorch draws otherwise than it did for the original
            assert crops[0].flatten()[:4].tolist() == pytest.approx(FIRST_PIXELS, abs=1e-7)
        ours.take_step(step, crops)
        assert state.signals.read(ours.accelerator)["loss"] == pytest.approx(expected["loss"][step].item(), rel=5e-6)
        state.signals.reset()
        torch.testing.assert_close(state.dino_loss.center, expected[f"step.{step}.center"], rtol=0, atol=1e-6)

    for model, name in ((student, "student"), (teacher, "teacher")):
        weights = model.state_dict()
        for key, value in our_names(expected, f"final.{name}.").items():
            ours, theirs = weights[key], value
            if key.endswith("qkv.bias"):
                # A bias of the keys adds the same to all scores of a query, which the softmax ignores: its gradient
                # is rounding noise. Adam turns noise into steps of the whole learning rate, whose signs no two
                # machines agree on: theirs and ours may drift apart by twice the sum of the learning rates.
                queries, keys, values = range(48), range(48, 96), range(96, 144)
                drift = 2 * expected["lr"].sum().item() if args.optimizer == "adamw" else 5e-6
                torch.testing.assert_close(ours[list(keys)], theirs[list(keys)], rtol=0, atol=drift)
                both = [*queries, *values]
                ours, theirs = ours[both], theirs[both]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6, msg=f"{name} {key}")


def test_groups_decay_everything_but_biases_and_norms():
    student = DINOForPreTraining(tiny_config(norm_last_layer=False, use_bn_in_head=True))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in parameter_groups(student))
    assert {f"dino.embeddings.{name}" for name in ("cls_token", "position_embeddings")} <= set(decayed)
    assert "head.last_layer.weight_g" in decayed
    batch_norms = ("head.mlp.1.weight", "head.mlp.4.weight")
    assert all(name.endswith("bias") or "layernorm" in name or name in batch_norms for name in undecayed)
    assert len(decayed) + len(undecayed) == len(names)


def test_each_parameter_is_clipped_by_its_own_norm():
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 10.0), torch.tensor([0.1, 0.2])
    weight_norm = model.weight.grad.norm().item()
    clip_gradients_(model, 3.0, gradient_norms(model))
    assert model.weight.grad.flatten().tolist() == pytest.approx([10 * 3 / (weight_norm + 1e-6)] * 6)
    assert model.bias.grad.tolist() == pytest.approx([0.1, 0.2])


def test_teacher_trains_on_nothing_and_drops_no_path():
    student = DINOForPreTraining(tiny_config(drop_path_rate=0.3)).train()
    teacher = make_teacher(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(teacher(images).logits, copy.deepcopy(student).eval()(images).logits)
    assert student.config.drop_path_rate == 0.3
