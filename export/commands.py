"""The command that turns a run into a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from duallora_edge.cli_groups import GroupedCommand, option_group
from duallora_edge.device_profiles.profile import PRECISIONS
from duallora_edge.runtime.bundle import MAX_BATCH, Manifest
from duallora_edge.text import escaped


def _batch(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The number of images; 0 for any number, None if it is not given."""
    if value is None or value == "dynamic":
        return None if value is None else 0
    if value.isdecimal() and 1 <= int(value) <= MAX_BATCH:
        return int(value)
    raise click.BadParameter(f"'{value}' is neither 'dynamic' nor a number from 1 to {MAX_BATCH}.")


essential, graph, output_group = option_group("Essentials"), option_group("Graph"), option_group("Output")


@click.command(cls=GroupedCommand)
@click.argument("run", type=click.Path(path_type=Path))
@essential(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of the bundle or adapter, or with --delta-from the file of the delta.",
)  # fmt: skip
@essential(
    "--format", "form", type=click.Choice(["bundle", "peft"]), default="bundle",
    help="'peft': only the adapters, as a LoRA that PEFT loads onto the timm model. [default: bundle]",
)  # fmt: skip
@essential(
    "--delta-from", type=click.Path(path_type=Path), metavar="DIR",
    help="Write only what changes an older bundle into the new one, for 'apply' on devices. Target and graphs are "
    "those of the older bundle.",
)  # fmt: skip
@essential(
    "--target", metavar="NAME|FILE",
    help="Device that will run the bundle: a name that 'devices' lists, or the YAML file of a profile. "
    "[default: jetson]",
)  # fmt: skip
@essential("--jetpack", metavar="VERSION", help="Version of JetPack on the device. [default: the profile's]")
@essential(
    "--task", metavar="NAME",
    help="With --format peft: the task whose images the adapter is for, where that makes a difference.",
)  # fmt: skip
@essential("--weights", metavar="FILE", help="File with the weights of the backbone, if it was moved.")
@graph(
    "--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto",
    help="Precision of matrix multiplications on a GPU; 'auto' takes the faster fp16 where the device has it. A graph "
    "in fp32 is always in the bundle as well. [default: auto]",
)  # fmt: skip
@graph(
    "--batch", callback=_batch, metavar="N|dynamic",
    help="Images in each run of the graph. [default: 1; dynamic for a CPU]",
)  # fmt: skip
@graph(
    "--split", is_flag=True,
    help="Add the graph for the GPU in two parts, so that a new task changes only the smaller second one.",
)  # fmt: skip
@output_group(
    "--bundle-version", type=click.IntRange(1), metavar="N",
    help="Version of the bundle. [default: one more than that of the bundle it replaces, or 1]",
)  # fmt: skip
@output_group("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def export(
    run: Path,
    form: str,
    task: str | None,
    delta_from: Path | None,
    target: str | None,
    jetpack: str | None,
    output: Path,
    precision: str,
    batch: int | None,
    split: bool,
    bundle_version: int | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Write a verified bundle for a device: ONNX graphs, golden outputs, manifest.

    Every graph is compared with the trained model on generated images and, if the images of the run can still be
    read, on real ones. The bundle is written only if they agree.

    \b
    Example:
      duallora-edge export runs/site-a --target jetson -o bundle
      duallora-edge export runs/site-a --target orin-nx-16gb --jetpack 6.2 -o bundle
      duallora-edge export runs/site-a --delta-from bundle -o 0001-0002.delta
      duallora-edge export runs/site-a --format peft --task products -o adapter
    """
    graphs = precision != "auto" or batch is not None or split
    if form == "peft":
        if delta_from or target or jetpack or graphs or bundle_version or as_json:
            raise click.UsageError(
                "--format peft writes no bundle: besides -o, only --task and --weights can be given with it."
            )
        _export_peft(run, output, task, weights)
        return
    if task is not None:
        raise click.UsageError("--task is for --format peft; a bundle has all tasks.")
    if delta_from is not None and graphs:
        raise click.UsageError("With --delta-from the graphs are those of the older bundle; leave out graph options.")
    from duallora_edge.export.export import export_delta, export_run  # PyTorch takes seconds to import

    def say(text: str) -> None:
        click.echo(escaped(text), err=True)

    if delta_from is not None:
        delta = export_delta(
            run, delta_from, output, target, jetpack=jetpack, bundle_version=bundle_version, weights=weights, say=say
        )
        if as_json:
            click.echo(json.dumps(delta.manifest.to_json(), indent=2))
            return
        _show_parity(delta.manifest)
        click.echo(
            escaped(
                f"Delta: {output}  to version {delta.manifest.bundle_version}, {delta.bytes / 1e6:.2f} MB, "
                f"{100 * delta.share:.1f} % of the bundle"
            )
        )
        return
    exported = export_run(
        run,
        output,
        target or "jetson",
        jetpack=jetpack,
        precision=precision,
        batch=batch,
        split=split,
        bundle_version=bundle_version,
        weights=weights,
        say=say,
    )
    for folder in exported.kept:
        click.echo(escaped(f"Files that were not part of the older bundle are kept in {folder}"), err=True)
    if as_json:
        click.echo(json.dumps(exported.manifest.to_json(), indent=2))
        return
    _show_parity(exported.manifest)
    for entry in exported.estimates:
        click.echo(entry.text)
    size = sum(record.bytes for record in exported.manifest.files.values()) / 1e6
    click.echo(escaped(f"Bundle: {output}  version {exported.manifest.bundle_version}, {size:.1f} MB"))


def _export_peft(run: Path, output: Path, task: str | None, weights: str | None) -> None:
    from duallora_edge.export.peft import export_peft  # PyTorch takes seconds to import

    adapter = export_peft(run, output, task=task, weights=weights)
    ranks = sorted({*adapter.ranks.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    size = adapter.bytes / 1e6
    click.echo(escaped(f"Adapter: {output}  LoRA of rank {rank} on {len(adapter.ranks)} blocks, {size:.1f} MB"))


def _show_parity(manifest: Manifest) -> None:
    for name, parity in manifest.parity.items():
        if isinstance(parity, dict):
            kind, _, graph = name.partition("_")
            which = f", {graph.replace('_', ', ')}" if graph else ""
            click.echo(
                f"Parity on {parity['images']} {kind} images{which}: top-1 agreement "
                f"{100 * parity['top1_agreement']:.2f} %, largest probability difference "
                f"{parity['max_probability_difference']:.1e}"
            )
