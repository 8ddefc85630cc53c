"""Every attack, one after the other, with the counts that ATTACKS.md reports.

    python benchmarks/attack.py out/demo/bundle                  # hours
    python benchmarks/attack.py out/demo/bundle --share 0.01     # minutes

Each attack is a script of its own, which says what it does; this one only runs them. The exit code is 1 when any found
something. Hostile graphs are also run in ONNX Runtime, without the check, in the installations named by ``--python``.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

HERE = Path(__file__).parent


def attacks(bundle: Path, share: float, pythons: tuple[Path, ...]) -> dict[str, list[str | Path]]:
    """The command lines by name; of every count the given share."""

    def some(count: int) -> str:
        return str(max(1, round(share * count)))

    installations = [word for python in pythons for word in ("--python", python)]
    return {
        "manifests": ["attack_bundles.py", "manifests", bundle, "--count", some(100_000)],
        "golden files": ["attack_bundles.py", "golden", bundle, "--count", some(2_000)],
        "hostile graphs": ["attack_graphs.py", *installations],
        "mutated graphs": ["attack_graphs.py", "--mutations", some(20_000), *bundle.glob("*.onnx")],
        "images": ["attack_images.py", some(20_000)],
        "runs": ["attack_runs.py", "--count", some(2_000)],
        "servers": ["attack_http.py", bundle, "--count", some(2_000)],
        "swaps": ["attack_bundles.py", "swaps", bundle, "--swaps", some(200), "--calls", some(20_000)],
        "kills": ["kill.py", "--kills", some(300)],
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--share", default=1.0, show_default=True, help="Of every count.")
@click.option("--only", multiple=True, help="The name of an attack; all when left out.")
@click.option("--python", "pythons", multiple=True, type=click.Path(path_type=Path), help="Has an ONNX Runtime.")
def main(bundle: Path, share: float, only: tuple[str, ...], pythons: tuple[Path, ...]) -> None:
    """Attack the exported bundle BUNDLE, and everything else that reads what others wrote."""
    failed = []
    for name, (script, *words) in attacks(bundle.resolve(), share, pythons).items():
        if only and name not in only:
            continue
        click.echo(f"\n== {name}: {script} {' '.join(map(str, words))}")
        start = time.monotonic()
        if subprocess.run([sys.executable, HERE / script, *words]).returncode:
            failed.append(name)
        click.echo(f"   {time.monotonic() - start:.0f} s")
    found = f"Found something: {', '.join(failed)}" if failed else "Nothing untyped, nothing wrong, nothing lost."
    click.echo(f"\n{found}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
