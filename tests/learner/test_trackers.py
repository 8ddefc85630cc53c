"""What trackers are told, read back from what the real libraries wrote."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duallora_edge.learner.callbacks import Point
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.report.metrics import BINS, Cell, Metrics, TaskClasses
from duallora_edge.learner.trackers import TRACKERS, Tracker

POINT = Point("photos of a/b", 2, 4, 0.5, 1e-3, 100.0, None)


def cell(correct: int) -> Cell:
    """Ten test images, answered with a confidence of 1."""
    last = (0,) * (BINS - 1)
    return Cell(10, correct, correct, 10, (*last, 10), (*last, correct), (*map(float, last), 10.0))


TASKS = (TaskClasses("photos of a/b", ("x", "y")), TaskClasses("more", ("z",)))
FIRST = Metrics(TASKS[:1], ((cell(9),),))
BOTH = Metrics(TASKS, ((cell(9),), (cell(8), cell(6))))
# By name: (step, value) of each point.
LOGGED = {
    "photos_of_a_b/loss": [(2, 0.5), (4, 0.25)],
    "photos_of_a_b/learning_rate": [(2, 1e-3), (4, 1e-3)],
    "photos_of_a_b/images_per_second": [(2, 100.0), (4, 100.0)],
    "photos_of_a_b/validation_accuracy": [(4, 0.75)],
    "last_accuracy": [(1, 0.9), (2, 0.7)],
    "forgetting_since_learned": [(2, 0.1)],
    "calibration_error": [(1, 0.1), (2, 0.3)],
    "accuracy/photos_of_a_b": [(1, 0.9), (2, 0.8)],
    "accuracy/more": [(2, 0.6)],
}


def track(name: str, folder: Path) -> None:
    """One call of `learn` as a tracker hears of it."""
    tracker = TRACKERS[name](folder / "site-a", pytest.fail)
    tracker.start(TrainConfig(seed=7), ("photos of a/b", "more"))
    tracker.trained(POINT)
    tracker.trained(replace(POINT, step=4, loss=0.25, validation_accuracy=0.75))
    tracker.measured(FIRST)
    tracker.measured(BOTH)
    tracker.end(BOTH)


def assert_logged(found: Mapping[str, list[tuple[int, float]]]) -> None:
    assert found.keys() == LOGGED.keys()
    for name, points in LOGGED.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points]), name


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "site-a" / "reports" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert_logged({tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]})
    (settings,) = events.Tensors("settings/text_summary")
    assert b'"seed": 7' in settings.tensor_proto.string_val[0]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    track("mlflow", tmp_path)
    assert not capfd.readouterr().out
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status, run.data.params["seed"]) == ("site-a", "FINISHED", "7")
    assert_logged({key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in LOGGED})
    assert run.data.metrics.keys() == LOGGED.keys()


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: a log of LevelDB behind 7 bytes, in blocks of 32 KiB."""
    record, position = b"", 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too little room for a header
            position += 32768 - position % 32768
        _, size, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 :][:size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Without an account: the records of the file of an offline run."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", tmp_path)
    assert not capfd.readouterr().out
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[str, list[tuple[int, float]]] = {}
    axes: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for data in wandb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("metric"):
            axes[record.metric.name] = record.metric.step_metric
        settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for key in values.keys() & LOGGED.keys():
            found.setdefault(key, []).append((values[axes[key]], values[key]))
    assert settings["seed"] == 7
    assert_logged(found)


@pytest.mark.parametrize("broken", ["_open", "_log", "_close"])
def test_a_failure_is_said_once_and_nothing_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    calls, said = [], []

    class Broken(Tracker):
        name, module = "broken", "json"

        def _open(self, settings: Mapping[str, Any]) -> None:
            self.meet("_open")

        def _log(self, values: Mapping[str, float], axis: str, step: int) -> None:
            self.meet("_log")

        def _close(self) -> None:
            self.meet("_close")

        def meet(self, name: str) -> None:
            calls.append(name)
            if name == broken:
                raise OSError("the server is away\nfor long")

    tracker = Broken(tmp_path, said.append)
    tracker.trained(POINT)  # before a start: nothing is open
    tracker.start(TrainConfig(), ("a",))
    tracker.trained(POINT)
    tracker.measured(FIRST)
    tracker.end(FIRST)
    assert said == ["Nothing more is logged to broken (the server is away)."]
    tried = {"_open": 1, "_log": 2, "_close": 4}[broken]
    assert calls == ["_open", "_log", "_log", "_close"][:tried]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_missing_is_said_before_anything_is_read(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    code, _, err = call("train", "--data", tmp_path, "--run", tmp_path / "run", "--track", name)
    assert code == 1 and f"Error: Logging to {name} needs its library (" in err and "): pip install " in err
    assert not list(tmp_path.iterdir())


def test_tracking_a_training_changes_no_bit(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, image_stream: Path
) -> None:
    pytest.importorskip("tensorboard")
    quick = ("--epochs", 1, "--min-steps", 4, "--precision", "fp32", "--device", "cpu", "--summaries", 1)
    digests = []
    for name, flags in (("plain", ()), ("tracked", ("--track", "tensorboard"))):
        run = tmp_path / name
        code, out, err = call("train", "--data", image_stream / "01-round", "--run", run, *quick, *flags, "--json")
        assert code == 0 and json.loads(out)["tasks"], err
        digests.append(json.loads(call("status", run, "--json")[1])["digest"])
    assert digests[0] == digests[1]
    assert len(list((tmp_path / "tracked" / "reports" / "tensorboard").iterdir())) == 1
