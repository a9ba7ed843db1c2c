"""The paper's linear classifier on frozen features, for many learning rates at once.

As `eval_linear.py` of the original trains it: SGD without weight decay on random crops, the learning rate by a cosine
per epoch to 0. Unlike there, the test split chooses nothing: the original reports the best of all epochs by their
accuracy on the test images themselves. Here the last epoch is measured, and of several learning rates the one that is
best on images held out from the training split. That classifier is measured as it is, without the held-out images; for
one that has seen all, give the selected learning rate alone.
"""

import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_dino import DINOConfig, DINOForImageClassification, DINOModel
from modeling_dino.command_line import Parser

from .arguments import add_dataset, add_extraction, add_model, add_output
from .features import (
    Features,
    check_features,
    class_names,
    content,
    describe_data,
    extract_features,
    features_of,
    images_of,
    keep_features,
    labeled,
    load_model_of,
    warn_of_shared_images,
)
from .models import describe_model, num_blocks, num_channels, reading_of, tokens
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
)


NUM_LAST_BLOCKS = 4


@torch.no_grad()
def linear_inputs(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    n_last_blocks: int = NUM_LAST_BLOCKS,
    avgpool_patchtokens: bool = False,
    interleave_features: bool = False,
) -> torch.Tensor:
    """What the classifier sees of images, in fp32: `eval_linear.py` of the original.

    Args:
        model: A network in evaluation mode.
        pixel_values: (images, channels, height, width).
        n_last_blocks: From how many last blocks the CLS token is taken, each after the final norm; the paper takes 4
            of ViT-S and 1 of ViT-B. 1 also means the pooled features of any other network.
        avgpool_patchtokens: Whether the mean of the last block's patch tokens follows, as in the paper for ViT-B.
        interleave_features: Whether CLS and mean alternate channel by channel, as in the original.

    Returns:
        (images, hidden * (n_last_blocks + avgpool_patchtokens)).

    Raises:
        ValueError: a network without so many blocks, or nothing to interleave.
    """
    if interleave_features and not (avgpool_patchtokens and n_last_blocks == 1):
        raise ValueError(
            "interleave_features needs avgpool_patchtokens and n_last_blocks = 1, got "
            f"{avgpool_patchtokens} and {n_last_blocks}"
        )
    blocks = tokens(model, pixel_values, n_last_blocks)
    features = [block.pooled for block in blocks]
    if avgpool_patchtokens:
        features.append(blocks[-1].patches.mean((1, 2)))
    joined = torch.stack(features, dim=-1).flatten(1) if interleave_features else torch.cat(features, dim=-1)
    return joined.float()


