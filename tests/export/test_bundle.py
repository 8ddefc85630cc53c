"""Bundles: accepted by the device's reader, right in their answers, and replaced as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from duallora_edge import __version__
from duallora_edge.device_profiles import resolve_target
from duallora_edge.errors import BundleError, ExportError
from duallora_edge.export.bundle import GENERATED_IMAGES, GOLDEN_IMAGES, README, RECIPE, write_bundle
from duallora_edge.export.graph import build_model
from duallora_edge.export.parity import generated_images, torch_outputs
from duallora_edge.files import read_json, write_json
from duallora_edge.learner.data import PreparedTask
from duallora_edge.learner.methods import compose
from duallora_edge.learner.network.answers import NOVELTY_THRESHOLD, ComposedModel
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.runtime import Bundle, Classifier
from duallora_edge.runtime.backends.ladder import open_backend
from duallora_edge.runtime.bundle import GOLDEN, MANIFEST, MODEL, MODEL_FP16, OUTPUTS, TEACH
from duallora_edge.runtime.graph_check import METADATA
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.preprocess import Preprocessing
from duallora_edge.runtime.tensor_file import TensorFile

TARGET = resolve_target("orin-nano-8gb", "6.2")
REAL = generated_images(20, 32, seed=9)  # they stand for photographs


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def bundle(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> Path:
    """A bundle of version 1."""
    write_bundle(run, model, TARGET, tmp_path / "out" / "bundle", None)
    return tmp_path / "out" / "bundle"


@pytest.mark.parametrize(("name", "jetpack"), [("orin-nano-8gb", "6.2"), ("x86-cpu", None), ("xavier-nx", "5.1")])
def test_the_runtime_answers_as_pytorch(
    run: RunDirectory, model: ComposedModel, tmp_path: Path, name: str, jetpack: str | None
) -> None:
    target = resolve_target(name, jetpack)
    exported = write_bundle(run, model, target, tmp_path / "bundle", REAL)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.to_json() == json.loads(json.dumps(exported.manifest.to_json()))
    recipe = {RECIPE} if jetpack == "5.1" else set()  # its Python is too old for the runtime
    assert {path.name for path in bundle.path.iterdir()} == {MANIFEST, MODEL, WEIGHTS, GOLDEN, TEACH, README} | recipe
    graph = onnx.load(bundle.model_path)
    assert (graph.opset_import[0].version, graph.ir_version) == (target.opset, target.ir_version)

    classifier = Classifier.load(tmp_path / "bundle", threads=1)
    frames = [*REAL[:5], *generated_images(2, 51, seed=3)]  # of the size of the model, and larger
    expected = torch_outputs(model, np.stack([bundle.manifest.preprocessing(frame) for frame in frames]))
    for index, prediction in enumerate(classifier.batch(frames)):
        np.testing.assert_allclose(prediction.probabilities, expected["probabilities"][index], atol=1e-4)
        assert prediction.label == "abcd"[expected["probabilities"][index].argmax()]
        assert prediction.task == ("first", "second")[expected["task_probabilities"][index].argmax()]
        assert prediction.novelty == pytest.approx(expected["novelty"][index], rel=1e-3)


def test_manifest(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    exported = write_bundle(run, model, TARGET, tmp_path / "bundle", REAL)
    manifest = read_json(tmp_path / "bundle" / MANIFEST)
    assert (manifest["name"], manifest["bundle_version"]) == ("site", 1)
    assert manifest["classes"] == ["a", "b", "c", "d"]
    assert manifest["tasks"] == [{"name": "first", "classes": [0, 1]}, {"name": "second", "classes": [2, 3]}]
    assert manifest["preprocessing"] == {
        "size": 32,
        "resize": run.config.resize,
        "interpolation": "bicubic",
        "reducing_gap": 2.0,
    }
    assert manifest["outputs"]["features"]["shape"] == ["N", 7 * 48]
    calibration, mixture = manifest["calibration"], model.classifier.mixture
    assert calibration["temperature"] == mixture.temperature
    assert (calibration["spread"], calibration["share"]) == (mixture.spread, mixture.share)
    assert calibration["novelty_threshold"] == NOVELTY_THRESHOLD
    target = manifest["target"]
    assert (target["profile"], target["jetpack"]) == ("orin-nano-8gb", "6.2")
    assert (target["opset"], target["ir_version"]) == (17, 8)
    backends = ["tensorrt", "cuda", "cpu"]
    assert manifest["engine"] == {"precision": "fp32", "workspace_mb": 512, "split": False, "backends": backends}
    assert [entry["mode"] for entry in target["estimates"]] == ["normal", "super"]
    assert all("estimate" in entry["note"] for entry in target["estimates"])
    assert all("estimate" in entry.text for entry in exported.estimates)
    graph = onnx.load(tmp_path / "bundle" / MODEL)
    assert target["nodes"][MODEL]["total"] == len(graph.graph.node) and target["flops"] > 1e6
    assert 0 < target["nodes_in_onnxruntime"] < len(graph.graph.node)
    assert target["parameters"] == sum(numpy_helper.to_array(tensor).size for tensor in graph.graph.initializer)
    parity = manifest["parity"]
    assert (parity["generated"]["images"], parity["real"]["images"]) == (GENERATED_IMAGES, len(REAL))
    assert parity["generated"]["top1_agreement"] == parity["real"]["top1_agreement"] == 1
    assert parity["real"]["max_probability_difference"] < 1e-4
    provenance = manifest["provenance"]
    assert provenance["made_by"] == f"duallora-edge {__version__}" and provenance["run_digest"] == run.digest()
    assert provenance["backbone"]["name"] == "tiny" and set(provenance["versions"]) >= {"torch", "onnx"}


def test_other_programs_find_names_and_preprocessing_in_the_graph(
    run: RunDirectory, model: ComposedModel, tmp_path: Path
) -> None:
    classes = ("ä", "犬", "\U0001f415", '"')
    named = ComposedModel(replace(model.catalogue, classes=classes), model.network, model.classifier).eval()
    manifest = write_bundle(run, named, TARGET, tmp_path / "bundle", None, precision="fp16", split=True).manifest
    for name in (MODEL, MODEL_FP16):
        session = onnxruntime.InferenceSession(tmp_path / "bundle" / name, providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
        assert found.keys() == {*METADATA} and json.loads(found["classes"]) == [*classes]
        assert Preprocessing(**json.loads(found["preprocessing"])) == manifest.preprocessing
    assert not onnx.load(tmp_path / "bundle" / "prefix-fp16.onnx", load_external_data=False).metadata_props


def test_half_precision_is_a_second_graph(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    exported = write_bundle(run, model, TARGET, tmp_path / "bundle", REAL, precision="fp16", batch=2)
    bundle = Bundle.open(tmp_path / "bundle")
    assert (bundle.manifest.precision, bundle.manifest.batch) == ("fp16", 2)
    assert bundle.graph("fp32") == bundle.model_path and bundle.graph("fp16").name == MODEL_FP16
    sizes = [bundle.manifest.files[name].bytes for name in (MODEL_FP16, MODEL, WEIGHTS)]
    assert max(sizes[:2]) < 0.5 * sizes[2]  # the weights are there once
    assert set(exported.manifest.parity) >= {"generated", "real", "generated_fp16", "real_fp16"}
    readme = (tmp_path / "bundle" / README).read_text()
    assert MODEL_FP16 in readme and "duallora-edge build" in readme and "image [2, 32, 32, 3]" in readme
    for precision in ("fp32", "fp16"):
        shape = onnx.load(bundle.graph(precision)).graph.input[0].type.tensor_type.shape
        assert [dim.dim_value for dim in shape.dim] == [2, 32, 32, 3]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_split_bundle_keeps_its_prefix_after_a_new_task(
    run: RunDirectory, model: ComposedModel, tiny_backbone: Backbone, tmp_path: Path, precision: str
) -> None:
    exported = write_bundle(run, model, TARGET, tmp_path / "bundle", REAL, precision=precision, batch=1, split=True)
    before = Bundle.open(tmp_path / "bundle")
    assert [path.name for path in before.gpu_graphs] == [f"prefix-{precision}.onnx", f"suffix-{precision}.onnx"]
    assert f"real_{precision}_split" in exported.manifest.parity
    earlier = compose(tiny_backbone, run.records()[:1]).eval()
    write_bundle(run, earlier, TARGET, tmp_path / "other", None, precision=precision, batch=1, split=True)
    after = Bundle.open(tmp_path / "other")
    digests = [[bundle.manifest.graph(path.name).sha256 for path in bundle.gpu_graphs] for bundle in (before, after)]
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]
    document = read_json(tmp_path / "bundle" / MANIFEST)
    del document["files"][f"suffix-{precision}.onnx"]
    write_json(tmp_path / "bundle" / MANIFEST, document)
    with pytest.raises(BundleError, match=r"engine\.split: needs suffix-"):
        Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(("precision", "batch"), [("fp16", 1), ("fp16", None), ("fp32", 4)])
def test_the_recipe_of_jetpack_5(
    run: RunDirectory, model: ComposedModel, tmp_path: Path, precision: str, batch: int | None
) -> None:
    """trtexec gets the right file and shapes, and is told what must stay fp32, by names that the graph has."""
    target = resolve_target("xavier-nx", "5.1")
    write_bundle(run, model, target, tmp_path / "bundle", None, precision=precision, batch=batch)
    arguments = tmp_path / "arguments"
    fake = tmp_path / "trtexec"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {arguments}\n')
    fake.chmod(0o755)
    subprocess.run(
        ["sh", str(tmp_path / "bundle" / RECIPE), "my engine"], check=True, env={**os.environ, "TRTEXEC": str(fake)}
    )
    given = dict(line.removeprefix("--").partition("=")[::2] for line in arguments.read_text().splitlines())
    graph = onnx.load(tmp_path / "bundle" / given["onnx"])
    assert given["onnx"] == (MODEL_FP16 if precision == "fp16" else MODEL) and given["saveEngine"] == "my engine"
    assert given["memPoolSize"] == f"workspace:{target.profile.workspace_mb}"
    assert "noTF32" in given
    assert ("optShapes" in given) == (batch is None) and ("fp16" in given) == (precision == "fp16")
    if precision == "fp16":
        kept = [part.removesuffix(":fp32") for part in given["layerPrecisions"].split(",")]
        kinds = {node.name: node.op_type for node in graph.graph.node}
        named = [kinds[name] for name in kept]
        assert given["layerOutputTypes"] == given["layerPrecisions"] and given["precisionConstraints"] == "obey"
        assert {"Sqrt", "Conv", "Gemm", "Add"} <= set(named) and named.count("Softmax") < list(kinds.values()).count(
            "Softmax"
        )


@pytest.mark.parametrize("real", [None, REAL[:0]], ids=["unknown", "none"])
def test_parity_on_real_images_is_claimed_only_when_there_were_any(
    run: RunDirectory, model: ComposedModel, tmp_path: Path, real: np.ndarray | None
) -> None:
    parity = write_bundle(run, model, TARGET, tmp_path / "bundle", real).manifest.parity
    assert "generated" in parity and "real" not in parity


def test_no_path_of_this_machine_is_in_the_manifest(bundle: Path, tmp_path: Path) -> None:
    for name in (MANIFEST, README):
        text = (bundle / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(Path.home()) + "/" not in text


def test_golden_images_are_generated_and_nothing_of_the_training_is_inside(
    bundle: Path, model: ComposedModel, make_task: object
) -> None:
    golden = Bundle.open(bundle).golden()
    np.testing.assert_array_equal(golden.image, generated_images(GOLDEN_IMAGES, 32, seed=1))
    expected = torch_outputs(model, golden.image)
    for name in OUTPUTS:
        np.testing.assert_allclose(getattr(golden, name), expected[name], rtol=1e-4, atol=1e-6)
    assert callable(make_task)
    learned: PreparedTask = make_task("first", ["a", "b"], [0, 1])
    everything = b"".join(content(bundle).values())
    rows = [image[row].tobytes() for image in learned.train.pixels for row in (0, 16)]
    assert not [row for row in rows if row in everything]
    assert set(TensorFile((bundle / GOLDEN).read_bytes()).entries) == {"image", *OUTPUTS}


def test_readme_says_what_the_bundle_is(bundle: Path) -> None:
    text = (bundle / README).read_text(encoding="utf-8")
    assert "\n# site\n" in text and "4 classes from 2 tasks" in text
    wheel = f"'./duallora_edge-{__version__}-py3-none-any.whl[cpu]'"  # duallora-edge is on no index
    assert f"pip install -c jetson/constraints-jp6.txt {wheel}\n" in text
    assert "Orin Nano 8GB" in text and "JetPack 6.2" in text
    assert "(opset 17, IR 8, fp32)" in text and "`image [N, 32, 32, 3]`" in text
    assert "Estimates, not measured on the device:" in text and text.count("\n* orin-nano-8gb") == 2


def test_an_export_replaces_the_bundle_as_a_whole(run: RunDirectory, model: ComposedModel, bundle: Path) -> None:
    second = write_bundle(run, model, resolve_target("x86-cpu"), bundle, None)
    assert second.manifest.bundle_version == Bundle.open(bundle).manifest.bundle_version == 2
    assert sorted(path.name for path in bundle.iterdir()) == sorted((GOLDEN, MANIFEST, MODEL, README, TEACH, WEIGHTS))
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"] and not second.kept
    assert write_bundle(run, model, TARGET, bundle, None, version=9).manifest.bundle_version == 9
    assert write_bundle(run, model, TARGET, bundle, None).manifest.bundle_version == 10


def test_foreign_files_in_a_bundle_are_named_and_stay(run: RunDirectory, model: ComposedModel, bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    (bundle / "photos").mkdir()
    before = content(bundle)
    with pytest.raises(ExportError, match=r"also holds what no export wrote \(notes\.txt, photos\); move it away"):
        write_bundle(run, model, TARGET, bundle, None)
    assert content(bundle) == before


def test_what_comes_while_a_bundle_is_replaced_is_kept(
    run: RunDirectory, model: ComposedModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*arguments: Any) -> Any:
        (bundle / "notes.txt").write_text("mine")
        return open_backend(*arguments)

    monkeypatch.setattr("duallora_edge.export.bundle.open_backend", late)
    (kept,) = write_bundle(run, model, TARGET, bundle, None).kept
    assert [(path.name, path.read_text()) for path in kept.iterdir()] == [("notes.txt", "mine")]
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", kept.name}


def test_what_was_written_is_read_back_before_it_replaces_anything(
    run: RunDirectory, model: ComposedModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stores something else than it was given."""
    before, real = content(bundle.parent), Path.write_bytes

    def forgetful(path: Path, written: bytes) -> int:
        return real(path, written[:-1] + b"x" if path.name == MODEL else written)

    monkeypatch.setattr(Path, "write_bytes", forgetful)
    with pytest.raises(ExportError, match=r"as written cannot be used, so nothing was replaced: .*model\.onnx was alt"):
        write_bundle(run, model, TARGET, bundle, None)
    assert content(bundle.parent) == before


