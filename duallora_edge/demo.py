"""``duallora-edge demo``: the whole story on embedded data, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from duallora_edge.learner.commands import echo, show_metrics
from duallora_edge.learner.config import SETTINGS
from duallora_edge.learner.learner import Learner

SIDE = 32
CLASSES_PER_TASK = 2
METHODS = ("dual_lora", "sequential")


@click.command()
@click.option(
    "--run", "folder", default="demo", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder for the images, the runs and the bundle. [default: demo]",
)  # fmt: skip
@click.option("--seed", default=0, type=int, metavar="N", help=f"{SETTINGS['seed'].help} [default: 0]")
@click.option("--field", is_flag=True, help="Tell the life of a model on a device instead.")
def demo(folder: Path, seed: int, field: bool) -> None:
    """Learn five tasks of handwritten digits, see what forgetting is, export, verify and measure.

    The images are scikit-learn's 1,797 digits (8 x 8 px). DualLoRA and sequential fine-tuning, with adapters of the
    same size, learn 0-1, 2-3, 4-5, 6-7 and 8-9 one after the other. Nobody tells them the task of a test image.

    \b
    Example:
      duallora-edge demo --run out/demo
      duallora-edge demo --run out/demo --field
    """
    if field:
        from duallora_edge.field_demo import tell

        write_digits(folder / "images")
        tell(folder / "field", folder / "images", seed)
        return
    from duallora_edge.export.export import export_run
    from duallora_edge.learner.callbacks import Callback
    from duallora_edge.learner.evaluate import report
    from duallora_edge.learner.run_directory import RunDirectory
    from duallora_edge.learner.terminal import TerminalCallback
    from duallora_edge.runtime.classifier import Classifier
    from duallora_edge.runtime.preprocess import read_image

    terminal = TerminalCallback()
    write_digits(folder / "images")
    learners = {method: Learner(folder / method, callbacks=[terminal], method=method, seed=seed) for method in METHODS}
    results = {}
    for method, learner in learners.items():
        terminal.say(f"\n== {method}")
        results[method] = learner.learn(folder / "images")
    ours, peer = METHODS
    # What is to be doubted was said when it was learned.
    page = report(RunDirectory.open(folder / ours), results[ours], Callback(), [(peer, results[peer])])
    terminal.say("\n== export for a Jetson, checked against the trained model")
    exported = export_run(folder / METHODS[0], folder / "bundle", precision="fp32", batch=0, say=terminal.say)
    for what in ("generated", "real"):
        parity = exported.manifest.parity[what]
        echo(f"Agreement on {parity['images']} {what} images: {100 * parity['top1_agreement']:.2f} %")
    echo(f"Estimate: {exported.estimates[0].text}")
    terminal.say("\n== the light runtime on this machine")
    classifier = Classifier.load(folder / "bundle")
    for path in sorted((folder / "images").glob("*/test/*/*.png"))[::90]:
        prediction = classifier(read_image(path))
        echo(f"{path.parent.name}: {prediction.label} ({100 * prediction.confidence:.0f} %), {prediction.task}")
    # In a process of its own, because torch is loaded in this one and would count in the memory readings.
    subprocess.run(
        [sys.executable, "-m", "duallora_edge", "benchmark", folder / "bundle", "--duration", "2"], check=True
    )
    echo("")
    show_metrics(results[METHODS[0]], False, [(METHODS[1], results[METHODS[1]])])
    echo(f"Bundle: {folder / 'bundle'}  report: {page}")


def write_digits(folder: str | Path, *, classes: int = 10, images: int | None = None) -> None:
    """Write scikit-learn's digits as PNG files, as a stream of tasks of two classes; every fourth image is for testing.

    Args:
        folder: Where the tasks go, as ``digits-0-1/train/0/0010.png``.
        classes: How many digits, from 0 on.
        images: How many images of each digit at most; None: all of them, some 180.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    written = [0] * 10
    for index, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if digit >= classes or written[digit] == images:
            continue
        written[digit] += 1
        first = digit // CLASSES_PER_TASK * CLASSES_PER_TASK
        split = "test" if index % 4 == 0 else "train"
        task = Path(folder) / f"digits-{first}-{first + CLASSES_PER_TASK - 1}"
        target = task / split / str(digit) / f"{index:04d}.png"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
            whole = target.with_suffix(".part")  # which a kill leaves, and the next call writes again
            picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(whole, "PNG")
            whole.replace(target)
