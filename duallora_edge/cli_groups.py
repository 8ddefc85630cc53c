"""Options of a command in named groups: ``--help`` prints each group as a section of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that belongs to a group: ``@click.option("--data", cls=GroupedOption, group="Data")``."""

    def __init__(self, *args: Any, group: str | None = None, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.group = group


class _OptionDecorator(Protocol):
    def __call__(self, *names: str, **attributes: Any) -> Callable[[_Function], _Function]: ...


def option_group(title: str) -> _OptionDecorator:
    """``click.option`` for the options of one group: ``data = option_group("Data")``, then ``@data("--data")``."""

    def option(*names: str, **attributes: Any) -> Callable[[_Function], _Function]:
        return click.option(*names, cls=GroupedOption, group=title, **attributes)

    return option


class GroupedCommand(click.Command):
    """A command whose help shows the groups in the order in which they first appear, and the other options last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        others: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None or not isinstance(parameter, click.Option):
                continue
            group = parameter.group if isinstance(parameter, GroupedOption) else None
            (sections.setdefault(group, []) if group else others).append(record)
        for title, records in [*sections.items(), ("Options", others)]:
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
