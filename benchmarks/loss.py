"""The last layer and the loss, forward and backward: fused, one after the other, and as the original has them.

    python benchmarks/loss.py [--batch 64] [--out_dim 65536] [--precision no] [--output benchmarks/results/loss.json]

Given are what the last layer is given, and the teacher's logits. Every variant is a process of its own, and after a
warm-up they take turns. Printed are the medians of images per second, the peak of memory on top of weights and input,
and the ratios of both to the plain version: PyTorch's weight norm, and the double loop over views, with the update of
the centre that is part of it.
"""

import argparse
import os
from collections.abc import Callable

import torch
from contenders import Plain
from measuring import compared, environment, parsed, save, serve, table, take_turns
from torch import nn

from modeling_dino import DINOConfig
from modeling_dino.modeling_dino import DINOPrototypes
from training.fused_loss import fused_cross_entropy
from training.loss import DINOLoss


DIM = 256
VARIANTS = ["plain", "layer then loss", "fused"]
PACKAGES = ["torch"]


def make_turn(args: argparse.Namespace) -> Callable[[], Callable[[], None]]:
    """Weights and input; and a function that makes what has to be measured."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    num_crops = 2 + args.local_crops
    layer = DINOPrototypes(DINOConfig(out_dim=args.out_dim))
    nn.init.kaiming_uniform_(layer.weight_v, a=5**0.5)
    if args.variant == "plain":
        weight = layer.weight_v
        layer = nn.Linear(DIM, args.out_dim, bias=False)
        layer.weight.data = weight.data
        layer = nn.utils.parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.requires_grad = False
    layer.to(args.device)
    dino_loss = DINOLoss(args.out_dim).to(args.device)
    rows = nn.functional.normalize(torch.randn(num_crops * args.batch, DIM, device=args.device), dim=-1)
    rows.requires_grad_()
    teacher_logits = torch.randn(2 * args.batch, args.out_dim, device=args.device) / 16

    def loss() -> torch.Tensor:
        if args.variant == "plain":
            return Plain.loss(dino_loss, layer(rows), teacher_logits, num_crops)
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--local_crops", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out_dim", type=int, default=65536)
    parser.add_argument("--precision", choices=["bf16", "no"], default="no")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", help="JSON file for the results; a table in Markdown is written beside it")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # what a process of this one measures
    args = parsed(parser)
    if args.variant:
        turn = make_turn(args)  # before memory is looked at: weights and input are there in any case
        return serve(lambda: turn, args.device)
    torch.set_num_threads(args.threads)
    rows = list(compared(take_turns(__file__, VARIANTS, args.rounds), args.batch, ["plain"]))
    print(table(rows))
    save(args.output, environment(PACKAGES, args.device), rows)


if __name__ == "__main__":
    main()
