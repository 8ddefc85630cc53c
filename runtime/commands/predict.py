"""``duallora-edge predict``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from duallora_edge.cli_groups import GroupedCommand
from duallora_edge.errors import DataError
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.commands.options import backend_options, trial_option
from duallora_edge.runtime.prediction import Prediction
from duallora_edge.runtime.preprocess import read_image
from duallora_edge.runtime.sources.files import find_images
from duallora_edge.text import escaped


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--top", type=click.IntRange(min=1), default=1, show_default=True, help="How many classes to show.")
@click.option(
    "--taught", type=click.Path(path_type=Path), metavar="DIR", help="Classes taught on this machine; see 'teach'."
)
@backend_options
@trial_option
def predict(
    bundle: Path,
    images: tuple[Path, ...],
    as_json: bool,
    top: int,
    taught: Path | None,
    backend: str,
    threads: int | None,
    strict: bool,
    trial: bool,
) -> None:
    """Classify IMAGES (files, or folders with images) with the bundle BUNDLE.

    Each image gives one line on standard output, with its fields separated by tabs: path, label and confidence (for
    each of --top), task and its confidence, 'novel' or 'known' ('-' without a threshold). Images that cannot be read
    are named on standard error, and the exit code is then 1.

    \b
    Example:
      duallora-edge predict bundle photo.jpg more-photos/ --top 3
    """
    # A file given by name is tried whatever its suffix.
    files = [file for path in images for file in (find_images(path) if path.is_dir() else [path])]
    classifier = Classifier.load(bundle, backend, threads, strict, trial=trial, taught=taught)
    click.echo(escaped(f"backend: {classifier.backend}"), err=True)
    if taught:
        click.echo(escaped(classifier.health().taught_line), err=True)
    broken = 0
    for path in files:
        try:
            prediction = classifier(read_image(path))
        except DataError as error:
            broken += 1
            click.echo(escaped(str(error)), err=True)
            continue
        if as_json:
            click.echo(json.dumps({"path": str(path), **prediction.to_json(top)}))
        else:
            click.echo("\t".join(escaped(field) for field in _fields(path, prediction, top)))
    if broken:
        raise DataError(f"{broken} of {len(files)} images could not be read; the lines above say why.")


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
