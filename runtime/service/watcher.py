"""A thread that looks after a classifier every few seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.closing import Closing

INTERVAL_S = 2.0
CLOSE_S = 5.0  # loading a model cannot be interrupted, a trial can


class Watcher(Closing):
    """Takes over what changes in the folder of taught classes, and lets a subclass look for more."""

    def __init__(self, classifier: Classifier, say: Callable[[str], None], interval_s: float = INTERVAL_S) -> None:
        """Begin to look every ``interval_s`` seconds; ``say`` gets one line about every change, in that thread."""
        self._classifier, self._say, self._interval_s = classifier, say, interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="duallora-edge watch", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Stop looking, and end a trial; a signal handler may call it."""
        self._closing.set()

    def close(self) -> None:
        """Stop looking; a trial in progress is ended, and a model that is loading is waited for, within limits."""
        self.cancel()
        self._thread.join(CLOSE_S)

    @property
    def is_stuck(self) -> bool:
        """Whether a swap goes on although the watcher was closed."""
        return self._closing.is_set() and self._thread.is_alive()

    def _watch(self) -> None:
        while not self._closing.wait(self._interval_s):
            if self._classifier.refresh_taught():
                self._say(self._classifier.health().taught_line)
            self._look()

    def _look(self) -> None:
        """What else there is to look for."""
