"""A bundle that can be taught: of two classes, with images of two more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.export.export import export_run
from duallora_edge.files import read_json, write_json
from duallora_edge.learner import Learner
from duallora_edge.runtime.bundle import MANIFEST, Bundle
from duallora_edge.runtime.preprocess import Pixels, read_image

SETTINGS = {"size": 32, "rank_orthogonal": 2, "rank_residual": 2, "summaries": 1, "epochs": 2, "min_steps": 20}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> tuple[Path, Path]:
    """The bundles of one run: after its first task (disc, square), and after its second (cross, ring); read only."""
    folder = tmp_path_factory.mktemp("teachable")
    learner = Learner(folder / "run", data=str(image_stream), device="cpu", **SETTINGS)
    learner.learn()
    export_run(folder / "run", folder / "both", "x86-cpu", bundle_version=2)
    learner.rollback()
    export_run(folder / "run", folder / "first", "x86-cpu", bundle_version=1)
    return folder / "first", folder / "both"


@pytest.fixture(scope="session")
def teachable(runs: tuple[Path, Path]) -> Path:
    """A bundle that knows disc and square; read only."""
    return runs[0]


@pytest.fixture(scope="session")
def images(image_stream: Path) -> dict[str, list[Pixels]]:
    """Images of each class of the stream, those for the test at the end."""
    found: dict[str, list[Pixels]] = {}
    for split in ("train", "test"):
        for path in sorted(image_stream.glob(f"*/{split}/*/*")):
            found.setdefault(path.parent.name, []).append(read_image(path))
    assert all(np.unique([image.shape for image in each]).size for each in found.values())
    return found


@pytest.fixture
def bundles(make_bundle: Callable[..., Path]) -> list[Bundle]:
    """Bundles of the versions 1 to 4."""
    made = []
    for version in range(1, 5):
        folder = make_bundle(f"v{version}")
        write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"bundle_version": version})
        made.append(Bundle.open(folder))
    return made
