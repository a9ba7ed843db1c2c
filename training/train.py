"""DINO pretraining: build, then loop. The gradient step is `train_step`, one screen, every state seen changing."""

import copy
import json
import math
import os
import shutil
import warnings
from collections import Counter
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import ClassLabel, Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import CONFIG_MAPPING

from evaluation.features import extract_features
from evaluation.images import is_path, load_images
from evaluation.knn import knn_accuracy
from modeling_dino import DINOConfig, DINOForPreTraining
from modeling_dino.command_line import nearest
from modeling_dino.configuration_dino import VIT_FIELDS
from modeling_dino.image_processing_dino import make_image_processor

from .agreement import Agreement
from .arguments import CONFIGS, TrainingArguments, find_config
from .augmentation import CropBatch, finish_crops
from .batch_norm import share_batch_norms_
from .checkpoint import (
    check_same_settings,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_initial_weights,
    save_checkpoint,
    set_later_checkpoints_aside,
)
from .data import CropLoader, DataError
from .interruption import EXIT_CODE, Interruption
from .loss import DINOLoss
from .monitor import Monitor, draw_crops, draw_curves
from .optim import clip_gradients_, drop_last_layer_gradients, parameter_groups, update_teacher_
from .publish import check_hub_settings, publish, unpublish, upload, write_card
from .schedules import Hyperparameters, Schedule
from .signals import Signals, student_teacher_distance
from .verdict import FAILING, Judge


def load_config(args: TrainingArguments) -> DINOConfig:
    """The model's config: the JSON of --model_config with --config_overrides in it.

    Raises:
        ValueError: an unknown field (names the nearest one), a wrong type, or sizes that do not fit one another.
    """
    path = find_config(args.model_config, CONFIGS / "models", ".json")
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must map names of the config's fields to values, got a {type(fields).__name__}")
    for override in args.config_overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"config_overrides must be written as field=value, got {override}")
        *parents, name = name.split(".")
        target = fields
        for parent in parents:  # of a name with dots, which lies deeper
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"config_overrides: {parent} has no fields, got {override}")
        try:
            target[name] = json.loads(value)
        except json.JSONDecodeError:
            target[name] = value  # a word
    allowed = DINOConfig().to_dict()
    for name in fields:
        if name not in allowed:
            raise ValueError(f"the model's config has no field {name}{nearest(name, allowed)}")
    try:
        config = DINOConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"model config: {error.__cause__ or error}") from error
    if config.backbone_config is not None:
        check_backbone_config(fields)
    for name in ("global_crop_size", "local_crop_size"):
        size = getattr(args, name)
        is_used = config.backbone_config is None and (name == "global_crop_size" or args.num_local_crops)
        if is_used and size % config.patch_size:
            raise ValueError(f"{name} must be a multiple of the patch size {config.patch_size}, got {size}")
    for name in ("image_mean", "image_std"):
        if len(getattr(args, name)) not in (1, config.num_channels):
            raise ValueError(
                f"{name} must have one value or one for each of the {config.num_channels} channels, "
                f"got {getattr(args, name)}"
            )
    return config


def check_backbone_config(fields: dict) -> None:
    """Finds what `DINOConfig` lets through: names that the network of `fields["backbone_config"]` does not have."""
    for name in VIT_FIELDS:
        if name in fields:
            raise ValueError(f"{name} is a field of the Vision Transformer, and there is a backbone_config")
    given = fields["backbone_config"]
    allowed = CONFIG_MAPPING[given["model_type"]]().to_dict()
    for name in given:
        if name not in allowed:
            raise ValueError(f"the config of a {given['model_type']} has no field {name}{nearest(name, allowed)}")


def make_student(config: DINOConfig, args: TrainingArguments) -> DINOForPreTraining:
    """A network with random weights. One of `config.backbone_config` is tried on crops first, as any may be given.

    Parameters that its loss does not need, such as a mask token, are frozen: processes would wait for their gradients.

    Raises:
        ValueError: a network that cannot be built, or does not take the crops.
    """
    if config.backbone_config is None:
        return DINOForPreTraining(config)
    try:
        student = DINOForPreTraining(config)
        sizes = [args.global_crop_size] + [args.local_crop_size] * (args.num_local_crops > 0)
        trial = copy.deepcopy(student)
        with torch.random.fork_rng(devices=[]):
            trial([torch.randn(2, config.num_channels, size, size) for size in sizes]).logits.sum().backward()
    except ImportError:  # timm is missing, or does not know the architecture
        raise
    except Exception as error:  # of a library's network with settings that only it knows
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the {config.backbone_config.model_type} of backbone_config cannot be trained on these crops: "
            f"{type(error).__name__}: {reason}"
        ) from error
    for parameter, tried in zip(student.parameters(), trial.parameters(), strict=True):
        parameter.requires_grad_(tried.grad is not None)
    return student


