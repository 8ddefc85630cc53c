"""Methods by name: the built-in ones without torch, and one of the user's own in a file of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from duallora_edge.errors import ConfigError
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.methods import BUILT_IN, METHODS, VARIABLE
from duallora_edge.learner.methods.base import Method
from duallora_edge.learner.methods.frozen import Frozen
from duallora_edge.learner.run_directory import RunDirectory

Call = Callable[..., tuple[int, str, str]]

MINE = """
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.methods.frozen import Frozen


class Mine(Frozen):
    name = "mine"
    summary = "the nearest class mean"
    classifier = "mean_f"


METHODS["mine"] = Mine
"""


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a method behind."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(METHODS, "_files", set())
    yield
    for name in set(METHODS) - set(BUILT_IN):
        del METHODS[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_built_in_methods_say_of_themselves_what_the_registry_says() -> None:
    assert list(METHODS) == list(BUILT_IN)
    assert {name: (method.name, method.summary) for name, method in METHODS.items()} == {
        name: (name, summary) for name, (_, summary) in BUILT_IN.items()
    }


def test_names_and_summaries_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from duallora_edge.learner.config import TrainConfig, METHODS\n"
        "print(TrainConfig().method, len(METHODS), METHODS.summaries()['joint'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"dual_lora {len(BUILT_IN)} {BUILT_IN['joint'][1]}"


def test_a_method_in_a_file_is_trained_by_name(
    call: Call, tmp_path: Path, image_stream: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train = ("train", "--data", image_stream, "--run", run, "--device", "cpu", "--precision", "fp32")
    code, _, err = call(*train, "--method", "mine")
    assert code == 2 and "method must be one of dual_lora" in err and not run.exists()
    monkeypatch.setenv(VARIABLE, str(file))
    assert "the nearest class mean" in call("train", "--help")[1]
    assert call(*train, "--method", "mine")[0] == 0
    opened = RunDirectory.open(run)
    assert opened.config.method == "mine"
    assert {opened.read_info(task).classifier for task in opened.active_tasks()} == {"mean_f"}
    assert "mine on embedded" in call("status", run)[1]
    monkeypatch.delenv(VARIABLE)
    del METHODS["mine"]
    code, _, err = call("status", run)
    assert code == 1
    assert f"was trained with the method 'mine', which is not known here; set {VARIABLE} to the file" in err


def test_a_method_can_be_registered_from_python() -> None:
    class Mine(Frozen):
        name = "mine"

    with pytest.raises(ConfigError, match="method must be one of"):
        TrainConfig(method="mine")
    METHODS["mine"] = Mine
    METHODS["mine"] = Mine()  # as a notebook does that runs a cell again
    assert TrainConfig(method="mine").method == "mine" and list(METHODS)[-1] == "mine"


class Unnamed(Frozen):
    pass


class Unfinished(Method):
    name = "mine"


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("frozen", Frozen, "is a built-in method"),
        ("mine", Unnamed, "must have the line: name = 'mine'"),
        ("mine", Unfinished, "is not complete"),
        ("mine", print, "must be a subclass of duallora_edge.learner.methods.base.Method"),
        ("mine", Path, "must be a subclass"),
        ("../mine", Frozen, "cannot name a method"),
        (5, Frozen, "cannot name a method"),
    ],
)
def test_nonsense_is_refused(name: Any, method: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        METHODS[name] = method
    with pytest.raises(ConfigError, match="is a built-in method and stays"):
        del METHODS["frozen"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "registers no method"),
        ("1 / 0", r"cannot be run \(ZeroDivisionError: division by zero\)"),
        ("def", "cannot be run .SyntaxError"),
        (MINE.replace('METHODS["mine"]', 'METHODS["joint"]'), "'joint' is a built-in method"),
        (None, "cannot be run .FileNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, said: str
) -> None:
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    for _ in range(2):  # it is not forgotten that it failed
        with pytest.raises(ConfigError, match=f"broken.py, which {VARIABLE} names.*{said}"):
            TrainConfig(method="mine")
    monkeypatch.delenv(VARIABLE)
