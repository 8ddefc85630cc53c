"""The command that turns a run into a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from duallora_edge.device_profiles.profile import PRECISIONS
from duallora_edge.export.export import export_run
from duallora_edge.runtime.bundle import MAX_BATCH
from duallora_edge.text import escaped


def _batch(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The number of images, 0 for any number, None when it is not given."""
    if value is None or value == "dynamic":
        return None if value is None else 0
    if value.isdecimal() and 1 <= int(value) <= MAX_BATCH:
        return int(value)
    raise click.BadParameter(f"'{value}' is neither 'dynamic' nor a number from 1 to {MAX_BATCH}.")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--target", default="jetson", show_default=True, help="A device (see 'devices'), or a profile's YAML file."
)
@click.option("--jetpack", help="JetPack version on the device. [the profile's default]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option(
    "--precision",
    type=click.Choice(["auto", *PRECISIONS]),
    default="auto",
    show_default=True,
    help="Of the products on a GPU; auto: fp16 where the device has it. fp32 is always in the bundle as well.",
)
@click.option(
    "--batch",
    callback=_batch,
    metavar="N|dynamic",
    help="Images in one run of the graph. [1; dynamic for a CPU]",
)
@click.option("--split", is_flag=True, help="Add the GPU's graph in two parts: a new task changes only the second.")
@click.option("--bundle-version", type=click.IntRange(1), help="[one more than the bundle it replaces]")
@click.option("--weights", help="The backbone's weights, when the file was moved.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def export(
    run: Path,
    target: str,
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

    Every graph is compared with the trained model on generated images and, where the images of the run can still be
    read, on real ones; a bundle is written only when they agree.

    \b
    Example:
      duallora-edge export runs/site-a --target jetson -o bundle
      duallora-edge export runs/site-a --target orin-nx-16gb --jetpack 6.2 -o bundle
    """
    exported = export_run(
        run,
        output,
        target,
        jetpack=jetpack,
        precision=precision,
        batch=batch,
        split=split,
        bundle_version=bundle_version,
        weights=weights,
        say=lambda text: click.echo(escaped(text), err=True),
    )
    for folder in exported.kept:
        click.echo(escaped(f"What was no part of the older bundle is kept in {folder}"), err=True)
    if as_json:
        click.echo(json.dumps(exported.manifest.to_json(), indent=2))
        return
    for name, parity in exported.manifest.parity.items():
        if isinstance(parity, dict):
            kind, _, graph = name.partition("_")
            which = f", {graph.replace('_', ', ')}" if graph else ""
            click.echo(
                f"Parity on {parity['images']} {kind} images{which}: top-1 agreement "
                f"{100 * parity['top1_agreement']:.2f} %, largest probability difference "
                f"{parity['max_probability_difference']:.1e}"
            )
    for entry in exported.estimates:
        click.echo(entry.text)
    sizes = [record.bytes for name, record in exported.manifest.files.items() if name.endswith(".onnx")]
    texts = " + ".join(f"{size / 1e6:.1f}" for size in sizes)
    click.echo(escaped(f"Bundle: {output}  version {exported.manifest.bundle_version}, {texts} MB"))
