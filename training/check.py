"""`python -m training.check DATA`, or `dino-check DATA`: reads all images, and says which ones training would skip."""

from collections import Counter

from tqdm import tqdm

from evaluation.images import BrokenImageError, decode_image, load_images
from evaluation.interruption import interruption
from evaluation.workers import Loader
from modeling_dino.command_line import Parser, printable, run_process


class _Decoded:
    """Of a batch of rows: sizes of the images that can be decoded, and what is wrong with the others."""

    def __init__(self, num_channels: int):
        self.num_channels = num_channels

    def __call__(self, rows: list[dict]) -> list[tuple[int, int] | tuple[str, str]]:
        found = []
        for row in rows:
            try:
                found.append(decode_image(row["image"], self.num_channels).shape[1:])
            except BrokenImageError as error:
                found.append((error.kind, str(error)))
        return found


def check(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    streaming: bool = False,
    num_channels: int = 3,
    num_workers: int = 0,
) -> tuple[list[tuple[int, int]], list[tuple[str, str]]]:
    """Reads all images of a split: sizes (height, width) of the whole ones; kind and reason of the broken ones."""
    dataset = load_images(dataset_name, config_name, split, image_column, None, streaming, with_labels=False)
    num_images = None if streaming else len(dataset)
    loader = Loader(dataset, batch_size=16, num_workers=num_workers, collate_fn=_Decoded(num_channels))
    sizes, faults = [], []
    with tqdm(total=num_images, unit="images", desc="checking", leave=False) as bar:
        for batch in loader:
            for one, other in batch:
                (faults if isinstance(one, str) else sizes).append((one, other))
            bar.update(len(batch))
    return sizes, faults


def check_from_command_line(argv: list[str]) -> None:
    parser = Parser(prog="dino-check", description="Find the images that training would skip.")
    parser.add_argument("dataset_name", help="Hub id, or path of a folder, parquet, Arrow or tar file")
    parser.add_argument("--config_name", help="configuration of a data set that has several")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--image_column", help="column of the images (default: the only one there is)")
    parser.add_argument("--streaming", action="store_true", help="read the data without preparing it first")
    parser.add_argument("--num_channels", type=int, default=3, help="that the network takes (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    options = vars(parser.parse_args(argv))
    options.pop("debug")
    sizes, faults = check(**options)
    for _, reason in faults:
        print(printable(reason))
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(kind for kind, _ in faults).most_common())
    print(
        f"{len(sizes) + len(faults)} images, {len(faults)} of them would be skipped" + (f": {kinds}" if kinds else "")
    )
    if sizes:
        heights, widths = zip(*sizes)
        print(f"{min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high")


def main() -> None:
    interruption.listen("dino-check")
    run_process("dino-check", check_from_command_line)


if __name__ == "__main__":
    main()
