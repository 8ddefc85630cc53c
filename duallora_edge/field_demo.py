"""``duallora-edge demo --field``: the life of a model on a device, told with handwritten digits."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from PIL import Image

from duallora_edge.errors import ConfigError
from duallora_edge.export.export import export_delta, export_run
from duallora_edge.files import read_json, write_json
from duallora_edge.learner.commands import echo
from duallora_edge.learner.learner import Learner
from duallora_edge.learner.terminal import TerminalCallback
from duallora_edge.runtime.bundle import MANIFEST
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.field.channel import Channel
from duallora_edge.runtime.field.delta import apply_delta
from duallora_edge.runtime.field.keeping import Keeper, kept_frames
from duallora_edge.runtime.field.store import Store
from duallora_edge.runtime.field.update import update
from duallora_edge.runtime.preprocess import Pixels, read_image
from duallora_edge.runtime.service.slot_keeper import SlotKeeper, Terms, open_slot

KNOWN, NEW = "01234567", "8"
TRIAL = Terms(answers=30, seconds=0.5)
PATIENCE_S = 120.0

Frame = tuple[Pixels, str]


def tell(folder: Path, images: Path, seed: int) -> None:
    """Tell the story in ``folder``; ``images`` is the stream of digits.

    Test images that the device sees and keeps are learned later, so that they measure nothing afterwards: what is
    measured are the other half of them. Raises `ConfigError` when ``folder`` is there already.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already; delete it, or give another folder with --run.")
    seen, measured = _frames(images, 0), _frames(images, 1)

    echo("\n== a model of the digits 0 to 7 is published and taken over by a camera\n")
    for task in sorted(images.iterdir())[:4]:
        (folder / "known").mkdir(parents=True, exist_ok=True)
        (folder / "known" / task.name).symlink_to(task.resolve())
    learner = Learner(folder / "run", callbacks=[TerminalCallback()], seed=seed)
    learner.learn(folder / "known", evaluate=False)
    first = export_run(folder / "run", folder / "bundles" / "0001", "x86-cpu", bundle_version=1).path
    channel = Channel.create(folder / "channel", folder / "keys")
    channel.publish(first)
    store = Store.create(folder / "device")
    update(store, str(channel.path), channel.path / "root.json", echo)

    with ExitStack() as stack:
        classifier = open_slot(store, lambda path: Classifier.load(path, "cpu", taught=store.taught))
        stack.enter_context(SlotKeeper(classifier, store, echo, TRIAL, interval_s=0.1))
        _watch_until(classifier, seen[KNOWN], store, 1)

        echo(f"\n== an {NEW} appears that nobody taught; the camera keeps what it has not seen before\n")
        stream = [*seen[KNOWN], *seen[NEW]]
        order = np.random.default_rng(seed).permutation(len(stream))
        stream = [stream[index] for index in order]
        with closing(Keeper(folder / "keep", 0.1, interval_s=0)) as keeper:
            for pixels, _ in stream:
                keeper.add(pixels, classifier(pixels))
        truth = {pixels.tobytes(): digit for pixels, digit in stream}
        kept = [_decoded(frame.jpeg, stream) for frame in kept_frames(folder / "keep")]
        mine = [pixels for pixels in kept if truth[pixels.tobytes()] == NEW]
        shares = [100 * len(mine) / len(kept), 100 * len(seen[NEW]) / len(stream)]
        echo(f"{len(kept)} of {len(stream)} frames kept: {shares[0]:.0f} % an {NEW}, as are {shares[1]:.0f} % of all")

        echo(f"\n== somebody teaches it the {NEW}, from ten of these frames\n")
        _show(classifier, measured)
        start = time.perf_counter()
        classifier.teach(NEW, mine[:10])
        classifier(mine[0])
        echo(f"taught, and the next frame answered, after {time.perf_counter() - start:.2f} s")
        _show(classifier, measured)

        echo("\n== the frames go home, a task is learned from them, and comes back as a delta\n")
        for index, pixels in enumerate(mine):
            target = folder / "new" / "train" / NEW / f"{index:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
        learner.learn(folder / "new", evaluate=False)
        delta = export_delta(folder / "run", first, folder / "bundles" / "0001-0002.delta", say=lambda text: None)
        second = apply_delta(first, delta.path, folder / "bundles" / "0002").path
        channel.publish(second, [delta.path])
        echo(f"delta: {delta.bytes / 1e6:.2f} MB, {100 * delta.share:.0f} % of the bundle")
        update(store, str(channel.path), say=echo)
        _watch_until(classifier, [*seen[KNOWN], *seen[NEW]], store, 2)
        echo(f"taught classes: {', '.join(classifier.taught) or 'none, the bundle knows it now'}")
        _show(classifier, measured)

        echo("\n== a bad version is published: it calls everything novel\n")
        channel.publish(_spoilt(second, folder / "bundles" / "0003"))
        update(store, str(channel.path), say=echo)
        _watch_until(classifier, seen[KNOWN], store, 2, trial_first=True)
        _show(classifier, measured)
    slots = store.read()
    echo(f"\nversion {slots.slots[slots.active].bundle_version} answers; given up: {', '.join(slots.refused.values())}")
    echo(f"Store: {store.path}  channel: {channel.path}")


