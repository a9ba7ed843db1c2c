"""A model and images -> features and labels, each image exactly once whatever the number of processes."""

import math

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from modeling_dino.command_line import one_line
from modeling_dino.image_processing_dino import PILLOW_MODES

from .images import decode_image


# the models of transformers whose `pooler_output` comes from a layer that DINO does not have and nobody trained
_WITH_UNTRAINED_POOLER = ("vit", "deit")


class ImageCollator:
    """Rows of `load_images` -> a batch of pixel values, as the image processor makes them, and the labels."""

    def __init__(self, image_processor, num_channels: int):
        self.image_processor = image_processor
        self.num_channels = num_channels

    def __call__(self, rows: list[dict]) -> tuple[torch.Tensor, list]:
        images = [decode_image(row["image"], self.num_channels) for row in rows]
        inputs = self.image_processor(images, return_tensors="pt", input_data_format="channels_first")
        return inputs["pixel_values"], [row.get("label") for row in rows]


def load_model(name: str) -> tuple[PreTrainedModel, object]:
    """A backbone and its image processor, by Hub id or folder, in evaluation mode on this process's device.

    The processor is the Pillow one, to the pixel what torchvision's transforms on PIL images are, where Pillow knows
    the number of channels.

    Raises:
        ValueError: if the checkpoint lacks weights of the model, other than a stock ViT's pooler, which nothing uses.
    """
    model, info = AutoModel.from_pretrained(name, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if model.config.model_type in _WITH_UNTRAINED_POOLER:
        missing = [key for key in missing if not key.startswith("pooler.")]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    model.eval().to(PartialState().device)
    backend = "pil" if num_channels(model.config) in PILLOW_MODES else "torchvision"
    return model, AutoImageProcessor.from_pretrained(name, backend=backend)


def pooled(model: PreTrainedModel, output) -> torch.Tensor:
    """The image's feature in a backbone's output: CLS after the final norm, or the pooled map of a network without."""
    if model.config.model_type in _WITH_UNTRAINED_POOLER or output.get("pooler_output") is None:
        return output.last_hidden_state[:, 0]
    return output.pooler_output.flatten(1)


def num_channels(config: PreTrainedConfig) -> int:
    """Channels of the images that a network takes."""
    return (config.model_args or {}).get("in_chans", 3) if config.model_type == "timm_wrapper" else config.num_channels


@torch.no_grad()
def extract_features(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    image_processor,
    batch_size: int = 64,
    num_workers: int = 0,
    description: str = "features",
) -> tuple[torch.Tensor, np.ndarray]:
    """Features of all images of a data set of `load_images`, in evaluation mode and fp32.

    Args:
        model: A backbone; the mode of each of its modules is put back afterwards.
        dataset: Rows with `image` and, perhaps, `label`.
        image_processor: Makes pixel values of (channels, height, width) uint8 arrays.
        batch_size: Images per forward pass and process.
        num_workers: Worker processes that decode.
        description: Text of the progress bar.

    Returns:
        Features (images, hidden) in fp32 on the CPU and labels (images,), the same on all processes. Their order is
        the data set's with one process; with several, each process's share follows the one before.

    Raises:
        ValueError: on all processes, no images; or what else one of them fails with, which the others call a
            ValueError.
    """
    state = PartialState()
    try:
        share, failure = (
            _extract_share(model, dataset, image_processor, batch_size, num_workers, description, state),
            None,
        )
    except Exception as error:
        share, failure = None, error
    # the others wait for this one's share, and so are told that there is none
    shares = [(share, failure and one_line(failure))]
    shares = gather_object(shares) if state.num_processes > 1 else shares
    if failure is not None:
        raise failure
    for process, (_, reason) in enumerate(shares):
        if reason is not None:
            raise ValueError(f"process {process} did not get {description}: {reason}")
    features, labels = zip(*(share for share, _ in shares))
    if not any(map(len, features)):
        raise ValueError(f"there are no images to compute {description} of")
    return torch.cat([part for part in features if len(part)]), np.array([label for part in labels for label in part])


def _extract_share(
    model: PreTrainedModel, dataset: Dataset | IterableDataset, image_processor, batch_size: int, num_workers: int,
    description: str, state: PartialState,
) -> tuple[torch.Tensor, list]:  # fmt: skip
    """This process's part of `extract_features`."""
    if state.num_processes > 1:
        dataset = split_dataset_by_node(dataset, state.process_index, state.num_processes)
    collate = ImageCollator(image_processor, num_channels(model.config))
    # a generator of its own: without one, evaluation in the midst of training changes what training draws next
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator()
    )
    num_batches = math.ceil(len(dataset) / batch_size) if isinstance(dataset, Dataset) else None
    training = {module for module in model.modules() if module.training}
    model.eval()
    features, labels = [], []
    # on a terminal alone
    bar = tqdm(loader, description, num_batches, leave=False, disable=None if state.is_main_process else True)
    try:
        for pixel_values, batch_labels in bar:
            output = model(pixel_values.to(model.device, model.dtype, non_blocking=True))
            features.append(pooled(model, output).float().cpu())
            labels.extend(batch_labels)
    finally:
        for module in model.modules():
            module.training = module in training
    return torch.cat(features) if features else torch.empty(0, 0), labels
