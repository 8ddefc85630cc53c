"""Publishing side of a channel (see `update`): keys, bundles, and the metadata that makes them trusted.

CHANNEL/metadata, CHANNEL/targets   what devices read; it holds no key
KEYS/offline/root.pem, targets.pem  sign who may sign, and what is published; keep them off the server
KEYS/online/snapshot.pem, timestamp.pem  sign that this is the newest; `refresh` needs only these, regularly
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora_edge.errors import UpdateError
from duallora_edge.files import open_lock, read_limited, sync_directory, write_atomic
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.runtime.field.delta import DeltaFacts, delta_facts, write_delta
from duallora_edge.runtime.field.update import INDEX, MAX_DELTAS, SCHEMA, Offer, read_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuf.api.metadata import Metadata

ROLES = ("root", "targets", "snapshot", "timestamp")
PLACE = {"root": "offline", "targets": "offline", "snapshot": "online", "timestamp": "online"}
NEW = ".new"  # ends the name of a key that does not count yet
DAYS = {"root": 3650, "targets": 365, "snapshot": 30, "timestamp": 7}
MAX_BYTES = 16 * 2**20


class Channel:
    """A channel's folder and the keys of its publisher; every change is signed and written metadata last."""

    def __init__(self, path: Path, keys: Path) -> None:
        """Name the folders; `open` and `create` make sure that they are there."""
        self.path, self.keys = path, keys
        self.metadata, self.targets = path / "metadata", path / "targets"

    @classmethod
    def open(cls, path: Path, keys: Path) -> Channel:
        """Open a channel, and end a change of keys that was interrupted. Raises `UpdateError` where there is none."""
        channel = cls(path, keys)
        if not (channel.metadata / "timestamp.json").is_file():
            raise UpdateError(f"{path} is not a channel; 'duallora-edge channel init {path}' makes one.")
        with _locked(path):
            for role in ROLES:
                channel._take_new_key(role)
        return channel

    @classmethod
    def create(cls, path: Path, keys: Path) -> Channel:
        """Make keys and an empty channel. Raises `UpdateError` where either is there already."""
        from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

        for folder in (path, keys):
            if folder.exists() and any(folder.iterdir()):
                raise UpdateError(f"{folder} is not empty; a new channel needs new folders.")
        (path / "metadata").mkdir(parents=True)
        (path / "targets").mkdir()
        root = Root(consistent_snapshot=True)
        for role in ROLES:
            root.add_key(_new_key(keys, role).public_key, role)
            _key(keys, role, NEW).replace(_key(keys, role))
        channel = cls(path, keys)
        with _locked(path):
            channel._put("root", Metadata(root))
            channel._publish(Metadata(Targets()), Metadata(Snapshot()), Metadata(Timestamp()), [], bump=False)
        shutil.copyfile(path / "metadata" / "1.root.json", path / "root.json")
        return channel

    def offers(self) -> list[Offer]:
        """The bundles of the channel, newest first."""
        target = self._signed("targets").signed.targets[INDEX]
        digest = target.hashes["sha256"]
        return read_index(read_limited(self.targets / f"{digest}.{INDEX}", MAX_BYTES))

    def publish(self, bundle: Path | None, deltas: Iterable[Path] = (), share: float = 1.0) -> Offer:
        """Offer a bundle, or further deltas to the newest one, to a share of the devices, and return the offer.

        Raises `UpdateError` for a version that is not above the newest one, or deltas to something else, `BundleError`
        for a damaged bundle or delta.
        """
        offers = {offer.bundle_version: offer for offer in self.offers()}
        files: dict[str, Path] = {}
        with tempfile.TemporaryDirectory(dir=self.path, prefix=".new-") as folder:
            if bundle is not None:
                opened = Bundle.open(bundle)
                version = opened.manifest.bundle_version
                if offers and version <= max(offers):
                    raise UpdateError(
                        f"{bundle} has version {version}, the channel {max(offers)}; devices take newer versions only: "
                        "export it with --bundle-version."
                    )
                name = f"{version:04d}.bundle"
                files[name] = Path(folder) / name
                write_delta(files[name], None, opened, {})
                offers[version] = Offer(version, opened.digest, name, {}, share)
            if not offers:
                raise UpdateError("The channel is empty; publish a bundle first.")
            newest = offers[max(offers)]
            found = dict(newest.deltas)
            for delta in deltas:
                facts: DeltaFacts = delta_facts(delta)
                if facts.digest != newest.sha256 or not facts.from_digest:
                    raise UpdateError(f"{delta} does not lead to version {newest.bundle_version}, the newest one.")
                name = f"{facts.from_version:04d}-{newest.bundle_version:04d}-{facts.from_digest[:8]}.delta"
                files[name], found[facts.from_digest] = delta, name
            if len(found) > MAX_DELTAS:
                raise UpdateError(f"At most {MAX_DELTAS} deltas may lead to one version.")
            offer = Offer(newest.bundle_version, newest.sha256, newest.file, found, share)
            offers[offer.bundle_version] = offer
            self._offer(list(offers.values()), files)
        return offer

    def set_share(self, version: int, share: float) -> None:
        """Offer a version to another share of the devices; 0 withdraws it. Raises `UpdateError` for an unknown one."""
        offers = {offer.bundle_version: offer for offer in self.offers()}
        if version not in offers:
            raise UpdateError(
                f"The channel has no version {version}; there are: {', '.join(map(str, offers)) or 'none'}."
            )
        old = offers[version]
        offers[version] = Offer(version, old.sha256, old.file, old.deltas, share)
        self._offer(list(offers.values()), {})

    def refresh(self) -> None:
        """Sign anew that this is the newest, with the online keys alone; needed within the `DAYS` of each role."""
        with _locked(self.path):
            self._publish(None, self._signed("snapshot"), self._signed("timestamp"), None)

    def rotate(self, role: str) -> None:
        """Replace the key of a role; devices learn of it from a new root, which the old and the new one sign.

        The new key is on the disk before the root names it, and the old one until then: a kill loses neither.
        """
        with _locked(self.path):
            signed = self._signed("root")
            root = signed.signed
            signers = [_signer(self.keys, "root")]
            new = _new_key(self.keys, role)
            for old in list(root.roles[role].keyids):
                root.revoke_key(old, role)
            root.add_key(new.public_key, role)
            if role == "root":
                signers.append(new)
            root.version += 1
            root.expires = _expiry("root")
            signed.signatures.clear()
            for signer in signers:
                signed.sign(signer, append=True)
            write_atomic(self.metadata / f"{root.version}.root.json", signed.to_bytes())
            self._take_new_key(role)
            self._publish(
                self._signed("targets") if role == "targets" else None, self._signed("snapshot"),
                self._signed("timestamp"), None,
            )  # fmt: skip

    def _take_new_key(self, role: str) -> None:
        """Put a new key in the place of the old one if the root names it; one that it does not name is not used."""
        new = _key(self.keys, role, NEW)
        named = self._signed("root").signed.roles[role].keyids
        if new.is_file() and _signer(self.keys, role, NEW).public_key.keyid in named:
            new.replace(_key(self.keys, role))

    def expiry(self) -> dict[str, datetime]:
        """When devices will refuse what each role signed."""
        return {role: self._signed(role).signed.expires for role in ROLES}

    def _offer(self, offers: list[Offer], files: dict[str, Path]) -> None:
        with _locked(self.path):
            self._publish(self._signed("targets"), self._signed("snapshot"), self._signed("timestamp"), offers, files)

    def _publish(
        self,
        targets: Metadata[Any] | None,
        snapshot: Metadata[Any],
        timestamp: Metadata[Any],
        offers: list[Offer] | None,
        files: dict[str, Path] | None = None,
        *,
        bump: bool = True,
    ) -> None:
        """Write targets first, then what lists them; the timestamp comes last, so that devices see all or nothing."""
        from tuf.api.metadata import MetaFile

        if targets is not None:
            if offers is not None:
                index = {
                    "schema": SCHEMA,
                    "bundles": [vars(offer) for offer in sorted(offers, key=lambda o: -o.bundle_version)],
                }
                self._add(targets, INDEX, json.dumps(index, indent=1).encode())
            for name, path in (files or {}).items():
                self._add(targets, name, path)
            self._put("targets", targets, bump)
            snapshot.signed.meta["targets.json"] = MetaFile(targets.signed.version)
        self._put("snapshot", snapshot, bump)
        timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
        self._put("timestamp", timestamp, bump)

    def _add(self, targets: Metadata[Any], name: str, content: bytes | Path) -> None:
        from tuf.api.metadata import TargetFile

        if isinstance(content, Path):
            info = TargetFile.from_file(name, str(content))
        else:
            info = TargetFile.from_data(name, content)
        path = self.targets / f"{info.hashes['sha256']}.{name}"
        if not path.exists():
            write_atomic(path, content if isinstance(content, bytes) else content.read_bytes())
        targets.signed.targets[name] = info

    def _put(self, role: str, metadata: Metadata[Any], bump: bool = False) -> None:
        """Sign metadata with the key of its role and write it under its version."""
        metadata.signed.version += bump
        metadata.signed.expires = _expiry(role)
        metadata.signatures.clear()
        metadata.sign(_signer(self.keys, role))
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        write_atomic(self.metadata / name, metadata.to_bytes())

    def _signed(self, role: str) -> Metadata[Any]:
        """The metadata of a role that devices see; what an interrupted publication left beside it is written over."""
        from tuf.api.metadata import Metadata

        path = self.metadata / "timestamp.json"
        if role == "root":
            path = max(self.metadata.glob("*.root.json"), key=lambda each: int(each.name.split(".")[0]))
        elif role == "snapshot":
            path = self.metadata / f"{self._signed('timestamp').signed.snapshot_meta.version}.snapshot.json"
        elif role == "targets":
            path = self.metadata / f"{self._signed('snapshot').signed.meta['targets.json'].version}.targets.json"
        return Metadata.from_bytes(read_limited(path, MAX_BYTES))


def _expiry(role: str) -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=DAYS[role])


def _key(keys: Path, role: str, suffix: str = "") -> Path:
    return keys / PLACE[role] / f"{role}.pem{suffix}"


def _new_key(keys: Path, role: str) -> Any:
    """Make a key that only its owner can read, beside an older one; returns its signer."""
    from securesystemslib.signer import CryptoSigner

    signer, path = CryptoSigner.generate_ed25519(), _key(keys, role, NEW)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)  # of a change that was interrupted before it counted
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(signer.private_bytes)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
    return signer


def _signer(keys: Path, role: str, suffix: str = "") -> Any:
    """The signer of a role. Raises `UpdateError` where its key is not there."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    path = _key(keys, role, suffix)
    try:
        return CryptoSigner(load_pem_private_key(read_limited(path, 10_000), None))
    except (OSError, ValueError, TypeError) as error:
        raise UpdateError(
            f"The key of {role} cannot be read ({path}: {error}); give the right folder of keys."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One publisher at a time."""
    with open_lock(path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
