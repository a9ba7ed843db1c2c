"""What metrics say of loss and targets, against sums that are written out."""

import math

import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from training.signals import Signals


GROUPS = {"backbone": torch.tensor([1.0, 0.0, 1.0]), "head": torch.tensor([0.0, 1.0, 0.0])}


def test_signals_are_means_over_the_batches_since_the_last_line():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.softmax(3 * torch.randn(6, 5, generator=generator), -1) for _ in range(4)]
    losses = [1.0, 2.0, 1.5, 0.5]
    signals, accelerator = Signals(5, "cpu", GROUPS), Accelerator(cpu=True)
    signals.add(torch.tensor(100.0), torch.full((6, 5), 0.2))
    signals.reset()
    for loss, targets in zip(losses, batches):
        signals.add(torch.tensor(loss), targets)
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
    signals.add(torch.tensor(0.0), torch.eye(64)[[3, 9, 9, 5]])
    values = signals.read(Accelerator(cpu=True))
    assert values["prototypes_used"] == pytest.approx(3 / 4) and values["largest_prototype"] == pytest.approx(1 / 2)
    assert values["teacher_entropy"] == 0
