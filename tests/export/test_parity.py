"""Parity against slow loops, and what it must refuse."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora_edge.errors import ExportError
from duallora_edge.export.graph import build_model
from duallora_edge.export.parity import Arrays, Parity, generated_images, onnx_outputs, torch_outputs
from duallora_edge.learner.network.answers import ComposedModel
from duallora_edge.runtime.bundle import OUTPUTS


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def outputs(images: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "probabilities": softmax(rng.normal(size=(images, 5))),
        "task_probabilities": softmax(rng.normal(size=(images, 3))),
        "novelty": rng.uniform(0, 1, images).astype(np.float32),
        "features": rng.normal(size=(images, 16)).astype(np.float32),
    }


def copied(arrays: Arrays) -> Arrays:
    return {name: value.copy() for name, value in arrays.items()}


@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 7), seed=st.integers(0, 99), noise=st.sampled_from([0.0, 1e-4, 0.5]))
def test_between_equals_slow_loops(images: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng((seed, 1))
    a = outputs(images, seed)
    b = {name: (value + noise * rng.normal(size=value.shape)).astype(np.float32) for name, value in a.items()}
    found = Parity.between(a, b)
    agree, tasks, probability, task, novelty, cosine = 0, 0, 0.0, 0.0, 0.0, 1.0
    for i in range(images):
        p, q = a["probabilities"][i].tolist(), b["probabilities"][i].tolist()
        t, u = a["task_probabilities"][i].tolist(), b["task_probabilities"][i].tolist()
        f, g = a["features"][i].tolist(), b["features"][i].tolist()
        agree += p.index(max(p)) == q.index(max(q))
        tasks += t.index(max(t)) == u.index(max(u))
        probability = max(probability, *(abs(x - y) for x, y in zip(p, q, strict=True)))
        task = max(task, *(abs(x - y) for x, y in zip(t, u, strict=True)))
        novelty = max(novelty, abs(float(a["novelty"][i] - b["novelty"][i])))
        dot = math.fsum(x * y for x, y in zip(f, g, strict=True))
        cosine = min(cosine, dot / math.hypot(*f) / math.hypot(*g))
    assert found.images == images
    assert (found.top1_agreement, found.task_agreement) == pytest.approx((agree / images, tasks / images))
    assert found.max_probability_difference == pytest.approx(probability, abs=1e-6)
    assert found.max_task_probability_difference == pytest.approx(task, abs=1e-6)
    assert found.max_novelty_difference == pytest.approx(novelty, rel=1e-4, abs=1e-6)
    assert found.min_feature_cosine == pytest.approx(cosine, abs=1e-9)


def test_equal_outputs_agree() -> None:
    parity = Parity.between(outputs(4), outputs(4))
    parity.check("generated")
    assert parity.to_json() == asdict(parity)
    assert (parity.images, parity.top1_agreement, parity.task_agreement) == (4, 1.0, 1.0)
    assert parity.max_probability_difference == parity.max_novelty_difference == 0
    assert parity.min_feature_cosine == pytest.approx(1)


def test_rounding_is_accepted() -> None:
    reference, other = outputs(32), outputs(32)
    rng = np.random.default_rng(0)
    for value in other.values():
        value *= (1 + 1e-6 * rng.normal(size=value.shape)).astype(np.float32)
    Parity.between(reference, other).check("generated")


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("side", ["reference", "other"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_no_number_is_refused(name: str, side: str, value: float) -> None:
    arrays = {"reference": outputs(8), "other": outputs(8)}
    arrays[side][name].flat[-1] = value
    with np.errstate(invalid="ignore"):
        parity = Parity.between(arrays["reference"], arrays["other"])
    with pytest.raises(ExportError, match="graph differs from the trained model on real images"):
        parity.check("real")


def test_the_same_infinity_on_both_sides_is_refused() -> None:
    reference = outputs(8)
    reference["novelty"][:] = np.inf
    with np.errstate(invalid="ignore"):
        parity = Parity.between(reference, copied(reference))
    with pytest.raises(ExportError):
        parity.check("real")


def flipped_class(other: Arrays) -> None:
    """The two best of the first image, a hair apart, change places."""
    other["probabilities"][0] = [0.4001, 0.4, 0.1, 0.05, 0.0499]


def shifted(name: str, by: float, other: Arrays) -> None:
    other[name].flat[:2] += np.float32([by, -by])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flipped_class, id="flipped top-1"),
        pytest.param(lambda other: shifted("probabilities", 2e-3, other), id="probabilities"),
        pytest.param(lambda other: shifted("task_probabilities", 2e-3, other), id="task probabilities"),
        pytest.param(lambda other: shifted("features", 0.3, other), id="features"),
        pytest.param(lambda other: shifted("novelty", 0.1, other), id="novelty"),
    ],
)
def test_a_difference_that_matters_is_refused(damage: object) -> None:
    assert callable(damage)
    reference = outputs(8)
    reference["probabilities"][0] = [0.4, 0.4001, 0.1, 0.05, 0.0499]
    other = copied(reference)
    damage(other)
    with pytest.raises(ExportError, match="nothing was written, please report this backbone"):
        Parity.between(reference, other).check("generated")


def test_the_message_has_the_numbers() -> None:
    reference, other = outputs(8), outputs(8)
    reference["probabilities"][0] = [0.7, 0.3, 0, 0, 0]
    other["probabilities"][0] = [0.3, 0.7, 0, 0, 0]
    with pytest.raises(ExportError, match=r"agreement 87\.50 %, .*: probability 0\.4, .* 1\.000000\)"):
        Parity.between(reference, other).check("generated")


@pytest.mark.parametrize("images", [1, 32, 33, 70])
def test_outputs_of_any_number_of_images(model: ComposedModel, images: int) -> None:
    """More than one batch, and a last batch that is not full, are joined in order."""
    frames = generated_images(images, 32)
    for found in (torch_outputs(model, frames), onnx_outputs(build_model(model, 17, 8), frames)):
        assert {name: len(value) for name, value in found.items()} == dict.fromkeys(OUTPUTS, images)
        last = torch_outputs(model, frames[-1:])
        np.testing.assert_allclose(found["probabilities"][-1:], last["probabilities"], atol=1e-4)


@pytest.mark.parametrize("size", [8, 32, 50, 224])
def test_generated_images(size: int) -> None:
    images = generated_images(8, size)
    assert images.shape == (8, size, size, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, generated_images(8, size))
    assert (images != generated_images(8, size, seed=1)).mean() > 0.9
    np.testing.assert_array_equal(images[:3], generated_images(3, size))
    for index in range(8):
        assert images[index].std() > 10  # never flat
        assert all((images[index] != images[other]).mean() > 0.9 for other in range(index))
    assert images.min() < 20 and images.max() > 235
