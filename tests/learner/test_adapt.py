"""Base adaptation: it brings a backbone nearer to itself at its native size, continues where it was, and is cached."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from duallora_edge.errors import BackboneError, ConfigError, DataError, RunError, SourceError
from duallora_edge.files import cache_folder
from duallora_edge.learner import adapt
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.data.frames import spread_frames
from duallora_edge.learner.learner import Learner
from duallora_edge.learner.network.backbone import Backbone, load_backbone
from duallora_edge.learner.network.base_adaptation import BaseAdaptation, read_base
from duallora_edge.learner.run_directory import BASE, FileCheckpoint, RunDirectory
from duallora_edge.runtime.preprocess import Preprocessing
from duallora_edge.runtime.sources import open_source

pytestmark = pytest.mark.usefixtures("quick")

Bytes = npt.NDArray[np.uint8]
SIZE = 32  # the embedded backbone was trained at 64
CONFIG = TrainConfig(device="cpu", precision="fp32", size=SIZE)
QUICK = {
    "device": "cpu", "precision": "fp32", "rank_orthogonal": 2, "rank_residual": 2, "summaries": 1, "epochs": 1,
    "min_steps": 4,
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few steps, and a cache that no other test knows."""
    monkeypatch.setattr(adapt, "STEPS", 6)
    monkeypatch.setattr(adapt, "BATCH", 16)
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))


def pictures(count: int, size: int, seed: int = 0) -> Bytes:
    """Smooth random pictures uint8 [count, size, size, 3]: the same ones at every size."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in small])


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for index, one in enumerate(pictures(count, 64, seed)):
        Image.fromarray(one).save(folder / f"{index:03}.png")
    return folder


class Stages(Callback):
    """The stages of the progress and the lines that were said."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.lines: list[str] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.stages.append(stage)

    def say(self, text: str) -> None:
        self.lines.append(text)


class StopAt(Stages):
    """Interrupts after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def progress(self, stage: str, done: int, total: int) -> None:
        super().progress(stage, done, total)
        if stage == "adapt" and done == self.steps:
            raise KeyboardInterrupt


def embedded(size: int = SIZE) -> Backbone:
    return load_backbone("embedded", size=size)


@pytest.fixture
def small(make_backbone: Callable[..., Backbone]) -> Callable[..., tuple[Backbone, Backbone]]:
    """``small(**variant)``: a tiny backbone of 32 px that was set to 16 px, and itself as it was."""

    def make(**variant: Any) -> tuple[Backbone, Backbone]:
        model = make_backbone(**variant).model
        model.set_input_size(img_size=(16, 16))
        teacher = make_backbone(**variant)
        return Backbone(model, replace(teacher.info, size=16), 32), teacher

    return make


def distil(student: Backbone, teacher: Backbone, frames: Bytes, tmp_path: Path, **settings: Any) -> BaseAdaptation:
    """The base adaptation of a tiny backbone."""
    checkpoint = FileCheckpoint(tmp_path / "checkpoint", "key")
    updates, positions = adapt.distil(
        student, teacher, frames, replace(CONFIG, **settings), checkpoint, settings.pop("callback", Callback())
    )
    none = torch.zeros(0, student.dim)
    return BaseAdaptation(
        updates, positions, none, student.info.sha256, student.info.size, student.info.prefix_blocks, {}
    )


def features(backbone: Backbone, frames: Bytes) -> Tensor:
    """The final feature of the whole network."""
    with torch.no_grad():
        tokens = backbone.embed(torch.from_numpy(frames))
        for block in backbone.model.blocks:
            tokens = block(tokens)
        return backbone.feature(tokens)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 3},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg", "reg_tokens": 2, "fc_norm": True},
    {"no_embed_class": True, "reg_tokens": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_features_come_nearer_to_those_at_the_native_size(
    small: Callable[..., tuple[Backbone, Backbone]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: dict[str, Any],
) -> None:
    """On pictures that were not used, and at their native size rather than enlarged."""
    monkeypatch.setattr(adapt, "STEPS", 40)
    student, teacher = small(**variant)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    wanted, unseen = features(teacher, pictures(24, 32, seed=1)), pictures(24, 16, seed=1)
    before = F.cosine_similarity(features(student, unseen), wanted).mean()
    base = distil(student, teacher, pictures(64, 16), tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    student.adapt(BaseAdaptation.from_bytes(base.to_bytes()), "f" * 64)
    after = F.cosine_similarity(features(student, unseen), wanted).mean()
    assert 1 - after < 0.8 * (1 - before)


def test_the_loss_goes_down(
    small: Callable[..., tuple[Backbone, Backbone]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "STEPS", 40)
    losses, loss_of = [], adapt.step_loss

    def noted(*arguments: Any) -> Tensor:
        losses.append(loss := loss_of(*arguments))
        return loss

    monkeypatch.setattr(adapt, "step_loss", noted)
    distil(*small(), pictures(32, 16), tmp_path)
    values = [float(loss.detach()) for loss in losses]
    assert len(values) == 40 and np.mean(values[-8:]) < 0.8 * np.mean(values[:4])


def test_a_student_that_is_the_teacher_has_no_loss(
    make_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token meets its own: pooling and the choice of patches keep the order."""
    monkeypatch.setattr(adapt, "KEPT_PATCHES", 1.0)
    losses, loss_of = [], adapt.step_loss
    monkeypatch.setattr(
        adapt, "step_loss", lambda *arguments: losses.append(loss_of(*arguments)) or loss_of(*arguments)
    )
    distil(make_backbone(), make_backbone(), pictures(32, 32), tmp_path)
    assert abs(float(losses[0].detach())) < 1e-5  # float16 is what is left


