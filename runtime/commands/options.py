"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from duallora_edge.cli_groups import option_group
from duallora_edge.runtime.backends.ladder import BACKENDS
from duallora_edge.runtime.sources.opening import MAX_SIDE

Command = TypeVar("Command", bound=Callable[..., Any])


backend_group = option_group("Backend")


def backend_options(command: Command) -> Command:
    """The options of every command that runs a model."""
    for option in (
        backend_group("--strict", is_flag=True, help="Fail instead of falling back to a slower backend."),
        backend_group("--threads", type=click.IntRange(min=1), help="CPU threads for one inference."),
        backend_group("--backend", type=click.Choice(BACKENDS), default="auto", help="Default: the best that works."),
    ):
        command = option(command)
    return command


trial_option = backend_group(
    "--trial/--no-trial",
    default=True,
    show_default=True,
    help="Try a bundle that was never loaded on this machine in a child process first.",
)


def frame_size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """A size such as 1280x720, as (width, height)."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise click.BadParameter(f"'{value}' is not a size such as 1280x720 with sides up to {MAX_SIDE}.")
    return width, height


def address(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """An address such as 127.0.0.1:8080 or [::1]:8080."""
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"'{value}' is not an address such as 127.0.0.1:8080.")
    return host.removeprefix("[").removesuffix("]"), int(port)
