"""What a person sees of a run: the progress, `metrics.jsonl`, and the curves drawn from it."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from evaluation.pictures import choose_channels
from modeling_dino.command_line import is_notebook

from .augmentation import NUM_GLOBAL_CROPS, AugmentationArguments, CropBatch, finish_crops
from .log import say
from .start import duration
from .verdict import FAILING, NO_INFORMATION, TOO_EARLY, Judge


DATA_WAIT_LIMIT = 0.2  # share of the time, above which there is advice
MIN_WAIT_STEPS = 50  # steps in which the wait for data is measured, before there is advice
NUM_STARTING_STEPS = 2  # at the start of a process, which also set up workers and libraries
MAX_JUDGED = 10_000  # lines, of some KiB each
NARROWEST_CROP = 60  # pixels in crops.png, as wide as a title
NUM_PROGRESS_LINES = 6  # where there is no terminal for a bar; and one of the start

logger = logging.getLogger(__name__)


class Bar(tqdm):
    """A progress bar in text that fits any width: what does not fit is dropped, the least important part first.

    It needs a terminal or a notebook, which shows the text in place, as a terminal does.

    Args:
        total: Steps of the whole run.
        initial: Steps done before.
        enabled: Whether to draw it.
    """

    def __init__(self, total: int, initial: int, enabled: bool):
        self.values = []  # of the last line of metrics, the most important first
        self.left = None  # time to the last step, as MM:SS, once it has been measured
        file = sys.stdout if is_notebook() else sys.stderr  # lines and bar in turn would leave a trace of each bar
        disable = not enabled or not (is_notebook() or file.isatty())
        # nrows: tqdm hides bars where a terminal says that it has no rows
        super().__init__(total=total, initial=initial, file=file, disable=disable, mininterval=0.5, nrows=20)

    def __str__(self) -> str:
        values, width = self.format_dict | {"ncols": None}, width_of(self.fp)
        steps, graph = "{n_fmt}/{total_fmt}", "{percentage:3.0f}%|{bar:10}| "
        left = [f"{self.left} left"] if self.left else []
        if self.n == self.initial:
            left = ["waiting for the first step"]
        parts = [steps, *self.values[:1], *left, *self.values[1:3], graph, *self.values[3:]]
        shown = ""
        for number in range(1, len(parts) + 1):
            texts = [part for part in parts[:number] if part is not graph]
            bar_format = graph * (graph in parts[:number]) + ", ".join(texts)
            text = self.format_meter(**values | {"bar_format": bar_format})
            if len(text) >= width:
                break
            shown = text
        return shown


def width_of(file: TextIO) -> int:
    """Return the columns of a terminal: 80 where it does not say, or where it is a notebook."""
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Monitor:
    """Writes on the main process, does nothing on the others.

    Args:
        output_dir: Where `metrics.jsonl` goes.
        num_steps: Steps of the whole run.
        first_step: Steps done before; later lines of an existing `metrics.jsonl` are dropped.
        enabled: Whether this is the main process.
        data_advice: Called at every line, for what to say if the training waited for data since the last one.
        track: Called with every line's values and step, for trackers.
        judge: Tells from the lines how the training goes.
    """

    def __init__(
        self,
        output_dir: Path,
        num_steps: int,
        first_step: int,
        enabled: bool,
        data_advice: Callable[[], str],
        track: Callable[[dict, int], None],
        judge: Judge,
    ):
        self.track = track
        self.num_steps, self.first_step = num_steps, first_step
        self.enabled = enabled
        self.metrics_file = output_dir / "metrics.jsonl"
        self.judge = judge
        self.judged = deque(maxlen=MAX_JUDGED)  # lines of training metrics, those before a stop as well
        if enabled:
            kept = [line for line in read_metrics(output_dir) if line["step"] <= first_step] if first_step else []
            rewritten = self.metrics_file.with_suffix(".tmp")
            rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
            rewritten.replace(self.metrics_file)
            if not judge.args.allow_changed:  # else other settings are to be judged
                self.judged += [line for line in kept if "verdict" in line]
        self.verdict = self.judged[-1]["verdict"] if self.judged else TOO_EARLY
        self.said = next((line["verdict"] for line in reversed(self.judged) if line["verdict"] != TOO_EARLY), None)
        self.bar = Bar(num_steps, first_step, enabled and first_step < num_steps)
        self.since = time.perf_counter()
        self.step = first_step
        self.started = self.since  # when NUM_STARTING_STEPS were done
        self.progress = -1  # of NUM_PROGRESS_LINES
        self.images = 0
        self.waited = 0.0  # seconds since the last line of metrics
        self.data_advice = data_advice
        self.wait_window = None  # first step, seconds that were waited, seconds in all
        self.advised = False
        self.skipped = Counter()  # images by kind of fault, of this process since it started
        self.skipped_file = output_dir / "skipped.jsonl"
        self.has_said_skipped = False
        self.noted = Counter()  # images of this process that are read in part, by what is not read

    def skip(self, step: int, images: list[dict[str, str]]) -> None:
        """Lists images that were broken in `skipped.jsonl`, on whatever process."""
        if images:
            self.skipped.update(image["kind"] for image in images)
            append(self.skipped_file, [{"step": step} | image for image in images])

    def say_skipped(self, skipped: Counter, num_seen: int, is_last: bool) -> None:
        """Say how many images of all processes were skipped: when there is one first, and at the end."""
        if skipped and (is_last or not self.has_said_skipped):
            self.has_said_skipped = True
            kinds = ", ".join(f"{number} {kind}" for kind, number in skipped.most_common())
            self.say(f"{skipped.total()} of {num_seen} images skipped: {kinds} (listed in skipped.jsonl)")

    def note(self, images: list[dict[str, str]]) -> None:
        """Warn of images that are read in part: of the first one of a kind by its name, and of their number."""
        for image in images:
            self.noted[image["note"]] += 1
            number = self.noted[image["note"]]
            if number in (1, 10, 100, 1000) or number % 10_000 == 0:
                logger.warning(
                    "%d image%s read in part, %s: %s", number, "s" * (number > 1), image["note"], image["image"]
                )

    def first_skipped(self) -> str:
        """What was wrong with the first five images that are listed."""
        lines = self.skipped_file.read_text().splitlines() if self.skipped_file.exists() else []  # of another process
        reasons = dict.fromkeys(json.loads(line)["reason"] for line in lines)
        return "; ".join(list(reasons)[:5])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens within is waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def count(self, images: int) -> None:
        """Count one step, on this many images of all processes, and estimate the time that is left.

        The estimate is the mean time of the steps after the first NUM_STARTING_STEPS of this process, with checkpoints
        and evaluations between them, times the steps that are left.
        """
        self.images += images
        self.step += 1
        num_measured = self.step - self.first_step - NUM_STARTING_STEPS
        if num_measured == 0:
            self.started = time.perf_counter()
        elif num_measured > 0:
            mean = (time.perf_counter() - self.started) / num_measured
            self.bar.left = tqdm.format_interval(mean * (self.num_steps - self.step))
        self.bar.update()

    def pause(self) -> float:
        return time.perf_counter() - self.since

    def resume(self, elapsed: float) -> None:
        """Leaves out of images/s what has passed since `elapsed = pause()`."""
        self.since = time.perf_counter() - elapsed

    def show_first(self, step: int, values: dict[str, float]) -> None:
        """Show the first step at once. Its time says nothing of the others: it sets up workers and libraries."""
        seconds = time.perf_counter() - self.since
        self.bar.values = [f"loss {values['loss']:.3f}", f"{values['loss_over_ln_k']:.2f} ln K"]
        self.say(f"step {step} of {self.num_steps}: {', '.join(self.bar.values)}, took {duration(seconds)}")

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """A line of training metrics after `step` steps; adds images/s and `data_wait`, since the last one.

        `data_wait` is the share of the time in which the training waited for its next batch. Without workers, it
        decodes and crops by itself meanwhile.
        """
        elapsed, waited = time.perf_counter() - self.since, self.waited
        images_per_second, data_wait = self.images / elapsed, waited / elapsed
        self.since, self.images, self.waited = time.perf_counter(), 0, 0.0
        measured = {
            "images_per_second": images_per_second,
            "data_wait": data_wait,
            "peak_memory_mib": peak_memory_mib(),
        }
        line = values | measured
        if self.enabled:
            line["verdict"] = self._judge(step, line)
        self.write(step, line)
        self.bar.values = [
            f"loss {values['loss']:.3f}",
            f"{values['loss_over_ln_k']:.2f} ln K",
            f"{images_per_second:.0f} images/s",
            f"entropy {values['teacher_entropy']:.2f}",
            f"lr {values['learning_rate']:.1e}",
            f"data wait {data_wait:.0%}",
        ]
        summary = ", ".join(self.bar.values)
        progress = step * NUM_PROGRESS_LINES // self.num_steps
        if self.bar.disable and progress > self.progress:
            left = f", {self.bar.left} left" if self.bar.left else ""
            self.say(f"step {step} of {self.num_steps}: {summary}{left}")
            self.progress = progress
        elif self.enabled:
            logger.info("step %d of %d: %s", step, self.num_steps, summary)
        self._advise(step, waited, elapsed)

    def _advise(self, step: int, waited: float, elapsed: float) -> None:
        """Say once what would make the data faster, if the training waits for it."""
        if self.wait_window is None:  # the first line is of the start, too
            self.wait_window = step, 0.0, 0.0
            self.data_advice()  # which is of the time since it was asked last
            return
        first, waited, elapsed = (sum(pair) for pair in zip(self.wait_window, (0, waited, elapsed)))
        self.wait_window = first, waited, elapsed
        if self.advised or step - first < MIN_WAIT_STEPS:
            return
        self.wait_window, advice = (step, 0.0, 0.0), self.data_advice()
        if waited > DATA_WAIT_LIMIT * elapsed:
            self.say(f"step {step}: {waited / elapsed:.0%} of the time is spent waiting for data: {advice}")
            self.advised = True

    def _judge(self, step: int, line: dict) -> str:
        """The verdict after one more line; says it if it is another than was said before."""
        self.judged.append({"step": step} | line)
        self.verdict = self.judge.verdict(list(self.judged))
        if self.verdict not in (TOO_EARLY, self.said):
            self.say(f"step {step}: {self.explained_verdict()}")
            self.said = self.verdict
        return self.verdict

    def explained_verdict(self) -> str:
        """In one line, with advice if the training fails."""
        if self.verdict not in FAILING:
            return self.verdict
        line = self.judged[-1]
        return (
            f"{self.verdict} (loss {line['loss_over_ln_k']:.2f} ln K, teacher entropy "
            f"{line['teacher_entropy_over_ln_k']:.2f} ln K, target information {line['target_information']:.2g} nats, "
            f"student-teacher distance {line['student_teacher_distance']:.2g}); {self.judge.advice(self.verdict)}"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.enabled:
            append(self.metrics_file, [{"step": step} | values])
            kinds = {f"skipped/{kind}": number for kind, number in values.get("skipped", {}).items()}
            self.track({name: value for name, value in values.items() if name != "skipped"} | kinds, step)

    def say(self, text: str) -> None:
        """A line on the console, above the bar, and in the log."""
        if self.enabled:
            say(text)

    def close(self) -> None:
        self.bar.close()


def append(path: Path, lines: list[dict]) -> None:
    """Append lines of JSON to a file.

    Raises:
        OSError: names the file, which Python's own does not where the disk is full.
    """
    try:
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def peak_memory_mib() -> float:
    """The most that this process has held so far, in MiB: on a GPU of its memory, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on a Mac in bytes
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`, but for a last one that a crash has cut short.

    Raises:
        ValueError: a line that no run wrote.
    """
    file, metrics = output_dir / "metrics.jsonl", []
    lines = file.read_text(errors="replace").split("\n")[:-1] if file.is_file() else []
    for number, text in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(text))
            is_whole = isinstance(metrics[-1], dict) and isinstance(metrics[-1].get("step"), int)
        except ValueError:
            is_whole = False
        if not is_whole:
            raise ValueError(f"{file} is damaged in line {number}, which is not a run's. Remove the line.")
    return metrics


def to_pictures(crops: torch.Tensor, args: AugmentationArguments) -> torch.Tensor:
    """Normalised crops back to uint8."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (args.image_mean, args.image_std))
    return ((crops * std + mean) * 255).round().clamp(0, 255).byte()


def draw_crops(batch: CropBatch, args: AugmentationArguments, output_dir: Path) -> Path:
    """Draw what the networks see of the first eight different images of a batch into `figures/crops.png`, one a row.

    Small crops are enlarged, pixel by pixel, so that the titles fit.
    """
    batch_size, gap = len(batch.crops[0]) // NUM_GLOBAL_CROPS, 4
    rows = _different_images(batch, batch_size, 8)
    columns = []
    for crops in finish_crops(batch, "cpu", args):
        for seen in crops.split(batch_size):  # of the crop-major rows
            seen = to_pictures(seen[rows], args)
            columns.append(seen[:, choose_channels(seen.shape[1], args.display_channels)])
    factor = math.ceil(NARROWEST_CROP / min(pictures.shape[-1] for pictures in columns))
    columns = [pictures.repeat_interleave(factor, 2).repeat_interleave(factor, 3) for pictures in columns]
    widths = [pictures.shape[-1] for pictures in columns]
    font = ImageFont.load_default(13)
    top, height = 20, max(widths) + gap
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), top + len(rows) * height - gap), "white")
    for column, pictures in enumerate(columns):
        left = sum(widths[:column]) + gap * column
        is_global = column < NUM_GLOBAL_CROPS
        title = f"global {column + 1}" if is_global else f"local {column + 1 - NUM_GLOBAL_CROPS}"
        ImageDraw.Draw(canvas).text((left + widths[column] / 2, top / 2), title, "black", font, anchor="mm")
        for i, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
            canvas.paste(Image.fromarray(picture), (left, top + i * height))
    path = output_dir / "figures" / "crops.png"
    path.parent.mkdir(exist_ok=True)
    canvas.save(path)
    return path


def _different_images(batch: CropBatch, batch_size: int, most: int) -> list[int]:
    """Return the first rows of a batch, `most` at most, without the repeated images that replace broken ones."""
    crops = [crops.unflatten(0, (-1, batch_size)) for crops in batch.crops]
    indices = batch.images.images if batch.images else [None] * batch_size  # rows of a stream come once
    rows = []
    for row in range(batch_size):
        if len(rows) == most:
            break
        is_repeated = any(
            all(torch.equal(of_size[:, row], of_size[:, before]) for of_size in crops)
            or (isinstance(indices[row], int) and indices[row] == indices[before])
            for before in rows
        )
        if not is_repeated:
            rows.append(row)
    return rows


def draw_curves(output_dir: Path, out_dim: int) -> Path:
    """Draw loss, teacher entropy, target information and k-NN of a run into `figures/curves.png` and `curves.pdf`.

    Gray lines: ln K, what chance gives; and the target information below which a run fails, as the verdict says.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    metrics = read_metrics(output_dir)
    training = [line for line in metrics if "loss" in line]
    knn = [line for line in metrics if any(key.startswith("knn_") for key in line)]
    grid, size = ((2, 2), (9, 6.6)) if knn else ((1, 3), (13.5, 3.6))
    figure, axes = plt.subplots(*grid, figsize=size, layout="constrained")
    axes = axes.flatten()
    limits = (
        (math.log(out_dim), "ln K"),
        (math.log(out_dim), "ln K"),
        (NO_INFORMATION, f"failing\nbelow {NO_INFORMATION}"),
    )
    keys = ("loss", "teacher_entropy", "target_information")
    titles = ("loss [nats]", "teacher entropy [nats]", "target information [nats]")
    for axis, key, title, (limit, name) in zip(axes, keys, titles, limits):
        points = [(line["step"], line[key]) for line in training if key in line]
        marker = "o" if len(points) == 1 else None  # a line of one point is not seen
        axis.plot(*zip(*points), color="#1f5fa8", marker=marker)
        axis.axhline(limit, color="0.6", linewidth=1, linestyle="--")
        axis.annotate(name, (1, limit), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", color="0.4")  # fmt: skip
        axis.set(title=title, ylim=(0, 1.05 * axis.get_ylim()[1]))  # so that no point lies on the edge
    if verdicts := [line["verdict"] for line in training if "verdict" in line]:
        figure.suptitle(f"Verdict: {verdicts[-1]}")
    if knn:
        keys = [key for key in knn[0] if key.endswith("_top1")]
        for key, shade in zip(keys, plt.cm.viridis([i / max(len(keys), 1) for i in range(len(keys))])):
            points = [(line["step"], line[key]) for line in knn if key in line]
            axes[3].plot(*zip(*points), marker="o", markersize=3, color=shade, label=f"k = {key.split('_')[1]}")
        axes[3].set(title="k-NN of the teacher, top-1 [%]")
        axes[3].legend(frameon=False)
    for axis in axes:
        axis.set(xlabel="step", xlim=(0, None))  # few steps, or one, would be shown with fractions of steps
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    path = output_dir / "figures" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)
    return path
