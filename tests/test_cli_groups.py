"""Groups of options in the help of a command."""

from __future__ import annotations

import click
from click.testing import CliRunner

from duallora_edge.cli_groups import GroupedCommand, GroupedOption, option_group


@click.command(cls=GroupedCommand)
@click.argument("folder")
@click.option("--data", cls=GroupedOption, group="Data", help="A folder.")
@click.option("--json", is_flag=True, help="Print JSON.")
@option_group("Method")("--rank", help="Of LoRA.")
@click.option("--classes", cls=GroupedOption, group="Data", help="A file.")
@click.option("--secret", cls=GroupedOption, group="Hidden", hidden=True)
def command(**options: object) -> None:
    """Do something."""


def test_each_group_is_a_section_and_the_other_options_come_last() -> None:
    lines = [line.split()[0] for line in CliRunner().invoke(command, ["--help"]).output.splitlines() if line][2:]
    assert lines == ["Data:", "--data", "--classes", "Method:", "--rank", "Options:", "--json", "--help"]