def make_teacher(student: DINOForPreTraining) -> DINOForPreTraining:
    """A copy with the student's weights that is never trained, and drops nothing.

    Its batch norms stay in training mode, like the original's, and so normalise by the batch.
    """
    config = copy.deepcopy(student.config)
    config.drop_path_rate = 0.0
    teacher = DINOForPreTraining(config)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    return teacher


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


class KNNEvaluation:
    """k-NN of the teacher while training; loads its images before the first step, so that errors come early.

    With `max_eval_samples`, a stream is drawn from through a window of a thousand images, so one that is sorted by
    class may lack classes.
    """

    def __init__(self, args: TrainingArguments, image_processor):
        self.args = args
        self.image_processor = image_processor
        self.splits = []
        for split in (args.train_split, args.eval_split):
            dataset = load_images(
                args.dataset_name,
                args.dataset_config_name,
                split,
                args.image_column,
                args.label_column,
                args.streaming,
            )
            if "label" not in dataset.column_names:
                raise ValueError(f"--eval_steps needs labels, and {args.dataset_name} has no label column")
            if args.max_eval_samples is not None:
                if isinstance(dataset, Dataset):
                    number = min(args.max_eval_samples, len(dataset))
                    dataset = dataset.shuffle(seed=args.seed).select(range(number))
                else:
                    dataset = dataset.shuffle(seed=args.seed).take(args.max_eval_samples)
            self.splits.append(dataset)

    def __call__(self, backbone) -> dict[str, float]:
        features_and_labels = []
        for dataset, description in zip(self.splits, ("k-NN bank", "k-NN test")):
            features_and_labels += extract_features(
                backbone,
                dataset,
                self.image_processor,
                self.args.per_device_eval_batch_size,
                self.args.num_workers if isinstance(dataset, Dataset) else 0,
                description,
            )
        labels = self.splits[0].features["label"]
        num_classes = len(set(features_and_labels[1].tolist()))
        if isinstance(labels, ClassLabel) and num_classes < labels.num_classes:
            warnings.warn(
                f"the k-NN bank has images of {num_classes} of the {labels.num_classes} classes: raise "
                "--max_eval_samples, or do without --streaming"
            )
        k = [k for k in (10, 20, 100, 200) if k <= len(features_and_labels[0])] or [1]
        return knn_accuracy(*features_and_labels, k=k)


def train_step(
    accelerator: Accelerator,
    args: TrainingArguments,
    student: torch.nn.Module,
    teacher: DINOForPreTraining,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
    batches: list[CropBatch],
    now: Hyperparameters,
    signals: Signals,
) -> None:
    """One step, of one batch or several whose gradients are accumulated. `student` may be wrapped by DDP."""
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay

    signals.begin_step()
    logits_sum, num_rows = 0, 0
    for number, batch in enumerate(batches, start=1):
        crops = finish_crops(batch, accelerator.device, args)
        # [(2 * batch, channels, global, global), (local crops * batch, channels, local, local)]
        with nullcontext() if number == len(batches) else accelerator.no_sync(student):
            with torch.no_grad():
                teacher_logits, teacher_features = teacher(crops[0]).to_tuple()
            student_logits = student(crops).logits
            loss = dino_loss(student_logits, teacher_logits, now.teacher_temp, args.num_crops)
            accelerator.backward(loss)  # of the loss over the number of batches
        signals.add(loss.detach(), dino_loss.teacher_probs(teacher_logits, now.teacher_temp), teacher_features)
        logits_sum, num_rows = logits_sum + teacher_logits.sum(0, keepdim=True), num_rows + len(teacher_logits)

    unwrapped = accelerator.unwrap_model(student)
    if args.clip_grad:
        clip_gradients_(unwrapped, args.clip_grad)
    if now.freeze_last_layer:
        drop_last_layer_gradients(unwrapped)
    optimizer.step()
    optimizer.zero_grad()
    dino_loss.update_center(logits_sum, num_rows)
    update_teacher_(teacher, unwrapped, now.teacher_momentum)


