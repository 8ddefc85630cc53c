"""What was never loaded is tried in a child, and how that ended is remembered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import BackendError, BundleError, SwapError
from duallora_edge.files import read_json, write_json
from duallora_edge.runtime import Classifier, trial
from duallora_edge.runtime.backends.ladder import Rung
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.device.probes import Answer
from duallora_edge.runtime.trial import MAX_DEATHS, MAX_RECORDS, Opening, RefusedError, Trial

CPU = Opening("cpu", 1)
RED = np.full((20, 30, 3), (250, 5, 5), np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUALLORA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Child:
    """What the child does in place of a trial, which it counts; the limits are small."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module, self.count, self.asked = folder / "fake_trial.py", folder / "count", 0
        self.monkeypatch = monkeypatch
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(trial, "QUESTION", "fake_trial:attempt")
        monkeypatch.setattr(trial, "TIMEOUT_S", 10.0)
        monkeypatch.setattr(trial, "LIBRARY_BYTES", 400 * 10**6)

    def does(self, body: str) -> None:
        lines = textwrap.indent(textwrap.dedent(body), "    ")
        self.module.write_text(
            f"import ctypes, os, time\n\ndef attempt(path, digest, opening):\n"
            f"    open({str(self.count)!r}, 'a').write('x')\n{lines}\n"
        )

    def answers(self, **values: str) -> None:
        """This at once, without a process."""

        def ask(*_: object, **__: object) -> Answer:
            self.asked += 1
            return Answer("ok", values)

        self.monkeypatch.setattr(trial, "ask", ask)

    @property
    def trials(self) -> int:
        return self.asked + (len(self.count.read_text()) if self.count.exists() else 0)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    return Child(tmp_path, monkeypatch)


def record(cache: Path) -> dict[str, object]:
    (file,) = (cache / "trials").glob("*.json")
    found: dict[str, object] = read_json(file)
    return found