def train_classifiers(
    batches: Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    order: Batches,
    num_features: int,
    num_classes: int,
    learning_rates: Sequence[float] = (0.001,),
    num_epochs: int = 100,
    folder: Path | None = None,
    settings: dict | None = None,
) -> tuple[nn.ModuleList, list[list[float]]]:
    """Trains a linear classifier for each learning rate, all on the same features in the same order.

    Each is what it would be alone: weights from N(0, 0.01), bias 0, and for each batch of `order`

        loss = cross_entropy(classifier(features), targets)  # mean over the batch of all processes
        SGD(lr=learning_rate * batch_size / 256 * (1 + cos(pi * epoch / num_epochs)) / 2, momentum=0.9)

    Args:
        batches: Epoch -> this process's features (images, num_features) and classes (images,) of each batch, both on
            the process's device.
        order: The batches; its seed is also that of the weights.
        num_features, num_classes: Of the classifiers.
        learning_rates: Per 256 images.
        num_epochs: Over all images.
        folder: Where to keep a checkpoint of the last epoch, from which the training goes on if there is one.
        settings: What has to be the same then.

    Returns:
        The classifiers, and of every epoch the mean loss of each.

    Raises:
        ValueError: a checkpoint of other settings.
    """
    processes = PartialState()
    first = nn.Linear(num_features, num_classes)
    generator = torch.Generator().manual_seed(seed_of(order.seed, "classifier"))
    nn.init.normal_(first.weight, std=0.01, generator=generator)
    nn.init.zeros_(first.bias)
    classifiers = nn.ModuleList(nn.Linear(num_features, num_classes) for _ in learning_rates)
    for classifier in classifiers:
        classifier.load_state_dict(first.state_dict())
    classifiers.to(processes.device)
    groups = [
        {"params": list(classifier.parameters()), "lr": learning_rate}
        for classifier, learning_rate in zip(classifiers, learning_rates)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    parameters = list(classifiers.parameters())
    losses: list[list[float]] = []
    if folder is not None and (checkpoint := load_checkpoint(folder, settings)):
        classifiers.load_state_dict(checkpoint["classifiers"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        losses = checkpoint["losses"]
        say_resumed(folder, len(losses), num_epochs)

    bar = tqdm(
        total=num_epochs * len(order), initial=len(losses) * len(order), desc="linear classifier", leave=False,
        disable=None if processes.is_main_process else True,
    )  # fmt: skip
    for epoch in range(len(losses), num_epochs):
        decay = (1 + math.cos(math.pi * epoch / num_epochs)) / 2
        for group, learning_rate in zip(optimizer.param_groups, learning_rates):
            group["lr"] = learning_rate * order.batch_size / 256 * decay
        order.epoch = epoch
        sums = torch.zeros(len(classifiers), device=processes.device)
        for (size, share), (features, targets) in zip(order.sizes(), batches(epoch)):
            means = torch.stack([F.cross_entropy(classifier(features), targets) for classifier in classifiers])
            optimizer.zero_grad()
            (means * share).sum().backward()
            if processes.num_processes > 1:
                for parameter, gradient in zip(parameters, reduce([p.grad for p in parameters], "sum")):
                    parameter.grad = gradient
            optimizer.step()
            sums += means.detach() * (share * size)
            bar.update()
        sums = reduce(sums, "sum") if processes.num_processes > 1 else sums
        losses.append((sums / len(order.indices)).tolist())
        bar.set_postfix(epoch=epoch + 1, loss=min(losses[-1]))
        if folder is not None:
            state = {"classifiers": classifiers.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(folder, settings, losses, **state)
    bar.close()
    return classifiers, losses


def linear_accuracy(
    train_features: torch.Tensor,
    train_labels: Sequence,
    test_features: torch.Tensor,
    test_labels: Sequence,
    learning_rate: float = 0.001,
    num_epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Top-1 and, with more than 5 classes, top-5 accuracy in percent of the paper's linear classifier on features.

    Args:
        train_features: (training images, hidden), taken as they are: no crops are drawn.
        train_labels: Their labels, of any kind that numpy can sort.
        test_features: (test images, hidden).
        test_labels: Their labels.
        learning_rate: Per 256 images.
        num_epochs: Over all training images.
        batch_size: Images a batch, of all processes.
        seed: Of the weights and of the order.

    Returns:
        `linear_top1` and `linear_top5`, of the last epoch.

    Raises:
        ValueError: see `index_classes`.
    """
    names, targets, test_targets = index_classes(train_labels, test_labels)
    order = Batches(np.arange(len(targets)), batch_size, seed)
    (classifier,), _ = train_classifiers(
        _from_memory(train_features, targets, order), order, train_features.shape[1], len(names), [learning_rate],
        num_epochs,
    )  # fmt: skip
    accuracies = _hits(classifier, test_features, test_targets, "linear")
    return {name: float(hit.mean()) for name, hit in accuracies.items()}


def _from_memory(features: torch.Tensor, targets: np.ndarray, order: Batches) -> Callable:
    """Features on the host -> `batches` of `train_classifiers`."""
    device, classes = PartialState().device, torch.from_numpy(targets)

    def batches(epoch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for batch in order:
            indices = [index for _, index in batch]
            yield features[indices].to(device), classes[indices].to(device)

    return batches


@torch.no_grad()
def _hits(classifier: nn.Linear, features: torch.Tensor, targets: np.ndarray, name: str) -> dict[str, np.ndarray]:
    device = classifier.weight.device
    logits = torch.cat([classifier(rows.to(device)) for rows in features.split(8192)])
    return hits(logits, torch.from_numpy(targets).to(device), name)


def hold_out(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A random part of every class's images, as indices; at least one image of each stays.

    scikit-learn's `train_test_split` refuses a class of one image.

    Raises:
        ValueError: if the classes are so small that nothing is held out.
    """
    rng = np.random.default_rng(seed_of(seed, "held out"))
    parts = []
    for target in np.unique(targets):
        images = rng.permutation(np.flatnonzero(targets == target))
        parts.append(images[: min(round(fraction * len(images)), len(images) - 1)])
    held_out = np.sort(np.concatenate(parts))
    if not len(held_out):
        raise ValueError(
            f"val_fraction = {fraction} of {len(targets)} images in {len(parts)} classes holds out none; raise it"
        )
    return held_out


def save_classifier(
    folder: Path,
    model: PreTrainedModel,
    image_processor,
    classifier: nn.Linear,
    names: Sequence[str],
    n_last_blocks: int = NUM_LAST_BLOCKS,
    avgpool_patchtokens: bool = False,
    interleave_features: bool = False,
) -> DINOForImageClassification | None:
    """Write a trained classifier: of a DINO network with it, as a `DINOForImageClassification` and image processor.

    Of any other network the classifier alone: `classifier.safetensors` with `weight` (classes, features) and `bias`,
    and in its metadata what the features are.

    Returns:
        The `DINOForImageClassification`, if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        "n_last_blocks": n_last_blocks,
        "avgpool_patchtokens": avgpool_patchtokens,
        "interleave_features": interleave_features,
    }
    id2label = dict(enumerate(names))
    if not isinstance(model, DINOModel):
        state = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()}
        metadata = {name: str(value) for name, value in (inputs | {"id2label": id2label}).items()}
        save_file(state, folder / "classifier.safetensors", metadata)
        return None
    fields = model.config.to_dict() | (inputs if model.config.backbone_config is None else {})
    fields |= {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}, "freeze_backbone": True}
    whole = DINOForImageClassification(DINOConfig.from_dict(fields))
    whole.dino.load_state_dict(model.state_dict())
    whole.classifier.load_state_dict(classifier.state_dict())
    whole.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return whole


def add_arguments(parser: Parser) -> None:
    add_model(parser)
    add_dataset(parser)
    add_extraction(parser)
    parser.add_argument(
        "--n_last_blocks",
        type=int,
        help=f"blocks whose CLS token the classifier sees (default: {NUM_LAST_BLOCKS}, or all of fewer; of networks "
        "without such, the pooled features)",
    )
    parser.add_argument("--avgpool_patchtokens", action="store_true", help="also the mean of the last patch tokens")
    parser.add_argument(
        "--interleave_features", action="store_true", help="CLS and mean channel by channel, as the original has them"
    )
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        default=[0.001],
        help="per 256 images; of several, the best on held-out training images is measured (default: 0.001)",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        help="share of each class's training images to hold out for several learning rates (default: %(default)s)",
    )
    add_labels_per_class(parser)
    parser.add_argument("--epochs", type=int, default=100, help="over the training images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops (default: %(default)s)")
    parser.add_argument(
        "--output_dir", help="folder for the classifier and a checkpoint of each epoch, from which it goes on"
    )
    add_output(parser)


class CroppedImages:
    """Where `measure` gets the classifier's inputs from: a new random crop of every training image in every epoch.

    `KeptFeatures` has the same attributes and methods.

    Attributes:
        labels, class_names, data: Of the training split.
        test: The test split's inputs, without augmentation.
    """

    def __init__(self, args: Namespace, network: ComputedFeatures, image_processor):
        self.args, self.network, self.image_processor = args, network, image_processor
        images, test, labels, test_labels = load_splits(args)
        reading = reading_of(args, network)
        self.images, self.labels, num_skipped = drop_broken(args, args.train_split, images, labels, reading)
        self.class_names = class_names(self.images)
        self.data = describe_data(args, args.train_split, self.images)
        self.data |= {"num_images": len(self.images), "augmentation": True}
        self.data |= {"num_skipped": num_skipped} if num_skipped else {}
        self.test = self._extract(test, evaluation_split(args))
        self.test.labels = np.array(test_labels)[self.test.rows]
        self.test.data = describe_data(args, evaluation_split(args), test) | content(self.test)
        self._hashes: list[torch.Tensor] = []  # of this process's images in the first epoch

    def batches(self, targets: np.ndarray, order: Batches) -> Callable:
        """`batches` of `train_classifiers`."""
        channels = num_channels(self.network.config)
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(
                    input_size(self.image_processor, channels)
                ),  # bilinear, 8 % of the image and more
                v2.RandomHorizontalFlip(),
                *normalize(self.image_processor, channels),
            ]
        )
        images = AugmentedImages(
            self.images, targets, transform, self.image_processor, reading_of(self.args, self.network), order.seed
        )
        loader = make_loader(images, order, self.args.num_workers)
        epochs: list[int] = []

        def batches(epoch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            epochs.append(epoch)
            for pixel_values, classes, hashes in loader:
                if len(epochs) == 1:
                    self._hashes.append(hashes)
                yield self.network.compute(pixel_values), classes.to(self.network.device, non_blocking=True)

        return batches

    def inputs(self, indices: np.ndarray) -> torch.Tensor:
        """Of training images, without augmentation."""
        return self._extract(self.images.select(indices), "held-out images").features

    def hashes(self) -> np.ndarray:
        """Of the images that have been trained on, whatever the process."""
        own = torch.cat(self._hashes).numpy() if self._hashes else np.empty(0, np.int64)
        return np.concatenate(of_all_processes(lambda: own, "hashes of the training images"))

    def _extract(self, images: Dataset, description: str) -> Features:
        args = self.args
        return extract_features(
            self.network, images, self.image_processor, args.batch_size, args.num_workers,
            f"{args.model}, {description}", args.dataset_name, reading_of(args, self.network),
        )  # fmt: skip


class KeptFeatures:
    """`CroppedImages` of images that are always the same, and whose features are computed once and kept."""

    def __init__(self, args: Namespace, network: ComputedFeatures | None, image_processor, inputs: dict):
        self.args, self.network, self.image_processor = args, network, image_processor
        train, test = (self._read(split, inputs) for split in (args.train_split, evaluation_split(args)))
        self.train = labeled(train, args.train_split)
        self.test = labeled(test, evaluation_split(args), like=self.train)
        self.labels, self.class_names, self.data = self.train.labels, self.train.class_names, self.train.data
        self.data = self.data | {"augmentation": False}

    def batches(self, targets: np.ndarray, order: Batches) -> Callable:
        self._trained = order.indices
        return _from_memory(self.train.features, targets, order)

    def inputs(self, indices: np.ndarray) -> torch.Tensor:
        return self.train.features[indices]

    def hashes(self) -> np.ndarray:
        return self.train.hashes[self._trained]

    def _read(self, split: str, inputs: dict) -> Features:
        """Return pooled features from the split's file, which other protocols read; others from a separate one."""
        args = self.args
        if inputs["n_last_blocks"] == 1 and not inputs["avgpool_patchtokens"]:
            return features_of(args, split)
        kind = f"last{inputs['n_last_blocks']}"
        kind += "-avgpool" * inputs["avgpool_patchtokens"] + "-interleaved" * inputs["interleave_features"]
        check_features(args, f"{split}-{kind}")
        images = images_of(args, split)
        data = describe_data(args, split, images) | {"inputs": kind}
        path = Path(args.features) / f"{split}-{kind}.parquet"
        return keep_features(
            path, args.model, self.network, images, self.image_processor, data, args.batch_size, args.num_workers,
            args.overwrite, reading=reading_of(args, self.network),
        )  # fmt: skip


def measure(args: Namespace) -> Report:
    rates = args.learning_rates
    if min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ValueError(f"learning_rates must be above 0 and differ, got {', '.join(f'{rate:g}' for rate in rates)}")
    if args.epochs < 1 or not 0 < args.val_fraction < 1:
        raise ValueError(
            f"epochs must be at least 1 and val_fraction between 0 and 1, got {args.epochs} and {args.val_fraction}"
        )
    folder = Path(args.output_dir) if args.output_dir else None
    if folder is not None:
        check_run_folder(args)
    if args.model and not args.dataset_name:
        raise ValueError("give --dataset_name, too; --features alone can be measured without --model")
    if not args.model:
        if not args.features or folder is not None:
            raise ValueError("give --model; --features alone can be measured, but there is nothing to save with them")
        if args.n_last_blocks not in (None, 1) or args.avgpool_patchtokens or args.interleave_features:
            raise ValueError("these features are of the last block's pooled output; other inputs need --model")
        model, image_processor, network = None, None, None
        inputs = {"n_last_blocks": 1, "avgpool_patchtokens": False, "interleave_features": False}
    else:
        model, image_processor = load_model_of(args)
        n_last_blocks, most = args.n_last_blocks, num_blocks(model)
        if n_last_blocks is None:
            n_last_blocks = min(NUM_LAST_BLOCKS, most) if _has_blocks(model) else 1
        if n_last_blocks < 1 or (most and n_last_blocks > most):
            allowed = f"from 1 to the network's {most} blocks" if most else "at least 1"
            raise ValueError(
                f"n_last_blocks must be {allowed}, got {n_last_blocks}. Give --n_last_blocks {most or 1}, or fewer."
            )
        inputs = {
            "n_last_blocks": n_last_blocks,
            "avgpool_patchtokens": args.avgpool_patchtokens,
            "interleave_features": args.interleave_features,
        }
        network = ComputedFeatures(model, lambda pixel_values: linear_inputs(model, pixel_values, **inputs))

    if args.features:
        if PartialState().is_main_process:
            warnings.warn("kept features are those of whole images: the paper's classifier learns from random crops")
        images = KeptFeatures(args, network, image_processor, inputs)
    else:
        images = CroppedImages(args, network, image_processor)
    names, targets, test_targets = index_classes(images.labels, images.test.labels, images.class_names)
    chosen = choose_labeled(args, targets, names)
    held_out = hold_out(targets[chosen], args.val_fraction, args.seed) if len(rates) > 1 else np.arange(0)
    held_out = chosen[held_out]
    batch_size = args.batch_size * PartialState().num_processes
    order = Batches(np.setdiff1d(chosen, held_out), batch_size, args.seed)
    described = describe_model(model, args.model) if model is not None else images.test.model
    settings = run_settings(args, batch_size=batch_size, model=described, train=images.data, classes=names)
    if folder is not None and args.overwrite:
        discard_other_run(folder, settings)
    classifiers, losses = train_classifiers(
        images.batches(targets, order), order, images.test.features.shape[1], len(names), rates, args.epochs, folder,
        settings,
    )  # fmt: skip
    warn_of_shared_images(images.hashes(), images.test.hashes)

    scores, selected = {}, 0
    if len(held_out):
        features = images.inputs(held_out)
        for rate, classifier in zip(rates, classifiers):
            scores |= _hits(classifier, features, targets[held_out], f"held_out_lr{rate:g}")
            scores |= _hits(classifier, images.test.features, test_targets, f"linear_lr{rate:g}")
        selected = int(np.argmax([scores[f"held_out_lr{rate:g}_top1"].mean() for rate in rates]))
    if not math.isfinite(losses[-1][selected]):
        raise ValueError(f"the loss with learning rate {rates[selected]:g} is not finite; lower it")
    scores = _hits(classifiers[selected], images.test.features, test_targets, "linear") | scores
    data = {"train": images.data, "test": images.test.data, "inputs": inputs, "batch_size_of_all": batch_size}
    data |= {"num_trained": len(order.indices), "num_held_out": len(held_out)}
    report = make_report(args, described, data | {"selected_learning_rate": rates[selected]}, scores)
    if folder is not None and PartialState().is_main_process:
        with filling(folder) as temporary:
            whole = save_classifier(temporary, model, image_processor, classifiers[selected], names, **inputs)
        if whole is not None:
            method = "An image classifier: a linear classifier on the frozen features of a DINO network"
            save_card(args, folder, whole, image_processor, report, method)
    return report


def _has_blocks(model: PreTrainedModel) -> bool:
    """Whether a network is a Vision Transformer with as many blocks as its config says."""
    if model.config.model_type == "dino":
        return isinstance(model, DINOModel) and model.config.backbone_config is None
    return isinstance(getattr(model.config, "num_attention_heads", None), int)
