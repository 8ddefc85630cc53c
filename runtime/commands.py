"""``duallora-edge predict`` and ``duallora-edge benchmark``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from duallora_edge.errors import DataError
from duallora_edge.files import write_json
from duallora_edge.runtime.backends import BACKENDS
from duallora_edge.runtime.benchmark import check_budgets, run_benchmark
from duallora_edge.runtime.benchmark_table import table
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.prediction import Prediction
from duallora_edge.runtime.preprocess import read_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
MAX_SIDE = 16384

Command = TypeVar("Command", bound=Callable[..., Any])


def backend_options(command: Command) -> Command:
    """The options of every command that runs a model."""
    for option in (
        click.option("--strict", is_flag=True, help="Fail instead of falling back to a slower backend."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads of one inference."),
        click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="Default: the best that works."),
    ):
        command = option(command)
    return command


def _frame_size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """A size such as 1280x720, as (width, height)."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise click.BadParameter(f"'{value}' is no size such as 1280x720 with sides up to {MAX_SIDE}.")
    return width, height


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="How many classes to show.")
@backend_options
def predict(
    bundle: Path, images: tuple[Path, ...], as_json: bool, top: int, backend: str, threads: int | None, strict: bool
) -> None:
    """Classify IMAGES (files, or folders with images) with the bundle BUNDLE.

    One line an image on standard output, separated by tabs: path, label and confidence (for each of --top), task
    and its confidence, 'novel' or 'known' ('-' without a threshold). An image that cannot be read gives a line on
    standard error, and exit code 1 at the end.

    \b
    Example:
      duallora-edge predict bundle photo.jpg more-photos/ --top 3
    """
    files = list(_files(images))
    classifier = Classifier.load(bundle, backend, threads, strict)
    click.echo(f"backend: {classifier.backend}", err=True)
    broken = 0
    for path in files:
        try:
            prediction = classifier(read_image(path))
        except DataError as error:
            broken += 1
            click.echo(str(error), err=True)
            continue
        if as_json:
            click.echo(json.dumps({"path": str(path), **prediction.to_json(top)}))
        else:
            click.echo("\t".join(_fields(path, prediction, top)))
    if broken:
        raise DataError(f"{broken} of {len(files)} images could not be read; the lines above say why.")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--duration",
    type=click.FloatRange(0.0, 3600.0),
    default=5.0,
    show_default=True,
    help="Seconds for each of the three measurements.",
)
@click.option(
    "--frame",
    callback=_frame_size,
    metavar="WxH",
    default="1280x720",
    show_default=True,
    help="Size of the camera frame.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON; '-' prints it instead of text.")
@click.option("--budget-ms", type=click.FloatRange(min=0), help="Exit code 1 when the p90 of one image takes longer.")
@click.option("--budget-mb", type=click.FloatRange(min=0), help="Exit code 1 when the PSS after the runs is larger.")
@backend_options
def benchmark(
    bundle: Path,
    duration: float,
    frame: tuple[int, int],
    json_file: str | None,
    budget_ms: float | None,
    budget_mb: float | None,
    backend: str,
    threads: int | None,
    strict: bool,
) -> None:
    """Measure latency, throughput and memory of the bundle BUNDLE on this machine.

    The latency budget is compared with the p90 of the single stream (the model on one prepared image), the memory
    budget (1 MB = 10^6 bytes) with the PSS of the whole process after single images.

    \b
    Example:
      duallora-edge benchmark bundle --budget-ms 20 --json report.json
    """
    report = run_benchmark(bundle, backend, threads, strict, duration, frame)
    if json_file == "-":
        click.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        click.echo(table(report))
        if json_file:
            write_json(Path(json_file), report.to_json())
            click.echo(f"\nReport: {json_file}")
    check_budgets(report, budget_ms, budget_mb)


def _files(paths: tuple[Path, ...]) -> Iterator[Path]:
    """The files named, and the images below the folders named, in the order of their names."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise DataError(f"{path} contains no images ({', '.join(sorted(SUFFIXES))}); give another folder.")
        yield from found


def _fields(path: Path, prediction: Prediction, top: int) -> list[str]:
    novelty = {None: "-", True: "novel", False: "known"}[prediction.is_novel]
    classes = [text for label, value in prediction.top(top) for text in (label, f"{value:.4f}")]
    return [
        click.format_filename(path),
        *classes,
        prediction.task,
        f"{prediction.task_confidence:.4f}",
        novelty,
    ]
