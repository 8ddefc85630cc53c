"""Bundles that appear in a folder are swapped in once they are whole."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duallora_edge.files import atomic_directory, read_json, write_json
from duallora_edge.runtime import Classifier, trial
from duallora_edge.runtime.backends.ladder import Backend, open_backend
from duallora_edge.runtime.bundle import MANIFEST, MODEL, Bundle
from duallora_edge.runtime.device.probes import Answer
from duallora_edge.runtime.service.bundle_watcher import BundleWatcher
from duallora_edge.runtime.trial import engines_of

FRAME = np.full((20, 30, 3), (250, 5, 5), np.uint8)
Write = Callable[[Path, int], Path]


@pytest.fixture
def write(make_bundle: Callable[..., Path]) -> Write:
    """Put a bundle of a version into a folder, as a whole."""
    template = make_bundle("template")

    def put(folder: Path, version: int) -> Path:
        with atomic_directory(folder, replaces=[path.name for path in template.iterdir()]) as staging:
            shutil.copytree(template, staging, dirs_exist_ok=True)
            write_json(staging / MANIFEST, read_json(template / MANIFEST) | {"bundle_version": version})
        return folder

    return put


def load(folder: Path) -> Classifier:
    """Without trials, which cost a process each: two tests have them."""
    return Classifier.load(folder, "cpu", 1, trial=False)


class Watching:
    def __init__(self, classifier: Classifier, folder: Path, **options: object) -> None:
        self.classifier = classifier
        self.lines: list[str] = []
        self.watcher = BundleWatcher(classifier, folder, self.lines.append, interval_s=0.02, **options)  # type: ignore[arg-type]

    def until_said(self, lines: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.lines) < lines and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.lines) == lines, self.lines

    def version(self) -> int:
        return self.classifier(FRAME).bundle_version


@pytest.mark.parametrize("stop_first", [False, True])
def test_a_bundle_that_is_replaced(tmp_path: Path, write: Write, stop_first: bool) -> None:
    folder = write(tmp_path / "bundle", 1)
    watching = Watching(load(folder), folder, stop_first=stop_first)
    with watching.watcher:
        for lines, version in enumerate((2, 3, 2), start=1):
            write(folder, version)
            watching.until_said(lines)
            assert watching.version() == version
        time.sleep(0.1)
    assert (
        len(watching.lines) == 3
        and "swapped 'colours, version 1' (cpu in fp32) for 'colours, version 2' (cpu in fp32)" in watching.lines[0]
    )


def test_the_highest_version_of_a_folder(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "bundles"
    folder.mkdir()
    first = write(folder / "a", 5)
    watching = Watching(load(first), folder)
    with watching.watcher:
        write(folder / "b", 4)
        time.sleep(0.2)
        assert not watching.lines
        write(folder / "c", 6)
        watching.until_said(1)
        assert watching.version() == 6
        (folder / "c").rename(tmp_path / "gone")
        time.sleep(0.2)
        assert len(watching.lines) == 1 and watching.version() == 6  # nobody said that it is bad


def test_a_broken_version_does_not_hide_a_good_one(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "bundles"
    folder.mkdir()
    watching = Watching(load(write(folder / "7", 7)), folder)
    with watching.watcher:
        write(tmp_path / "9", 9)
        (tmp_path / "9" / MODEL).write_bytes(b"broken")
        write(tmp_path / "8", 8)
        (tmp_path / "9").rename(folder / "9")
        (tmp_path / "8").rename(folder / "8")
        watching.until_said(2)
        assert "9 cannot be swapped in, 'colours, version 7' goes on answering" in watching.lines[0]
        assert watching.version() == 8
        time.sleep(0.2)
        assert len(watching.lines) == 2
        shutil.copy(folder / "8" / MODEL, tmp_path / "mended")
        (tmp_path / "mended").rename(folder / "9" / MODEL)  # whole at once, since half of it would be refused again
        watching.until_said(3)
        assert watching.version() == 9


def test_a_bundle_without_its_engine_is_swapped_in_when_that_is_there(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bundles"
    folder.mkdir()
    opened = Bundle.open(write(folder / "1", 1))
    real = open_backend(opened, "cpu", 1)

    def reopen(bundle: Bundle) -> Backend:
        """As on a Jetson: with its engine a bundle runs in TensorRT, without it on the CPU."""
        return replace(real, name="tensorrt", precision="fp16") if engines_of(bundle.manifest) else real

    watching = Watching(Classifier(opened, replace(real, name="tensorrt", precision="fp16"), reopen=reopen), folder)
    with watching.watcher:
        new = write(folder / "2", 2)
        watching.until_said(1)
        assert "would run on cpu in fp32, which is slower than tensorrt in fp16; build its engine" in watching.lines[0]
        time.sleep(0.2)
        assert len(watching.lines) == 1 and watching.version() == 1
        sha256 = Bundle.peek(new).manifest.files[MODEL].sha256
        engine = tmp_path / "cache" / "engines" / "built"
        engine.mkdir(parents=True)
        write_json(engine / "engine.json", {"key": {"model_sha256": sha256}, "sha256": "1"})
        watching.until_said(2)
        assert watching.version() == 2
    swap = "swapped 'colours, version 1' (tensorrt in fp16) for 'colours, version 2' (tensorrt in fp16)"
    assert watching.lines[1].startswith(swap)


def test_a_slower_bundle_where_it_is_allowed(tmp_path: Path, write: Write) -> None:
    folder = write(tmp_path / "bundle", 1)
    opened = Bundle.open(folder)
    real = open_backend(opened, "cpu", 1)
    classifier = Classifier(opened, replace(real, name="cuda"), reopen=lambda bundle: real)
    watching = Watching(classifier, folder, allow_slower=True)
    with watching.watcher:
        write(folder, 2)
        watching.until_said(1)
    assert "'colours, version 1' (cuda in fp32) for 'colours, version 2' (cpu in fp32)" in watching.lines[0]
    swap = watching.classifier.health().last_swap
    assert swap is not None and (swap.backend_before, swap.backend_after) == ("cuda in fp32", "cpu in fp32")


def test_a_link_that_is_turned_round(tmp_path: Path, write: Write) -> None:
    link, one, two = tmp_path / "current", write(tmp_path / "1", 1), write(tmp_path / "2", 2)
    link.symlink_to(one)
    watching = Watching(load(link), link)
    with watching.watcher:
        (tmp_path / "next").symlink_to(two)
        (tmp_path / "next").replace(link)
        watching.until_said(1)
        assert watching.version() == 2


def test_a_copy_in_progress_and_a_refused_bundle(tmp_path: Path, write: Write) -> None:
    folder = write(tmp_path / "bundle", 1)
    watching = Watching(Classifier.load(folder, "cpu", 1), folder)
    with watching.watcher:
        model = (folder / MODEL).read_bytes()
        (folder / MODEL).write_bytes(model[:100])
        time.sleep(0.2)
        assert not watching.lines  # the bundle that answers was read; what became of its files is another matter
        write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"bundle_version": 2})
        watching.until_said(1)
        assert "cannot be swapped in, 'colours, version 1' goes on answering" in watching.lines[0]
        time.sleep(0.2)
        assert len(watching.lines) == 1 and watching.version() == 1
        (folder / MODEL).write_bytes(model)
        watching.until_said(2)


def test_a_newer_bundle_that_is_there_from_the_start(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "bundles"
    folder.mkdir()
    first = write(folder / "1", 1)
    write(folder / "2", 2)
    watching = Watching(load(first), folder)
    with watching.watcher:
        watching.until_said(1)
    assert watching.version() == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"bundle_version": "9"}', b"\xff"])
def test_what_is_no_bundle(tmp_path: Path, write: Write, content: bytes) -> None:
    folder = tmp_path / "bundles"
    watching = Watching(load(write(tmp_path / "first", 1)), folder)
    with watching.watcher:
        (folder / "odd").mkdir(parents=True)
        (folder / "odd" / MANIFEST).write_bytes(content)
        write(folder / ".hidden", 3)
        write(folder / "whole", 2)
        watching.until_said(1)
        assert watching.version() == 2


def test_a_trial_is_ended_with_the_watcher(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "bundle", 1)
    watching = Watching(Classifier.load(folder, "cpu", 1), folder)
    (tmp_path / "endless.py").write_text("import time\ndef attempt(*words): time.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trial, "QUESTION", "endless:attempt")
    asked, real = threading.Event(), trial.ask

    def ask(*words: Any, **limits: Any) -> Answer:
        asked.set()
        return real(*words, **limits)

    monkeypatch.setattr(trial, "ask", ask)
    with watching.watcher:
        write(folder, 1000)
        assert asked.wait(60)
    assert not watching.watcher.is_stuck and not watching.lines and watching.version() == 1
