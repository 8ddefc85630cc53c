"""How a pipeline is doing, for a page, for systemd, and for Prometheus.

The formats: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4) and
https://www.freedesktop.org/software/systemd/man/sd_notify.html.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from duallora_edge import __version__
from duallora_edge.runtime.process_memory import read_pss
from duallora_edge.runtime.service.drift import Drift, DriftReport
from duallora_edge.runtime.service.pipeline import Answer, Camera, Pipeline

WINDOW_S = 10.0
# A live source without an answer for this long counts as unhealthy.
SILENCE_S = 30.0
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PREFIX = "duallora_edge_"
NOTIFY_SOCKET = "NOTIFY_SOCKET"
WATCHDOG = "WATCHDOG_USEC"


class Histogram:
    """Counts of values up to each of ``bounds``, and above."""

    def __init__(self, bounds: Sequence[float] = BUCKETS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """A copy of the current counts."""
        other = Histogram(self.bounds)
        other.counts, other.sum = list(self.counts), self.sum
        return other


class _Seen:
    """What was seen of the answers to one camera."""

    def __init__(self, now: float) -> None:
        self.answers = 0
        self.last: Answer | None = None
        self.last_at = now
        self.recent: deque[tuple[float, float]] = deque()  # moment and age in ms
        self.ages = Histogram()

    def add(self, answer: Answer, now: float) -> None:
        self.answers += 1
        self.last, self.last_at = answer, now
        self.recent.append((now, answer.age_ms))
        self.ages.add(answer.age_ms / 1000)
        self.forget(now)

    def forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] < now - WINDOW_S:
            self.recent.popleft()

    def summary(self, now: float, uptime_s: float) -> dict[str, Any]:
        self.forget(now)
        ages = [age for _, age in self.recent]
        p50, p90 = (float(value) for value in np.percentile(ages, (50, 90))) if ages else (None, None)
        return {
            "answers": self.answers,
            "rate": len(ages) / min(WINDOW_S, max(uptime_s, 1e-3)),
            "age_ms": {"p50": p50, "p90": p90},
            "idle_s": now - self.last_at,
        }


class Monitor:
    """Counts the answers of a pipeline. Call `add` from the thread that iterates, everything else from any thread."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._cameras = {camera.name: _Seen(self._started) for camera in pipeline.cameras}
        self._inferences = Histogram()
        self._confidences, self._novelties = Histogram(SHARES), Histogram(SHARES)
        self._classes: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()
        self._drift = Drift()

    @property
    def cameras(self) -> tuple[str, ...]:
        """The names of the cameras."""
        return tuple(self._cameras)

    def last(self, camera: str) -> Answer | None:
        """The latest answer to a camera; None before the first one and for an unknown camera."""
        seen = self._cameras.get(camera)
        return seen.last if seen else None

    def add(self, answer: Answer) -> None:
        """Count an answer.

        Args:
            answer: What the pipeline just gave.
        """
        now = time.monotonic()
        with self._lock:
            self._cameras[answer.camera].add(answer, now)
            instant = answer.instant
            self._inferences.add(instant.timings.infer_ms / 1000)
            self._confidences.add(instant.confidence)
            self._novelties.add(instant.novelty)
            self._classes[instant.label] += 1
            self._tasks[instant.task] += 1
            self._drift.add((instant.bundle, instant.bundle_version), instant.confidence, instant.novelty)

    def health(self) -> dict[str, Any]:
        """The current state as JSON values.

        Returns:
            A dict. ``ok`` is false if there is no model, or a live source had no answer for `SILENCE_S` seconds.
            ``cameras`` has the state of each camera by its name, in which ``rate`` (answers per second) and ``age_ms``
            cover the last `WINDOW_S` seconds. ``drift`` compares the latest answers with those on test images (see
            `DriftReport`); it does not make ``ok`` false.
        """
        now = time.monotonic()
        with self._lock:
            seen = {name: each.summary(now, now - self._started) for name, each in self._cameras.items()}
        cameras = {}
        for camera in self._pipeline.cameras:
            source = camera.source
            facts = {"description": source.description, **asdict(source.stats)}
            facts["dropped"] += camera.dropped
            cameras[camera.name] = {**facts, **seen[camera.name], "silent": self._is_silent(camera)}
        classifier = self._pipeline.classifier.health()
        return {
            "ok": classifier.status != "failed" and not any(each["silent"] for each in cameras.values()),
            "uptime_s": now - self._started,
            "answers": sum(each["answers"] for each in seen.values()),
            "cameras": cameras,
            "classifier": classifier.to_json(),
            "drift": self._drift_report().to_json(),
        }

    def _drift_report(self) -> DriftReport:
        deciles = self._pipeline.classifier.bundle.manifest.calibration.confidence_deciles
        with self._lock:
            return self._drift.report(deciles)

    def is_working(self) -> bool:
        """False if only a restart can help: there is no model, or frames come in but no answers come out.

        A lost source does not count, because it is opened again and again.
        """
        stuck = any(self._is_silent(camera) and camera.source.stats.connected for camera in self._pipeline.cameras)
        return self._pipeline.classifier.health().status != "failed" and not stuck

    def _is_silent(self, camera: Camera) -> bool:
        return camera.source.live and time.monotonic() - self._cameras[camera.name].last_at > SILENCE_S

    def metrics(self) -> str:
        """Everything in the text format of Prometheus (version 0.0.4).

        Returns:
            The text of one scrape.
        """
        classifier = self._pipeline.classifier.health()
        stats = {camera.name: camera.source.stats for camera in self._pipeline.cameras}
        dropped = {camera.name: stats[camera.name].dropped + camera.dropped for camera in self._pipeline.cameras}
        captured, refused, reconnects, connected = (
            {name: int(getattr(each, key)) for name, each in stats.items()}
            for key in ("captured", "refused", "reconnects", "connected")
        )
        runs = {"bundle": classifier.bundle, "backend": classifier.backend, "precision": classifier.precision}
        pss, drift = read_pss().bytes, self._drift_report()
        swap = classifier.last_swap
        swapped = {key: str(value) for key, value in asdict(swap).items() if key != "reason"} if swap else None
        with self._lock:
            answers = {name: each.answers for name, each in self._cameras.items()}
            ages = {name: each.ages.copy() for name, each in self._cameras.items()}
            classes, tasks, inferences = dict(self._classes), dict(self._tasks), self._inferences.copy()
            confidences, novelties = self._confidences.copy(), self._novelties.copy()
        return "".join(
            (
                info("build_info", "Version of duallora-edge.", {"version": __version__}),
                info("bundle_info", "The bundle in use, and what runs it.", runs),
                counters("frames_captured_total", "Frames that a source delivered.", "camera", captured),
                counters("frames_dropped_total", "Frames replaced by newer ones in time.", "camera", dropped),
                counters("frames_refused_total", "Pictures that could not be used.", "camera", refused),
                gauges("source_connected", "Whether a source delivers frames.", "camera", connected),
                counters("source_reconnects_total", "Times a lost source came back.", "camera", reconnects),
                counters("answers_total", "Frames answered.", "camera", answers),
                counter("failures_total", "Runs of the model that failed.", classifier.failures),
                counter("swaps_confirmed_total", "Bundles swapped in for good.", classifier.swaps.get("confirmed", 0)),
                counter("swaps_returned_total", "Bundles rolled back.", classifier.swaps.get("returned", 0)),
                counter("swaps_refused_total", "Bundles not fit to answer.", classifier.swaps.get("refused", 0)),
                info("last_swap_info", "The last change of bundles, with backends.", swapped) if swapped else "",
                histograms("answer_age_seconds", "From the capture of a frame to its answer.", "camera", ages),
                histogram("inference_seconds", "Time of the model on a frame.", inferences),
                histogram("confidence", "Confidence of the answers.", confidences),
                histogram("novelty", "Novelty of the frames.", novelties),
                counters("class_answers_total", "Answers by class.", "class", classes),
                counters("task_answers_total", "Answers by task.", "task", tasks),
                gauge("taught_classes", "Classes taught on this device that answer.", len(classifier.taught)),
                gauge("drift_confidence", "How far confidence has moved since export.", drift.confidence),
                gauge("drift_novelty", "How far novelty has moved since export.", drift.novelty),
                gauge("mean_confidence", "Of the latest answers.", drift.mean_confidence),
                gauge("memory_pss_bytes", "Memory of the process (PSS).", pss),
            )
        )


