"""What the import of the runtime brings along on a device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import duallora_edge.runtime

HEAVY = ["torch", "torchvision", "timm", "onnx", "onnxruntime", "matplotlib", "cv2", "tensorrt"]


def run(code: str) -> object:
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import duallora_edge.runtime",
        "from duallora_edge.runtime import Bundle, Classifier, Prediction, Preprocessing",
        "import duallora_edge.runtime.commands.predict",
    ],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    assert run(f"import sys, json; {statement}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))") == []


def test_the_package_alone_imports_no_library() -> None:
    libraries = [*HEAVY, "numpy", "PIL", "yaml", "click"]
    code = f"import sys, json, duallora_edge.runtime; print(json.dumps([m for m in {libraries} if m in sys.modules]))"
    assert run(code) == []


@pytest.mark.parametrize("name", duallora_edge.runtime.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(duallora_edge.runtime, name).__module__.startswith("duallora_edge.runtime.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        duallora_edge.runtime.Nothing  # noqa: B018
