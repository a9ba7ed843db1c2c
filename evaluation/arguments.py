"""The flags that protocols share."""

from modeling_dino.command_line import Parser

from .decoding import MAX_IMAGE_PIXELS, TIFF_PAGES
from .folders import LAYOUTS


READING = {  # settings of how images are read, and their defaults
    "folder_layout": "auto",
    "tiff_pages": None,
    "value_range": None,
    "background": "white",
    "max_image_pixels": MAX_IMAGE_PIXELS,
}


_OF_THE_MODEL = "It is of the model. Give --model alone."
# names in the evaluations of the reference implementation, of timm and of lightly-train, and here
SYNONYMS = {
    "arch": _OF_THE_MODEL, "patch_size": _OF_THE_MODEL, "imsize": "image_size", "img_size": "image_size",
    "resize": "image_size", "short_side": "image_size",
    **dict.fromkeys(["pretrained_weights", "weights", "model_name_or_path", "checkpoint", "init_from"], "model"),
    "checkpoint_key": "Choose the network when it is converted: dino-convert FILE FOLDER --key teacher.",
    "pretrained_linear": "Convert the classifier with its network: dino-convert FILE FOLDER --linear CLASSIFIER.",
    **dict.fromkeys(["data_path", "data", "data_dir", "dataset", "input_path"], "dataset_name"),
    "image_path": "image", "images": "image", "video_path": "video", "num_labels": "label_column",
    **dict.fromkeys(["batch_size_per_gpu", "bs", "per_device_eval_batch_size"], "batch_size"),
    **dict.fromkeys(["nb_knn", "knn", "k_list", "num_neighbors", "num_neighbours", "n_neighbors"], "k|num_neighbors"),
    **dict.fromkeys(["knn_t", "temp", "tau"], "temperature"), "workers": "num_workers",
    **dict.fromkeys(["lr", "learning_rate", "base_lr", "base_learning_rate"], "learning_rates|learning_rate"),
    **dict.fromkeys(["num_train_epochs", "num_epochs"], "epochs"), "n_shots": "shots", "num_shots": "shots",
    **dict.fromkeys(["dump_features", "load_features", "features_dir"], "features"),
    "n_last_frames": "num_last_frames", "size_mask_neighborhood": "neighborhood", "top_k": "topk",
    "threshold": "mass", "split": "eval_split", "out": "output|output_dir", "output": "output_dir",
    "output_dir": "output", "max_samples": "max_images|num_images", "n_clusters": "num_clusters",
    "drop_path": "drop_path_rate", "smoothing": "label_smoothing", "wd": "weight_decay",
    **dict.fromkeys(["dist_url", "local_rank", "use_cuda", "gpus", "device", "devices", "num_processes"],
                    "Processes and devices are the launcher's: accelerate launch --num_processes N -m evaluation ..."),
    **dict.fromkeys(["fp16", "bf16", "use_fp16", "amp", "precision", "mixed_precision"],
                    "dtype|Precision is the launcher's: accelerate launch --mixed_precision bf16 -m evaluation ..."),
}  # fmt: skip


class EvaluationParser(Parser):
    synonyms = SYNONYMS


def add_model(parser: Parser, image_size: int | None = None, meaning: str | None = None, several: bool = True) -> None:
    """`--model` and `--image_size`; a protocol with a size of its own says what it is, and what it means there."""
    parser.add_argument(
        "--model",
        nargs="+" if several else 1,
        help="Hub ids or folders of models with their image processors, of transformers, timm or ours; untrained:M is "
        "the network of M with random weights, raw_pixels:M no network at all",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        default=image_size,
        help=(meaning or "side of the images, by the paper's transform")
        + (" (default: %(default)s)" if image_size else " (default: the model's own image processor)"),
    )


def add_images(parser: Parser) -> None:
    """A data set of which only the images count."""
    parser.add_argument("--dataset_name", help="Hub id, or path of a folder, parquet, Arrow or tar file")
    parser.add_argument("--dataset_config_name", help="configuration of a data set that has several")
    parser.add_argument(
        "--eval_split",
        help="split to evaluate on (default: test, else validation; if there is only one split, each of its images by "
        "the others, where a protocol can)",
    )
    parser.add_argument("--image_column", help="column of the images (default: the only one there is)")
    add_reading(parser)
    parser.set_defaults(train_split="train", label_column=None, streaming=False, features=None)


def add_reading(parser: Parser) -> None:
    """How folders and images are read."""
    parser.add_argument(
        "--folder_layout",
        choices=LAYOUTS,
        default="auto",
        help="what the folders at the top of a folder of images are: splits, or classes of one split `train`. "
        "Default: by their names",
    )
    parser.add_argument(
        "--allow_unread",
        action="store_true",
        help="continue if more than a tenth of a folder's image files is not read",
    )
    parser.add_argument(
        "--tiff_pages",
        choices=TIFF_PAGES,
        help="what the pages of a TIFF are: channels of one image, images of their own, or the first alone. Default: "
        "TIFFs of several pages are not read",
    )
    parser.add_argument(
        "--value_range",
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 1: two numbers, or as p1 p99 percentiles of each channel of each image. "
        "Default: of the image processor, or the range of the integer type",
    )
    parser.add_argument(
        "--background", default="white", help="color that transparent images are put on (default: %(default)s)"
    )
    parser.add_argument(
        "--max_image_pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        help="pixels above which an image is not read (default: %(default)s)",
    )


def add_dataset(parser: Parser) -> None:
    add_images(parser)
    parser.add_argument("--train_split", default="train", help="split to learn from (default: %(default)s)")
    parser.add_argument("--label_column", help="column of the labels (default: the class column, or `label`)")
    parser.add_argument("--streaming", action="store_true", help="read the data without preparing it first")
    parser.add_argument(
        "--features",
        metavar="DIR",
        help="folder of Parquet files to keep features in: read if they are there, else written; without --model, "
        "read alone",
    )


def add_extraction(parser: Parser) -> None:
    parser.add_argument("--batch_size", type=int, default=128, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the network; features are float32 (default: %(default)s)",
    )


def add_output(parser: Parser) -> None:
    parser.add_argument("--output", help="JSON file for the results, a list with an entry for each model")