def test_a_good_bundle_is_tried_once(shared_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trial(CPU).passed(Bundle.peek(shared_bundle)) as rung:
        assert rung == Rung("cpu", "fp32")
        assert record(cache)["state"] == "trying"
    assert record(cache)["state"] == "good"
    monkeypatch.setattr(trial, "ask", None)
    with Trial(CPU).passed(Bundle.peek(shared_bundle)) as rung:
        assert rung == Rung("cpu", "fp32")
    assert Classifier.load(shared_bundle, "cpu", 1)(RED).label == "red"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ctypes.string_at(0)", r"crashed in its trial \(the process was killed by SIGSEGV\)"),
        ("os._exit(3)", r"crashed in its trial \(the process ended with code 3"),
        ("a = b'x' * 10**9; time.sleep(60)", r"crashed in its trial \(it took more than \d+ MB of memory\)"),
        ("return {'refused': 'wrong results'}", "wrong results"),
        ("raise ValueError('odd')", r"no in its trial \(ValueError: odd\)"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(
    shared_bundle: Path, cache: Path, child: Child, body: str, reason: str
) -> None:
    child.does(body)
    with pytest.raises(RefusedError, match=reason):
        Classifier.load(shared_bundle, "cpu", 1)
    with pytest.raises(RefusedError, match=f"was refused before.*{reason}.*delete .*json to try it"):
        Classifier.load(shared_bundle, "cpu", 1)
    assert child.trials == 1 and record(cache)["state"] == "refused"
    assert Classifier.load(shared_bundle, "cpu", 1, trial=False)(RED).label == "red"


def test_a_trial_that_hangs(shared_bundle: Path, child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    child.does("time.sleep(600)")
    monkeypatch.setattr(trial, "TIMEOUT_S", 1.0)
    with pytest.raises(RefusedError, match=r"hung in its trial \(no answer within 1 s\)"):
        Classifier.load(shared_bundle, "cpu", 1)


def test_a_trial_that_is_cancelled_is_not_remembered(shared_bundle: Path, cache: Path, child: Child) -> None:
    child.does("time.sleep(600)")
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    with pytest.raises(BackendError, match="was cancelled"), Trial(CPU).passed(Bundle.peek(shared_bundle), cancel):
        pass
    assert not list((cache / "trials").glob("*.json"))


def test_a_bundle_that_is_damaged_or_replaced_is_not_remembered(
    bundle: Path, make_bundle: Callable[..., Path], cache: Path
) -> None:
    model = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(model[:100])  # a copy in progress
    with pytest.raises(BundleError, match="bytes instead of"):
        Classifier.load(bundle, "cpu", 1)
    peeked = Bundle.peek(bundle)
    (bundle / "model.onnx").write_bytes(model)
    write_json(bundle / MANIFEST, read_json(bundle / MANIFEST) | {"bundle_version": 7})
    with pytest.raises(BundleError, match="was replaced during its trial"), Trial(CPU).passed(peeked):
        pass
    assert not list((cache / "trials").glob("*.json"))
    assert Classifier.load(bundle, "cpu", 1)(RED).bundle_version == 7


def test_another_bundle_installation_or_engine_is_tried_again(
    make_bundle: Callable[..., Path], cache: Path, child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle()
    child.answers(refused="wrong results")

    def is_tried() -> bool:
        before = child.trials
        with pytest.raises(RefusedError):
            Classifier.load(bundle, "cpu", 1)
        return child.trials > before

    assert is_tried() and not is_tried()
    monkeypatch.setattr(trial, "__version__", "99")
    assert is_tried() and not is_tried()
    (cache / "engines" / "one").mkdir(parents=True)
    sha256 = Bundle.peek(bundle).manifest.files["model.onnx"].sha256
    write_json(cache / "engines" / "one" / "engine.json", {"key": {"model_sha256": sha256}, "sha256": "1"})
    assert is_tried() and not is_tried()
    write_json(bundle / MANIFEST, read_json(bundle / MANIFEST) | {"bundle_version": 7})
    assert is_tried() and not is_tried()


DYING = """
import os, sys
from duallora_edge.runtime.bundle import Bundle
from duallora_edge.runtime.trial import Opening, Trial
with Trial(Opening("cpu", 1)).passed(Bundle.peek(sys.argv[1])):
    os.kill(os.getpid(), 9)  # as a library that crashes in this process, but not in its child
"""


def test_what_kills_the_process_is_given_up(shared_bundle: Path, cache: Path) -> None:
    for deaths in range(MAX_DEATHS):
        done = subprocess.run([sys.executable, "-c", DYING, str(shared_bundle)], timeout=120)
        assert done.returncode == -signal.SIGKILL
        assert (record(cache)["state"], record(cache)["deaths"]) == ("trying", deaths)
    with pytest.raises(RefusedError, match="the process died 2 times while loading it"):
        Classifier.load(shared_bundle, "cpu", 1)


def test_a_child_does_not_outlive_its_parent(shared_bundle: Path, tmp_path: Path, child: Child) -> None:
    child.does(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from duallora_edge.runtime import Classifier, trial\n"
    )
    program += f"trial.QUESTION = 'fake_trial:attempt'; Classifier.load({str(shared_bundle)!r}, 'cpu', 1)"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        process.kill()
    number = (tmp_path / "pid").read_text()
    _until(lambda: not Path(f"/proc/{number}").exists() or " Z " in Path(f"/proc/{number}/stat").read_text())


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_swap_is_refused_before_it_can_do_harm(
    shared_bundle: Path, make_bundle: Callable[..., Path], change_golden: Callable[..., None]
) -> None:
    classifier = Classifier.load(shared_bundle, "cpu", 1)
    other = make_bundle("other", novelty_threshold=0.25)
    change_golden(other, novelty=Bundle.open(other).golden().novelty + np.float32(0.5))
    for reason in (r"wrong results in fp32.*novelty", "was refused before"):
        with pytest.raises(SwapError, match=reason):
            classifier.swap(other)
    assert classifier(RED).label == "red" and classifier.health().swaps == {"refused": 2}


NONSENSE = [
    b"",
    b"[]",
    b"{}",
    b'{"state": "good", "bundle": 3}',
    b"\xff",
    b'{"state": "good"}',
    b'{"deaths": 1e999}',
    b'{"state": "good", "bundle": "colours"}',
]


@pytest.mark.parametrize("content", NONSENSE)
def test_a_record_that_is_nonsense_counts_as_none(
    shared_bundle: Path, cache: Path, child: Child, content: bytes
) -> None:
    child.answers(backend="cpu", precision="fp32")
    with Trial(CPU).passed(Bundle.peek(shared_bundle)):
        pass
    (file,) = (cache / "trials").glob("*.json")
    file.write_bytes(content)
    with Trial(CPU).passed(Bundle.peek(shared_bundle)) as rung:
        assert rung == Rung("cpu", "fp32")
    assert json.loads(file.read_bytes())["state"] == "good" and child.trials == 2


def test_without_a_cache_every_load_is_a_trial(
    shared_bundle: Path, cache: Path, child: Child, capsys: pytest.CaptureFixture[str]
) -> None:
    child.answers(backend="cpu", precision="fp32")
    (cache / "trials").mkdir(parents=True)
    (cache / "trials").chmod(0o777)  # anybody could say what is good
    for trials in (1, 2):
        assert Classifier.load(shared_bundle, "cpu", 1)(RED).label == "red"
        assert child.trials == trials
    assert not list((cache / "trials").iterdir())


def test_only_so_many_records_and_no_other_files(shared_bundle: Path, cache: Path, child: Child) -> None:
    child.answers(backend="cpu", precision="fp32")
    folder = cache / "trials"
    folder.mkdir(parents=True)
    (folder / "notes.json").write_text("of the user")
    for number in range(MAX_RECORDS + 5):
        (folder / f"{number:064x}.json").write_text("{}")
        os.utime(folder / f"{number:064x}.json", (number, number))
    with Trial(CPU).passed(Bundle.peek(shared_bundle)):
        pass
    names = sorted(path.name for path in folder.glob("*.json"))
    assert len(names) == MAX_RECORDS + 1 and "notes.json" in names and f"{0:064x}.json" not in names
