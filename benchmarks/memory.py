"""The peak of what the tensors of a step take, counted without computing it: in any precision, on any machine.

    python benchmarks/memory.py [--batch 8] [--precision bf16] [--output benchmarks/results/memory.json]

The same variants as in `step.py`, but for what is compiled, run on PyTorch's fake tensors, which have shapes and no
values. Counted is every storage from its making to its end, weights, gradients, moments and crops included; not what
kernels use within an operation, nor what an allocator loses, which `step.py` measures. It is the step as a CPU takes
it, where attention in bf16 is unfused.
"""

import argparse
import weakref
from unittest.mock import patch

import torch
from contenders import PACKAGES, Ours, make_parser_of_steps, make_variant, variants
from measuring import environment, save, table
from step import make_crops
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.guard import Guard


class Storages(TorchDispatchMode):
    """Bytes of all storages that operations within have made and that are still there: `live`, and at most `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, storage.nbytes())

    def drop(self, nbytes: int) -> None:
        self.live -= nbytes


def without_values():
    """Values are asked for by the peers' clipping and by our guard; and a network that is there need not move."""
    fakes = patch.multiple(torch.Tensor, item=lambda tensor: 1.0, __bool__=lambda tensor: False)
    return fakes, patch.object(Guard, "settle", lambda guard: None), patch.object(nn.Module, "to", lambda net, *_: net)


def count(args: argparse.Namespace) -> dict[str, float]:
    """MiB that stay from step to step, and the peak of the second step."""
    values, guard, move = without_values()
    with values, guard, move, FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        variant = make_variant(args)
        crops = make_crops(args, isinstance(variant, Ours))
        variant.step(crops)
        kept, storages.peak = storages.live, 0
        variant.step(crops)
    return {"kept_mib": kept / 2**20, "peak_mib": storages.peak / 2**20}


def main() -> None:
    parser = make_parser_of_steps(__doc__)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("the step is counted as a CPU takes it: leave out --device")
    args.eager_only = True
    names, peers = variants(args)
    counts = {name: count(argparse.Namespace(**vars(args) | {"variant": name})) for name in names}
    rows = []
    for name, counted in counts.items():
        ratios = {
            f"peak_over_{peer.partition(',')[0]}": counted["peak_mib"] / counts[peer]["peak_mib"] for peer in peers
        }
        rows.append({"variant": name, **counted, **ratios})
    print(table(rows))
    save(args.output, environment(PACKAGES), rows)


if __name__ == "__main__":
    main()
