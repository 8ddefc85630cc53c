"""The standard streams: `duallora-edge compare` on real images, one command a table.

    DUALLORA_EDGE_ASSETS=... python benchmarks/streams.py domains7 --seeds 0,1,2 --out out/domains7

Reads the archives of the asset folder, unpacks those of the stream, and compares methods with the defaults on a
ViT-Ti/16 (or a DeiT-Ti/16) at 128 px. Further options go to `duallora-edge compare`.

In the shifted ones the test images come from elsewhere: ``pacs-DOMAIN`` learns the three other domains and is tested on
that one, ``gtsrb-dark`` learns the brighter half of the images of each class and is tested on the darker half of the
test images, ``rsscn7-near`` is tested on the middle of the test images, twice as large.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from PIL import Image

from duallora_edge.cli import main as duallora_edge

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
STREAMS = {
    "domains7": ("gtsrb", "rsscn7", "dtd10", "signdigits", "clothing10", "scene6", "mnist"),
    "cifar100-10": ("cifar100",),
    "cifar100-50": ("cifar100",),
    "pacs4": ("pacs",),
    **{f"pacs-{domain}": ("pacs",) for domain in DOMAINS},
    "gtsrb-dark": ("gtsrb",),
    "rsscn7-near": ("rsscn7",),
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
    if stream in SHIFTS:
        made, unfinished = target / "shifted", target / "unfinished"
        if not made.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            SHIFTS[stream](target, unfinished, stream.partition("-")[2])
            unfinished.rename(made)
        return ["--stream", str(made)]
    if stream == "domains7":
        return ["--stream", str(target), "--task-order", ",".join(STREAMS[stream])]
    if stream == "pacs4":
        return ["--stream", str(target / "pacs"), "--task-order", "photo,art_painting,cartoon,sketch"]
    classes = str(100 // int(stream.rpartition("-")[2]))
    return ["--stream", str(target / "cifar100"), "--classes-per-task", classes, "--class-order", "seed:1993"]


def without_domain(source: Path, target: Path, domain: str) -> None:
    """Train on the other domains, test on all images of this one."""
    for path in source.glob("pacs/*/*/*/*"):
        place, _, label, name = path.relative_to(source / "pacs").parts
        split = "test" if place == domain else "train"
        copy(path, target / split / label / f"{place}-{path.parts[-3]}{name}")


def darker(source: Path, target: Path, _: str) -> None:
    """Train on the brighter half of each class, test on the darker half."""
    for split in ("train", "test"):
        for folder in source.glob(f"gtsrb/{split}/*"):
            paths = sorted(folder.iterdir(), key=lambda path: np.asarray(Image.open(path).convert("L")).mean())
            half = len(paths) // 2
            for path in paths[half:] if split == "train" else paths[:half]:
                copy(path, target / split / folder.name / path.name)


def nearer(source: Path, target: Path, _: str) -> None:
    """Test on the middle of the images."""
    for path in source.glob("rsscn7/*/*/*"):
        made = target / path.relative_to(source / "rsscn7")
        if made.parts[-3] == "train":
            copy(path, made)
        else:
            made.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(path).convert("RGB")
            width, height = image.size
            box = (width // 4, height // 4, width - width // 4, height - height // 4)
            image.resize((width, height), Image.Resampling.BICUBIC, box=box).save(made, quality=95)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


SHIFTS: dict[str, Callable[[Path, Path, str], None]] = {
    **{f"pacs-{domain}": without_domain for domain in DOMAINS},
    "gtsrb-dark": darker,
    "rsscn7-near": nearer,
}


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
