"""The script that made the embedded backbone, on a teacher with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn

from duallora_edge.learner.embedded import train


@pytest.fixture(scope="module")
def teacher() -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(train.TEACHER, img_size=train.TEACHER_SIZE)
    return cast(VisionTransformer, model.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of two batches of two views, seen twice: four steps."""
    for name, value in {"BATCH": 2, "POOL": 4, "PASSES": 2, "STEPS_A_POOL": 4, "DECAY": 4, "WARM_UP": 2}.items():
        monkeypatch.setattr(train, name, value)


def test_paths_are_split_without_overlap(tmp_path: Path) -> None:
    for name in [f"{index:02}.png" for index in range(25)] + ["notes.txt"]:
        (tmp_path / name).touch()
    paths = train.image_paths(tmp_path)
    known, held_back = train.split(paths)
    assert [path.name for path in held_back] == ["00.png", "10.png", "20.png"]
    assert sorted(known + held_back) == paths
    assert len(known) == 22


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="holds no images"):
        train.image_paths(tmp_path)


def test_images_are_decoded_at_the_size_asked_for(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30, 3), (255, 128, 0), np.uint8)).save(tmp_path / "a.png")
    images = train.load_images([tmp_path / "a.png"], 16)
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images[0, :, 5, 5].tolist() == [255, 128, 0]


def test_student_starts_as_a_part_of_the_teacher(teacher: VisionTransformer) -> None:
    student = train.initialise(teacher)
    wanted = teacher.state_dict()
    for name, value in student.state_dict().items():
        if name not in ("patch_embed.proj.weight", "pos_embed"):
            assert torch.equal(value, wanted[name]), name


def test_patch_embedding_agrees_on_the_half_size_image(teacher: VisionTransformer) -> None:
    """An image that is smooth within a patch gives nearly the same tokens at both sizes."""
    student = train.initialise(teacher)
    ramp = torch.linspace(-1, 1, 128).expand(1, 3, 128, 128)
    large = teacher.patch_embed(ramp)
    small = student.patch_embed(nn.functional.avg_pool2d(ramp, 2))
    assert (large - small).norm() < 0.1 * large.norm()


@pytest.mark.parametrize("seed", range(5))
def test_views_are_reproducible_and_in_range(images: Tensor, seed: int) -> None:
    first, again, other = (
        train.random_views(images, torch.Generator().manual_seed(value)) for value in (seed, seed, seed + 100)
    )
    assert first.shape == images.shape
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1e-5), (49, 5e-4), (99, 1e-3), (2000, 1e-3), (3840, 1e-3), (4320, 5e-4), (4799, 1e-3 / 960)],
)
def test_learning_rate(step: int, rate: float) -> None:
    assert train.learning_rate(step, 4800) == pytest.approx(rate)


def test_loss_matches_a_slow_second_version() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = train.statistics(teacher)
    means = []
    for row, positions in enumerate(([0], [1, 2, 3])):
        values = []
        for image in range(3):
            for position in positions:
                for channel in range(5):
                    a, b = student[image, position, channel], teacher[image, position, channel]
                    x = abs(float((a - b) / std[row, channel]))
                    values.append(0.5 * x * x if x < 1 else x - 0.5)
        means.append(np.mean(values))
    assert float(train.distillation_loss(student, teacher, mean, std)) == pytest.approx(sum(means), rel=1e-5)
    assert float(train.distillation_loss(teacher, teacher, mean, std)) == 0
    assert torch.allclose(std[0], teacher[:, 0].std(0))


@pytest.mark.usefixtures("small_pool")
def test_stopped_and_resumed_equals_uninterrupted(
    teacher: VisionTransformer, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "PASSES", 1)
    monkeypatch.setattr(train, "STEPS_A_POOL", 2)
    whole, stopped, resumed = (train.initialise(teacher) for _ in range(3))
    train.distil(whole, teacher, images, 2, 0, tmp_path / "whole.safetensors")

    def save_and_stop(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    save_checkpoint = train.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", save_and_stop)
        train.distil(stopped, teacher, images, 2, 0, tmp_path / "part.safetensors")
    train.distil(resumed, teacher, images, 2, 0, tmp_path / "part.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert not torch.equal(value, stopped.state_dict()[name]), name


@pytest.mark.usefixtures("small_pool")
def test_distilling_brings_the_student_nearer(teacher: VisionTransformer, images: Tensor, tmp_path: Path) -> None:
    student = train.initialise(teacher)
    views, wanted = train.new_pool(0, images, teacher, 0)
    mean, std = train.statistics(wanted)

    def loss() -> float:
        with torch.no_grad():
            return float(train.distillation_loss(train.tokens(student, views), wanted, mean, std))

    before = loss()
    train.distil(student, teacher, images, 2, 0, tmp_path / "checkpoint.safetensors")
    assert loss() < 0.9 * before
