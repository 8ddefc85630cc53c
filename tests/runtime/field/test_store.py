"""The slots of a store: what comes in, what is tried, what is given up, and that a kill never leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duallora_edge.errors import BundleError, StoreError
from duallora_edge.files import write_json
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.field import store as module
from duallora_edge.runtime.field.store import MAX_TRIES, Slot, Slots, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def states(store: Store) -> list[str]:
    slots = store.read()
    return [*(slots.slots[name].state for name in "ab"), slots.active]


def make_good(store: Store, bundle: Bundle) -> None:
    name = store.put(bundle)
    store.begin_trial(name)
    store.end_trial(name, bundle.digest)


def test_the_life_of_two_slots(store: Store, bundles: list[Bundle]) -> None:
    assert states(store) == ["empty", "empty", ""] and store.candidate() is None
    assert store.put(bundles[0]) == "a" and store.candidate() == "a"
    assert states(store) == ["verified", "empty", ""]
    store.begin_trial("a")
    assert states(store) == ["trial", "empty", ""]
    with pytest.raises(StoreError, match="version 1 is being tried"):
        store.put(bundles[1])
    store.end_trial("a", bundles[0].digest)
    assert states(store) == ["good", "empty", "a"]
    with pytest.raises(StoreError, match="version 1 answers already"):
        store.put(bundles[0])
    make_good(store, bundles[1])
    assert states(store) == ["good", "good", "b"]
    assert Bundle.open(store.bundle_path("b")).digest == bundles[1].digest
    with pytest.raises(StoreError, match="version 1 is not above 2, which is good"):
        store.put(bundles[0])
    assert store.put(bundles[2]) == "a"
    store.begin_trial("a")
    store.end_trial("a", bundles[2].digest, "too slow")
    assert states(store) == ["bad", "good", "b"] and store.candidate() is None
    with pytest.raises(StoreError, match="given up before \\(too slow\\)"):
        store.put(bundles[2])


def test_revert(store: Store, bundles: list[Bundle]) -> None:
    with pytest.raises(StoreError, match="no other good bundle"):
        store.revert()
    for bundle in bundles[:2]:
        make_good(store, bundle)
    assert store.revert() == "a" and states(store) == ["good", "bad", "a"]
    with pytest.raises(StoreError, match="no other good bundle"):
        store.revert()
    with pytest.raises(StoreError, match="taken back by hand"):
        store.put(bundles[1])
    make_good(store, bundles[2])
    assert states(store) == ["good", "good", "b"]


def test_tries_are_counted_before_a_bundle_is_loaded(store: Store, bundles: list[Bundle]) -> None:
    make_good(store, bundles[0])
    name = store.put(bundles[1])
    for _ in range(MAX_TRIES):
        assert store.candidate() == name
        store.begin_trial(name)  # and the process dies
    assert store.candidate() is None and states(store) == ["good", "bad", "a"]
    assert "ended 2 times while it was tried" in store.read().slots["b"].reason


def test_a_trial_that_was_ended_from_outside_does_not_count(store: Store, bundles: list[Bundle]) -> None:
    name = store.put(bundles[0])
    for _ in range(5):
        store.begin_trial(name)
        store.interrupted_trial(name)
    assert store.candidate() == name and store.read().slots[name].tries == 0
    store.begin_trial(name)
    store.end_trial(name, "of another bundle")
    assert states(store)[0] == "trial"


def test_what_is_not_what_was_announced(store: Store, bundles: list[Bundle]) -> None:
    make_good(store, bundles[0])
    receiving = store.receiving(bundles[1].digest, bundles[1].manifest)
    with pytest.raises(BundleError, match="not the bundle that was announced"), receiving as (_, folder):
        shutil.copytree(bundles[2].path, folder)
    assert states(store) == ["good", "empty", "a"]
    receiving = store.receiving(bundles[1].digest, bundles[1].manifest)
    with pytest.raises(BundleError, match=r"altered|instead of"), receiving as (_, folder):
        shutil.copytree(bundles[1].path, folder)
        (folder / "model.onnx").write_bytes(b"other")
    assert states(store) == ["good", "empty", "a"] and store.put(bundles[1]) == "b"


def test_a_slot_with_files_of_others(store: Store, bundles: list[Bundle], tmp_path: Path) -> None:
    make_good(store, bundles[0])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.onnx").write_text("mine")
    store.bundle_path("b").symlink_to(mine)
    with pytest.raises(StoreError, match="is not the folder of a slot"):
        store.put(bundles[1])
    store.bundle_path("b").unlink()
    make_good(store, bundles[1])
    (store.bundle_path("a") / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds what no update brought \(notes.txt\)"):
        store.put(bundles[2])
    assert (mine / "model.onnx").read_text() == (store.bundle_path("a") / "notes.txt").read_text() == "mine"
    assert states(store) == ["good", "good", "b"]
    (store.bundle_path("a") / "notes.txt").unlink()
    (store.bundle_path("a") / MANIFEST).write_text("damaged")
    assert store.put(bundles[2]) == "a"


def test_a_full_disk_and_a_second_update(store: Store, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    make_good(store, bundles[0])
    with store.receiving(bundles[1].digest, bundles[1].manifest) as (_, folder):
        with pytest.raises(StoreError, match="Another process is updating"):
            store.put(bundles[2])
        shutil.copytree(bundles[1].path, folder)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(StoreError, match="has room for 0 MB"):
        store.put(bundles[2])
    assert states(store) == ["good", "empty", "a"]


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"schema": 2},
        {"active": "c"},
        {"active": 1},
        {"slots": {}},
        {"slots": {"a": {"state": "great"}, "b": {}}},
        {"refused": {"x": 1}},
        {"lowest": -1},
    ],
)
def test_damaged_records(store: Store, document: Any) -> None:
    good = Slots().to_json()
    write_json(store.path / "slots.json", {**good, **document} if isinstance(document, dict) and document else document)
    with pytest.raises(StoreError, match="is damaged"):
        store.read()
    with pytest.raises(StoreError, match="is damaged"):
        Store(store.path)


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        Store(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(StoreError, match="exists and is not a store"):
        Store.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


SLOT = st.builds(Slot, st.sampled_from(module.STATES), tries=st.integers(0, 9))


@given(
    st.builds(
        Slots,
        st.sampled_from(["", "a", "b"]),
        st.fixed_dictionaries(dict.fromkeys("ab", SLOT)),
        st.dictionaries(st.text("0123456789abcdef", min_size=1), st.text(max_size=20)),
        st.integers(0, 2**53),
    )
)
def test_records_read_back(slots: Slots) -> None:
    assert Slots.from_json(json.loads(json.dumps(slots.to_json()))) == slots


KILLED = """
import os, signal, sys
from pathlib import Path
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.runtime.field.store import Store
store, bundle, stop, what = Store(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), sys.argv[4]
opened, count = Bundle.open(bundle), 0
def audit(event, arguments):
    global count
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and "store" in str(arguments):
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
if what == "put":
    store.put(opened)
