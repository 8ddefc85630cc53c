"""``predict`` as a user meets it: output, exit code, one sentence an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora_edge.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(end.value.code or 0), output.out, output.err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, color in {"a.png": (250, 5, 5), "more/b.jpg": (5, 5, 250)}.items():
        Image.fromarray(np.full((40, 30, 3), color, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predict_answers_a_line_an_image(capsys: pytest.CaptureFixture[str], shared_bundle: Path, photos: Path) -> None:
    code, out, err = run(capsys, "predict", shared_bundle, photos)
    assert code == 0 and err.startswith("backend: ")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [(row[0], row[1], row[3], row[5]) for row in rows] == [
        (str(photos / "a.png"), "red", "warm", "known"),
        (str(photos / "more/b.jpg"), "blue", "cold", "known"),
    ]
    assert 0.9 < float(rows[0][2]) <= 1


def test_predict_json_lines(capsys: pytest.CaptureFixture[str], shared_bundle: Path, photos: Path) -> None:
    code, out, _ = run(capsys, "predict", shared_bundle, photos / "a.png", "--json", "--top", 3)
    document = json.loads(out)
    assert code == 0 and document["label"] == "red" and len(document["top"]) == 3
    assert document["path"] == str(photos / "a.png")
    code, out, _ = run(capsys, "predict", shared_bundle, photos / "a.png", "--top", 2)
    assert len(out.split("\t")) == 8


def test_a_broken_image_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], shared_bundle: Path, photos: Path
) -> None:
    content = (photos / "more/b.jpg").read_bytes()
    (photos / "a2.jpg").write_bytes(content[: len(content) // 2])
    code, out, err = run(capsys, "predict", shared_bundle, photos, photos / "absent.png")
    assert code == 1
    assert len(out.splitlines()) == 2
    lines = err.splitlines()[1:]
    assert "a2.jpg cannot be read as an image" in lines[0] and "absent.png does not exist" in lines[1]
    assert lines[2] == "Error: 2 of 4 images could not be read; the lines above say why."


def test_predict_refuses_what_it_cannot_use(
    capsys: pytest.CaptureFixture[str], bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, "predict", bundle, photos, tmp_path / "empty")
    assert (code, out) == (1, "") and "contains no images" in err
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[100] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    code, out, err = run(capsys, "predict", bundle, photos)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "was altered" in err
    assert run(capsys, "predict", bundle)[0] == 2
    assert run(capsys, "predict", bundle, photos, "--backend", "npu")[0] == 2


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "predict", "--help")
    assert code == 0 and "Example:\n    duallora-edge predict bundle" in out
