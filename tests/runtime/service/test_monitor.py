"""What a pipeline tells about itself: health as JSON, metrics that Prometheus' own parser reads."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from duallora_edge.errors import SwapError
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.service import monitor
from duallora_edge.runtime.service.monitor import BUCKETS_S, PREFIX, Histogram, Monitor, gauge, histogram, info
from duallora_edge.runtime.service.pipeline import Pipeline
from duallora_edge.runtime.sources import open_source

FRAME = np.full((20, 30, 3), (250, 5, 5), np.uint8)


def samples(text: str) -> dict[str, float]:
    """Every sample by its name and labels, as Prometheus' client library reads them."""
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counts(make_bundle: Callable[..., Path]) -> None:
    classifier = Classifier.load(make_bundle(), "cpu", 1)
    with pytest.raises(SwapError):
        classifier.swap("missing")
    frames = [FRAME, FRAME.astype(np.float32), FRAME, FRAME]
    with Pipeline(open_source(frames), classifier) as pipeline:
        watching = Monitor(pipeline)
        assert watching.cameras == ("1",) and watching.last("1") is None and watching.last("2") is None
        assert watching.health()["cameras"]["1"]["age_ms"] == {"p50": None, "p90": None}
        for answer in pipeline:
            watching.add(answer)
    health = json.loads(json.dumps(watching.health(), allow_nan=False))
    camera = health["cameras"]["1"]
    assert (
        health["ok"] and health["answers"] == camera["answers"] == 3 and camera["dropped"] == 0 and camera["rate"] > 0
    )
    assert camera["refused"] == 1 and health["classifier"]["swaps"] == {"refused": 1}
    assert 0 <= camera["age_ms"]["p50"] <= camera["age_ms"]["p90"]
    assert watching.last("1") is answer

    found = samples(watching.metrics())
    expected = {
        "frames_captured_total|camera=1": 3,
        "frames_refused_total|camera=1": 1,
        "frames_dropped_total|camera=1": 0,
        "answers_total|camera=1": 3,
        "failures_total": 0,
        "source_connected|camera=1": 0,
        "swaps_refused_total": 1,
        "swaps_confirmed_total": 0,
        "answer_age_seconds_count|camera=1": 3,
        "inference_seconds_bucket|le=+Inf": 3,
        "confidence_count": 3,
        "novelty_bucket|le=1.0": 3,
        "taught_classes": 0,
        f"class_answers_total|class={answer.prediction.label}": 3,
        f"task_answers_total|task={answer.prediction.task}": 3,
        "bundle_info|bundle=colours, version 3|backend=cpu|precision=fp32": 1,
    }
    assert {name: found[f"duallora_edge_{name}"] for name in expected} == expected
    assert found["duallora_edge_memory_pss_bytes"] > 1e6


def test_counts_by_camera(shared_bundle: Path) -> None:
    sources = {'a"b': open_source([FRAME] * 3), "yard": open_source([FRAME])}
    with Pipeline(sources, Classifier.load(shared_bundle, "cpu", 1)) as pipeline:
        watching = Monitor(pipeline)
        for answer in pipeline:
            watching.add(answer)
    health, found = watching.health(), samples(watching.metrics())
    assert health["answers"] == 4 and {name: each["answers"] for name, each in health["cameras"].items()} == {
        'a"b': 3,
        "yard": 1,
    }
    assert found['duallora_edge_answers_total|camera=a"b'] == 3
    assert found["duallora_edge_answers_total|camera=yard"] == 1
    assert found["duallora_edge_answer_age_seconds_bucket|camera=yard|le=+Inf"] == 1
    assert found["duallora_edge_answer_age_seconds_count|camera=yard"] == 1


def test_the_example_rules_and_panel_name_metrics_that_exist(shared_bundle: Path) -> None:
    with Pipeline(open_source([FRAME]), Classifier.load(shared_bundle, "cpu", 1)) as pipeline:
        watching = Monitor(pipeline)
        for answer in pipeline:
            watching.add(answer)
        text = watching.metrics() + "".join(f"{PREFIX}drift_{name} 0\n" for name in ("confidence", "novelty"))
    examples = Path(__file__).parents[3] / "examples"
    rules = yaml.safe_load((examples / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
    panel = json.loads((examples / "grafana-panel.json").read_text())
    for expression in [rule["expr"] for rule in rules] + [target["expr"] for target in panel["targets"]]:
        names = re.findall(rf"{PREFIX}\w+", expression)
        assert names and all(re.search(rf"^{name}[ {{]", text, re.MULTILINE) for name in names), expression


@pytest.mark.parametrize(
    ("live", "silence", "connected", "ok", "working"),
    [
        (True, 0.0, True, False, False),
        (True, 0.0, False, False, True),
        (True, 60.0, True, True, True),
        (False, 0.0, True, True, True),
    ],
)
def test_a_camera_without_answers_is_not_healthy(
    shared_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    live: bool,
    silence: float,
    connected: bool,
    ok: bool,
    working: bool,
) -> None:
    monkeypatch.setattr(monitor, "SILENCE_S", silence)
    classifier = Classifier.load(shared_bundle, "cpu", 1)
    endless = open_source([FRAME], live=live, loop=connected, rate=50)
    with Pipeline(endless, classifier) as pipeline:
        deadline = time.monotonic() + 10
        while endless.stats.connected != connected and time.monotonic() < deadline:
            time.sleep(0.01)
        watching = Monitor(pipeline)
        assert (watching.health()["ok"], watching.is_working()) == (ok, working)


def test_a_histogram() -> None:
    values = [0.0005, 0.001, 0.0011, 0.3, 99.0]
    counted = Histogram()
    for value in values:
        counted.add(value)
    found = samples(histogram("age", "Words.", counted))
    for bound in BUCKETS_S:
        assert found[f"duallora_edge_age_bucket|le={bound}"] == sum(value <= bound for value in values)
    assert found["duallora_edge_age_bucket|le=+Inf"] == found["duallora_edge_age_count"] == 5
    assert found["duallora_edge_age_sum"] == pytest.approx(sum(values))


def test_any_text_is_a_label() -> None:
    text = 'a "b" \\ c\nd {e} 東京'
    assert samples(info("x", "Words.", {"name": text})) == {f"duallora_edge_x|name={text}": 1}
    assert gauge("y", "Words.", None) == ""