def test_parts_of_a_batch_change_only_the_rounding(
    small: Callable[..., tuple[Backbone, Backbone]], tmp_path: Path
) -> None:
    whole, parts = (
        distil(*small(), pictures(40, 16), tmp_path, micro_batch=micro, forward_batch=forward)
        for micro, forward in ((None, 64), (5, 7))
    )
    torch.testing.assert_close(parts.positions, whole.positions, rtol=1e-3, atol=1e-4)
    for pair, expected in zip(parts.updates, whole.updates, strict=True):
        for one, other in zip(pair, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert all(up.abs().max() > 1e-3 for _, up in whole.updates)


def test_teacher_tokens_in_a_file_equal_those_in_memory(
    small: Callable[..., tuple[Backbone, Backbone]], tmp_path: Path
) -> None:
    student, teacher = small()
    frames = pictures(10, 16)
    stores = [
        adapt.TeacherTokens(teacher, student, frames, replace(CONFIG, cache_bytes=limit), Callback())
        for limit in (None, 0)
    ]
    some = torch.tensor([7, 0, 9, 7])
    memory, file = (store.rows(some) for store in stores)
    assert memory.shape == (4, 2 * 5 + 1, 48) and torch.equal(memory, file)
    bases = [distil(student, teacher, frames, tmp_path, cache_bytes=limit).to_bytes() for limit in (None, 0)]
    assert bases[0] == bases[1]


def test_teacher_tokens_are_those_of_the_enlarged_frames(small: Callable[..., tuple[Backbone, Backbone]]) -> None:
    student, teacher = small(reg_tokens=2)
    frames = pictures(3, 16)
    tokens = adapt.TeacherTokens(teacher, student, frames, CONFIG, Callback()).rows(torch.arange(3))
    large = adapt.enlarged(torch.from_numpy(frames), 32)
    assert large.shape == (3, 32, 32, 3) and large.dtype == torch.uint8
    with torch.no_grad():
        middle = teacher.prefix(large)[0]
    torch.testing.assert_close(tokens[:, :3], middle[:, :3], rtol=1e-3, atol=2e-3)  # class and register tokens
    torch.testing.assert_close(tokens[:, 3:7].mean(1), middle[:, 3:].mean(1), rtol=0.1, atol=0.1)
    torch.testing.assert_close(tokens[:, -1], features(teacher, large.numpy()), rtol=1e-3, atol=2e-3)


# -- the cache and interruptions ------------------------------------------------------------------------------------


def bases_in_cache() -> set[str]:
    return {path.suffix for path in (cache_folder() / "bases").iterdir()}


@pytest.mark.parametrize("moment", [3, 5])
def test_stopped_and_resumed_ends_in_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: int
) -> None:
    config, frames = replace(CONFIG, checkpoint_steps=2), pictures(40, SIZE)
    backbone = embedded()
    _, whole = adapt.base_for(backbone, [frames], config, Callback())
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "another"))
    with pytest.raises(KeyboardInterrupt):
        adapt.base_for(backbone, [frames], config, StopAt(moment))
    assert bases_in_cache() == {".lock", ".checkpoint"}
    resumed = Stages()
    assert adapt.base_for(backbone, [frames], config, resumed)[1] == whole
    assert resumed.stages.count("adapt") == 6 - moment // 2 * 2
    assert bases_in_cache() == {".lock", ".safetensors"}


