"""Fine-tuning of the whole network as a classifier, by the recipe of DeiT (arXiv 2012.12877), as in the paper.

AdamW with a linear warm-up and a cosine, stochastic depth, RandAugment, mixup or CutMix, random erasing and label
smoothing. Of DeiT's recipe, repeated augmentation and the average of the weights are left out. Precision is the
launcher's: `accelerate launch --mixed_precision bf16 -m evaluation finetune ...`.

The result is that of the last epoch; the test split chooses nothing. Several processes train as one does that has
their batch, but for what a process draws for its images together: which are mixed with each other, and stochastic
depth.
"""

import inspect
import math
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_model, add_output
from .features import class_names, content, describe_data, extract_features, warn_of_shared_images
from .models import describe_model, load_model, num_channels, reading_of, run_model
from .outputs import filling
from .processes import of_all_processes
from .report import Report, make_report
from .supervised import (
    AugmentedImages,
    Batches,
    ComputedFeatures,
    add_labels_per_class,
    check_run_folder,
    choose_labeled,
    discard_other_run,
    drop_broken,
    evaluation_split,
    hits,
    index_classes,
    input_size,
    load_checkpoint,
    load_splits,
    make_loader,
    normalize,
    run_settings,
    save_card,
    save_checkpoint,
    say_resumed,
    seed_of,
    seeded,
)


MIN_LEARNING_RATE = 1e-6  # before the warm-up and after the cosine, as in DeiT
DROP_PATH_RATE = 0.1


def load_classifier(name: str, names: Sequence[str], drop_path_rate: float | None = None) -> PreTrainedModel:
    """A network of `load_model`, which has seen that its weights are all there, as a classifier in fp32.

    The classifier is new, unless the checkpoint has one that fits. Of our Vision Transformer, it sees the CLS token of
    the last block.

    Args:
        name: Hub id or folder; `untrained:` may stand before it.
        names: Of the classes.
        drop_path_rate: Stochastic depth of the last block. Default: 0.1 where the network has it.

    Raises:
        ValueError: no network, or one without stochastic depth.
    """
    kind, _, source = name.rpartition(":") if name.startswith(("untrained:", "raw_pixels:")) else ("", "", name)
    if kind == "raw_pixels":
        raise ValueError(f"{name} is no network that could be trained")
    config = AutoConfig.from_pretrained(source)
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    if config.model_type == "timm_wrapper":
        config.label_names = list(names)  # what its config is saved with
    has_drop_path = _has_drop_path(config)
    if has_drop_path:
        config.drop_path_rate = DROP_PATH_RATE if drop_path_rate is None else drop_path_rate
    elif drop_path_rate:
        raise ValueError(f"{source} has no stochastic depth; leave --drop_path_rate out")
    if config.model_type == "dino":
        config.n_last_blocks, config.avgpool_patchtokens, config.interleave_features = 1, False, False
        config.freeze_backbone = False
    if kind == "untrained":
        return AutoModelForImageClassification.from_config(config)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of the new classifier reads as if weights were missing
    try:
        return AutoModelForImageClassification.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)


