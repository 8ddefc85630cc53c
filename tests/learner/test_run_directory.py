"""The run directory: written once, undone exactly, and damage is noticed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from duallora_edge.errors import ConfigError, RunError
from duallora_edge.learner.config import SOURCE, TrainConfig
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.task_record import KeptImages, TaskRecord
from duallora_edge.learner.run_directory import BASE, MARKER, SCHEMA, SPARE, FileCheckpoint, RunDirectory, StoredTask

CONFIG = TrainConfig(seed=3, precision="fp32", data="somewhere", task_order=("b", "a"))

KEPT = KeptImages(torch.arange(96, dtype=torch.uint8).reshape(2, 4, 4, 3), torch.tensor([1, 0]))


@pytest.fixture
def run(tmp_path: Path, tiny_backbone: Backbone) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", CONFIG, tiny_backbone.info)


@pytest.fixture(scope="module")
def third(
    make_task: Callable[..., PreparedTask], learn: Callable[..., list[TaskRecord]], two_tasks: list[TaskRecord]
) -> TaskRecord:
    return learn([make_task("third task/é", ["e", "f"], [4, 5])], two_tasks)[-1]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_opens_as_it_was_created(run: RunDirectory, tiny_backbone: Backbone) -> None:
    opened = RunDirectory.open(run.path)
    assert opened.info == tiny_backbone.info
    assert opened.config == replace(CONFIG, data="", task_order=None)  # where images lie is no part of a run
    assert opened.active_tasks() == [] and opened.training_steps() is None and opened.sources() == {}


def test_a_committed_task_reads_back(run: RunDirectory, two_tasks: list[TaskRecord]) -> None:
    for record in two_tasks:
        run.commit(record)
    opened = RunDirectory.open(run.path)
    for record, found in zip(two_tasks, opened.records(), strict=True):
        assert found.info == record.info
        for name, part in record.tensors().items():
            assert all(torch.equal(value, found.tensors()[name][key]) for key, value in part.items())
    assert opened.digest() == run.digest() != opened.digest(opened.active_tasks()[:1])
    assert opened.find("second") == opened.active_tasks()[1]
    with pytest.raises(RunError, match="no task 'third'; it has first, second"):
        opened.find("third")


@pytest.mark.parametrize("kept", [None, KEPT], ids=["none", "images"])
def test_kept_images_are_a_file_of_their_own(
    run: RunDirectory, two_tasks: list[TaskRecord], kept: KeptImages | None
) -> None:
    """They keep their dtype, and a task without any has no such file."""
    task = run.commit(replace(two_tasks[0], kept_images=kept))
    assert (run.path / "tasks" / task.folder / "kept_images.safetensors").exists() == bool(kept)
    found = run.read(task).kept_images
    assert bool(found) == bool(kept)
    if kept and found:
        assert found.images.dtype == torch.uint8 and torch.equal(found.images, kept.images)
        assert found.labels.dtype == torch.int64 and torch.equal(found.labels, kept.labels)


def test_rollback_is_the_identity(run: RunDirectory, two_tasks: list[TaskRecord], third: TaskRecord) -> None:
    for record in two_tasks:
        run.commit(record)
    before, digest = snapshot(run.path), run.digest()
    run.commit(third)
    assert run.digest() != digest
    assert [entry.folder for entry in run.active_tasks()] == ["0001-first", "0002-second", "0003-third-task"]
    run.set_active_tasks(run.active_tasks()[:-1])
    assert (run.digest(), snapshot(run.path)) == (digest, before)


def test_remove_leaves_the_other_tasks_alone(run: RunDirectory, two_tasks: list[TaskRecord], third: TaskRecord) -> None:
    for record in [*two_tasks, third]:
        run.commit(record)
    kept = snapshot(run.path / "tasks" / "0003-third-task")
    head = run.active_tasks()
    run.set_active_tasks([head[0], head[2]])
    assert [record.info.name for record in RunDirectory.open(run.path).records()] == ["first", "third task/é"]
    assert snapshot(run.path / "tasks" / "0003-third-task") == kept
    assert not (run.path / "tasks" / "0002-second").exists()
    assert run.commit(two_tasks[1]).folder == "0004-second"  # a number is never given twice to living tasks


@pytest.mark.parametrize("index", [0, 1], ids=["earlier", "newest"])
def test_a_task_takes_the_place_of_another(
    run: RunDirectory, tmp_path: Path, two_tasks: list[TaskRecord], third: TaskRecord, index: int
) -> None:
    """As if that one had been removed before; a kill at any moment leaves one of them, and no file of the other."""
    for record in two_tasks:
        run.commit(record)
    copies = [RunDirectory.open(Path(shutil.copytree(run.path, tmp_path / f"copy{number}"))) for number in range(21)]
    entry = run.active_tasks()[index]
    run.set_active_tasks([task for task in run.active_tasks() if task != entry])
    run.commit(third)
    before, after = copies[0].digest(), run.digest()
    found = []
    for number, copy in enumerate(copies):
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            for name in ("replace", "rename", "unlink", "rmdir"):
                patch.setattr(Path, name, dying_at(number + 1, getattr(Path, name)))
            copy.commit(third, replaced=entry)
            copy.delete_dropped()
        opened = RunDirectory.open(copy.path)
        found.append(opened.digest())
        with opened.locked():
            folders = {task.folder for task in opened.active_tasks()}
            assert {path.name for path in (copy.path / "tasks").iterdir()} == folders
            assert set(json.loads((copy.path / "HEAD.json").read_text())) == {"schema", "tasks"}
        assert opened.digest() == found[-1] and len(opened.records()) == 2
    assert found == sorted(found, key=lambda digest: digest == after) and set(found) == {before, after}


@pytest.mark.parametrize("file", ["adapters", "bases", "head", "statistics", "kept_images"])
@pytest.mark.parametrize("where", [0, 0.5, -1], ids=["first", "middle", "last"])
def test_one_changed_byte_is_noticed(run: RunDirectory, two_tasks: list[TaskRecord], file: str, where: float) -> None:
    task = run.commit(replace(two_tasks[0], kept_images=KEPT))
    path = run.path / "tasks" / task.folder / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where * len(content)) if where >= 0 else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"{file}\.safetensors was altered since it was written; restore it"):
        run.read(task)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace('"first"', '"other"'), "was altered"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "was altered"),
        (lambda text: text[:50], "cannot be read"),
        (lambda text: "[]", "was altered"),
    ],
)
def test_a_changed_description_is_noticed(
    run: RunDirectory, two_tasks: list[TaskRecord], change: Callable[[str], str], reason: str
) -> None:
    task = run.commit(two_tasks[0])
    path = run.path / "tasks" / task.folder / "task.json"
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    with pytest.raises(RunError, match=reason):
        run.read_info(task)


def put_hashes_right(run: RunDirectory) -> StoredTask:
    """The only task of a run, whose hashes now are those of what lies there."""
    folder = next((run.path / "tasks").iterdir())
    description = json.loads((folder / "task.json").read_text())
    if isinstance(description.get("files"), dict):
        for name in description["files"]:
            description["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "task.json").write_text(json.dumps(description))
    content = json.dumps(description, sort_keys=True, ensure_ascii=False).encode()
    task = StoredTask(folder.name, hashlib.sha256(content).hexdigest())
    run.set_active_tasks([task])
    return task


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": ""}, "name: "),
        ({"name": None}, "name: "),
        ({"classes": "ab"}, "classes: "),
        ({"classes": ["a", 1]}, "classes: "),
        ({"classes": ["a", "a"]}, "classes: must be different names"),
        ({"classes": []}, "classes: must be different names"),
        ({"method": ""}, "method: "),
        ({"method": ["dual_lora"]}, "method: "),
        ({"classifier": "auto"}, "classifier: 'auto' is unknown"),
        ({"residual": 1, "gate": 1, "calibration": 1}, "residual: .*gate: .*calibration: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 10**30}, "seed: "),
        ({"data_digest": 7}, "data_digest: "),
        ({"counts": []}, "counts: must be a mapping"),
        ({"counts": {"a": "many"}}, "counts.a: "),
        ({"validation": {"images": [1]}}, "validation.images: "),
        ({"validation": 5}, "validation: must be a mapping"),
        ({"files": []}, "files: must be a mapping"),
        ({"files": {}}, "lacks the tensor"),
    ],
    ids=str,
)
def test_a_description_that_makes_no_sense(
    run: RunDirectory, two_tasks: list[TaskRecord], changes: dict[str, object], reason: str
) -> None:
    folder = run.path / "tasks" / run.commit(two_tasks[0]).folder
    edit_json(folder / "task.json", **changes)
    with pytest.raises(RunError, match=reason) as caught:
        run.read(put_hashes_right(run))
    assert "restore it from a copy" in str(caught.value)


def test_a_description_without_a_key(run: RunDirectory, two_tasks: list[TaskRecord]) -> None:
    folder = run.path / "tasks" / run.commit(two_tasks[0]).folder
    description = json.loads((folder / "task.json").read_text())
    for key in two_tasks[0].info.to_json():
        (folder / "task.json").write_text(json.dumps({k: v for k, v in description.items() if k != key}))
        with pytest.raises(RunError, match=rf"{key}.*; restore it"):
            run.read_info(put_hashes_right(run))


@pytest.mark.parametrize(
    ("file", "name", "change", "reason"),
    [
        ("head", "head", lambda t: t.flatten(), r"must be of shape \[any, any\]"),
        ("head", "head", lambda t: t.half(), "must hold torch.float32, not torch.float16"),
        ("head", "head", lambda t: t[:, :-1], "must be of shape"),
        ("head", "head", lambda t: t * float("nan"), "not finite"),
        ("adapters", "blocks.0.orthogonal.q_up", lambda t: t[:-1], "must be of shape"),
        ("adapters", "blocks.1.residual.v_down", lambda t: t[:-1], "must be of shape"),
        ("adapters", "blocks.0.residual.q_down", lambda t: t[:, 1:], "must be of shape"),
        ("adapters", "blocks.0.residual.q_down", lambda t: t * float("inf"), "not finite"),
        ("bases", "blocks.0.q", lambda t: t.T, "must be of shape"),
        ("bases", "blocks.1.v", lambda t: None, "lacks the tensor"),
        ("statistics", "counts", lambda t: -t, "impossible counts"),
        ("statistics", "counts", lambda t: t[:1], "must be of shape"),
        ("statistics", "means", lambda t: t[:, 1:], "must be of shape"),
        ("statistics", "factor", lambda t: t[:, 1:], "must be of shape"),
        ("statistics", "diagonal", lambda t: t[1:], "must be of shape"),
        ("statistics", "diagonal", lambda t: t.bool(), "must hold torch.float32, not torch.bool"),
        ("statistics", "diagonal", lambda t: t - 1, "impossible counts"),
        ("statistics", "curve.nll", lambda t: t.T, "must be of shape"),
        ("statistics", "curve.counts", lambda t: t.flip(0) + torch.tensor([0, 9]), "impossible counts"),
        ("statistics", "novelty", lambda t: t[None], "must be of shape"),
        ("statistics", "overconfidence", lambda t: -t - 1, "impossible counts"),
        ("discriminants", "weight", lambda t: t[:, 1:], "must be of shape"),
        ("discriminants", "bias", lambda t: t[:1], "must be of shape"),
        ("discriminants", "inflation", lambda t: -t - 1, "impossible inflation"),
        ("kept_images", "images", lambda t: t.double(), "must hold torch.uint8, not torch.float64"),
        ("kept_images", "images", lambda t: t[:1], "must be of shape"),
        ("kept_images", "images", lambda t: t[..., 0], "must be of shape"),
        ("kept_images", "labels", lambda t: t.float(), "must hold torch.int64, not torch.float32"),
        ("kept_images", "labels", lambda t: t + 1, "not those of the classes"),
        ("kept_images", "labels", lambda t: None, "lacks the tensor"),
    ],
)
def test_tensors_that_do_not_fit(
    run: RunDirectory,
    two_tasks: list[TaskRecord],
    file: str,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    reason: str,
) -> None:
    path = run.path / "tasks" / run.commit(replace(two_tasks[0], kept_images=KEPT)).folder / f"{file}.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    path.write_bytes(save(tensors if changed is None else {**tensors, name: changed.contiguous()}))
    with pytest.raises(RunError, match=reason) as caught:
        run.read(put_hashes_right(run))
    assert "restore it from a copy" in str(caught.value)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)], ids=["pipe", "folder", "link"]
)
def test_what_is_no_file_is_not_waited_for(
    run: RunDirectory, two_tasks: list[TaskRecord], make: Callable[[Path], object]
) -> None:
    task = run.commit(two_tasks[0])
    path = run.path / "tasks" / task.folder / "head.safetensors"
    path.unlink()
    make(path)
    with pytest.raises(RunError, match=r"head\.safetensors cannot be read .*restore it"):
        run.read(task)
    (run.path / "checkpoint").mkdir()
    make(run.path / "checkpoint" / "state.safetensors")
    assert run.training_steps() is None and run.checkpoint("x").load() is None


@pytest.mark.parametrize("file", ["head.safetensors", "task.json"])
def test_a_missing_file_is_noticed(run: RunDirectory, two_tasks: list[TaskRecord], file: str) -> None:
    task = run.commit(two_tasks[0])
    (run.path / "tasks" / task.folder / file).unlink()
    with pytest.raises(RunError, match="cannot be read"):
        run.read(task)


@pytest.mark.parametrize(
    "head",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": 1}',
        '{"tasks": 5}',
        '{"tasks": [1]}',
        '{"tasks": [{"folder": "0001-a"}]}',
        '{"tasks": [{"folder": "../0001-a", "id": "0"}]}',
        '{"tasks": [{"folder": "a", "id": "0"}]}',
        '{"tasks": [{"folder": 1, "id": "0"}]}',
        '{"tasks": [{"folder": "0001-a", "id": 0}]}',
        '{"tasks": [{"folder": "0001-a", "id": null}]}',
        '{"tasks": {"folder": "0001-a"}}',
        json.dumps({"tasks": [{"folder": f"{'1' * 5000}-a", "id": "0" * 64}]}),
        json.dumps({"tasks": 2 * [{"folder": "0001-a", "id": "0" * 64}]}),
    ],
)
def test_a_damaged_head(run: RunDirectory, head: str) -> None:
    (run.path / "HEAD.json").write_text(head)
    with pytest.raises(RunError, match=r"HEAD\.json is damaged .*; restore it"):
        run.active_tasks()


def edit_yaml(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda path: edit_yaml(path / "run.yaml", schema=99),
            f"not of schema {SCHEMA}; train again, or use the version that wrote it",
        ),
        (lambda path: edit_yaml(path / "run.yaml", future_setting=1), "damaged"),
        (lambda path: edit_yaml(path / "run.yaml", epochs="many"), "damaged"),
        (lambda path: edit_yaml(path / "run.yaml", method="magic"), "damaged"),
        (lambda path: (path / "run.yaml").write_text("a: [" * 5000), "damaged"),
        (lambda path: (path / "run.yaml").write_text("# " * 2**20), "damaged"),
        (lambda path: (path / "run.yaml").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda path: (path / "run.yaml").write_text("- a"), "damaged"),
        (lambda path: (path / "run.yaml").write_text(""), f"not of schema {SCHEMA}"),
        (lambda path: (path / "backbone.json").unlink(), "damaged"),
        (lambda path: (path / "backbone.json").write_text("{}"), "damaged"),
        (lambda path: (path / "backbone.json").write_text("7"), "damaged"),
        (lambda path: edit_json(path / "backbone.json", size="32"), "damaged .*size: must be a whole number"),
        (lambda path: edit_json(path / "backbone.json", size=10**9), "damaged .*size: must be a whole number"),
        (lambda path: edit_json(path / "backbone.json", name=5, sha256=5), "damaged .*name: .*sha256: "),
        (lambda path: edit_json(path / "backbone.json", mean=[0.5], std="x"), "damaged .*mean: .*std: "),
        (lambda path: edit_json(path / "backbone.json", summary_blocks=[]), "damaged .*summary_blocks: "),
        (
            lambda path: edit_yaml(path / "run.yaml", epochs=1.5, weights=5),
            "epochs must be .*weights must be text",
        ),
        (lambda path: (path / "run.yaml").write_text(f"schema: {SCHEMA}\nseed: 0x{'f' * 5000}"), "not a huge number"),
        (lambda path: (path / "run.yaml").write_text("a: &a {x: 1}\n<<: [*a, *a]"), "uses a YAML alias"),
        (lambda path: (path / "run.yaml").unlink(), "is not a run"),
        (lambda path: shutil.rmtree(path), "is not a folder; .* makes a run"),
    ],
)
def test_a_damaged_run_does_not_open(run: RunDirectory, damage: Callable[[Path], object], reason: str) -> None:
    damage(run.path)
    with pytest.raises(RunError, match=reason) as caught:
        RunDirectory.open(run.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tasks/one/train/cat/1.png", "thesis.tex", ".hidden", "HEAD.json", "backbone.json"])
@pytest.mark.parametrize("marker", [None, "link", "folder"])
def test_a_foreign_folder_is_refused(tmp_path: Path, tiny_backbone: Backbone, name: str, marker: str | None) -> None:
    """Names that a run has, too: only a marker that was written here makes a folder ours."""
    path = tmp_path / "site"
    (path / name).parent.mkdir(parents=True)
    (path / name).write_text("years of work")
    if marker == "link":
        (path / MARKER).symlink_to(path / name)
    elif marker == "folder":
        (path / MARKER).mkdir()
    before = snapshot(path)
    with pytest.raises(RunError, match=r"holds other files \(.*give an empty or new folder"):
        RunDirectory.create(path, CONFIG, tiny_backbone.info)
    with pytest.raises(RunError, match="is not a folder"):
        RunDirectory.create(path / name, CONFIG, tiny_backbone.info)
    assert snapshot(path) == before


@pytest.mark.parametrize("base", [None, b"a base adaptation"])
def test_a_creation_that_was_killed_is_done_again(tmp_path: Path, tiny_backbone: Backbone, base: bytes | None) -> None:
    """Killed before each file that it writes; a file that somebody put there meanwhile stays."""
    expected = snapshot(RunDirectory.create(tmp_path / "whole", CONFIG, tiny_backbone.info, base).path)
    assert (BASE in expected) == (base is not None)
    for number in range(1, 5 + (base is not None)):
        path = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", dying_at(number, Path.replace))
            RunDirectory.create(path, CONFIG, tiny_backbone.info, base)
        assert not RunDirectory.exists(path)
        (path / "tasks.txt").write_text("mine")
        run = RunDirectory.create(path, CONFIG, tiny_backbone.info, base)
        found = snapshot(path)
        assert found.pop("tasks.txt") == b"mine" and found == expected
        with pytest.raises(RunError, match="Another process has just made"):
            RunDirectory.create(path, replace(CONFIG, seed=4), tiny_backbone.info)
    run.path.joinpath("run.yaml").unlink()
    (run.path / "tasks" / "0001-first").mkdir()
    with pytest.raises(RunError, match=r"has tasks but no run\.yaml; restore it"):
        RunDirectory.create(run.path, CONFIG, tiny_backbone.info)


def dying_at(number: int, function: Callable[..., object]) -> Callable[..., object]:
    """The function, which from a call of this number on does not return."""
    count = [0]

    def call(*arguments: object, **options: object) -> object:
        count[0] += 1
        if count[0] >= number:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return call


def test_a_run_without_a_marker(run: RunDirectory, two_tasks: list[TaskRecord]) -> None:
    """The version before this one wrote none: its run.yaml, backbone.json and HEAD.json say whose the run is."""
    run.commit(two_tasks[0])
    for name in (MARKER, SPARE, ".lock"):
        (run.path / name).unlink()
    old = RunDirectory.open(run.path)
    with old.locked():
        old.commit(two_tasks[1])
        assert old.set_active_tasks(old.active_tasks()[:1]) == []
    assert [path.name for path in (run.path / "tasks").iterdir()] == ["0001-first"]


def test_the_weights_must_be_those_of_the_run(run: RunDirectory) -> None:
    edit_yaml(run.path / "run.yaml", backbone="embedded")
    info = {**json.loads((run.path / "backbone.json").read_text()), "name": "embedded", "size": 64}
    (run.path / "backbone.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match=r"not those the run was trained with .*--weights"):
        RunDirectory.open(run.path).backbone()


def test_one_writer_at_a_time(run: RunDirectory) -> None:
    with run.locked():
        with pytest.raises(RunError, match=f"Process {os.getpid()} is writing .*wait for it or stop it"), run.locked():
            pass
        assert RunDirectory.open(run.path).active_tasks() == []  # reading goes on
    with run.locked():
        pass


def test_a_lock_that_is_a_link(run: RunDirectory) -> None:
    (run.path / "thesis").write_text("years of work")
    (run.path / ".lock").unlink()
    (run.path / ".lock").symlink_to("thesis")
    with pytest.raises(ConfigError, match="delete it"), run.locked():
        pass
    assert (run.path / "thesis").read_text() == "years of work"


def test_a_lock_of_strange_content(run: RunDirectory) -> None:
    (run.path / ".lock").write_bytes("café \x1b[2J".encode())
    with (run.path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"Process \? is writing to"), run.locked():
            pass


def test_what_a_killed_writer_left_is_swept(run: RunDirectory, two_tasks: list[TaskRecord]) -> None:
    run.commit(two_tasks[0])
    for name in ("reports", "checkpoint"):
        (run.path / name).mkdir()
    for name in (".mine.tmp", ".HEAD.json.mine.tmp", ".thesis.0123abcd.tmp", "tasks/.mine.tmp", "reports/.x.tmp"):
        (run.path / name).write_text("years of work")  # what only looks like it
    before = snapshot(run.path)
    for name in (".HEAD.json", "reports/.report.html", "checkpoint/.state.safetensors"):
        (run.path / f"{name}.0123abcd.tmp").write_text("half")
    with run.locked():
        pass
    assert {**snapshot(run.path), ".lock": b""} == {**before, ".lock": b""}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_commit_that_was_killed_is_no_part_of_the_run(
    run: RunDirectory, two_tasks: list[TaskRecord], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Before HEAD names what is to come, before the folder, before HEAD is replaced, before the checkpoint goes."""
    run.commit(two_tasks[0])
    digest = run.digest()
    run.checkpoint("key").save(1, {})
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        if number == 4:
            patch.setattr(run, "_delete_checkpoint", dying_at(1, run.set_active_tasks))
        for place, name in ((Path, "replace"), (Path, "rename")):
            patch.setattr(place, name, dying_at({1: 1, 2: 1, 3: 2}.get(number, 9), getattr(place, name)))
        if number == 2:
            patch.setattr(Path, "replace", Path.replace)
        run.commit(two_tasks[1])
    opened = RunDirectory.open(run.path)
    if number < 4:
        assert opened.digest() == digest
        with opened.locked():
            assert opened.commit(two_tasks[1]).folder == "0002-second"
    assert [record.info.name for record in opened.records()] == ["first", "second"]
    assert {path.name for path in (run.path / "tasks").iterdir()} == {"0001-first", "0002-second"}
    assert set(json.loads((run.path / "HEAD.json").read_text())) == {"schema", "tasks"}


