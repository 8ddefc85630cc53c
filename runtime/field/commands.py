"""The commands of a model in the field."""

from __future__ import annotations

from pathlib import Path

import click

from duallora_edge.runtime.field.delta import apply_delta
from duallora_edge.text import escaped


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("delta", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the new bundle."
)
def apply(bundle: Path, delta: Path, output: Path) -> None:
    """Make the new bundle of BUNDLE, an older one, and DELTA, which 'export --delta-from' wrote for it.

    Every file of the new bundle has the hash that the export gave it, or nothing is written. BUNDLE stays as it is.

    \b
    Example:
      duallora-edge apply bundles/0001 0001-0002.delta -o bundles/0002
    """
    made = apply_delta(bundle, delta, output)
    size = sum(record.bytes for record in made.manifest.files.values()) / 1e6
    click.echo(escaped(f"Bundle: {output}  version {made.manifest.bundle_version}, {size:.1f} MB"))
