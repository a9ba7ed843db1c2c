"""The finished run: the teacher's backbone, its image processor and a card, where `from_pretrained` finds them.

`python -m training.publish OUTPUT_DIR NAME` uploads a run that is finished.
"""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import ViTImageProcessor, ViTImageProcessorPil

from modeling_dino import DINOModel
from modeling_dino.command_line import Parser, run
from modeling_dino.image_processing_dino import PILLOW_MODES

from .arguments import TrainingArguments
from .monitor import read_metrics


# what of a run's folder is uploaded: no checkpoints, and nothing else that may lie there
_PUBLISHED = (".json", ".jsonl", ".safetensors", ".py", ".png")


def publish(backbone: DINOModel, image_processor: ViTImageProcessorPil | ViTImageProcessor, output_dir: Path) -> str:
    """Saves backbone and image processor into `output_dir`; returns the five lines that load them."""
    backbone.save_pretrained(output_dir)
    image_processor.save_pretrained(output_dir)
    return usage(backbone, str(output_dir))


def usage(backbone: DINOModel, name: str, trust_remote_code: bool = False) -> str:
    """The five lines that load a backbone by its folder or Hub id, with our package or with the code beside it."""
    num_channels, size = backbone.config.num_channels, backbone.config.image_size
    if num_channels in PILLOW_MODES:
        library, image = "PIL.Image", f'PIL.Image.open("image.jpg").convert("{PILLOW_MODES[num_channels]}")'
        options = "" if num_channels == 3 else ', input_data_format="channels_last"'
    else:
        library, image = "numpy", f'numpy.zeros(({num_channels}, {size}, {size}), "uint8")'
        options = ', input_data_format="channels_first"'
    modules, trust = (library, ", trust_remote_code=True") if trust_remote_code else (f"modeling_dino, {library}", "")
    return f'''\
import {modules}
from transformers import AutoImageProcessor, AutoModel
processor, model = (Auto.from_pretrained("{name}"{trust}) for Auto in (AutoImageProcessor, AutoModel))
inputs = processor({image}, return_tensors="pt"{options})
features = model(**inputs).pooler_output  # (1, {backbone.num_features})'''


def write_card(
    backbone: DINOModel, args: TrainingArguments, num_images: int | None, num_steps: int, global_batch_size: int
) -> None:
    """Writes the model card, `README.md`, of what the run knows about itself."""
    config, output_dir = backbone.config, Path(args.output_dir)
    name = args.hub_model_id or args.output_dir
    metrics = read_metrics(output_dir)
    # a path says nothing to others, and may say more than its owner wants
    from_hub = not Path(args.dataset_name).expanduser().exists()
    dataset = (
        f"[{args.dataset_name}](https://huggingface.co/datasets/{args.dataset_name})" if from_hub else "own images"
    )
    if config.backbone_config is None:
        network = f"Vision Transformer, {config.num_hidden_layers} blocks of width {config.hidden_size}, patches of "
        network += f"{config.patch_size} x {config.patch_size}"
    else:
        network = type(backbone.backbone).__name__
        if config.backbone_config.model_type == "timm_wrapper":
            network = f"{config.backbone_config.architecture} of timm, which must be installed"
    rows = {
        "network": f"{network} ({backbone.num_parameters():,} parameters)",
        "images": f"{dataset}, {'a stream' if num_images is None else f'{num_images:,}'}",
        "training": f"{num_steps:,} steps of {global_batch_size} images",
        "crops": f"2 of {args.global_crop_size} and {args.num_local_crops} of {args.local_crop_size} pixels",
        "head": f"{config.out_dim:,} prototypes",
        "learning rate": f"{args.base_learning_rate:g} per 256 images, to {args.min_learning_rate:g}",
        "weight decay": f"{args.weight_decay:g} to {args.weight_decay_end:g}",
        "teacher": f"momentum {args.momentum_teacher:g} to 1, temperature {args.warmup_teacher_temp:g} to "
        f"{args.teacher_temp:g}",
        "start": args.init_from if args.init_from and not Path(args.init_from).exists() else "other weights"
        if args.init_from else "random weights",
        "loss at the end": f"{metrics[-1]['loss']:.3f}" if "loss" in metrics[-1] else "",
    }  # fmt: skip
    knn = [line for line in metrics if any(key.startswith("knn_") for key in line)]
    results = ""
    if knn:
        accuracies = {key.split("_")[1]: value for key, value in knn[-1].items() if key.endswith("_top1")}
        results = (
            f"k-NN of the features on the split `{args.eval_split}`, by the images of `{args.train_split}`, top-1: "
            + ", ".join(f"{value:.1f} % (k = {k})" for k, value in accuracies.items())
            + f". Before training: {max(v for k, v in knn[0].items() if k.endswith('_top1')):.1f} % at best.\n\n"
        )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["dino", "self-supervised-learning", "vision"],
        datasets=[args.dataset_name] if from_hub else None,
    )
    content = f"""---
{data.to_yaml()}
---

# {Path(name).name}

Features of images, learned without labels by [DINO](https://arxiv.org/abs/2104.14294): the teacher's backbone of a
training with dino-hf.

```python
{usage(backbone, name, trust_remote_code=True)}
```

`pipeline("image-feature-extraction", "{name}", trust_remote_code=True)` gives the same with `pool=True`.

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in rows.items() if value)}

{results}![Loss and teacher entropy over the steps](curves.png)
"""
    ModelCard(content).save(output_dir / "README.md")


def check_hub_settings(hub_model_id: str | None) -> None:
    """Finds what would fail after days of training.

    Raises:
        ValueError: no name or one that the Hub does not allow, or nobody logged in.
    """
    if not hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id")
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id {hub_model_id} is no name for the Hub: {error}") from error
    if get_token() is None:
        raise ValueError("--push_to_hub needs you to be logged in: run `hf auth login`, or set HF_TOKEN")


def upload(output_dir: Path, hub_model_id: str, private: bool = False) -> str:
    """Uploads a finished run, without its checkpoints; returns its address.

    Raises:
        ValueError: if the Hub cannot be reached or refuses; says how to try again. The folder stays as it is.
    """
    files = [path.name for path in output_dir.iterdir() if path.suffix in _PUBLISHED or path.name == "README.md"]
    if "model.safetensors" not in files:
        raise ValueError(f"there is no finished run in {output_dir}: it has no model.safetensors")
    try:
        api = HfApi()
        repo_id = api.create_repo(hub_model_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id, folder_path=output_dir, allow_patterns=files, commit_message="Trained by dino-hf"
        ).repo_url.url
    except Exception as error:  # of whatever the Hub, the network or their libraries may raise: nothing is lost by it
        again = f"python -m training.publish {output_dir} {hub_model_id}{' --private' if private else ''}"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the run in {output_dir} is whole, but was not uploaded ({reason}); try again with: {again}"
        ) from error


def publish_from_command_line(argv: list[str]) -> None:
    parser = Parser(prog="python -m training.publish", description="Upload a finished run to the Hub.")
    parser.add_argument("output_dir", type=Path, help="folder of the run")
    parser.add_argument("hub_model_id", help="name on the Hub, as user/model")
    parser.add_argument("--private", action="store_true", help="make it private if it is new")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    options = parser.parse_args(argv)
    if not options.output_dir.is_dir():
        raise ValueError(f"there is no folder {options.output_dir}")
    check_hub_settings(options.hub_model_id)
    print(f"uploaded to {upload(options.output_dir, options.hub_model_id, options.private)}")


if __name__ == "__main__":
    run("python -m training.publish", publish_from_command_line)
