"""Bundles that appear in a folder are swapped in once they are whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.files import atomic_directory, read_json, write_json
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.bundle import MANIFEST, MODEL
from duallora_edge.runtime.watch import BundleWatcher, newest_bundle

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


class Watching:
    def __init__(self, classifier: Classifier, folder: Path, **options: object) -> None:
        self.classifier = classifier
        self.lines: list[str] = []
        self.watcher = BundleWatcher(classifier, folder, self.lines.append, interval_s=0.02, **options)  # type: ignore[arg-type]

    def until_said(self, lines: int) -> None:
        deadline = time.monotonic() + 10
        while len(self.lines) < lines and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.lines) == lines, self.lines

    def version(self) -> int:
        return self.classifier(FRAME).bundle_version


@pytest.mark.parametrize("stop_first", [False, True])
def test_a_bundle_that_is_replaced(tmp_path: Path, write: Write, stop_first: bool) -> None:
    folder = write(tmp_path / "bundle", 1)
    watching = Watching(Classifier.load(folder, "cpu", 1), folder, stop_first=stop_first)
    with watching.watcher:
        for lines, version in enumerate((2, 3, 2), start=1):
            write(folder, version)
            watching.until_said(lines)
            assert watching.version() == version
        time.sleep(0.1)
    assert len(watching.lines) == 3 and "swapped 'colours, version 1' for 'colours, version 2'" in watching.lines[0]


def test_the_highest_version_of_a_folder(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "bundles"
    folder.mkdir()
    first = write(folder / "a", 5)
    watching = Watching(Classifier.load(first, "cpu", 1), folder)
    with watching.watcher:
        write(folder / "b", 4)
        time.sleep(0.2)
        assert not watching.lines
        write(folder / "c", 6)
        watching.until_said(1)
        assert watching.version() == 6
        # As a whole, as it came: what a slow removal leaves half-way would be tried, refused and said.
        (folder / "c").rename(tmp_path / "gone")
        watching.until_said(2)
        assert watching.version() == 5


def test_a_link_that_is_turned_round(tmp_path: Path, write: Write) -> None:
    link, one, two = tmp_path / "current", write(tmp_path / "1", 1), write(tmp_path / "2", 2)
    link.symlink_to(one)
    watching = Watching(Classifier.load(link, "cpu", 1), link)
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
    watching = Watching(Classifier.load(first, "cpu", 1), folder)
    with watching.watcher:
        watching.until_said(1)
    assert watching.version() == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"bundle_version": "9"}', b"\xff"])
def test_what_is_no_bundle(tmp_path: Path, write: Write, content: bytes) -> None:
    assert newest_bundle(tmp_path / "bundles") is None
    (tmp_path / "bundles" / "odd").mkdir(parents=True)
    (tmp_path / "bundles" / "odd" / MANIFEST).write_bytes(content)
    assert newest_bundle(tmp_path / "bundles") is None
    whole = write(tmp_path / "bundles" / "whole", 1)
    write(tmp_path / "bundles" / ".hidden", 2)
    assert newest_bundle(tmp_path / "bundles") == whole
