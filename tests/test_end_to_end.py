"""The main job on real images with real weights: learn two tasks, export, answer with the light runtime."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from duallora_edge.device_profiles import resolve_target
from duallora_edge.export.bundle import write_bundle
from duallora_edge.learner.callbacks import Callback
from duallora_edge.learner.config import TrainConfig
from duallora_edge.learner.methods import compose
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.train import train_run
from duallora_edge.runtime import Classifier
from duallora_edge.runtime.preprocess import read_image

TASKS = ("dtd10", "signdigits")
PER_CLASS = {"train": 30, "test": 8}


@pytest.fixture(scope="module")
def manifest(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV manifest of a part of two asset archives."""
    folder = tmp_path_factory.mktemp("real")
    rows = []
    for task in TASKS:
        with tarfile.open(assets / "images" / f"{task}.tar") as archive:
            archive.extractall(folder, filter="data")
        for split, limit in PER_CLASS.items():
            for directory in sorted((folder / task / split).iterdir()):
                images = sorted(directory.iterdir())[:limit]
                rows += [(image.relative_to(folder), directory.name, split, task) for image in images]
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split", "task"))
        writer.writerows(rows)
    return folder / "images.csv"


@pytest.mark.assets
def test_learn_export_and_run(assets: Path, manifest: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(manifest),
        backbone="vit_tiny_patch16_224",
        weights=str(assets / "weights" / "vit_tiny_patch16_224.safetensors"),
        size=64,
        summaries=1,
        epochs=1,
        min_steps=24,
        precision="fp32",
    )
    metrics = train_run(tmp_path / "run", config, ["data"], Callback())
    summary = metrics.summary
    # Chance is 5 %. Two different domains must be told apart, and little of the first may be lost.
    assert summary["last_accuracy"] is not None and summary["last_accuracy"] > 0.6
    assert summary["task_accuracy"] is not None and summary["task_accuracy"] > 0.95
    assert summary["forgetting_task_given"] is not None and summary["forgetting_task_given"] < 0.08

    run = RunDirectory.open(tmp_path / "run")
    model = compose(run.backbone(), run.records()).eval()
    write_bundle(run, model, resolve_target("x86-cpu"), tmp_path / "bundle", None)
    classifier = Classifier.load(tmp_path / "bundle", threads=1)
    paths = sorted(manifest.parent.glob("*/test/*/*"))[::40]
    for path in paths:
        prediction = classifier(read_image(path))
        frame = classifier.bundle.manifest.preprocessing(read_image(path))
        with torch.no_grad():
            expected = model(torch.from_numpy(frame.copy())[None]).probabilities[0].numpy()
        np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-4)
        assert prediction.label == model.catalogue.classes[int(expected.argmax())]