def test_the_same_call_again_takes_it_from_the_cache() -> None:
    frames, backbone = pictures(40, SIZE), embedded()
    first, again, other = Stages(), Stages(), Stages()
    base, content = adapt.base_for(backbone, [frames], CONFIG, first)
    assert first.lines == ["Adapting the backbone from 64 to 32 px on 40 images, without labels"]
    assert (base.backbone, base.size, base.made_from["images"]) == (backbone.info.sha256, SIZE, 40)
    assert adapt.base_for(backbone, [frames], CONFIG, again)[1] == content
    assert again.lines == [] and again.stages == []
    assert adapt.base_for(backbone, [frames[:39]], CONFIG, other)[1] != content and other.lines


def test_a_damaged_cache_is_made_again() -> None:
    frames, backbone = pictures(40, SIZE), embedded()
    _, content = adapt.base_for(backbone, [frames], CONFIG, Callback())
    (path,) = (cache_folder() / "bases").glob("*.safetensors")
    path.write_bytes(content[:-5])
    assert adapt.base_for(backbone, [frames], CONFIG, Callback())[1] == content == path.read_bytes()


def test_of_many_frames_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapt, "MAX_FRAMES", 20)
    frames, backbone = pictures(40, SIZE), embedded()
    sets = [frames[:3], frames[3:3], frames[3:]]
    contents = {
        adapt.base_for(backbone, given, replace(CONFIG, seed=seed), Callback())[1]
        for given, seed in (([frames], 0), (sets, 0), ([frames], 1))
    }
    assert len(contents) == 2
    base = BaseAdaptation.from_bytes(contents.pop())
    drawn = {hashlib.sha256(frames[list(rows)].tobytes()).hexdigest() for rows in (range(20), range(20, 40))}
    assert base.made_from["images"] == 20 and base.made_from["images_sha256"] not in drawn


# -- from a source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (3, 4, [0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 2, 4]),
        (9, 4, [0, 4, 8]),
        (16, 4, [0, 4, 8, 12]),
        (17, 4, [0, 8, 16]),
        (6, 5, [0, 2, 4]),
        (11, 5, [0, 4, 8]),
        (7, 1, [0]),
    ],
)
def test_frames_are_spread_evenly(length: int, count: int, expected: list[int]) -> None:
    arrays = [np.full((12, 20, 3), number, np.uint8) for number in range(length)]
    with open_source(arrays) as source:
        frames = spread_frames(source, Preprocessing(8), count)
    assert frames.shape == (len(expected), 8, 8, 3) and frames.dtype == np.uint8
    assert frames[:, 0, 0, 0].tolist() == expected


def test_any_length_gives_at_least_half() -> None:
    for length, count in itertools.product(range(1, 60), (2, 3, 6, 7)):
        with open_source([np.full((8, 8, 3), number, np.uint8) for number in range(length)]) as source:
            values = spread_frames(source, Preprocessing(8), count)[:, 0, 0, 0].astype(int)
        steps = set(np.diff(values).tolist())
        assert min(length, count / 2) <= len(values) <= count and len(steps) <= 1
        assert values[0] == 0 and length - values[-1] <= 2 * max(steps, default=length)


