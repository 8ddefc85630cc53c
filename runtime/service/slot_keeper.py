"""A store of a device beside a classifier: new bundles are tried, kept or given up, and reverts are followed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from duallora_edge.errors import DualLoraEdgeError, StoreError, SwapError
from duallora_edge.runtime.classifier import PROBATION, Classifier
from duallora_edge.runtime.field.store import Slots, Store
from duallora_edge.runtime.service.watcher import INTERVAL_S, Watcher

SETTLE_S = 60.0


@dataclass(frozen=True)
class Terms:
    """What a new bundle has to keep to.

    Attributes:
        answers: so many answers, during which the old bundle stands by.
        seconds: and so long without a failure.
        budget_ms: with a p90 of its inference that is no longer than this.
        stop_first: drop the old bundle before the new one is loaded.
        allow_slower: it may run on a slower backend than the old one.
    """

    answers: int = PROBATION
    seconds: float = SETTLE_S
    budget_ms: float | None = None
    stop_first: bool = False
    allow_slower: bool = False


def open_slot(store: Store, load: Callable[[Path], Classifier]) -> Classifier:
    """A classifier of the bundle that is to answer: the active one, else the other good one, else a first one.

    ``load`` opens a bundle. Raises `StoreError` when no slot holds a bundle that can be loaded.
    """
    reasons = []
    slots = store.read()
    for name in (slots.active, slots.other):
        if name and slots.slots[name].state == "good":
            try:
                return load(store.bundle_path(name))
            except DualLoraEdgeError as error:
                reasons.append(f"{name}: {error}")
    first = None if reasons else store.candidate()
    if first is not None:
        digest = slots.slots[first].digest
        store.begin_trial(first)
        try:
            return load(store.bundle_path(first))
        except DualLoraEdgeError as error:
            store.end_trial(first, digest, str(error))
            reasons.append(f"{first}: {error}")
    raise StoreError(f"{store.path} has no bundle that can answer ({'; '.join(reasons) or 'it is empty'}); update it.")


class SlotKeeper(Watcher):
    """Tries what comes into a store, in a thread of its own, and writes down how it ended."""

    def __init__(
        self,
        classifier: Classifier,
        store: Store,
        say: Callable[[str], None],
        terms: Terms = Terms(),
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Begin to look into ``store`` every ``interval_s`` seconds; ``say`` gets one line about every change."""
        self._store, self._terms = store, terms
        self._failures = classifier.health().failures
        self._since = time.monotonic()
        self._trial = ""  # the slot that is being tried
        super().__init__(classifier, say, interval_s)

    def close(self) -> None:
        """As `Watcher.close`; a trial that goes on is taken up again by the next process."""
        super().close()
        if self._trial:
            with self._said():
                self._store.interrupted_trial(self._trial)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (DualLoraEdgeError, OSError) as error:
            self._say(f"the store cannot be kept: {error}")

    def _look(self) -> None:
        with self._said():
            self._keep()

    def _keep(self) -> None:
        slots = self._store.read()
        if self._trial:
            self._judge(slots)
        elif not slots.active:
            self._trial = slots.other if slots.slots[slots.other].state == "trial" else ""  # the first bundle
        elif slots.slots[slots.active].digest != self._classifier.bundle.digest:
            self._follow(slots)
        elif name := self._store.candidate():
            self._try(name, slots.slots[name].digest)

    def _try(self, name: str, digest: str) -> None:
        """Load a bundle beside the one that answers."""
        terms = self._terms
        self._store.begin_trial(name)
        try:
            swap = self._classifier.swap(
                self._store.bundle_path(name), terms.budget_ms, terms.stop_first, terms.answers, terms.allow_slower,
                self._closing,
            )  # fmt: skip
        except SwapError as error:
            if self._closing.is_set():
                self._store.interrupted_trial(name)
            else:
                self._store.end_trial(name, digest, str(error))
                self._say(f"slot {name} is given up: {error}")
            return
        self._trial, self._since, self._failures = name, time.monotonic(), self._classifier.health().failures
        self._say(f"slot {name} is tried: {swap}")

    def _judge(self, slots: Slots) -> None:
        """End a trial once it can be told."""
        name, health = self._trial, self._classifier.health()
        slot = slots.slots[name]
        running = self._classifier.bundle.digest == slot.digest
        reason = ""
        if not running:
            reason = (health.last_swap.reason if health.last_swap else "") or "another bundle answers"
        elif health.failures > self._failures:
            reason = f"it failed during its trial: {health.last_error}"
        elif health.status != "ok" or time.monotonic() - self._since < self._terms.seconds:
            return
        if not slots.active and not reason and health.answers < self._terms.answers:
            return
        self._trial = ""
        self._store.end_trial(name, slot.digest, reason)
        self._say(f"slot {name} is {'given up: ' + reason if reason else 'good'}")

    def _follow(self, slots: Slots) -> None:
        """Serve the active slot: somebody went back to it."""
        try:
            swap = self._classifier.swap(
                self._store.bundle_path(slots.active),
                stop_first=self._terms.stop_first,
                probation=0,
                allow_slower=True,
                cancel=self._closing,
            )
            self._say(f"slot {slots.active} answers again: {swap}")
        except SwapError as error:
            if not self._closing.is_set():
                self._say(str(error))
                self._closing.wait(60)  # it is tried again, but not all the time
