"""``duallora-edge devices``, and what importing the package costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from duallora_edge.device_profiles import list_profiles
from duallora_edge.device_profiles.commands import devices
from duallora_edge.errors import ProfileError


def output(*arguments: str) -> str:
    result = CliRunner().invoke(devices, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_the_table_has_every_device_and_this_machine() -> None:
    text = output()
    assert all(f"\n{profile.name} " in text for profile in list_profiles())
    assert "estimate, not measured" in text and "This machine: " in text
    assert "10.2 (16.7)" in text
    assert max(map(len, text.splitlines()[:20])) < 130


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_a_page(profile) -> None:  # type: ignore[no-untyped-def]
    text = output(profile.name)
    assert profile.title in text and "estimate, not measured" in " ".join(text.split())
    assert text.count("[unverified]") == len(profile.unverified)
    assert text.count("[derived]") == len(profile.derived)
    assert all(" ".join(source.split()) in " ".join(text.split()) for source in profile.sources)
    assert ("DLA          refused." in text) == (profile.dla_cores > 0)
    assert f"backends     {', '.join(profile.backends)}" in text
    assert max(map(len, text.splitlines())) <= 110


def test_json() -> None:
    everything = json.loads(output("--json"))
    assert len(everything["devices"]) == len(list_profiles()) and "profile" in everything["this_machine"]
    one = json.loads(output("orin-nano-8gb", "--json"))
    assert one["name"] == "orin-nano-8gb"
    assert [estimate["mode"] for estimate in one["estimates"]] == ["normal", "super"]


def test_help_has_an_example() -> None:
    assert "duallora-edge devices orin-nano-8gb" in output("--help")


def test_an_own_file_with_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nkind: cpu\n")
    with pytest.raises(ProfileError, match="title: is missing"):
        CliRunner().invoke(devices, [str(path)], catch_exceptions=False)


def test_the_import_is_light() -> None:
    code = (
        "import sys, duallora_edge.device_profiles.commands as _\n"
        "from duallora_edge.device_profiles import catalog\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "print(sorted(heavy), catalog.packaged.cache_info().currsize)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[] 0"