def test_a_rollback_that_was_killed_is_finished(
    run: RunDirectory, two_tasks: list[TaskRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.commit(two_tasks[0])
    before = snapshot(run.path)
    for number in range(1, 12):
        run.commit(two_tasks[1])
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dying_at(number, Path.unlink))
            run.set_active_tasks(run.active_tasks()[:1])
        assert len(run.active_tasks()) == 1
        with run.locked():
            assert {**snapshot(run.path), ".lock": b""} == {**before, ".lock": b""}


@pytest.mark.parametrize("foreign", ["0001-first/notes.txt", "0001-first/photos/1.png", "0001-first-copy/1.png"])
def test_rollback_deletes_what_the_task_wrote_alone(
    run: RunDirectory, two_tasks: list[TaskRecord], foreign: str
) -> None:
    folder = run.path / "tasks" / run.commit(two_tasks[0]).folder
    (run.path / "tasks" / foreign).parent.mkdir(exist_ok=True)
    (run.path / "tasks" / foreign).write_text("mine")
    (run.path / "checkpoint").mkdir()
    (run.path / "checkpoint" / "notes.txt").write_text("mine")
    stays = folder in (run.path / "tasks" / foreign).parents
    assert run.set_active_tasks([]) == ([folder] if stays else [])
    assert snapshot(run.path / "tasks") == {foreign: b"mine"}
    assert snapshot(run.path / "checkpoint") == {"notes.txt": b"mine"}
    assert run.commit(two_tasks[0]).folder == ("0002-first" if stays else "0001-first")  # what is there stays
    assert snapshot(run.path / "tasks")[foreign] == b"mine"


@pytest.mark.parametrize("what", ["another task.json", "a copy", "a link"])
def test_rollback_knows_a_task_by_its_id(
    run: RunDirectory, two_tasks: list[TaskRecord], tmp_path: Path, what: str
) -> None:
    folder = run.path / "tasks" / run.commit(two_tasks[0]).folder
    copy = folder.with_name("0007-first")
    if what == "another task.json":
        (folder / "task.json").write_text('{"files": {"head.safetensors": ""}}')
    elif what == "a copy":
        shutil.copytree(folder, copy)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    run.set_active_tasks([])
    kept = {"another task.json": "run/tasks/0001", "a copy": "run/tasks/0007", "a link": "elsewhere"}[what]
    expected = {name: value for name, value in before.items() if name.startswith(kept)}
    assert expected and expected.items() <= snapshot(tmp_path).items()
    assert folder.exists() == (what != "a copy")


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_rollback_on_a_full_disk(
    small_disk: Path, tiny_backbone: Backbone, two_tasks: list[TaskRecord], call: Callable[..., tuple[int, str, str]]
) -> None:
    """Not a byte is left: HEAD is written into a file that was kept for it."""
    run = RunDirectory.create(small_disk / "run", CONFIG, tiny_backbone.info)
    run.commit(two_tasks[0])
    before = snapshot(run.path)
    run.commit(two_tasks[0])
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(small_disk).f_bavail == 0
    assert call("rollback", run.path) == (0, f"Undid first; 1 task(s) left.  Run: {run.path}\n", "")
    assert {**snapshot(run.path), ".lock": b""} == {**before, ".lock": b""}


def test_checkpoints_belong_to_one_training(run: RunDirectory, two_tasks: list[TaskRecord]) -> None:
    tensors = {"0.value": torch.randn(3, 2), "empty": torch.zeros(0, 4)}
    run.checkpoint("one").save(7, tensors)
    step, found = run.checkpoint("one").load() or (0, {})
    assert step == 7 == run.training_steps()
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert run.checkpoint("two").load() is None
    run.checkpoint("two").save(1, tensors)
    assert run.checkpoint("one").load() is None and run.training_steps() == 1
    run.commit(two_tasks[0])  # another state: training that began before it is over
    assert run.training_steps() is None and run.checkpoint("two").load() is None


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_checkpoint_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.safetensors").write_bytes(content)
    checkpoint = FileCheckpoint(tmp_path, "key")
    assert checkpoint.load() is None and checkpoint.steps() is None
    checkpoint.save(2, {"a": torch.zeros(1)})
    assert checkpoint.steps() == 2


def test_sources_are_remembered_by_task(run: RunDirectory, tmp_path: Path) -> None:
    run.remember_source(["a", "b"], replace(CONFIG, data=str(tmp_path / "x" / ".." / "images")))
    run.remember_source(["b"], replace(CONFIG, data="torchvision:MNIST", classes_per_task=2))
    found = RunDirectory.open(run.path).sources()
    assert found["a"]["data"] == str(tmp_path / "images") and found["a"]["task_order"] == ("b", "a")
    assert (found["b"]["data"], found["b"]["classes_per_task"]) == ("torchvision:MNIST", 2)


@pytest.mark.parametrize(
    "content",
    [
        "[]", "7", "null", '{"a": 1}', '{"a": []}', '{"a": {}}', '{"a": {"data": ""}}', '{"a": {"data": 5}}',
        "[" * 9999,
        '{"a": {"data": "x", "seed": 3}}', '{"a": {"data": "x", "test_fraction": 7}}', '{"a": {"data": "x", "y": 1}}',
        '{"a": {"data": "x", "task_order": [1]}}', '{"a": {"data": "x", "classes_per_task": -5}}',
    ],
)  # fmt: skip
def test_sources_that_make_no_sense(run: RunDirectory, content: str) -> None:
    (run.path / "sources.json").write_text(content)
    with pytest.raises(RunError, match=r"sources\.json is damaged .*delete it"):
        run.sources()


def test_settings_that_a_source_lacks_have_their_defaults(run: RunDirectory) -> None:
    (run.path / "sources.json").write_text('{"a": {"data": "x"}}')
    assert run.sources() == {"a": {key: getattr(replace(CONFIG, data="x", task_order=None), key) for key in SOURCE}}
