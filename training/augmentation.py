"""Multi-crop: the paper's augmentation, split where the work is.

A worker cuts the crops of an image out as uint8 and draws everything random about them (`MultiCrop`); the training
process then changes the colours of a whole batch at once, on its device (`apply_photometrics`). All draws of an image
come from a generator that is seeded by the run's seed, the epoch and the image's place in it, so neither workers nor
processes nor a resume can change them.

Distributions are those of `DataAugmentationDINO` in the original's `main_dino.py`: blur in all of the first global
crops, a tenth of the second and half of the local ones; solarisation in a fifth of the second global crops alone.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers.hf_argparser import HfArg
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evaluation.decoding import EncodedImage
from modeling_dino.image_processing_dino import parse_value_range, scale_values


NUM_GLOBAL_CROPS = 2
CROP_RATIO = (3 / 4, 4 / 3)  # width over height, as in torchvision's RandomResizedCrop
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's


@dataclass
class AugmentationArguments:
    """Settings of multi-crop. Triples are for the first global crop, the second, and the local ones."""

    global_crop_size: int = HfArg(
        default=224, help="Side of the global crops in pixels; a multiple of the patch size."
    )
    local_crop_size: int = HfArg(default=96, help="Side of the local crops in pixels; a multiple of the patch size.")
    num_local_crops: int = HfArg(default=8, help="Local crops per image; 0 turns multi-crop off.")
    global_crops_scale: list[float] = HfArg(
        default_factory=lambda: [0.4, 1.0], help="Share of the image's area in a global crop, lowest and highest."
    )
    local_crops_scale: list[float] = HfArg(
        default_factory=lambda: [0.05, 0.4], help="Share of the image's area in a local crop, lowest and highest."
    )
    flip_probability: float = HfArg(default=0.5, help="Probability of a horizontal flip.")
    jitter_probability: float = HfArg(default=0.8, help="Probability of colour jitter.")
    brightness: float = HfArg(default=0.4, help="Brightness factor is drawn from 1 - b to 1 + b.")
    contrast: float = HfArg(default=0.4, help="Contrast factor is drawn from 1 - c to 1 + c.")
    saturation: float = HfArg(default=0.2, help="Saturation factor is drawn from 1 - s to 1 + s. RGB only.")
    hue: float = HfArg(default=0.1, help="Hue is shifted by -h to h turns of the colour circle. RGB only.")
    grayscale_probability: float = HfArg(default=0.2, help="Probability of losing all colour. RGB only.")
    blur_probability: list[float] = HfArg(
        default_factory=lambda: [1.0, 0.1, 0.5], help="Probability of blur: first global crop, second, local."
    )
    blur_radius: list[float] = HfArg(
        default_factory=lambda: [0.1, 2.0], help="Radius of Pillow's Gaussian blur in pixels, lowest and highest."
    )
    solarize_probability: list[float] = HfArg(
        default_factory=lambda: [0.0, 0.2, 0.0], help="Probability of solarisation: first global crop, second, local."
    )
    solarize_threshold: int = HfArg(default=128, help="Solarisation inverts values from here on, of 255.")
    image_mean: list[float] = HfArg(
        default_factory=lambda: list(IMAGENET_DEFAULT_MEAN), help="Mean of each channel, of 1; one value serves all."
    )
    image_std: list[float] = HfArg(
        default_factory=lambda: list(IMAGENET_DEFAULT_STD), help="Standard deviation of each channel, of 1."
    )
    value_range: list[str] = HfArg(
        default_factory=list,
        help="Values that become 0 and 1: two numbers, or as `p1 p99` percentiles of each channel of each image. "
        "Default: the range of the integer type.",
    )
    display_channels: list[int] = HfArg(
        default_factory=list,
        help="Channels, from 0, shown as red, green and blue in pictures, or one as gray. Default: the first three.",
    )
    augmentation_device: Literal["device", "host"] = HfArg(
        default="device",
        help="Where flips, colours and blur are done: on the device that trains, or by the workers on the host, which "
        "then pass on four times as many bytes.",
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if not name.endswith("_probability"):
                continue
            if name in ("blur_probability", "solarize_probability") and len(value) != 3:
                raise ValueError(f"{name} must be 3 numbers (first global crop, second, local), got {value}")
            if not all(0 <= p <= 1 for p in np.atleast_1d(value)):
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        for name in ("global_crops_scale", "local_crops_scale"):
            scale = getattr(self, name)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"{name} must be two numbers, 0 < lowest <= highest <= 1, got {scale}")
        if len(self.blur_radius) != 2 or not 0 < self.blur_radius[0] <= self.blur_radius[1]:
            raise ValueError(f"blur_radius must be two numbers, 0 < lowest <= highest, got {self.blur_radius}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be between 0 and 0.5, got {self.hue}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("global_crop_size", "local_crop_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.augmentation_device not in ("device", "host"):
            raise ValueError(f"augmentation_device must be device or host, got {self.augmentation_device}")
        parse_value_range(self.value_range)
        if self.num_local_crops < 0:
            raise ValueError(f"num_local_crops must be at least 0, got {self.num_local_crops}")
        if not all(std > 0 for std in self.image_std):
            raise ValueError(f"image_std must be above 0, got {self.image_std}")

    @property
    def num_crops(self) -> int:
        return NUM_GLOBAL_CROPS + self.num_local_crops


class Photometrics(NamedTuple):
    """What happens to the colours of crops. One row a crop; arrays in a worker, tensors in a batch."""

    flip: torch.Tensor  # (crops,) bool
    jitter: torch.Tensor  # (crops,) bool
    factors: torch.Tensor  # (crops, 4) float: brightness, contrast, saturation, hue
    order: torch.Tensor  # (crops, 4) int: which of the four comes first, second, ...
    grayscale: torch.Tensor  # (crops,) bool
    blur_radius: torch.Tensor  # (crops,) float; 0 is no blur
    solarize: torch.Tensor  # (crops,) bool


class CropBatch(NamedTuple):
    """Crops of a batch, crop-major: all images of the first crop, then all of the second, ..."""

    crops: list[torch.Tensor]  # one a resolution, uint8 or fp32 in [0, 1] (crops * batch, channels, size, size)
    photometrics: list[Photometrics] | None  # one a resolution; None when `crops` are finished, and so normalised fp32
    skipped: list[dict[str, str]] = []  # images that were broken: name, kind and reason
    noted: list[dict[str, str]] = []  # images that are read in part: name and note
    images: tuple | None = None  # which they are, as the loader knows them


def draw_boxes(rng: np.random.Generator, height: int, width: int, scale: np.ndarray) -> np.ndarray:
    """Boxes (crops, 4) of top, left, height, width, by the rule of torchvision's `RandomResizedCrop.get_params`.

    `scale` (crops, 2) is the lowest and highest share of the area. Up to ten tries, then the largest centred box whose
    aspect ratio is allowed.
    """
    num_crops = len(scale)
    area = height * width * rng.uniform(scale[:, 0], scale[:, 1], (10, num_crops))
    ratio = np.exp(rng.uniform(np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1]), (10, num_crops)))
    widths = np.rint(np.sqrt(area * ratio)).astype(int)
    heights = np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)
    first = fits.argmax(0), np.arange(num_crops)
    heights, widths, fits = heights[first], widths[first], fits[first]
    tops = rng.integers(0, np.maximum(height - heights, 0) + 1)
    lefts = rng.integers(0, np.maximum(width - widths, 0) + 1)
    if not fits.all():
        fallback_height = min(height, round(width / CROP_RATIO[0]))
        fallback_width = min(width, round(height * CROP_RATIO[1]))
        fallback = (height - fallback_height) // 2, (width - fallback_width) // 2, fallback_height, fallback_width
        boxes = np.stack([tops, lefts, heights, widths], axis=1)
        return np.where(fits[:, None], boxes, fallback)
    return np.stack([tops, lefts, heights, widths], axis=1)


def reduce_boxes(boxes: np.ndarray, reduction: int, height: int, width: int) -> np.ndarray:
    """Boxes for the same image at `reduction` times fewer pixels a side, which is (height, width)."""
    tops, lefts, heights, widths = np.rint(boxes / reduction).astype(int).T
    return np.stack([np.minimum(tops, height - heights), np.minimum(lefts, width - widths), heights, widths], axis=1)


class MultiCrop:
    """The worker's half: an encoded image in, crops and the draws for their colors out.

    Crops are uint8, or of images that are not of 8 bits, or with `value_range`, fp32 from 0 to 1.
    """

    def __init__(self, args: AugmentationArguments, seed: int):
        self.args = args
        self.seed = seed
        num_local = args.num_local_crops
        self.sizes = [args.global_crop_size] * NUM_GLOBAL_CROPS + [args.local_crop_size] * num_local
        self.scale = np.array([args.global_crops_scale] * NUM_GLOBAL_CROPS + [args.local_crops_scale] * num_local)
        self.blur_probability = self._per_crop(args.blur_probability)
        self.solarize_probability = self._per_crop(args.solarize_probability)

    def _per_crop(self, first_second_local: list[float]) -> np.ndarray:
        first, second, local = first_second_local
        return np.array([first, second] + [local] * self.args.num_local_crops)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, Photometrics]:
        """Boxes (crops, 4) and colour changes of all crops of one image, each crop independent of the others."""
        args, num_crops = self.args, self.args.num_crops
        boxes = draw_boxes(rng, height, width, self.scale)
        spread = np.array([args.brightness, args.contrast, args.saturation, args.hue])
        neutral = np.array([1.0, 1.0, 1.0, 0.0])
        blurred = rng.random(num_crops) < self.blur_probability
        return boxes, Photometrics(
            flip=rng.random(num_crops) < args.flip_probability,
            jitter=rng.random(num_crops) < args.jitter_probability,
            factors=rng.uniform(neutral - spread, neutral + spread, (num_crops, 4)).astype(np.float32),
            order=rng.random((num_crops, 4)).argsort(1),
            grayscale=rng.random(num_crops) < args.grayscale_probability,
            blur_radius=(blurred * rng.uniform(*args.blur_radius, num_crops)).astype(np.float32),
            solarize=rng.random(num_crops) < self.solarize_probability,
        )

    def __call__(self, image: EncodedImage, epoch: int, position: int) -> tuple[list[torch.Tensor], Photometrics]:
        """Crops of the image at a position of an epoch. Large JPEGs are decoded only as large as the crops need them.

        Raises:
            BrokenImageError: an image that cannot be decoded.
        """
        rng = np.random.default_rng([self.seed, epoch, position])
        boxes, photometrics = self.draw(rng, image.height, image.width)
        spare = (boxes[:, 2:].min(1) / self.sizes).min()  # pixels that every crop has, for one that it needs
        reduction = max(reduction for reduction in (1, 2, 4, 8) if reduction <= max(spare, 1))
        pixels = image.decode(reduction)
        if pixels.dtype != np.uint8 or self.args.value_range:
            pixels = scale_values(pixels, self.args.value_range)
        pixels = torch.from_numpy(pixels)
        if pixels.shape[1] < image.height:
            boxes = reduce_boxes(boxes, reduction, *pixels.shape[1:])
        crops = [
            F.resized_crop(pixels, *box, size=[size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
            for box, size in zip(boxes.tolist(), self.sizes)
        ]
        if pixels.dtype != torch.uint8:
            crops = [crop.clamp_(0, 1) for crop in crops]  # where bicubic resampling overshoots
        return crops, photometrics


def collate(samples: list[tuple[list[torch.Tensor], Photometrics]]) -> CropBatch:
    """Samples of `MultiCrop` -> a crop-major batch, the global crops first, then the local ones."""
    num_crops = len(samples[0][0])
    resolutions = [range(NUM_GLOBAL_CROPS), range(NUM_GLOBAL_CROPS, num_crops)]
    crops, photometrics = [], []
    for members in filter(len, resolutions):
        crops.append(stack_crops([sample[0][i] for i in members for sample in samples]))
        drawn = [sample[1] for sample in samples]
        photometrics.append(
            Photometrics(
                *(torch.from_numpy(np.stack(f, axis=1)[members].reshape(-1, *f[0].shape[1:])) for f in zip(*drawn))
            )
        )
    return CropBatch(crops, photometrics)


def stack_crops(crops: list[torch.Tensor]) -> torch.Tensor:
    """Crops of one size -> a batch: uint8 if all are, else fp32 from 0 to 1."""
    if all(crop.dtype == torch.uint8 for crop in crops):
        return torch.stack(crops)
    return torch.stack([to_unit(crop) for crop in crops])


def to_unit(crops: torch.Tensor) -> torch.Tensor:
    """Crops in fp32 from 0 to 1, a copy."""
    return crops.float().div_(255) if crops.dtype == torch.uint8 else crops.clone()


def luma(images: torch.Tensor) -> torch.Tensor:
    """Brightness (images, 1, height, width) as Pillow has it for RGB; the mean of the channels for anything else."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return luma(images).mean((2, 3), keepdim=True).lerp(images, factor).clamp_(0, 1)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return luma(images).lerp(images, factor).clamp_(0, 1)


