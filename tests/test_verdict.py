"""Words for how a run goes: on the recorded lines of real runs, and on runs that are made to fail."""

import json

import pytest
import yaml

from modeling_dino import DINOConfig
from training.arguments import TrainingArguments
from training.verdict import COLLAPSING, DIVERGING, FAILING, LEARNING, STUCK, TOO_EARLY, Judge

from .commands import command
from .original import FIXTURES
from .test_training import RECIPE, metrics


RUNS = json.loads((FIXTURES / "verdicts.json").read_text())


def judge(num_steps=1000, num_images=1297, config=None, **settings):
    args = TrainingArguments(dataset_name="images", output_dir="output", **settings)
    return Judge(args, config or DINOConfig(), args.per_device_train_batch_size, num_images, num_steps)


def verdicts(run):
    """After each line of a recorded run, (step, verdict)."""
    settings = dict(run["settings"])
    config = DINOConfig(out_dim=settings.pop("out_dim"))
    lines = [dict(zip(run["lines"], values)) for values in zip(*run["lines"].values())]
    judged = judge(lines[-1]["step"], config=config, **settings)
    return [(line["step"], judged.verdict(lines[: i + 1])) for i, line in enumerate(lines)]


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run["fails_as"] is None])
def test_healthy_runs_are_never_told_to_fail(name):
    told = verdicts(RUNS[name])
    assert not {verdict for _, verdict in told} & set(FAILING)
    assert told[0][1] == TOO_EARLY and told[-1][1] == (
        TOO_EARLY if name == "cifar10" else LEARNING
    )  # an epoch's third


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run["fails_as"] is not None])
def test_failing_runs_are_told_what_they_are(name):
    """By the line that is recorded with them, and never with another name."""
    run = RUNS[name]
    told = verdicts(run)
    failing = [(step, verdict) for step, verdict in told if verdict in FAILING]
    assert {verdict for _, verdict in failing} == {run["fails_as"]} and failing[0][0] <= run["told_by"]


def line(step, **values):
    healthy = {"loss": 5.0, "kl": 1.0, "teacher_entropy": 4.0, "target_information": 2.0}
    return {"step": step, "epoch": step / 10, "student_teacher_distance": 0.1} | healthy | values


NOTHING = {"target_information": 0.0}
ONE_OUTPUT = NOTHING | {"loss": 0.01, "kl": 0.01, "teacher_entropy": 0.0}


def test_nothing_is_told_before_warm_up_and_freeze_are_over_and_the_teacher_has_followed():
    settings = {"warmup_epochs": 2, "freeze_last_layer_epochs": 3, "momentum_teacher": 0.9}
    for step in range(10, 200, 10):
        lines = [line(step, **ONE_OUTPUT) for step in range(10, step + 1, 10)]
        expected = TOO_EARLY if step < 80 else COLLAPSING  # five lines after step 30
        assert judge(**settings).verdict(lines) == expected
        expected = TOO_EARLY if step < 140 else COLLAPSING  # a hundred steps
        assert judge(**settings | {"momentum_teacher": 0.99}).verdict(lines) == expected
        expected = TOO_EARLY if step < 130 else COLLAPSING  # a temperature that falls
        falling = {"warmup_teacher_temp": 0.07, "warmup_teacher_temp_epochs": 8}
        assert judge(**settings | falling).verdict(lines) == expected


def test_nothing_is_told_while_the_backbone_is_frozen():
    lines = [line(step, **ONE_OUTPUT) for step in range(10, 400, 10)]
    assert judge(warmup_epochs=0, momentum_teacher=0.9, freeze_backbone_steps=1000).verdict(lines) == TOO_EARLY
    assert judge(warmup_epochs=0, momentum_teacher=0.9, freeze_backbone_steps=100).verdict(lines) == COLLAPSING