def test_a_live_source_gives_one_frame_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is not read to its end, since it has none."""
    monkeypatch.setattr("duallora_edge.learner.data.frames.LIVE_INTERVAL_S", 0.1)
    endless = (np.full((8, 8, 3), number % 256, np.uint8) for number in itertools.count())
    with open_source(endless, live=True, rate=100) as source:
        frames = spread_frames(source, Preprocessing(8), 4)
    steps = np.diff(frames[:, 0, 0, 0].astype(int))
    assert len(frames) == 4 and (steps >= 5).all()


def test_a_folder_becomes_a_base_adaptation(tmp_path: Path) -> None:
    folder, output, notes = write_pictures(tmp_path / "images", 70), tmp_path / "base.safetensors", Stages()
    base, digest = adapt.adapt_source(str(folder), output, CONFIG, notes)
    assert hashlib.sha256(output.read_bytes()).hexdigest() == digest and read_base(output)[0].size == base.size == SIZE
    assert base.made_from["images"] == 70 and notes.stages.count("collect") == 70
    preprocessing = Preprocessing(SIZE, "crop", embedded().info.interpolation)
    frames = np.stack([preprocessing(one) for one in pictures(70, 64)])  # as they are seen in training
    assert base.made_from["images_sha256"] == hashlib.sha256(frames.tobytes()).hexdigest()
    assert adapt.adapt_source(str(folder), output, CONFIG, Callback())[1] == digest  # an older one is replaced
    fewer, _ = adapt.adapt_source(str(folder), output, CONFIG, Callback(), images=64)
    assert fewer.made_from["images"] == 35


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    folder, output = write_pictures(tmp_path / "images", 31), tmp_path / "base.safetensors"
    (folder / "z.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()

    def refused(kind: type[Exception], reason: str, source: Path = folder, **settings: Any) -> None:
        images = settings.pop("images", adapt.MAX_FRAMES)
        with pytest.raises(kind, match=reason) as caught:
            adapt.adapt_source(str(source), output, replace(CONFIG, **settings), Callback(), images)
        assert str(caught.value).endswith(".") and not output.exists()

    refused(DataError, r"gave 31 images \(1 more cannot be read\), which is too few .* 32 or more")
    refused(ConfigError, "trained for 64 px, so there is nothing to adapt at that size.*--size", size=64)
    refused(ConfigError, "nothing to adapt", size=None)
    refused(BackboneError, "multiple of the patch size", size=30)
    refused(ConfigError, "images must be a whole number from 64", images=63)
    refused(ConfigError, "images must be a whole number from 64", images=adapt.MAX_FRAMES + 1)
    refused(SourceError, "contains no images", tmp_path / "empty")
    refused(SourceError, "does not exist", tmp_path / "nothing")
    assert not cache_folder().exists()


@pytest.mark.parametrize("kind", ["photo", "folder", "link", "source", "no folder"])
def test_nothing_of_the_user_is_overwritten(tmp_path: Path, kind: str) -> None:
    folder, output = write_pictures(tmp_path / "images", 32), tmp_path / "output"
    if kind == "photo":
        output.write_bytes(b"years of work")
    elif kind == "folder":
        output.mkdir()
    elif kind == "link":
        output.symlink_to(tmp_path / "nowhere")
    elif kind == "source":
        output = folder / "000.png"
    else:
        output = tmp_path / "missing" / "base.safetensors"
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"give another name with -o"):
        adapt.adapt_source(str(folder), output, CONFIG, Callback())
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


# -- as a part of a run ---------------------------------------------------------------------------------------------


def outputs(run: Path) -> Tensor:
    with torch.no_grad():
        return Learner(run).model()(torch.from_numpy(pictures(6, SIZE, seed=3))).features


def test_a_run_keeps_its_base_adaptation(tmp_path: Path, image_stream: Path) -> None:
    """Trained, undone and opened again it is the same network; an altered file is refused."""
    run, notes = tmp_path / "run", Stages()
    learner = Learner(run, size=SIZE, callbacks=[notes], **QUICK)
    learner.learn(image_stream / "01-round", evaluate=False)
    assert {"teacher", "adapt"} < set(notes.stages)
    opened = RunDirectory.open(run)
    content = (run / BASE).read_bytes()
    assert opened.info.base == hashlib.sha256(content).hexdigest()
    assert opened.base_made_from() == read_base(run / BASE)[0].made_from
    first = outputs(run)
    assert not torch.equal(opened.backbone().model.pos_embed, embedded().model.pos_embed)
    notes.stages.clear()
    learner.learn(image_stream / "02-lines", evaluate=False)
    assert "adapt" not in notes.stages
    learner.rollback()
    assert torch.equal(outputs(run), first) and (run / BASE).read_bytes() == content
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], b""):
        (run / BASE).write_bytes(damaged)
        with pytest.raises(RunError, match=r"base\.safetensors was altered since it was written; restore it"):
            opened.backbone()
    (run / BASE).unlink()
    with pytest.raises(RunError, match=r"base\.safetensors cannot be read .*; restore it"):
        opened.backbone()
    with pytest.raises(RunError, match=r"base\.safetensors cannot be read .*; restore it"):
        opened.base_made_from()


@pytest.mark.parametrize(("base", "tasks"), [("auto", 1), ("all", 2)])
def test_whose_images_serve(tmp_path: Path, image_stream: Path, base: str, tasks: int) -> None:
    Learner(tmp_path / "run", size=SIZE, base=base, **QUICK).learn(image_stream, evaluate=False)
    run = RunDirectory.open(tmp_path / "run")
    made_from = run.base_made_from()
    learned = [sum(record.info.counts.values()) for record in run.records()]
    assert len(learned) == 2 and made_from is not None and made_from["images"] == sum(learned[:tasks])


@pytest.mark.parametrize("settings", [{"size": 64}, {"size": None}, {"size": SIZE, "base": "none"}], ids=str)
def test_nothing_is_adapted(tmp_path: Path, image_stream: Path, settings: dict[str, Any]) -> None:
    """At the native size, and with base=none: the file holds directions only."""
    notes = Stages()
    Learner(tmp_path / "run", callbacks=[notes], **settings, **QUICK).learn(image_stream / "01-round", evaluate=False)
    run = RunDirectory.open(tmp_path / "run")
    made_from, (base, _) = run.base_made_from(), read_base(run.path / BASE)
    assert made_from is not None and made_from["rank"] == made_from["steps"] == 0
    assert all(len(down) == len(up) == 0 for down, up in base.updates) and len(base.directions)
    assert not {"teacher", "adapt"} & set(notes.stages)
    untouched = embedded(run.info.size).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in run.backbone().state_dict().items())


def test_a_run_with_a_file(tmp_path: Path, image_stream: Path) -> None:
    """End to end: adapt on images without labels, train with it, answer."""
    path, notes = tmp_path / "base.safetensors", Stages()
    _, digest = adapt.adapt_source(str(write_pictures(tmp_path / "images", 33)), path, CONFIG, Callback())
    learner = Learner(tmp_path / "run", size=SIZE, base=str(path), callbacks=[notes], **QUICK)
    metrics = learner.learn(image_stream)
    run = RunDirectory.open(tmp_path / "run")
    assert run.info.base == digest and (run.path / BASE).read_bytes() == path.read_bytes()
    assert "adapt" not in notes.stages and metrics.summary["last_accuracy"] is not None
    expected = embedded()
    expected.adapt(read_base(path)[0], digest)
    found = run.backbone()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    path.unlink()  # the run has its own copy
    assert len(outputs(run.path)) == 6


def test_a_file_of_another_size_makes_no_run(tmp_path: Path, image_stream: Path) -> None:
    path = tmp_path / "base.safetensors"
    adapt.adapt_source(str(write_pictures(tmp_path / "images", 33)), path, CONFIG, Callback())
    for base, size, reason in (
        (path, 48, r"was made for the weights .* at 32 px with .*, not for embedded .* at 48 px"),
        (path, 64, "was made for the weights"),
        (tmp_path / "images" / "000.png", SIZE, "cannot be used as a base adaptation"),
        (tmp_path / "missing", SIZE, "cannot be used as a base adaptation"),
    ):
        with pytest.raises(BackboneError, match=reason):
            Learner(tmp_path / "run", size=size, base=str(base), **QUICK).learn(image_stream)
        assert not (tmp_path / "run").exists()
