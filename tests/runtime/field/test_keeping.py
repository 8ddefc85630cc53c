"""Kept frames: the most novel ones, no two alike, within the limit, whatever happens to the process."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from duallora_edge.errors import StoreError
from duallora_edge.runtime.field import keeping
from duallora_edge.runtime.field.keeping import FILE, Keeper, copy_kept, kept_frames, put_back, remove_kept
from duallora_edge.runtime.prediction import Prediction, Timings
from duallora_edge.runtime.preprocess import Pixels

RNG = np.random.default_rng(0)
PICTURE: Pixels = RNG.integers(0, 256, (40, 60, 3), np.uint8)
SIZE = 3000  # about what one takes


def answer(novelty: float, features: np.ndarray | None = None, version: int = 1) -> Prediction:
    made = RNG.normal(size=64).astype(np.float32) if features is None else features
    probabilities = np.array([0.9, 0.1], np.float32)
    return Prediction(
        "a", 0.9, "t", 1.0, novelty, None, Timings(0, 0, 0), "site", version, probabilities, ("a", "b"), made
    )


def novelties(folder: Path) -> list[float]:
    return [frame.novelty for frame in kept_frames(folder)]


def test_the_most_novel_are_kept(tmp_path: Path) -> None:
    values = RNG.permutation(np.linspace(0, 1, 50))
    with closing(Keeper(tmp_path, 0.03, interval_s=0)) as keeper:
        for value in values:
            keeper.add(PICTURE, answer(float(value)))
        count = len(keeper)
    assert 5 < count < 15 and novelties(tmp_path) == sorted(values, reverse=True)[:count]
    frame = next(kept_frames(tmp_path))
    with Image.open(io.BytesIO(frame.jpeg)) as image:
        assert image.size == (60, 40)
    assert (frame.bundle, frame.version, frame.label) == ("site", 1, "a") and frame.features.shape == (64,)
    assert frame.time > 1.7e9 and frame.confidence == pytest.approx(0.9)


def test_twins_are_kept_once_at_their_most_novel(tmp_path: Path) -> None:
    features = RNG.normal(size=64).astype(np.float32)
    with closing(Keeper(tmp_path, 1, interval_s=0)) as keeper:
        for novelty in (0.5, 0.7, 0.6):
            keeper.add(PICTURE, answer(novelty, 3 * features + 0.01))
        keeper.add(PICTURE, answer(0.1, features, version=2))  # features of another bundle are others
    assert novelties(tmp_path) == [0.7, 0.1]


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    features = RNG.normal(size=64).astype(np.float32)
    for novelty, expected in ((0.5, [0.5]), (0.4, [0.5]), (0.9, [0.9])):
        with closing(Keeper(tmp_path, 1, interval_s=0)) as keeper:
            keeper.add(PICTURE, answer(novelty, features))
        assert novelties(tmp_path) == expected
    with closing(Keeper(tmp_path, 0.001, interval_s=0)) as keeper:  # a lower limit
        keeper.add(PICTURE, answer(0.95))
    assert novelties(tmp_path) == []


def test_one_candidate_in_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [0.0]
    monkeypatch.setattr(keeping.time, "monotonic", lambda: moment[0])
    with closing(Keeper(tmp_path, 1, interval_s=1.0)) as keeper:
        for second, novelty in ((0.1, 0.3), (0.5, 0.8), (1.0, 0.2), (1.2, 0.1), (1.4, 0.4)):
            moment[0] = second
            keeper.add(PICTURE, answer(novelty))
    assert novelties(tmp_path) == [0.8, 0.4]  # the second one when it was closed


def test_answers_without_features_and_pictures_that_do_not_fit(tmp_path: Path) -> None:
    with closing(Keeper(tmp_path, 0.0005, interval_s=0)) as keeper:
        keeper.add(PICTURE, replace(answer(0.5), features=None))
        keeper.add(PICTURE, answer(0.5))
        assert len(keeper) == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), max_size=30), st.floats(0.001, 0.05))
def test_limits_hold_for_any_stream(stream: list[tuple[float, int]], megabytes: float) -> None:
    import tempfile

    kinds = np.eye(6, 64, dtype=np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with closing(Keeper(folder, megabytes, interval_s=0)) as keeper:
            for novelty, kind in stream:
                keeper.add(PICTURE, answer(novelty, kinds[kind]))
        frames = list(kept_frames(folder))
        assert sum(len(frame.jpeg) + frame.features.nbytes for frame in frames) <= megabytes * 1e6
        assert len({frame.features.tobytes() for frame in frames}) == len(frames)
        if stream and len(frames):
            assert frames[0].novelty == max(novelty for novelty, _ in stream)


def test_others_read_and_remove_meanwhile(tmp_path: Path) -> None:
    with (
        closing(Keeper(tmp_path, 0.03, interval_s=0)) as keeper,
        closing(Keeper(tmp_path, 0.03, interval_s=0)) as other,
    ):
        for value in np.linspace(0.1, 0.9, 9):
            keeper.add(PICTURE, answer(float(value)))
        ids = {frame.novelty: frame.id for frame in kept_frames(tmp_path)}
        remove_kept(tmp_path, [ids[max(ids)], 999])
        keeper.add(PICTURE, answer(0.05))  # there is room again
        other.add(PICTURE, answer(0.95))
        assert len(keeper) >= len(ids) and max(novelties(tmp_path)) == 0.95
    frames = list(kept_frames(tmp_path))
    assert sum(len(frame.jpeg) + frame.features.nbytes for frame in frames) <= 30_000
    assert max(ids) not in [frame.novelty for frame in frames]
    assert frames[0].id == len(ids) + 2  # no number is used twice


def test_what_is_removed_leaves_no_picture_in_the_file(tmp_path: Path) -> None:
    with closing(Keeper(tmp_path, 1, interval_s=0)) as keeper:
        for value in (0.2, 0.4):
            keeper.add(PICTURE, answer(value))
    first, second = list(kept_frames(tmp_path))
    remove_kept(tmp_path, [first.id])
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert first.jpeg[1000:1400] not in content or first.jpeg[1000:1400] in second.jpeg
    put_back(tmp_path, [first])
    assert [(frame.id, frame.jpeg, frame.time) for frame in kept_frames(tmp_path)] == [
        (frame.id, frame.jpeg, frame.time) for frame in (first, second)
    ]


def test_a_kill_before_the_table_is_there(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    assert list(kept_frames(tmp_path)) == []


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"junk" * 1000)
    with pytest.raises(StoreError, match="move it away"):
        Keeper(tmp_path, 1)
    with pytest.raises(StoreError, match="move it away"):
        list(kept_frames(tmp_path))
    with pytest.raises(StoreError, match="holds no kept frames"):
        list(kept_frames(tmp_path / "nowhere"))


KILLED = """
import sys, os, numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_keeping import PICTURE, answer
from duallora_edge.runtime.field.keeping import Keeper
keeper = Keeper(Path(sys.argv[1]), 0.03, interval_s=0)
rng = np.random.default_rng()
print("ready", flush=True)
while True:
    keeper.add(PICTURE, answer(float(rng.random())))
