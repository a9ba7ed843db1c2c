"""DINO pretraining: build, then loop. The gradient step is `train_step`, one screen, every state seen changing."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError

from evaluation.command_line import nearest
from evaluation.features import extract_features
from evaluation.images import load_images
from evaluation.knn import knn_accuracy
from modeling_dino import DINOConfig, DINOForPreTraining

from .arguments import CONFIGS, TrainingArguments, find_config
from .augmentation import CropBatch, apply_photometrics
from .checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from .data import CropLoader
from .loss import DINOLoss
from .monitor import Monitor, draw_curves
from .optim import clip_gradients_, drop_last_layer_gradients, parameter_groups, update_teacher_
from .publish import make_image_processor, publish
from .schedules import Hyperparameters, Schedule


def load_config(args: TrainingArguments) -> DINOConfig:
    """The model's config: the JSON of --model_config with --config_overrides in it.

    Raises:
        ValueError: an unknown field (names the nearest one), a wrong type, or sizes that do not fit one another.
    """
    path = find_config(args.model_config, CONFIGS / "models", ".json")
    fields = json.loads(path.read_text())
    for override in args.config_overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"config_overrides must be written as field=value, got {override}")
        fields[name] = yaml.safe_load(value)
    allowed = DINOConfig().to_dict()
    for name in fields:
        if name not in allowed:
            raise ValueError(f"the model's config has no field {name}{nearest(name, allowed)}")
    try:
        config = DINOConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"model config: {error.__cause__}") from error
    for name in ("global_crop_size", "local_crop_size"):
        size = getattr(args, name)
        if size % config.patch_size and (name == "global_crop_size" or args.num_local_crops):
            raise ValueError(f"{name} must be a multiple of the patch size {config.patch_size}, got {size}")
    for name in ("image_mean", "image_std"):
        if len(getattr(args, name)) not in (1, config.num_channels):
            raise ValueError(
                f"{name} must have one value or one for each of the {config.num_channels} channels, "
                f"got {getattr(args, name)}"
            )
    return config


def make_teacher(student: DINOForPreTraining) -> DINOForPreTraining:
    """A copy with the student's weights that is never trained and never drops a path.

    It stays in training mode, like the original's, where a batch norm normalises by the batch.
    """
    config = copy.deepcopy(student.config)
    config.drop_path_rate = 0.0
    teacher = DINOForPreTraining(config)
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False)


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
    """k-NN of the teacher while training; loads its images before the first step, so that errors come early."""

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
        k = [k for k in (10, 20, 100, 200) if k <= len(features_and_labels[0])] or [1]
        return knn_accuracy(*features_and_labels, k=k)


def train_step(
    accelerator: Accelerator,
    args: TrainingArguments,
    student: torch.nn.Module,
    teacher: DINOForPreTraining,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
    batch: CropBatch,
    now: Hyperparameters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step. `student` may be wrapped by DDP. Returns the loss and the teacher's logits."""
    for group in optimizer.param_groups:
        group["lr"] = now.learning_rate
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay

    crops = [
        apply_photometrics(crops.to(accelerator.device, non_blocking=True), drawn, args)
        for crops, drawn in zip(batch.crops, batch.photometrics)
    ]  # [(2 * batch, channels, global, global), (local crops * batch, channels, local, local)]
    with torch.no_grad():
        teacher_logits = teacher(crops[0]).logits
    student_logits = student(crops).logits
    loss = dino_loss(student_logits, teacher_logits, now.teacher_temp, args.num_crops)
    accelerator.backward(loss)

    unwrapped = accelerator.unwrap_model(student)
    if args.clip_grad:
        clip_gradients_(unwrapped, args.clip_grad)
    if now.freeze_last_layer:
        drop_last_layer_gradients(unwrapped)
    optimizer.step()
    optimizer.zero_grad()
    dino_loss.update_center(teacher_logits)
    update_teacher_(teacher, unwrapped, now.teacher_momentum)
    return loss.detach(), teacher_logits


