"""Updates from a channel: what is taken, and every attack on the way is refused while the store stays as it was."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

tuf = pytest.importorskip("tuf")

from tuf.api.metadata import Metadata  # noqa: E402

from duallora_edge.errors import StoreError, UpdateError  # noqa: E402
from duallora_edge.files import read_json  # noqa: E402
from duallora_edge.runtime.bundle import Bundle  # noqa: E402
from duallora_edge.runtime.field import channel as publishing  # noqa: E402
from duallora_edge.runtime.field import update as updating  # noqa: E402
from duallora_edge.runtime.field.channel import DAYS, Channel  # noqa: E402
from duallora_edge.runtime.field.delta import write_delta  # noqa: E402
from duallora_edge.runtime.field.store import Store  # noqa: E402
from duallora_edge.runtime.field.update import read_index, update  # noqa: E402


@pytest.fixture
def channel(tmp_path: Path, bundles: list[Bundle]) -> Channel:
    """A channel that offers version 1."""
    made = Channel.create(tmp_path / "channel", tmp_path / "keys")
    made.publish(bundles[0].path)
    return made


@pytest.fixture
def store(tmp_path: Path, channel: Channel, bundles: list[Bundle]) -> Store:
    """A store in which version 1 of the channel is good."""
    made = Store.create(tmp_path / "store")
    assert update(made, str(channel.path), channel.path / "root.json") == "a"
    made.begin_trial("a")
    made.end_trial("a", bundles[0].digest)
    return made


def take(store: Store, channel: Channel, **more: Any) -> list[str]:
    """What an update says."""
    said: list[str] = []
    update(store, str(channel.path), say=said.append, **more)
    return said


def test_new_versions_come_once(store: Store, channel: Channel, bundles: list[Bundle]) -> None:
    assert "answers already" in take(store, channel)[0]
    channel.publish(bundles[1].path)
    assert take(store, channel)[0].startswith("Version 2 is in slot b (0.0")
    assert "waits for its trial" in take(store, channel)[0]
    assert Bundle.open(store.bundle_path("b")).digest == bundles[1].digest
    store.begin_trial("b")
    assert "is being tried" in take(store, channel)[0]
    store.end_trial("b", bundles[1].digest, "worse")
    assert "given up before (worse)" in take(store, channel)[0]
    assert store.read().active == "a"


def test_a_delta_is_preferred_and_a_whole_bundle_comes_where_it_does_not_fit(
    store: Store, channel: Channel, bundles: list[Bundle], tmp_path: Path
) -> None:
    write_delta(tmp_path / "1-2.delta", bundles[0], bundles[1], {})
    write_delta(tmp_path / "2-3.delta", bundles[1], bundles[2], {})
    with pytest.raises(UpdateError, match="does not lead to version 2"):
        channel.publish(bundles[1].path, [tmp_path / "2-3.delta"])
    offer = channel.publish(bundles[1].path, [tmp_path / "1-2.delta"])
    assert list(offer.deltas) == [bundles[0].digest]
    spied: list[str] = []
    real = updating._Client.download

    def spy(client: Any, name: str) -> Path:
        spied.append(name)
        return real(client, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updating._Client, "download", spy)
        assert take(store, channel)[0].startswith("Version 2 is in slot b")
    assert spied == ["bundles.json", f"0001-0002-{bundles[0].digest[:8]}.delta"]
    assert Bundle.open(store.bundle_path("b")).digest == bundles[1].digest

    channel.publish(bundles[2].path)  # no delta from 1
    assert take(store, channel)[0].startswith("Version 3 is in slot b")
    write_delta(tmp_path / "1-4.delta", bundles[0], bundles[3], {})
    channel.publish(bundles[3].path, [tmp_path / "1-4.delta"])
    (store.bundle_path("a") / "model.onnx").write_bytes(b"worn out")  # the delta needs it
    said = take(store, channel)
    assert "The delta does not fit, the whole bundle is fetched" in said[0] and "Version 4 is in slot b" in said[1]


def test_a_share_of_the_devices(store: Store, channel: Channel, bundles: list[Bundle]) -> None:
    place = read_json(store.path / "trusted" / "device.json")["place"]
    channel.publish(bundles[1].path, share=place * 0.9)
    assert "answers already" in take(store, channel)[0]
    channel.set_share(2, place + 1e-6)
    assert take(store, channel)[0].startswith("Version 2")
    channel.set_share(1, 0)
    channel.set_share(2, 0)
    assert take(store, channel) == ["The channel has no bundle for this device."]
    with pytest.raises(UpdateError, match="no version 7; there are: 2, 1"):
        channel.set_share(7, 1)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_keys_are_rotated(store: Store, channel: Channel, bundles: list[Bundle], role: str) -> None:
    old = (channel.keys / publishing.PLACE[role] / f"{role}.pem").read_bytes()
    channel.rotate(role)
    assert (channel.keys / publishing.PLACE[role] / f"{role}.pem").read_bytes() != old
    channel.publish(bundles[1].path)
    assert take(store, channel)[0].startswith("Version 2")
    fresh = Store.create(store.path.with_name("fresh"))
    assert update(fresh, str(channel.path), channel.path / "root.json") == "a"  # by the first root


@pytest.mark.parametrize("role", ["targets", "root"])
def test_a_change_of_keys_that_is_killed(
    store: Store, channel: Channel, bundles: list[Bundle], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the new root is written: no key is lost, and publishing and changing go on."""
    for number, (place, name) in enumerate(((publishing, "write_atomic"), (Channel, "_take_new_key"))):
        real = getattr(place, name)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                channel.rotate(role)
        assert getattr(place, name) is real
        opened = Channel.open(channel.path, channel.keys)
        opened.rotate(role)
        opened.publish(bundles[1 + number].path)
        assert take(store, channel)[0].startswith(f"Version {2 + number}")


