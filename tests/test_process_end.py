"""Signals, lost workers and errors in the midst of a run: everything ends, in one line, and what was learned stays."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from datasets import load_dataset

from modeling_dino import DINOConfig, DINOModel
from modeling_dino.image_processing_dino import make_image_processor

from .commands import TWO, Background, scripted, trained
from .test_interruption import assert_same_end, assert_same_weights, has_done, start, wait_until
from .test_training import losses, recipe  # noqa: F401


STUCK = """
import time
import importlib, sys
from {package}.__main__ import main
owner = importlib.import_module({owner!r})
original, calls = owner.{name}, []
def stuck(*args, **kwargs):
    calls.append(0)
    if len(calls) == {call}:
        open({flag!r}, "w").close()
        time.sleep(1000)
    return original(*args, **kwargs)
owner.{name} = stuck
main()
"""


def stuck_in(owner: str, name: str, call: int, folder: Path, *argv) -> Background:
    """A command with workers that never returns from a call of a function, when it is there."""
    flag = folder / "is_stuck"
    script = STUCK.format(package=owner.partition(".")[0], owner=owner, name=name, call=call, flag=str(flag))
    (folder / "script.py").write_text(script)
    running = Background(*argv, "--num_workers", 2, module=folder / "script.py", folder=folder)
    end = time.monotonic() + 60
    while not flag.exists():
        assert running.poll() is None and time.monotonic() < end, running.stderr
    running.family = psutil.Process(running.pid).children(recursive=True)
    assert len(running.family) >= 2
    return running


@pytest.fixture
def stuck(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    return lambda owner, name, call, *more: stuck_in(owner, name, call, tmp_path, *argv, *more)


def assert_all_gone(running: Background) -> None:
    _, alive = psutil.wait_procs(running.family, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_second_ctrl_c_ends_the_run_at_once(stuck):
    running = stuck("training.train", "update_teacher_", 5)
    running.send(signal.SIGINT, "group")
    while "SIGINT received" not in running.stderr:
        assert running.poll(0.1) is None
    assert running.poll(1) is None
    running.send(signal.SIGINT, "group")
    assert running.poll(20) == 130
    first, second = running.stderr.splitlines()
    assert first == "dino-train: SIGINT received: stopping after this step, Ctrl-C again to stop now"
    assert second.startswith("dino-train: stopped now, before the step was done; ") and "step_0000003 is" in second
    assert_all_gone(running)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signal_during_knn_before_the_first_step_ends_the_run(stuck, number):
    running = stuck("training.knn_evaluation", "knn_accuracy", 1, "--eval_steps", 5)
    running.send(number, "group")
    assert running.poll(20) == 75
    assert running.stderr == f"dino-train: stopped by {number.name} before the first step\n"
    assert_all_gone(running)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_an_evaluation_at_once(parquet_folder, tmp_path, number, code):
    config = DINOConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    DINOModel(config).save_pretrained(tmp_path / "model")
    make_image_processor(16, 3).save_pretrained(tmp_path / "model")
    argv = ("knn", "--model", tmp_path / "model", "--dataset_name", parquet_folder, "--batch_size", 4)
    running = stuck_in("evaluation.features", "pooled", 2, tmp_path, *argv)
    running.send(number, "group")
    assert running.poll(20) == code
    assert running.stderr == f"dino-eval: stopped by {number.name}\n"
    assert_all_gone(running)


def test_signal_while_libraries_are_imported_ends_the_command(recipe, parquet_folder, tmp_path):  # noqa: F811
    running = start("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    signals = Path(f"/proc/{running.pid}/status")
    caught = 0
    while not caught & 1 << (signal.SIGHUP - 1):  # is not yet, in a Python that has just started
        assert running.poll() is None
        [line] = [line for line in signals.read_text().splitlines() if line.startswith("SigCgt")]
        caught = int(line.split()[1], 16)
    os.killpg(running.pid, signal.SIGINT)
    printed, _ = running.communicate(timeout=20)
    assert running.returncode == 75 and printed == "dino-train: stopped by SIGINT before the first step\n"


def test_signal_that_was_ignored_at_the_start_stays_ignored(recipe, parquet_folder, tmp_path):  # noqa: F811
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + "from training.__main__ import main\n"
    hanging_up = "import os, sys\ntrain = sys.modules['training.train']\noriginal = train.update_teacher_\n"
    hanging_up += (
        "train.update_teacher_ = lambda *args: (os.kill(os.getpid(), signal.SIGHUP), original(*args))\nmain()\n"
    )
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    finished = scripted(ignoring + hanging_up, tmp_path, *argv)
    assert finished.returncode == 0 and len(losses(tmp_path / "run")) == 10


def test_killed_worker_ends_the_run_with_a_checkpoint(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_train_epochs", 100, "--save_steps", 10000)
    argv += ("--num_workers", 2, "--output_dir", tmp_path / "run")
    running = Background(*argv, folder=tmp_path)
    while not has_done(tmp_path / "run", 3):
        assert running.poll() is None, running.stderr
    running.family = psutil.Process(running.pid).children()
    running.family[0].kill()
    assert running.poll(30) == 2
    [line] = running.stderr.splitlines()
    assert f"a data loader worker (process {running.family[0].pid}) was killed by SIGKILL, as when memory" in line
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    assert str(checkpoint) in line and int(checkpoint.name[5:]) == len(losses(tmp_path / "run"))
    assert_all_gone(running)


FAILING = """
import os, torch
import sys
import training.__main__
module = sys.modules["training.train"]
original, calls = module.{name}, []
def failing(*args, **kwargs):
    calls.append(0)
    if len(calls) == 5 and not os.environ.get("WHOLE"):
        raise {error}
    return original(*args, **kwargs)
