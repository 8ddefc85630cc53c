"""The ``duallora-edge`` command: a click group that imports a subcommand only when it is used."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import click

from duallora_edge import __version__, interrupts
from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.extras import install_hint
from duallora_edge.text import escaped

# name -> ("module:attribute", extra that brings what the module imports ("": none), one-line help)
COMMANDS = {
    "demo": ("duallora_edge.demo:demo", "demo", "Learn, export, verify and measure on embedded data."),
    "train": (
        "duallora_edge.learner.commands:train",
        "train",
        "Learn the next task(s) of a run; continues where it stopped.",
    ),
    "adapt": (
        "duallora_edge.learner.commands:adapt",
        "train",
        "Fit a backbone to another input size, without labels.",
    ),
    "compare": ("duallora_edge.compare:compare", "train", "Compare methods and seeds on one task sequence."),
    "evaluate": (
        "duallora_edge.learner.commands:evaluate",
        "train",
        "Accuracy matrix, forgetting and calibration of a run.",
    ),
    "status": ("duallora_edge.learner.commands:status", "train", "Show tasks, classes, sizes and accuracy of a run."),
    "rollback": ("duallora_edge.learner.commands:rollback", "train", "Undo the last task of a run."),
    "remove": ("duallora_edge.learner.commands:remove", "train", "Take one task out of a run."),
    "export": ("duallora_edge.export.commands:export", "train", "Write a verified bundle for a device."),
    "build": (
        "duallora_edge.runtime.commands.build:build",
        "",
        "Build and check a TensorRT engine for this device.",
    ),
    "apply": ("duallora_edge.runtime.field.commands:apply", "", "Make a new bundle of an older one and a delta."),
    "teach": ("duallora_edge.runtime.field.commands:teach", "", "Teach a class on the device, from a few frames."),
    "unteach": ("duallora_edge.runtime.field.commands:unteach", "", "Forget a class that was taught."),
    "kept": ("duallora_edge.runtime.field.commands:kept", "", "Fetch the frames that 'run --keep' kept."),
    "label": ("duallora_edge.runtime.field.commands:label", "label", "Name the kept frames, on a page in the browser."),
    "update": (
        "duallora_edge.runtime.field.commands:update",
        "update",
        "Bring the newest bundle into a store.",
    ),
    "learn": ("duallora_edge.learn:learn", "train", "Learn a task on the device, into its store."),
    "slots": ("duallora_edge.runtime.field.commands:slots", "", "Show what a device's store holds."),
    "revert": ("duallora_edge.runtime.field.commands:revert", "", "Go back to the other bundle of a store."),
    "channel": ("duallora_edge.runtime.field.channel_commands:channel", "publish", "Publish bundles for devices."),
    "predict": ("duallora_edge.runtime.commands.predict:predict", "", "Classify images with a bundle."),
    "run": ("duallora_edge.runtime.commands.run:run", "", "Classify a camera, stream or file; prints JSON lines."),
    "benchmark": (
        "duallora_edge.runtime.commands.benchmark:benchmark",
        "",
        "Measure latency and memory of a bundle on this machine.",
    ),
    "devices": ("duallora_edge.device_profiles.commands:devices", "", "List the known devices and this machine."),
    "doctor": (
        "duallora_edge.runtime.commands.doctor:doctor",
        "",
        "Find out what this machine can run, and what is wrong.",
    ),
}


DEBUG_HELP = "Show the traceback of an error."


class LazyGroup(click.Group):
    """A click group whose subcommands live in modules that may need packages that are not installed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise _not_installed(cmd_name, error) from error
        return _with_debug(command)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. What it imports on the way may be missing as well."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if ctx.invoked_subcommand not in COMMANDS or str(error.name).startswith("duallora_edge"):
                raise
            raise _not_installed(ctx.invoked_subcommand, error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else " 'duallora-edge --help' lists the commands."
            ctx.fail(f"No command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)


def _not_installed(command: str, error: ModuleNotFoundError) -> click.ClickException:
    """The error that says what to install."""
    return click.ClickException(
        f"'{command}' needs the package {error.name}, which is not installed: {install_hint(COMMANDS[command][1])}."
    )


def _with_debug(command: click.Command) -> click.Command:
    """The command with ``--debug`` among its options, so that it works after the command's name too."""
    if not any(parameter.name == "debug" for parameter in command.params):
        command.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help=DEBUG_HELP))
    return command


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="duallora-edge")
@click.option("--debug", is_flag=True, help=DEBUG_HELP)
def cli(debug: bool) -> None:
    """Teach a vision transformer new tasks without forgetting, and run it on edge devices.

    \b
    Example:
      duallora-edge train  --data photos/ --run runs/site-a
      duallora-edge export runs/site-a --target jetson -o bundle
      duallora-edge predict bundle photo.jpg
    """


def main(args: list[str] | None = None) -> None:
    """Entry point: exit code 0 ok, 1 failed, 2 wrong usage; errors are one sentence without a traceback."""
    arguments = sys.argv[1:] if args is None else args
    try:
        with interrupts.noted():
            result: Any = cli.main(arguments, standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("Interrupted; everything committed so far is kept.", err=True)
        code = 1
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(escaped(shown.getvalue()), err=True, nl=False)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (DualLoraEdgeError, OSError) as error:
        if "--debug" in arguments[: arguments.index("--") if "--" in arguments else None]:
            raise
        click.echo(f"Error: {escaped(_sentence(error))}", err=True)
        code = 1
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, DualLoraEdgeError):
        where = f" ({error.filename})" if error.filename else ""
        remedy = " Free some space and run the same command again." if error.errno == 28 else ""
        return f"{error.strerror or error}{where}.{remedy}"
    return str(error)
