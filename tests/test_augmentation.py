"""Multi-crop against torchvision, Pillow and the distributions of the original."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from evaluation.decoding import BrokenImageError, EncodedImage, Reading
from training import augmentation
from training.augmentation import AugmentationArguments, MultiCrop, Photometrics


NUM_DRAWS = 4000
GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, slice(2, None)
CROPS = {"global 1": [0], "global 2": [1], "local": list(range(2, 10))}
SIGNIFICANT = 1e-3  # seeds are fixed, so a test that passes once always does
GRAY_LEVEL = 1 / 255


def smooth_image(seed: int, height: int, width: int, num_channels: int = 3) -> np.ndarray:
    """A colourful picture (height, width, channels) with edges and saturated areas, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num_channels, 6, 6)).astype(np.uint8)
    channels = [Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC) for channel in coarse]
    picture = np.stack([np.array(channel) for channel in channels], axis=-1)
    picture[height // 4 : height // 2, width // 3 : width // 2] = 255
    picture[height // 2 : height // 2 + 3] = 0
    return picture


def to_tensor(*pictures: np.ndarray) -> torch.Tensor:
    """Pictures (height, width, channels) -> uint8 (images, channels, height, width)."""
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


def photometrics(num_crops: int, **changes) -> Photometrics:
    """What leaves the colours of crops alone, but for `changes`."""
    nothing = {
        "flip": torch.zeros(num_crops, dtype=torch.bool),
        "jitter": torch.zeros(num_crops, dtype=torch.bool),
        "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(num_crops, 1),
        "order": torch.arange(4).repeat(num_crops, 1),
        "grayscale": torch.zeros(num_crops, dtype=torch.bool),
        "blur_radius": torch.zeros(num_crops),
        "solarize": torch.zeros(num_crops, dtype=torch.bool),
    }
    return Photometrics(**nothing | changes)


# boxes


ASPECT_RATIOS = (3 / 4, 4 / 3)
FITS_NOWHERE = (3.0, 3.0)  # three times the image's area: all tries fail, so nothing is left to chance


def torchvision_boxes(height: int, width: int, scale: tuple[float, float], num_draws: int) -> np.ndarray:
    image = torch.empty(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return np.array([RandomResizedCrop.get_params(image, scale, ASPECT_RATIOS) for _ in range(num_draws)])


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)], ids=["global", "local"])
@pytest.mark.parametrize("height, width", [(480, 640), (333, 333), (250, 700), (900, 300)])
def test_boxes_are_distributed_as_those_of_torchvision(height, width, scale):
    expected = torchvision_boxes(height, width, scale, NUM_DRAWS)
    boxes = augmentation.draw_boxes(np.random.default_rng(1), height, width, np.array([scale] * NUM_DRAWS))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()

    # wide and tall images fall back often, and such ties would blind a Kolmogorov-Smirnov test to the other boxes
    [fallback] = torchvision_boxes(height, width, FITS_NOWHERE, 1)
    fell_back = [(sample == fallback).all(1) for sample in (boxes, expected)]
    shares = [[int(sample.sum()), int((~sample).sum())] for sample in fell_back]
    assert stats.fisher_exact(shares).pvalue > SIGNIFICANT, shares
    boxes, expected = boxes[~fell_back[0]], expected[~fell_back[1]]
    statistics = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
    }
    for name, statistic in statistics.items():
        pvalue = stats.ks_2samp(statistic(boxes), statistic(expected), method="asymp").pvalue
        assert pvalue > SIGNIFICANT, name


@pytest.mark.parametrize("height, width", [(50, 500), (500, 50), (7, 1001), (1001, 7), (101, 100)])
def test_box_falls_back_to_that_of_torchvision_where_no_try_can_fit(height, width):
    expected = torchvision_boxes(height, width, FITS_NOWHERE, 3)
    boxes = augmentation.draw_boxes(np.random.default_rng(0), height, width, np.array([FITS_NOWHERE] * 3))
    np.testing.assert_array_equal(boxes, expected)


