"""A folder in which new bundles appear, and are swapped in."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from duallora_edge.errors import BundleError, SwapError
from duallora_edge.files import read_json
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.closing import Closing

INTERVAL_S = 2.0


def newest_bundle(folder: Path) -> Path | None:
    """The bundle that ``folder`` is, or the one of the highest version among the folders in it, if there is any.

    Names that begin with a dot do not count: that is how files look that are still being written.
    """
    if (folder / MANIFEST).is_file():
        return folder.resolve()
    found = []
    for manifest in folder.glob(f"[!.]*/{MANIFEST}"):
        with suppress(OSError, ValueError):
            document = read_json(manifest)
            version = document.get("bundle_version") if isinstance(document, dict) else None
            if type(version) is int:
                found.append((version, manifest.parent.name, manifest.parent.resolve()))
    return max(found)[-1] if found else None


class BundleWatcher(Closing):
    """Swaps in the newest bundle of a folder whenever it changes, in a thread of its own.

    A bundle counts as changed when any of its files did, and is tried once it was the same at two looks: one that is
    still being copied is left alone. What was refused is not tried again before it changes.
    """

    def __init__(
        self,
        classifier: Classifier,
        folder: Path,
        say: Callable[[str], None],
        budget_ms: float | None = None,
        stop_first: bool = False,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Begin to look at ``folder`` every ``interval_s`` seconds; ``budget_ms`` and ``stop_first`` as in `swap`.

        ``say`` gets a line about every swap, in the thread of the watcher.
        """
        self._classifier = classifier
        self._folder = folder
        self._say = say
        self._budget_ms = budget_ms
        self._stop_first = stop_first
        self._interval_s = interval_s
        self._done = self._served()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="duallora-edge watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more; a swap in progress is ended first."""
        self._closing.set()
        self._thread.join()

    def _served(self) -> str | None:
        """The signature of the newest bundle if it is the one that answers."""
        newest = newest_bundle(self._folder)
        try:
            manifest = Bundle.open(newest, verify=False).manifest if newest else None
        except BundleError:
            return None
        return _signature(newest) if newest and manifest == self._classifier.bundle.manifest else None

    def _watch(self) -> None:
        last = None
        while not self._closing.wait(self._interval_s):
            newest = newest_bundle(self._folder)
            signature = _signature(newest) if newest else None
            if newest and signature and signature == last and signature != self._done:
                self._done = signature
                self._try(newest)
            last = signature

    def _try(self, bundle: Path) -> None:
        try:
            swap = self._classifier.swap(bundle, self._budget_ms, self._stop_first)
        except SwapError as error:
            self._say(str(error))
        else:
            self._say(f"swapped '{swap.old}' for '{swap.new}' of {bundle}")


def _signature(bundle: Path) -> str | None:
    """Something that changes with any file of the bundle; None while it is being replaced."""
    try:
        facts = [
            (str(file.relative_to(bundle)), file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino)
            for file in sorted(bundle.rglob("*"))
        ]
    except OSError:
        return None
    return hashlib.sha256(repr((str(bundle), facts)).encode()).hexdigest()