"""


def test_a_kill_at_any_moment_leaves_whole_frames(tmp_path: Path) -> None:
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.05 + 0.1 * RNG.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        frames = list(kept_frames(tmp_path))
        for frame in frames:
            with Image.open(io.BytesIO(frame.jpeg)) as image:
                image.load()
        assert sum(len(frame.jpeg) + frame.features.nbytes for frame in frames) <= 30_000


def test_fetching_and_deleting(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    with closing(Keeper(tmp_path / "keep", 1, interval_s=0)) as keeper:
        for novelty in (0.2, 0.9, 0.5):
            keeper.add(PICTURE, answer(novelty))
    assert call("kept", tmp_path / "keep")[1].startswith("3 frames, 0.0 MB.")
    assert len(copy_kept(tmp_path / "keep", tmp_path / "out")) == 3
    names = sorted(path.name[:4] for path in (tmp_path / "out").iterdir())
    assert names == ["0100", "0500", "0800"]
    code, out, _ = call("kept", tmp_path / "keep", "-o", tmp_path / "more", "--delete")
    assert code == 0 and out.startswith("3 frames.") and out.endswith("Deleted 3 frames.\n")
    assert call("kept", tmp_path / "keep")[1].startswith("0 frames, 0.0 MB.")
    assert (tmp_path / "keep" / FILE).stat().st_size < 20_000
    code, _, err = call("kept", tmp_path)
    assert code == 1 and "holds no kept frames" in err


def test_run_keeps_what_it_saw(
    tmp_path: Path, teachable: Path, images: dict[str, list[Pixels]], call: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, each in images.items():
        for index, image in enumerate(each[:6]):
            Image.fromarray(image).save(folder / f"{name}{index}.png")
    code, out, err = call(
        "run", teachable, "--source", folder, "--keep", tmp_path / "keep", "--no-trial", "--rate", 20, "--roi",
        "0,0,0.5,1",
    )  # fmt: skip
    assert code == 0 and len(out.splitlines()) == 24, err
    frames = list(kept_frames(tmp_path / "keep"))
    assert 1 <= len(frames) <= 4  # one in half a second
    with Image.open(io.BytesIO(frames[0].jpeg)) as image:
        assert image.width == images["disc"][0].shape[1] // 2
