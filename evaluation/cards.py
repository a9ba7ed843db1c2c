"""Model cards: what trained backbones and classifiers share of them, and the card of a classifier."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from modeling_dino.image_processing_dino import PILLOW_MODES, DINOImageProcessor, DINOPillowImageProcessor

from .images import is_path
from .models import num_channels
from .outputs import write_text
from .report import Report, format_value


ADDRESS = "path/to/this/folder"  # in a card until it is uploaded: a real path would tell of its owner
MAX_CLASSES = 20  # that a card names


def is_classifier(folder: Path) -> bool:
    """Return whether a folder holds an image classifier, as `dino-eval linear` and `finetune` save it."""
    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False
    return any(str(name).endswith("ForImageClassification") for name in architectures)


def describe_network(network: PreTrainedModel) -> str:
    """Return the kind and size of a network, in words."""
    config = network.config
    inner = getattr(config, "backbone_config", None) or config
    if config.model_type == "dino" and config.backbone_config is None:
        size = f"{config.patch_size} x {config.patch_size}"
        kind = (
            f"Vision Transformer, {config.num_hidden_layers} blocks of width {config.hidden_size}, patches of {size}"
        )
    elif inner.model_type == "timm_wrapper":
        kind = f"{inner.architecture} of timm, which must be installed"
    else:
        kind = type(getattr(network, "backbone", network)).__name__
    return f"{kind} ({network.num_parameters():,} parameters)"


def write_classifier_card(
    folder: Path, classifier: PreTrainedModel, image_processor, report: Report, training: str, method: str
) -> None:
    """Write the model card of a classifier as `README.md` into its folder. No path gets into it.

    Args:
        folder: Where the classifier is saved.
        classifier: The classifier; its config names the classes.
        image_processor: The image processor saved beside it.
        report: The measurement, whose accuracies are of images that the training did not see.
        training: How it was trained, as "10 epochs in batches of 64 images".
        method: What was trained, in a sentence without a period.
    """
    settings, data = report.settings, report.data
    kind, _, start = report.model["name"].rpartition(":")  # of untrained:MODEL
    base_model = None if kind or is_path(start) else start
    is_own = is_path(settings["dataset_name"])
    images = (
        "own images" if is_own else f"[{data['test']['name']}](https://huggingface.co/datasets/{data['test']['name']})"
    )
    names = [str(name) for name in classifier.config.id2label.values()]
    accuracies = {top: name for top in (1, 5) if (name := f"{report.protocol}_top{top}") in report.values}
    per_class = settings["labels_per_class"]
    rows = {
        "network": describe_network(classifier),
        "start": "random weights" if kind else base_model or "weights of a local folder",
        "trained on": f"{images}, {data['num_trained']:,} of split `{data['train']['split']}`"
        + f", {per_class} of each class" * bool(per_class),
        "training": training,
        "measured on": f"{images}, {data['test']['num_images']:,} of split `{data['test']['split']}`",
    }
    rows |= {f"top-{top} accuracy": f"{format_value(report, name)} %" for top, name in accuracies.items()}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if is_own else data["test"]["name"],
            dataset_name="own images" if is_own else data["test"]["name"],
            dataset_config=None if is_own else data["test"]["config"],
            dataset_split=data["test"]["split"],
            metric_type="accuracy",
            metric_name=f"top-{top} accuracy",
            metric_value=round(report.values[name] / 100, 4),
        )
        for top, name in accuracies.items()
    ]
    metadata = ModelCardData(
        model_name=folder.resolve().name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["dino", "vision"],
        base_model=base_model,
        datasets=None if is_own else [data["test"]["name"]],
        metrics=["accuracy"],
        eval_results=results,
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    shown = ", ".join(names[:MAX_CLASSES]) + f", and {len(names) - MAX_CLASSES:,} more" * (len(names) > MAX_CLASSES)
    content = f"""\
---
{metadata.to_yaml()}
---

# {folder.resolve().name}

{method}, trained and measured with dino-hf ([DINO](https://arxiv.org/abs/2104.14294)).

{_usage(classifier, image_processor)}

| | |
|---|---|
{table}

Intervals are of 95 %, by bootstrap over the images. Classes ({len(names)}): {shown}."""
    write_text(folder / "README.md", content)


def _usage(classifier: PreTrainedModel, image_processor) -> str:
    """Return the code that classifies an image; `pipeline` turns every image to RGB of 8 bits first."""
    channels = num_channels(classifier.config)
    is_scientific = isinstance(image_processor, DINOImageProcessor)
    if is_scientific or channels not in PILLOW_MODES:
        library, image = "numpy", 'numpy.load("image.npy")'
        options = "" if is_scientific else ', input_data_format="channels_first"'
    else:
        library, image = "PIL.Image", f'PIL.Image.open("image.jpg").convert("{PILLOW_MODES[channels]}")'
        is_converted = channels == 3 or isinstance(image_processor, DINOPillowImageProcessor)
        options = "" if is_converted else ', input_data_format="channels_last"'
    trust = ", trust_remote_code=True" if classifier.config.model_type == "dino" else ""
    by_pipeline = f"""\
```python
from transformers import pipeline
classify = pipeline("image-classification", "{ADDRESS}"{trust})
print(classify("image.jpg"))
```

Or without the pipeline:

"""
    by_model = f"""\
```python
import {library}
from transformers import AutoImageProcessor, AutoModelForImageClassification
processor = AutoImageProcessor.from_pretrained("{ADDRESS}"{trust})
model = AutoModelForImageClassification.from_pretrained("{ADDRESS}"{trust})
inputs = processor({image}, return_tensors="pt"{options})
print(model.config.id2label[model(**inputs).logits.argmax().item()])
```"""
    return by_pipeline * (library == "PIL.Image" and channels < 4 and not options) + by_model
