"""What metrics say of loss and targets, against sums that are written out."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import linalg, stats
from torch import nn

from training.signals import Signals, student_teacher_distance


GROUPS = {"backbone": torch.tensor([1.0, 0.0, 1.0]), "head": torch.tensor([0.0, 1.0, 0.0])}


def statistics(targets: torch.Tensor) -> list[torch.Tensor]:
    """What `FusedLoss` says of targets."""
    return [torch.special.entr(targets).sum(-1), targets.argmax(-1), targets.sum(0)]


def test_signals_are_means_over_the_batches_since_the_last_line():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.softmax(3 * torch.randn(6, 5, generator=generator), -1) for _ in range(4)]
    losses = [1.0, 2.0, 1.5, 0.5]
    signals, accelerator = Signals(5, "cpu", GROUPS), Accelerator(cpu=True)
    signals.add(torch.tensor(100.0), *statistics(torch.full((6, 5), 0.2)), torch.zeros(6, 3))
    signals.reset()
    for loss, targets in zip(losses, batches):
        signals.add(torch.tensor(loss), *statistics(targets), torch.zeros(6, 3))
    for norms in ([3.0, 5.0, 4.0], [0.0, 7.0, 1.0]):
        signals.add_gradients(torch.tensor(norms))
    again = Signals(5, "cpu", GROUPS)
    again.load_state_dict(signals.state_dict())
    targets = torch.cat(batches)
    entropy = stats.entropy(targets.numpy(), axis=-1).mean()
    chosen = torch.bincount(targets.argmax(-1), minlength=5)
    expected = {
        "loss": 1.25,
        "loss_over_ln_k": 1.25 / math.log(5),
        "teacher_entropy": entropy,
        "teacher_entropy_over_ln_k": entropy / math.log(5),
        "kl": 1.25 - entropy,
        "prototypes_used": (chosen > 0).sum().item() / 5,
        "largest_prototype": chosen.max().item() / 24,
        "gradient_norm_backbone": math.sqrt((25 + 1) / 2),
        "gradient_norm_head": math.sqrt((25 + 49) / 2),
    }
    assert signals.read(accelerator) == again.read(accelerator) == pytest.approx(expected, rel=1e-5)


def test_few_targets_cannot_use_all_prototypes():
    signals = Signals(64, "cpu", GROUPS)
    signals.add(torch.tensor(0.0), *statistics(torch.eye(64)[[3, 9, 9, 5]]), torch.zeros(4, 3))
    values = signals.read(Accelerator(cpu=True))
    assert values["prototypes_used"] == pytest.approx(3 / 4) and values["largest_prototype"] == pytest.approx(1 / 2)
    assert values["teacher_entropy"] == 0


def of_step(*batches):
    """What is read of a step of these batches, each of targets and features."""
    signals = Signals(batches[0][0].shape[1], "cpu", GROUPS)
    before = torch.softmax(torch.ones(2, signals.chosen.numel()), -1)
    signals.add(torch.tensor(0.0), *statistics(before), torch.ones(2, 3))
    signals.begin_step()
    for targets, features in batches:
        signals.add(torch.tensor(0.0), *statistics(targets), features)
    return signals.read_step(Accelerator(cpu=True))


def test_targets_and_features_of_a_step_are_measured_as_their_definitions_have_it():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(12, 7)) @ np.diag([5, 3, 1, 1, 0.1, 0.1, 0]) + 0.5 for _ in range(2)]
    targets = [rng.dirichlet([0.3] * 5, size=12) for _ in range(2)]
    rows, all_targets = np.concatenate(features), np.concatenate(targets)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    joint = all_targets / len(all_targets)  # of image and prototype
    expected = {
        "target_information": sum(
            p * math.log(p / (joint[i].sum() * joint[:, j].sum())) for (i, j), p in np.ndenumerate(joint) if p
        ),
        "feature_std": np.mean([math.sqrt(np.mean((column - column.mean()) ** 2)) for column in rows.T]),
        "effective_rank": math.exp(stats.entropy(linalg.svd(rows, compute_uv=False))),
    }
    batches = [(torch.tensor(q).float(), torch.tensor(z)) for q, z in zip(targets, features)]
    assert of_step(*batches) == pytest.approx(expected, rel=1e-4)


def test_collapse_is_told_from_targets_and_features_that_differ():
    spread = torch.cat([torch.eye(16), -torch.eye(16)])
    expected = {"target_information": math.log(32), "feature_std": 1 / 4, "effective_rank": 16}
    assert of_step((torch.eye(32), spread)) == pytest.approx(expected)
    alike = torch.arange(1.0, 17).expand(32, 16)
    expected = {"target_information": 0, "feature_std": 0, "effective_rank": 1}
    for targets in (torch.eye(8)[[3] * 32], torch.full((32, 8), 1 / 8)):
        assert of_step((targets, alike)) == pytest.approx(expected, abs=1e-4)


def test_distance_is_of_all_parameters_as_one_vector():
    student, teacher = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    ours, theirs = (
        np.concatenate([parameter.detach().numpy().ravel() for parameter in model.parameters()])
        for model in (student, teacher)
    )
    expected = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert student_teacher_distance(student, teacher) == pytest.approx(expected, rel=1e-5)
    assert student_teacher_distance(student, student) == 0
