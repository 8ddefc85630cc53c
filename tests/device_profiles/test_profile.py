"""Profile files: the packaged ones are complete and consistent, a user's own gets all its errors at once."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from duallora_edge.device_profiles import DeviceProfile, jetpacks, list_profiles
from duallora_edge.device_profiles.profile import FOLDER
from duallora_edge.errors import ProfileError
from duallora_edge.runtime.backends.ladder import LADDER

PROFILES = list_profiles()
ORIN: dict[str, Any] = yaml.safe_load((FOLDER / "orin-nano-8gb.yaml").read_text())
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast where it exists
GPUS = [profile for profile in PROFILES if profile.kind != "cpu"]

# advertised dense fp16 multiply-adds per clock and tensor core; None: two per CUDA core
PER_TENSOR_CORE = {"8.7": 256, "7.2": 64, "7.5": 32, "8.6": 64, "8.9": 64, "12.0": 64}


def names(profile: DeviceProfile) -> str:
    return profile.name


@pytest.fixture
def data() -> dict[str, Any]:
    return deepcopy(ORIN)


def write(folder: Path, value: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.dump(value, Dumper=DUMPER))
    return path


def test_every_module_is_there() -> None:
    jetsons = {profile.name for profile in PROFILES if profile.kind == "jetson"}
    assert jetsons == {
        "orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb",
        "xavier-nx", "agx-xavier", "nano-4gb", "tx2-nx", "thor-t5000", "thor-t4000",
    }  # fmt: skip
    others = {profile.name for profile in PROFILES} - jetsons
    assert others == {"rtx-sm75", "rtx-sm86", "rtx-sm89", "rtx-sm120", "x86-cpu", "arm64-cpu"}


@pytest.mark.parametrize("profile", PROFILES, ids=names)
def test_packaged_profile(profile: DeviceProfile) -> None:
    assert (FOLDER / f"{profile.name}.yaml").is_file()
    assert profile.sources and profile.precisions["fp32"] is None
    json.dumps(profile.to_json(), allow_nan=False)
    assert set(profile.backends) <= set(LADDER) and profile.backends[-1] == "cpu"
    assert profile.memory_bytes is None or profile.workspace_mb * 10**6 < profile.memory_bytes / 4
    if profile.kind == "jetson":
        assert profile.default_jetpack in profile.jetpacks and profile.memory_unified and profile.models
        assert (profile.opset, profile.ir_version) == (None, None)
    else:
        assert (profile.opset, profile.ir_version) == (17, 8)


@pytest.mark.parametrize("profile", GPUS, ids=names)
def test_peaks_follow_from_clock_and_cores(profile: DeviceProfile) -> None:
    for name, mode in profile.modes.items():
        assert f"modes.{name}.fp16_tflops" in profile.derived and f"modes.{name}.fp32_tflops" in profile.derived
        terahertz = mode.gpu_mhz * 1e-6
        assert mode.fp32_tflops == pytest.approx(2 * profile.cuda_cores * terahertz, rel=0.02)
        if profile.tensor_cores == 0:
            assert mode.fp16_tflops == pytest.approx(4 * profile.cuda_cores * terahertz, rel=0.01)
        elif profile.compute_capability in PER_TENSOR_CORE:
            each = PER_TENSOR_CORE[profile.compute_capability]
            assert mode.fp16_tflops == pytest.approx(2 * each * profile.tensor_cores * terahertz, rel=0.01)


def test_names_aliases_and_parts_are_unique() -> None:
    called = [name for profile in PROFILES for name in (profile.name, *profile.aliases)]
    parts = [part for profile in PROFILES for part in profile.parts]
    assert len(called) == len(set(called)) and len(parts) == len(set(parts))


def test_jetpack_table() -> None:
    table = jetpacks()
    assert list(table) == ["4.6", "5.1", "6.0", "6.1", "6.2", "7.0", "7.1", "7.2"]
    exported = {name: (line.opset, line.ir_version) for name, line in table.items()}
    assert exported.pop("4.6") == (None, None) and table["4.6"].refused
    assert exported.pop("5.1") == (16, 8)
    assert set(exported.values()) == {(17, 8)}
    assert [line.tensorrt for line in table.values()][1:5] == ["8.5.2", "8.6.2", "10.3", "10.3"]


def test_own_file_equals_the_packaged_one(tmp_path: Path, data: dict[str, Any]) -> None:
    assert DeviceProfile.from_file(write(tmp_path, data)) == DeviceProfile.from_file(FOLDER / "orin-nano-8gb.yaml")


CHANGES: list[tuple[str, object, str]] = [
    ("memory.gb", "eight", "memory.gb: must be a number from 0.25 to 16384, not 'eight'"),
    ("memory.gb", True, "memory.gb: must be a number"),
    ("memory.gb", float("nan"), "memory.gb: must be a number"),
    ("memory.unified", 1, "memory.unified: must be true or false, not 1"),
    ("memory.bandwith", 3, "memory: unknown key 'bandwith'."),
    ("memory", 8, "memory: must be a mapping of keys to values, not 8"),
    ("kind", "jetsn", "kind: 'jetsn' is unknown. Did you mean 'jetson'?"),
    ("name", "Mine!", "name: may have lower-case letters"),
    ("titel", "x", "file: unknown key 'titel'. Did you mean 'title'?"),
    ("gpu.compute_capability", 8.7, "gpu.compute_capability: must be text in quotes, not 8.7"),
    ("gpu.compute_capability", "sm87", 'gpu.compute_capability: must look like "8.7"'),
    ("gpu.cuda_cores", 1.5, "gpu.cuda_cores: must be a whole number"),
    ("modes.turbo", {}, "modes: unknown key 'turbo'."),
    ("modes.normal.watts", [], "modes.normal.watts: must be a list of numbers"),
    ("modes.super.from_jetpack", "6.9", "modes.super.from_jetpack: '6.9' is unknown. Did you mean"),
    ("precisions.fp16", "", "precisions.fp16: must be 'allowed', or the reason"),
    ("precisions.fp32", "no", "precisions.fp32: must be 'allowed'; every device runs it"),
    ("precisions.int4", "no", "precisions: unknown key 'int4'."),
    ("jetpack.supported", ["6.2", "9"], "jetpack.supported: '9' is unknown; known are 4.6"),
    ("jetpack.default", "7.0", "jetpack.default: '7.0' is unknown."),
    ("derived", ["modes.normal.speed"], "derived: 'modes.normal.speed' names no value of this file"),
    ("sources", "me", "sources: must be a list of texts, not 'me'"),
    ("aliases", [1], "aliases: must be a list of texts"),
]


def change(data: dict[str, Any], dotted: str, value: object) -> None:
    *path, last = dotted.split(".")
    for part in path:
        data = data[part]
    data[last] = value


@pytest.mark.parametrize(("dotted", "value", "message"), CHANGES, ids=[f"{c[0]}={c[1]}" for c in CHANGES])
def test_a_wrong_value_is_named(tmp_path: Path, data: dict[str, Any], dotted: str, value: object, message: str) -> None:
    change(data, dotted, value)
    with pytest.raises(ProfileError) as caught:
        DeviceProfile.from_file(write(tmp_path, data))
    assert f"\n  {message}" in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path: Path, data: dict[str, Any]) -> None:
    for dotted, value in [("memory.gb", -1), ("titel", "x"), ("modes.normal.gpu_mhz", "fast"), ("sources", [])]:
        change(data, dotted, value)
    del data["precisions"]
    with pytest.raises(ProfileError) as caught:
        DeviceProfile.from_file(write(tmp_path, data))
    for part in ("memory.gb: must", "'titel'", "modes.normal.gpu_mhz: must", "precisions: is missing"):
        assert part in str(caught.value)


def test_a_cpu_profile_may_state_its_memory(tmp_path: Path) -> None:
    value = yaml.safe_load((FOLDER / "x86-cpu.yaml").read_text()) | {"memory": {"gb": 16, "unified": True}}
    assert DeviceProfile.from_file(write(tmp_path, value)).memory_bytes == 16 * 2**30


BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{k}: &{k} [{','.join([f'*{j}'] * 8)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping"),
        (b"- 1\n", "must be a mapping"),
        (b"name: [", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML|must be a mapping"),
        (b"a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        (b"name: x\n" * 20_000, "larger than 16 KiB"),
        (b"[" * 15_000 + b"]" * 1_000, "not valid YAML"),
        (b"x: " + b"[" * 900 + b"]" * 900, "not valid YAML|is missing"),
        (BOMB.encode(), "uses a YAML alias"),
    ],
)
def test_hostile_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=message) as caught:
        DeviceProfile.from_file(path)
    assert len(str(caught.value)) < 5000


def test_every_problem_of_the_engine_section_is_listed(tmp_path: Path, data: dict[str, Any]) -> None:
    data["engine"] = {"workspace_mb": 1, "backends": ["tensorrt", "tensort", "cuda"]}
    with pytest.raises(ProfileError) as error:
        DeviceProfile.from_file(write(tmp_path, data))
    assert "engine.workspace_mb: must be a whole number from 16 to 65536" in str(error.value)
    assert "engine.backends: 'tensort' is unknown. Did you mean 'tensorrt'?" in str(error.value)
    data["engine"] = {"workspace_mb": 64, "backends": []}
    with pytest.raises(ProfileError, match=r"engine\.backends: must name at least one"):
        DeviceProfile.from_file(write(tmp_path, data))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ProfileError, match="cannot be read"):
            DeviceProfile.from_file(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["name", "kind", "gpu", "memory", "modes", "precisions", "jetpack", "detect", "export", "derived", "sources"]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2))
def test_any_damage_ends_in_a_profile_error(tmp_path_factory: pytest.TempPathFactory, damage: dict[str, Any]) -> None:
    path = write(tmp_path_factory.getbasetemp(), ORIN | damage)
    try:
        DeviceProfile.from_file(path)
    except ProfileError as error:
        assert "correct" in str(error)
