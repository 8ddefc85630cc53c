"""The standard streams: `duallora-edge compare` on real images, one command a table.

    DUALLORA_EDGE_ASSETS=... python benchmarks/streams.py domains7 --seeds 0,1,2 --out out/domains7

Reads the archives of the asset folder, unpacks those of the stream, and compares methods with the defaults on a
ViT-Ti/16 (or a DeiT-Ti/16) at 128 px. Further options go to `duallora-edge compare`.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import click

from duallora_edge.cli import main as duallora_edge

STREAMS = {
    "domains7": ("gtsrb", "rsscn7", "dtd10", "signdigits", "clothing10", "scene6", "mnist"),
    "cifar100-10": ("cifar100",),
    "cifar100-50": ("cifar100",),
    "pacs4": ("pacs",),
}


NETWORKS = {
    "vit": ("vit_tiny_patch16_224", "vit_tiny_patch16_224.safetensors"),
    "deit": ("deit_tiny_patch16_224", "deit_tiny_patch16_224.fp16.safetensors"),
}


def unpack(assets: Path, stream: str, folder: Path) -> list[str]:
    """Unpack a stream into ``folder/<stream>``; returns the options of `compare` that name its tasks."""
    target = folder / stream
    target.mkdir(parents=True, exist_ok=True)
    for name in STREAMS[stream]:
        if not (target / name).is_dir():
            with tarfile.open(assets / "images" / f"{name}.tar") as archive:
                archive.extractall(target, filter="data")
    if stream == "domains7":
        return ["--stream", str(target), "--task-order", ",".join(STREAMS[stream])]
    if stream == "pacs4":
        return ["--stream", str(target / "pacs"), "--task-order", "photo,art_painting,cartoon,sketch"]
    classes = str(100 // int(stream.rpartition("-")[2]))
    return ["--stream", str(target / "cifar100"), "--classes-per-task", classes, "--class-order", "seed:1993"]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("stream", type=click.Choice(list(STREAMS)))
@click.option("--network", default="vit", show_default=True, type=click.Choice(list(NETWORKS)))
@click.option("--images", default="out/images", show_default=True, type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(stream: str, network: str, images: Path, options: tuple[str, ...]) -> None:
    """Compare methods on STREAM; OPTIONS are those of `duallora-edge compare`: --methods, --seeds, --out."""
    assets = os.environ.get("DUALLORA_EDGE_ASSETS")
    if not assets:
        raise click.UsageError("Set DUALLORA_EDGE_ASSETS to the folder of the assets.")
    data = unpack(Path(assets), stream, images)
    name, file = NETWORKS[network]
    backbone = ["--backbone", name, "--weights", str(Path(assets) / "weights" / file), "--size", "128"]
    duallora_edge(["compare", *data, *backbone, *options])


if __name__ == "__main__":
    main()