def _has_drop_path(config: PreTrainedConfig) -> bool:
    if config.model_type == "dino":
        return config.backbone_config is None
    return "drop_path_rate" in config.to_dict()


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Parameters for AdamW, each group with `weight_decay` and `scale`, by which its learning rate is multiplied.

    Biases, norms, CLS token and position embeddings are not decayed, as in DeiT. Of L blocks, the learning rate of
    block i (from 0) is scaled by layer_decay ** (L - i), that of the embeddings by layer_decay ** (L + 1), and of all
    that follows the blocks by 1, as in BEiT (arXiv 2106.08254).

    Raises:
        ValueError: a layer decay for a network that is no row of numbered blocks.
    """
    numbers = {
        name: [int(number) for number in re.findall(r"\b(?:layers?|blocks|stages)\.(\d+)\.", name)]
        for name, _ in model.named_parameters()
    }
    depths = [len(found) for found in numbers.values()]
    if layer_decay != 1.0 and max(depths) != 1:
        raise ValueError(f"layer_decay is for one row of blocks, which a {type(model).__name__} is not; leave it out")
    num_blocks = 1 + max((found[0] for found in numbers.values() if found), default=0)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if numbers[name]:
            depth = num_blocks - numbers[name][0]
        else:
            depth = num_blocks + 1 if re.search("embed|token", name) else 0
        is_decayed = parameter.ndim > 1 and not re.search("token|position_embeddings|pos_embed", name)
        key = (layer_decay**depth, weight_decay if is_decayed else 0.0)
        group = groups.setdefault(key, {"params": [], "scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate_at(step: int, num_steps: int, num_warmup_steps: int, peak: float) -> float:
    """Linear warm-up to `peak` within `num_warmup_steps`, then half a cosine; from and to 1e-6, or a lower peak."""
    low = min(MIN_LEARNING_RATE, peak)
    if step < num_warmup_steps:
        return low + (peak - low) * step / num_warmup_steps
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def make_transform(
    image_processor, num_channels: int, rand_augment: int = 9, random_erasing: float = 0.25
) -> v2.Compose:
    """Random crop (bicubic, 8 % of the image and more), flip, RandAugment, and erasing with noise.

    Args:
        image_processor: For the size of the crops and their normalisation.
        num_channels: Of the images.
        rand_augment: Magnitude of two operations of RandAugment, of 30; 0 leaves them out.
        random_erasing: Probability that a rectangle is erased.

    Raises:
        ValueError: RandAugment of images that are neither grey nor RGB.
    """
    if rand_augment and num_channels not in (1, 3):
        raise ValueError(f"RandAugment is for images of 1 or 3 channels, got {num_channels}; give --rand_augment 0")
    bicubic = InterpolationMode.BICUBIC
    return v2.Compose(
        [
            v2.RandomResizedCrop(input_size(image_processor, num_channels), interpolation=bicubic),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(2, rand_augment, interpolation=bicubic)] if rand_augment else []),
            *normalize(image_processor, num_channels),
            v2.RandomErasing(random_erasing, value="random"),
        ]
    )


def make_mixing(num_classes: int, mixup: float = 0.8, cutmix: float = 1.0) -> nn.Module:
    """(pixel values, classes) -> the same with images of a batch mixed, and soft classes (images, num_classes).

    Args:
        num_classes: Number of classes.
        mixup: Parameter of the beta distribution of mixup; 0 leaves it out.
        cutmix: That of CutMix; 0 leaves it out. With both, a coin decides for each batch.
    """
    kinds = [
        kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]
    return v2.RandomChoice(kinds) if kinds else v2.Identity()


def train(
    model: PreTrainedModel,
    images: AugmentedImages,
    order: Batches,
    mixing: nn.Module,
    num_epochs: int,
    warmup_epochs: int = 5,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    label_smoothing: float = 0.1,
    num_workers: int = 0,
    folder: Path | None = None,
    settings: dict | None = None,
) -> tuple[nn.Module, list[float], np.ndarray]:
    """Trains all weights of a classifier, in the launcher's precision and processes.

    For each batch of `order`, with its mean over all processes

        loss = CrossEntropyLoss(label_smoothing)(model(*mixing(pixel_values, classes)))
        AdamW(lr=learning_rate * batch_size / 512 * schedule * scale, weight_decay)  # see `parameter_groups`

    Args:
        model: Changed in place.
        images: The training images.
        order: Their batches; its seed is also that of all that is drawn.
        mixing: See `make_mixing`.
        num_epochs: Over the images.
        warmup_epochs: At most half of the epochs.
        learning_rate: Per 512 images.
        weight_decay, layer_decay: See `parameter_groups`.
        label_smoothing: Share of the classes' mean in the target.
        num_workers: Processes that decode.
        folder: Where to keep a checkpoint of the last epoch, from which the training goes on if there is one.
        settings: What has to be the same then.

    Returns:
        The model, as prepared for its precision; the mean loss of every epoch; hashes of this process's images.

    Raises:
        ValueError: a loss that is not finite, or a checkpoint of other settings.
    """
    # DINOv2's mask token, say, has no gradient
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True  # as `run_model` does
    groups = parameter_groups(model, weight_decay, layer_decay)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=0.0))
    losses: list[float] = []
    if folder is not None and (checkpoint := load_checkpoint(folder, settings)):
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(checkpoint["scaler"])
        losses = checkpoint["losses"]
        say_resumed(folder, len(losses), num_epochs)
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    loader = make_loader(images, order, num_workers)
    peak = learning_rate * order.batch_size / 512
    num_steps, num_warmup_steps = (epochs * len(order) for epochs in (num_epochs, min(warmup_epochs, num_epochs // 2)))
    seen: list[torch.Tensor] = []

    bar = tqdm(
        total=num_steps, initial=len(losses) * len(order), desc="fine-tuning", leave=False,
        disable=None if accelerator.is_main_process else True,
    )  # fmt: skip
    for epoch in range(len(losses), num_epochs):
        torch.manual_seed(seed_of(order.seed, "network", epoch, accelerator.process_index))  # of stochastic depth
        order.epoch = epoch
        prepared.train()
        total = torch.zeros((), device=accelerator.device)
        for number, ((size, share), (pixel_values, classes, hashes)) in enumerate(zip(order.sizes(), loader)):
            for group in optimizer.param_groups:
                step = epoch * len(order) + number
                group["lr"] = group["scale"] * learning_rate_at(step, num_steps, num_warmup_steps, peak)
            with seeded(order.seed, "mixing", epoch, number):
                pixel_values, classes = mixing(pixel_values.to(accelerator.device), classes.to(accelerator.device))
            loss = criterion(prepared(pixel_values, **options).logits.float(), classes)
            # gradients are averaged over the processes, whose shares of the last batch may differ
            accelerator.backward(loss * (share * accelerator.num_processes))
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() * (share * size)
            if len(seen) < len(order):  # the first epoch of this run
                seen.append(hashes)
            bar.update()
        losses.append(float(accelerator.reduce(total, "sum")) / len(order.indices))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss of epoch {epoch + 1} is not finite; lower --learning_rate")
        bar.set_postfix(epoch=epoch + 1, loss=losses[-1])
        if folder is not None:
            scaler = accelerator.scaler and accelerator.scaler.state_dict()
            save_checkpoint(
                folder, settings, losses, model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler
            )
    bar.close()
    hashes = torch.cat(seen).numpy() if seen else np.empty(0, np.int64)
    return accelerator.unwrap_model(prepared), losses, hashes


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    parser.add_argument(
        "--output_dir", help="folder for the model and a checkpoint of each epoch, from which it goes on"
    )
    for name, kind, default, text in (
        ("batch_size", int, 128, "images a step and process"),
        ("num_workers", int, 0, "processes that decode"),
        ("epochs", int, 100, "over the training images"),
        ("warmup_epochs", int, 5, "in which the learning rate rises; half of the epochs at most"),
        ("learning_rate", float, 5e-5, "of AdamW, per 512 images"),
        ("layer_decay", float, 1.0, "factor of the learning rate from each block to the one before"),
        ("weight_decay", float, 0.05, "of weights, not of biases and norms"),
        ("label_smoothing", float, 0.1, "share of all classes in the target"),
        ("rand_augment", int, 9, "magnitude of RandAugment, of 30; 0: none"),
        ("mixup", float, 0.8, "parameter of mixup; 0: none"),
        ("cutmix", float, 1.0, "parameter of CutMix; 0: none"),
        ("random_erasing", float, 0.25, "probability of random erasing"),
        ("seed", int, 0, "of everything that is drawn"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: %(default)s)")
    add_labels_per_class(parser)
    parser.add_argument(
        "--drop_path_rate", type=float, help=f"stochastic depth (default: {DROP_PATH_RATE} where the network has it)"
    )
    add_output(parser)


def _check(args: Namespace) -> None:
    if args.features:
        raise ValueError("finetune changes the features: leave --features out")
    for name, allowed, holds in (
        ("epochs", "at least 1", args.epochs >= 1),
        ("warmup_epochs", "at least 0", args.warmup_epochs >= 0),
        ("learning_rate", "above 0", args.learning_rate > 0),
        ("layer_decay", "above 0 and at most 1", 0 < args.layer_decay <= 1),
        ("weight_decay", "at least 0", args.weight_decay >= 0),
        ("label_smoothing", "at least 0 and below 1", 0 <= args.label_smoothing < 1),
        ("rand_augment", "from 0 to 30", 0 <= args.rand_augment <= 30),
        ("mixup", "at least 0", args.mixup >= 0),
        ("cutmix", "at least 0", args.cutmix >= 0),
        ("random_erasing", "from 0 to 1", 0 <= args.random_erasing <= 1),
        ("drop_path_rate", "at least 0 and below 1", 0 <= (args.drop_path_rate or 0) < 1),
    ):
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(args, name)}")


def measure(args: Namespace) -> Report:
    _check(args)
    if args.output_dir:
        check_run_folder(args)
    training, test, train_labels, test_labels = load_splits(args)
    backbone, image_processor = load_model(
        args.model, args.image_size, value_range=args.value_range and tuple(args.value_range)
    )
    reading = reading_of(args, backbone)
    training, train_labels, num_skipped = drop_broken(args, args.train_split, training, train_labels, reading)
    names, targets, test_targets = index_classes(train_labels, test_labels, class_names(training))
    chosen = choose_labeled(args, targets, names)
    described = describe_model(backbone, args.model)
    channels = num_channels(backbone.config)
    torch.manual_seed(seed_of(args.seed, "classifier"))
    model = load_classifier(args.model, names, args.drop_path_rate)
    accelerator = Accelerator()
    batch_size = args.batch_size * accelerator.num_processes
    order = Batches(chosen, batch_size, args.seed)
    transform = make_transform(image_processor, channels, args.rand_augment, args.random_erasing)
    data = describe_data(args, args.train_split, training) | {"num_images": len(training)}
    data |= {"num_skipped": num_skipped} if num_skipped else {}
    precision = accelerator.mixed_precision
    settings = run_settings(
        args, batch_size=batch_size, model=described, train=data, classes=names, mixed_precision=precision
    )
    folder = Path(args.output_dir) if args.output_dir else None
    if folder is not None and args.overwrite:
        discard_other_run(folder, settings)
    model, _, hashes = train(
        model,
        AugmentedImages(training, targets, transform, image_processor, reading, args.seed),
        order,
        make_mixing(len(names), args.mixup, args.cutmix),
        args.epochs,
        args.warmup_epochs,
        args.learning_rate,
        args.weight_decay,
        args.layer_decay,
        args.label_smoothing,
        args.num_workers,
        folder,
        settings,
    )
    if folder is not None and accelerator.is_main_process:
        with filling(folder) as temporary:
            model.save_pretrained(temporary)
            image_processor.save_pretrained(temporary)
    network = ComputedFeatures(model, lambda pixel_values: run_model(model, pixel_values).logits)
    logits = extract_features(
        network, test, image_processor, args.batch_size, args.num_workers, f"{args.model}, {evaluation_split(args)}",
        args.dataset_name, reading,
    )  # fmt: skip
    hashes = np.concatenate(of_all_processes(lambda: hashes, "hashes of the training images"))
    warn_of_shared_images(hashes, logits.hashes)
    scores = hits(logits.features, torch.from_numpy(test_targets[logits.rows]), "finetune")
    test_data = describe_data(args, evaluation_split(args), test) | content(logits)
    about = {"train": data, "test": test_data, "num_trained": len(chosen), "batch_size_of_all": batch_size}
    report = make_report(args, described, about | {"mixed_precision": precision}, scores)
    if folder is not None and accelerator.is_main_process:
        save_card(args, folder, model, image_processor, report, "An image classifier: the whole network, fine-tuned")
    return report
