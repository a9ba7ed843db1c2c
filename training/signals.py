"""What can be told of a training without labels: how its loss and its teacher's targets stand."""

import math

import torch
from accelerate import Accelerator


class Signals:
    """Sums over the batches since the last line of metrics, kept on the device, so that only reading waits for it.

    Args:
        out_dim: Number of prototypes, K.
        device: Where the training is.
    """

    def __init__(self, out_dim: int, device: torch.device | str):
        self.sums = torch.zeros(3, device=device)  # loss, entropy of the targets, batches
        self.chosen = torch.zeros(out_dim, device=device)  # of each prototype: targets that are largest there

    def add(self, loss: torch.Tensor, targets: torch.Tensor) -> None:
        """A batch's loss, and the teacher's targets (rows, out_dim)."""
        entropy = torch.special.entr(targets).sum(-1).mean()
        self.sums += torch.stack([loss, entropy, torch.ones_like(loss)])
        self.chosen.scatter_add_(0, targets.argmax(-1), torch.ones_like(targets[:, 0]))

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Of all processes since the last `reset`. Entropies in nats; `kl` is from teacher to student.

        `prototypes_used` is the share of the prototypes that were any target's largest, of those that could have been;
        `largest_prototype` the share of the targets that share the commonest one.
        """
        loss, entropy, num_batches = accelerator.reduce(self.sums, "sum").tolist()
        chosen = accelerator.reduce(self.chosen, "sum")
        num_targets = chosen.sum().clamp(min=1)
        used, largest = torch.stack(
            [(chosen > 0).sum() / num_targets.clamp(max=len(chosen)), chosen.max() / num_targets]
        ).tolist()
        loss, entropy = loss / max(num_batches, 1), entropy / max(num_batches, 1)
        ln_k = math.log(len(chosen))
        return {
            "loss": loss,
            "loss_over_ln_k": loss / ln_k,
            "teacher_entropy": entropy,
            "teacher_entropy_over_ln_k": entropy / ln_k,
            "kl": loss - entropy,
            "prototypes_used": used,
            "largest_prototype": largest,
        }

    def reset(self) -> None:
        self.sums.zero_()
        self.chosen.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums, "chosen": self.chosen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.chosen.copy_(state["chosen"])
