"""Classes taught on the device: against the graph itself and a slow reference, and laws that teaching has to keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duallora_edge.errors import BundleError
from duallora_edge.runtime import Bundle
from duallora_edge.runtime.backends.ladder import open_backend
from duallora_edge.runtime.bundle import OUTPUTS, TEACH, Content, Outputs, Task
from duallora_edge.runtime.field.teaching import CAUTION, TASK, Teacher
from duallora_edge.runtime.graph_weights import WEIGHTS
from duallora_edge.runtime.preprocess import Pixels
from duallora_edge.runtime.tensor_file import blocks


@pytest.fixture(scope="module")
def bundle(teachable: Path) -> Bundle:
    return Bundle.open(teachable)


@pytest.fixture(scope="module")
def outputs(bundle: Bundle, images: dict[str, list[Pixels]]) -> dict[str, Outputs]:
    """What the bundle answers to the images of each class, those it knows and those it does not."""
    backend, prepare = open_backend(bundle, "cpu", 1), bundle.manifest.preprocessing
    return {name: backend.infer(np.stack([prepare(image) for image in each])) for name, each in images.items()}


def rows(outputs: Outputs, start: int, stop: int | None = None) -> Outputs:
    return Outputs(*(getattr(outputs, name)[start:stop] for name in OUTPUTS))


@pytest.mark.parametrize("which", [0, 1])
def test_without_taught_classes_it_answers_as_the_graph(runs: tuple[Path, Path], which: int) -> None:
    opened = Bundle.open(runs[which])
    golden = opened.golden()
    found = Teacher(opened).teach({})(golden)
    tasks = len(opened.manifest.tasks)
    np.testing.assert_allclose(found.probabilities, golden.probabilities, atol=2e-5)
    np.testing.assert_allclose(found.task_probabilities[:, :tasks], golden.task_probabilities, atol=2e-5)
    assert not found.task_probabilities[:, tasks].any()
    np.testing.assert_allclose(found.novelty, golden.novelty, atol=1e-3)
    assert found.features is golden.features


def test_a_taught_class_is_found_and_the_others_stay(bundle: Bundle, outputs: dict[str, Outputs]) -> None:
    known = len(bundle.manifest.classes)
    taught = Teacher(bundle).teach({"cross": outputs["cross"].features[:5], "ring": outputs["ring"].features[:5]})
    assert taught.classes == ("cross", "ring")
    for name, expected in (("cross", known), ("ring", known + 1)):
        found = taught(rows(outputs[name], 5))
        assert (found.probabilities.argmax(axis=1) == expected).mean() > 0.8
        assert (found.task_probabilities.argmax(axis=1) == 1).mean() > 0.8 and found.task_probabilities.shape[1] == 2
        assert found.novelty.mean() < outputs[name].novelty[5:].mean()
    for name in ("disc", "square"):
        before, found = outputs[name], taught(outputs[name])
        assert (found.probabilities.argmax(axis=1) == before.probabilities.argmax(axis=1)).mean() > 0.9
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(found.task_probabilities.sum(axis=1), 1, atol=1e-5)
        assert (found.novelty <= before.novelty + 1e-3).all()  # nearer to something, or as far from everything


@pytest.mark.parametrize("count", [1, 2, 9])
def test_discriminants_against_the_whole_covariance(bundle: Bundle, outputs: dict[str, Outputs], count: int) -> None:
    teach, weights = bundle.tensors(TEACH), bundle.tensors(WEIGHTS)
    factor = teach["factor"].astype(np.float64)
    sigma = factor.T @ factor + np.diag(teach["diagonal"].astype(np.float64))
    centre = weights["classifier.centre"].astype(np.float64)
    frames = outputs["cross"].features[:count]
    mean = frames.astype(np.float64).mean(axis=0)
    taught = Teacher(bundle).teach({"cross": frames})
    inverse = np.linalg.inv(sigma)
    np.testing.assert_allclose(taught.weight[0], inverse @ (mean - centre), rtol=1e-3, atol=1e-4)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float((x - y) @ inverse @ (x - y))

    # The logit is the log-density under the mean less that under the centre, up to the error of the mean.
    gained = float(teach["distance"][0]) / count * (1 - CAUTION / count**0.5)
    for x in outputs["ring"].features[:3].astype(np.float64):
        expected = (distance(x, centre) - distance(x, mean) + gained) / 2
        # The centre is that of all images, so what is common to all classes is left out.
        assert taught.weight[0] @ x + taught.bias[0] == pytest.approx(expected, rel=1e-3, abs=0.05)
    assert taught.teacher.tasks == 1 and TASK == "taught"


def test_the_order_of_teaching_does_not_matter(bundle: Bundle, outputs: dict[str, Outputs]) -> None:
    teacher = Teacher(bundle)
    frames = {name: outputs[name].features[:4] for name in ("cross", "ring")}
    forth, back = teacher.teach(frames), teacher.teach(dict(reversed(frames.items())))
    for name in outputs:
        one, other = forth(outputs[name]), back(outputs[name])
        np.testing.assert_allclose(one.probabilities, other.probabilities[:, [0, 1, 3, 2]], atol=1e-6)
        np.testing.assert_allclose(one.novelty, other.novelty, atol=1e-6)


def changed(bundle: Bundle, **arrays: np.ndarray | None) -> Bundle:
    teach = {**bundle.tensors(TEACH).arrays(), **arrays}
    content = Content(b"".join(blocks({name: value for name, value in teach.items() if value is not None})))
    return replace(bundle, contents={**bundle.contents, TEACH: content})


@pytest.mark.parametrize(
    "arrays",
    [
        {"factor": None},
        {"factor": np.ones((3, 7), np.float16)},
        {"factor": np.full((3, 336), np.inf, np.float16)},
        {"diagonal": np.zeros(336, np.float32)},
        {"diagonal": np.ones(5, np.float32)},
        {"mixture": np.zeros(3, np.float32)},
        {"mixture": np.ones(2, np.float32)},
        {"remoteness": np.full(2, np.nan, np.float32)},
        {"distance": np.ones((1, 1), np.float32)},
    ],
)
def test_what_does_not_fit_is_refused(bundle: Bundle, arrays: dict[str, np.ndarray | None]) -> None:
    assert bundle.manifest.feature_size != 7
    with pytest.raises(BundleError, match=r"does not fit the bundle .*; export the run again"):
        Teacher(changed(bundle, **arrays))


def test_tasks_that_do_not_fit_and_bundles_without_statistics(bundle: Bundle, shared_bundle: Path) -> None:
    tasks = (*bundle.manifest.tasks, Task("more", (0,)))
    with pytest.raises(BundleError, match="does not fit"):
        Teacher(replace(bundle, manifest=replace(bundle.manifest, tasks=tasks)))
    with pytest.raises(BundleError, match="cannot be taught"):
        Teacher(Bundle.open(shared_bundle))