def make_accelerator() -> Accelerator:
    """The launcher's processes and precision.

    Raises:
        ValueError: a launcher that Accelerate does not see, or settings of it that training would not follow.
    """
    accelerator = Accelerator()
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, Accelerate sees {accelerator.num_processes}; "
            "on CPU, set ACCELERATE_USE_CPU=true"
        )
    requested = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested not in ("no", "bf16"):
        raise ValueError(f"mixed_precision of accelerate launch must be no or bf16, got {requested}")
    return accelerator


def train(args: TrainingArguments) -> Path:
    """Trains as `args` says; returns the folder with the teacher's backbone, its image processor and the metrics.

    Raises:
        ValueError: settings or data that do not do, before anything is written; a loss that is no number any more,
            which leaves the last checkpoint from before; a failing verdict, with `stop_on_collapse`, which does too;
            or, when all is saved, an upload that failed.
        SystemExit: with code 75, when SIGTERM, SIGINT or SIGUSR1 has asked for an end; a checkpoint is written before.
    """
    accelerator = make_accelerator()
    output_dir = Path(args.output_dir)
    if args.push_to_hub:
        check_hub_settings(args.hub_model_id)
    hub_datasets = [name for name in (args.dataset_name, *args.mix_with) if not is_path(name)]
    config = load_config(args)
    image_processor = make_image_processor(config, args.image_mean, args.image_std, args.eval_crop_pct)
    num_accumulated = accelerator.gradient_accumulation_steps
    loader = CropLoader(args, config.num_channels, num_accumulated)
    global_batch_size = loader.global_batch_size
    steps_per_epoch, num_steps = count_steps(args, loader.num_images, global_batch_size)
    schedule = Schedule(args, steps_per_epoch, num_steps, global_batch_size)
    evaluate = KNNEvaluation(args, image_processor) if args.eval_steps else None
    checkpoint = None
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint, args.resume == "must")
    if checkpoint:
        check_same_settings(checkpoint, args, global_batch_size)
    # a run that has no checkpoint yet is begun again by the command that began it
    holds_run = list_checkpoints(output_dir) or (
        (output_dir / "metrics.jsonl").exists() and not args.resume_from_checkpoint
    )
    if holds_run and not checkpoint and not args.overwrite_output_dir:
        raise ValueError(
            f"{output_dir} holds another run: give another --output_dir, --resume_from_checkpoint latest to go on, or "
            "--overwrite_output_dir to lose it"
        )

    set_seed(args.seed)
    student = make_student(config, args)
    teacher = make_teacher(student)
    dino_loss = DINOLoss(config.out_dim, args.student_temp, args.center_momentum).to(accelerator.device)
    if args.init_from and not checkpoint:
        load_initial_weights(args.init_from, student, teacher, dino_loss)
    if accelerator.num_processes > 1:  # both, as in the original: batch norms see the batches of all processes
        share_batch_norms_(student, accelerator.device)
        share_batch_norms_(teacher, accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(student), fused=True)
    model, optimizer = accelerator.prepare(student, optimizer)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    set_seed(args.seed, device_specific=True)  # processes drop different paths
    first_step, data_state = 0, None
    signals = Signals(config.out_dim, accelerator.device)
    if checkpoint:
        first_step, data_state = load_checkpoint(
            accelerator, checkpoint, student, teacher, dino_loss, optimizer, signals
        )
        if first_step > num_steps:
            raise ValueError(f"{checkpoint} has done {first_step} steps already, and the training has {num_steps}")
    agreement, interruption = Agreement(args.stream_timeout), Interruption()
    batches = loader.batches(
        (num_steps - first_step) * num_accumulated, data_state, agreement, lambda: interruption.name is not None
    )
    if first_step < num_steps:  # else all that it lacks is to be published
        # images that cannot be read are found before another run is deleted
        step_batches = [next(batches) for _ in range(num_accumulated)]

    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        if checkpoint:
            set_later_checkpoints_aside(output_dir, first_step)
        else:
            for old in list_checkpoints(output_dir):
                shutil.rmtree(old)
            (output_dir / "skipped.jsonl").unlink(missing_ok=True)
            unpublish(output_dir)
    accelerator.wait_for_everyone()
    judge = Judge(args, config, global_batch_size, loader.num_images, num_steps)
    monitor = Monitor(output_dir, num_steps, first_step, accelerator.is_main_process, loader.advice, judge)

    def run_evaluation(step: int) -> None:
        elapsed = monitor.pause()
        accuracies = evaluate(teacher.dino)
        monitor.write(step, accuracies)
        best = max(value for name, value in accuracies.items() if name.endswith("top1"))
        monitor.say(f"step {step}: k-NN top-1 of the teacher {best:.1f} %" + (" (untrained)" if step == 0 else ""))
        monitor.resume(elapsed)

    def stop(signal_name: str, step: int) -> None:
        monitor.say(
            f"Stopped by {signal_name} after step {step} of {num_steps}; the same command with "
            "--resume_from_checkpoint latest goes on"
        )
        raise SystemExit(EXIT_CODE)

    def read_signals(step: int) -> dict[str, float]:
        values = signals.read(accelerator)
        if not math.isfinite(values["loss"]):
            raise ValueError(stopped_learning(step, values["loss"], output_dir))
        return values

    saved_step = first_step

    def save(step: int) -> None:
        nonlocal saved_step
        if step == saved_step:
            return
        elapsed = monitor.pause()
        read_signals(step)  # so that no checkpoint is made of what has gone wrong
        save_checkpoint(
            accelerator, agreement, output_dir, step, student, teacher, dino_loss, optimizer, loader.state_dict(),
            signals, image_processor, args, global_batch_size,
        )  # fmt: skip
        saved_step = step
        monitor.resume(elapsed)

    if evaluate and not first_step:
        run_evaluation(0)
    model.train()
    with closing(monitor), interruption.noted():
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
                draw_crops(step_batches[0], args, output_dir)
            train_step(accelerator, args, model, teacher, dino_loss, optimizer, step_batches, now, signals)
            monitor.count(global_batch_size)
            done = step + 1
            is_last = done == num_steps
            log_now, save_now = (
                is_last or done % every == 0 for every in (args.logging_steps, args.save_steps or steps_per_epoch)
            )
            skipped = Counter()
            if log_now:
                values = read_signals(done)
                skipped = sum(gather_object([monitor.skipped]), Counter())
                monitor.log_step(
                    done,
                    {
                        "epoch": done / steps_per_epoch,
                        **values,
                        **signals.read_step(accelerator),
                        "student_teacher_distance": student_teacher_distance(student, teacher),
                        "center_norm": dino_loss.center.norm().item(),
                        "learning_rate": now.learning_rate,
                        "weight_decay": now.weight_decay,
                        "teacher_momentum": now.teacher_momentum,
                        "teacher_temp": now.teacher_temp,
                        "skipped": dict(skipped),
                    },
                )
                signals.reset()
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
            if evaluate and (is_last or done % args.eval_steps == 0):
                run_evaluation(done)
            if not is_last and (asked := agreement.first_of_any(interruption.name)):
                save(done)
                stop(asked, done)

    monitor.say(f"\nVerdict of the metrics: {monitor.explained_verdict()}")
    if accelerator.is_main_process:
        snippet = publish(teacher.dino, image_processor, output_dir)
        curves = draw_curves(output_dir, config.out_dim)
        write_card(teacher.dino, args, loader.num_images, num_steps, global_batch_size, bool(checkpoint), hub_datasets)
        monitor.say(f"\nThe teacher's backbone is in {output_dir}, its curves in {curves}. To use it:\n\n{snippet}\n")
        if args.push_to_hub:
            monitor.say(f"Uploaded to {upload(output_dir, args.hub_model_id, args.hub_private_repo)}")
    accelerator.end_training()
    return output_dir


def stopped_learning(step: int, loss: float, output_dir: Path) -> str:
    return f"the loss is {loss} at step {step}; {last_checkpoint(output_dir)}. Lower base_learning_rate, or leave bf16"


def last_checkpoint(output_dir: Path) -> str:
    checkpoints = list_checkpoints(output_dir)
    return f"{checkpoints[-1]} is the last checkpoint before" if checkpoints else "there is no checkpoint yet"
