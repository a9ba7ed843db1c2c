import re

import pytest

from training import TrainingArguments
from training.schedules import Schedule, cosine_schedule, teacher_temp_schedule

from .original import recorded


def test_schedules_equal_the_originals_to_the_last_digit():
    expected = {name: values.tolist() for name, values in recorded("schedules").items()}
    steps = range(20 * 7)
    assert [cosine_schedule(step, 1e-3, 1e-6, 140, warmup_steps=21) for step in steps] == expected["lr"]
    assert [cosine_schedule(step, 0.04, 0.4, 140) for step in steps] == expected["wd"]
    assert [cosine_schedule(step, 0.996, 1.0, 140) for step in steps] == expected["momentum"]
    temperatures = [teacher_temp_schedule(epoch, 0.04, 0.07, 6) for epoch in range(20)]
    assert temperatures == expected["teacher_temp_per_epoch"]


def test_golden_values_of_the_imagenet_run():
    """8 processes x 64 images, 100 epochs of 2502 steps, all defaults."""
    schedule = Schedule(TrainingArguments(dataset_name="x", output_dir="y"), 2502, 250_200, 512)
    assert schedule(0).learning_rate == 0
    assert schedule(1).learning_rate == pytest.approx(3.996962308645429e-08, rel=1e-14)
    assert schedule(25019).learning_rate == schedule(25020).learning_rate == 0.001
    assert schedule(25021).learning_rate == pytest.approx(0.0009999999999513879, rel=1e-14)
    middle = schedule(125_100)
    assert middle.learning_rate == pytest.approx(0.0005872372647446319, rel=1e-14)
    assert (middle.weight_decay, middle.teacher_momentum) == pytest.approx((0.22, 0.998), rel=1e-14)
    last = schedule(250_199)
    assert last.learning_rate == pytest.approx(1.0000000486122476e-06, rel=1e-12)
    assert last.weight_decay == pytest.approx(0.39999999998581054, rel=1e-14)
    assert last.teacher_momentum == pytest.approx(0.9999999999998423, rel=1e-15)


def test_temperature_and_freeze_change_by_epoch():
    args = TrainingArguments(
        dataset_name="x", output_dir="y", num_train_epochs=6, warmup_epochs=0, freeze_last_layer_epochs=2,
        teacher_temp=0.07, warmup_teacher_temp_epochs=4,
    )  # fmt: skip
    schedule = Schedule(args, steps_per_epoch=3, num_steps=18, global_batch_size=256)
    assert [schedule(step).freeze_last_layer for step in range(9)] == [True] * 6 + [False] * 3
    temperatures = [schedule(step).teacher_temp for step in range(18)]
    assert temperatures == pytest.approx([t for t in (0.04, 0.05, 0.06, 0.07, 0.07, 0.07) for _ in range(3)])


@pytest.mark.parametrize("name", ["warmup_epochs", "warmup_teacher_temp_epochs"])
def test_more_warmup_than_steps_is_refused(name):
    args = TrainingArguments(dataset_name="x", output_dir="y", warmup_epochs=0)
    setattr(args, name, 5)
    message = f"{name} must be at most 4, got 5: the training has only 40 steps, 10 an epoch. Give --{name} 4."
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(args, steps_per_epoch=10, num_steps=40, global_batch_size=64)


@pytest.mark.parametrize(("name", "most"), [("warmup_epochs", 0.28), ("warmup_teacher_temp_epochs", 0)])
def test_warmup_that_is_proposed_is_allowed(name, most):
    args = TrainingArguments(dataset_name="x", output_dir="y", warmup_epochs=0)
    setattr(args, name, 5)
    with pytest.raises(ValueError, match=rf"Give --{name} {most}\.$"):
        Schedule(args, steps_per_epoch=7, num_steps=2, global_batch_size=64)
    setattr(args, name, most)
    Schedule(args, steps_per_epoch=7, num_steps=2, global_batch_size=64)
