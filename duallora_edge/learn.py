"""``duallora-edge learn``: a device that has PyTorch learns a task itself, and tries the result in its other slot."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from duallora_edge.cli_groups import GroupedCommand, option_group
from duallora_edge.errors import ExportError, StoreError
from duallora_edge.learner.commands import echo
from duallora_edge.learner.learner import Learner
from duallora_edge.learner.options import setting_options
from duallora_edge.learner.terminal import TerminalCallback
from duallora_edge.runtime.bundle import Bundle, Manifest
from duallora_edge.runtime.field.store import Store

essential = option_group("Essentials")


@click.command(cls=GroupedCommand)
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@essential("--data", required=True, metavar="DIR", help="Images of the new classes, as for 'train'.")
@essential("--target", metavar="NAME|FILE", help="As for 'export'. [default: that of the bundle that answers]")
@setting_options("memory_budget", "device", "weights", "precision")
def learn(store: Path, run: Path, data: str, target: str | None, **flags: Any) -> None:
    """Learn a task on this device and bring the result into the store STORE, where 'run STORE' tries it.

    RUN is the run of which the bundles were made, or a copy of it. Its new task is exported for the same device, with
    the next version. When it was stopped, the same command continues.

    \b
    Example:
      duallora-edge kept keep -o frames                  # and sort them into frames/<class>/
      duallora-edge learn store runs/site-a --data frames --memory-budget 2GB
    """
    from duallora_edge.export.export import export_run

    opened = Store(store)
    slots = opened.read()
    active: Manifest | None = Bundle.peek(opened.bundle_path(slots.active)).manifest if slots.active else None
    if active is None and target is None:
        raise ExportError(f"{store} has no bundle that answers, whose device could be taken; give --target.")
    version = max(slots.lowest, active.bundle_version if active else 0) + 1
    if reason := opened.why_not(slots, "", version):  # before anything is learned
        raise StoreError(reason)
    Learner(run, callbacks=[TerminalCallback()], data=data, **flags).learn()
    with tempfile.TemporaryDirectory(dir=store, prefix=".learned-") as folder:
        exported = export_run(
            run,
            Path(folder) / "bundle",
            target or str(active.target.get("profile") if active else ""),
            jetpack=active.target.get("jetpack") if active and target is None else None,
            precision=active.precision if active and target is None else "auto",
            batch=(active.batch or 0) if active and target is None else None,
            split=active.split if active and target is None else False,
            bundle_version=version,
            weights=flags.get("weights"),
            say=lambda text: echo(text, err=True),
        )
        slot = opened.put(exported.bundle)
    echo(f"Version {version} is in slot {slot} and waits for its trial.  Store: {store}  run: {run}")
