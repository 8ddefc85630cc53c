"""The bundle reader: what it accepts, and that everything else is a `BundleError` with a remedy."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duallora_edge.errors import BundleError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime.backends.ladder import open_backend
from duallora_edge.runtime.bundle import MAX_PROBLEMS, Bundle, Content, Manifest

quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def test_open_reads_what_the_exporter_wrote(shared_bundle: Path) -> None:
    bundle = Bundle.open(shared_bundle)
    manifest = bundle.manifest
    assert manifest.to_json() == read_json(shared_bundle / "manifest.json")
    assert manifest.classes == ("red", "green", "blue", "dark")
    assert manifest.tasks[1].classes == (2, 3, 1)
    assert manifest.calibration.extra == {"ece": 0.01}
    assert bundle.model_path == shared_bundle / "model.onnx"
    assert manifest.output_shapes(7) == {
        "probabilities": (7, 4),
        "task_probabilities": (7, 2),
        "novelty": (7,),
        "features": (7, 3),
    }


def test_golden_arrays(shared_bundle: Path) -> None:
    golden = Bundle.open(shared_bundle).golden()
    assert golden.image.shape == (4, 16, 16, 3) and golden.image.dtype == np.uint8
    assert golden.probabilities.argmax(axis=1).tolist() == [0, 1, 2, 3]
    assert golden.novelty.shape == (4,)


def test_a_bundle_may_be_reached_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(bundle)
    assert Bundle.open(tmp_path / "current").manifest.name == "colours"


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
def test_one_flipped_byte_is_found(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was altered .* copy the whole bundle"):
        Bundle.open(bundle)
    assert not Bundle.peek(bundle).contents


def test_a_resized_file_is_found(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="bytes instead of"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(bundle)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[" + b" " * (16 * 2**20) + b"]", "larger than"),
        (b"[]", "no schema version"),
        (b"{}", "no schema version"),
        (b'{"schema": true}', "no schema version"),
        (b'{"schema": 4}', "upgrade duallora-edge"),
        (b'{"schema": 2}', "export the run again"),
        (b'{"schema": 3}', "classes: is missing"),
    ],
)
def test_what_is_no_manifest(bundle: Path, content: bytes, message: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("classes", ["red", "green", "blue"], "tasks\\[1\\].classes"),
        ("classes", ["red", "green", "blue", "dark", "extra"], "do not cover 1 of the 5 classes"),
        ("classes", ["red", "red", "blue", "dark"], "same name twice"),
        ("classes", ["red\x1b[2J", "green", "blue", "dark"], "control characters"),
        ("classes", ["\ud800", "green", "blue", "dark"], "not valid"),
        ("classes", [], "must not be empty"),
        ("tasks", [], "at least one task"),
        ("tasks", [{"name": "all", "classes": [0, 1, 2, 3]}], "outputs.task_probabilities"),
        ("tasks", [{"name": "a", "classes": [0, 1, 2, True]}], "indices below 4"),
        ("preprocessing.size", 32, "input.shape"),
        ("preprocessing.size", 4, "preprocessing.size"),
        ("preprocessing.resize", "stretch", "'crop' or 'squash'"),
        ("preprocessing.reducing_gap", 0.5, "reducing_gap must be"),
        ("preprocessing.reducing_gap", "2", "preprocessing.reducing_gap"),
        ("input.dtype", "float32", "input.dtype"),
        ("input", None, "input: must be a mapping"),
        ("outputs.probabilities", {"dtype": "float32", "shape": ["N", 5]}, "outputs.probabilities"),
        ("outputs.features.shape", ["N"], "outputs.features.shape"),
        ("outputs.novelty.dtype", "float16", "outputs.novelty"),
        ("calibration.temperature", float("nan"), "not valid"),
        ("calibration.confidence_deciles", [0.5] * 8, "nine rising numbers"),
        ("calibration.confidence_deciles", [0.5] * 8 + [0.4], "nine rising numbers"),
        ("calibration.confidence_deciles", [0.5] * 8 + [1.4], "calibration.confidence_deciles"),
        ("calibration.temperature", 10**400, "not valid"),
        ("calibration.temperature", "warm", "calibration.temperature"),
        ("target", {"estimate": float("inf")}, "not valid"),
        ("bundle_version", 0, "bundle_version"),
        ("bundle_version", 1.0, "bundle_version"),
        ("files", {}, "must list model.onnx; files: must list golden.safetensors"),
        ("files./etc/hostname", {"sha256": "0" * 64, "bytes": 1}, "is not a valid file name"),
        ("files.a/../../b", {"sha256": "0" * 64, "bytes": 1}, "is not a valid file name"),
        ("files.a\\b", {"sha256": "0" * 64, "bytes": 1}, "is not a valid file name"),
        ("files.model.onnx", {"sha256": "0" * 63 + "G", "bytes": 1}, "64 hexadecimal digits"),
    ],
)
def test_what_a_manifest_must_not_say(shared_bundle: Path, path: str, value: object, message: str) -> None:
    document = read_json(shared_bundle / "manifest.json")
    head, _, rest = path.partition(".")
    keys = [head, rest] if head == "files" and rest else path.split(".")
    parent = document
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(document)


def test_all_problems_are_told_at_once_but_not_thousands(shared_bundle: Path) -> None:
    document = read_json(shared_bundle / "manifest.json")
    document.update(name=3, bundle_version="x", tasks=[{}] * 1000)
    with pytest.raises(BundleError) as error:
        Manifest.from_json(document)
    message = str(error.value)
    assert "tasks[0].classes" in message and " more)" in message
    assert message.count(";") <= 3 * MAX_PROBLEMS
    document.update(tasks=[{"name": "all", "classes": [0, 1, 2, 3]}])
    with pytest.raises(BundleError, match=r"name: .*; "):
        Manifest.from_json(document)


@pytest.mark.parametrize("target", ["../model.onnx", "model.onnx", "other.onnx", "/dev/zero"])
def test_a_link_in_the_bundle_is_refused(bundle: Path, target: str) -> None:
    model = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").unlink()
    for other in (bundle.parent / "model.onnx", bundle / "other.onnx"):
        other.write_bytes(model)
    (bundle / "model.onnx").symlink_to(target)
    with pytest.raises(BundleError, match=r"model\.onnx is missing or leads outside the bundle"):
        Bundle.open(bundle)


def test_a_pipe_and_a_huge_size_are_refused_at_once(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        Bundle.open(bundle)
    document = read_json(bundle / "manifest.json")
    document["files"]["model.onnx"]["bytes"] = 2**40
    with pytest.raises(BundleError, match=r"files\.model\.onnx\.bytes"):
        Manifest.from_json(document)


def test_what_was_hashed_is_what_is_used(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for name in ("model.onnx", "golden.safetensors"):
        (bundle / name).write_bytes(b"replaced meanwhile")
    assert len(opened.golden().image) == 4
    assert open_backend(opened, "cpu", 1).check.passed
    with pytest.raises(BundleError, match="no longer in memory; open the bundle again"):
        opened.without_contents.golden()


def test_a_bundle_that_is_replaced_while_it_is_read(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old files are gone when reading comes to them, but the folder of that name is whole."""
    old, new = make_bundle("bundle"), make_bundle("other", novelty_threshold=0.25)
    digest = Bundle.open(new).digest
    real, looks = os.open, []

    def replacing(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if path == "model.onnx":
            looks.append(path)
            if len(looks) == 1:
                old.rename(old.with_name("gone"))
                new.rename(old)
                (old.with_name("gone") / "model.onnx").unlink()
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", replacing)
    assert Bundle.open(old).digest == digest and len(looks) == 2


def test_a_graph_that_the_exporter_does_not_write(bundle: Path, seal: Callable[[Path], None]) -> None:
    model = onnx.load(bundle / "model.onnx")
    model.graph.node[3].op_type = "NonZero"
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    seal(bundle)
    with pytest.raises(BundleError, match=r"model\.onnx: The graph is not one that the exporter writes .*NonZero"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"novelty": None}, "lacks 'novelty'"),
        ({"novelty": np.zeros(3, np.float32)}, "'novelty' must be"),
        ({"features": np.zeros((4, 3), np.float16)}, "'features' must be"),
        ({"probabilities": np.full((4, 4), np.nan, np.float32)}, "'probabilities' must be finite"),
        ({"image": np.zeros((4, 8, 8, 3), np.uint8)}, "'image' must be"),
        ({"image": np.array(1, np.uint8)}, "'image' must be"),
    ],
)
def test_golden_arrays_must_fit(
    bundle: Path, change_golden: Callable[..., None], change: dict[str, Any], message: str
) -> None:
    change_golden(bundle, **change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle).golden()


