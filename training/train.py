"""DINO pretraining: build, then loop. The gradient step is `train_step`, one screen, every state seen changing."""

import logging
import math
from collections import Counter
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from evaluation.images import is_path
from evaluation.interruption import Interrupted, interruption
from evaluation.processes import lost_process_explained
from modeling_dino.command_line import short_in_notebooks
from modeling_dino.image_processing_dino import make_image_processor

from .agreement import Agreement
from .arguments import TrainingArguments, find_unusual
from .augmentation import CropBatch, finish_crops
from .checkpoint import (
    LIBRARIES,
    check_same_settings,
    find_checkpoint,
    last_checkpoint,
    load_initial_weights,
    load_networks,
    load_progress,
    save_checkpoint,
    saved_arguments,
    saved_config,
    saved_value_types,
    set_later_checkpoints_aside,
)
from .data import CropLoader, DataError, example_of, value_types
from .data_identity import identify_data
from .dry_run import describe, without_downloads
from .failure import RunError, rescued
from .figures import Figures, choose_images
from .gradient import backpropagate
from .guard import Guard, explained
from .knn_evaluation import KNNEvaluation
from .launcher import make_accelerator
from .log import RunLog, quiet_libraries, say
from .monitor import Monitor, draw_crops
from .networks import load_config, make_student, make_teacher, warn_of_image_size
from .optim import (
    clip_gradients_,
    drop_gradients,
    gradient_norms,
    update_teacher_,
)
from .output_folder import OutputFolder
from .publish import check_hub_settings, publish, upload, usage, write_card
from .schedules import Hyperparameters, Schedule
from .sharding import whole_network
from .signals import student_teacher_distance
from .start import describe_processes, describe_run, estimate_seconds, explain_too_few, say_time
from .state import TrainingState, prepare_state, random_state
from .trackers import Tracker, find_trackers, tracked
from .verdict import FAILING, Judge
from .worker_memory import warn_of_memory


logger = logging.getLogger(__name__)


def count_steps(args: TrainingArguments, num_images: int | None, global_batch_size: int) -> tuple[int, int]:
    """Steps per epoch and steps in all."""
    if num_images is None:
        if args.max_steps is None:
            raise ValueError("the length of this stream is unknown: give --num_examples (per epoch) or --max_steps")
        return math.ceil(args.max_steps / args.num_train_epochs), args.max_steps
    steps_per_epoch = num_images // global_batch_size
    if not steps_per_epoch:
        raise ValueError(explain_too_few(args, num_images, global_batch_size))
    return steps_per_epoch, args.max_steps or steps_per_epoch * args.num_train_epochs


def train_step(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainingState,
    batches: list[CropBatch],
    step: int,
    now: Hyperparameters,
    guard: Guard,
    agreement: Agreement | None = None,
) -> None:
    """One step, counted from 1, of one batch or of several whose gradients are accumulated.

    A step that fp16's scaler skips because gradients overflow moves neither student, center nor teacher; it counts,
    so that schedules and data go on. An error before the optimizer's step leaves the state as the step before did,
    unless networks have batch norms.

    Raises:
        NonFiniteError: on all processes, if the loss or a gradient of the step before was no number.
    """
    dino_loss, optimizer, signals = state.dino_loss, state.optimizer, state.signals
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate * group["lr_scale"]
        group["weight_decay"] = now.weight_decay if group["is_decayed"] else 0.0

    state.is_whole = not state.has_batch_norms  # which already change in the forward passes
    losses, measured, logits_sum, num_rows = [], [], 0, 0
    for number, batch in enumerate(batches, start=1):
        crops = finish_crops(batch, accelerator.device, args)
        # [(2 * batch, channels, global, global), (local crops * batch, channels, local, local)]
        with torch.no_grad():
            teacher_logits, teacher_features = state.teacher_model(crops[0]).to_tuple()
            targets = dino_loss.teacher_probs(teacher_logits, now.teacher_temp)
        loss, total, statistics = backpropagate(accelerator, args, state, crops, targets, number == len(batches))
        losses.append(total)
        measured.append((loss, *statistics, teacher_features))
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
    # known to all, so that the step can be saved and resumed without a process that is lost from here on
    random_of_all = agreement.of_all(random_state()) if agreement else [random_state()]

    state.is_whole = False
    optimizer.step()
    optimizer.zero_grad()
    signals.begin_step()
    for of_batch in measured:
        signals.add(*of_batch)
    if not is_left_out:
        signals.add_gradients(norms)
        dino_loss.update_center(logits_sum, num_rows)
        update_teacher_(state.teacher, state.student, now.teacher_momentum)
    state.is_whole, state.random_of_all = True, random_of_all


