"""A folder in which new bundles appear, and are swapped in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from duallora_edge.errors import BundleError, SwapError
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.service.watcher import INTERVAL_S, Watcher
from duallora_edge.runtime.trial import engines_of


def bundle_paths(folder: Path) -> list[Path]:
    """The bundle that ``folder`` is, or the folders in it that look like one.

    Names that begin with a dot do not count, because unfinished folders are named so.
    """
    if (folder / MANIFEST).is_file():
        return [folder.resolve()]
    return [manifest.parent.resolve() for manifest in folder.glob(f"[!.]*/{MANIFEST}")]


class BundleWatcher(Watcher):
    """Swaps in the newest bundle of a folder, in a thread of its own.

    In a folder of bundles, the newest is the one with the highest version that is fit to answer. A lower version than
    the current one is never swapped in, even if the current bundle disappears from the folder. If the folder is a
    bundle itself, or a link to one, that bundle is followed whatever its version.

    A bundle is tried once two checks have found it unchanged, because it may still be being copied. A refused bundle is
    not tried again until it or one of its engines changes.
    """

    def __init__(
        self,
        classifier: Classifier,
        folder: Path,
        say: Callable[[str], None],
        budget_ms: float | None = None,
        stop_first: bool = False,
        allow_slower: bool = False,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Begin to check ``folder`` every ``interval_s`` seconds; the other options are those of `Classifier.swap`."""
        self._folder = folder
        self._budget_ms = budget_ms
        self._stop_first = stop_first
        self._allow_slower = allow_slower
        self._known: dict[Path, tuple[tuple[int, ...], Bundle]] = {}
        self._seen: dict[Path, str | None] = {}  # at the last check
        self._tried: dict[Path, str] = {}  # as it was when it was swapped in or refused
        super().__init__(classifier, say, interval_s)

    def _look(self) -> None:
        wanted = [bundle for bundle in self._newest_first() if self._is_wanted(bundle)]
        seen, self._seen = self._seen, {bundle.path: _signature(bundle) for bundle in wanted}
        for bundle in wanted:
            signature = self._seen[bundle.path]
            if self._tried.get(bundle.path) == signature:
                continue
            if signature is None or seen.get(bundle.path) != signature or self._closing.is_set():
                return  # perhaps it is still being copied
            self._tried[bundle.path] = signature
            if self._swap(bundle.path):
                return

    def _newest_first(self) -> list[Bundle]:
        """The bundles of the folder by their manifests, which are read again only if they changed."""
        known, self._known = self._known, {}
        for path in bundle_paths(self._folder):
            with suppress(BundleError, OSError):
                facts = (path / MANIFEST).stat()
                stamp = (facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size)
                before, bundle = known.get(path, (None, None))
                self._known[path] = stamp, bundle if bundle and before == stamp else Bundle.peek(path)
        found = [bundle for _, bundle in self._known.values()]
        return sorted(found, key=lambda bundle: (bundle.manifest.bundle_version, bundle.path.name), reverse=True)

    def _is_wanted(self, bundle: Bundle) -> bool:
        """Whether a bundle is to take the place of the one that answers."""
        running = self._classifier.bundle
        if bundle.digest == running.digest:
            return False
        followed = bundle.path in (running.path, self._folder.resolve())
        return followed or bundle.manifest.bundle_version > running.manifest.bundle_version

    def _swap(self, path: Path) -> bool:
        try:
            swap = self._classifier.swap(
                path, self._budget_ms, self._stop_first, allow_slower=self._allow_slower, cancel=self._closing
            )
        except SwapError as error:
            if not self._closing.is_set():
                self._say(str(error))
            return False
        self._say(f"{swap} of {path}")
        return True


def _signature(bundle: Bundle) -> str | None:
    """A digest that changes with any file of the bundle and with its engines; None while it is being replaced."""
    try:
        facts = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino)
            for file in sorted(bundle.path.iterdir())
        ]
    except OSError:
        return None
    return hashlib.sha256(repr((bundle.digest, facts, engines_of(bundle.manifest))).encode()).hexdigest()
