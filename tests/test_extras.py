"""The hints what to install: the packages of an extra, never duallora-edge by name, never a second ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata

import pytest

from duallora_edge.extras import install_hint, onnxruntimes

REQUIRES = [
    "numpy>=1.23",
    "pyyaml>=6",
    'onnxruntime>=1.17; extra == "cpu"',
    "onnxruntime-gpu>=1.18; extra == 'gpu'",
    'torch>=2.6; extra == "train"',
    'onnxruntime>=1.17; extra == "train"',
    'tuf<8,>=7; extra == "publish"',
    'securesystemslib[crypto]>=1; extra == "publish"',
    'duallora-edge[publish,train]; extra == "demo"',
    'scikit-learn>=1.3; (sys_platform == "linux" and platform_machine == "x86_64") and extra == "demo"',
]


@pytest.mark.parametrize(
    ("extra", "there", "replace", "hint"),
    [
        ("", [], False, "pip install 'numpy>=1.23' 'pyyaml>=6'"),
        ("cpu", [], False, "pip install 'onnxruntime>=1.17'"),
        ("gpu", ["onnxruntime"], True, "pip install 'onnxruntime-gpu>=1.18'"),
        ("train", [], False, "pip install 'torch>=2.6' 'onnxruntime>=1.17'"),
        ("train", ["onnxruntime-gpu"], False, "pip install 'torch>=2.6'"),
        ("publish", [], False, "pip install 'tuf<8,>=7' 'securesystemslib[crypto]>=1'"),
        (
            "demo",
            ["onnxruntime"],
            False,
            "pip install 'tuf<8,>=7' 'securesystemslib[crypto]>=1' 'torch>=2.6' 'scikit-learn>=1.3'",
        ),
    ],
)
def test_install_hint(
    monkeypatch: pytest.MonkeyPatch, extra: str, there: Sequence[str], replace: bool, hint: str
) -> None:
    found: Mapping[str, Sequence[str]] = {"onnxruntime": there} if there else {}
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: found)
    assert install_hint(extra, with_onnxruntime=replace) == hint


def test_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert install_hint("label") == "pip install the packages of [label] in pyproject.toml"


@pytest.mark.parametrize("names", [["onnxruntime"], ["onnxruntime", "onnxruntime-gpu"], ["onnxruntime-gpu"] * 2])
def test_onnxruntimes(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """Those that are registered count, whether their files are there or not."""
    folders = [tmp_path_factory.mktemp("site") for _ in names]
    for folder, name in zip(folders, names, strict=True):
        registered = folder / f"{name.replace('-', '_')}-1.20.0.dist-info"
        registered.mkdir()
        (registered / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.20.0\n")
        (registered / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.setattr("sys.path", [str(folder) for folder in folders])
    assert onnxruntimes() == sorted(set(names))