def test_an_empty_folder_is_used(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert write_bundle(run, model, TARGET, tmp_path / "new", None).manifest.bundle_version == 1
    Bundle.open(tmp_path / "new")


@pytest.mark.parametrize("version", [None, 3])
@pytest.mark.parametrize("name", ["photo.jpg", ".hidden", "sub/photo.jpg", MANIFEST])
def test_a_folder_of_somebody_else_is_refused_and_untouched(
    run: RunDirectory, model: ComposedModel, tmp_path: Path, name: str, version: int | None
) -> None:
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"name": "a web page"}')
    before = content(tmp_path)
    with pytest.raises(ExportError, match=r"(is not a bundle; give another name|holds no readable bundle)"):
        write_bundle(run, model, TARGET, folder, None, version)
    assert content(tmp_path) == before


def test_a_file_is_refused_and_untouched(run: RunDirectory, model: ComposedModel, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("words")
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        write_bundle(run, model, TARGET, tmp_path / "mine", None)
    assert (tmp_path / "mine").read_text() == "words"


def damaged(model: ComposedModel, opset: int, ir_version: int, **options: Any) -> onnx.ModelProto:
    """A graph whose first class is a little more likely than in the model."""
    graph = build_model(model, opset, ir_version, **options)
    (bias,) = (tensor for tensor in graph.graph.initializer if tensor.name == "classifier.bias")
    value = numpy_helper.to_array(bias).copy()
    value[0] += 0.1
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    return graph


def test_a_graph_that_answers_otherwise_leaves_the_old_bundle(
    run: RunDirectory, model: ComposedModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(bundle.parent)
    monkeypatch.setattr("duallora_edge.export.bundle.build_model", damaged)
    with pytest.raises(ExportError, match="graph differs from the trained model on generated images"):
        write_bundle(run, model, TARGET, bundle, None)
    assert content(bundle.parent) == before
    with pytest.raises(ExportError, match="nothing was written"):
        write_bundle(run, model, TARGET, bundle.with_name("other"), None)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_graph_that_fails_on_real_images_alone_is_refused(
    run: RunDirectory, model: ComposedModel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(bundle.parent)
    whole = torch_outputs

    def on_real_images_only(reference: ComposedModel, images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = whole(reference, images)
        if len(images) == len(REAL):
            outputs["probabilities"] = outputs["probabilities"][:, ::-1]
        return outputs

    monkeypatch.setattr("duallora_edge.export.bundle.torch_outputs", on_real_images_only)
    with pytest.raises(ExportError, match="on real images"):
        write_bundle(run, model, TARGET, bundle, REAL)
    assert content(bundle.parent) == before


@pytest.mark.parametrize("synced", [0, 2])
def test_a_full_disk_leaves_the_old_bundle(
    run: RunDirectory, model: ComposedModel, bundle: Path, monkeypatch: pytest.MonkeyPatch, synced: int
) -> None:
    before, left = content(bundle.parent), [synced]

    def fsync(handle: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(run, model, TARGET, bundle, None)
    assert content(bundle.parent) == before


def test_a_damaged_bundle_is_not_replaced_without_a_word(run: RunDirectory, model: ComposedModel, bundle: Path) -> None:
    (bundle / MODEL).write_bytes(b"short")
    before = content(bundle)
    with pytest.raises(ExportError, match=r"holds no readable bundle \(.*model.onnx has 5 bytes"):
        write_bundle(run, model, TARGET, bundle, None)
    assert content(bundle) == before
