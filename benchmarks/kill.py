"""Kill `train` at random moments and show that nothing is lost.

    python benchmarks/kill.py --kills 50

A small stream is learned once without interruption; then a second run of the same stream is killed with SIGKILL at a
random moment, again and again. After each kill `status` must work; at the end both runs must have the same state and
the same bytes in every file of every task.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from duallora_edge.demo import write_digits


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "duallora_edge", *map(str, words)]


def tree_digest(run: Path) -> str:
    """SHA-256 over names and bytes of HEAD.json and all files of the tasks."""
    digest = hashlib.sha256()
    for path in [run / "HEAD.json", *sorted(p for p in (run / "tasks").rglob("*") if p.is_file())]:
        digest.update(str(path.relative_to(run)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@click.command()
@click.option("--kills", default=50, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=int)
def main(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        write_digits(images)
        settings = ["--data", images, "--config", Path(folder) / "settings.yaml"]
        # Three tasks; more steps and checkpoints than the default, so that kills fall into training too.
        (Path(folder) / "settings.yaml").write_text(
            "task_order: [digits-0-1, digits-2-3, digits-4-5]\nprecision: fp32\nmin_steps: 150\ncheckpoint_steps: 20\n"
        )
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        start = time.monotonic()
        subprocess.run(command("train", *settings, "--run", whole), check=True, capture_output=True)
        duration = time.monotonic() - start
        expected = tree_digest(whole)
        click.echo(f"uninterrupted: {duration:.0f} s, {expected}")
        done = 0
        while done < kills:
            process = subprocess.Popen(
                command("train", *settings, "--run", killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                # Start-up takes seconds, so that a run is finished only after several kills; then the next begins.
                process.wait(timeout=rng.uniform(0.2, 0.6 * duration))
                if process.returncode != 0:
                    raise SystemExit(f"train failed with exit code {process.returncode} after {done} kills")
                check(killed, expected)
                killed = killed.with_name(f"killed-{done}")
                continue
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            done += 1
            click.echo(f"kill {done}: {state(killed)}")
        subprocess.run(command("train", *settings, "--run", killed), check=True, capture_output=True)
        check(killed, expected)
        click.echo(f"{kills} kills: status worked after each, every resumed run equals the run never killed")


def state(run: Path) -> str:
    """What `status` says of the run; before it exists that is a clear error."""
    answer = subprocess.run(command("status", run, "--json"), capture_output=True, text=True, check=False)
    if not (run / "run.yaml").exists():
        if answer.returncode != 1 or "train" not in answer.stderr or "Traceback" in answer.stderr:
            raise SystemExit(f"status of a run not yet created: {answer.returncode} {answer.stderr}")
        return "the run was not created yet"
    if answer.returncode != 0:
        raise SystemExit(f"status failed: {answer.stderr}")
    value = json.loads(answer.stdout)
    steps = value["in_training"]
    return f"{len(value['tasks'])} tasks learned" + ("" if steps is None else f", checkpoint at step {steps}")


def check(run: Path, expected: str) -> None:
    if (found := tree_digest(run)) != expected:
        raise SystemExit(f"the resumed run differs: {found} instead of {expected}")
    click.echo(f"resumed to the end: {expected}, as never killed")


if __name__ == "__main__":
    main()
