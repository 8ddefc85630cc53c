from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from duallora_edge.learner.data.augment import _crops, _jitter, _resample, random_views  # noqa: E402


def batch(count: int = 6, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def viewed(images: torch.Tensor, flip: bool = False, seed: int = 0) -> torch.Tensor:
    draws = torch.rand(len(images), 8, generator=torch.Generator().manual_seed(seed))
    return random_views(images, draws, flip=flip)


def test_flip_mirrors_some_views_and_nothing_else() -> None:
    images = batch(40)
    plain, flipped = viewed(images), viewed(images, flip=True)
    mirrored = torch.rand(40, 8, generator=torch.Generator().manual_seed(0))[:, 0] < 0.5
    assert 8 < int(mirrored.sum()) < 32
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    torch.testing.assert_close(flipped[mirrored].int(), plain[mirrored].flip(2).int(), rtol=0, atol=1)  # rounding


def test_views_are_deterministic_differ_from_the_images_and_keep_the_type() -> None:
    images = batch()
    result = viewed(images)
    assert result.dtype == torch.uint8 and result.shape == images.shape and result.is_contiguous()
    assert torch.equal(result, viewed(images))
    assert not torch.equal(result, viewed(images, seed=1))
    assert all(not torch.equal(row, image) for row, image in zip(result, images, strict=True))


def test_an_image_does_not_see_its_neighbours() -> None:
    images = batch()
    others = torch.cat([images[:1], 255 - images[1:]])
    assert torch.equal(viewed(images)[0], viewed(others)[0])


def test_crops_stay_inside_and_keep_the_area() -> None:
    draws = torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
    maps = _crops(draws, torch.arange(500) % 2 == 0)
    width, height = maps[:, 0, 0].abs(), maps[:, 1, 1]
    assert torch.equal(maps[:, 0, 0] < 0, torch.arange(500) % 2 == 0)
    assert float((maps[:, 0, 2].abs() + width).max()) <= 1 + 1e-6
    assert float((maps[:, 1, 2].abs() + height).max()) <= 1 + 1e-6
    assert float((width * height).max()) <= 1 + 1e-6
    assert float((width * height).min()) >= 0.6  # 0.7, less what a clamped side cuts off


def slow_resample(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Bilinear sampling, one output pixel at a time; pixel i covers [2i/S - 1, 2(i+1)/S - 1]."""
    size = image.shape[0]
    out = np.zeros_like(image)
    for row in range(size):
        for column in range(size):
            place = affine @ np.array([(2 * column + 1) / size - 1, (2 * row + 1) / size - 1, 1])
            x, y = np.clip(((place + 1) * size - 1) / 2, 0, size - 1)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[row, column] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def slow_jitter(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    brightness, contrast, saturation = 0.8 + 0.4 * draws
    image = image * brightness
    luma = np.array([0.299, 0.587, 0.114])
    mean = (image @ luma).mean()
    image = mean + (image - mean) * contrast
    grey = (image @ luma)[:, :, None]
    return grey + (image - grey) * saturation


def test_against_slow_versions() -> None:
    images = batch(4, 9).double().permute(0, 3, 1, 2)
    draws = torch.rand(4, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    maps = _crops(draws[:, :4], torch.tensor([True, False, True, False])).double()
    result = _jitter(_resample(images, maps), draws[:, 4:]).permute(0, 2, 3, 1).numpy()
    for index in range(4):
        view = slow_resample(images[index].permute(1, 2, 0).numpy(), maps[index].numpy())
        np.testing.assert_allclose(result[index], slow_jitter(view, draws[index, 4:].numpy()), atol=1e-3)


def test_rows_of_a_batch_look_as_in_the_whole() -> None:
    images, draws = batch(), torch.rand(6, 8, generator=torch.Generator().manual_seed(3))
    whole = random_views(images, draws, flip=True)
    assert torch.equal(random_views(images[2:5], draws[2:5], flip=True), whole[2:5])