elif what == "trial":
    store.begin_trial("b"); store.end_trial("b", opened.digest)
elif what == "fail":
    store.begin_trial("b"); store.end_trial("b", opened.digest, "bad")
else:
    store.revert()
"""


@pytest.mark.parametrize("what", ["put", "trial", "fail", "revert"])
def test_a_kill_at_any_moment_leaves_a_bundle_that_answers(
    store: Store, bundles: list[Bundle], tmp_path: Path, what: str
) -> None:
    """Killed at each call that changes a file: the good bundle is there, and the same call then succeeds."""
    make_good(store, bundles[0])
    if what != "put":
        store.put(bundles[1])
    if what == "revert":
        store.begin_trial("b")
        store.end_trial("b", bundles[1].digest)
    shutil.copytree(store.path, tmp_path / "before")
    for stop in range(1, 60):
        shutil.rmtree(store.path)
        shutil.copytree(tmp_path / "before", store.path)
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(store.path), str(bundles[1].path), str(stop), what],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            check=False,
        )
        slots = Store(store.path).read()
        assert slots.slots[slots.active].state == "good"
        assert Bundle.open(store.bundle_path(slots.active)).digest == slots.slots[slots.active].digest
        assert slots.lowest <= slots.slots[slots.active].bundle_version
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-500:]
        again = Store(store.path)
        if what == "put":
            assert again.put(bundles[1]) == "b" if states(again)[1] == "empty" else states(again)[1] == "verified"
    else:
        raise AssertionError("it never came to an end")
    assert stop > 3


class Machine(RuleBasedStateMachine):
    """Any sequence of calls keeps the promises of a store; bundles are nothing but digests and versions here."""

    @initialize()
    def start(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store.create(Path(self.folder.name) / "store")
        self.version, self.good = 0, 0

    def _arrive(self, version: int) -> None:
        with self.store._locked():
            slots = self.store.read()
            if not self.store.why_not(slots, f"{version:x}", version):
                self.store._write(slots.changed(slots.other, Slot("verified", f"{version:x}", version)))

    @rule(back=st.integers(0, 3))
    def arrive(self, back: int) -> None:
        self.version += 1
        self._arrive(max(self.version - back, 1))

    @rule(fails=st.booleans())
    def try_it(self, fails: bool) -> None:
        if name := self.store.candidate():
            self.store.begin_trial(name)
            self.store.end_trial(name, self.store.read().slots[name].digest, "bad" if fails else "")

    @rule()
    def die_while_trying(self) -> None:
        if name := self.store.candidate():
            self.store.begin_trial(name)

    @precondition(lambda self: self.store.read().slots[self.store.read().other].state == "good")
    @rule()
    def revert(self) -> None:
        if self.store.read().active:
            self.store.revert()

    @invariant()
    def what_answers_is_good_and_was_never_given_up(self) -> None:
        if not hasattr(self, "store"):
            return
        slots = self.store.read()
        if slots.active:
            active = slots.slots[slots.active]
            assert active.state == "good" and active.digest not in slots.refused
            assert slots.lowest == active.bundle_version
        assert all(slot.tries <= MAX_TRIES for slot in slots.slots.values())

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestMachine = Machine.TestCase
