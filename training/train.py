"""DINO pretraining: build, then loop. The gradient step is `train_step`, one screen, every state seen changing."""

import logging
import math
import shutil
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from evaluation.images import is_path
from modeling_dino.image_processing_dino import make_image_processor

from .agreement import Agreement, lost_process_explained
from .arguments import TrainingArguments
from .augmentation import CropBatch, finish_crops
from .checkpoint import (
    LIBRARIES,
    check_same_settings,
    find_checkpoint,
    last_checkpoint,
    list_checkpoints,
    load_initial_weights,
    load_networks,
    load_progress,
    save_checkpoint,
    saved_arguments,
    set_later_checkpoints_aside,
)
from .data import CropLoader, DataError
from .dry_run import describe, without_downloads
from .figures import Figures, choose_images
from .gradient import backpropagate
from .guard import Guard, explained
from .interruption import EXIT_CODE, Interruption
from .knn_evaluation import KNNEvaluation
from .launcher import make_accelerator
from .log import RunLog
from .monitor import Monitor, draw_crops, read_metrics
from .networks import load_config, make_student, make_teacher
from .optim import (
    clip_gradients_,
    drop_gradients,
    gradient_norms,
    update_teacher_,
)
from .publish import check_hub_settings, publish, unpublish, upload, write_card
from .schedules import Hyperparameters, Schedule
from .sharding import whole_network
from .signals import student_teacher_distance
from .state import TrainingState, prepare_state
from .trackers import Tracker, find_trackers, tracked
from .verdict import FAILING, Judge


logger = logging.getLogger(__name__)


def count_steps(args: TrainingArguments, num_images: int | None, global_batch_size: int) -> tuple[int, int]:
    """Steps per epoch and steps in all."""
    if num_images is None:
        if args.max_steps is None:
            raise ValueError("the length of this stream is unknown: give --num_examples (per epoch) or --max_steps")
        return math.ceil(args.max_steps / args.num_train_epochs), args.max_steps
    steps_per_epoch = num_images // global_batch_size
    if not steps_per_epoch:
        raise ValueError(f"there are {num_images} images, fewer than one batch of {global_batch_size}")
    return steps_per_epoch, args.max_steps or steps_per_epoch * args.num_train_epochs


def train_step(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainingState,
    batches: list[CropBatch],
    step: int,
    now: Hyperparameters,
    guard: Guard,
) -> None:
    """One step, counted from 1, of one batch or of several whose gradients are accumulated.

    A step that fp16's scaler leaves out, as gradients overflow, moves neither student, centre nor teacher; it counts,
    so that schedules and data go on.

    Raises:
        NonFiniteError: on all processes, if the loss or a gradient of the step before was no number.
    """
    dino_loss, optimizer, signals = state.dino_loss, state.optimizer, state.signals
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate * group["lr_scale"]
        group["weight_decay"] = now.weight_decay if group["is_decayed"] else 0.0

    signals.begin_step()
    losses, logits_sum, num_rows = [], 0, 0
    for number, batch in enumerate(batches, start=1):
        crops = finish_crops(batch, accelerator.device, args)
        # [(2 * batch, channels, global, global), (local crops * batch, channels, local, local)]
        with torch.no_grad():
            teacher_logits, teacher_features = state.teacher_model(crops[0]).to_tuple()
            targets = dino_loss.teacher_probs(teacher_logits, now.teacher_temp)
        loss, total, statistics = backpropagate(accelerator, args, state, crops, targets, number == len(batches))
        losses.append(total)
        signals.add(loss, *statistics, teacher_features)
        logits_sum, num_rows = logits_sum + teacher_logits.sum(0, keepdim=True), num_rows + len(teacher_logits)

    accelerator.unscale_gradients(optimizer)  # of fp16's scale
    norms = gradient_norms(state.student)
    is_left_out = guard.check(step, batches, losses, norms)
    if args.clip_grad:
        clip_gradients_(state.student, args.clip_grad, norms)
    if now.freeze_last_layer:
        drop_gradients(state.student.head.last_layer)
    if now.freeze_backbone:
        drop_gradients(state.student.dino)
    optimizer.step()
    optimizer.zero_grad()
    if is_left_out:
        return
    signals.add_gradients(norms)
    dino_loss.update_center(logits_sum, num_rows)
    update_teacher_(state.teacher, state.student, now.teacher_momentum)


