"""Base adaptations as files: the same bytes for the same content, and everything else is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from duallora_edge.errors import BackboneError
from duallora_edge.learner.network.backbone import Backbone
from duallora_edge.learner.network.base_adaptation import MAX_DIRECTIONS, BaseAdaptation, read_base, read_made_from

RANK, DIM = 4, 48
FACTS = {"backbone": "0" * 64, "size": 32, "prefix_blocks": 2, "made_from": {"images": 40, "native_size": 64}}


def random_base(seed: int = 0) -> BaseAdaptation:
    """One that fits the tiny backbone."""
    g = torch.Generator().manual_seed(seed)
    updates = tuple((torch.randn(RANK, DIM, generator=g), torch.randn(RANK, 3 * DIM, generator=g)) for _ in "1234")
    return BaseAdaptation(updates, torch.randn(1, 17, DIM, generator=g), torch.randn(5, DIM, generator=g), **FACTS)


def altered(facts: object = FACTS, entry: str = "base_adaptation", **changes: torch.Tensor | None) -> bytes:
    """The content of a file with other tensors (None: left out) or metadata."""
    tensors = load(random_base().to_bytes())
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return save(tensors, {entry: facts if isinstance(facts, str) else json.dumps(facts)})


def test_a_base_adaptation_reads_back(tmp_path: Path) -> None:
    base, path = random_base(), tmp_path / "base.safetensors"
    path.write_bytes(base.to_bytes())
    found, content = read_base(path)
    assert content == base.to_bytes() == found.to_bytes()
    assert (found.backbone, found.size, found.prefix_blocks) == (base.backbone, base.size, base.prefix_blocks)
    assert found.made_from == base.made_from
    assert torch.equal(found.positions, base.positions) and torch.equal(found.directions, base.directions)
    for pair, expected in zip(found.updates, base.updates, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(pair, expected, strict=True))
    assert read_made_from(path) == base.made_from


def test_the_same_content_gives_the_same_bytes() -> None:
    """Whatever the order of the facts, the layout of the tensors and whether they are trained."""
    base = random_base()
    turned = tuple((down.T.contiguous().T, up.clone().requires_grad_()) for down, up in base.updates)
    facts = dict(reversed(list(base.made_from.items())))
    assert replace(base, updates=turned, made_from=facts).to_bytes() == base.to_bytes() != random_base(1).to_bytes()


def test_of_a_file_the_facts_are_read_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(random_base().to_bytes())
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from duallora_edge.learner.network."
        "base_adaptation import read_made_from; print(read_made_from(Path(sys.argv[1]))['images'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "40\n"


WHOLE = random_base().to_bytes()
NUMBERS = torch.zeros(RANK, DIM)
DAMAGED = {
    "empty": b"",
    "text": b"weights",
    "short": WHOLE[:-1],
    "header only": WHOLE[:100],
    "longer": WHOLE + b"\0",
    "float64": altered(positions=torch.zeros(1, 17, DIM, dtype=torch.float64)),
    "float16": altered(**{"blocks.0.down": NUMBERS.half()}),
    "integers": altered(**{"blocks.3.down": NUMBERS.int()}),
    "NaN": altered(**{"blocks.1.down": NUMBERS + float("nan")}),
    "infinite": altered(positions=torch.full((1, 17, DIM), float("inf"))),
    "rank of up": altered(**{"blocks.0.up": torch.zeros(RANK + 1, 3 * DIM)}),
    "width of up": altered(**{"blocks.0.up": torch.zeros(RANK, DIM)}),
    "vector": altered(**{"blocks.2.down": torch.zeros(DIM)}),
    "no positions": altered(positions=None),
    "no directions": altered(directions=None),
    "one direction": altered(directions=torch.zeros(DIM)),
    "many directions": altered(directions=torch.zeros(MAX_DIRECTIONS + 1, DIM)),
    "no up": altered(**{"blocks.3.up": None}),
    "no block 0": altered(**{"blocks.0.up": None, "blocks.0.down": None}),
    "another tensor": altered(head=NUMBERS),
    "nothing in it": save({}, {"base_adaptation": json.dumps(FACTS)}),
    "no facts": save(load(WHOLE)),
    "other facts": altered(entry="format"),
    "facts that are no JSON": altered(facts="{"),
    "facts that are a list": altered(facts=[]),
    "deep facts": altered(facts="[" * 10_000),
    "no backbone": altered(facts={**FACTS, "backbone": None}),
    "size as text": altered(facts={**FACTS, "size": "32"}),
    "huge size": altered(facts={**FACTS, "size": 10**9}),
    "no frozen block": altered(facts={**FACTS, "prefix_blocks": 0}),
    "made from a text": altered(facts={**FACTS, "made_from": "images"}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(content)
    refusal(path)
    with pytest.raises(ValueError):
        BaseAdaptation.from_bytes(content)


def refusal(path: Path) -> str:
    with pytest.raises(BackboneError, match="cannot be used as a base adaptation") as caught:
        read_base(path)
    message = str(caught.value)
    assert message.endswith("'duallora-edge adapt' makes one.") and "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing", "large"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe is not waited for."""
    path = tmp_path / "base"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(WHOLE)
        monkeypatch.setattr("duallora_edge.learner.network.base_adaptation.MAX_BYTES", 1000)
    refusal(path)
    if kind != "large":
        with pytest.raises(OSError, match="no such file"):
            read_made_from(path)


def test_a_backbone_takes_only_its_own(make_backbone: Callable[..., Backbone]) -> None:
    base = random_base()
    wide = (*base.updates[:-1], (torch.zeros(RANK, 2 * DIM), torch.zeros(RANK, 6 * DIM)))
    others: list[dict[str, Any]] = [
        {"backbone": "1" * 64},
        {"size": 40},
        {"prefix_blocks": 1},
        {"positions": base.positions[:, 1:]},
        {"directions": base.directions[:, 1:]},
        {"updates": base.updates[:-1]},
        {"updates": (*base.updates, base.updates[0])},
        {"updates": wide},
        {"updates": ()},
    ]
    backbone, untouched = make_backbone(), make_backbone().state_dict()
    for changes in others:
        with pytest.raises(BackboneError, match=r"was made for the weights|does not have the shapes"):
            backbone.adapt(replace(base, **changes), "f" * 64)
        assert all(torch.equal(value, untouched[name]) for name, value in backbone.state_dict().items())
        assert backbone.info.base is None


def test_adapting_adds_the_updates(make_backbone: Callable[..., Backbone]) -> None:
    base, backbone, untouched = random_base(), make_backbone(), make_backbone()
    backbone.adapt(base, "f" * 64)
    assert backbone.info == replace(untouched.info, base="f" * 64)
    expected = untouched.state_dict()
    for index, (down, up) in enumerate(base.updates):
        expected[f"model.blocks.{index}.attn.qkv.weight"] += torch.einsum("ro,ri->oi", up, down)
    expected["model.pos_embed"] = base.positions
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(backbone.directions, base.directions)


def test_without_updates_the_weights_stay(make_backbone: Callable[..., Backbone]) -> None:
    """As where only directions were wanted."""
    backbone, none = make_backbone(), torch.zeros(0, DIM)
    base = replace(random_base(), updates=((none, none.repeat(1, 3)),) * 4, positions=backbone.model.pos_embed.detach())
    backbone.adapt(BaseAdaptation.from_bytes(base.to_bytes()), "f" * 64)
    untouched = make_backbone().state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in backbone.state_dict().items())
