"""The folder of a run: what no run wrote is never replaced or deleted, and weights stay until there are new ones."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from training import output_folder, publish
from training.arguments import parse_arguments
from training.checkpoint import remove_checkpoint
from training.output_folder import OutputFolder

from .commands import command, scripted, trained
from .test_process_end import stuck_in
from .test_training import losses, recipe  # noqa: F401


@pytest.fixture(scope="module")
def argv(recipe, parquet_folder):  # noqa: F811
    return "--config", recipe, "--dataset_name", parquet_folder, "--report_to", "none"


@pytest.fixture(scope="module")
def finished(argv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    trained(*argv, "--output_dir", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and (path.name != "run.lock" or path.read_text())]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(*given) -> str:
    refused = command(*given)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    return refused.stderr


FOREIGN = ["README.md", "config.json", "train.log", "metrics.jsonl", "figures/curves.png", "checkpoints/epoch_3.pth",
           "model.safetensors", "modeling_dino.py", "preprocessor_config.json", "run.json", "run.lock"]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("flag", [(), ("--overwrite_output_dir",)])
def test_file_that_no_run_wrote_is_refused_and_stays(argv, tmp_path, name, flag):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    before = content(tmp_path / "out")
    said = refusal(*argv, "--output_dir", tmp_path / "out", *flag)
    assert str(tmp_path / "out" / name.partition("/epoch")[0]) in said
    assert ("is damaged, or not of a run" if name == "run.json" else "was not written by a run") in said
    assert content(tmp_path / "out") == before


def test_files_of_other_names_survive_runs_and_overwriting(argv, tmp_path):
    names = ["model_best.safetensors", "my_dino.py", "notes.txt", "figures/mine.png", "images/0.png"]
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(f"mine: {name}")
    before = content(tmp_path / "out")
    trained(*argv, "--output_dir", tmp_path / "out", "--max_steps", 3)
    (tmp_path / "out/checkpoints/step_0000003/notes.txt").write_text("mine")
    (tmp_path / "out/checkpoints/best.pth").write_text("mine")
    trained(*argv, "--output_dir", tmp_path / "out", "--max_steps", 4, "--overwrite_output_dir")
    after = content(tmp_path / "out")
    assert before.items() <= after.items()
    kept = [name for name in after if (tmp_path / "out" / name).read_bytes() == b"mine"]
    assert sorted(Path(name).name for name in kept) == ["best.pth", "notes.txt"]
    assert (tmp_path / "out/checkpoints/step_0000003.replaced.left/notes.txt").exists()
    assert not list((tmp_path / "out/checkpoints").glob("*.left/state.pt"))
    assert len(losses(tmp_path / "out")) == 4


def test_checkpoints_of_other_programs_are_refused_and_stay(argv, run):
    """Also under --overwrite_output_dir, in a folder without `run.json` and in one that holds a run."""
    step = run.parent / "out/checkpoints/step_500"
    step.mkdir(parents=True)
    for path in (step / "state.pt", step / "manifest.json", run.parent / "out/train.log"):
        path.write_text("{}")
    before = content(run.parent / "out")
    said = refusal(*argv, "--output_dir", run.parent / "out", "--overwrite_output_dir")
    assert f"{step} was not written by a run" in said and content(run.parent / "out") == before
    shutil.copytree(step, run / "checkpoints/step_500")
    before = content(run)
    said = refusal(*argv, "--output_dir", run, "--overwrite_output_dir")
    assert f"{run / 'checkpoints/step_500'} was not written by a run" in said and content(run) == before


def test_checkpoint_is_not_removed_through_links(run):
    [first, second, *_] = sorted((run / "checkpoints").iterdir())
    shutil.move(first, run / "moved")
    first.symlink_to(run / "moved")
    shutil.move(second / "student", run / "student")
    (second / "student").symlink_to(run / "student")
    kept = {name: digest for name, digest in content(run).items() if name.startswith(("moved/", "student/"))}
    remove_checkpoint(first)
    remove_checkpoint(second)
    assert len(kept) > 8 and kept.items() <= content(run).items() and first.is_symlink()


def test_event_files_of_others_stay(argv, run):
    (run / "tensorboard").mkdir(exist_ok=True)
    own = [f"events.out.tfevents.17.{each['host']}.{each['pid']}.0" for each in json.loads(
        (run / "run.json").read_text())["processes"]]  # fmt: skip
    for name in (*own, f"events.out.tfevents.17.{socket.gethostname()}.1.0", "events.out.tfevents.17.mine"):
        (run / "tensorboard" / name).write_text("mine")
    trained(*argv, "--output_dir", run, "--max_steps", 1, "--overwrite_output_dir")
    left = {path.name for path in (run / "tensorboard").iterdir()}
    assert own and left == {f"events.out.tfevents.17.{socket.gethostname()}.1.0", "events.out.tfevents.17.mine"}


CARD_APPEARS = """
import sys
from training.__main__ import main, train
module = sys.modules[train.__module__]
publish = module.publish
def publish_late(backbone, image_processor, new):
    (new.parent / "README.md").write_text("mine")
    publish(backbone, image_processor, new)
