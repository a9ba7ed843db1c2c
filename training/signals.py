"""What can be told of a training without labels: how its loss and its teacher's targets stand."""

import math

import torch
from accelerate import Accelerator


class Signals:
    """Sums over the batches since the last line of metrics, kept on the device, so that only reading waits for it.

    Args:
        out_dim: Number of prototypes, K.
        device: Where the training is.
        gradient_groups: Of each part of the network, which norms are of its parameters, (parameters,) of 1 and 0.
    """

    def __init__(self, out_dim: int, device: torch.device | str, gradient_groups: dict[str, torch.Tensor]):
        self.sums = torch.zeros(3, device=device)  # loss, entropy of the targets, batches
        self.chosen = torch.zeros(out_dim, device=device)  # of each prototype: targets that are largest there
        self.groups = list(gradient_groups)
        self.members = torch.stack(list(gradient_groups.values())).to(device)  # (groups, parameters)
        self.squares = torch.zeros(len(self.groups) + 1, device=device)  # of each group's gradient norm; then steps

    def add(self, loss: torch.Tensor, targets: torch.Tensor) -> None:
        """A batch's loss, and the teacher's targets (rows, out_dim)."""
        entropy = torch.special.entr(targets).sum(-1).mean()
        self.sums += torch.stack([loss, entropy, torch.ones_like(loss)])
        self.chosen.scatter_add_(0, targets.argmax(-1), torch.ones_like(targets[:, 0]))

    def add_gradients(self, norms: torch.Tensor) -> None:
        """The gradients' norms in a step, (parameters,), before they are clipped; the same on all processes."""
        self.squares += torch.cat([self.members @ norms.square(), torch.ones_like(norms[:1])])

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Of all processes since the last `reset`. Entropies in nats; `kl` is from teacher to student.

        `prototypes_used` is the share of the prototypes that were any target's largest, of those that could have been;
        `largest_prototype` the share of the targets that share the commonest one. `gradient_norm_...` is the root mean
        square over the steps of the norm of a part's gradient, before clipping.
        """
        loss, entropy, num_batches = accelerator.reduce(self.sums, "sum").tolist()
        chosen = accelerator.reduce(self.chosen, "sum")
        num_targets = chosen.sum().clamp(min=1)
        used, largest = torch.stack(
            [(chosen > 0).sum() / num_targets.clamp(max=len(chosen)), chosen.max() / num_targets]
        ).tolist()
        loss, entropy = loss / max(num_batches, 1), entropy / max(num_batches, 1)
        ln_k = math.log(len(chosen))
        *squares, num_steps = self.squares.tolist()
        norms = [math.sqrt(square / max(num_steps, 1)) for square in squares]
        return {
            "loss": loss,
            "loss_over_ln_k": loss / ln_k,
            "teacher_entropy": entropy,
            "teacher_entropy_over_ln_k": entropy / ln_k,
            "kl": loss - entropy,
            "prototypes_used": used,
            "largest_prototype": largest,
            **{f"gradient_norm_{group}": norm for group, norm in zip(self.groups, norms)},
        }

    def reset(self) -> None:
        self.sums.zero_()
        self.chosen.zero_()
        self.squares.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums, "chosen": self.chosen, "squares": self.squares}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.chosen.copy_(state["chosen"])
        self.squares.copy_(state["squares"])
