"""`python -m training.check DATA`, or `dino-check DATA`: reads all images, and says which ones training would skip."""

from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from evaluation.arguments import add_reading
from evaluation.decoding import BrokenImageError, EncodedImage, Reading, image_name
from evaluation.images import describe_folder, load_images
from evaluation.interruption import interruption
from evaluation.workers import Loader
from modeling_dino.command_line import Parser, printable, run_process
from modeling_dino.image_processing_dino import parse_value_range


NUM_EXAMPLES = 3  # of each kind that are printed
NUM_SAMPLES = 1000  # values of an image that the proposed range of values follows
MAX_SAMPLES = 1_000_000  # of all images together


@dataclass
class Findings:
    """What reading all images of a split found.

    Args:
        sizes: (height, width) of each image that can be read.
        faults: Kind -> messages, which name the image, of those that training would skip.
        numbers: Kind -> channels or pixels that the images of it have -> number of images.
        notes: What is not read -> names of images.
        dtypes: Types of the values -> number of images.
        lowest, highest: Of all values.
        samples: Some values of images that are not of 8 bits; at most MAX_SAMPLES, every `stride`-th of those found.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    numbers: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dtypes: Counter = field(default_factory=Counter)
    lowest: float = np.inf
    highest: float = -np.inf
    samples: list[np.ndarray] = field(default_factory=list)
    num_samples: int = 0
    stride: int = 1

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.faults.values()))

    @property
    def num_floats(self) -> int:
        return sum(number for dtype, number in self.dtypes.items() if dtype.startswith("float"))


class _Decoded:
    """Collates rows into what was found of each: a fault, or size, type, range and sample of the values, and notes."""

    def __init__(self, reading: Reading):
        self.reading = reading

    def __call__(self, rows: list[dict]) -> list[BrokenImageError | tuple]:
        return [self._find(row["image"]) for row in rows]

    def _find(self, row) -> BrokenImageError | tuple:
        try:
            image = EncodedImage(row, self.reading)
            pixels = image.decode()
        except BrokenImageError as error:
            return error
        name = image_name(row) or "without a file name"
        sample = None
        if pixels.dtype != np.uint8:
            values = pixels[np.isfinite(pixels)] if pixels.dtype.kind == "f" else pixels.reshape(-1)
            chosen = np.random.default_rng(0).integers(0, max(1, len(values)), NUM_SAMPLES)
            sample = values[chosen] if len(values) > NUM_SAMPLES else values
            lowest, highest = (float(values.min()), float(values.max())) if len(values) else (np.inf, -np.inf)
            sample = sample, lowest, highest
        return name, pixels.shape[1:], str(pixels.dtype), image.notes, sample


def check(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    streaming: bool = False,
    reading: Reading | None = None,
    num_workers: int = 0,
    folder_layout: str = "auto",
    allow_unread: bool = False,
) -> Findings:
    """Read all images of a split; see `load_images` for the arguments."""
    reading = reading or Reading(3)
    dataset = load_images(
        dataset_name, config_name, split, image_column, None, streaming, False, folder_layout, reading.tiff_pages,
        allow_unread,
    )  # fmt: skip
    num_images = None if streaming else len(dataset)
    collate = _Decoded(reading.of(dataset.features))
    loader = Loader(dataset, batch_size=16, num_workers=num_workers, collate_fn=collate)
    found = Findings()
    with tqdm(total=num_images, unit="images", desc="checking", leave=False) as bar:
        for batch in loader:
            for one in batch:
                _add(found, one)
            bar.update(len(batch))
    return found


def _add(found: Findings, one: BrokenImageError | tuple) -> None:
    if isinstance(one, BrokenImageError):
        found.faults[one.kind].append(str(one))
        if one.number:
            found.numbers[one.kind][one.number] += 1
        return
    name, size, dtype, notes, values = one
    found.sizes.append(tuple(size))
    found.dtypes[dtype] += 1
    for note in notes:
        found.notes[note].append(name)
    if values is not None:
        sample, lowest, highest = values
        found.samples.append(sample[:: found.stride])
        found.num_samples += len(found.samples[-1])
        if found.num_samples > MAX_SAMPLES:
            found.samples = [sample[::2] for sample in found.samples]
            found.num_samples, found.stride = sum(map(len, found.samples)), 2 * found.stride
        found.lowest, found.highest = min(found.lowest, lowest), max(found.highest, highest)


def report(found: Findings, reading: Reading, value_range: list | None) -> Iterator[str]:
    """What was found, a line each: counts first, then kinds with some examples, then the flags that would help."""
    kinds = ", ".join(f"{len(found.faults[kind])} {kind}" for kind in _by_number(found.faults))
    total = f"{len(found.sizes) + found.num_skipped} images, {found.num_skipped} of them would be skipped"
    yield total + f": {kinds}" * bool(kinds)
    for kind in _by_number(found.faults):
        yield from _some(found.faults[kind])
    for note in _by_number(found.notes):
        number = len(found.notes[note])
        yield f"{number} {'image is' if number == 1 else 'images are'} read in part, {note}:"
        yield from _some(found.notes[note])
    if found.sizes:
        heights, widths = zip(*found.sizes)
        dtypes = ", ".join(f"{number} of {dtype}" for dtype, number in found.dtypes.most_common())
        yield f"{_range(widths)} pixels wide, {_range(heights)} high; {dtypes}"
    yield from _advice(found, reading)
    is_mixed = len(found.dtypes) > 1
    if is_mixed and (value_range is None or not isinstance(value_range[0], str)):
        yield "images of unlike types: one --value_range LOW HIGH would make some dark; consider --value_range p1 p99"
    samples = np.concatenate([np.empty(0), *found.samples])
    if value_range is None and len(samples) and not is_mixed:
        low, high = np.percentile(samples, [1, 99])
        low, high = (low, high) if low < high else (found.lowest, max(found.highest, found.lowest + 1))
        yield (
            f"values from {found.lowest:g} to {found.highest:g}, 1 % of them below {low:g} and 1 % above {high:g}; "
            f"consider --value_range {low:g} {high:g}, or of each image --value_range p1 p99"
        )
    if value_range is None and found.num_floats:
        yield f"training stops at the {found.num_floats} images of floats without --value_range"


def _range(numbers: tuple[int, ...]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else f"{numbers[0]}"


def _advice(found: Findings, reading: Reading) -> Iterator[str]:
    """The flags that would let images of `found.faults` be read, a line each."""
    counts = found.numbers["other channels"]
    if counts:
        listed = ", ".join(f"{number} of {channels}" for channels, number in counts.most_common())
        channels, number = counts.most_common(1)[0]
        if number > len(found.sizes):
            advice = (
                f"train with --config_overrides num_channels={channels} --image_mean 0.5 --image_std 0.25, and give "
            )
            advice += f"--num_channels {channels} here"
        else:
            advice = "move them to another folder"
        yield f"images of other channels than {reading.num_channels}: {listed}; {advice}"
    if counts := found.numbers["too large"]:
        yield f"the largest image has {max(counts)} pixels; consider --max_image_pixels {max(counts)}"
    if "several pages" in found.faults:
        yield (
            "TIFFs of several pages; consider --tiff_pages channels (of one image), images (of their own) or first "
            "(the others are ignored)"
        )
    if "needs scientific" in found.faults:
        yield "images that need further packages; consider pip install 'dino-hf[scientific]'"


def _by_number(findings: dict[str, list[str]]) -> list[str]:
    return sorted(findings, key=lambda kind: -len(findings[kind]))


def _some(names: list[str]) -> Iterator[str]:
    for name in names[:NUM_EXAMPLES]:
        yield f"  {printable(name)}"
    if len(names) > NUM_EXAMPLES:
        yield f"  and {len(names) - NUM_EXAMPLES} more (--all lists them)"


def check_from_command_line(argv: list[str]) -> None:
    description = "Find the images that training would skip or stop at. The exit code is 1 if there are any."
    parser = Parser(prog="dino-check", description=description)
    parser.add_argument("dataset_name", help="Hub id, or path of a folder, parquet, Arrow or tar file")
    parser.add_argument("--config_name", help="configuration of a dataset that has several")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--image_column", help="column of the images (default: the only one there is)")
    parser.add_argument("--streaming", action="store_true", help="read the data without preparing it first")
    parser.add_argument("--num_channels", type=int, default=3, help="that the network takes (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="print every finding, not some of each kind")
    add_reading(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    args = parser.parse_args(argv)
    if check_and_print(args):
        raise SystemExit(1)  # no error, which would be 2


def check_and_print(args: Namespace) -> int:
    """Print what was found; return how many images would be skipped, or would stop the training."""
    value_range = parse_value_range(args.value_range)
    reading = Reading(args.num_channels, args.background, args.tiff_pages, args.max_image_pixels)
    if account := describe_folder(args.dataset_name, args.folder_layout):
        print(account)
    found = check(
        args.dataset_name, args.config_name, args.split, args.image_column, args.streaming, reading, args.num_workers,
        args.folder_layout, args.allow_unread,
    )  # fmt: skip
    if args.all:
        for line in [*found.faults.values(), *found.notes.values()]:
            print(*map(printable, line), sep="\n")
    print(*report(found, reading, value_range), sep="\n")
    return found.num_skipped + (found.num_floats if value_range is None else 0)


def main() -> None:
    interruption.listen("dino-check")
    run_process("dino-check", check_from_command_line)


if __name__ == "__main__":
    main()