def train(args: TrainingArguments) -> Path:
    """Trains as `args` says; returns the folder with the teacher's backbone, its image processor and the metrics.

    With `dry_run`, the same checks are made, what would happen is printed, and the folder is not touched.

    Raises:
        ValueError: settings or data that do not do, before anything is written; a loss that is no number any more,
            which leaves the last checkpoint from before; a failing verdict, with `stop_on_collapse`, which does too;
            or, when all is saved, an upload that failed.
        SystemExit: with code 75, when SIGTERM, SIGINT or SIGUSR1 has asked for an end; a checkpoint is written before.
    """
    accelerator = make_accelerator(args.gradient_accumulation_steps)
    run_log = RunLog(accelerator.process_index, accelerator.num_processes)
    with run_log.listening(), tracked(accelerator):
        return _train(args, accelerator, run_log)


def choose_start(args: TrainingArguments, output_dir: Path, global_batch_size: int) -> Path | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        ValueError: one that does not do, or a folder of another run that would be lost.
    """
    checkpoint = None
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint, args.resume == "must")
    if checkpoint:
        check_same_settings(checkpoint, args, global_batch_size)
    # a run that has no checkpoint yet is begun again by the command that began it
    holds_run = list_checkpoints(output_dir) or (read_metrics(output_dir) and not args.resume_from_checkpoint)
    goes_on = checkpoint and is_of_folder(checkpoint, output_dir)
    if holds_run and not goes_on and not args.overwrite_output_dir:
        raise ValueError(
            f"{output_dir} holds another run: give another --output_dir, --resume_from_checkpoint latest to go on, or "
            "--overwrite_output_dir to lose it"
        )
    return checkpoint


def is_of_folder(checkpoint: Path, output_dir: Path) -> bool:
    return checkpoint.resolve().parent.parent == output_dir.resolve()


def with_frozen_backbone(args: TrainingArguments, steps: int | None) -> TrainingArguments:
    """The same settings, with the default of freeze_backbone_steps in numbers."""
    resolved = replace(args, freeze_backbone_steps=steps)
    resolved.origins = args.origins
    return resolved


def clear_folder(args: TrainingArguments, output_dir: Path, checkpoint: Path | None, first_step: int) -> None:
    """Takes out of the folder what a run that goes on after `first_step` steps would take for its own."""
    (output_dir / "non_finite.jsonl").unlink(missing_ok=True)
    if checkpoint and is_of_folder(checkpoint, output_dir):
        set_later_checkpoints_aside(output_dir, first_step)
        return
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    for name in ("skipped.jsonl", "metrics.jsonl"):
        (output_dir / name).unlink(missing_ok=True)
    unpublish(output_dir)
    if not args.resume_from_checkpoint:
        (output_dir / "train.log").unlink(missing_ok=True)


def _train(args: TrainingArguments, accelerator: Accelerator, run_log: RunLog) -> Path:
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir must be a folder, and {output_dir} is none")
    trackers = find_trackers(args.report_to)
    if args.push_to_hub:
        check_hub_settings(args.hub_model_id)
    hub_datasets = [name for name in (args.dataset_name, *args.mix_with) if not is_path(name)]
    config = load_config(args)
    image_processor = make_image_processor(
        config.image_size, config.num_channels, args.image_mean, args.image_std, args.eval_crop_pct
    )
    num_accumulated = accelerator.gradient_accumulation_steps
    data_args = without_downloads(args) if args.dry_run else args
    loader = CropLoader(data_args, config.num_channels, num_accumulated)
    global_batch_size = loader.global_batch_size
    steps_per_epoch, num_steps = count_steps(args, loader.num_images, global_batch_size)
    evaluate = KNNEvaluation(data_args, image_processor) if args.eval_steps else None
    checkpoint = choose_start(args, output_dir, global_batch_size)
    set_seed(args.seed)
    student = make_student(config, args)
    teacher = make_teacher(student)
    center = None
    if checkpoint:
        load_networks(checkpoint, student, teacher)
        if args.freeze_backbone_steps is None:
            args = with_frozen_backbone(args, saved_arguments(checkpoint)["freeze_backbone_steps"])
    elif args.init_from:
        has_heads, center = load_initial_weights(args.init_from, student, teacher)
        if not has_heads and args.freeze_backbone_steps is None:
            args = with_frozen_backbone(args, steps_per_epoch)
    schedule = Schedule(args, steps_per_epoch, num_steps, global_batch_size)
    if args.gradient_checkpointing:
        try:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            kind = config.backbone_config.model_type
            raise ValueError(f"gradient_checkpointing: a {kind} cannot, leave it out") from error
    if args.dry_run:
        if accelerator.is_main_process:
            print(describe(args, student, schedule, accelerator, loader.num_images, checkpoint))
        accelerator.end_training()
        return output_dir

    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    state = prepare_state(accelerator, args, student, teacher)
    if center is not None:
        state.dino_loss.center.copy_(center)
    set_seed(args.seed, device_specific=True)  # processes drop different paths
    first_step, data_state = 0, None
    if checkpoint:
        first_step, data_state = load_progress(accelerator, checkpoint, state)
        if first_step > num_steps:
            raise ValueError(f"{checkpoint} has done {first_step} steps already, and the training has {num_steps}")
    guard, agreement, interruption = (
        Guard(accelerator, state.optimizer),
        Agreement(args.stream_timeout),
        Interruption(),
    )
    batches = loader.batches(
        (num_steps - first_step) * num_accumulated, data_state, agreement, lambda: interruption.name is not None
    )
    if first_step < num_steps:  # else all that it lacks is to be published
        # images that cannot be read are found before another run is deleted
        step_batches = [next(batches) for _ in range(num_accumulated)]

    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        clear_folder(args, output_dir, checkpoint, first_step)
    accelerator.wait_for_everyone()
    run_log.open(output_dir)
    describe_start(args, accelerator, first_step, num_steps)
    accelerator.log_with = [Tracker(name, output_dir, first_step, run_log) for name in trackers]
    accelerator.init_trackers("dino-hf", asdict(args))
    judge = Judge(args, config, global_batch_size, loader.num_images, num_steps)
    monitor = Monitor(
        output_dir, num_steps, first_step, accelerator.is_main_process, loader.advice, accelerator.log, judge
    )
    images = []
    if accelerator.is_main_process:
        with run_log.tolerated("reading images for attention.png"):
            images_of = evaluate.splits[-1] if evaluate else loader.dataset
            first_batch = step_batches[0] if first_step < num_steps else None
            images = choose_images(images_of, first_batch, config.num_channels, args)
    figures = Figures(output_dir, config.out_dim, image_processor, images, run_log)

    def run_evaluation(step: int) -> None:
        elapsed = monitor.pause()
        accuracies = {}
        with run_log.tolerated(f"k-NN at step {step}") if step else nullcontext():  # at first, settings may be wrong
            accuracies = evaluate(whole_network(teacher).dino)
        if accuracies:
            monitor.write(step, accuracies)
            best = max(value for name, value in accuracies.items() if name.endswith("top1"))
            note = "" if step else " (as it was)" if args.init_from else " (untrained)"
            monitor.say(f"step {step}: k-NN top-1 of the teacher {best:.1f} %{note}")
        monitor.resume(elapsed)

    def draw_figures(at_end: bool = False) -> None:
        elapsed = monitor.pause()
        whole = whole_network(teacher, accelerator.is_main_process)
        if accelerator.is_main_process:
            figures.draw(whole.dino, at_end)
        monitor.resume(elapsed)

    def stop(signal_name: str, step: int) -> None:
        monitor.say(
            f"Stopped by {signal_name} after step {step} of {num_steps}; the same command with "
            "--resume_from_checkpoint latest goes on"
        )
        raise SystemExit(EXIT_CODE)

    saved_step = first_step

    def save(step: int) -> None:
        nonlocal saved_step
        if step == saved_step:
            return
        elapsed = monitor.pause()
        guard.settle()  # so that no checkpoint is made of what has gone wrong
        save_checkpoint(
            accelerator, agreement, output_dir, step, state, loader.state_dict(), image_processor, args,
            global_batch_size,
        )  # fmt: skip
        saved_step = step
        monitor.resume(elapsed)

    if evaluate and not first_step:
        run_evaluation(0)
    student.train()
    faults_explained = explained(accelerator, args, lambda step: schedule(step).learning_rate, loader.describe)
    loss_explained = lost_process_explained(lambda: last_checkpoint(output_dir))
    with closing(monitor), interruption.noted(), faults_explained, loss_explained:
        for step in range(first_step, num_steps):
            now = schedule(step)
            if step > first_step:
                try:
                    with monitor.waiting():
                        step_batches = [next(batches) for _ in range(num_accumulated)]
                except DataError as error:
                    save(step)
                    if asked := agreement.first_of_any(interruption.name):
                        stop(asked, step)
                    kept = output_dir / "checkpoints" / f"step_{step:07d}"
                    raise ValueError(
                        f"{error}. What was learned until then is in {kept}; "
                        "--resume_from_checkpoint latest goes on from there when the data can be read"
                    ) from error
            monitor.skip(step + 1, sum((batch.skipped for batch in step_batches), []))
            if step == 0 and accelerator.is_main_process:
                with run_log.tolerated("drawing crops.png"):
                    draw_crops(step_batches[0], args, output_dir)
            done = step + 1
            train_step(accelerator, args, state, step_batches, done, now, guard)
            monitor.count(global_batch_size)
            is_last = done == num_steps
            log_now, save_now = (
                is_last or done % every == 0 for every in (args.logging_steps, args.save_steps or steps_per_epoch)
            )
            skipped = Counter()
            if log_now:
                guard.settle()
                skipped = sum(gather_object([monitor.skipped]), Counter())
                monitor.log_step(
                    done,
                    {
                        "epoch": done / steps_per_epoch,
                        **state.signals.read(accelerator),
                        **state.signals.read_step(accelerator),
                        "student_teacher_distance": student_teacher_distance(student, teacher),
                        "center_norm": state.dino_loss.center.norm().item(),
                        "learning_rate": now.learning_rate,
                        "weight_decay": now.weight_decay,
                        "teacher_momentum": now.teacher_momentum,
                        "teacher_temp": now.teacher_temp,
                        "skipped": dict(skipped),
                    },
                )
                state.signals.reset()
                if args.stop_on_collapse:  # before a checkpoint of it drops an older one
                    failed = monitor.explained_verdict() if monitor.verdict in FAILING else None
                    if failed := agreement.first_of_any(failed):
                        raise ValueError(f"step {done}: {failed}. {last_checkpoint(output_dir)}")
            num_seen = (done - first_step) * global_batch_size
            too_many = num_seen >= 1000 and skipped.total() > args.max_skipped_fraction * num_seen
            if save_now or too_many:
                save(done)
            if too_many:
                raise ValueError(
                    f"{skipped.total()} of {num_seen} images are broken, more than max_skipped_fraction = "
                    f"{args.max_skipped_fraction}: {monitor.first_skipped()} (all are in "
                    f"{output_dir / 'skipped.jsonl'})"
                )
            eval_now = evaluate and (is_last or done % args.eval_steps == 0)
            if eval_now:
                run_evaluation(done)
            # to put together what FSDP has cut up takes more than drawing does
            if (eval_now or (save_now and not accelerator.is_fsdp2)) and not is_last:
                draw_figures()
            if not is_last and (asked := agreement.first_of_any(interruption.name)):
                save(done)
                stop(asked, done)

    draw_figures(at_end=True)
    teacher = whole_network(teacher, accelerator.is_main_process, "cpu")
    monitor.say(f"Verdict of the metrics: {monitor.explained_verdict()}")
    if accelerator.is_main_process:
        snippet = publish(teacher.dino, image_processor, output_dir)
        write_card(teacher.dino, args, loader.num_images, num_steps, global_batch_size, bool(checkpoint), hub_datasets)
        monitor.say(f"The teacher's backbone is in {output_dir}, figures in {output_dir / 'figures'}. To use it:")
        monitor.say(snippet)
        if args.push_to_hub:
            monitor.say(f"Uploaded to {upload(output_dir, args.hub_model_id, args.hub_private_repo)}")
    accelerator.end_training()
    return output_dir


def describe_start(args: TrainingArguments, accelerator: Accelerator, first_step: int, num_steps: int) -> None:
    """Into the log, what there is to know when somebody asks months later."""
    if accelerator.is_main_process:
        logger.info("steps %d to %d of a run", first_step + 1, num_steps)
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        logger.info("%s; %d x %s, %s", versions, accelerator.num_processes, accelerator.device,
                    accelerator.mixed_precision)  # fmt: skip
        logger.info("settings:\n%s", yaml.safe_dump(asdict(args), sort_keys=False, default_flow_style=None))
