"""Images that cannot be decoded: every protocol skips them, counts them, and names them in one line."""

import warnings
from collections.abc import Callable, Sequence

from accelerate import PartialState
from datasets import Dataset
from tqdm import tqdm

from modeling_dino.command_line import printable

from .decoding import BrokenImageError, Reading, decode_image, image_name
from .folders import MAX_UNREAD
from .workers import Loader


BATCH_SIZE = 16  # images that a worker decodes at once
NUM_NAMED = 3  # images in the line


class DecodableImages:
    """Collator that skips images that cannot be decoded, for one that decodes all of its rows."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> tuple[tuple | BrokenImageError | None, dict[int, tuple[str | None, str]]]:
        """Return the collated rows, None if no row can be decoded, and path and reason of the others by position.

        Errors that may pass are returned, as a data loader would raise that of a worker with a traceback in its
        message: a file that cannot be opened, a package that is not installed.
        """
        try:
            return self.collate(rows), {}
        except BrokenImageError:
            pass
        failed = {}
        for position, row in enumerate(rows):
            try:
                self.collate([row])
            except BrokenImageError as error:
                if error.kind in ("needs scientific", "unreadable"):
                    return error, {}
                failed[position] = image_name(row["image"]), error.reason
        decodable = [row for position, row in enumerate(rows) if position not in failed]
        return (self.collate(decodable) if decodable else None), failed


class _Decoded:
    """Collator that decodes images and keeps nothing of them."""

    def __init__(self, reading: Reading):
        self.reading = reading

    def __call__(self, rows: list[dict]) -> None:
        for row in rows:
            decode_image(row["image"], self.reading)


def find_broken(
    rows: Sequence[dict] | Dataset, reading: Reading, num_workers: int = 0, is_shown: bool = False
) -> list[dict]:
    """Decode images and return those that cannot be, as {name, reason, row}; names are paths, or None.

    Args:
        rows: Each with `image`, as of `load_images`.
        reading: How they are read.
        num_workers: Worker processes that decode.
        is_shown: Whether a progress bar is shown on a terminal.
    """
    failed = []
    loader = Loader(
        rows, batch_size=BATCH_SIZE, num_workers=num_workers, collate_fn=DecodableImages(_Decoded(reading))
    )
    for number, (error, reasons) in enumerate(
        tqdm(loader, "checking images", leave=False, disable=None if is_shown else True)
    ):
        if error is not None:
            raise error
        failed += [
            {"name": path, "reason": reason, "row": BATCH_SIZE * number + position}
            for position, (path, reason) in reasons.items()
        ]
    return failed


def choose_decodable(rows: Sequence[dict] | Dataset, reading: Reading, what: str) -> list[int]:
    """Return the numbers of the images of a picture that can be decoded; see `say_skipped` for the others."""
    failed = find_broken(rows, reading)
    say_skipped(failed, len(rows), what, is_any_share=True)
    return sorted(set(range(len(rows))) - {image["row"] for image in failed})


def say_skipped(failed: list[dict], num_images: int, what: str, is_any_share: bool = False, advice: str = "") -> None:
    """Warn of images that cannot be decoded, in one line, on the main process.

    Args:
        failed: These images, as {name, reason, row}.
        num_images: Number of all images.
        what: What they are of.
        is_any_share: Whether more than a tenth may fail.
        advice: A sentence at the end of the line.

    Raises:
        ValueError: none can be decoded, or over a tenth cannot, unless `is_any_share`.
    """
    if not failed:
        return
    named = [printable(f"{image['name'] or image['row']} {image['reason']}") for image in failed]
    number = f"{len(failed):,} of {num_images:,} images"
    if len(failed) == num_images:
        raise ValueError(
            f"none of the {num_images:,} images ({what}) can be read, such as {named[0]}. Choose other images."
        )
    if len(failed) > MAX_UNREAD * num_images and not is_any_share:
        raise ValueError(
            f"{number} ({what}) cannot be read, more than a tenth, such as {named[0]}. Repair or remove them, or give "
            "--allow_unread to skip them."
        )
    if PartialState().is_main_process:
        listed = "; ".join(named[:NUM_NAMED]) + "; ..." * (len(named) > NUM_NAMED)
        warnings.warn(f"skipped {number} ({what}): {listed}" + f". {advice}" * bool(advice), stacklevel=2)


def refuse_incomplete(failed: list[dict]) -> None:
    """Check that all images of a benchmark can be decoded: its result is that of all of them.

    Raises:
        ValueError: some cannot; names the first.
    """
    if failed:
        raise ValueError(
            printable(f"image {failed[0]['name'] or failed[0]['row']} {failed[0]['reason']}")
            + ". A benchmark needs all of its images. Download it again."
        )