def test_advice_is_of_what_is_in_use():
    assert "center_momentum" in judge(momentum_teacher=0.9).advice(COLLAPSING)
    assert "center_momentum" not in judge(momentum_teacher=0.9, centering="sinkhorn_knopp").advice(COLLAPSING)
    assert "base_learning_rate" not in judge(base_learning_rate=0.03, optimizer="sgd").advice(STUCK)


def test_one_line_decides_nothing():
    judged = judge(warmup_epochs=0, momentum_teacher=0.9)
    healthy = [line(step) for step in range(20, 300, 10)]
    assert judged.verdict(healthy) == LEARNING
    assert judged.verdict([*healthy, line(300, **ONE_OUTPUT)]) == LEARNING
    assert judged.verdict([*healthy, *(line(step, **ONE_OUTPUT) for step in (300, 310, 320))]) == COLLAPSING


def test_loss_that_rises_is_judged_by_the_run_itself():
    """A loss of two ln K from the start is none that has risen; nor is one that rises with the teacher's entropy."""
    judged = judge(warmup_epochs=0, momentum_teacher=0.9)
    steps = range(20, 300, 10)
    assert judged.verdict([line(step, loss=25.0, kl=21.0) for step in steps]) == LEARNING
    rising = [line(step, loss=step / 10, teacher_entropy=step / 10 - 5, kl=5.0) for step in steps]
    assert judged.verdict(rising) == LEARNING
    rising = [line(step, loss=step / 10, kl=step / 10 - 1) for step in steps]
    assert judged.verdict(rising) == DIVERGING


def test_answer_that_changes_from_step_to_step_is_one_output():
    judged = judge(warmup_epochs=0, momentum_teacher=0.9)
    lines = [line(step, **NOTHING, teacher_entropy=step % 40 / 30 * 11.09) for step in range(20, 300, 10)]
    assert judged.verdict(lines) == COLLAPSING


def test_images_may_be_alike_in_a_step_of_few():
    lines = [line(step, **ONE_OUTPUT) for step in range(20, 300, 10)]
    assert judge(warmup_epochs=0, momentum_teacher=0.9, per_device_train_batch_size=1).verdict(lines) == TOO_EARLY


def test_advice_names_settings_and_their_values_where_they_apply():
    config = DINOConfig(norm_last_layer=False)
    advice = judge(config=config, teacher_temp=0.07, num_images=50_000).advice(STUCK)
    assert "lower teacher_temp (0.07) and warmup_teacher_temp (0.04) to 0.04" in advice
    assert "lower out_dim (65536) to 2048" in advice and "set norm_last_layer (false) to true" in advice
    assert "set use_bn_in_head (false) to true" in advice and "learning_rate" not in advice
    settled = DINOConfig(norm_last_layer=True, use_bn_in_head=True, out_dim=2048)
    settings = {"teacher_temp": 0.02, "warmup_teacher_temp": 0.02, "freeze_last_layer_epochs": 3, "num_images": 50_000}
    advice = judge(config=settled, per_device_train_batch_size=512, **settings).advice(STUCK)
    assert advice == "none of the usual remedies is left: look at crops.png, and measure k-NN by eval_steps"
    advice = judge(center_momentum=0.99, momentum_teacher=0.96, teacher_temp=0.02).advice(COLLAPSING)
    assert "lower center_momentum (0.99) to 0.68 or less" in advice  # 1 - 2 * 0.04 * (0.1 / 0.02 - 1)
    advice = judge(num_steps=100_000).advice(COLLAPSING)
    assert "raise momentum_teacher (0.996) to 0.9995" in advice and "center_momentum" not in advice
    advice = judge(base_learning_rate=3.0, clip_grad=0, warmup_epochs=0).advice(DIVERGING)
    assert "lower base_learning_rate (3); raise warmup_epochs (0); set clip_grad (0) to 3" in advice


