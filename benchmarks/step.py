"""One training step on crops that are there already: ours beside the original's, restated plainly, and lightly's.

    python benchmarks/step.py [--batch 8] [--precision bf16] [--rounds 7] [--output benchmarks/results/step.json]

Every variant is a process of its own with its networks, its optimiser and the same number of threads; after a warm-up
they take turns, a step each a round. Printed are the medians of images per second, the median of the ratios to lightly
and to the plain step within a round, the peak of memory on top of the imported libraries, and the share of the matrix
rate that the hardware reached in the same run: operations of the plain step, attention included, over time and rate.
`pip install -e '.[benchmarks]'` brings lightly; without it, it is left out.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from contenders import PACKAGES, Ours, Plain, make_parser_of_steps, make_variant, variants
from measuring import compared, environment, matrix_rate, parsed, save, serve, table, take_turns
from torch.utils.flop_counter import FlopCounterMode

from training.augmentation import CropBatch


def make_views(args: argparse.Namespace, batch_size: int) -> list[torch.Tensor]:
    sizes = [224] * 2 + [96] * args.local_crops
    return [torch.randn(batch_size, 3, size, size, device=args.device) for size in sizes]


def make_crops(args: argparse.Namespace, is_ours: bool) -> CropBatch | list[torch.Tensor]:
    views = make_views(args, args.batch)
    if not is_ours:
        return views
    return CropBatch([torch.cat(views[:2])] + [torch.cat(views[2:])] * (args.local_crops > 0), None)


def operations_per_image(args: argparse.Namespace) -> float:
    """Multiplications and additions of matrices in the plain step, forward and backward, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        Plain(args, "no").step(make_views(args, 2))
    return counter.get_total_flops() / 2


def make_turn(args: argparse.Namespace) -> Callable[[], None]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    variant = make_variant(args)
    crops = make_crops(args, isinstance(variant, Ours))
    return lambda: variant.step(crops)


def main() -> None:
    args = parsed(make_parser_of_steps(__doc__))
    if args.variant:
        return serve(lambda: make_turn(args), args.device, "compiled" in args.variant)
    torch.set_num_threads(args.threads)
    operations = operations_per_image(args)
    rates = [matrix_rate(args.device, args.precision)]
    names, peers = variants(args)
    turns = take_turns(__file__, names, args.rounds, lambda: rates.append(matrix_rate(args.device, args.precision)))
    rate = statistics.median(rates)
    rows = []
    for row in compared(turns, args.batch, peers):
        row["share_of_matrix_rate"] = operations * row["images_per_second"] / rate
        rows.append(row)
    print(f"{operations / 1e9:.1f} GFLOP an image, matrices at {rate / 1e9:.0f} GFLOP/s in {args.precision}")
    print(table(rows))
    about = environment(PACKAGES, args.device) | {"operations_per_image": operations, "matrix_rate": rate}
    save(args.output, about, rows)


if __name__ == "__main__":
    main()
