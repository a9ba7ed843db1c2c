"""What a run shows in its first minute, in a terminal of any size, without one, and in a notebook."""

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import sys
import termios
import threading
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from training.monitor import Bar

from .commands import Background, command, forked, scripted, trained
from .test_training import metrics, recipe  # noqa: F401


SIZES = [(80, 24), (40, 24), (200, 50), (0, 0)]


class Terminal:
    """A pseudoterminal of so many columns and rows, and all that is written to it."""

    def __init__(self, columns: int, rows: int):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.name, self.received = Path(os.ttyname(self.slave)), b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.received += os.read(self.master, 65536)
            except OSError:  # the last writer has closed it
                return

    def all_lines(self) -> list[str]:
        """Each line with all that was drawn in it, separated by \\r, once the terminal is closed."""
        os.close(self.slave)
        self.reader.join(10)
        os.close(self.master)
        return self.received.decode().split("\n")

    def lines(self) -> list[str]:
        """Each line as it was last drawn, once the terminal is closed."""
        drawn = [line.rstrip("\r").split("\r") for line in self.all_lines()]
        return [([text for text in texts if text.strip()] or [""])[-1].rstrip() for texts in drawn]


def bar_in(columns: int, rows: int, monkeypatch) -> str:
    shown = Terminal(columns, rows)
    with open(shown.name, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        bar = Bar(total=700, initial=0, enabled=True)
        bar.values = ["loss 5.213", "0.94 ln K", "142 images/s", "entropy 4.34", "lr 6.8e-05", "data wait 0%"]
        bar.n, bar.left = 84, "01:23"
        bar.refresh()
        monkeypatch.undo()
        bar.disable = True  # draws no more
    return next(line for line in shown.lines() if line)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((80, 24), r" 12%\|█▏ {8}\| 84/700, loss 5.213, \S+ left, 0.94 ln K, 142 images/s"),
        ((40, 24), r"84/700, loss 5.213, \S+ left"),
        ((20, 24), r"84/700, loss 5.213"),
        ((10, 2), r"84/700"),
        ((200, 50), r" 12%\|.+\| 84/700, loss 5.213, .+, entropy 4.34, lr 6.8e-05, data wait 0%"),
        ((0, 0), r" 12%\|█▏ {8}\| 84/700, loss 5.213, \S+ left, 0.94 ln K, 142 images/s"),
    ],
)
def test_bar_shows_whole_parts_that_fit(size, expected, monkeypatch):
    assert re.fullmatch(expected, bar_in(*size, monkeypatch))


@pytest.mark.parametrize("size", SIZES)
def test_run_in_terminal_shows_bar_within_its_width(recipe, parquet_folder, tmp_path, size):  # noqa: F811
    shown = Terminal(*size)
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, "--report_to", "none")
    code = forked.start("training", list(map(str, argv)), (shown.name, shown.name), [{}], is_background=False)
    lines = shown.lines()
    assert code == 0, lines
    [bar] = [line for line in lines if "10/10" in line]
    assert len(bar) < (size[0] or 80)
    assert "loss" in bar and " left" in bar


CLOCK = """
from types import SimpleNamespace
from training import monitor
from training.__main__ import main
now, steps, count = [0.0], [], monitor.Monitor.count
monitor.time = SimpleNamespace(perf_counter=lambda: now[0])

def count_by_clock(self, images):
    steps.append(images)
    now[0] += {1: 100, 2: 50}.get(len(steps), 2)  # seconds that a step takes
    count(self, images)
    self.bar.refresh()

monitor.Monitor.count = count_by_clock
main()
"""