# -- attacks --------------------------------------------------------------------------------------------------


def refused(store: Store, channel: Channel | str, match: str) -> None:
    before = store.read()
    with pytest.raises(UpdateError, match=match) as caught:
        update(store, str(channel.path if isinstance(channel, Channel) else channel))
    assert str(caught.value).endswith(".") and store.read() == before
    assert not list(store.path.glob(".download-*"))


def test_rollback(store: Store, channel: Channel, bundles: list[Bundle], tmp_path: Path) -> None:
    shutil.copytree(channel.path, tmp_path / "old")
    channel.publish(bundles[1].path)
    take(store, channel)
    refused(store, str(tmp_path / "old"), "version")


def test_freeze(store: Store, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that shows the same for ever is refused once its timestamp has expired."""
    later = time.time() + 86_400 * (DAYS["timestamp"] + 1)
    monkeypatch.setattr(updating.time, "time", lambda: later)
    refused(store, channel, "Expired")


def test_a_clock_that_starts_in_1970_and_one_that_is_ahead(
    store: Store, channel: Channel, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing_time = datetime.now(timezone.utc)
    monkeypatch.setattr(publishing, "_expiry", lambda role: publishing_time - timedelta(seconds=5))
    channel.refresh()  # expired before the last update
    monkeypatch.setattr(updating.time, "time", lambda: 0.0)
    refused(store, channel, "Expired")
    monkeypatch.undo()
    channel.publish(bundles[1].path)
    monkeypatch.setattr(updating.time, "time", lambda: 2.2e9)  # 2039
    refused(store, channel, "Expired")
    monkeypatch.undo()  # and back: the device is not locked out
    assert take(store, channel)[0].startswith("Version 2")
    monkeypatch.setattr(updating.time, "time", lambda: 0.0)
    assert "waits for its trial" in take(store, channel)[0]


def test_mix_and_match(store: Store, channel: Channel, bundles: list[Bundle], tmp_path: Path) -> None:
    """The targets of one state beside the snapshot of another."""
    shutil.copytree(channel.path, tmp_path / "old")
    channel.publish(bundles[1].path)
    for name in sorted(path.name for path in (tmp_path / "old" / "metadata").glob("*.targets.json")):
        shutil.copyfile(tmp_path / "old" / "metadata" / name, channel.metadata / "3.targets.json")
    refused(store, channel, "BadVersionNumber|hash")


def test_stolen_online_keys(store: Store, channel: Channel, bundles: list[Bundle], tmp_path: Path) -> None:
    """Whoever has KEYS/online can sign a snapshot, but no targets."""
    thief = tmp_path / "stolen"
    shutil.copytree(channel.keys, thief)
    for role in ("root", "targets"):
        publishing._new_key(thief, role)
        publishing._key(thief, role, ".new").replace(publishing._key(thief, role))
    Channel.open(channel.path, thief).publish(bundles[1].path)
    refused(store, channel, "targets was signed by 0/1 keys")


@pytest.mark.parametrize("what", ["bundle", "index", "endless"])
def test_altered_files(store: Store, channel: Channel, bundles: list[Bundle], what: str) -> None:
    channel.publish(bundles[1].path)
    pattern = "*.0002.bundle" if what == "bundle" else "*.bundles.json"
    for path in channel.targets.glob(pattern):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content) * (1000 if what == "endless" else 1))
    refused(store, channel, "hash|length|Length|bytes")


def test_endless_metadata(store: Store, channel: Channel) -> None:
    (channel.metadata / "timestamp.json").write_bytes(b" " * 10**6)
    refused(store, channel, "exceed|Length|length|Failed|maximum")


@pytest.mark.parametrize("content", [b"", b"{}", b"junk", b"\xff" * 100])
def test_metadata_that_is_none(store: Store, channel: Channel, content: bytes) -> None:
    (channel.metadata / "timestamp.json").write_bytes(content)
    refused(store, channel, "is not used")


def test_another_channel(store: Store, bundles: list[Bundle], tmp_path: Path) -> None:
    other = Channel.create(tmp_path / "other", tmp_path / "other-keys")
    other.publish(bundles[1].path)
    refused(store, other, "signed by 0/1 keys")
    refused(store, str(tmp_path / "nowhere"), "is not a channel")
    refused(store, "http://127.0.0.1:9/channel", "is not used")


def test_files_outside_the_channel(store: Store, channel: Channel, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    shutil.copyfile(channel.metadata / "timestamp.json", secret)
    (channel.metadata / "timestamp.json").unlink()
    (channel.metadata / "timestamp.json").symlink_to(secret)
    refused(store, channel, "is not used")


def test_a_store_that_trusts_nobody(channel: Channel, tmp_path: Path) -> None:
    fresh = Store.create(tmp_path / "fresh")
    refused(fresh, channel, "trusts no channel yet; give the root.json")
    (tmp_path / "root.json").write_bytes(b"{}")
    with pytest.raises(UpdateError, match="is not used"):
        update(fresh, str(channel.path), tmp_path / "root.json")
    assert update(fresh, str(channel.path), channel.path / "root.json") == "a"


def test_an_index_that_lies(store: Store, channel: Channel, bundles: list[Bundle]) -> None:
    """Signed by the publisher, but its file holds another bundle than it says."""
    offer = channel.publish(bundles[1].path)
    lie = updating.Offer(9, "f" * 64, offer.file, {}, 1.0)
    channel._offer([lie], {})
    refused(store, channel, "holds another bundle than it lists")


def test_over_http(store: Store, channel: Channel, bundles: list[Bundle]) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(channel.path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        channel.publish(bundles[1].path)
        assert update(store, address) == "b"
        server.shutdown()


def test_downloads_do_not_follow_a_link(store: Store, channel: Channel, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    shutil.rmtree(store.path / ".download")
    (store.path / ".download").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="is a link"):
        take(store, channel)
    assert (tmp_path / "mine" / "file").read_text() == "precious"


# -- the channel ----------------------------------------------------------------------------------------------


def test_what_cannot_be_published(channel: Channel, bundles: list[Bundle], tmp_path: Path) -> None:
    for bundle in bundles[:1]:
        with pytest.raises(UpdateError, match="devices take newer versions only"):
            channel.publish(bundle.path)
    with pytest.raises(UpdateError, match="is not empty"):
        Channel.create(channel.path, tmp_path / "more")
    with pytest.raises(UpdateError, match="is not a channel"):
        Channel.open(tmp_path, channel.keys)
    with pytest.raises(UpdateError, match="publish a bundle first"):
        Channel.create(tmp_path / "empty", tmp_path / "empty-keys").publish(None)
    with pytest.raises(UpdateError, match="The key of targets cannot be read"):
        Channel.open(channel.path, tmp_path).publish(bundles[1].path)


def test_no_key_is_in_the_channel_and_only_the_owner_reads_them(channel: Channel, tmp_path: Path) -> None:
    keys = list(channel.keys.rglob("*.pem"))
    assert len(keys) == 4 and all(path.stat().st_mode & 0o077 == 0 for path in keys)
    everything = b"".join(path.read_bytes() for path in channel.path.rglob("*") if path.is_file())
    assert b"PRIVATE" not in everything and not any(path.read_bytes() in everything for path in keys)


def test_refreshing_needs_the_online_keys_alone(store: Store, channel: Channel) -> None:
    shutil.rmtree(channel.keys / "offline")
    before = channel.expiry()["timestamp"]
    channel.refresh()
    assert channel.expiry()["timestamp"] >= before and "answers already" in take(store, channel)[0]
    assert Metadata.from_file(str(channel.metadata / "timestamp.json")).signed.version == 3


def test_a_publisher_that_is_killed(
    store: Store, channel: Channel, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of its writes: devices see the old state or the new one, and publishing again works."""
    real = publishing.write_atomic
    # What was written under its hash stays, so the first two writes happen once: index, bundle, three times metadata.
    for stop, written in enumerate((0, 1, 1, 1, 2)):
        done = 0

        def dying(path: Path, content: bytes, left: int = written) -> None:
            nonlocal done
            if done == left:
                raise KeyboardInterrupt
            done += 1
            real(path, content)

        monkeypatch.setattr(publishing, "write_atomic", dying)
        with pytest.raises(KeyboardInterrupt):
            channel.publish(bundles[1].path)
        monkeypatch.undo()
        assert "answers already" in take(store, channel)[0], stop
    channel.publish(bundles[1].path)
    assert take(store, channel)[0].startswith("Version 2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"schema": 2, "bundles": []}',
        b'{"schema": 1}',
        b'{"schema": 1, "bundles": [1]}',
        b'{"schema": 1, "bundles": [{"bundle_version": 0}]}',
    ],
)
def test_what_is_no_index(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"schema|bundles|JSON|Expecting"):
        read_index(content)


def test_commands(channel: Channel, bundles: list[Bundle], call: Callable[..., tuple[int, str, str]]) -> None:
    path, keys, store = channel.path, channel.keys, channel.path.with_name("device")
    code, out, _ = call("channel", "publish", path, bundles[1].path, "--share", 1, "--keys", keys)
    assert code == 0 and out == f"Channel: {path}  version 2 for 100 % of the devices, 0 deltas\n"
    assert "version 2  100 % of the devices" in call("channel", "status", path)[1]
    assert call("channel", "share", path, 2, 0.5, "--keys", keys)[0] == 0
    assert "good until" in call("channel", "refresh", path, "--keys", keys)[1]
    assert call("channel", "rotate", path, "snapshot", "--keys", keys)[0] == 0
    code, _, err = call("update", store, path)
    assert code == 1 and "trusts no channel yet" in err
    channel.set_share(2, 1)
    code, out, _ = call("update", store, path, "--root", path / "root.json")
    assert code == 0 and "Version 2 is in slot a" in out
    assert call("slots", store)[1] == "a  verified  version 2\nb  empty   \n"
    assert '"state": "verified"' in call("slots", store, "--json")[1]
    code, _, err = call("revert", store)
    assert code == 1 and "no other good bundle" in err