@short_in_notebooks()
def train(args: TrainingArguments) -> Path:
    """Trains as `args` says; returns the folder with the teacher's backbone, its image processor and the metrics.

    With `dry_run`, the same checks are made, what would happen is printed, and the folder is not touched.

    Raises:
        ValueError: settings or data that do not do, before anything is written; a loss that is no number any more,
            which leaves the last checkpoint from before; a failing verdict, with `stop_on_collapse`, which does too;
            or, when all is saved, an upload that failed.
        Interrupted: a KeyboardInterrupt, when SIGTERM, SIGINT, SIGHUP or SIGUSR1 has asked for an end; a checkpoint is
            written before. The command then exits with code 75.
    """
    accelerator = make_accelerator(args.gradient_accumulation_steps)
    run_log = RunLog(accelerator.process_index, accelerator.num_processes)
    folder = OutputFolder(Path(args.output_dir))
    with (
        run_log.listening(),
        quiet_libraries(),
        tracked(accelerator),
        lost_process_explained("the log says how far it got"),
    ):
        with closing(folder), ExitStack() as at_end:
            return _train(args, accelerator, run_log, folder, at_end)


def choose_start(args: TrainingArguments, output_dir: Path, global_batch_size: int, data: list[dict]) -> Path | None:
    """Return the checkpoint to resume from, if there is one.

    Raises:
        ValueError: one that does not do.
    """
    checkpoint = None
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint, args.resume == "must")
    if checkpoint:
        check_same_settings(checkpoint, args, global_batch_size, data)
    return checkpoint


def is_of_folder(checkpoint: Path, output_dir: Path) -> bool:
    return checkpoint.resolve().parent.parent == output_dir.resolve()


def resolved(args: TrainingArguments, **defaults) -> TrainingArguments:
    """Return a copy of `args` with defaults that depend on data or a checkpoint resolved."""
    copy = replace(args, **defaults)
    copy.origins = args.origins
    return copy