def test_time_left_is_that_of_steps_after_the_start(recipe, parquet_folder, tmp_path):  # noqa: F811
    """Steps 1 and 2, which set up workers and libraries, take 100 and 50 s, and the others 2 s each."""
    script = tmp_path / "script.py"
    script.write_text(CLOCK)
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--report_to", "none", "--output_dir")
    said = trained(*argv, tmp_path / "lines", module=script)
    left = dict(re.findall(r"^step (\d+) of 10: loss .+, data wait \d+%(?:, ([\d:]+) left)?$", said, re.M))
    assert left.pop("1") == left.pop("2") == "" and left.pop("10") == "00:00"
    assert left == {step: f"00:{2 * (10 - int(step)):02d}" for step in left} and len(left) >= 3
    shown = Terminal(80, 24)
    argv = list(map(str, (*argv, tmp_path / "bar")))
    assert forked.start(str(script), argv, (shown.name, shown.name), [{}], is_background=False) == 0
    drawn = re.split(r"[\r\n]+", "\n".join(shown.all_lines()))
    by_bar = {step: each.strip() for each in drawn for step in re.findall(r" (\d+)/10, loss", each)}
    assert " left" not in by_bar["2"]
    for step, text in left.items():
        assert f" {step}/10, loss" in by_bar[step] and f", {text} left" in by_bar[step]


def test_finished_run_that_is_resumed_says_so_and_shows_no_bar(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, "--report_to", "none")
    trained(*argv)
    shown = Terminal(80, 24)
    argv = list(map(str, (*argv, "--resume_from_checkpoint", "latest")))
    assert forked.start("training", argv, (shown.name, shown.name), [{}], is_background=False) == 0
    lines = shown.lines()
    assert f"Training had already finished at step 10. Its model and figures are written to {tmp_path}." in lines
    assert not [line for line in lines if "10/10" in line or line.startswith("Time:")]
    assert "steps 11 to 10" not in (tmp_path / "train.log").read_text()


def test_message_of_a_stop_is_the_last_line(recipe, parquet_folder, tmp_path):  # noqa: F811
    shown = Terminal(80, 24)
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, "--max_steps", 100_000)
    argv = list(map(str, (*argv, "--report_to", "none")))
    process = forked.start("training", argv, (shown.name, shown.name), [{}], is_background=True)
    while b"step 1 of" not in shown.received:
        assert forked.answer({"wait": process, "seconds": 0.1}) is None
    os.kill(process, signal.SIGINT)
    while (code := forked.answer({"wait": process, "seconds": 1})) is None:
        pass
    *_, bar, last = filter(None, shown.lines())
    assert code == 75 and re.match(r"Stopped by SIGINT after step \d+ of 100000\. To continue, ", last)
    assert re.search(r"\d+/100000, loss", bar)


BEFORE_THE_FIRST_BATCH = """
import sys
from training import data
from training.__main__ import main
data.CropLoader.batches = lambda *args: sys.exit(7)
main()
"""


