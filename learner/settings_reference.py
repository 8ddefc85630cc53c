"""Writes docs/settings.md and examples/train.yaml from the settings that `TrainConfig` declares.

python -m duallora_edge.learner.settings_reference    # in the root of the repository
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import yaml

from duallora_edge.learner.config import SETTINGS
from duallora_edge.learner.methods import BUILT_IN, VARIABLE
from duallora_edge.learner.options import flag_of
from duallora_edge.learner.settings import GROUPS, Setting, sorted_by_group

COMMAND = "python -m duallora_edge.learner.settings_reference"
WIDTH, MIN_COLUMN = 118, 24


def markdown() -> str:
    """The text of docs/settings.md: a table for each group."""
    lines = [
        "# Settings of a training run",
        "",
        f"Written by `{COMMAND}` from `learner/config.py`; change it there.",
        "",
        "A setting is an option of `duallora-edge train`, a key of the YAML file of `--config`, and a field of",
        "`TrainConfig` in Python. Options win over the file, the file wins over the defaults. A run keeps its",
        "settings in `run.yaml`; later calls may change only those marked with *. A file to start from is",
        "[examples/train.yaml](../examples/train.yaml).",
    ]
    for group, settings in sorted_by_group(SETTINGS).items():
        lines += ["", f"## {group}", "", GROUPS[group], ""]
        lines += ["| key | option | default | values | meaning |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(one) for one in settings]
    lines += ["", "## Methods", "", "| name | |", "| --- | --- |"]
    lines += [f"| `{name}` | {summary} |" for name, (_, summary) in BUILT_IN.items()]
    lines += ["", f"The environment variable `{VARIABLE}` names files that register methods of your own."]
    return "\n".join(lines) + "\n"


def sample() -> str:
    """The text of examples/train.yaml: every setting at its default, with its meaning beside it."""
    lines = [
        "# Settings for: duallora-edge train --config examples/train.yaml --run runs/site-a",
        "# All values but data are the defaults; delete what you do not change. Ranges are in docs/settings.md.",
        f"# Written by: {COMMAND}",
    ]
    for group, settings in sorted_by_group(SETTINGS).items():
        lines += ["", *textwrap.wrap(f"{group}. {GROUPS[group]}", WIDTH, initial_indent="# ", subsequent_indent="# ")]
        values = [f"{one.key}: {_yaml_value(one)}" for one in settings]
        column = max(MIN_COLUMN, *(len(value) + 2 for value in values))
        for value, one in zip(values, settings, strict=True):
            first, *others = textwrap.wrap(_comment(one), WIDTH - column - 2)
            lines.append(f"{value:<{column}}# {first}")
            lines += [f"{'':<{column}}# {other}" for other in others]
    return "\n".join(lines) + "\n"


def write(root: Path) -> list[Path]:
    """Write both files below the root of the repository."""
    texts = {root / "docs" / "settings.md": markdown(), root / "examples" / "train.yaml": sample()}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _row(setting: Setting) -> str:
    key = f"`{setting.key}`" + ("" if setting.scope == "run" else " *")
    option = f"`{flag_of(setting)}`" if setting.flag else "in YAML"
    default = setting.unset or f"`{_yaml_value(setting)}`"
    values = ", ".join(f"`{choice}`" for choice in setting.choices if setting.key != "method")
    cells = [key, option, default, values or ("" if setting.key == "method" else setting.range_text), setting.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _comment(setting: Setting) -> str:
    if setting.key == "method":
        return f"{setting.help} One of {', '.join(BUILT_IN)}, or a method of your own."
    return setting.help + (f" null: {setting.unset}." if setting.unset and setting.key != "data" else "")


def _yaml_value(setting: Setting) -> str:
    if setting.key == "data":
        return "photos/"
    return yaml.safe_dump(setting.default, default_flow_style=True).splitlines()[0]


if __name__ == "__main__":
    for path in write(Path()):
        print(path)