def train(args: TrainingArguments) -> Path:
    """Trains as `args` says; returns the folder with the teacher's backbone, its image processor and the metrics."""
    accelerator = Accelerator()
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, Accelerate sees {accelerator.num_processes}; "
            "on CPU, set ACCELERATE_USE_CPU=true"
        )
    output_dir = Path(args.output_dir)
    config = load_config(args)
    image_processor = make_image_processor(args, config)
    loader = CropLoader(args, config.num_channels)
    global_batch_size = args.per_device_train_batch_size * accelerator.num_processes
    steps_per_epoch, num_steps = count_steps(args, loader.num_images, global_batch_size)
    schedule = Schedule(args, steps_per_epoch, num_steps, global_batch_size)
    evaluate = KNNEvaluation(args, image_processor) if args.eval_steps else None
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if (output_dir / "metrics.jsonl").exists() and not checkpoint and not args.overwrite_output_dir:
        raise ValueError(
            f"{output_dir} holds another run: give another --output_dir, --resume_from_checkpoint latest to go on, or "
            "--overwrite_output_dir to lose it"
        )

    set_seed(args.seed)
    student = DINOForPreTraining(config)
    teacher = make_teacher(student)
    dino_loss = DINOLoss(config.out_dim, args.student_temp, args.center_momentum).to(accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(student), fused=True)
    model, optimizer = accelerator.prepare(student, optimizer)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    set_seed(args.seed, device_specific=True)  # processes drop different paths
    output_dir.mkdir(parents=True, exist_ok=True)
    first_step, data_state = 0, None
    if checkpoint:
        first_step, data_state = load_checkpoint(accelerator, checkpoint, student, teacher, dino_loss, optimizer)
    elif accelerator.is_main_process:
        for old in list_checkpoints(output_dir):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()

    monitor = Monitor(output_dir, num_steps, first_step, accelerator.is_main_process)

    def run_evaluation(step: int) -> None:
        elapsed = monitor.pause()
        accuracies = evaluate(teacher.dino)
        monitor.write(step, accuracies)
        best = max(value for name, value in accuracies.items() if name.endswith("top1"))
        monitor.say(f"step {step}: k-NN top-1 of the teacher {best:.1f} %" + (" (untrained)" if step == 0 else ""))
        monitor.resume(elapsed)

    if evaluate and not first_step:
        run_evaluation(0)
    loss_sum = torch.zeros((), device=accelerator.device)
    batches = loader.batches(num_steps, first_step, data_state)
    model.train()
    for step in range(first_step, num_steps):
        now = schedule(step)
        loss, teacher_logits = train_step(accelerator, args, model, teacher, dino_loss, optimizer, next(batches), now)
        loss_sum += loss
        monitor.count(global_batch_size)
        done = step + 1
        if done % args.logging_steps == 0 or done == num_steps:
            num_losses = (done - first_step - 1) % args.logging_steps + 1
            mean_loss = accelerator.reduce(loss_sum / num_losses, "mean").item()
            loss_sum.zero_()
            probs = dino_loss.teacher_probs(teacher_logits, now.teacher_temp)
            entropy = torch.special.entr(probs).sum(-1).mean()
            monitor.log_step(
                done,
                {
                    "epoch": done / steps_per_epoch,
                    "loss": mean_loss,
                    "loss_over_ln_k": mean_loss / math.log(config.out_dim),
                    "teacher_entropy": accelerator.reduce(entropy, "mean").item(),
                    "learning_rate": now.learning_rate,
                    "weight_decay": now.weight_decay,
                    "teacher_momentum": now.teacher_momentum,
                    "teacher_temp": now.teacher_temp,
                },
            )
        if done % (args.save_steps or steps_per_epoch) == 0 or done == num_steps:
            elapsed = monitor.pause()
            save_checkpoint(
                accelerator, output_dir, done, student, teacher, dino_loss, optimizer, loader.state_dict(),
                args.save_total_limit,
            )  # fmt: skip
            monitor.resume(elapsed)
        if evaluate and (done % args.eval_steps == 0 or done == num_steps):
            run_evaluation(done)
    monitor.close()

    if accelerator.is_main_process:
        snippet = publish(teacher.dino, image_processor, output_dir)
        curves = draw_curves(output_dir, config.out_dim)
        monitor.say(f"\nThe teacher's backbone is in {output_dir}, its curves in {curves}. To use it:\n\n{snippet}\n")
    accelerator.end_training()
    return output_dir