module.{name} = failing
from training.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "error", "saved", "said"),
    [
        ("backpropagate", "torch.OutOfMemoryError('12 GiB')", 4, "out of memory (12 GiB): lower --per_device"),
        ("backpropagate", "AssertionError('odd')", 4, "AssertionError: odd (traceback in train.log)"),
        ("update_teacher_", "MemoryError()", 3, "out of memory (MemoryError): lower"),  # in the midst of the update
        ("student_teacher_distance", "KeyError('x')", 5, "KeyError: 'x' (traceback in train.log)"),
    ],
)
def test_error_in_mid_training_leaves_the_last_whole_step(
    recipe, parquet_folder, tmp_path, name, error, saved, said  # noqa: F811
):  # fmt: skip
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_workers", 2)
    argv += ("--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    failed = scripted(FAILING.format(name=name, error=error), tmp_path, *argv)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert said in failed.stderr and f"step_{saved:07d} is the last checkpoint before" in failed.stderr
    assert "Traceback" in (tmp_path / "run/train.log").read_text()
    trained(*argv)
    trained(*argv[:-4], "--output_dir", tmp_path / "whole")
    if name == "student_teacher_distance":  # the error took the place of a line of metrics
        assert_same_weights(tmp_path / "run", tmp_path / "whole")
    else:
        assert_same_end(tmp_path / "run", tmp_path / "whole")


UNREAD = """
import os, sys, warnings
import training.__main__
module = sys.modules["training.train"]
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1), os.dup2(writer, 2)
original = module.update_teacher_
warnings.simplefilter("always")
module.update_teacher_ = lambda *args: (warnings.warn("careful"), original(*args))
from training.__main__ import main
main()
"""


def test_closed_streams_do_not_end_the_run(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path / "run")
    finished = scripted(UNREAD, tmp_path, *argv)
    assert finished.returncode == 0 and len(losses(tmp_path / "run")) == 10
    assert (tmp_path / "run/train.log").read_text().count("careful (UserWarning") == 10


NOTEBOOK = """
import os, signal, sys, yaml
from training import TrainingArguments, train
module = sys.modules["training.train"]
settings = yaml.safe_load(open({recipe!r}))
settings["config_overrides"] = [f"{{name}}={{value}}" for name, value in settings["config_overrides"].items()]
original = module.update_teacher_
def interrupting(*args):
    original(*args)
    os.kill(os.getpid(), signal.SIGINT)
module.update_teacher_ = interrupting
try:
    settings["num_workers"] = 2
    train(TrainingArguments(dataset_name={data!r}, output_dir={output!r}, **settings))
except KeyboardInterrupt as stopped:
    print("KeyboardInterrupt:", stopped)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def test_notebook_gets_a_keyboard_interrupt(recipe, parquet_folder, tmp_path):  # noqa: F811
    script = NOTEBOOK.format(recipe=recipe, data=str(parquet_folder), output=str(tmp_path / "run"))
    finished = scripted(script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (
        "KeyboardInterrupt: Stopped by SIGINT after step 1 of 10. To continue, run the same command with"
        in finished.stdout
    )
    assert (tmp_path / "run/checkpoints/step_0000001").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_launcher_killed_while_its_processes_start_takes_them_along(recipe, parquet_folder, tmp_path, seconds):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--per_device_train_batch_size", 4)
    running = start(*argv, "--output_dir", tmp_path, launcher=TWO)
    launcher = psutil.Process(running.pid)
    wait_until(lambda: len(launcher.children()) == 2, running)
    time.sleep(seconds)
    children = launcher.children(recursive=True)
    running.kill()
    assert not psutil.wait_procs(children, timeout=30)[1]
    running.communicate()


def test_data_file_that_is_cut_while_it_is_read_is_explained(recipe, parquet_folder, tmp_path):  # noqa: F811
    dataset = load_dataset(str(parquet_folder), split="train", cache_dir=str(tmp_path / "cache"))
    dataset.save_to_disk(tmp_path / "data")
    argv = ("--config", recipe, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "run")
    running = Background(*argv, "--num_workers", 2, "--num_train_epochs", 1000, folder=tmp_path)
    while not has_done(tmp_path / "run", 3):
        assert running.poll() is None, running.stderr
    [file] = (tmp_path / "data").glob("*.arrow")
    os.truncate(file, 4096)
    assert running.poll(30) == 2
    assert "was killed by SIGBUS: a data file was cut while it was read" in running.stderr


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system that is small enough to fill")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_ends_the_run_with_what_is_safe(recipe, parquet_folder, small_disk):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", small_disk / "run")
    running = Background(*argv, "--num_train_epochs", 50, "--report_to", "none", folder=small_disk.parent)
    while not (small_disk / "run/checkpoints/step_0000003").exists():
        assert running.poll() is None, running.stderr
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 20000))
    assert running.poll(60) == 2
    [line] = [line for line in running.stderr.splitlines() if "train.log cannot be written" not in line]
    assert "No space left on device" in line or "no space left on the device: it needs" in line
    assert str(small_disk) in line and "is the last checkpoint before" in line


LIBRARY = """
import sys, yaml
from training import TrainingArguments, train
module = sys.modules["training.train"]
def fail(*_):
    raise ValueError("late")
module.describe_start = fail
settings = yaml.safe_load(open({recipe!r}))
settings["config_overrides"] = [f"{{name}}={{value}}" for name, value in settings["config_overrides"].items()]
settings["num_workers"] = 2
train(TrainingArguments(dataset_name={data!r}, output_dir={output!r}, **settings))
"""


def test_program_that_fails_with_workers_ends(recipe, parquet_folder, tmp_path):  # noqa: F811
    script = LIBRARY.format(recipe=recipe, data=str(parquet_folder), output=str(tmp_path / "run"))
    (tmp_path / "script.py").write_text(script)
    running = Background(module=tmp_path / "script.py", folder=tmp_path)
    assert running.poll(60) == 1 and "ValueError: late" in running.stderr


PERSISTENT = """
import multiprocessing
from evaluation.workers import Loader
loader = Loader(list(range(400)), batch_size=2, num_workers=2, persistent_workers=True)
list(loader)
try:
    for number, _ in enumerate(loader):
        if number == 3:
            multiprocessing.active_children()[0].kill()
except ValueError as error:
    print(error)
"""


def test_worker_that_is_killed_in_a_later_epoch_is_explained(tmp_path):
    (tmp_path / "script.py").write_text(PERSISTENT)
    running = Background(module=tmp_path / "script.py", folder=tmp_path)
    assert running.poll(60) == 0, running.stderr
    assert "was killed by SIGKILL, as when memory runs out" in running.stdout


def test_closed_standard_streams_do_not_end_a_command(flat_folder, tmp_path):
    line = f"exec {sys.executable} -m training.check {flat_folder} 1>&- 2>&-"
    assert subprocess.run(["sh", "-c", line], timeout=120).returncode == 0


PROGRAM = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("mine")
"""


def test_another_program_that_imports_the_package_keeps_its_signals(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program/__init__.py").write_text("import training\n")
    (tmp_path / "program/__main__.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}"}
    line = [sys.executable, "-m", "program"]
    ended = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "mine\n")
