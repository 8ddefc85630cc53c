"""``duallora-edge learn``: a device learns a task and finds it in its other slot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from duallora_edge.export.export import export_run
from duallora_edge.learner import Learner
from duallora_edge.runtime import Bundle, Classifier
from duallora_edge.runtime.field.store import Store
from duallora_edge.runtime.preprocess import read_image

SETTINGS = {"size": 32, "rank_orthogonal": 2, "rank_residual": 2, "summaries": 1, "epochs": 2, "min_steps": 20}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def device(image_stream: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A store in which the first task of the stream is good, and the run that learned it."""
    learner = Learner(tmp_path / "run", data=str(image_stream / "01-round"), device="cpu", **SETTINGS)
    learner.learn()
    exported = export_run(tmp_path / "run", tmp_path / "bundle", "rtx-sm86", split=True, bundle_version=7)
    store = Store.create(tmp_path / "store")
    name = store.put(exported.bundle)
    store.begin_trial(name)
    store.end_trial(name, exported.bundle.digest)
    return store.path, tmp_path / "run"


def test_a_task_learned_on_the_device(device: tuple[Path, Path], image_stream: Path, call: Call) -> None:
    store, run = device
    code, out, err = call("learn", store, run, "--data", image_stream / "02-lines", "--device", "cpu")
    assert code == 0, err
    assert out.endswith(f"Version 8 is in slot b and waits for its trial.  Store: {store}  run: {run}\n")
    bundle = Bundle.open(store / "b")
    assert bundle.manifest.classes == ("disc", "square", "cross", "ring") and bundle.manifest.bundle_version == 8
    assert (bundle.manifest.target["profile"], bundle.manifest.split, bundle.manifest.batch) == ("rtx-sm86", True, 1)
    photo = next((image_stream / "02-lines" / "test" / "ring").iterdir())
    assert Classifier.load(store / "b", "cpu", 1)(read_image(photo)).label in bundle.manifest.classes
    assert [slot.state for slot in Store(store).read().slots.values()] == ["good", "verified"]
    assert not list(store.glob(".learned-*"))


def test_wrong_input(device: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    store, run = device
    before = Store(store).read()
    code, _, err = call("learn", store, run, "--data", tmp_path / "nowhere")
    assert code == 1 and "nowhere" in err and Store(store).read() == before
    Store.create(tmp_path / "new")
    code, _, err = call("learn", tmp_path / "new", run, "--data", tmp_path)
    assert code == 1 and "give --target" in err
    code, _, err = call("learn", tmp_path / "none", run, "--data", tmp_path)
    assert code == 1 and "is not a store" in err
    shutil.rmtree(run)
