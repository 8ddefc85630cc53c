"""What an installation that is not editable would contain."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"duallora_edge"}
    for part in ("learner", "export", "runtime", "device_profiles"):
        folders = {file.parent.relative_to(ROOT) for file in (ROOT / part).rglob("*.py")}
        found |= {f"duallora_edge.{'.'.join(folder.parts)}" for folder in folders}
    assert set(settings["packages"]) == set(settings["package-dir"]) == found