def test_run_describes_itself_before_its_first_batch(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    finished = scripted(BEFORE_THE_FIRST_BATCH, tmp_path, *argv)
    assert finished.returncode == 7, finished.stderr
    device, network, head, images, steps, time_line = finished.stdout.splitlines()
    assert device == "Device: 1 process on CPU, 1 thread, fp32"
    planned = command(*argv, "--dry_run", "true").stdout
    backbone, of_head = (re.search(rf"{part} +([\d,]+)", planned)[1] for part in ("backbone", "head"))
    assert network == f"Network: vit_tiny_patch16 with config_overrides, {backbone} parameters"
    assert head == f"Head: 32 prototypes, {of_head} parameters"
    assert images == "Images: 40, in batches of 8; crops of 2 x 16 and 2 x 8 pixels"
    assert steps == "Steps: 10 (5 an epoch)"
    assert re.fullmatch(r"Time: roughly [\d.,]+ (s|minutes|hours) on this CPU", time_line)
    assert "Device:" not in planned


def test_first_step_is_shown_at_once(recipe, parquet_folder, tmp_path):  # noqa: F811
    """And leaves the metrics as they are, also of a run that is resumed."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, "--logging_steps", 4)
    argv += ("--report_to", "none", "--save_steps", "5")
    said = trained(*argv)
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 10]
    first = re.search(r"^step 1 of 10: loss ([\d.]+), [\d.]+ ln K, took [\d.]+ s$", said, re.M)
    assert said.index(first[0]) < said.index("step 4 of 10")
    assert 0 < float(first[1]) < 10
    resumed = trained(*argv, "--resume_from_checkpoint", tmp_path / "checkpoints/step_0000005")
    assert "Steps: 10 (5 an epoch), 5 left\n" in resumed and "step 6 of 10: loss" in resumed


def test_long_run_on_cpu_warns_and_names_a_recipe(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    run = Background(*argv, "--max_steps", 1_000_000_000, folder=tmp_path)
    while "step 1 of" not in run.stdout:
        assert run.poll() is None, run.stderr
    run.send(signal.SIGTERM)
    while run.poll(1) is None:
        pass
    pattern = r"Time: roughly [\d,]+ hours on this CPU. .* configs/own_images_cpu.yaml, about 20 minutes on two cores."
    assert re.search(pattern, run.stderr.splitlines()[0]), run.stderr
    assert "WARNING training.start: Time: roughly" in (tmp_path / "run/train.log").read_text()


CELLS = (
    "from training import TrainingArguments, train",
    "TrainingArguments(output_dir='OUTPUT')",
    "train(TrainingArguments(dataset_name='/no/such/folder', output_dir='OUTPUT'))",
    """
import yaml
settings = yaml.safe_load(open("RECIPE"))
settings["config_overrides"] = [f"{name}={value}" for name, value in settings["config_overrides"].items()]
run = dict(settings, dataset_name="DATA", output_dir="OUTPUT", report_to=["none"])
train(TrainingArguments(**run))
""",
    "train(TrainingArguments(**run))",
)


@pytest.mark.slow
def test_notebook_shows_one_bar_and_short_errors(recipe, parquet_folder, tmp_path, monkeypatch):  # noqa: F811
    """In a real kernel, with ipywidgets where it is installed."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    replaced = {"RECIPE": recipe, "DATA": str(parquet_folder), "OUTPUT": str(tmp_path / "run")}
    cells = [re.sub("RECIPE|DATA|OUTPUT", lambda word: replaced[word[0]], cell) for cell in CELLS]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how nbclient talks to the kernel
        NotebookClient(book, timeout=300, allow_errors=True, kernel_name="python3").execute()
    _, missing, no_path, trained_here, refused = book.cells

    def error(cell) -> list[str]:
        [found] = [output for output in cell.outputs if output.output_type == "error"]
        return "\n".join(found.traceback).splitlines()

    assert error(missing) == ["ValueError: dataset_name must be given"]
    assert error(no_path) == ["ValueError: there is no file or folder /no/such/folder"]
    [refusal] = error(refused)
    assert "give another output_dir, resume_from_checkpoint latest to continue it" in refusal and "--" not in refusal

    printed = [output for output in trained_here.outputs if output.output_type == "stream"]
    assert {output.output_type for output in trained_here.outputs} == {"stream", "execute_result"}  # no widgets
    lines = "".join(output.text for output in printed if output.name == "stdout").split("\n")
    seen = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines]
    assert len([line for line in seen if "10/10" in line]) == 1 and "%|" in next(
        line for line in seen if "10/10" in line
    )
    assert not [line for line in seen if "%|" in line and "10/10" not in line]
    assert "".join(output.text for output in printed if output.name == "stderr") == ""


def test_commands_show_no_report_or_bar_of_transformers(recipe, parquet_folder, tmp_path):  # noqa: F811
    """Where weights are new or dropped on purpose: a backbone gets heads, and a checkpoint loses its own."""
    data = ("--dataset_name", parquet_folder)
    argv = ("--config", recipe, *data, "--report_to", "none", "--max_steps", 2, "--output_dir")
    first = command(*argv, tmp_path / "first")
    second = command(*argv, tmp_path / "second", "--init_from", tmp_path / "first")
    with_heads = tmp_path / "first/checkpoints/step_0000002/student"
    shutil.copy(tmp_path / "first/preprocessor_config.json", with_heads)
    models = (tmp_path / "first", with_heads)
    measured = command("knn", "--model", *models, *data, "--k", 5, module="evaluation")
    stock = command(
        tmp_path / "first", tmp_path / "vit", "--to", "vit", module="modeling_dino.convert_dino_checkpoint"
    )
    for finished in (first, second, measured, stock):
        assert finished.returncode == 0, finished.stderr
        printed = finished.stdout + finished.stderr
        assert not re.search("LOAD REPORT|MISSING|UNEXPECTED|newly init|%\\||Loading weights|Writing model", printed)
    assert first.stderr == second.stderr == ""
