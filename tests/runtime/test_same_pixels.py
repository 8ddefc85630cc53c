"""A picture reaches the model as it did in training, whatever source it comes from.

Exactly where the pixels are the same. A video codec that stores colour as luma and chroma rounds twice: at most
`CODEC_TOLERANCE` levels of 255, with a codec that is lossless otherwise.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duallora_edge.learner.data import open_stream, prepare
from duallora_edge.runtime import Classifier, open_source
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.runtime.preprocess import Pixels

CODEC_TOLERANCE = 3
WIDTH, HEIGHT = 96, 72


@pytest.fixture
def picture() -> Pixels:
    """A smooth picture, as cameras give them: colour in blocks is halved in resolution by most codecs."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = [120 + 100 * np.sin(x / 17 + y / 29 + phase) for phase in (0.0, 1.3, 2.1)]
    return np.stack(channels, axis=2).round().astype(np.uint8)


@pytest.fixture
def trained_on(picture: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_bundle: Path) -> Pixels:
    """What the learner makes of the picture."""
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))
    for label in ("a", "b"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        pixels = picture if label == "a" else 255 - picture
        Image.fromarray(pixels).save(folder / "0.png")
        Image.fromarray(np.roll(pixels, 7, axis=1)).save(folder / "1.png")
    stream = open_stream(str(tmp_path / "images"), validation_fraction=0.0, test_fraction=0.0)
    (task,) = prepare(stream, Bundle.open(shared_bundle).manifest.preprocessing).tasks
    return np.asarray(task.train.pixels[0])


def folder(picture: Pixels, path: Path) -> Any:
    Image.fromarray(picture).save(path / "picture.png")
    return path


def array(picture: Pixels, path: Path) -> Any:
    return [picture]


def sixteen_bits(picture: Pixels, path: Path) -> Any:
    return [picture.astype(np.uint16) * 257]


def with_alpha(picture: Pixels, path: Path) -> Any:
    return [np.dstack([picture, np.full((HEIGHT, WIDTH), 255, np.uint8)])]


def pipeline(picture: Pixels, path: Path) -> Any:
    if shutil.which("gst-launch-1.0") is None:
        pytest.skip("gst-launch-1.0 is not installed")
    file = folder(picture, path) / "picture.png"
    return f"gst://filesrc location={shlex.quote(str(file))} ! pngdec?width={WIDTH}&height={HEIGHT}"


def video(picture: Pixels, path: Path) -> Any:
    cv2 = pytest.importorskip("cv2")
    file = path / "picture.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"FFV1"), 10, (WIDTH, HEIGHT))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write FFV1")
    for _ in range(3):
        writer.write(picture[:, :, ::-1])
    writer.release()
    return file


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(folder, 0), (array, 0), (sixteen_bits, 0), (with_alpha, 0), (pipeline, 0), (video, CODEC_TOLERANCE)],
)
def test_the_pixels_of_training(
    picture: Pixels,
    trained_on: Pixels,
    shared_bundle: Path,
    tmp_path: Path,
    make: Callable[[Pixels, Path], Any],
    tolerance: int,
) -> None:
    classifier = Classifier.load(shared_bundle, "cpu", 1, trial=False)
    (tmp_path / "source").mkdir()
    live = False if make is pipeline else None
    with open_source(make(picture, tmp_path / "source"), live=live) as source:
        frame = next(iter(source))
    image = classifier.prepare(frame).image
    assert image.shape == trained_on.shape
    assert np.abs(image.astype(int) - trained_on).max() <= tolerance
