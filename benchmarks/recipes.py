"""Crops as users have them elsewhere: of a PIL image, one tensor (3, size, size) a view, global ones first."""

import random
from collections.abc import Callable

import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode


def pil_recipe(num_local_crops: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    """What the original's `DataAugmentationDINO` does, in torchvision's transforms on PIL images."""

    def blur(probability: float):
        def apply(image: Image.Image) -> Image.Image:
            if random.random() > probability:
                return image
            return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

        return transforms.Lambda(apply)

    def view(size: int, scale: tuple[float, float], blur_probability: float, solarize_probability: float):
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                blur(blur_probability),
                transforms.RandomSolarize(128, p=solarize_probability),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    views = [view(224, (0.4, 1), 1, 0), view(224, (0.4, 1), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0)] * num_local_crops
    return lambda image: [transform(image) for transform in views]


def lightly_recipe(num_local_crops: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    from lightly.transforms import DINOTransform

    return DINOTransform(global_crop_scale=(0.4, 1), local_crop_scale=(0.05, 0.4), n_local_views=num_local_crops)
