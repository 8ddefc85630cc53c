"""The store of a device: two slots for bundles, of which one answers and the other is the way back.

STORE/slots.json  what each slot holds, which one is active, what was given up
STORE/a, STORE/b  the bundles
STORE/taught      classes taught on this device (see `taught_folder`)
STORE/trusted     by what the channel of updates is trusted (see `update`)

A slot goes from ``empty`` to ``verified`` (a bundle whose every file has its hash), to ``trial`` (it was loaded, to see
whether it is better), and to ``good`` or ``bad``. Tries are counted before a bundle is loaded, so that one that kills
the process or the device is given up after `MAX_TRIES`. What was bad is not tried again. Every change of slots.json is
written to a temporary name, synced and renamed, under a lock that all processes of the device use.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from duallora_edge.device_profiles.reader import Section
from duallora_edge.errors import BundleError, StoreError
from duallora_edge.files import atomic_directory, open_lock, own_folder, read_json, write_json
from duallora_edge.runtime.bundle import GOLDEN, GRAPHS, MANIFEST, TEACH, Bundle, Manifest
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.text import escaped

SCHEMA = 1
SLOTS = ("a", "b")
STATES = ("empty", "verified", "trial", "good", "bad")
FILE, LOCK, RECEIVING, TAUGHT = "slots.json", "slots.lock", "receiving.lock", "taught"
MAX_TRIES = 2
MAX_REFUSED = 100
SPARE_BYTES = 16 * 2**20  # what has to be left on the disk beside a new bundle


@dataclass(frozen=True)
class Slot:
    """What a slot holds: the ``digest`` of its bundle, its version, and how often it was tried since it came."""

    state: str = "empty"
    digest: str = ""
    bundle_version: int = 0
    tries: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Slots:
    """The content of slots.json.

    Attributes:
        active: the slot that answers, "" before the first bundle.
        slots: a and b.
        refused: digests of bundles that were bad, each with the reason.
        lowest: no version below it is taken over (but by `Store.revert`, which lowers it).
    """

    active: str = ""
    slots: Mapping[str, Slot] = field(default_factory=lambda: dict.fromkeys(SLOTS, Slot()))
    refused: Mapping[str, str] = field(default_factory=dict)
    lowest: int = 0

    @property
    def other(self) -> str:
        """The slot that does not answer."""
        return SLOTS[self.active == SLOTS[0]]

    def changed(self, name: str, slot: Slot, **more: Any) -> Slots:
        """The same with another slot."""
        return replace(self, slots={**self.slots, name: slot}, **more)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, document: object) -> Slots:
        """Read the content of slots.json. Raises ``ValueError`` for anything else."""
        problems: list[str] = []
        top = Section(document, "", problems)
        if top.integer("schema", 1, 10**6) not in (0, SCHEMA):
            problems.append(f"a schema other than {SCHEMA}")
        entries = top.section("slots")
        slots = {}
        for name in SLOTS:
            entry = entries.section(name)
            slots[name] = Slot(
                entry.choice("state", STATES),
                _text(entry, "digest"),
                entry.integer("bundle_version", 0, 2**53),
                entry.integer("tries", 0, 100),
                _text(entry, "reason"),
            )
        active = _text(top, "active")
        if active not in ("", *SLOTS):
            problems.append("an active slot other than a and b")
        refused = top.section("refused")
        found = cls(
            active, slots, {key: _text(refused, key) for key in refused.values}, top.integer("lowest", 0, 2**53)
        )
        if problems:
            raise ValueError("; ".join(problems[:5]))
        return found


def _text(section: Section, key: str) -> str:
    value = section.values.get(key)
    if not isinstance(value, str) or len(value) > 1000:
        section.problem(key, "must be a short text")
        return ""
    return value


class Store:
    """A store on disk. Several processes may use it: one that runs, others that update, teach or look."""

    def __init__(self, path: Path) -> None:
        """Open a store. Raises `StoreError` when there is none, or its records are damaged."""
        self.path = path
        if not (path / FILE).is_file():
            raise StoreError(f"{path} is not a store; 'duallora-edge update {path} CHANNEL' makes one.")
        self.read()

    @classmethod
    def create(cls, path: Path) -> Store:
        """Open a store, made if there is none.

        Raises `StoreError` when something else is there, ``OSError`` when nothing can be written.
        """
        if not (path / FILE).is_file():
            if path.exists() and any(path.iterdir()):
                raise StoreError(f"{path} exists and is not a store; give another folder.")
            own_folder(path)
            with cls._locked_path(path):
                if not (path / FILE).is_file():
                    write_json(path / FILE, Slots().to_json())
        return cls(path)

    @property
    def taught(self) -> Path:
        """The folder of the classes taught on this device."""
        return self.path / TAUGHT

    def bundle_path(self, slot: str) -> Path:
        """The folder of a slot's bundle."""
        return self.path / slot

    def read(self) -> Slots:
        """What the slots hold. Raises `StoreError` when slots.json is damaged."""
        try:
            return Slots.from_json(read_json(self.path / FILE))
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path / FILE} is damaged ({escaped(str(error))[:200]}); restore it, or begin a new store."
            ) from error

    def put(self, bundle: Bundle) -> str:
        """Copy a bundle into the slot that does not answer; returns the slot. Raises as `receiving`."""
        with self.receiving(bundle.digest, bundle.manifest) as (slot, folder), atomic_directory(folder) as staging:
            for name in (*bundle.manifest.files, MANIFEST):
                shutil.copyfile(bundle.path / name, staging / name)
        return slot

    @contextmanager
    def receiving(self, digest: str, manifest: Manifest) -> Iterator[tuple[str, Path]]:
        """A slot, and the folder that the block has to make: the bundle with this manifest, of SHA-256 ``digest``.

        The slot is emptied first and verified afterwards: every file is read again and compared with the manifest.

        Raises:
            StoreError: The bundle was given up before or is not newer than the good one, another process is receiving
                one, the slot holds files of others, or the disk has no room. What answers stays untouched.
            BundleError: The folder is not the bundle that was announced.
            OSError: Nothing can be written.
        """
        with open_lock(self.path / RECEIVING) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(f"Another process is updating {self.path}; wait for it.") from error
            version = manifest.bundle_version
            with self._locked():
                slots = self.read()
                if reason := self.why_not(slots, digest, version):
                    raise StoreError(reason)
                slot = slots.other
                folder = self.bundle_path(slot)
                ours = _files(folder)
                self._write(slots.changed(slot, Slot()))
            if folder.is_dir():
                for path in ours:
                    path.unlink(missing_ok=True)
                folder.rmdir()
            needed = sum(record.bytes for record in manifest.files.values()) + SPARE_BYTES
            if (free := shutil.disk_usage(self.path).free) < needed:
                raise StoreError(
                    f"{self.path} has room for {free / 1e6:.0f} MB, version {version} needs {needed / 1e6:.0f} MB; "
                    "make room, and update again."
                )
            yield slot, folder
            bundle = Bundle.open(folder)
            if bundle.digest != digest:
                raise BundleError(f"{folder} is not the bundle that was announced; update again.")
            with self._locked():
                self._write(self.read().changed(slot, Slot("verified", digest, version)))

    def why_not(self, slots: Slots, digest: str, version: int) -> str:
        """Why a bundle is not wanted, "" where it is."""
        if digest in slots.refused:
            return f"{self.path}: this bundle was given up before ({slots.refused[digest]}); publish another one."
        if slots.active and digest == slots.slots[slots.active].digest:
            return f"{self.path}: version {version} answers already."
        other = slots.slots[slots.other]
        if other.state == "trial":
            return f"{self.path}: version {other.bundle_version} is being tried; update again when that is over."
        if other.state == "verified" and other.digest == digest:
            return f"{self.path}: version {version} is here already and waits for its trial."
        if version <= slots.lowest:
            return f"{self.path}: version {version} is not above {slots.lowest}, which is good."
        return ""

    def candidate(self) -> str | None:
        """The slot whose bundle is to be tried, None where there is none. One that had its tries is given up here."""
        with self._locked():
            slots = self.read()
            name, slot = slots.other, slots.slots[slots.other]
            if slot.state not in ("verified", "trial"):
                return None
            if slot.tries >= MAX_TRIES:
                self._give_up(slots, name, f"the process ended {slot.tries} times while it was tried")
                return None
            return name

    def begin_trial(self, name: str) -> None:
        """Count a try of a slot; called before its bundle is loaded."""
        with self._locked():
            slots = self.read()
            slot = slots.slots[name]
            self._write(slots.changed(name, replace(slot, state="trial", tries=slot.tries + 1)))

    def end_trial(self, name: str, digest: str, reason: str = "") -> None:
        """The slot whose bundle has this digest is good and active from now on, or with a ``reason`` bad."""
        with self._locked():
            slots = self.read()
            slot = slots.slots[name]
            if slot.digest != digest:  # another bundle came meanwhile
                return
            if reason:
                self._give_up(slots, name, reason)
            else:
                good = replace(slot, state="good", tries=0, reason="")
                lowest = max(slots.lowest, slot.bundle_version)
                self._write(slots.changed(name, good, active=name, lowest=lowest))

    def interrupted_trial(self, name: str) -> None:
        """Take a try back: it was ended from outside, and says nothing about the bundle."""
        with self._locked():
            slots = self.read()
            slot = slots.slots[name]
            if slot.state == "trial":
                self._write(slots.changed(name, replace(slot, state="verified", tries=max(slot.tries - 1, 0))))

    def revert(self) -> str:
        """Go back to the good bundle in the other slot; the one that answers now is given up. Returns the slot.

        Raises `StoreError` when the other slot holds no good bundle.
        """
        with self._locked():
            slots = self.read()
            name, slot = slots.other, slots.slots[slots.other]
            if not slots.active or slot.state != "good":
                raise StoreError(f"{self.path} has no other good bundle to go back to; publish one.")
            left = slots.slots[slots.active]
            refused = _with(slots.refused, left.digest, "taken back by hand")
            bad = replace(left, state="bad", reason="taken back by hand")
            self._write(slots.changed(slots.active, bad, active=name, refused=refused, lowest=slot.bundle_version))
            return name

    def _give_up(self, slots: Slots, name: str, reason: str) -> None:
        slot = slots.slots[name]
        refused = _with(slots.refused, slot.digest, reason)
        self._write(slots.changed(name, replace(slot, state="bad", reason=reason[:500]), refused=refused))

    def _write(self, slots: Slots) -> None:
        write_json(self.path / FILE, slots.to_json())

    def _locked(self) -> Any:
        return self._locked_path(self.path)

    @staticmethod
    @contextmanager
    def _locked_path(path: Path) -> Iterator[None]:
        with open_lock(path / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _files(folder: Path) -> list[Path]:
    """The files of the bundle in a slot, whole or damaged. Raises `StoreError` where there is anything else."""
    try:
        names = {MANIFEST, *Bundle.peek(folder).manifest.files}
    except BundleError:  # nothing, or damaged: what a bundle may hold by its own names
        names = {MANIFEST, WEIGHTS, GOLDEN, TEACH, *GRAPHS, "README.md", "build-engine.sh"}
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"{folder} is not the folder of a slot; move it away, and update again.")
    found = list(folder.iterdir()) if folder.exists() else []
    if foreign := sorted(path.name for path in found if path.name not in names or path.is_dir()):
        raise StoreError(f"{folder} holds what no update brought ({', '.join(foreign[:5])}); move it away.")
    return found


def _with(refused: Mapping[str, str], digest: str, reason: str) -> dict[str, str]:
    kept = {**refused, digest: reason[:500]}
    return dict(list(kept.items())[-MAX_REFUSED:])