def counter(name: str, words: str, value: float) -> str:
    """A number that only increases; ``name`` ends in ``_total``."""
    return f"{_declaration(name, 'counter', words)}{PREFIX}{name} {value}\n"


def counters(name: str, words: str, label: str, values: Mapping[str, int]) -> str:
    """Numbers that only increase, one for each text of a label; empty without any."""
    return _labelled(name, "counter", words, label, values)


def gauges(name: str, words: str, label: str, values: Mapping[str, int]) -> str:
    """Numbers that may rise and fall, one for each text of a label; empty without any."""
    return _labelled(name, "gauge", words, label, values)


def _labelled(name: str, kind: str, words: str, label: str, values: Mapping[str, int]) -> str:
    lines = [f'{PREFIX}{name}{{{label}="{_escape(text)}"}} {value}\n' for text, value in values.items()]
    return "".join((_declaration(name, kind, words), *lines)) if lines else ""


def gauge(name: str, words: str, value: float | None) -> str:
    """A number that may rise and fall; empty for None."""
    return "" if value is None else f"{_declaration(name, 'gauge', words)}{PREFIX}{name} {value}\n"


def info(name: str, words: str, labels: Mapping[str, str]) -> str:
    """Texts, as labels of a gauge that is always 1."""
    pairs = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{_declaration(name, 'gauge', words)}{PREFIX}{name}{{{pairs}}} 1\n"


