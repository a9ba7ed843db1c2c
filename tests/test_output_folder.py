"""The folder of a run: what no run wrote is never replaced or deleted, and weights stay until there are new ones."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest

from .commands import command, trained
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
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(*given) -> str:
    refused = command(*given)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    return refused.stderr


FOREIGN = ["README.md", "config.json", "train.log", "metrics.jsonl", "figures/curves.png", "checkpoints/epoch_3.pth",
           "model.safetensors", "modeling_dino.py", "preprocessor_config.json"]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("flag", [(), ("--overwrite_output_dir",)])
def test_file_that_no_run_wrote_is_refused_and_stays(argv, tmp_path, name, flag):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    before = content(tmp_path / "out")
    said = refusal(*argv, "--output_dir", tmp_path / "out", *flag)
    assert str(tmp_path / "out" / name.partition("/epoch")[0]) in said and "was not written by a run" in said
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


def test_card_that_was_edited_is_not_replaced(argv, run):
    (run / "README.md").write_text((run / "README.md").read_text() + "Made by me.")
    before = content(run)
    said = refusal(*argv, "--output_dir", run, "--overwrite_output_dir")
    assert f"{run / 'README.md'} was changed since a run wrote it" in said and content(run) == before


@pytest.mark.parametrize("name", ["checkpoints", "figures", "README.md"])
def test_symbolic_link_is_not_written_through(argv, run, tmp_path, name):
    shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    elsewhere = (tmp_path / "elsewhere").read_bytes() if name == "README.md" else content(tmp_path / "elsewhere")
    assert str(run / name) in refusal(*argv, "--output_dir", run, "--overwrite_output_dir")
    assert elsewhere == ((tmp_path / "elsewhere").read_bytes() if name == "README.md" else
                         content(tmp_path / "elsewhere"))  # fmt: skip


@pytest.mark.parametrize("place", [".", "runs/one"])
def test_output_within_the_data_set_is_refused(recipe, flat_folder, tmp_path, place):  # noqa: F811
    data = shutil.copytree(flat_folder, tmp_path / "data")
    before = content(data)
    for flags in (("--dataset_name", data), ("--dataset_name", flat_folder, "--mix_with", data)):
        said = refusal("--config", recipe, *flags, "--output_dir", data / place)
        assert "output_dir must lie outside the data set" in said and content(data) == before


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
    before = content(run)
    said = refusal(*argv, "--output_dir", run, "--resume_from_checkpoint", "latest")
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
