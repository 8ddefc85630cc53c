"""Teaching a classifier: at once, kept, taken over by others and by later bundles, and taken back without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import BundleError, DataError
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.field import lessons
from duallora_edge.runtime.field.taught_folder import (
    MAX_FRAMES,
    MAX_SIDE,
    add_frames,
    reduced,
    remove_class,
    taught_images,
)
from duallora_edge.runtime.preprocess import Pixels

Images = dict[str, list[Pixels]]
Load = Callable[..., Classifier]


@pytest.fixture
def load(teachable: Path) -> Load:
    return lambda bundle=teachable, **more: Classifier.load(bundle, "cpu", 1, trial=False, **more)


def labels(classifier: Classifier, images: list[Pixels]) -> list[str]:
    return [prediction.label for prediction in classifier.batch(images)]


def share(classifier: Classifier, name: str, images: Images) -> float:
    return float(np.mean([label == name for label in labels(classifier, images[name][5:])]))


def answers(classifier: Classifier, images: Images) -> bytes:
    found = [p for each in images.values() for p in classifier.batch(each)]
    return b"".join(p.probabilities.tobytes() + np.float32(p.novelty).tobytes() for p in found)


def test_teach_and_unteach(load: Load, images: Images) -> None:
    classifier = load()
    before = answers(classifier, images)
    assert classifier.teach("cross", images["cross"][:3]) == 3
    assert classifier.teach("cross", images["cross"][3:5]) == 5
    assert classifier.taught == ("cross",) and classifier.classes[-1] == "cross" and classifier.tasks[-1] == "taught"
    assert share(classifier, "cross", images) > 0.8 and share(classifier, "disc", images) > 0.8
    prediction = classifier(images["cross"][-1])
    assert (prediction.task, prediction.top(1)[0][0]) == ("taught", "cross")
    assert classifier.health().taught == ("cross",)
    classifier.teach("ring", images["ring"][:5])
    assert share(classifier, "ring", images) > 0.8
    for name in ("cross", "ring"):
        classifier.unteach(name)
    assert answers(classifier, images) == before and classifier.classes == ("disc", "square")


def test_taught_classes_are_kept_and_taken_over(load: Load, images: Images, tmp_path: Path) -> None:
    teacher = load(taught=tmp_path / "taught")
    watching = load(taught=tmp_path / "taught")
    assert not watching.refresh_taught()
    teacher.teach("cross", images["cross"][:5])
    assert not teacher.refresh_taught()  # its own change
    assert watching.refresh_taught() and watching.taught == ("cross",)
    expected = answers(teacher, images)
    assert answers(watching, images) == expected == answers(load(taught=tmp_path / "taught"), images)
    assert len(taught_images(tmp_path / "taught")["cross"]) == 5
    shutil.rmtree(tmp_path / "taught" / "cross")  # what is there counts, however it came there
    assert watching.refresh_taught() and watching.taught == ()
    shutil.copytree(tmp_path / "taught", tmp_path / "other")


def test_a_new_bundle_is_taught_again_and_knows_better(load: Load, runs: tuple[Path, Path], images: Images) -> None:
    classifier = load()
    classifier.teach("cross", images["cross"][:5])
    classifier.teach("star", images["ring"][:5])
    classifier.swap(runs[1], probation=0)
    assert classifier.taught == ("star",)  # cross was learned
    assert classifier.classes == ("disc", "square", "cross", "ring", "star")
    assert share(classifier, "cross", images) > 0.8
    classifier.swap(runs[0], probation=0)
    assert classifier.taught == ("cross", "star") and share(classifier, "cross", images) > 0.8


def test_the_old_bundle_is_taught_what_was_taught_meanwhile(
    load: Load, runs: tuple[Path, Path], images: Images
) -> None:
    classifier = load()
    classifier.swap(runs[1], budget_ms=0.0, probation=1)
    classifier.teach("star", images["ring"][:5])
    classifier(images["disc"][0])  # too slow: back to the old one
    assert classifier.health().last_swap.state == "returned" and classifier.classes == ("disc", "square", "star")


def test_a_bundle_that_cannot_be_taught(shared_bundle: Path, images: Images, tmp_path: Path) -> None:
    add_frames(tmp_path, "cross", images["cross"][:2])
    classifier = Classifier.load(shared_bundle, "cpu", 1, trial=False, taught=tmp_path)
    assert "cannot be taught" in str(classifier.health().taught_error) and classifier.taught == ()
    assert classifier.health().taught_line.startswith("taught classes cannot answer: ")
    with pytest.raises(BundleError, match="cannot be taught"):
        classifier.teach("ring", images["ring"][:1])
    assert list(taught_images(tmp_path)) == ["cross"]


@pytest.mark.parametrize(
    ("name", "count", "reason"),
    [
        ("disc", 1, "knows 'disc' already"),
        ("star", 0, "No frames"),
        ("", 1, "cannot name a class"),
        (" x", 1, "cannot name a class"),
        (".x", 1, "cannot name a class"),
        ("../x", 1, "cannot name a class"),
        ("a/b", 1, "leave out slashes"),
        ("a\nb", 1, "cannot name a class"),
        ("x" * 101, 1, "cannot name a class"),
    ],
)
def test_what_cannot_be_taught(load: Load, images: Images, tmp_path: Path, name: str, count: int, reason: str) -> None:
    classifier = load(taught=tmp_path / "taught")
    before = answers(classifier, images)
    with pytest.raises(DataError, match=reason):
        classifier.teach(name, images["ring"][:count])
    assert answers(classifier, images) == before and not (tmp_path / "taught").exists()


def test_nothing_is_taught_that_cannot_be_kept(
    load: Load, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = load(taught=tmp_path / "taught")
    classifier.teach("cross", images["cross"][:5])
    before = answers(classifier, images)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lessons, "add_frames", full)
    for name in ("ring", "cross"):
        with pytest.raises(OSError, match="No space"):
            classifier.teach(name, images["ring"][:5])
    assert answers(classifier, images) == before and classifier.taught == ("cross",)


def test_unteach_leaves_what_others_put_there(load: Load, images: Images, tmp_path: Path) -> None:
    classifier = load(taught=tmp_path)
    classifier.teach("cross", images["cross"][:2])
    (tmp_path / "cross" / "notes.txt").write_text("mine")
    classifier.unteach("cross")
    assert (tmp_path / "cross" / "notes.txt").read_text() == "mine" and classifier.taught == ()
    classifier.teach("cross", images["cross"][:2])
    photo = tmp_path / "cross" / "photo.png"
    shutil.copy(next((tmp_path / "cross").glob("*.png")), photo)
    with pytest.raises(DataError, match="still holds images that were not taught here"):
        classifier.unteach("cross")
    assert photo.exists()
    with pytest.raises(DataError, match="there are: cross"):
        classifier.unteach("ring")
    with pytest.raises(DataError, match="there are: none"):
        load().unteach("ring")


def test_a_damaged_image_is_said_and_the_bundle_answers(load: Load, images: Images, tmp_path: Path) -> None:
    add_frames(tmp_path, "cross", images["cross"][:2])
    (tmp_path / "cross" / "broken.png").write_bytes(b"junk")
    classifier = load(taught=tmp_path)
    assert "broken.png" in str(classifier.health().taught_error) and classifier.taught == ()
    (tmp_path / "cross" / "broken.png").unlink()
    assert classifier.refresh_taught() and classifier.taught == ("cross",) and not classifier.health().taught_error


def test_teaching_while_others_call(load: Load, images: Images) -> None:
    classifier, done, wrong = load(), threading.Event(), list[Exception]()

    def call() -> None:
        try:
            while not done.is_set():
                prediction = classifier(images["disc"][0])
                assert len(prediction.probabilities) == len(prediction.classes)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        classifier.teach("cross", images["cross"][:2])
        classifier.unteach("cross")
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_folder_has_limits(tmp_path: Path, images: Images) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (MAX_FRAMES + 1, 8, 8, 3), np.uint8)
    assert add_frames(tmp_path, "cross", [*noise[:2], noise[0]]) == 2  # the same frame once
    with pytest.raises(DataError, match="more than 200 frames"):
        add_frames(tmp_path, "cross", noise[2:])
    for number in range(63):
        add_frames(tmp_path, f"c{number}", noise[:1])
    with pytest.raises(DataError, match="64 taught classes already"):
        add_frames(tmp_path, "one more", noise[:1])
    large = np.zeros((700, 1400, 3), np.uint8)
    assert reduced(large).shape == (320, MAX_SIDE, 3)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from duallora_edge.runtime.field.taught_folder import add_frames, remove_class
folder, stop, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
frames, count = list(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)), 0
def audit(event, arguments):
    global count
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and "taught" in str(arguments):
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
add_frames(folder, "mug", frames) if what == "teach" else remove_class(folder, "mug")
"""


@pytest.mark.parametrize("what", ["teach", "unteach"])
def test_a_kill_leaves_a_class_whole_and_can_be_repeated(tmp_path: Path, what: str) -> None:
    frames = list(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8))
    folder = tmp_path / "taught"
    for stop in range(1, 60):
        shutil.rmtree(folder, ignore_errors=True)
        if what == "unteach":
            add_frames(folder, "mug", frames)
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(stop), what],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            check=False,
        )
        found = len(taught_images(folder).get("mug", []))
        assert found in ((0, 5) if what == "teach" else range(6))
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-500:]
        if what == "teach":
            assert add_frames(folder, "mug", frames) == 5
        elif found:
            remove_class(folder, "mug")
            assert taught_images(folder) == {}
    assert stop > 4 and child.returncode == 0
