"""``duallora-edge export``: what it prints and writes, its exit codes, and one sentence for every wrong input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from duallora_edge.cli import main
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime import Bundle, Classifier
from duallora_edge.runtime.bundle import MANIFEST, MODEL, MODEL_FP16
from duallora_edge.runtime.preprocess import read_image

Call = Callable[..., tuple[int, str, str]]
TRAIN = ("--size", 32, "--rank-orthogonal", 2, "--rank-residual", 2, "--summaries", 1, "--epochs", 1)
TRAIN = (*TRAIN, "--min-steps", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, image_stream: Path) -> Path:
    """A run that learned both tasks of the stream from a copy of it, ``images``, which lies beside it."""
    folder = tmp_path_factory.mktemp("learned")
    shutil.copytree(image_stream, folder / "images")
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in ("train", "--data", folder / "images", "--run", folder / "site-a", *TRAIN)])
    assert not stopped.value.code
    return folder / "site-a"


def failure(result: tuple[int, str, str]) -> str:
    """The message of a command that failed as it should: code 1, and the last line on standard error a sentence."""
    code, out, err = result
    assert code == 1 and out == "" and "Traceback" not in err
    message = err.strip().splitlines()[-1]
    assert message.startswith("Error: ") and message.endswith(".")
    return message


def test_the_default_is_a_jetson_and_the_last_line_says_where_the_bundle_is(
    call: Call, learned: Path, image_stream: Path, tmp_path: Path
) -> None:
    code, out, err = call("export", learned, "-o", tmp_path / "bundle")
    assert code == 0 and "Target: jetson means orin-nano-8gb, the default" in err
    lines = out.splitlines()
    assert lines[0].startswith("Parity on 64 generated images: top-1 agreement 100.00 %, largest probability")
    assert lines[1].startswith("Parity on 64 generated images, fp16: top-1 agreement ")
    assert lines[2].startswith("Parity on ") and " real images: top-1 agreement 100.00 %" in lines[2]
    assert len(lines) == 7 and all("estimate" in line for line in lines[4:6])
    files = [path for path in (tmp_path / "bundle").iterdir() if path.name != MANIFEST]
    assert {MODEL, MODEL_FP16} < {path.name for path in files}
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    assert lines[-1] == f"Bundle: {tmp_path}/bundle  version 1, {megabytes:.1f} MB"
    assert Bundle.open(tmp_path / "bundle").manifest.batch == 1

    classifier = Classifier.load(tmp_path / "bundle", threads=1)
    photo = next((image_stream / "01-round" / "test" / "disc").iterdir())
    assert classifier(read_image(photo)).label in ("disc", "square", "cross", "ring")
    code, out, _ = call("export", learned, "-o", tmp_path / "bundle")
    assert code == 0 and "version 2, " in out
    assert "version 7, " in call("export", learned, "-o", tmp_path / "bundle", "--bundle-version", 7)[1]


def test_json_is_the_manifest(call: Call, learned: Path, tmp_path: Path) -> None:
    code, out, _ = call("export", learned, "-o", tmp_path / "deep" / "bundle", "--json")
    manifest = json.loads(out)
    assert code == 0
    assert manifest == json.loads((tmp_path / "deep" / "bundle" / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["name"] == "site-a" and manifest["parity"]["real"]["images"] > 20


@pytest.mark.parametrize(
    ("arguments", "profile", "jetpack", "opset"),
    [
        (("--target", "orin-nano-8gb"), "orin-nano-8gb", "6.2", 17),
        (("--target", "orin-nano-8gb", "--jetpack", "5.1"), "orin-nano-8gb", "5.1", 16),
        (("--target", "x86-cpu"), "x86-cpu", None, 17),
    ],
)
def test_targets(
    call: Call, learned: Path, tmp_path: Path, arguments: tuple[str, ...], profile: str, jetpack: str, opset: int
) -> None:
    assert call("export", learned, "-o", tmp_path / "bundle", *arguments)[0] == 0
    target = Bundle.open(tmp_path / "bundle").manifest.target
    assert (target["profile"], target["jetpack"], target["opset"]) == (profile, jetpack, opset)


@pytest.mark.parametrize(
    ("arguments", "precision", "batch"),
    [
        ((), "fp16", 1),
        (("--precision", "fp32", "--batch", "dynamic"), "fp32", None),
        (("--batch", 4), "fp16", 4),
        (("--target", "x86-cpu"), "fp32", None),
        (("--target", "x86-cpu", "--batch", 2), "fp32", 2),
    ],
)
def test_precision_and_batch(
    call: Call, learned: Path, tmp_path: Path, arguments: tuple[str, ...], precision: str, batch: int | None
) -> None:
    assert call("export", learned, "-o", tmp_path / "bundle", *arguments)[0] == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.precision, manifest.batch) == (precision, batch)


@pytest.mark.parametrize("batch", ["0", "-1", "many", "100000"])
def test_nonsense_batches(call: Call, learned: Path, tmp_path: Path, batch: str) -> None:
    code, _, err = call("export", learned, "-o", tmp_path / "bundle", "--batch", batch)
    assert code == 2 and f"'{batch}' is neither 'dynamic' nor a number from 1 to 1024" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "orin-nano-8g"), "No device profile is called 'orin-nano-8g'. Did you mean 'orin-nano-8gb'?"),
        (("--target", "nano-4gb"), "nano-4gb with JetPack 4.6 cannot be exported for: JetPack 4 ships TensorRT 8.2"),
        (("--target", "xavier-nx", "--jetpack", "4.6"), "update the device to JetPack 5.1"),
        (("--target", "x86-cpu", "--jetpack", "6.2"), "x86-cpu has no JetPack; leave out the JetPack version"),
        (("--target", "orin-nano-8gb", "--jetpack", "9.9"), "JetPack '9.9' is unknown; known are"),
        (("--target", "mine.yaml"), "mine.yaml"),
        (("--precision", "int8"), "int8 is not exported for orin-nano-8gb: TensorRT users report INT8 vision"),
        (("--precision", "fp8"), "fp8 is not exported for orin-nano-8gb: Needs compute capability 8.9 or newer; use"),
        (("--target", "x86-cpu", "--precision", "int8"), "int8 is not exported for x86-cpu: Measured"),
        (("--target", "x86-cpu", "--precision", "fp16"), "would only convert back and forth; use --precision fp32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_choices(call: Call, learned: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call("export", learned, "-o", tmp_path / "bundle", *arguments)
    assert (code, out) == (1, "") and "Traceback" not in err
    assert message in " ".join(err.split()) and err.splitlines()[-1].startswith("Error: ")
    assert not list(tmp_path.iterdir())


def test_a_run_without_tasks(call: Call, learned: Path, tmp_path: Path) -> None:
    opened = RunDirectory.open(learned)
    RunDirectory.create(tmp_path / "empty", opened.config, opened.info)
    message = failure(call("export", tmp_path / "empty", "-o", tmp_path / "bundle"))
    assert message.endswith("has learned no task yet; 'duallora-edge train' teaches it one.")
    assert not (tmp_path / "bundle").exists()


def test_no_run(call: Call, tmp_path: Path) -> None:
    message = failure(call("export", tmp_path / "nowhere", "-o", tmp_path / "bundle"))
    assert "is not a folder; 'duallora-edge train --data DIR --run" in message
    (tmp_path / "photos").mkdir()
    assert "is not a run (no run.yaml)" in failure(call("export", tmp_path / "photos", "-o", tmp_path / "bundle"))


def test_an_altered_run(call: Call, learned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(learned, run)
    adapters = next((run / "tasks").glob("*/adapters.safetensors"))
    adapters.write_bytes(adapters.read_bytes()[:-1] + b"\xff")
    assert "was altered since it was written" in failure(call("export", run, "-o", tmp_path / "bundle"))


def test_a_folder_of_somebody_else(call: Call, learned: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    assert "is not a bundle; give another name with -o" in failure(call("export", learned, "-o", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_images_that_are_gone(call: Call, learned: Path, tmp_path: Path) -> None:
    """The bundle is made; that it was not compared on real images is said and not claimed."""
    shutil.copytree(learned, tmp_path / "run")
    sources = tmp_path / "run" / "sources.json"
    sources.write_text(sources.read_text().replace(str(learned.parent), str(tmp_path / "moved")))
    code, out, err = call("export", tmp_path / "run", "-o", tmp_path / "bundle")
    assert code == 0 and "real images" not in out
    assert f"Parity is not checked on real images of {tmp_path}/moved/images: " in err
    assert "real" not in Bundle.open(tmp_path / "bundle").manifest.parity


def test_sources_that_are_lost(call: Call, learned: Path, tmp_path: Path) -> None:
    shutil.copytree(learned, tmp_path / "run")
    (tmp_path / "run" / "sources.json").unlink()
    code, _, err = call("export", tmp_path / "run", "-o", tmp_path / "bundle")
    assert code == 0 and "Parity is not checked on real images of tasks whose source is no longer known." in err
    assert "real" not in Bundle.open(tmp_path / "bundle").manifest.parity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "Missing option '-o'"),
        (("-o", "bundle"), "Missing argument 'RUN'"),
        (("run", "-o", "bundle", "--bundle-version", "0"), "--bundle-version"),
        (("run", "-o", "bundle", "--tarket", "x86-cpu"), "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call("export", *arguments)
    assert (code, out) == (2, "") and message in err


def test_help_has_an_example(call: Call) -> None:
    code, out, _ = call("export", "--help")
    assert code == 0 and "duallora-edge export runs/site-a --target jetson -o bundle" in out
