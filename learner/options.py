"""Options of the command line, made from the settings that `TrainConfig` declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from duallora_edge.cli_groups import GroupedCommand, option_group
from duallora_edge.learner.config import SETTINGS
from duallora_edge.learner.methods import METHODS, VARIABLE
from duallora_edge.learner.settings import Setting

# Every setting that has an option, in the order of the help.
FLAGS = tuple(key for key, one in SETTINGS.items() if one.flag)
METAVARS = {int: "N", float: "X"}


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names separated by commas."""
    return None if value is None else tuple(name.strip() for name in value.split(","))


def _method(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The name of a method, which may be registered by a file of the user's own."""
    if value is not None and (problem := SETTINGS["method"].problem(value)):
        raise click.BadParameter(problem)
    return value


class MethodsCommand(GroupedCommand):
    """A command whose help ends with the methods there are."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Methods"):
            formatter.write_dl(list(METHODS.summaries().items()))
        formatter.write_paragraph()
        formatter.write_text(f"The environment variable {VARIABLE} names files that register methods of your own.")


def flag_of(setting: Setting) -> str:
    """The option of a setting, as it is written."""
    name = setting.key.replace("_", "-")
    return f"--{name}/--no-{name}" if setting.kind is bool else f"--{name}"


def setting_options(*keys: str) -> Callable[[Any], Any]:
    """Add the options of some settings to a command. An option that is not given is None."""

    def add(command: Any) -> Any:
        for key in reversed(keys):
            command = _option(SETTINGS[key])(command)
        return command

    return add


def _option(setting: Setting) -> Callable[[Any], Any]:
    attributes: dict[str, Any] = {"type": setting.kind, "metavar": setting.metavar or METAVARS.get(setting.kind)}
    if setting.key == "method":
        attributes["callback"] = _method
    elif setting.choices:
        attributes = {"type": click.Choice(list(setting.choices))}
    elif setting.kind is tuple:
        attributes |= {"type": str, "callback": _names}
    elif setting.kind is bool:
        attributes = {}
    text = f"{setting.help} [default: {setting.default_text}]"
    add = option_group(setting.group)
    return add(flag_of(setting), setting.key, default=None, help=text, **attributes)
