"""Deltas on the device: the promised bundle, bit for bit, or an error and nothing written."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duallora_edge.errors import BundleError, ConfigError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime.bundle import GOLDEN, MANIFEST, Bundle, FileRecord
from duallora_edge.runtime.field.delta import Changes, Term, add_terms, apply_delta, delta_facts, write_delta
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.tensor_file import TensorFile, blocks, header

RNG = np.random.default_rng(0)
UP, DOWN = (RNG.normal(size=(2, columns)).astype(np.float32) for columns in (3, 4))
BASE = {name: RNG.normal(size=(6, 4)).astype(np.float32) for name in ("kept", "zeros", "sum", "changed")}
BASE["zeros"][:] = 0  # behind a tensor that is copied: no length of a header
SUM = add_terms(BASE["sum"], [(3, UP, DOWN)])
TENSORS = {"w.up": UP, "w.down": DOWN, "changed": BASE["changed"] + 1, "added": np.ones(5, np.float32)}
AFTER = {"added": TENSORS["added"], **BASE, "sum": SUM, "changed": TENSORS["changed"]}


def put(folder: Path, arrays: dict[str, np.ndarray], version: int) -> Bundle:
    """Give a bundle other weights and another version."""
    (folder / WEIGHTS).write_bytes(b"".join(blocks(arrays)))
    document = read_json(folder / MANIFEST)
    document["bundle_version"] = version
    document["files"][WEIGHTS] = vars(FileRecord.of((folder / WEIGHTS).read_bytes()))
    write_json(folder / MANIFEST, document)
    return Bundle.open(folder)


Pair = tuple[Bundle, Bundle, Path]


@pytest.fixture
def pair(make_bundle: Callable[..., Path], change_golden: Callable[..., None], tmp_path: Path) -> Pair:
    """An older and a newer bundle and the delta between them; graph, README and golden outputs differ as well."""
    old = put(make_bundle("old"), BASE, 3)
    folder = make_bundle("new", novelty_threshold=0.25)
    change_golden(folder, novelty=Bundle.open(folder).golden().novelty + np.float32(0.01))
    new = put(folder, AFTER, 4)
    golden = TensorFile((folder / GOLDEN).read_bytes()).arrays()
    changes = {
        WEIGHTS: Changes(header(AFTER), TENSORS, {"sum": (Term(3, "w"),)}),
        GOLDEN: Changes(header(golden), {"novelty": golden["novelty"]}, {}),
    }
    write_delta(tmp_path / "3-4.delta", old, new, changes)
    return old, new, tmp_path / "3-4.delta"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_result_is_the_new_bundle_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    old, new, delta = pair
    before = content(old.path)
    made = apply_delta(old.path, delta, tmp_path / "made")
    assert content(tmp_path / "made") == content(new.path) and made.digest == new.digest
    assert content(old.path) == before and delta_facts(delta).from_version == 3
    assert Bundle.open(tmp_path / "made").manifest == new.manifest
    with zipfile.ZipFile(delta) as archive:  # the graph is the same in both
        assert "model.onnx" not in archive.namelist()


finite = st.floats(-(2.0**20), 2.0**20, width=32)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.data())
def test_terms_are_added_rank_by_rank(rows: int, columns: int, rank: int, data: st.DataObject) -> None:
    def floats(*shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        return np.array(data.draw(st.lists(finite, min_size=count, max_size=count)), np.float32).reshape(shape)

    tensor, up, down = floats(rows, columns), floats(rank, rows), floats(rank, columns)
    expected = [list(row) for row in tensor]
    for k in range(rank):
        for i in range(rows):
            for j in range(columns):
                expected[i][j] = np.float32(expected[i][j] + np.float32(up[k, i] * down[k, j]))
    found = add_terms(tensor, [(0, up, down)])
    assert found.tobytes() == np.array(expected, np.float32).reshape(rows, columns).tobytes()
    halves = add_terms(
        add_terms(tensor, [(0, up[: rank // 2], down[: rank // 2])]), [(0, up[rank // 2 :], down[rank // 2 :])]
    )
    assert halves.tobytes() == found.tobytes()


def test_what_a_delta_does_not_fit(pair: Pair, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    old, new, delta = pair
    with pytest.raises(BundleError, match=r"for another bundle .* from version 3 to 4"):
        apply_delta(new.path, delta, tmp_path / "made")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        apply_delta(old.path, delta, tmp_path / "made")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN])
def test_an_older_bundle_that_was_altered(pair: Pair, tmp_path: Path, name: str) -> None:
    old, _, delta = pair
    damaged = bytearray((old.path / name).read_bytes())
    damaged[-1] ^= 1
    (old.path / name).write_bytes(damaged)
    if name == WEIGHTS:  # the last tensor of the older file is replaced, so nothing is lost
        damaged[-1] ^= 1
        damaged[TensorFile(damaged).entries["kept"].start] ^= 1
        (old.path / name).write_bytes(damaged)
    else:
        damaged[TensorFile(damaged).entries["image"].start] ^= 1
        (old.path / name).write_bytes(damaged)
    with pytest.raises(BundleError, match=rf"{name} did not become what .* promises"):
        apply_delta(old.path, delta, tmp_path / "made")
    (old.path / name).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        apply_delta(old.path, delta, tmp_path / "made")
    (old.path / name).write_bytes(b"short")
    with pytest.raises(BundleError, match="is damaged"):
        apply_delta(old.path, delta, tmp_path / "made")
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*"))


def rewritten(delta: Path, change: Callable[[dict[str, bytes]], Iterable[tuple[str, bytes]] | None]) -> None:
    with zipfile.ZipFile(delta) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    listed = change(members) or members.items()
    with zipfile.ZipFile(delta, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in listed:
            archive.writestr(name, value)


def facts(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    def of_members(members: dict[str, bytes]) -> None:
        document = json.loads(members["delta.json"])
        change(document)
        members["delta.json"] = json.dumps(document).encode()

    return of_members


def tensors(**changed: np.ndarray | None) -> Callable[[dict[str, bytes]], None]:
    def of_members(members: dict[str, bytes]) -> None:
        arrays = {**TENSORS, **{name.replace("_", "."): value for name, value in changed.items()}}
        arrays = {name: value for name, value in arrays.items() if value is not None}
        members[f"{WEIGHTS}.tensors"] = b"".join(blocks(arrays))

    return of_members


def sums(terms: Any) -> Callable[[dict[str, bytes]], None]:
    return facts(lambda document: document["sums"].update({WEIGHTS: {"sum": terms}}))


def bomb(members: dict[str, bytes]) -> None:
    members[f"{WEIGHTS}.tensors"] = bytes(10**8)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda members: members.pop("delta.json") and None, "no delta.json"),
        (lambda members: members.pop(MANIFEST) and None, "no manifest.json"),
        (lambda members: members.update({MANIFEST: members[MANIFEST] + b" "}), "another one than it promises"),
        (lambda members: members.update({MANIFEST: b"{}"}), "no schema version"),
        (lambda members: members.update({"delta.json": b"[]"}), "schema"),
        (lambda members: [*members.items(), ("delta.json", b"{}")], "members"),
        (lambda members: members.update({f"x{i}": b"" for i in range(200)}), "members"),
        (lambda members: members.pop(f"{WEIGHTS}.tensors") and None, f"no {WEIGHTS}.tensors"),
        (lambda members: members.pop(f"{WEIGHTS}.header") and None, f"no {WEIGHTS}"),
        (lambda members: members.update({f"{WEIGHTS}.header": b"junk"}), "not a tensor file"),
        (lambda members: members.update({f"{WEIGHTS}.header": header(BASE)}), "bytes instead of"),
        (facts(lambda document: document.update(schema=2)), "upgrade duallora-edge here"),
        (facts(lambda document: document["from"].pop("sha256")), "sha256: is missing"),
        (facts(lambda document: document["to"].update(sha256="0")), "another one than it promises"),
        (tensors(added=None), "has no added"),
        (tensors(added=np.ones(6, np.float32)), "another shape"),
        (tensors(added=np.zeros(5, np.float32)), "did not become"),
        (tensors(w_up=None), "no terms of sum"),
        (tensors(w_up=UP[:1]), "do not fit"),
        (tensors(w_up=UP.astype(np.float16)), "do not fit"),
        (tensors(w_up=UP[0]), "do not fit"),
        (tensors(w_down=DOWN[:, :3]), "do not fit"),
        (tensors(w_up=np.ones((2, 7), np.float32)), "do not fit"),
        (sums([[4, "w"]]), "do not fit"),
        (sums([[-1, "w"]]), "do not fit"),
        (sums([["3", "w"]]), "do not fit"),
        (sums([[3, "w"], [3, "w"]]), "do not fit"),
        (sums([[3]]), "no terms"),
        (sums("nonsense"), "no terms"),
        (facts(lambda document: document["sums"].update({WEIGHTS: 5})), "no sums"),
        (sums([[0, "w"]]), "did not become"),
        (bomb, "bytes"),
    ],
)
def test_a_damaged_delta_is_refused_with_a_reason(
    pair: Pair, tmp_path: Path, change: Callable[[dict[str, bytes]], Any], reason: str
) -> None:
    old, _, delta = pair
    rewritten(delta, change)
    with pytest.raises(BundleError, match=reason):
        apply_delta(old.path, delta, tmp_path / "made")
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(position=st.floats(0, 1), replacement=st.binary(min_size=1, max_size=8))
def test_damage_anywhere_never_gives_another_bundle(
    pair: Pair, tmp_path: Path, position: float, replacement: bytes
) -> None:
    old, new, delta = pair
    damaged, made = tmp_path / "damaged.delta", tmp_path / "made"
    whole = delta.read_bytes()
    start = int(position * len(whole))
    damaged.write_bytes(whole[:start] + replacement + whole[start + len(replacement) :])
    with contextlib.suppress(BundleError):
        assert apply_delta(old.path, damaged, made).digest == new.digest
        shutil.rmtree(made)
    with contextlib.suppress(BundleError):
        delta_facts(damaged)


def test_no_delta_at_all(pair: Pair, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", pair[0].path / MANIFEST):
        with pytest.raises(BundleError, match="cannot be read"):
            delta_facts(path)
        with pytest.raises(BundleError, match="cannot be read"):
            apply_delta(pair[0].path, path, tmp_path / "made")
