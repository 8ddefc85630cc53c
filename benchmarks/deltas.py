"""What a new task costs on the way to a device: deltas beside whole bundles and beside patches of the same files.

    python benchmarks/deltas.py RUN [RUN...] --target orin-nano-8gb

Each RUN and a copy of it without its last task are exported; the delta between the two bundles is measured beside
bsdiff4 and zstd (level 19, the older file as its dictionary) over the same files one by one. The result of the delta is
the export, bit for bit, or there is none. Time and memory (growth of the peak) are those of `apply_delta` in a process
of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bsdiff4
import click
import zstandard

from duallora_edge.export.export import export_delta, export_run
from duallora_edge.learner import Learner
from duallora_edge.runtime.bundle import MANIFEST

APPLY = """
import re, sys, time
from duallora_edge.runtime.field.delta import apply_delta
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1000
before, start = peak(), time.perf_counter()
apply_delta(*sys.argv[1:])
print(time.perf_counter() - start, peak() - before)
"""


def patches(old: Path, new: Path) -> tuple[int, int]:
    """Bytes of patches from the files of one bundle to those of another: bsdiff4, zstd."""
    sizes = [0, 0]
    for path in new.iterdir():
        content = path.read_bytes()
        before = (old / path.name).read_bytes() if (old / path.name).exists() else b""
        if content == before:
            continue
        dictionary = zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
        packed = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(content)
        sizes[0] += len(bsdiff4.diff(before, content))
        sizes[1] += len(packed)
    return sizes[0], sizes[1]


def measured(*arguments: Path) -> tuple[float, float]:
    """Seconds that `apply_delta` takes in a fresh process, and by how many MB its peak of memory grows."""
    command = [sys.executable, "-c", APPLY, *map(str, arguments)]
    seconds, grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(grown)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--target", default="orin-nano-8gb", show_default=True)
@click.option("--split", is_flag=True)
def main(runs: tuple[Path, ...], target: str, split: bool) -> None:
    click.echo(
        "| run | classes | bundle, MB | delta, MB | of it | bsdiff4, MB | zstd, MB | apply, s | apply, MB |\n"
        + "|---" * 9
        + "|"
    )
    for run in runs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(run, folder / "run")
            Learner(folder / "run").rollback()
            old = export_run(folder / "run", folder / "old", target, split=split).path
            delta = export_delta(run, old, folder / "delta")
            seconds, grown = measured(old, delta.path, folder / "new")
            whole = sum((folder / "new" / each).stat().st_size for each in (*delta.manifest.files, MANIFEST))
            bsdiff, zstd = patches(old, folder / "new")
            click.echo(
                f"| {run.parent.name} | {len(delta.manifest.classes)} | {whole / 1e6:.1f} | {delta.bytes / 1e6:.2f} | "
                f"{100 * delta.bytes / whole:.1f} % | {bsdiff / 1e6:.2f} | {zstd / 1e6:.2f} | "
                f"{seconds:.2f} | {grown:.0f} |"
            )


if __name__ == "__main__":
    main()
