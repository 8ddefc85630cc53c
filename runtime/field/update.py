"""Updates of a store from a channel: signed, in order, and never older than what is good.

A channel is a repository of The Update Framework (https://theupdateframework.io) in a plain folder, which any web
server can serve and a USB stick can hold. python-tuf checks what is read from it: signatures, versions, lengths, hashes
and expiry. The target `INDEX` lists the bundles; each lies in one file, and deltas lead from older ones to it.

STORE/trusted    the metadata that was trusted last; the time of the last update; the place of this device among all
STORE/.download  what is being fetched; a large file goes on after an interruption
"""

from __future__ import annotations

import fcntl
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from duallora_edge.device_profiles.reader import Section
from duallora_edge.errors import BundleError, StoreError, UpdateError
from duallora_edge.files import open_lock, parse_json, read_json, read_limited, write_json
from duallora_edge.runtime.field.delta import apply_delta, delta_facts
from duallora_edge.runtime.field.store import Slots, Store

if TYPE_CHECKING:
    from tuf.ngclient.fetcher import FetcherInterface

INDEX = "bundles.json"
SCHEMA = 1
TRUSTED, DEVICE, DOWNLOADS = "trusted", "device.json", ".download"
PART = ".part"  # of a file that is still being fetched
MAX_BUNDLES, MAX_DELTAS = 1000, 20
MAX_ROOT_BYTES = 2**20

Say = Callable[[str], None]


@dataclass(frozen=True)
class Offer:
    """A bundle of a channel.

    Attributes:
        bundle_version: its version.
        sha256: that of its manifest.
        file: the target that holds it whole.
        deltas: targets that lead to it, by the SHA-256 of the older manifest.
        share: the share of the devices that are to take it, 0..1.
    """

    bundle_version: int
    sha256: str
    file: str
    deltas: dict[str, str]
    share: float


def read_index(content: bytes) -> list[Offer]:
    """The bundles that an index lists, newest first. Raises ``ValueError`` for anything else."""
    problems: list[str] = []
    top = Section(parse_json(content), "", problems)
    if top.integer("schema", 1, 10**6) not in (0, SCHEMA):
        raise ValueError(f"a schema other than {SCHEMA}; upgrade duallora-edge on this device")
    entries = top.values.get("bundles")
    if not isinstance(entries, list) or len(entries) > MAX_BUNDLES:
        raise ValueError("no list of bundles")
    offers = []
    for index, value in enumerate(entries):
        entry = Section(value, f"bundles[{index}]", problems)
        deltas = entry.section("deltas")
        offers.append(
            Offer(
                entry.integer("bundle_version", 1, 2**53),
                entry.text("sha256"),
                entry.text("file"),
                {digest: deltas.text(digest) for digest in list(deltas.values)[:MAX_DELTAS]},
                entry.number("share", 0, 1),
            )
        )
    if problems:
        raise ValueError("; ".join(problems[:5]))
    return sorted(offers, key=lambda offer: -offer.bundle_version)


def update(store: Store, channel: str, root: Path | None = None, say: Say = lambda text: None) -> str | None:
    """Bring the newest bundle of a channel that is wanted into the slot that does not answer.

    Args:
        store: The store; a process that runs it tries the bundle by itself.
        channel: The folder or the address of the channel.
        root: The file by which the channel is trusted, at the first update; the store keeps it.
        say: Called with lines for the user.

    Returns:
        The slot that was filled, None where there is nothing new.

    Raises:
        UpdateError: The channel cannot be reached, or what it offers is not to be trusted.
        StoreError: The disk has no room, or another process is updating.
        BundleError: The bundle is not what was announced.
        OSError: Nothing can be written.
    """
    trusted = store.path / TRUSTED
    trusted.mkdir(exist_ok=True)
    device = _device(trusted)
    with _downloads(store.path / DOWNLOADS) as folder:
        client = _Client(channel, trusted, root, device["time"], folder)
        offers = client.offers()
        write_json(trusted / DEVICE, {**device, "time": max(device["time"], time.time())})
        slots = store.read()
        offer = next((each for each in offers if device["place"] < each.share), None)
        if offer is None:
            say("The channel has no bundle for this device.")
            return None
        if reason := store.why_not(slots, offer.sha256, offer.bundle_version):
            say(reason)
            return None
        return _receive(store, slots, offer, client, say)


