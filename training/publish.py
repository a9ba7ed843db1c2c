"""The finished run: the teacher's backbone, its image processor and a card, where `from_pretrained` finds them.

`dino-publish OUTPUT_DIR NAME` uploads a run that is finished.
"""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import ViTImageProcessor, ViTImageProcessorPil

from evaluation.cards import ADDRESS, describe_network, is_classifier
from evaluation.images import is_path
from evaluation.interruption import interruption
from evaluation.outputs import write_text
from modeling_dino import DINOModel
from modeling_dino.command_line import Parser, run_process
from modeling_dino.image_processing_dino import PILLOW_MODES, DINOImageProcessor

from .arguments import TrainingArguments
from .monitor import read_metrics
from .output_folder import OutputFolder


# what of a run's folder is published: no checkpoints, no picture of the images, and nothing that others have put there
_PUBLISHED = ("config.json", "model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
              "*_dino.py", "metrics.jsonl", "figures/curves.png", "README.md")  # fmt: skip


def publish(backbone: DINOModel, image_processor: ViTImageProcessorPil | ViTImageProcessor, folder: Path) -> None:
    """Save backbone and image processor into a folder."""
    backbone.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def usage(
    backbone: DINOModel,
    image_processor,
    name: str,
    args: TrainingArguments,
    ending: str,
    trust_remote_code: bool = False,
) -> str:
    """The five lines that load a backbone by its folder or Hub id, with our package or with the code beside it.

    Args:
        backbone: The teacher's.
        image_processor: Its.
        name: Of the folder or on the Hub.
        args: Of the run.
        ending: Of the name of an image's file, as .tif.
        trust_remote_code: Whether the code beside it is used.
    """
    num_channels, (height, width) = backbone.config.num_channels, backbone.config.image_height_and_width
    if isinstance(image_processor, DINOImageProcessor):
        library, image, options = _reader(ending, args.tiff_pages)
    elif num_channels in PILLOW_MODES:
        file = "image.png" if num_channels == 4 else "image.jpg"
        library, image, options = "PIL.Image", f'PIL.Image.open("{file}").convert("{PILLOW_MODES[num_channels]}")', ""
    else:
        library, image = "numpy", f'numpy.zeros(({num_channels}, {height}, {width}), "uint8")'
        options = ', input_data_format="channels_first"'
    modules, trust = (library, ", trust_remote_code=True") if trust_remote_code else (f"modeling_dino, {library}", "")
    return f'''\
import {modules}
from transformers import AutoImageProcessor, AutoModel
processor, model = (Auto.from_pretrained("{name}"{trust}) for Auto in (AutoImageProcessor, AutoModel))
inputs = processor({image}, return_tensors="pt"{options})
features = model(**inputs).pooler_output  # (1, {backbone.num_features})'''


def _files(output_dir: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in output_dir.glob(pattern) if path.is_file())