@quick
@given(position=st.floats(0, 1), replacement=st.binary(max_size=20))
def test_damaged_golden_files_raise_nothing_else(shared_bundle: Path, position: float, replacement: bytes) -> None:
    bundle = Bundle.open(shared_bundle)
    content = bundle.content("golden.safetensors").read()
    start = int(position * len(content))
    damaged = content[:start] + replacement + content[start + len(replacement) :]
    with contextlib.suppress(BundleError):
        dataclasses.replace(bundle, contents={"golden.safetensors": Content(damaged)}).golden()


@quick
@given(data=st.data())
def test_mutated_manifests_raise_nothing_else(shared_bundle: Path, data: st.DataObject) -> None:
    document = read_json(shared_bundle / "manifest.json")
    for _ in range(data.draw(st.integers(1, 3))):
        _mutate(document, data)
    try:
        manifest = Manifest.from_json(copy.deepcopy(document))
    except BundleError as error:
        assert str(error).endswith("export the run again.") or "upgrade" in str(error)
    else:
        assert Manifest.from_json(manifest.to_json()) == manifest


@quick
@given(position=st.floats(0, 1), replacement=st.text(alphabet='{}[]",:0123456789e-.N\\u\x00é', max_size=6))
def test_mutated_manifest_files_raise_nothing_else(shared_bundle: Path, position: float, replacement: str) -> None:
    content = (shared_bundle / "manifest.json").read_text()
    start = int(position * len(content))
    folder = shared_bundle.parent / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(content[:start] + replacement + content[start + len(replacement) :])
    with pytest.raises(BundleError):  # the model is not there, so that even a harmless change ends here
        Bundle.open(folder)


def _mutate(value: Any, data: st.DataObject) -> None:
    """Walk to a random place of a JSON document, and replace, delete or add a value there."""
    while isinstance(value, (dict, list)) and value:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        action = data.draw(st.sampled_from(["descend", "descend", "replace", "delete", "add"]))
        if action == "descend" and isinstance(value[key], (dict, list)) and value[key]:
            value = value[key]
            continue
        if action == "delete":
            del value[key]
        elif action == "add" and isinstance(value, dict):
            value[data.draw(st.text(max_size=8))] = data.draw(json_values)
        else:
            value[key] = data.draw(json_values)
        return


def test_the_manifest_is_plain_json(shared_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(shared_bundle).manifest
    write_json(tmp_path / "manifest.json", manifest.to_json())
    assert json.loads((tmp_path / "manifest.json").read_text())["outputs"]["novelty"]["shape"] == ["N"]
