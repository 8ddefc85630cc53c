"""What an installation that is not editable would contain."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
import setuptools

import duallora_edge

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = {"duallora_edge"}
    for part in ("learner", "export", "runtime", "device_profiles"):
        folders = {file.parent.relative_to(ROOT) for file in (ROOT / part).rglob("*.py")}
        found |= {f"duallora_edge.{'.'.join(folder.parts)}" for folder in folders}
    assert set(setuptools.find_packages(str(ROOT), **settings)) == found


BIN = Path(sys.executable).parent
LOCKED = dict(re.findall(r"^([a-z0-9-]+)==(\S+) ", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE))
in_locked_environment = pytest.mark.skipif(
    not (BIN / "cyclonedx-py").exists()
    or (platform.python_version_tuple()[:2], platform.machine()) != (("3", "11"), "x86_64"),
    reason="the environment is not the one of requirements-dev.lock",
)


def test_the_lock_has_hashes_and_all_that_is_asked_for() -> None:
    text = (ROOT / "requirements-dev.lock").read_text()
    entries = re.split(r"\n(?=[a-z])", re.sub(r"(?m)^ *#.*\n", "", text).strip())
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==\S+ \\\n( {4}--hash=sha256:[0-9a-f]{64}( \\)?\n?)+", entry), entry
    assert "://" not in text
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in ("train", "demo", "camera", "serve", "dev")
                                         for one in project["optional-dependencies"][extra])]  # fmt: skip
    names = {re.match(r"[\w-]+", line)[0].lower() for line in asked} - {"duallora-edge"}  # type: ignore[index]
    assert names <= LOCKED.keys()


@in_locked_environment
def test_the_environment_is_the_one_of_the_lock() -> None:
    found = metadata.distributions(path=[sysconfig.get_path("purelib")])  # sys.path has what setuptools brings, too
    installed = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in found}
    assert {name: installed.get(name) for name in LOCKED} == LOCKED


def make(target: str, folder: Path, lock: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``make`` with this environment and another lock; ``folder`` takes the place of the repository."""
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (folder / "requirements-dev.lock").write_text(lock)
    (folder / "ready").touch()  # last: nothing is newer, so that nothing is installed
    command = ["make", "--quiet", *target.split(), "READY=ready", f"BIN={BIN}"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@in_locked_environment
def test_the_sbom(tmp_path: Path) -> None:
    """It lists the package, its licence and everything in the lock."""
    done = make("sbom SBOM_CHECK=--no-validate", tmp_path, "")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "sbom.cdx.json").read_text())
    component = found["metadata"]["component"]
    assert (found["bomFormat"], component["name"]) == ("CycloneDX", "duallora-edge")
    assert component["version"] == duallora_edge.__version__ and "Apache-2.0" in json.dumps(component["licenses"])
    listed = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in found["components"]}
    assert LOCKED.items() <= listed.items()


@in_locked_environment
def test_an_audit_that_cannot_ask_does_not_pass(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = make("audit", tmp_path, f"click==8.1.0 --hash=sha256:{'0' * 64}\n", **nowhere)
    assert done.returncode and "The audit did not pass" in done.stderr
