"""The last layer and the loss, forward and backward: fused, one after the other, and as the original has them.

    python benchmarks/loss.py [--batch 64] [--out_dim 65536] [--precision no] [--output benchmarks/results/loss.json]

Given are what the last layer is given, and the teacher's logits. Every variant is a process of its own, and after a
warm-up they take turns. Printed are the medians of images per second, the peak of memory on top of weights and input,
and the ratios of both to the plain version: PyTorch's weight norm, and the double loop over views, with the update of
the centre that is part of it.
"""

import argparse
from collections.abc import Callable

import torch
from contenders import make_plain_last_layer, plain_loss
from measuring import compared, environment, make_parser, parsed, save, serve, table, take_turns
from torch import nn

from modeling_dino import DINOConfig
from modeling_dino.modeling_dino import DINOPrototypes
from training.fused_loss import fused_cross_entropy
from training.loss import DINOLoss


DIM = 256  # of what the last layer is given
VARIANTS = ["plain", "layer then loss", "fused"]
PACKAGES = ["torch"]


def make_turn(args: argparse.Namespace) -> Callable[[], Callable[[], None]]:
    """Weights and input; and a function that makes what has to be measured."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    num_crops = 2 + args.local_crops
    if args.variant == "plain":
        layer, center = make_plain_last_layer(args.out_dim), torch.zeros(1, args.out_dim, device=args.device)
    else:
        layer = DINOPrototypes(DINOConfig(out_dim=args.out_dim))
        nn.init.kaiming_uniform_(layer.weight_v, a=5**0.5)
    layer.to(args.device)
    dino_loss = DINOLoss(args.out_dim).to(args.device)
    rows = nn.functional.normalize(torch.randn(num_crops * args.batch, DIM, device=args.device), dim=-1)
    rows.requires_grad_()
    teacher_logits = torch.randn(2 * args.batch, args.out_dim, device=args.device) / 16

    def loss() -> torch.Tensor:
        if args.variant == "plain":
            return plain_loss(layer(rows), teacher_logits, center, num_crops)[0]
        targets = dino_loss.teacher_probs(teacher_logits, 0.04)
        if args.variant == "fused":
            return fused_cross_entropy(rows, layer, targets, num_crops, 0.1).loss
        return dino_loss.cross_entropy(layer(rows), targets, num_crops)

    def turn() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            value = loss()
        rows.grad = None
        layer.zero_grad()
        value.backward()

    return turn


def main() -> None:
    args = parsed(make_parser(__doc__, batch=64, precision="no"))
    if args.variant:
        turn = make_turn(args)  # before memory is looked at: weights and input are there in any case
        return serve(lambda: turn, args.device)
    torch.set_num_threads(args.threads)
    rows = list(compared(take_turns(__file__, VARIANTS, args.rounds), args.batch, ["plain"]))
    print(table(rows))
    save(args.output, environment(PACKAGES, args.device), rows)


if __name__ == "__main__":
    main()