def adjust_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the hue of RGB `images` in HSV space; value and saturation stay.

    With hue h in sixths of a turn, value v (the largest channel) and chroma c, a channel is
    v - c * clamp(min(k, 4 - k), 0, 1) where k = (n + h) mod 6 and n is 5, 3, 1 for red, green, blue. That is
    v - c + c * clamp(|k - 2| - 1, 0, 1), and v - c is the smallest channel.
    """
    red, green, blue = images.split(1, dim=1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    # chroma * h, where red, green, or blue is the largest; a grey pixel has no chroma, and any hue will do
    hue = torch.where(
        largest == red,
        green - blue,
        torch.where(largest == green, torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4)),
    )
    hue = hue.div_((6 * chroma).clamp_(min=1e-8)).add_(turns + 1)  # in turns, and positive
    turned = torch.empty_like(images)
    for channel, n in zip(turned.split(1, dim=1), (5, 3, 1)):
        share = (hue + n / 6).frac_().sub_(2 / 6).abs_().mul_(6).sub_(1).clamp_(0, 1)
        torch.addcmul(smallest, share, chroma, out=channel)
    return turned


def to_grayscale(images: torch.Tensor) -> torch.Tensor:
    return luma(images).repeat(1, images.shape[1], 1, 1)


def box_weights(radius: torch.Tensor, max_radius: float) -> list[torch.Tensor]:
    """Weights (images,) at distance 0, 1, ... of the box filter that Pillow's `GaussianBlur(radius)` runs three times.

    Its radius r, below `radius`, gives three of them the Gaussian's variance; it weighs distance d by
    clamp(r + 1 - d, 0, 1) / (2 r + 1).
    """
    variance = radius.double() ** 2 / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box_radius = (whole + part).float()
    return [(box_radius + 1 - d).clamp(0, 1) / (2 * box_radius + 1) for d in range(math.ceil(max_radius) + 1)]


def blur_by_shifts(images: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Three box filters along either side of the images, as sums of shifted images."""
    weights = [weight.view(-1, 1, 1, 1) for weight in weights]
    reach = len(weights) - 1
    for dim, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        size = images.shape[dim]
        for _ in range(3):
            padded = pad(images, padding, mode="replicate")
            images = padded.narrow(dim, reach, size) * weights[0]
            for d in range(1, reach + 1):
                both_sides = padded.narrow(dim, reach - d, size) + padded.narrow(dim, reach + d, size)
                images.addcmul_(both_sides, weights[d])
    return images


