"""`python -m evaluation PROTOCOL --model M ...`, or `dino-eval PROTOCOL --model M ...`."""

import json
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets.utils.logging import disable_progress_bar as disable_datasets_progress_bar
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

from modeling_dino import DINOConfig  # which makes AutoModel know DINO
from modeling_dino.command_line import Parser, run

from .attention import draw_attention_of
from .features import extract_features, load_model, num_channels
from .images import decode_image, load_images
from .knn import knn_accuracy


class RawPixels(torch.nn.Module):
    """No network at all, in the shape of one: what the pixels alone are worth."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, num_channels: int):
        super().__init__()
        self.config = DINOConfig(num_channels=num_channels)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values)


def knn(args: Namespace) -> None:
    if min(args.k) < 1 or args.temperature <= 0 or args.batch_size < 1:
        raise ValueError(
            f"k and batch_size must be at least 1 and temperature above 0, got {args.k}, {args.batch_size}, "
            f"{args.temperature}"
        )
    splits = [
        load_images(
            args.dataset_name, args.dataset_config_name, split, args.image_column, args.label_column, args.streaming
        )
        for split in (args.train_split, args.eval_split)
    ]
    if any("label" not in split.column_names for split in splits):
        raise ValueError(f"k-NN needs labels, and {args.dataset_name} has no label column; name it by --label_column")
    model, image_processor = load_model(args.model)
    candidates = {"model": model}
    if args.baselines:
        set_seed(0)
        candidates["untrained network"] = AutoModel.from_config(model.config).eval().to(model.device)
        candidates["raw pixels"] = RawPixels(num_channels(model.config))
    results = {}
    for name, candidate in candidates.items():
        features_and_labels = []
        for split, part in zip(splits, (args.train_split, args.eval_split)):
            features_and_labels += extract_features(
                candidate, split, image_processor, args.batch_size, args.num_workers, f"{name}, {part}"
            )
        results[name] = knn_accuracy(*features_and_labels, k=args.k, temperature=args.temperature)

    if PartialState().is_main_process:
        rows = [key for key in results["model"] if key.endswith("_top1")]
        print("k-NN top-1 [%]".ljust(20) + "".join(f"k = {key.split('_')[1]}".rjust(10) for key in rows))
        for name, accuracies in results.items():
            print(
                (args.model if name == "model" else name)[-19:].ljust(20)
                + "".join(f"{accuracies[key]:10.1f}" for key in rows)
            )
        if args.output:
            settings = {name: value for name, value in vars(args).items() if name not in ("function", "output")}
            report = {
                "protocol": "knn",
                "values": results.pop("model"),
                "baselines": results,
                "settings": settings,
                "versions": {package: version(package) for package in ("torch", "transformers", "datasets")},
            }
            write_json(report, args.output)


def attention(args: Namespace) -> None:
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {args.num_images}")
    dataset = load_images(args.dataset_name, args.dataset_config_name, args.eval_split, args.image_column, None)
    model, image_processor = load_model(args.model)
    rows = dataset.shuffle(seed=args.seed).select(range(min(args.num_images, len(dataset))))
    images = [decode_image(row["image"], num_channels(model.config)) for row in rows]
    print(f"wrote {draw_attention_of(model, image_processor, images, Path(args.output))}")


def write_json(report: dict, output: str) -> None:
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")


def make_parser() -> Parser:
    parser = Parser(prog="dino-eval", description="Measure what a vision model has learned.")
    protocols = parser.add_subparsers(dest="protocol", required=True, parser_class=Parser, metavar="PROTOCOL")

    shared = Parser(add_help=False)
    shared.add_argument("--model", required=True, help="Hub id or folder of a model with its image processor")
    shared.add_argument(
        "--dataset_name", required=True, help="Hub id, or path of a folder, parquet, Arrow or tar file"
    )
    shared.add_argument("--dataset_config_name", help="configuration of a data set that has several")
    shared.add_argument("--eval_split", default="test", help="split to evaluate on (default: %(default)s)")
    shared.add_argument("--image_column", help="column of the images (default: the only one there is)")
    shared.add_argument("--debug", action="store_true", help="show a traceback instead of one line")

    command = protocols.add_parser("knn", parents=[shared], help="the paper's weighted k-nearest-neighbour classifier")
    command.add_argument("--train_split", default="train", help="split of the neighbours (default: %(default)s)")
    command.add_argument("--label_column", help="column of the labels (default: the class column, or `label`)")
    command.add_argument("--streaming", action="store_true", help="read the data without preparing it first")
    command.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default: %(default)s)"
    )
    command.add_argument("--temperature", type=float, default=0.07, help="of the votes (default: %(default)s)")
    command.add_argument("--batch_size", type=int, default=128, help="images per forward pass (default: %(default)s)")
    command.add_argument("--num_workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    command.add_argument("--baselines", action="store_true", help="also the same network untrained, and raw pixels")
    command.add_argument("--output", help="JSON file for the results")
    command.set_defaults(function=knn)

    command = protocols.add_parser("attention", parents=[shared], help="a picture of the CLS token's attention")
    command.add_argument("--num_images", type=int, default=8, help="rows of the picture (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="which images (default: %(default)s)")
    command.add_argument("--output", default="attention.png", help="PNG to write (default: %(default)s)")
    command.set_defaults(function=attention)
    return parser


def evaluate_from_command_line(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    disable_datasets_progress_bar()
    disable_transformers_progress_bar()
    args.function(args)


def main() -> None:
    run("dino-eval", evaluate_from_command_line)


if __name__ == "__main__":
    main()
