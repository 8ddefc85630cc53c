"""From what a user types to a profile, a JetPack, and the ONNX that has to be written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from duallora_edge.device_profiles import Detected, detect, list_profiles, load_profile, resolve_target
from duallora_edge.device_profiles.profile import FOLDER
from duallora_edge.errors import ProfileError


@pytest.fixture
def elsewhere(tmp_path: Path) -> Detected:
    """A machine that says nothing about itself."""
    return detect(tmp_path)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, elsewhere: Detected) -> None:
    be(monkeypatch, elsewhere)


def be(monkeypatch: pytest.MonkeyPatch, machine: Detected) -> None:
    monkeypatch.setattr("duallora_edge.device_profiles.targets.detect", lambda: machine)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("orin-nano-8gb", "orin-nano-8gb"),
        ("Orin-Nano-8GB", "orin-nano-8gb"),
        (" orin-nano ", "orin-nano-8gb"),
        ("p3767-0000", "orin-nx-16gb"),
        ("P3834-0008", "thor-t5000"),
        ("sm_86", "rtx-sm86"),
        ("cpu", "x86-cpu"),
        ("aarch64", "arm64-cpu"),
        ("jetson", "orin-nano-8gb"),
        ("JETSON", "orin-nano-8gb"),
        (str(FOLDER / "nano-4gb.yaml"), "nano-4gb"),
    ],
)
def test_names_and_aliases(text: str, name: str) -> None:
    assert load_profile(text).name == name


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_each_alias_leads_home(profile) -> None:  # type: ignore[no-untyped-def]
    assert all(load_profile(alias) is profile for alias in (profile.name, *profile.aliases))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("orin-nanoo", "No device profile is called 'orin-nanoo'. Did you mean 'orin-nano'?"),
        ("jetsn", "Did you mean 'jetson'"),
        ("toaster", "'duallora-edge devices' lists"),
        ("jetpack", "No device profile"),
        ("../orin-nano-8gb", "No device profile"),
        ("", "No device profile"),
        ("none.yaml", "none.yaml cannot be read"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message.replace("?", r"\?")):
        load_profile(text)


@pytest.mark.parametrize(
    ("target", "jetpack", "expected"),
    [
        ("jetson", None, ("orin-nano-8gb", "6.2", "10.3", 17, 8)),
        ("orin-nano-8gb", "6", ("orin-nano-8gb", "6.2", "10.3", 17, 8)),
        ("orin-nano-8gb", "6.0", ("orin-nano-8gb", "6.0", "8.6.2", 17, 8)),
        ("orin-nano-8gb", "6.2.1", ("orin-nano-8gb", "6.2", "10.3", 17, 8)),
        ("orin-nano-8gb", "5", ("orin-nano-8gb", "5.1", "8.5.2", 16, 8)),
        ("orin-nano-8gb", "5.1.3", ("orin-nano-8gb", "5.1", "8.5.2", 16, 8)),
        ("orin-nano-8gb", "7", ("orin-nano-8gb", "7.2", "10.16", 17, 8)),
        ("xavier-nx", None, ("xavier-nx", "5.1", "8.5.2", 16, 8)),
        ("thor", None, ("thor-t5000", "7.2", "10.16", 17, 8)),
        ("x86-cpu", None, ("x86-cpu", None, None, 17, 8)),
        ("rtx-sm89", None, ("rtx-sm89", None, None, 17, 8)),
    ],
)
def test_targets(target: str, jetpack: str | None, expected: tuple[object, ...]) -> None:
    found = resolve_target(target, jetpack)
    assert (found.profile.name, found.jetpack, found.tensorrt, found.opset, found.ir_version) == expected
    assert found.reason
    assert found.to_json()["profile"] == expected[0]


@pytest.mark.parametrize(
    ("target", "jetpack", "message"),
    [
        ("nano-4gb", None, "cannot be exported for: JetPack 4 .* choose another device"),
        ("tx2-nx", "4.6.1", "cannot be exported for: JetPack 4"),
        ("xavier-nx", "4", "cannot be exported for: .* update the device to JetPack 5.1"),
        ("orin-nano-8gb", "4.6", "cannot be exported for"),
        ("orin-nano-8gb", "7.0", "does not run JetPack 7.0; it runs 5.1, 6.0, 6.1, 6.2, 7.2"),
        ("thor-t4000", "7.0", "does not run JetPack 7.0; it runs 7.1, 7.2"),
        ("xavier-nx", "6.2", "does not run JetPack 6.2; it runs 4.6, 5.1"),
        ("nano-4gb", "6", "does not run JetPack 6; it runs 4.6"),
        ("orin-nano-8gb", "9", "JetPack '9' is unknown; known are 4.6, 5.1"),
        ("orin-nano-8gb", "6.2.x", "JetPack '6.2.x' is unknown"),
        ("orin-nano-8gb", "6.20", "JetPack '6.20' is unknown"),
        ("orin-nano-8gb", "", "JetPack '' is unknown"),
        ("x86-cpu", "6.2", "x86-cpu has no JetPack"),
        ("toaster", None, "No device profile"),
    ],
)
def test_refused_targets(target: str, jetpack: str | None, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        resolve_target(target, jetpack)


def test_jetson_on_another_machine_says_so() -> None:
    reason = resolve_target("jetson").reason
    assert reason.startswith("jetson means orin-nano-8gb, the default, because this machine is not a Jetson")
    assert "JetPack 6.2 is its default" in reason


def test_jetson_on_a_jetson(monkeypatch: pytest.MonkeyPatch, elsewhere: Detected) -> None:
    be(monkeypatch, replace(elsewhere, is_jetson=True, profile="orin-nx-16gb", jetpack="5.1"))
    found = resolve_target("jetson")
    assert (found.profile.name, found.jetpack, found.opset) == ("orin-nx-16gb", "5.1", 16)
    assert "the module this runs on" in found.reason and "JetPack 5.1 is installed here" in found.reason
    assert resolve_target("jetson", "6.2").opset == 17
    assert resolve_target("orin-nano-8gb").jetpack == "6.2"  # a named device is not this one


def test_jetson_on_an_unknown_jetson(monkeypatch: pytest.MonkeyPatch, elsewhere: Detected) -> None:
    be(monkeypatch, replace(elsewhere, is_jetson=True))
    assert "no profile fits the Jetson this runs on" in resolve_target("jetson").reason


def test_jetson_on_a_jetson_that_is_too_old(monkeypatch: pytest.MonkeyPatch, elsewhere: Detected) -> None:
    be(monkeypatch, replace(elsewhere, is_jetson=True, profile="nano-4gb", jetpack="4.6"))
    with pytest.raises(ProfileError, match="nano-4gb with JetPack"):
        resolve_target("jetson")


def test_an_own_file_is_a_target(tmp_path: Path) -> None:
    text = (FOLDER / "orin-nano-8gb.yaml").read_text().replace("name: orin-nano-8gb", "name: my-box")
    path = tmp_path / "My-Box.YAML"
    path.write_text(text)
    assert resolve_target(str(path), "5.1").to_json()["profile"] == "my-box"
