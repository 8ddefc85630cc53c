"""Fixtures of all tests: a small random backbone, generated images, tasks learned from them, and the real images."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from PIL import Image

from duallora_edge.cli import main
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig

# PyTorch is imported by what uses it: the process that only hands out the tests does not.
if TYPE_CHECKING:
    import torch

    from duallora_edge.learner.data import PreparedTask
    from duallora_edge.learner.network.backbone import Backbone
    from duallora_edge.learner.network.task_record import TaskRecord

Pixels = npt.NDArray[np.uint8]

# No test asserts how long something takes, a shared machine least of all.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

QUICK = TrainConfig(
    device="cpu", precision="fp32", rank_orthogonal=4, rank_residual=4, epochs=1, min_steps=6, batch_size=16
)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: PyTorch alone makes each `gc.collect` take half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter clean up as usual; libraries print what they believe to leak otherwise."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def pixel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decoded images go to a temporary folder, never into the cache of the user."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALLORA_EDGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes from one fork server, which spares each of them the imports: 12 s of CPU time."""
    context = multiprocessing.get_context("forkserver")
    # Named one by one, since commands import them late.
    learner = ("train", "learner", "terminal", "methods.learning", "report.comparison")
    names = [f"duallora_edge.learner.{name}" for name in learner]
    context.set_forkserver_preload(["duallora_edge.export.graph", *names])
    return context


@pytest.fixture
def few_random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2000 random features the classifier `ridge` needs seconds a task."""
    from duallora_edge.learner.network import task_record
    from duallora_edge.learner.statistics import ridge

    for module in (ridge, task_record):
        monkeypatch.setattr(module, "RANDOM_FEATURES", 200)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real images and weights."""
    folder = os.environ.get("DUALLORA_EDGE_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DUALLORA_EDGE_ASSETS names no folder with the real images and weights")
    return Path(folder)


@pytest.fixture(scope="session")
def make_backbone() -> Callable[..., Backbone]:
    """``make_backbone(**variant)``: a random `VisionTransformer` of 32 px, 4 blocks and width 48, 2 blocks frozen.

    Every parameter is disturbed, so that norms, scales and biases that start as 1 or 0 show up in the output.
    """
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from duallora_edge.learner.network.backbone import Backbone
    from duallora_edge.learner.network.backbone_info import BackboneInfo

    def make(**variant: Any) -> Backbone:
        torch.manual_seed(0)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
        model = VisionTransformer(**{**shape, **variant})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        half = (0.5, 0.5, 0.5)
        return Backbone(model, BackboneInfo("tiny", "0" * 64, 32, half, half, "bicubic", 2, (0, 1)), 32)

    return make


@pytest.fixture(scope="session")
def tiny_backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone()


def draw_shapes(kind: int, count: int, side: int, seed: int) -> Pixels:
    """``count`` noisy images uint8 [count, side, side, 3] of class ``kind``: its shape in its colour, somewhere."""
    rng = np.random.default_rng((kind, seed))
    rows, columns = np.mgrid[:side, :side] / side
    colour = np.array([(kind * 97 + 40) % 200, (kind * 53 + 120) % 200, (kind * 151 + 10) % 200]) + 55
    images = rng.integers(0, 60, (count, side, side, 3))
    for image in images:
        y, x = rng.uniform(0.35, 0.65, 2)
        dy, dx = np.abs(rows - y), np.abs(columns - x)
        mask = (dy**2 + dx**2 < 0.08, np.maximum(dy, dx) < 0.25, (dy < 0.1) | (dx < 0.1))[kind % 3]
        image[mask] = colour + rng.integers(-20, 20, 3)
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., PreparedTask]:
    """``make_task("a", ["red", "blue"], kinds=[0, 1])``: a task of 32 px images; ``kinds`` are their looks."""
    from duallora_edge.learner.data import PixelSet, PreparedTask

    def make(
        name: str, classes: Sequence[str], kinds: Sequence[int], *, train: int = 12, validation: int = 4, seed: int = 0
    ) -> PreparedTask:
        def images(count: int, split: int) -> PixelSet:
            parts = [draw_shapes(kind, count, 32, 3 * seed + split) for kind in kinds]
            return PixelSet(np.concatenate(parts), tuple(label for label in classes for _ in range(count)))

        return PreparedTask(name, images(train, 0), images(validation, 1), images(4, 2), digest=f"{name}-{seed}")

    return make


def stored(record: TaskRecord) -> TaskRecord:
    """The record as it reads back from disk."""
    from duallora_edge.learner.network.task_record import TaskRecord

    return TaskRecord.from_tensors(record.info, record.tensors())


class NoCheckpoint:
    """Training that keeps nothing on the way."""

    def load(self) -> None:
        return None

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        pass


@pytest.fixture(scope="session")
def learn(tiny_backbone: Backbone) -> Callable[..., list[TaskRecord]]:
    """``learn(tasks, past=[], **settings)``: the records of ``past`` and of the tasks, learned one after the other."""
    from duallora_edge.learner.methods import learn_task

    def run(
        tasks: Sequence[PreparedTask],
        past: Sequence[TaskRecord] = (),
        backbone: Backbone = tiny_backbone,
        checkpoint: Any = None,
        **settings: Any,
    ) -> list[TaskRecord]:
        records = list(past)
        for task in tasks:
            config = replace(QUICK, **settings)
            record = learn_task(backbone, records, task, config, checkpoint or NoCheckpoint(), Callback())
            records.append(stored(record))
        return records

    return run


@pytest.fixture(scope="session")
def two_tasks(make_task: Callable[..., PreparedTask], learn: Callable[..., list[TaskRecord]]) -> list[TaskRecord]:
    """Two tasks of two classes each, learned with isolated residuals."""
    tasks = [make_task("first", ["a", "b"], [0, 1]), make_task("second", ["c", "d"], [2, 3])]
    return learn(tasks, residual="isolated")


def write_task(folder: Path, kinds: dict[str, int], train: int = 10, test: int = 4, seed: int = 0) -> Path:
    """Write ``folder/{train,test}/<class>/NN.png``: generated images of 64 px; returns the folder."""
    for offset, (split, count) in enumerate((("train", train), ("test", test))):
        for name, kind in kinds.items():
            target = folder / split / name
            target.mkdir(parents=True)
            for index, pixels in enumerate(draw_shapes(kind, count, 64, 2 * seed + offset)):
                Image.fromarray(pixels).save(target / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def image_task() -> Callable[..., Path]:
    """``image_task(folder, {"disc": 0, "cross": 2}, train=10, test=4, seed=0)`` writes one task as an image folder."""
    return write_task


@pytest.fixture(scope="session")
def image_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stream of two tasks of two classes; read only."""
    root = tmp_path_factory.mktemp("stream")
    write_task(root / "01-round", {"disc": 0, "square": 1})
    write_task(root / "02-lines", {"cross": 2, "ring": 3})
    return root


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``call("status", run)``: exit code, standard output and standard error of the command line, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 256 kB, or of the size that the test names."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '256k')}", "none", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, by Playwright."""
    found = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