module.publish = publish_late
main()
"""


def test_file_that_appears_during_training_is_not_replaced(argv, tmp_path):
    run = tmp_path / "run"
    finished = scripted(CARD_APPEARS, tmp_path, *argv, "--output_dir", run)
    assert finished.returncode == 2, finished.stderr
    *_, said = finished.stderr.splitlines()
    assert f"{run / 'README.md'} was not written by this run, and stays" in said
    assert (run / "README.md").read_text() == "mine" and not (run / "config.json").exists()
    (run / "README.md").rename(run / "mine.md")
    trained(*argv, "--output_dir", run, "--resume_from_checkpoint", "latest")
    assert (run / "mine.md").read_text() == "mine" and "dino-hf" in (run / "README.md").read_text()
    assert (run / "model.safetensors").exists()


class Hub:
    """Stands for the Hub: keeps what is uploaded."""

    def create_repo(self, name, **_):
        return type("Repository", (), {"repo_id": name})

    def upload_folder(self, folder_path, allow_patterns, **_):
        Hub.files = {name: (folder_path / name).read_bytes() for name in allow_patterns}
        return type("Commit", (), {"repo_url": type("Url", (), {"url": "address"})})


def test_lock_falls_back_to_a_file_where_there_are_no_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(output_folder, "PATIENCE", 0.2)
    first, second = OutputFolder(tmp_path), OutputFolder(tmp_path)
    first.acquire()
    first.begin(is_resumed=False, keeps_log=False)
    said = f"process {os.getpid()} on .*if that process is gone, remove .*run.soft.lock"
    with pytest.raises(ValueError, match=said):
        second.acquire()
    first.close()
    second.acquire()
    second.close()


def test_run_that_ended_meanwhile_is_not_overwritten(argv, run, tmp_path):
    """The folder was looked at before a run wrote to it, and is locked after the end of that run."""
    late = OutputFolder(tmp_path / "late")
    shutil.copytree(run, tmp_path / "late")
    late.acquire()
    args = parse_arguments([*map(str, argv), "--output_dir", str(tmp_path / "late")])
    late.check(args)
    with pytest.raises(ValueError, match="holds another run"):
        late.check_idle(args, is_resumed=False)
    late.close()


@pytest.mark.slow
def test_second_run_of_two_processes_is_refused_in_both(argv, tmp_path):
    run = tmp_path / "run"
    running = stuck_in("training.train", "update_teacher_", 2, tmp_path, *argv, "--output_dir", run)
    resume = ("--resume_from_checkpoint", "latest", "--per_device_train_batch_size", 4)
    refused = command(*argv, "--output_dir", run, *resume, processes=2)
    assert refused.returncode == 2, refused.stderr
    assert f"another run (process {running.pid} on " in refused.stderr and "Traceback" not in refused.stderr
    running.send(signal.SIGKILL, "group")
    assert running.poll(10) == -9


@pytest.mark.parametrize("has_manifest", [True, False])
def test_card_is_uploaded_as_it_was_edited(run, monkeypatch, has_manifest):
    monkeypatch.setattr(publish, "HfApi", Hub)
    (run / "my_dino.py").write_text("mine")
    publish.upload(run, "me/first")
    card = (run / "README.md").read_text()
    assert "me/first" in card and "my_dino.py" not in Hub.files
    assert content(run)["README.md"] in json.loads((run / "run.json").read_text())["published"]["README.md"]
    card = card.replace("me/first", publish.ADDRESS).replace("dino-hf", "my own work")
    (run / "README.md").write_text(card)
    if not has_manifest:
        (run / "run.json").unlink()
    publish.upload(run, "me/second")
    assert (run / "README.md").read_text() == Hub.files["README.md"].decode() == card
    assert "model.safetensors" in Hub.files and "my_dino.py" not in Hub.files


def test_card_that_was_edited_is_not_replaced(argv, run):
    (run / "README.md").write_text((run / "README.md").read_text() + "Made by me.")
    before = content(run)
    said = refusal(*argv, "--output_dir", run, "--overwrite_output_dir")
    assert f"{run / 'README.md'} was changed since a run wrote it" in said and content(run) == before


@pytest.mark.parametrize("name", ["checkpoints", "figures", "README.md", "run.json", "checkpoints/step_0000003"])
def test_symbolic_link_is_not_written_through(argv, run, tmp_path, name):
    shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path)
    assert str(run / name) in refusal(*argv, "--output_dir", run, "--overwrite_output_dir")
    assert content(tmp_path) == before


@pytest.mark.parametrize("place", [".", "runs/one"])
def test_output_within_the_data_set_is_refused(recipe, flat_folder, tmp_path, place):  # noqa: F811
    data = shutil.copytree(flat_folder, tmp_path / "data")
    before = content(data)
    for flags in (("--dataset_name", data), ("--dataset_name", flat_folder, "--mix_with", data)):
        said = refusal("--config", recipe, *flags, "--output_dir", data / place)
        assert "output_dir must lie outside the dataset" in said and content(data) == before


def test_data_set_in_a_folder_of_the_run_is_refused(recipe, flat_folder, tmp_path):  # noqa: F811
    shutil.copytree(flat_folder, tmp_path / "figures")
    before = content(tmp_path)
    said = refusal("--config", recipe, "--dataset_name", tmp_path / "figures", "--output_dir", tmp_path)
    assert "a run writes to folders of its output_dir" in said and content(tmp_path) == before


def test_run_that_starts_from_its_own_folder_keeps_the_weights_until_it_has_new_ones(argv, run, tmp_path):
    before = content(run)
    start = ("--init_from", run / "checkpoints/step_0000010", "--overwrite_output_dir")
    running = stuck_in("training.train", "update_teacher_", 2, tmp_path, *argv, "--output_dir", run, *start)
    running.send(signal.SIGKILL, "group")
    assert running.poll(10) == -9
    after = content(run)
    kept = {name: digest for name, digest in before.items() if name in ("model.safetensors", "config.json")}
    kept |= {name.replace("/step_0000010/", "/step_0000010.replaced/"): digest for name, digest in before.items()
             if "/step_0000010/" in name}  # fmt: skip
    assert len(kept) > 8 and kept.items() <= after.items()
    start = ("--init_from", run / "checkpoints/step_0000010.replaced", "--overwrite_output_dir")
    trained(*argv, "--output_dir", run, *start, "--seed", 1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_0000003", "step_0000006", "step_0000009", "step_0000010",
    ]  # fmt: skip
    assert content(run)["model.safetensors"] != before["model.safetensors"]


def test_finished_run_without_checkpoints_is_not_begun_again(argv, run):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    before = content(run)
    for flags in ((), ("--resume_from_checkpoint", "latest")):
        said = refusal(*argv, "--output_dir", run, *flags)
        assert "holds a finished run, and no checkpoint to resume from" in said and content(run) == before


def test_unfinished_checkpoint_is_cleared_by_the_next_run(argv, run):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_0000009", checkpoints / "step_0000012.tmp")
    (checkpoints / "step_0000012.tmp/manifest.json").unlink()
    shutil.copytree(checkpoints / "step_0000009", checkpoints / "step_0000013.tmp")
    trained(*argv, "--output_dir", run, "--resume_from_checkpoint", "latest")
    assert not list(checkpoints.glob("*.tmp"))


def test_second_run_in_a_folder_is_refused_until_the_first_ends(argv, tmp_path):
    run = tmp_path / "run"
    running = stuck_in("training.train", "update_teacher_", 8, tmp_path, *argv, "--output_dir", run)
    said = refusal(*argv, "--output_dir", run, "--resume_from_checkpoint", "latest")
    assert f"another run (process {running.pid} on " in said and f"is writing to {run}" in said
    running.send(signal.SIGKILL)
    assert running.poll(10) == -9
    trained(*argv, "--output_dir", run, "--resume_from_checkpoint", "latest")
    assert len(losses(run)) == 10


def test_run_of_an_earlier_version_resumes(argv, run):
    (run / "run.json").unlink()
    trained(*argv, "--output_dir", run, "--resume_from_checkpoint", "latest", "--max_steps", 12, "--allow_changed",
            "max_steps")  # fmt: skip
    assert len(losses(run)) == 12
    (run / "run.json").unlink()
    (run / "README.md").write_text("mine")
    said = refusal(*argv, "--output_dir", run, "--overwrite_output_dir")
    assert f"{run / 'README.md'} was not written by a run" in said


def test_published_files_are_listed_with_their_hashes(run):
    manifest = json.loads((run / "run.json").read_text())
    found = content(run)
    assert {"model.safetensors", "config.json", "README.md", "modeling_dino.py"} <= manifest["published"].keys()
    assert all(found[name] == digest for name, [digest] in manifest["published"].items())
    assert not (run / ".publishing").exists()