def write_card(
    path: Path,
    backbone: DINOModel,
    image_processor,
    args: TrainingArguments,
    num_images: int | None,
    num_steps: int,
    global_batch_size: int,
    is_resumed: bool,
    hub_datasets: list[str],
    ending: str,
) -> None:
    """Write the model card to `path`, of what the run knows about itself. No path gets into it."""
    metrics = read_metrics(Path(args.output_dir))
    losses = [line["loss"] for line in metrics if "loss" in line]
    sources = [f"[{name}](https://huggingface.co/datasets/{name})" for name in hub_datasets]
    if len(sources) <= len(args.mix_with):
        sources.append("own images")
    if args.init_from:
        start = "weights of a local folder" if is_path(args.init_from) else args.init_from
    else:
        start = "" if is_resumed else "random weights"  # a run that goes on does not know
    rows = {
        "network": describe_network(backbone),
        "images": " and ".join(sources) + ("" if num_images is None else f", {num_images:,}"),
        "training": f"{num_steps:,} steps of {global_batch_size} images",
        "values": _describe_values(args, image_processor),
        "transparent images": "" if args.background == "white" else f"put on {args.background}, before the processor",
        "crops": f"2 of {args.global_crop_size} and {args.num_local_crops} of {args.local_crop_size} pixels",
        "head": f"{backbone.config.out_dim:,} prototypes",
        "learning rate": f"{args.base_learning_rate:g} per 256 images, to {args.min_learning_rate:g}",
        "weight decay": f"{args.weight_decay:g} to {args.weight_decay_end:g}",
        "teacher": f"momentum {args.momentum_teacher:g} to 1, temperature {args.warmup_teacher_temp:g} to "
        f"{args.teacher_temp:g}",
        "start": start,
        "loss at the end": f"{losses[-1]:.3f}" if losses else "",  # a finished run, resumed elsewhere, has none
    }
    has_curves = losses and (Path(args.output_dir) / "figures/curves.png").is_file()
    curves = "![Loss, teacher entropy and target information over the steps](figures/curves.png)" if has_curves else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["dino", "self-supervised-learning", "vision"],
        datasets=hub_datasets or None,
    )
    content = f"""---
{data.to_yaml()}
---

# {Path(args.hub_model_id or args.output_dir).name}

Features of images, learned without labels by [DINO](https://arxiv.org/abs/2104.14294): the teacher's backbone of a
training with dino-hf.

```python
{usage(backbone, image_processor, ADDRESS, args, ending, trust_remote_code=True)}
```

{_describe_pipeline(backbone, image_processor)}

| | |
|---|---|
{table}

{_describe_knn(metrics, num_steps, args)}{curves}
"""
    ModelCard(content).save(path)


def _describe_pipeline(backbone: DINOModel, image_processor) -> str:
    """Say whether pipelines of transformers, which turn every image to RGB of 8 bits, do what the lines above do."""
    if isinstance(image_processor, DINOImageProcessor) or backbone.config.num_channels not in PILLOW_MODES:
        return (
            '`pipeline("image-feature-extraction")` turns images to RGB of 8 bits, and so does not fit this model. '
            "Use the lines above."
        )
    alpha = ", for images without transparency, which it drops" if backbone.config.num_channels == 4 else ""
    call = f'pipeline("image-feature-extraction", "{ADDRESS}", trust_remote_code=True)'
    return f"`{call}` gives the same with `pool=True`{alpha}."


def _reader(ending: str, tiff_pages: str | None) -> tuple[str, str, str]:
    """Module, expression and options that read an image of more than 8 bits."""
    if ending in (".tif", ".tiff"):
        page = "[0]" if tiff_pages in ("images", "first") else ""
        return "tifffile", f'tifffile.imread("image{ending}"){page}', ""
    if ending in ("", ".npy", ".npz"):
        return "numpy", 'numpy.load("image.npy")', ""
    return "PIL.Image", f'PIL.Image.open("image{ending}")', ""


def _describe_values(args: TrainingArguments, image_processor) -> str:
    if not isinstance(image_processor, DINOImageProcessor):
        return ""
    scale = f"{' to '.join(args.value_range)} become 0 to 1" if args.value_range else "the range of the integer type"
    pages = {"channels": "; pages are channels", "images": "; a page is an image", "first": "; of pages, the first"}
    return scale + pages.get(args.tiff_pages, "")


def _describe_knn(metrics: list[dict], num_steps: int, args: TrainingArguments) -> str:
    lines = [line for line in metrics if any(name.startswith("knn_") for name in line)]
    if not lines:
        return ""

    def accuracies(line: dict) -> str:
        top1 = {name.split("_")[1]: value for name, value in line.items() if name.endswith("_top1")}
        return ", ".join(f"{value:.1f} % (k = {k})" for k, value in top1.items())

    when = "" if lines[-1]["step"] == num_steps else f" after step {lines[-1]['step']}"
    untrained = f"; before training {accuracies(lines[0])}" if lines[0]["step"] == 0 else ""
    return (
        f"k-NN of the features on the split `{args.eval_split}`, by the images of `{args.train_split}`, top-1: "
        f"{accuracies(lines[-1])}{when}{untrained}.\n\n"
    )


