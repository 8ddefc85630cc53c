"""The command that turns a run into a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from duallora_edge.device_profiles import DeviceProfile, resolve_target
from duallora_edge.device_profiles.profile import PRECISIONS
from duallora_edge.errors import DataError, ExportError
from duallora_edge.export.bundle import export_run
from duallora_edge.learner.methods import compose
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.train import Listener, read_images, source_groups
from duallora_edge.runtime.bundle import MAX_BATCH
from duallora_edge.runtime.preprocess import Pixels
from duallora_edge.text import escaped

REAL_IMAGES = 256


def _batch(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """The number of images, 0 for any number, None when it is not given."""
    if value is None or value == "dynamic":
        return None if value is None else 0
    if value.isdecimal() and 1 <= int(value) <= MAX_BATCH:
        return int(value)
    raise click.BadParameter(f"'{value}' is neither 'dynamic' nor a number from 1 to {MAX_BATCH}.")


def pick_precision(profile: DeviceProfile, wanted: str) -> str:
    """The precision for a device: ``auto`` is its default. Raises `ExportError` with the reason when it is refused."""
    if wanted == "auto":
        return profile.default_precision
    if wanted not in ("fp32", "fp16"):
        reason = profile.precisions.get(wanted) or "this project has no such graph"
        raise ExportError(f"{wanted} is not exported for {profile.name}: {reason.rstrip('.')}; use --precision auto.")
    refused = profile.precisions.get(wanted, "the device does not offer it")
    if refused is not None:
        raise ExportError(f"{wanted} is not exported for {profile.name}: {refused.rstrip('.')}; use --precision fp32.")
    return wanted


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
    resolved = resolve_target(target, jetpack)
    opened = RunDirectory.open(run)
    records = opened.records()
    if not records:
        raise ExportError(f"The run {run} has learned no task yet; 'duallora-edge train' teaches it one.")
    click.echo(escaped(f"Target: {resolved.reason}"), err=True)
    model = compose(opened.backbone(weights), records).eval()
    on_cpu = resolved.profile.kind == "cpu"
    exported = export_run(
        opened,
        model,
        resolved,
        output,
        training_images(opened),
        bundle_version,
        precision=pick_precision(resolved.profile, precision),
        batch=batch or (None if on_cpu or batch == 0 else 1),
        split=split,
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


def training_images(run: RunDirectory) -> Pixels | None:
    """Up to `REAL_IMAGES` training images, spread over the tasks, or None (said) where no source can be read."""
    names = {run.read_info(task).name for task in run.head()}
    pixels: list[Pixels] = []
    for settings in source_groups(run, names):
        if not settings:
            click.echo("Parity is not checked on real images of tasks whose source is no longer known.", err=True)
            continue
        try:
            stream = read_images(replace(run.config, **settings), run.info, Listener())
        except DataError as error:
            click.echo(escaped(f"Parity is not checked on real images of {settings.get('data')}: {error}"), err=True)
            continue
        for task in stream.tasks:
            if task.name in names and len(task.train):
                count = min(len(task.train), -(-REAL_IMAGES // len(names)))
                pixels.append(task.train.pixels[np.linspace(0, len(task.train) - 1, count, dtype=np.int64)])
    return np.concatenate(pixels) if pixels else None
