"""A bundle that names colours, pictures for it, and the examples as processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
COLOURS = {
    "red": (250, 5, 5),
    "green": (5, 250, 5),
    "blue": (5, 5, 250),
    "white": (250, 250, 250),
    "grey": (99, 99, 99),
}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def colour_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the bundle of tests/runtime; nobody changes it."""
    spec = importlib.util.spec_from_file_location("runtime_fixtures", ROOT / "tests" / "runtime" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_bundle(tmp_path_factory.mktemp("examples") / "bundle", 0.5, {})


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures in the order red, white (which is novel), red, grey (which may be anything), blue."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("red", "white", "red", "grey", "blue")):
        Image.new("RGB", (64, 48), COLOURS[name]).save(folder / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start("camera_app.py", ...)`` runs an example, or ``start("duallora-edge", ...)`` the command, as a user would.

    The process has pipes for its standard output and standard error.
    """
    processes: list[subprocess.Popen[str]] = []

    def run(name: str, *arguments: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        program = {".py": [sys.executable, str(EXAMPLES / name)], ".sh": [str(EXAMPLES / name)]}
        process = subprocess.Popen(
            [*program.get(Path(name).suffix, [str(BIN / name)]), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **(env or {})},
            **options,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What ``condition`` returns as soon as that is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    return until
