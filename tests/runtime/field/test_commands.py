"""The commands of the field: what they print and write, and one sentence for every wrong input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora_edge.runtime.preprocess import Pixels

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(images: dict[str, list[Pixels]], tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, image in enumerate(images["cross"][:7]):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def test_teach_predict_unteach(call: Call, teachable: Path, photos: Path, tmp_path: Path) -> None:
    taught = tmp_path / "taught"
    code, out, _ = call("teach", taught, "a cross", photos / "0.png", photos / "1.png")
    assert (code, out) == (0, f"Taught a cross from 2 frames.  Folder: {taught}\n")
    assert call("teach", taught, "a cross", photos)[1].startswith("Taught a cross from 7 frames.")
    code, out, err = call("predict", teachable, photos, "--taught", taught, "--no-trial")
    assert code == 0 and "taught classes: a cross" in err
    assert [line.split("\t")[1] for line in out.splitlines()].count("a cross") > 5
    code, out, _ = call("unteach", taught, "a cross")
    assert (code, out) == (0, f"Forgot a cross.  Folder: {taught}\n") and not list(taught.iterdir())
    assert "taught classes: none" in call("predict", teachable, photos, "--taught", taught, "--no-trial")[2]


@pytest.mark.parametrize(("frames", "kept"), [(10, 7), (7, 7), (4, 4), (3, 2), (1, 1)])
def test_frames_are_spread_over_a_source(call: Call, photos: Path, tmp_path: Path, frames: int, kept: int) -> None:
    assert call("teach", tmp_path / "taught", "cross", photos, "--frames", frames)[0] == 0
    found = sorted((tmp_path / "taught" / "cross").iterdir())
    assert len(found) == kept
    all_of = {Image.open(path).tobytes() for path in photos.iterdir()}
    assert {Image.open(path).tobytes() for path in found} <= all_of


def test_a_camera_is_looked_at_for_some_seconds(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from duallora_edge.runtime.field import commands
    from duallora_edge.runtime.sources import open_source

    def frames() -> object:
        for index in range(1000):
            yield np.full((8, 8, 3), index % 256, np.uint8)

    monkeypatch.setattr(commands, "open_source", lambda _: open_source(frames(), rate=100, live=True))
    _, out, _ = call("teach", tmp_path, "cross", "csi://0", "--frames", 5, "--seconds", 0.5)
    assert out.startswith("Taught cross from 5 frames.")
    values = sorted(int(np.asarray(Image.open(path)).max()) for path in (tmp_path / "cross").iterdir())
    assert len(values) == 5 and values[-1] - values[0] > 20


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("teach", "taught", "../x", "photos"), "cannot name a class"),
        (("teach", "taught", "x", "missing.png"), "does not exist"),
        (("unteach", "taught", "x"), "holds no taught class 'x'"),
        (("apply", "missing", "photos/0.png", "-o", "new"), "is not a folder"),
    ],
)
def test_wrong_input(
    call: Call, photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(photos.parent)
    code, out, err = call(*arguments)
    assert code == 1 and out == "" and reason in err and "Traceback" not in err
    assert not (photos.parent / "taught").exists() and not (photos.parent / "new").exists()
