"""What can be told of a training without labels: how its loss, its teacher's targets and its features stand."""

import math

import torch
from accelerate import Accelerator
from torch import nn

from .sharding import whole


MAX_ROWS = 1024  # of features, whose singular values take a tenth of a second at most


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
        # of the last step alone, and so no part of the state
        self.step_targets = torch.zeros(out_dim, device=device)  # their sum
        self.step_entropy = torch.zeros(2, device=device)  # sum over the targets, and their number
        self.step_features: list[torch.Tensor] = []  # (rows, features) a batch

    def begin_step(self) -> None:
        self.step_targets.zero_()
        self.step_entropy.zero_()
        self.step_features.clear()

    def add(
        self,
        loss: torch.Tensor,
        entropies: torch.Tensor,
        largest: torch.Tensor,
        target_sum: torch.Tensor,
        features: torch.Tensor,
    ) -> None:
        """A batch's `FusedLoss`, field by field, and the teacher's features (rows, features)."""
        self.sums += torch.stack([loss, entropies.mean(), torch.ones_like(loss)])
        self.chosen.scatter_add_(0, largest, torch.ones_like(entropies))
        self.step_targets += target_sum
        self.step_entropy += torch.stack([entropies.sum(), torch.full_like(loss, len(entropies))])
        self.step_features.append(features)

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

    def read_step(self, accelerator: Accelerator) -> dict[str, float]:
        """Of the last step alone, on all processes. Waits for the device, as `read` does.

        `target_information` says how well the targets tell the images of a step apart, in nats: the entropy of their
        mean less the mean of their entropies (the mutual information of image and prototype). It is 0 when all are
        alike, be they uniform, one-hot, or another one in each step, and at most the logarithm of their number.

        The features are of 1024 rows at most, each divided by its length. `feature_std` is the mean over dimensions of
        the standard deviation over rows: 1 / sqrt(dimensions) when they are spread over the sphere, 0 when all images
        have one (section 4.1 of arXiv 2011.10566). `effective_rank` is RankMe of them: exp of the entropy of their
        singular values, without centring; from 1 to the smaller of rows and dimensions (arXiv 2210.02885).
        """
        targets, (entropy, rows) = (
            accelerator.reduce(values, "sum") for values in (self.step_targets, self.step_entropy)
        )
        information = (torch.special.entr(targets / rows).sum() - entropy / rows).item()
        features = torch.cat(self.step_features)[: MAX_ROWS // accelerator.num_processes].float()
        features = nn.functional.normalize(accelerator.gather(features).cpu().double(), dim=-1)
        singular_values = torch.linalg.svdvals(features)
        return {
            "target_information": max(information, 0.0),  # rounding
            "feature_std": features.std(0, correction=0).mean().item(),
            "effective_rank": torch.special.entr(singular_values / singular_values.sum()).sum().exp().item(),
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


@torch.no_grad()
def student_teacher_distance(student: nn.Module, teacher: nn.Module) -> float:
    """|student - teacher| / |teacher|, of all parameters as one vector; one after another, to need no copy of them."""
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    distances, lengths = zip(*(((ours - theirs).norm(), theirs.norm()) for ours, theirs in pairs))
    return (whole(torch.stack(distances)).norm() / whole(torch.stack(lengths)).norm()).item()
