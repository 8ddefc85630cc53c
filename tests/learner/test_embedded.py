"""The embedded backbone as others use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from duallora_edge.errors import BackboneError
from duallora_edge.files import sha256_file
from duallora_edge.learner import embedded


def test_files_fit_each_other() -> None:
    description = json.loads(embedded.WEIGHTS.with_suffix(".json").read_text())
    assert embedded.WEIGHTS.stat().st_size < 4_000_000
    assert sha256_file(embedded.WEIGHTS) == description["sha256"] == embedded.SHA256
    assert description["architecture"] == embedded.ARCHITECTURE
    assert description["data_config"] == json.loads(json.dumps(embedded.DATA_CONFIG))
    assert description["parameters"] == sum(value.numel() for value in embedded.create().parameters())


def test_card_names_the_file_and_its_sources() -> None:
    card = embedded.WEIGHTS.with_name("MODEL_CARD.md").read_text()
    for word in (embedded.SHA256, "CIFAR-100", "PACS", "GTSRB", "RSSCN7", "DTD", "Apache-2.0"):
        assert word in card


def test_features() -> None:
    model = embedded.create()
    images = torch.rand(2, *embedded.DATA_CONFIG["input_size"], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features, again = model(images), embedded.create()(images)
    assert features.shape == (2, model.num_features) == (2, 192)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1])
    assert torch.equal(features, again)
    assert not model.training


def test_only_the_shipped_weights_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = bytearray(embedded.WEIGHTS.read_bytes())
    altered[-1] ^= 1
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "weights.safetensors")
    with pytest.raises(BackboneError, match="missing or altered"):
        embedded.create()
    embedded.WEIGHTS.write_bytes(altered)
    with pytest.raises(BackboneError, match="missing or altered"):
        embedded.create()