def histogram(name: str, words: str, values: Histogram) -> str:
    """Counts in buckets, their sum and number."""
    return _declaration(name, "histogram", words) + _buckets(name, "", values)


def histograms(name: str, words: str, label: str, values: Mapping[str, Histogram]) -> str:
    """Counts in buckets, one histogram for each text of a label."""
    lines = [_buckets(name, f'{label}="{_escape(text)}"', each) for text, each in values.items()]
    return "".join((_declaration(name, "histogram", words), *lines))


def _buckets(name: str, labels: str, values: Histogram) -> str:
    lines, total, more, braced = [], 0, f"{labels}," if labels else "", f"{{{labels}}}" if labels else ""
    for bound, count in zip((*map(str, values.bounds), "+Inf"), values.counts, strict=True):
        total += count
        lines.append(f'{PREFIX}{name}_bucket{{{more}le="{bound}"}} {total}\n')
    return "".join((*lines, f"{PREFIX}{name}_sum{braced} {values.sum}\n", f"{PREFIX}{name}_count{braced} {total}\n"))


def _declaration(name: str, kind: str, words: str) -> str:
    return f"# HELP {PREFIX}{name} {words}\n# TYPE {PREFIX}{name} {kind}\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def notify(text: str) -> None:
    """Send lines such as ``READY=1`` to systemd; does nothing if systemd did not start this process."""
    address = os.environ.get(NOTIFY_SOCKET, "")
    if not address.startswith(("/", "@")):
        return
    # A leading "@" stands for an address without a file.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        connection.sendto(text.encode(), address.replace("@", "\0", 1))


@contextmanager
def watchdog(healthy: Callable[[], bool]) -> Iterator[None]:
    """Tell systemd twice per ``WatchdogSec`` that the service is alive, as long as ``healthy`` returns True."""
    interval = os.environ.get(WATCHDOG, "")
    if not interval.isdecimal() or int(interval) == 0:
        yield
        return
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(int(interval) / 2e6):
            if healthy():
                notify("WATCHDOG=1")

    thread = threading.Thread(target=tell, name="duallora-edge watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