FAILURES = {
    COLLAPSING: (
        *("--center_momentum", "1", "--teacher_temp", "0.01", "--warmup_teacher_temp", "0.01"),
        *("--momentum_teacher", "0.9"),
    ),
    STUCK: ("--teacher_temp", "1", "--warmup_teacher_temp", "1", "--momentum_teacher", "0.9"),
    DIVERGING: ("--base_learning_rate", "10", "--momentum_teacher", "0.98"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "num_train_epochs": 16, "save_steps": 15}))
    return str(path)


@pytest.mark.parametrize("failure", FAILURES)
def test_run_that_fails_is_told_once_and_goes_on(failure, recipe, parquet_folder, tmp_path):
    finished = command(
        *("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path), *FAILURES[failure]
    )
    assert finished.returncode == 0, finished.stderr
    told = [line["verdict"] for line in metrics(tmp_path)]
    assert len(told) == 80 and told[0] == TOO_EARLY and failure in told
    certain = [verdict for verdict in told if verdict != TOO_EARLY]
    changes = sum(before != after for before, after in zip([None, *certain], certain))
    first = told.index(failure)
    said = [text for text in finished.stdout.splitlines() if text.startswith(tuple(f"step {n}: " for n in range(81)))]
    assert len([text for text in said if "waiting" not in text]) == changes
    assert sum(text.startswith(f"step {first + 1}: {failure} (loss ") for text in said) == 1
    assert f"Verdict of the metrics: {told[-1]}" in finished.stdout and "what has helped others: " in finished.stdout


@pytest.mark.slow
def test_stop_on_collapse_ends_the_run_and_leaves_its_checkpoints(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, *FAILURES[COLLAPSING])
    argv += ("--save_steps", "1", "--save_total_limit", "3", "--stop_on_collapse", "true")
    finished = command(*argv)
    assert finished.returncode == 2
    *_, message = finished.stderr.strip().splitlines()
    last = len(metrics(tmp_path))
    assert f"step {last}: collapsing to one output (loss " in message and "lower center_momentum (1) to " in message
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step_{step:07d}" for step in (last - 3, last - 2, last - 1)]  # none of the step that failed
    assert str(tmp_path / "checkpoints" / kept[-1]) in message and not (tmp_path / "model.safetensors").exists()
    # goes on from the last one, without it being said anew, when it is not asked to stop
    finished = command(*argv, "--resume_from_checkpoint", "latest", "--stop_on_collapse", "false")
    assert finished.returncode == 0, finished.stderr
    told = [line["verdict"] for line in metrics(tmp_path)]
    assert len(told) == 80 and told[last - 2 : last] == [TOO_EARLY, COLLAPSING]


@pytest.mark.slow
def test_verdict_goes_on_after_a_stop(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, *FAILURES[COLLAPSING])
    argv += ("--max_steps", 45, "--save_steps", 30)
    finished = command(*argv)
    assert finished.returncode == 0 and "collapsing" in finished.stdout, finished.stderr
    finished = command(*argv, "--resume_from_checkpoint", tmp_path / "checkpoints/step_0000030")
    assert finished.returncode == 0, finished.stderr
    assert [line["verdict"] for line in metrics(tmp_path)][-16:] == [COLLAPSING] * 16
    assert not [text for text in finished.stdout.splitlines() if text.startswith("step ") and "collapsing" in text]


@pytest.mark.slow
def test_stop_on_collapse_ends_all_processes(recipe, parquet_folder, tmp_path):
    argv = ("--config", recipe, "--dataset_name", parquet_folder, "--output_dir", tmp_path, *FAILURES[COLLAPSING])
    finished = command(
        *argv, "--per_device_train_batch_size", "4", "--stop_on_collapse", "true", processes=2
    )  # fmt: skip
    assert finished.returncode != 0
    messages = [text for text in finished.stderr.splitlines() if text.startswith("dino-train: error: ")]
    assert messages and all(": collapsing to one output (loss " in text for text in messages)
    assert metrics(tmp_path)[-1]["verdict"] == COLLAPSING