def test_each_box_has_the_scale_of_its_own_crop():
    area = 300 * 300
    multi_crop, rng = MultiCrop(AugmentationArguments(), 0), np.random.default_rng(0)
    boxes = [multi_crop.draw(rng, 300, 300)[0] for _ in range(200)]
    share = np.prod(np.stack(boxes)[..., 2:], axis=-1) / area
    assert (share[:, :2] > 0.38).all() and share[:, :2].max() > 0.9
    assert (share[:, 2:] > 0.04).all() and (share[:, 2:] < 0.42).all()


# probabilities of the views


@pytest.fixture(scope="module")
def draws() -> Photometrics:
    """Draws of 4000 images in one array a field: (images, crops, ...)."""
    multi_crop = MultiCrop(AugmentationArguments(), seed=0)
    rng = np.random.default_rng(5)
    drawn = [multi_crop.draw(rng, 300, 400)[1] for _ in range(NUM_DRAWS)]
    return Photometrics(*(np.stack(field) for field in zip(*drawn)))


EVERYWHERE = [("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2)]
PROBABILITIES = [(name, crops, probability) for name, probability in EVERYWHERE for crops in CROPS]
PROBABILITIES += [("blur_radius", "global 1", 1.0), ("blur_radius", "global 2", 0.1), ("blur_radius", "local", 0.5)]
PROBABILITIES += [("solarize", "global 1", 0.0), ("solarize", "global 2", 0.2), ("solarize", "local", 0.0)]


@pytest.mark.parametrize("name, crops, probability", PROBABILITIES)
def test_operation_has_its_probability_in_the_view(draws, name, crops, probability):
    for crop in CROPS[crops]:
        hits = int((getattr(draws, name)[:, crop] != 0).sum())
        assert stats.binomtest(hits, NUM_DRAWS, probability).pvalue > SIGNIFICANT, (crop, hits)


@pytest.mark.parametrize("which, low, high", [(0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)])
def test_jitter_factor_is_uniform_in_its_range(draws, which, low, high):
    for crops in (GLOBAL_1, GLOBAL_2, LOCAL):
        factors = draws.factors[:, crops, which].ravel()
        assert low - 1e-6 <= factors.min() and factors.max() <= high + 1e-6
        assert stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > SIGNIFICANT


def test_order_of_jitter_is_uniform_among_all_permutations(draws):
    for crop in range(10):
        permutations, counts = np.unique(draws.order[:, crop], axis=0, return_counts=True)
        assert len(permutations) == 24 and (np.sort(permutations, axis=1) == np.arange(4)).all()
        assert stats.chisquare(counts).pvalue > SIGNIFICANT


def test_blur_radius_is_uniform_where_there_is_blur(draws):
    for crops in (GLOBAL_1, GLOBAL_2, LOCAL):
        radius = draws.blur_radius[:, crops]
        assert stats.kstest(radius[radius > 0], stats.uniform(0.1, 1.9).cdf).pvalue > SIGNIFICANT


def test_draws_of_crops_and_of_operations_are_independent(draws):
    independent = [draws.flip, draws.jitter, draws.grayscale, draws.blur_radius > 0, draws.blur_radius, draws.solarize]
    independent += [draws.factors[..., i] for i in range(4)] + [draws.order[..., 0]]
    columns = np.concatenate(independent, axis=1).astype(float)  # (images, operations * crops)
    never_or_always = columns.std(0) == 0
    correlation = np.corrcoef(columns[:, ~never_or_always].T)
    np.fill_diagonal(correlation, 0)
    operations = np.repeat(np.arange(len(independent)), 10)[~never_or_always]
    crops = np.tile(np.arange(10), len(independent))[~never_or_always]
    same_radius = np.isin(operations, (3, 4)) & np.isin(operations, (3, 4))[:, None] & (crops == crops[:, None])
    assert np.abs(correlation[~same_radius]).max() < 5 / NUM_DRAWS**0.5


# operations, one at a time


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Float images (5, 3, 40, 40): three pictures, greys, and noise."""
    gray = np.broadcast_to(smooth_image(3, 40, 40)[..., :1], (40, 40, 3))
    noise = np.random.default_rng(4).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    return to_tensor(*(smooth_image(i, 40, 40) for i in range(3)), gray, noise).float() / 255


@pytest.mark.parametrize(
    "ours, theirs, factors",
    [
        (augmentation.adjust_brightness, F.adjust_brightness, [0.0, 0.6, 1.0, 1.17, 1.4]),
        (augmentation.adjust_contrast, F.adjust_contrast, [0.0, 0.6, 1.0, 1.17, 1.4]),
        (augmentation.adjust_saturation, F.adjust_saturation, [0.0, 0.8, 1.0, 1.07, 1.2]),
        (augmentation.adjust_hue, F.adjust_hue, [-0.5, -0.1, 0.0, 0.03, 0.1]),
    ],
)
def test_jitter_equals_that_of_torchvision(images, ours, theirs, factors):
    changed = ours(images, torch.tensor(factors).view(-1, 1, 1, 1))  # a factor an image
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors)])
    torch.testing.assert_close(changed, expected, atol=GRAY_LEVEL, rtol=0)
    reordered = ours(images.flip(0), torch.tensor(factors).view(-1, 1, 1, 1))
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images.flip(0), factors)])
    torch.testing.assert_close(reordered, expected, atol=GRAY_LEVEL, rtol=0)


def test_grayscale_equals_that_of_torchvision(images):
    gray = augmentation.to_grayscale(images)
    torch.testing.assert_close(gray, F.rgb_to_grayscale(images, 3), atol=GRAY_LEVEL, rtol=0)


@pytest.mark.parametrize("threshold", [0, 1, 128, 200, 255])
def test_solarize_equals_that_of_pillow(threshold):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    solarized = augmentation.solarize(torch.from_numpy(levels).float() / 255, threshold / 255)
    expected = ImageOps.solarize(Image.fromarray(levels), threshold)
    np.testing.assert_array_equal((solarized * 255).round().numpy(), np.array(expected))


RADII = [0.1, 0.25, 0.5, 0.8, 1.0, 1.3, 1.6, 1.9, 2.0]
# Pillow rounds to whole levels in each of its six passes, so may be off by 6 * 0.5; 2.96 were measured.
BLUR_TOLERANCE = 3 * GRAY_LEVEL


@pytest.mark.parametrize("blur", [augmentation.blur_by_shifts, augmentation.blur_by_matrices])
@pytest.mark.parametrize("size", [16, 96])
def test_blur_equals_that_of_pillow(size, blur):
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    for picture in (smooth_image(0, size, size), noise):
        batch = to_tensor(*[picture] * len(RADII)).float() / 255
        blurred = blur(batch, augmentation.box_weights(torch.tensor(RADII), max_radius=2.0))
        pillow = [np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))) for radius in RADII]
        torch.testing.assert_close(blurred, to_tensor(*pillow).float() / 255, atol=BLUR_TOLERANCE, rtol=0)
        assert (blurred[-1] - batch[-1]).abs().max() > 0.2


def test_blur_does_not_depend_on_the_largest_radius_allowed():
    batch = to_tensor(smooth_image(0, 24, 24)).float() / 255
    narrow = augmentation.gaussian_blur(batch, torch.tensor([1.2]), max_radius=1.2)
    wide = augmentation.gaussian_blur(batch, torch.tensor([1.2]), max_radius=7.5)
    torch.testing.assert_close(narrow, wide)


# all operations at once


def drawn_for_test(num_crops: int) -> Photometrics:
    rng = np.random.default_rng(2)
    coin = [torch.from_numpy(rng.random(num_crops) < 0.5) for _ in range(5)]
    factors = rng.uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1], (num_crops, 4))
    return Photometrics(
        flip=coin[0],
        jitter=coin[1],
        factors=torch.from_numpy(factors).float(),
        order=torch.from_numpy(np.stack([rng.permutation(4) for _ in range(num_crops)])),
        grayscale=coin[2],
        blur_radius=coin[3] * torch.from_numpy(rng.uniform(0.1, 2.0, num_crops)).float(),
        solarize=coin[4],
    )


JITTERS = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


def one_by_one(picture: np.ndarray, drawn: Photometrics, i: int, jitter_in_pillow: bool) -> torch.Tensor:
    """The original's pipeline for one picture -> (3, height, width) in [0, 1]."""
    image = Image.fromarray(picture) if jitter_in_pillow else to_tensor(picture)[0].float() / 255
    if drawn.flip[i]:
        image = F.horizontal_flip(image)
    if drawn.jitter[i]:
        for which in drawn.order[i].tolist():
            image = JITTERS[which](image, drawn.factors[i, which].item())
    if drawn.grayscale[i]:
        image = F.rgb_to_grayscale(image, 3)
    if not jitter_in_pillow:
        image = F.to_pil_image((image * 255).round().to(torch.uint8))
    if drawn.blur_radius[i] > 0:
        image = image.filter(ImageFilter.GaussianBlur(drawn.blur_radius[i].item()))
    if drawn.solarize[i]:
        image = ImageOps.solarize(image, 128)
    return to_tensor(np.array(image))[0].float() / 255


# In grey levels; measured were 2.65 and 0.36, 10.7 and 0.84. Pillow rounds after every operation, and keeps hue itself
# in 8 bits.
@pytest.mark.parametrize("jitter_in_pillow, largest, average", [(False, 3.5, 0.4), (True, 12, 1.0)])
def test_photometrics_equal_operations_of_one_image_at_a_time(jitter_in_pillow, largest, average):
    num_crops = 64
    pictures = [smooth_image(i, 32, 32) for i in range(num_crops)]
    drawn = drawn_for_test(num_crops)
    crops = to_tensor(*pictures)
    before = crops.clone()
    args = AugmentationArguments()
    changed = augmentation.apply_photometrics(crops, drawn, args)
    expected = torch.stack([one_by_one(p, drawn, i, jitter_in_pillow) for i, p in enumerate(pictures)])
    normalised = F.normalize(expected, args.image_mean, args.image_std)

    assert changed.dtype == torch.float32 and changed.shape == crops.shape
    assert torch.equal(crops, before)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    difference = (changed - normalised).abs() * std * 255
    assert difference.max() < largest
    assert difference.mean() < average


def test_photometrics_normalise_by_the_given_mean_and_std():
    crops = to_tensor(smooth_image(0, 8, 8))
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    args = AugmentationArguments(image_mean=mean, image_std=std)
    normalised = augmentation.apply_photometrics(crops, photometrics(1), args)
    torch.testing.assert_close(normalised, F.normalize(crops.float() / 255, mean, std))


@pytest.mark.parametrize("num_channels", [1, 5])
def test_photometrics_without_rgb_change_brightness_and_contrast_alone(num_channels):
    crops = to_tensor(*(smooth_image(i, 20, 20, num_channels) for i in range(2)))
    changes = {
        "jitter": torch.tensor([True, True]),
        "factors": torch.tensor([[0.7, 1.3, 0.8, 0.1], [1.2, 0.6, 1.2, -0.1]]),
        "order": torch.tensor([[3, 0, 2, 1], [1, 2, 0, 3]]),  # brightness first, contrast first
        "grayscale": torch.tensor([True, True]),
    }
    args = AugmentationArguments(image_mean=[0.5], image_std=[0.25])
    changed = augmentation.apply_photometrics(crops, photometrics(2, **changes), args)

    x, y = crops.double().numpy() / 255
    x = np.clip(x * 0.7, 0, 1)
    x = np.clip(x.mean() + 1.3 * (x - x.mean()), 0, 1)
    y = np.clip(y.mean() + 0.6 * (y - y.mean()), 0, 1)
    y = np.clip(y * 1.2, 0, 1)
    torch.testing.assert_close(changed.double().numpy(), (np.stack([x, y]) - 0.5) / 0.25, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_channels", [1, 5])
def test_photometrics_without_rgb_flip_blur_and_solarize_every_channel(num_channels):
    picture = smooth_image(0, 20, 20, num_channels)
    drawn = photometrics(1, flip=torch.tensor([True]), blur_radius=torch.tensor([1.5]), solarize=torch.tensor([True]))
    args = AugmentationArguments(image_mean=[0.0], image_std=[1.0])
    changed = augmentation.apply_photometrics(to_tensor(picture), drawn, args)[0]
    for channel in range(num_channels):
        image = Image.fromarray(picture[..., channel]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageOps.solarize(image.filter(ImageFilter.GaussianBlur(1.5)), 128)
        expected = torch.from_numpy(np.array(image)).float() / 255
        torch.testing.assert_close(changed[channel], expected, atol=BLUR_TOLERANCE, rtol=0)


# MultiCrop


def small_args(**changes) -> AugmentationArguments:
    return AugmentationArguments(**{"global_crop_size": 32, "local_crop_size": 16, "num_local_crops": 3} | changes)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return smooth_image(1, 60, 80)


@pytest.mark.parametrize(
    "global_size, local_size, num_local, num_channels", [(32, 16, 3, 3), (48, 24, 1, 1), (32, 16, 0, 5)]
)
def test_crops_have_the_sizes_and_number_of_the_settings(global_size, local_size, num_local, num_channels):
    args = AugmentationArguments(global_crop_size=global_size, local_crop_size=local_size, num_local_crops=num_local)
    image = smooth_image(0, 50, 70, num_channels).transpose(2, 0, 1).copy()
    crops, drawn = MultiCrop(args, 0)(EncodedImage(image, Reading(num_channels)), 0, 0)
    sizes = [global_size] * 2 + [local_size] * num_local
    assert [tuple(crop.shape) for crop in crops] == [(num_channels, size, size) for size in sizes]
    assert all(crop.dtype == torch.uint8 for crop in crops)
    assert all(len(field) == len(sizes) for field in drawn)
    assert args.num_crops == len(sizes)


def test_pixels_of_crops_equal_those_of_pillow(picture, monkeypatch):
    boxes = np.array([[0, 0, 60, 80], [5, 11, 40, 44], [30, 2, 13, 9], [59, 79, 1, 1], [7, 0, 50, 40]])
    monkeypatch.setattr(augmentation, "draw_boxes", lambda *_: boxes)
    crops, _ = MultiCrop(small_args(), 0)(EncodedImage(picture, Reading(3)), 0, 0)
    for crop, box in zip(crops, boxes.tolist()):
        size = list(crop.shape[1:])
        expected = F.resized_crop(Image.fromarray(picture), *box, size, InterpolationMode.BICUBIC)
        difference = crop.int() - to_tensor(np.array(expected))[0].int()
        assert difference.abs().max() <= 1


def jpeg(picture: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=95, subsampling=0, **options)
    return file.getvalue()


@pytest.fixture
def reductions(monkeypatch) -> list[int]:
    """What images are decoded with, from here on."""
    asked, decode = [], EncodedImage.decode

    def decode_and_note(self, reduction=1):
        asked.append(reduction)
        return decode(self, reduction)

    monkeypatch.setattr(EncodedImage, "decode", decode_and_note)
    return asked


@pytest.mark.parametrize("local_size", [16, 500])
def test_large_jpegs_are_decoded_as_large_as_every_crop_needs_them(reductions, monkeypatch, local_size):
    """As large or up to twice as large: the next power of two would leave a crop with fewer pixels than it gets."""
    drawn, draw_boxes = [], augmentation.draw_boxes
    monkeypatch.setattr(augmentation, "draw_boxes", lambda *given: drawn.append(draw_boxes(*given)) or drawn[-1])
    multi_crop = MultiCrop(small_args(local_crop_size=local_size), 0)
    image = {"bytes": jpeg(smooth_image(0, 1201, 1602)), "path": None}
    for position in range(12):
        multi_crop(EncodedImage(image, Reading(3)), 0, position)
    for boxes, reduction in zip(drawn, reductions, strict=True):
        spare = boxes[:, 2:].min(1) / ([32, 32] + [local_size] * 3)
        assert reduction == 1 or (spare >= reduction).all()
        assert reduction == 8 or (spare < 2 * reduction).any()
    assert max(reductions) == (8 if local_size == 16 else 1)


@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 7, 9])
def test_crops_of_a_reduced_jpeg_are_those_of_the_whole_one(reductions, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(smooth_image(0, 901, 1203), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    multi_crop = MultiCrop(small_args(), 0)
    for position in range(8):
        reduced, _ = multi_crop(EncodedImage({"bytes": content, "path": None}, Reading(3)), 0, position)
        whole, _ = multi_crop(EncodedImage(np.array(upright), Reading(3)), 0, position)
        for crop, expected in zip(reduced, whole, strict=True):
            crop, expected = crop.float(), expected.float()
            by_a_pixel = (expected.diff(dim=1).abs().mean() + expected.diff(dim=2).abs().mean()) / 2
            assert (crop - expected).abs().mean() < 1 + by_a_pixel / 2  # boxes have moved by half a pixel at most
    assert min(reductions[::2]) >= 4


def test_jpeg_that_is_cut_off_is_broken_at_any_size():
    content = jpeg(smooth_image(0, 901, 1203))
    for reduction in (1, 2, 4, 8):
        with pytest.raises(BrokenImageError) as error:
            EncodedImage({"bytes": content[: len(content) * 2 // 3], "path": None}, Reading(3)).decode(reduction)
        assert error.value.kind == "damaged"


def test_other_files_than_jpegs_are_decoded_whole(picture):
    image = EncodedImage({"bytes": png(picture), "path": None}, Reading(3))
    np.testing.assert_array_equal(image.decode(reduction=8), picture.transpose(2, 0, 1))


def equal_crops(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def equal_draws(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_crops_of_an_epoch_are_always_the_same(picture):
    image = {"bytes": png(picture), "path": None}
    one = MultiCrop(small_args(), seed=3)
    first = one(EncodedImage(image, Reading(3)), 2, 7)
    one(EncodedImage(picture, Reading(3)), 2, 8)
    np.random.seed(1)
    torch.manual_seed(1)
    for multi_crop in (one, MultiCrop(small_args(), seed=3)):
        again = multi_crop(EncodedImage(image, Reading(3)), 2, 7)
        assert equal_crops(first, again) and equal_draws(first, again)


@pytest.mark.parametrize("seed, epoch, position", [(4, 2, 7), (3, 1, 7), (3, 2, 8)])
def test_another_seed_epoch_or_position_gives_other_crops(picture, seed, epoch, position):
    first = MultiCrop(small_args(), seed=3)(EncodedImage(picture, Reading(3)), 2, 7)
    other = MultiCrop(small_args(), seed=seed)(EncodedImage(picture, Reading(3)), epoch, position)
    assert not any(torch.equal(a, b) for a, b in zip(first[0], other[0]))
    assert not np.isclose(first[1].factors, other[1].factors).any()


def test_settings_of_photometrics_are_honoured(picture):
    settings = {
        "flip_probability": 0.0,
        "jitter_probability": 1.0,
        "grayscale_probability": 1.0,
        "brightness": 0.0,
        "contrast": 0.01,
        "saturation": 1.0,
        "hue": 0.5,
        "blur_probability": [0.0, 1.0, 0.0],
        "blur_radius": [3.0, 3.5],
        "solarize_probability": [1.0, 0.0, 1.0],
    }
    multi_crop = MultiCrop(small_args(**settings), 0)
    drawn = [multi_crop(EncodedImage(picture, Reading(3)), 0, i)[1] for i in range(40)]
    drawn = Photometrics(*(np.stack(field) for field in zip(*drawn)))
    assert not drawn.flip.any() and drawn.jitter.all() and drawn.grayscale.all()
    assert (drawn.factors[..., 0] == 1).all() and np.abs(drawn.factors[..., 1] - 1).max() <= 0.0101
    assert drawn.factors[..., 2].min() < 0.2 and drawn.factors[..., 2].max() > 1.8
    assert drawn.factors[..., 3].min() < -0.4 and drawn.factors[..., 3].max() > 0.4
    assert (drawn.blur_radius[:, [0, 2, 3, 4]] == 0).all()
    assert (3 <= drawn.blur_radius[:, 1]).all() and (drawn.blur_radius[:, 1] <= 3.5).all()
    assert drawn.solarize[:, [0, 2, 3, 4]].all() and not drawn.solarize[:, 1].any()


def test_solarize_threshold_is_honoured():
    crops = to_tensor(np.full((8, 8, 3), 150, dtype=np.uint8))
    drawn = photometrics(1, solarize=torch.tensor([True]))
    plain = {"image_mean": [0.0], "image_std": [1.0]}
    for threshold, level in ((150, 105), (151, 150)):
        args = AugmentationArguments(solarize_threshold=threshold, **plain)
        assert (augmentation.apply_photometrics(crops, drawn, args) * 255).round().unique().tolist() == [level]


# collate


@pytest.mark.parametrize("num_local", [0, 3])
def test_collate_puts_crops_and_photometrics_in_the_same_crop_major_order(num_local):
    num_crops, num_images = 2 + num_local, 4
    samples = []
    for image in range(num_images):
        names = np.array([10 * crop + image for crop in range(num_crops)])
        sizes = [6, 6] + [4] * num_local
        crops = [torch.full((3, size, size), int(name), dtype=torch.uint8) for name, size in zip(names, sizes)]
        drawn = Photometrics(
            flip=names % 2 == 0,
            jitter=names % 3 == 0,
            factors=names[:, None] + np.array([0.1, 0.2, 0.3, 0.4]),
            order=names[:, None] + np.array([3, 2, 1, 0]),
            grayscale=names % 4 == 0,
            blur_radius=names / 8,
            solarize=names % 5 == 0,
        )
        samples.append((crops, drawn))
    batch = augmentation.collate(samples)

    expected = [[10 * crop + image for crop in (0, 1) for image in range(num_images)]]
    if num_local:
        expected.append([10 * crop + image for crop in range(2, num_crops) for image in range(num_images)])
    assert len(batch.crops) == len(batch.photometrics) == len(expected)
    for crops, drawn, names, size in zip(batch.crops, batch.photometrics, expected, (6, 4)):
        names = torch.tensor(names)
        assert crops.shape == (len(names), 3, size, size) and crops.dtype == torch.uint8
        assert torch.equal(crops, names.view(-1, 1, 1, 1).expand_as(crops).to(torch.uint8))
        torch.testing.assert_close(drawn.factors, names[:, None] + torch.tensor([0.1, 0.2, 0.3, 0.4]).double())
        assert torch.equal(drawn.order, names[:, None] + torch.tensor([3, 2, 1, 0]))
        torch.testing.assert_close(drawn.blur_radius, names.double() / 8)
        for divisor, field in ((2, drawn.flip), (3, drawn.jitter), (4, drawn.grayscale), (5, drawn.solarize)):
            assert torch.equal(field, names % divisor == 0)
