"""Backbones: what is supported, which weights fit, and the prefix summary against slow formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from duallora_edge.errors import BackboneError
from duallora_edge.learner import embedded
from duallora_edge.learner.network.backbone import Backbone, load_backbone, spaced_blocks
from duallora_edge.learner.network.backbone_info import BackboneInfo

SMALL = "test_vit"  # timm's own model for tests: 160 px, 6 blocks of width 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of `SMALL` with a classifier, as they are downloaded."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(timm.create_model(SMALL, num_classes=10).state_dict(), path)
    return path


def refusal(name: str, **options: object) -> str:
    with pytest.raises(BackboneError) as caught:
        load_backbone(name, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 500
    return message


def test_embedded_backbone() -> None:
    backbone = load_backbone(embedded.NAME)
    info = backbone.info
    assert (info.name, info.size, info.prefix_blocks, len(backbone.suffix)) == ("embedded", 64, 2, 2)
    assert info.sha256 == embedded.SHA256 and info.summary_blocks == (1,)
    assert BackboneInfo.from_json(json.loads(json.dumps(info.to_json()))) == info
    assert not any(parameter.requires_grad for parameter in backbone.parameters()) and not backbone.model.training


@pytest.mark.parametrize("size", [32, 128])
def test_embedded_backbone_of_another_size(size: int) -> None:
    backbone = load_backbone(embedded.NAME, size=size)
    assert backbone.info.size == size
    tokens, phi = backbone.prefix(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    assert tokens.shape == (1, (size // 8) ** 2 + 1, 192)
    assert phi.shape == (1, 3 * 192)


def test_weights_file(weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=weights, prefix_blocks=4)
    assert (backbone.info.size, len(backbone.suffix), backbone.dim) == (160, 2, 64)
    assert backbone.info == load_backbone(SMALL, weights=weights, prefix_blocks=4).info
    frames = torch.randint(0, 256, (2, 160, 160, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.info.mean, backbone.info.std))
    with torch.no_grad():
        x = ((frames.permute(0, 3, 1, 2) / 255) - mean) / std
        x = backbone.model.norm_pre(backbone.model._pos_embed(backbone.model.patch_embed(x)))
        for block in backbone.model.blocks[:4]:
            x = block(x)
    torch.testing.assert_close(backbone.prefix(frames)[0], x, rtol=1e-4, atol=1e-4)


def test_position_embeddings_are_resampled(weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=weights, size=96)
    assert backbone.info.size == 96
    assert backbone.prefix(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))[0].shape[1] == 36 + backbone.special_tokens


@pytest.mark.parametrize(
    "variant",
    [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}],
    ids=str,
)
def test_summary_equals_the_formula(make_backbone: Callable[..., Backbone], variant: dict[str, object]) -> None:
    backbone = make_backbone(**variant)
    tokens = torch.randn(2, 16 + backbone.special_tokens, 48, generator=torch.Generator().manual_seed(0))
    summary = backbone.summary(tokens).double().numpy()
    assert len(backbone.info.summary_blocks) * summary.shape[1] == backbone.summary_dim

    def normed(x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6)

    for image, row in zip(tokens.double().numpy(), summary, strict=True):
        patches = image[-16:]
        parts = [patches.mean(axis=0), patches.std(axis=0)]
        if backbone.model.has_class_token:
            parts.insert(0, image[0])
        np.testing.assert_allclose(row, np.concatenate([normed(part) for part in parts]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "count", "expected"),
    [
        (6, 3, (1, 3, 5)),
        (6, 1, (5,)),
        (5, 2, (1, 4)),
        (2, 3, (0, 1)),
        (1, 3, (0,)),
        (4, 4, (0, 1, 2, 3)),
        (3, 1000, (0, 1, 2)),
    ],
)
def test_summaries_are_spaced_evenly_up_to_the_last_block(prefix: int, count: int, expected: tuple[int, ...]) -> None:
    assert spaced_blocks(prefix, count) == expected


def test_phi_joins_the_summaries_of_its_blocks(weights: Path) -> None:
    backbone = load_backbone(SMALL, weights=weights, prefix_blocks=4, summaries=2)
    assert backbone.info.summary_blocks == (1, 3)
    frames = torch.randint(0, 256, (2, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ends = [load_backbone(SMALL, weights=weights, prefix_blocks=n, summaries=1).prefix(frames) for n in (2, 4)]
    tokens, phi = backbone.prefix(frames)
    torch.testing.assert_close(tokens, ends[1][0])
    torch.testing.assert_close(phi, torch.cat([backbone.summary(end) for end, _ in ends], dim=1))
    assert phi.shape == (2, backbone.summary_dim)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "it is a ResNet, not a plain vision transformer"),
        ("swin_tiny_patch4_window7_224", "it is a SwinTransformer"),
        ("vit_base_patch32_siglip_256", "it pools by attention"),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("vit_dwee_patch16_reg1_gap_256", "its attention heads do not span the width"),
        ("test_vit3", "not supported"),
    ],
)
def test_unsupported_architectures(name: str, reason: str) -> None:
    message = refusal(name)
    assert reason in message and f"{name} is not supported" in message and "Use a timm ViT" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_tinny_patch16_224", "similar names: "),
        ("xyz", "no model named 'xyz'"),
        ("", "no model named"),
        ("test_vit.of_nobody", "timm cannot build 'test_vit.of_nobody'"),
    ],
)
def test_unknown_names(name: str, reason: str) -> None:
    assert reason in refusal(name)


@pytest.mark.parametrize("name", [embedded.NAME, SMALL])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 60}, "must be a multiple of the patch size"),
        ({"prefix_blocks": 0}, "prefix_blocks must be 1.."),
        ({"prefix_blocks": 99}, "prefix_blocks must be 1.."),
    ],
)
def test_impossible_sizes(weights: Path, name: str, options: dict[str, int], reason: str) -> None:
    assert reason in refusal(name, weights=weights if name == SMALL else None, **options)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    noise, pickled = tmp_path / "noise.safetensors", tmp_path / "model.pth"
    noise.write_bytes(np.random.default_rng(0).bytes(4096))
    torch.save({"weight": torch.zeros(2)}, pickled)
    for path in (noise, pickled):
        assert "is not a readable safetensors file" in refusal(SMALL, weights=path)
    assert "does not exist" in refusal(SMALL, weights=tmp_path / "nowhere.safetensors")


def state_with(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = {**timm.create_model(SMALL, num_classes=0).state_dict(), **changes}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda: timm.create_model("resnet18").state_dict(), "missing"),
        (lambda: timm.create_model("test_vit2").state_dict(), "unknown"),
        (lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=96).state_dict(), "of another shape"),
        (lambda: state_with(cls_token=None), "1 missing (e.g. cls_token)"),
        (lambda: state_with(pos_embed=torch.zeros(1, 8, 64)), "do not fit"),
        (lambda: state_with(pos_embed=torch.zeros(5)), "do not fit"),
        (lambda: state_with(model=torch.zeros(5)), "do not fit"),
        (lambda: state_with(cls_token=torch.full((1, 1, 64), torch.nan)), "NaN or infinite"),
    ],
    ids=["resnet", "other test model", "other width", "missing", "odd positions", "flat", "nested", "nan"],
)
def test_weights_of_something_else(tmp_path: Path, state: Callable[[], dict[str, torch.Tensor]], reason: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file(state(), path)
    assert reason in refusal(SMALL, weights=path)


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("no route to host")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    message = refusal(SMALL)
    assert "could not be fetched" in message and "--weights" in message and "embedded" in message


@pytest.mark.assets
def test_real_weights_answer_as_timm_does(assets: Path) -> None:
    name, path = "vit_tiny_patch16_224", assets / "weights" / "vit_tiny_patch16_224.safetensors"
    backbone = load_backbone(name, weights=path)
    model = timm.create_model(name, checkpoint_path=str(path)).eval()
    frames = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features((frames.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5), True)
        tokens, _ = backbone.prefix(frames)
        for block in backbone.suffix:
            tokens = block(tokens)
        torch.testing.assert_close(backbone.feature(tokens), expected, rtol=1e-3, atol=1e-3)


def test_the_embedded_backbone_takes_no_other_weights(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="has its own weights"):
        load_backbone(embedded.NAME, weights=tmp_path / "any.safetensors")


@pytest.mark.parametrize("variant", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_the_second_order_summary_is_the_root_of_the_covariance(
    make_backbone: Callable[..., Backbone], variant: dict[str, object]
) -> None:
    """Against an eigendecomposition of each image, on covariances whose iteration has converged."""
    backbone = make_backbone(**variant)
    backbone.directions = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)) / 48**0.5
    tokens = torch.randn(2, backbone.special_tokens + 16, 48, generator=torch.Generator().manual_seed(1))
    found = backbone.second_order(tokens)
    for image, triangle in zip(tokens[:, backbone.special_tokens :].double().numpy(), found.numpy(), strict=True):
        z = (image - image.mean(axis=0)) @ backbone.directions.double().numpy().T
        values, vectors = np.linalg.eigh(z.T @ z / 16 + 1e-3 * np.eye(3))
        root = (vectors * np.sqrt(values)) @ vectors.T
        np.testing.assert_allclose(triangle, root[np.triu_indices(3)], atol=0.02)
    assert backbone.summary_dim == len(backbone.info.summary_blocks) * 48 * (2 if "class_token" in variant else 3) + 6