def _frames(images: Path, half: int) -> dict[str, list[Frame]]:
    """Every other test image of the known digits, and of the new one."""
    found: dict[str, list[Frame]] = {KNOWN: [], NEW: []}
    for path in sorted(images.glob("*/test/*/*.png"))[half::2]:
        digit = path.parent.name
        if digit in KNOWN + NEW:
            found[NEW if digit == NEW else KNOWN].append((read_image(path), digit))
    return found


def _decoded(jpeg: bytes, stream: Sequence[Frame]) -> Pixels:
    """The frame of the stream that is nearest to a kept picture."""
    picture = np.asarray(Image.open(io.BytesIO(jpeg)), np.int16)
    return min((pixels for pixels, _ in stream), key=lambda pixels: int(np.abs(pixels - picture).sum()))


def _watch_until(
    classifier: Classifier, frames: Iterable[Frame], store: Store, version: int, *, trial_first: bool = False
) -> None:
    """Let the camera look at frames until a version is good and nothing is on trial."""
    frames, deadline, tried = list(frames), time.monotonic() + PATIENCE_S, not trial_first
    while time.monotonic() < deadline:
        for pixels, _ in frames[:60]:
            classifier(pixels)
        slots = store.read()
        states = [slot.state for slot in slots.slots.values()]
        tried = tried or bool(slots.refused)
        waiting = "trial" in states or "verified" in states
        active = slots.slots[slots.active].bundle_version if slots.active else 0
        versions = {active, classifier.bundle.manifest.bundle_version}
        if tried and not waiting and versions == {version}:
            return
        time.sleep(0.02)
    raise AssertionError("the trial never ended")


def _show(classifier: Classifier, frames: dict[str, list[Frame]]) -> None:
    shares = []
    for name, what in ((KNOWN, "0 to 7"), (NEW, NEW)):
        right = [classifier(pixels).label == digit for pixels, digit in frames[name]]
        shares.append(f"{100 * sum(right) / len(right):.0f} % of the images of {what}")
    echo(f"version {classifier.bundle.manifest.bundle_version} finds {shares[0]} and {shares[1]}")


def _spoilt(bundle: Path, target: Path) -> Path:
    """A copy of a bundle, of the next version, whose threshold calls everything novel."""
    shutil.copytree(bundle, target)
    document = read_json(target / MANIFEST)
    document["bundle_version"] += 1
    document["calibration"]["novelty_threshold"] = -1.0
    write_json(target / MANIFEST, document)
    return target