def blur_by_matrices(images: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """The same of square images, as products with a matrix (size, size) for each of them."""
    size, reach = images.shape[-1], len(weights) - 1
    pixels = torch.arange(size, device=images.device)
    sources = torch.arange(-reach, size + reach, device=images.device)
    distance = (pixels[:, None] - sources).abs().clamp(max=reach + 1)
    taps = torch.stack([*weights, torch.zeros_like(weights[0])], 1)[:, distance]  # (images, size, size + 2 * reach)
    before, box, after = taps.split([reach, size, reach], dim=-1)
    box[..., 0] += before.sum(-1)
    box[..., -1] += after.sum(-1)
    matrices = (box @ box @ box).unsqueeze(1)
    return matrices @ images @ matrices.mT


def gaussian_blur(images: torch.Tensor, radius: torch.Tensor, max_radius: float) -> torch.Tensor:
    """Pillow's Gaussian blur of square images, each by its own radius (images,), none above `max_radius`.

    Pixels beyond the border repeat the border's, before each of the three box filters.
    """
    blur = blur_by_shifts if images.device.type == "cpu" else blur_by_matrices  # what either is fast at
    return blur(images, box_weights(radius, max_radius))


def solarize(images: torch.Tensor, threshold: float) -> torch.Tensor:
    return torch.where(images >= threshold, 1 - images, images)


def apply_photometrics(crops: torch.Tensor, drawn: Photometrics, args: AugmentationArguments) -> torch.Tensor:
    """The device's half: crops (n, channels, size, size) of `MultiCrop` -> normalized fp32 crops of the same shape.

    Each operation touches only the crops that it was drawn for. Which those are is known on the host, where `drawn`
    stays, so the device never has to be waited for. Hue, saturation and grayscale are skipped unless `crops` are RGB.
    """
    # a CPU gets as many at once as stay in its cache
    at_once = max(1, 2**18 // crops[0].numel()) if crops.device.type == "cpu" else len(crops)
    mean, std = (
        torch.tensor(value).view(-1, 1, 1).to(crops.device, non_blocking=True)
        for value in (args.image_mean, args.image_std)
    )
    changed = torch.empty(crops.shape, device=crops.device)
    for first in range(0, len(crops), at_once):
        part = slice(first, first + at_once)
        colors = _change_colours(to_unit(crops[part]), Photometrics(*(field[part] for field in drawn)), args)
        torch.sub(colors, mean, out=changed[part]).div_(std)
    return changed


def finish_crops(batch: CropBatch, device: torch.device | str, args: AugmentationArguments) -> list[torch.Tensor]:
    """What the networks see: normalised fp32 crops on `device`, (crops * batch, channels, size, size) a resolution."""
    on_device = [crops.to(device, non_blocking=True) for crops in batch.crops]
    if batch.photometrics is None:
        return on_device
    return [apply_photometrics(crops, drawn, args) for crops, drawn in zip(on_device, batch.photometrics)]


def _change_colours(images: torch.Tensor, drawn: Photometrics, args: AugmentationArguments) -> torch.Tensor:
    """What `drawn` says, of images in [0, 1]; may change `images` itself."""
    is_rgb = images.shape[1] == 3
    drawn = Photometrics(*(field.numpy() for field in drawn))

    def change(chosen: np.ndarray, operation, *parameters: np.ndarray) -> None:
        nonlocal images
        rows = chosen.nonzero()[0]
        if not len(rows):
            return
        selected = [torch.from_numpy(parameter[rows]).to(images.device, non_blocking=True) for parameter in parameters]
        if len(rows) == len(images):
            images = operation(images, *selected)
        else:
            rows = torch.from_numpy(rows).to(images.device, non_blocking=True)
            images[rows] = operation(images[rows], *selected)

    change(drawn.flip, lambda x: x.flip(-1))
    jitters = [(BRIGHTNESS, adjust_brightness), (CONTRAST, adjust_contrast)]
    jitters += [(SATURATION, adjust_saturation), (HUE, adjust_hue)] if is_rgb else []
    factors = drawn.factors[..., None, None, None]
    for place in range(4):
        for which, operation in jitters:
            change(drawn.jitter & (drawn.order[:, place] == which), operation, factors[:, which])
    if is_rgb:
        change(drawn.grayscale, to_grayscale)
    largest = drawn.blur_radius.max()
    change(drawn.blur_radius > 0, lambda x, radius: gaussian_blur(x, radius, largest), drawn.blur_radius)
    change(drawn.solarize, lambda x: solarize(x, args.solarize_threshold / 255))
    return images
