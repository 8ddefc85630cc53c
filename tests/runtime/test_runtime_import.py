"""What the import of the runtime costs on a device."""

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


def test_the_import_takes_less_than_a_fifth_of_a_second() -> None:
    code = "import time; s = time.perf_counter(); import duallora_edge.runtime; print(time.perf_counter() - s)"
    seconds = [run(code) for _ in range(3)]
    assert min(float(str(value)) for value in seconds) < 0.2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        duallora_edge.runtime.Nothing  # noqa: B018
