"""Runs that are killed, asked to stop, or find their checkpoints damaged, by the real commands."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from .commands import TWO, Background, command, trained
from .test_training import losses, metrics, recipe  # noqa: F401


def start(*argv, launcher=("-m",), module="training", **environment) -> subprocess.Popen:
    """A run that goes on in the background, with its workers in a group of their own."""
    command = [sys.executable, *launcher, module, *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def kill_all(running: subprocess.Popen) -> None:
    """The run with its workers and, of a launcher, the processes that it started, which are in groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended
        launcher = psutil.Process(running.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    running.communicate()


def has_done(output_dir, step: int) -> bool:
    path = output_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count('"loss"') >= step


def wait_until(condition, running: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_same_end(one, other) -> None:
    assert losses(one) == losses(other)
    assert_same_weights(one, other)


def assert_same_weights(one, other) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


SETTINGS = [
    pytest.param(processes, streaming, workers, marks=[] if fast else [pytest.mark.slow])
    for processes, streaming, workers in itertools.product((1, 2), (False, True), (0, 2))
    for fast in [(processes, streaming, workers) == (1, True, 2)]
]


@pytest.mark.parametrize(("processes", "streaming", "workers"), SETTINGS)
def test_killed_run_ends_as_one_that_was_not(recipe, parquet_folder, tmp_path, processes, streaming, workers):  # noqa: F811
    """Killed twice, wherever it then is: before its first checkpoint, while it writes one, or between two."""
    launcher = TWO if processes == 2 else ("-m",)
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_workers", workers, "--num_train_epochs", 8)
    argv += ("--save_steps", 2, "--save_total_limit", 2, "--per_device_train_batch_size", 8 // processes)
    argv += ("--streaming", "--num_examples", 40) if streaming else ()
    trained(*argv, "--output_dir", tmp_path / "whole", processes=processes)
    chance = random.Random(f"{processes} {streaming} {workers}")
    argv += ("--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "latest")
    for _ in range(2):
        running = start(*argv, launcher=launcher)
        time.sleep(chance.uniform(2, 9))  # to start takes about half of it
        kill_all(running)
    trained(*argv, processes=processes)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("whom", ["process", "group"])
def test_run_that_is_asked_to_stop_writes_a_checkpoint(recipe, parquet_folder, tmp_path, asked, whom):  # noqa: F811
    """The process alone, or with its workers, as Ctrl-C and Slurm do."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_workers", 2, "--num_train_epochs", 40)
    argv += ("--save_steps", 1000)
    running = Background(*argv, "--output_dir", tmp_path / "run", folder=tmp_path)
    while not has_done(tmp_path / "run", 3):
        assert running.poll() is None, running.stderr
    running.send(asked, whom)
    assert running.poll(60) == 75, running.stderr
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    step = int(checkpoint.name[5:])
    assert 3 <= step < 200 and len(losses(tmp_path / "run")) == step
    assert f"Stopped by {asked.name} after step {step} of 200" in running.stdout
    assert running.stderr.startswith(f"dino-train: {asked.name} received: stopping after this step")
    assert running.stderr.count("\n") == 1


@pytest.mark.slow
def test_one_of_two_processes_is_asked_and_both_stop(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_train_epochs", 40, "--save_steps", 1000)
    argv += ("--per_device_train_batch_size", 4)
    trained(*argv, "--output_dir", tmp_path / "whole", processes=2)
    running = start(*argv, "--output_dir", tmp_path / "run", launcher=TWO)
    wait_until(lambda: has_done(tmp_path / "run", 3), running)
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode != 0 and "Stopped by SIGUSR1 after step" in printed
    trained(*argv, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest", processes=2)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def processes_of(running: subprocess.Popen) -> dict[str, psutil.Process]:
    """Those that a launcher has started, by rank."""
    found = {}
    for process in psutil.Process(running.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.setdefault(process.environ().get("RANK"), process)
    return found


SLOW_TO_SAY_WHY = """
import time
from modeling_dino import command_line
from training.__main__ import main
one_line = command_line.one_line
command_line.one_line = lambda error: time.sleep(2) or one_line(error)
main()
"""


@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_process_that_dies_ends_the_others_with_a_message(recipe, parquet_folder, tmp_path, rank):  # noqa: F811
    """Also when the launcher, which has seen it too, tells them to end before they have written theirs."""
    (tmp_path / "script.py").write_text(SLOW_TO_SAY_WHY)
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_train_epochs", 400, "--save_steps", 4)
    argv += ("--output_dir", tmp_path, "--per_device_train_batch_size", 4)
    running = start(*argv, launcher=TWO[:-1], module=tmp_path / "script.py", PYTHONPATH=os.getcwd())
    wait_until(lambda: has_done(tmp_path, 6), running)
    processes_of(running)[rank].kill()
    printed, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "dino-train: error: another process of the run has ended" in printed, printed
    *_, last = sorted((tmp_path / "checkpoints").iterdir())
    if rank == "1":  # the other one saves the step that both had done
        assert f"{last} is the last checkpoint before" in printed and int(last.name[5:]) == len(losses(tmp_path))


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_write_a_checkpoint_and_end(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_train_epochs", 400, "--save_steps", 1000)
    running = start(*argv, "--output_dir", tmp_path, "--per_device_train_batch_size", 4, launcher=TWO)
    wait_until(lambda: has_done(tmp_path, 3), running)
    left = list(processes_of(running).values())
    running.kill()
    printed, _ = running.communicate(timeout=60)  # of all who share its output
    assert not psutil.wait_procs(left, timeout=10)[1]
    [checkpoint] = (tmp_path / "checkpoints").iterdir()
    assert f"Stopped by its launcher's end after step {int(checkpoint.name[5:])} of 2000" in printed


@pytest.fixture(scope="module")
def finished(recipe, parquet_folder, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = ("--config", recipe, "--dataset_name", parquet_folder)
    trained(*argv, "--output_dir", folder)
    return argv, folder


def cut_short(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["state.pt", "teacher/model.safetensors", "rank_0.pt", "student/config.json"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [*itertools.product(FILES, [cut_short, flip_a_bit, os.unlink]), ("manifest.json", cut_short),
     ("manifest.json", os.unlink)],
)  # fmt: skip
def test_damaged_checkpoint_is_told_and_the_one_before_is_used(finished, tmp_path, capsys, name, damage):
    from training.checkpoint import find_checkpoint

    shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints")
    *_, before, last = sorted((tmp_path / "checkpoints").iterdir())
    damage(last / name)
    with pytest.warns(UserWarning, match=f"{last.name} is damaged, .*{name.partition('/')[2] or name}"):
        assert find_checkpoint(tmp_path, "latest", must=False) == before
    lacks_manifest = name == "manifest.json" and damage is os.unlink
    message = f"got {last}. Give {before}.$" if lacks_manifest else f"{last.name} is damaged"
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path, str(last), must=False)


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path):
    argv, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    *_, last = sorted((tmp_path / "run/checkpoints").iterdir())
    cut_short(last / "state.pt")
    again = command(*argv, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    assert f"{last} is damaged, state.pt has" in again.stderr
    assert_same_end(tmp_path / "run", folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_temp", "0.05"], "was trained with teacher_temp 0.04, not 0.05"),
        (["--per_device_train_batch_size", "4"], "per_device_train_batch_size 8, of all processes together, not 4"),
        (["--num_train_epochs", "3"], "num_train_epochs 2, not 3"),
        (["--blur_radius", "0.1", "1"], "blur_radius [0.1, 2.0], not [0.1, 1.0]"),
        (["--seed", "3"], "seed 0, not 3"),
    ],
)
def test_setting_that_changes_what_is_learned_does_not_change_by_accident(finished, tmp_path, flags, message):
    argv, folder = finished
    argv += ("--output_dir", tmp_path, "--resume_from_checkpoint", folder / "checkpoints/step_0000006", *flags)
    refused = command(*argv)
    assert (
        refused.returncode == 2 and message in refused.stderr and f"--allow_changed {flags[0][2:]}" in refused.stderr
    )
    if flags[0] == "--num_train_epochs":
        trained(*argv, "--allow_changed", "num_train_epochs", "--num_workers", "1", "--logging_steps", "3")
        assert metrics(tmp_path)[-1]["step"] == 15


@pytest.mark.slow
def test_disk_that_is_full_leaves_the_last_checkpoint(finished, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of a file."""
    argv, folder = finished
    argv += ("--output_dir", tmp_path, "--resume_from_checkpoint", "latest")
    shutil.copytree(folder / "checkpoints/step_0000006", tmp_path / "checkpoints/step_0000006")
    limit = (folder / "checkpoints/step_0000006/state.pt").stat().st_size // 2
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from training.__main__ import main; main()"
    )
    full = subprocess.run([sys.executable, "-c", script, *map(str, argv)], capture_output=True, text=True, timeout=120)
    assert full.returncode == 2, full.stderr
    [message] = [line for line in full.stderr.splitlines() if line.startswith("dino-train: error: ")]
    assert "the checkpoint of step 9 cannot be written to" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000006"]
    trained(*argv, "--resume", "must")
    assert losses(tmp_path) == losses(folder)[6:]


def test_manifest_says_what_the_checkpoint_is_of(finished):
    manifest = json.loads((finished[1] / "checkpoints/step_0000006/manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["global_batch_size"] == 8
    assert (
        manifest["arguments"]["teacher_temp"] == 0.04
        and manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    )


@pytest.mark.slow
def test_settings_that_may_change_do_change(recipe, parquet_folder, tmp_path):  # noqa: F811
    """The checkpoint's own do not come back with the optimiser's moments."""
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--layer_decay", 0.9, "--freeze_backbone_steps", 0)
    trained(*argv, "--output_dir", tmp_path / "run", "--max_steps", 3)
    argv += ("--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest", "--max_steps", 6)
    argv += ("--allow_changed", "max_steps", "layer_decay", "freeze_backbone_steps")
    trained(*argv, "--layer_decay", 0.5, "--freeze_backbone_steps", 6)
    states = [torch.load(path / "state.pt") for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    scales = [sorted({group["lr_scale"] for group in state["optimizer"]["param_groups"]}) for state in states]
    assert scales == [pytest.approx([decay**3, decay**2, decay, 1.0]) for decay in (0.9, 0.5)]
    before, after = (
        load_file(path / "student/model.safetensors") for path in sorted((tmp_path / "run/checkpoints").iterdir())
    )
    still = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert still == {name for name in before if name.startswith("dino.")} | {"head.last_layer.weight_g"}
    refused = command(*argv, "--layer_decay", 1)
    assert refused.returncode == 2 and "cannot be switched on or off on the way" in refused.stderr


def test_precision_does_not_change_by_accident(finished, tmp_path):
    argv, folder = finished
    argv += ("--output_dir", tmp_path, "--resume_from_checkpoint", folder / "checkpoints/step_0000006")
    refused = command(*argv, ACCELERATE_MIXED_PRECISION="bf16")
    assert refused.returncode == 2 and "was trained with mixed_precision no, not bf16" in refused.stderr
    trained(*argv, "--allow_changed", "mixed_precision", ACCELERATE_MIXED_PRECISION="bf16")


@pytest.mark.slow
def test_checkpoint_of_another_folder_does_not_go_on_in_one_that_holds_a_run(finished, tmp_path):
    argv, folder = finished
    argv += ("--output_dir", tmp_path / "other")
    trained(*argv, "--seed", 1)
    argv += ("--resume_from_checkpoint", folder / "checkpoints/step_0000006")
    refused = command(*argv)
    assert refused.returncode == 2 and "holds another run" in refused.stderr
    trained(*argv, "--overwrite_output_dir")
    assert losses(tmp_path / "other") == losses(folder)[6:]


@pytest.mark.slow
def test_process_of_a_launcher_that_starts_one_notices_its_end(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--num_train_epochs", 400, "--save_steps", 1000)
    launcher = (*TWO[:2], "--cpu", "--num_processes", "1", "-m")
    running = start(*argv, "--output_dir", tmp_path, launcher=launcher)
    wait_until(lambda: has_done(tmp_path, 3), running)
    running.kill()
    printed, _ = running.communicate(timeout=60)  # of all who share its output
    assert "Stopped by its launcher's end after step" in printed
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_output_that_nobody_reads_does_not_end_the_run(recipe, parquet_folder, tmp_path):  # noqa: F811
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, "--num_train_epochs", 4)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        ended = subprocess.run([sys.executable, "-m", "training", *map(str, argv)], stdout=nobody, timeout=120)
    assert ended.returncode == 0 and len(losses(tmp_path)) == 20
