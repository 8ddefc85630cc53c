"""The transform for other data loaders: the pixels of the runtime and the values of the backbone, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from duallora_edge.errors import DataError
from duallora_edge.learner import Learner
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.transform import Transform
from duallora_edge.runtime import read_image
from duallora_edge.runtime.preprocess import Preprocessing

SHAPES = [(32, 32), (7, 90), (33, 32), (65, 65), (131, 200), (480, 641), (32, 32, 1), (40, 50, 1), (97, 55, 4)]


def random_image(shape: tuple[int, ...]) -> np.ndarray:
    channels = shape[2:] or (3,)
    return np.random.default_rng(shape[0]).integers(0, 256, (*shape[:2], *channels), np.uint8)


@pytest.fixture
def backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    """With a normalisation whose numbers are not exact in float32."""
    made = make_backbone()
    info = replace(made.info, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return Backbone(made.model, info, 32)


@pytest.mark.parametrize("gap", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_it_is_what_the_backbone_reads(backbone: Backbone, resize: str, interpolation: str, gap: float) -> None:
    preprocessing = Preprocessing(32, resize, interpolation, gap)
    transform = pickle.loads(pickle.dumps(Transform(preprocessing, backbone.info.mean, backbone.info.std)))
    for shape in SHAPES:
        image = random_image(shape)
        rgb = image[:, :, :3] if shape[2:] != (1,) else image.repeat(3, axis=2)
        values = transform(image)
        if shape[2:] != (4,):  # laid over white
            expected = backbone.normalised(torch.from_numpy(preprocessing(rgb).copy())[None])[0]
            assert torch.equal(values, expected)
        assert values.dtype == torch.float32 and values.shape == (3, 32, 32)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_learner_has_that_of_its_run(backbone: Backbone, tmp_path: Path, resize: str) -> None:
    RunDirectory.create(tmp_path / "run", TrainConfig(resize=resize), backbone.info)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.fromarray(random_image((80, 120))).save(tmp_path / "photos" / "cat" / "0.png")
    transform = Learner(tmp_path / "run").transform()
    values, _ = ImageFolder(tmp_path / "photos", transform=transform, loader=read_image)[0]
    pixels = Preprocessing(32, resize)(random_image((80, 120)))
    assert torch.equal(values, backbone.normalised(torch.from_numpy(pixels.copy())[None])[0])


def test_an_image_of_pillow_is_refused(backbone: Backbone) -> None:
    transform = Transform(Preprocessing(32), backbone.info.mean, backbone.info.std)
    with pytest.raises(DataError, match="takes an array, not Image; read images with read_image"):
        transform(Image.new("P", (40, 40)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="A frame must be uint8 or uint16"):
        transform(np.zeros((40, 40, 3), np.float32))  # type: ignore[arg-type]