def _receive(store: Store, slots: Slots, offer: Offer, client: _Client, say: Say) -> str:
    active = slots.slots[slots.active] if slots.active else None
    base = store.bundle_path(slots.active) if active is not None else None
    delta = offer.deltas.get(active.digest) if active is not None else None
    for name in (delta, offer.file):
        if name is None:
            continue
        file = client.download(name)
        size = file.stat().st_size / 1e6
        facts = delta_facts(file)
        if facts.digest != offer.sha256:
            raise UpdateError(f"{name} of the channel holds another bundle than it lists; publish it again.")
        try:
            with store.receiving(offer.sha256, facts.manifest) as (slot, folder):
                apply_delta(base if name == delta else None, file, folder)
        except BundleError as error:
            if name != delta:
                raise
            say(f"The delta does not fit, the whole bundle is fetched: {error}")
            continue
        say(f"Version {offer.bundle_version} is in slot {slot} ({size:.2f} MB) and waits for its trial.")
        return slot
    raise AssertionError("unreachable")


def _device(trusted: Path) -> dict[str, float]:
    """The place of this device among all, 0..1, drawn once; and when it was updated last, in seconds since 1970."""
    path = trusted / DEVICE
    try:
        found = read_json(path)
        return {"place": float(found["place"]), "time": float(found["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        made = {"place": secrets.randbelow(10**6) / 10**6, "time": 0.0}
        write_json(path, made)
        return made


class _Client:
    """A channel, read through python-tuf."""

    def __init__(self, channel: str, trusted: Path, root: Path | None, last: float, folder: Path) -> None:
        from tuf.api.exceptions import DownloadError, RepositoryError
        from tuf.ngclient import Updater

        metadata, targets, fetcher = _addresses(channel, folder)
        self._channel = channel
        self._errors = (DownloadError, RepositoryError, OSError, ValueError)
        known = (trusted / "root.json").exists()
        if not known and root is None:
            raise UpdateError(
                "The store trusts no channel yet; give the root.json that 'duallora-edge channel init' wrote (--root)."
            )
        try:
            first = None if known or root is None else read_limited(root, MAX_ROOT_BYTES)
            self._updater = Updater(str(trusted), metadata, str(folder), targets, fetcher=fetcher, bootstrap=first)
            # A device without a battery wakes up in 1970; what expired before the last update has expired.
            clock = datetime.fromtimestamp(max(time.time(), last), timezone.utc)
            self._updater._trusted_set.reference_time = clock
            self._updater.refresh()
        except self._errors as error:
            raise self._refused(error) from error

    def offers(self) -> list[Offer]:
        """The bundles of the channel."""
        try:
            return read_index(read_limited(self.download(INDEX), 16 * 2**20))
        except ValueError as error:
            raise UpdateError(f"{INDEX} of {self._channel} cannot be read: {error}.") from error

    def download(self, name: str) -> Path:
        """A target of the channel, whose length and hash were checked."""
        try:
            info = self._updater.get_targetinfo(name)
            if info is None:
                raise UpdateError(f"{self._channel} lists {name}, but did not sign it; publish it again.")
            return Path(self._updater.download_target(info))
        except self._errors as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> UpdateError:
        reason = f"{type(error).__name__}: {error}".strip().rstrip(".")[:300]
        return UpdateError(f"{self._channel} is not used ({reason}); what answers stays as it is.")


def _addresses(channel: str, parts: Path) -> tuple[str, str, FetcherInterface]:
    """The addresses of metadata and targets, and what fetches them; ``parts`` holds what has come of a large file."""
    from duallora_edge.runtime.field.fetching import FolderFetcher, HttpFetcher

    address = urlsplit(channel)
    if address.scheme in ("http", "https"):
        base = channel.rstrip("/")
        return f"{base}/metadata/", f"{base}/targets/", HttpFetcher(parts)
    folder = Path(unquote(address.path) if address.scheme == "file" else channel).resolve()
    if not (folder / "metadata").is_dir():
        raise UpdateError(
            f"{channel} is not a channel; give its folder, or an address that begins with http:// or https://."
        )
    base = folder.as_uri()
    return f"{base}/metadata/", f"{base}/targets/", FolderFetcher(folder)


@contextmanager
def _downloads(path: Path) -> Iterator[Path]:
    """The folder for what is downloaded.

    What a killed update left there is deleted, but for a part of a file, with which the next one goes on.
    """
    if path.is_symlink():
        raise StoreError(f"{path} is a link, and what it leads to is not ours to clear; delete the link.")
    path.mkdir(exist_ok=True)
    with open_lock(path / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"Another process is updating {path.parent}; wait for it.") from error
        _clear(path)
        yield path
        _clear(path)


def _clear(path: Path) -> None:
    for file in path.iterdir():
        if file.name != ".lock" and not file.name.endswith(PART):
            file.unlink()
