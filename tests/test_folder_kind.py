"""Which folder is a run and which is a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from duallora_edge.folder_kind import folder_kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("HEAD.json", "run.yaml"), "run"),
        (("HEAD.json",), None),
        (("manifest.json",), "bundle"),
        ((), None),
    ],
)
def test_the_kind_of_a_folder(tmp_path: Path, names: tuple[str, ...], kind: str | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert folder_kind(tmp_path) == kind
    assert folder_kind(tmp_path / "absent") is None