def _train(
    args: TrainingArguments, accelerator: Accelerator, run_log: RunLog, folder: OutputFolder, at_end: ExitStack
) -> Path:
    output_dir = folder.path
    folder.check(args)
    trackers = find_trackers(args.report_to)
    if args.push_to_hub:
        check_hub_settings(args.hub_model_id)
    hub_datasets = [name for name in (args.dataset_name, *args.mix_with) if not is_path(name)]
    config = load_config(args)
    speaks = accelerator.is_main_process and not args.dry_run
    if speaks:
        say(describe_processes(accelerator))
    num_accumulated = accelerator.gradient_accumulation_steps
    data_args = without_downloads(args) if args.dry_run else args
    loader = CropLoader(data_args, config.num_channels, num_accumulated)
    if speaks:
        for account in loader.accounts:
            say(account)
    global_batch_size = loader.global_batch_size
    steps_per_epoch, num_steps = count_steps(args, loader.num_images, global_batch_size)
    if loader.is_map_style and accelerator.is_main_process:
        warn_of_memory(loader.dataset, args, loader.reading)
    evaluate = None
    if args.eval_steps:
        evaluate = KNNEvaluation(data_args, config.num_channels)
        args = resolved(args, eval_split=evaluate.split_names[-1])
    data = identify_data(args, loader.lengths)
    checkpoint = choose_start(args, output_dir, global_batch_size, data)
    config = load_config(args, saved_config(checkpoint, args.init_from))  # with the size that its weights have
    is_resumed = checkpoint is not None and is_of_folder(checkpoint, output_dir)
    folder.check_idle(args, is_resumed)
    set_seed(args.seed)
    student = make_student(config, args)
    teacher = make_teacher(student)
    center = None
    if checkpoint:
        load_networks(checkpoint, student, teacher)
        if args.freeze_backbone_steps is None:
            args = resolved(args, freeze_backbone_steps=saved_arguments(checkpoint)["freeze_backbone_steps"])
    elif args.init_from:
        has_heads, center = load_initial_weights(args.init_from, student, teacher)
        if not has_heads and args.freeze_backbone_steps is None:
            args = resolved(args, freeze_backbone_steps=steps_per_epoch)
    schedule = Schedule(args, steps_per_epoch, num_steps, global_batch_size)
    warn_of_image_size(config, args, checkpoint is not None)
    for warning in find_unusual(args):
        logger.warning(warning)
    if args.gradient_checkpointing:
        try:
            # older versions of transformers know the second name alone
            enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        except ValueError as error:
            kind = config.backbone_config.model_type
            raise ValueError(f"gradient_checkpointing: a {kind} cannot, leave it out") from error
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    if args.dry_run:
        if accelerator.is_main_process:
            described = describe(args, student, schedule, accelerator, loader.num_images, checkpoint)
            for number, section in enumerate(chain(loader.accounts, described)):
                print("\n" * (number > 0) + section, flush=True)
        accelerator.end_training()
        return output_dir

    step_seconds = None
    if speaks and accelerator.device.type == "cpu":
        step_seconds = estimate_seconds(args, student, accelerator.mixed_precision != "no") * num_accumulated
    state = prepare_state(accelerator, args, student, teacher)
    if center is not None:
        state.dino_loss.center.copy_(center)
    set_seed(args.seed, device_specific=True)  # processes drop different paths
    first_step, data_state = 0, None
    if checkpoint:
        first_step, data_state = load_progress(accelerator, checkpoint, state)
        if first_step > num_steps:
            raise ValueError(f"{checkpoint} has done {first_step} steps already, and the training has {num_steps}")
    if speaks:
        for line in describe_run(args, student, schedule, loader.num_images, global_batch_size, first_step):
            say(line)
    if speaks and first_step == num_steps:
        say(f"Training had already finished at step {num_steps}. Its model and figures are written to {output_dir}.")
    elif step_seconds:
        say_time((num_steps - first_step) * step_seconds)
    guard, agreement = Guard(accelerator, state.optimizer), Agreement(args.stream_timeout)
    batches = loader.batches(
        (num_steps - first_step) * num_accumulated, data_state, agreement, lambda: interruption.name is not None
    )
    at_end.enter_context(closing(batches))
    if first_step < num_steps:  # else all that it lacks is to be published
        # images that cannot be read are found before another run is deleted
        step_batches = [next(batches) for _ in range(num_accumulated)]

    first_rows = step_batches[0].images.images if first_step < num_steps else None
    if checkpoint and not loader.is_map_style:  # whose first rows are others now
        types = saved_value_types(checkpoint)
    else:
        types = broadcast_object_list([value_types(loader.dataset, loader.reading, first_rows)])[0]
    if len(types) > 1 and args.value_range and not args.value_range[0].startswith("p"):
        logger.warning(
            "images have values of %s, and value_range = %s scales all alike: some may be dark. Consider p1 p99",
            " and ".join(types), " ".join(args.value_range),
        )  # fmt: skip
    image_processor = make_image_processor(
        config.image_size, config.num_channels, args.image_mean, args.image_std, args.eval_crop_pct, args.value_range,
        is_deep=set(types) - {"uint8"} != set(),
    )  # fmt: skip

    reason = None
    if accelerator.is_main_process:
        try:
            folder.acquire()
            folder.check(args)  # again, as a run that has just ended may have changed it
            folder.check_idle(args, is_resumed)
            folder.begin(is_resumed, keeps_log=bool(args.resume_from_checkpoint))
            if is_resumed:
                set_later_checkpoints_aside(output_dir, first_step)
        except (ValueError, OSError) as error:
            reason = str(error)
    if reason := agreement.first_of_any(reason):
        raise ValueError(reason)
    output_dir.mkdir(parents=True, exist_ok=True)  # other nodes may not see it yet on a network file system
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
            images = choose_images(images_of, first_batch, loader.reading, args)
    figures = Figures(output_dir, config.out_dim, image_processor, images, run_log, args.display_channels)

    def run_evaluation(step: int) -> None:
        elapsed = monitor.pause()
        accuracies = {}
        with run_log.tolerated(f"k-NN at step {step}") if step else nullcontext():  # at first, settings may be wrong
            backbone = whole_network(teacher).dino
            with interruption.stopping(backbone):
                accuracies = evaluate(backbone, image_processor)
        if accuracies:
            monitor.write(step, accuracies)
            top1 = {name.split("_")[1]: value for name, value in accuracies.items() if name.endswith("top1")}
            best = max(top1, key=top1.get)
            note = "" if step else " (as it was)" if args.init_from else " (untrained)"
            monitor.say(f"step {step}: k-NN (k = {best}) top-1 of the teacher {top1[best]:.1f} %{note}")
        monitor.resume(elapsed)

    def draw_figures(at_end: bool = False) -> None:
        elapsed = monitor.pause()
        whole = whole_network(teacher, accelerator.is_main_process)
        if accelerator.is_main_process:
            figures.draw(whole.dino, at_end)
        monitor.resume(elapsed)

    def stop(signal_name: str, step: int) -> None:
        how = (
            f"Stopped by {signal_name} after step {step} of {num_steps}. To continue, run the same command with "
            "--resume_from_checkpoint latest"
        )
        monitor.close()  # or the bar would be drawn below
        monitor.say(how)
        interruption.end_within(20, "its end took too long, and all is saved", Interrupted.exit_code)
        raise Interrupted(how)

    save_every = steps_per_epoch if args.save_steps is None else args.save_steps or num_steps
    saved_step, whole_step, data_state = first_step, first_step, loader.state_dict()

    def save(step: int, among: Agreement = agreement) -> None:
        nonlocal saved_step
        if step == saved_step:
            return
        elapsed = monitor.pause()
        guard.settle()  # so that no checkpoint is made of what has gone wrong
        save_checkpoint(
            accelerator, among, output_dir, step, state, data_state, image_processor, args, global_batch_size, data
        )
        saved_step = step
        if accelerator.is_main_process:
            folder.drop_replaced()
        interruption.remark = f"; {last_checkpoint(output_dir)}"
        monitor.resume(elapsed)

    def rescue() -> None:
        """Save the last whole step, if it is sound; other processes may be gone."""
        if state.is_whole and accelerator.is_main_process and not accelerator.is_fsdp2:
            save(whole_step, Agreement(None))

    is_done_elsewhere = first_step == num_steps and not is_resumed
    if evaluate and (first_step == 0 or is_done_elsewhere):
        run_evaluation(first_step)
    student.train()
    faults_explained = explained(accelerator, args, lambda step: schedule(step).learning_rate, loader.describe)

    def kept() -> str:
        return last_checkpoint(output_dir) if accelerator.is_main_process else "the main process says what is safe"

    last_whole_step_saved = rescued(rescue, kept)
    interruption.remark = f"; {last_checkpoint(output_dir)}"
    with closing(monitor), interruption.deferred(), faults_explained, last_whole_step_saved:
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
                    saved = output_dir / "checkpoints" / f"step_{step:07d}"
                    raise RunError(
                        f"{error}. What was learned until then is in {saved}; "
                        "--resume_from_checkpoint latest goes on from there when the data can be read"
                    ) from error
            monitor.skip(step + 1, sum((batch.skipped for batch in step_batches), []))
            if step < first_step + steps_per_epoch:  # else images come again
                monitor.note(sum((batch.noted for batch in step_batches), []))
            if step == 0 and accelerator.is_main_process:
                with run_log.tolerated("drawing crops.png"):
                    draw_crops(step_batches[0], args, output_dir)
            done = step + 1
            train_step(accelerator, args, state, step_batches, done, now, guard, agreement)
            whole_step, data_state = done, loader.state_dict()
            monitor.count(global_batch_size)
            if done == first_step + 1:
                guard.settle()
                monitor.show_first(done, state.signals.read(accelerator))
            is_last = done == num_steps
            log_now, save_now = (is_last or done % every == 0 for every in (args.logging_steps, save_every))
            num_seen, skipped = (done - first_step) * global_batch_size, Counter()
            if log_now:
                guard.settle()
                skipped = sum(gather_object([monitor.skipped]), Counter())
                monitor.say_skipped(skipped, num_seen, is_last)
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
                        raise RunError(f"step {done}: {failed}. {last_checkpoint(output_dir)}")
            too_many = num_seen >= 1000 and skipped.total() > args.max_skipped_fraction * num_seen
            if save_now or too_many:
                save(done)
            if too_many:
                raise RunError(
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

    interruption.remark = "; all steps are saved, and --resume_from_checkpoint latest does what is left"
    draw_figures(at_end=True)
    teacher = whole_network(teacher, accelerator.is_main_process, "cpu")
    monitor.say(f"Verdict of the metrics: {monitor.explained_verdict()}")
    if accelerator.is_main_process:
        is_resumed, ending = checkpoint is not None, example_of(loader.dataset, first_rows)

        def write(new: Path) -> None:
            publish(teacher.dino, image_processor, new)
            write_card(
                new / "README.md", teacher.dino, image_processor, args, loader.num_images, num_steps,
                global_batch_size, is_resumed, hub_datasets, ending,
            )  # fmt: skip

        folder.publish(write)
        snippet = usage(teacher.dino, image_processor, str(output_dir), args, ending)
        monitor.say(f"The teacher's backbone is in {output_dir}, figures in {output_dir / 'figures'}. To use it:")
        monitor.say(snippet)
        if args.push_to_hub:
            monitor.say(f"Uploaded to {upload(output_dir, args.hub_model_id, args.hub_private_repo)}")
    accelerator.end_training()
    return output_dir


def describe_start(args: TrainingArguments, accelerator: Accelerator, first_step: int, num_steps: int) -> None:
    """Into the log, what there is to know when somebody asks months later."""
    if accelerator.is_main_process:
        if first_step < num_steps:
            logger.info("steps %d to %d of a run", first_step + 1, num_steps)
        logger.info(", ".join(f"{name} {version(name)}" for name in LIBRARIES))
        logger.info("settings:\n%s", yaml.safe_dump(asdict(args), sort_keys=False, default_flow_style=None))
