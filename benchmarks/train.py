"""Training end to end, from encoded images to the updated teacher: ours beside the original's recipe and lightly's.

    python benchmarks/train.py --dataset_name path/to/images [--batch 8] [--output benchmarks/results/train.json]

The steps are those of `benchmarks/step.py`, and every variant has its own way from the bytes to the crops, with the
same number of workers: our loader, the original's transforms on PIL images, and lightly's `DINOTransform`. Every
variant is a process of its own; after a warm-up they take turns, some steps each a round, and who has no turn is
stopped with its workers. Memory is that of the process that trains.
"""

import argparse
import io
from collections.abc import Callable, Iterator

import torch
from contenders import PACKAGES, Ours, Plain, make_parser_of_steps, make_variant, variants
from measuring import compared, environment, parsed, positive, save, serve, table, take_turns
from PIL import Image
from recipes import lightly_recipe, pil_recipe
from torch.utils.data import DataLoader, Dataset, RandomSampler

from evaluation.decoding import image_content
from evaluation.images import load_images
from training.data import CropLoader


FOREVER = 1_000_000


class Views(Dataset):
    """Views of images, as users of PIL have them."""

    def __init__(self, dataset_name: str, recipe: Callable[[Image.Image], list[torch.Tensor]]):
        self.images, self.recipe = load_images(dataset_name), recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        content = image_content(self.images[index]["image"])
        return self.recipe(Image.open(io.BytesIO(content)).convert("RGB"))


def batches_of_views(args: argparse.Namespace, recipe: Callable) -> Iterator[list[torch.Tensor]]:
    views = Views(args.dataset_name, recipe)
    loader = DataLoader(
        views,
        args.batch,
        sampler=RandomSampler(views, replacement=True, num_samples=FOREVER),
        num_workers=args.num_workers,
        pin_memory=args.device == "cuda",
        drop_last=True,
    )
    for batch in loader:
        yield [view.to(args.device, non_blocking=True) for view in batch]


def make_turn(args: argparse.Namespace) -> Callable[[], None]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    variant = make_variant(args)
    if isinstance(variant, Ours):
        variant.args.dataset_name, variant.args.num_workers = args.dataset_name, args.num_workers
        batches = CropLoader(variant.args, 3).batches(FOREVER)
    else:
        recipe = pil_recipe if isinstance(variant, Plain) else lightly_recipe
        batches = batches_of_views(args, recipe(args.local_crops))

    def turn() -> None:
        for _ in range(args.steps):
            variant.step(next(batches))

    return turn


def main() -> None:
    parser = make_parser_of_steps(__doc__)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--steps", type=positive, default=4, help="of a variant in a round")
    args = parsed(parser)
    if args.variant:
        return serve(lambda: make_turn(args), args.device, "compiled" in args.variant)
    try:
        load_images(args.dataset_name)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    names, peers = variants(args)
    rows = list(compared(take_turns(__file__, names, args.rounds), args.batch * args.steps, peers))
    print(table(rows))
    save(args.output, environment(PACKAGES, args.device), rows)


if __name__ == "__main__":
    main()