def check_hub_settings(hub_model_id: str | None) -> None:
    """Find what would fail after days of training.

    Raises:
        ValueError: no name or one that the Hub does not allow, or nobody logged in.
    """
    check_hub_name(hub_model_id)
    check_login()


def check_hub_name(hub_model_id: str | None) -> None:
    """Raise ValueError for no name, or one that the Hub does not allow."""
    if not hub_model_id:
        raise ValueError("--push_to_hub needs a name: give --hub_model_id")
    try:
        validate_repo_id(hub_model_id)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id {hub_model_id} is no name for the Hub: {error}") from error


def check_login() -> None:
    """Raise ValueError if nobody is logged in to the Hub."""
    if get_token() is None:
        raise ValueError("nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN")


def upload(output_dir: Path, hub_model_id: str, private: bool = False) -> str:
    """Upload a finished training, or a classifier of `dino-eval`, without its checkpoints; return its address.

    Raises:
        ValueError: a folder that lacks files of a finished run; a Hub that cannot be reached or refuses, which the
            message says how to try again. The folder stays as it is.
    """
    files = files_to_upload(output_dir)
    try:
        api = HfApi()
        repo_id = api.create_repo(hub_model_id, private=private, exist_ok=True).repo_id
        card = output_dir / "README.md"
        if is_classifier(output_dir):
            write_text(card, card.read_text(encoding="utf-8").rstrip("\n").replace(ADDRESS, repo_id))
        else:
            OutputFolder(output_dir).rewrite("README.md", lambda text: text.replace(ADDRESS, repo_id))
        return api.upload_folder(
            repo_id=repo_id, folder_path=output_dir, allow_patterns=files, commit_message="Trained by dino-hf"
        ).repo_url.url
    except Exception as error:  # of whatever the Hub, the network or their libraries may raise: nothing is lost by it
        again = shlex.join(["dino-publish", str(output_dir), hub_model_id] + ["--private"] * private)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"the run in {output_dir} is whole, but was not uploaded ({reason}); try again with: {again}"
        ) from error


def files_to_upload(output_dir: Path) -> list[str]:
    """Return the names of the files that `upload` uploads.

    Raises:
        ValueError: a folder that lacks files of a finished run.
    """
    if not output_dir.is_dir():
        raise ValueError(f"output_dir must be the folder of a finished run, got {output_dir}, which does not exist.")
    folder = OutputFolder(output_dir)
    files = [str(path.relative_to(output_dir)) for path in _files(output_dir, _PUBLISHED)]
    files = [name for name in files if folder.may_upload(name)]
    missing = [name for name in ("config.json", "README.md") if name not in files]
    if missing:
        if (output_dir / "classifier.safetensors").exists():
            fix = "A linear classifier is published with its network, which only DINO's is saved with."
        elif missing == ["README.md"] and is_classifier(output_dir):
            fix = "Run the command that trained the classifier again, which writes it."
        else:
            fix = "Give the --output_dir of dino-train, or of dino-eval linear or finetune."
        raise ValueError(
            f"output_dir must hold a finished run, got {output_dir}, which has no {' and no '.join(missing)}. {fix}"
        )
    return files


def publish_from_command_line(argv: list[str]) -> None:
    parser = Parser(prog="dino-publish", description="Upload a finished run to the Hub.")
    parser.add_argument("output_dir", type=Path, help="folder of the run")
    parser.add_argument("hub_model_id", help="name on the Hub, as user/model")
    parser.add_argument("--private", action="store_true", help="make it private if it is new")
    parser.add_argument("--debug", action="store_true", help="show a traceback instead of one line")
    options = parser.parse_args(argv)
    check_hub_name(options.hub_model_id)
    files_to_upload(options.output_dir)
    check_login()
    print(f"uploaded to {upload(options.output_dir, options.hub_model_id, options.private)}")


def main() -> None:
    interruption.listen("dino-publish")
    run_process("dino-publish", publish_from_command_line)


if __name__ == "__main__":
    main()
