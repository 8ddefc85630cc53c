"""The settings page and the sample file are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from duallora_edge.learner.commands import train
from duallora_edge.learner.config import SETTINGS, TrainConfig, load_config, read_yaml
from duallora_edge.learner.options import FLAGS, flag_of
from duallora_edge.learner.settings_reference import COMMAND, sample, write

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["docs/settings.md", "examples/train.yaml"])
def test_the_committed_files_are_those_that_are_generated(tmp_path: Path, name: str) -> None:
    for folder in ("docs", "examples"):
        (tmp_path / folder).mkdir()
    assert tmp_path / name in write(tmp_path)
    assert (ROOT / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8"), f"run: {COMMAND}"


def test_the_sample_has_every_setting_at_its_default() -> None:
    path = ROOT / "examples" / "train.yaml"
    assert load_config(path, {}) == TrainConfig(data="photos/")
    assert set(read_yaml(path)) == set(SETTINGS)
    assert max(map(len, sample().splitlines())) <= 120


def test_every_flag_is_an_option_of_train_under_its_group() -> None:
    shown = CliRunner().invoke(train, ["--help"]).output
    options = {parameter.name: parameter for parameter in train.params}
    for key in FLAGS:
        assert flag_of(SETTINGS[key]).split("/")[0] in shown
        assert options[key].default is None and f"{SETTINGS[key].group}:" in shown
    assert not {key for key in SETTINGS if key not in FLAGS} & set(options)
