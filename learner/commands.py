"""The commands of the learner: train, adapt, evaluate, status, rollback, remove.

torch and NumPy take long to import, so each command imports what needs them by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duallora_edge.cli_groups import GroupedCommand, option_group
from duallora_edge.files import cache_folder, write_json
from duallora_edge.learner.config import SETTINGS
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.options import FLAGS, MethodsCommand, setting_options
from duallora_edge.learner.run_directory import ANSWERS, BASE, PICTURES, REPORT, RunDirectory
from duallora_edge.learner.trackers import TRACKERS
from duallora_edge.text import escaped

if TYPE_CHECKING:
    from duallora_edge.learner.callbacks import Callback
    from duallora_edge.learner.report.metrics import Metrics

# Below this accuracy a larger backbone is worth naming (benchmarks/RESULTS.md, "Few images: which backbone").
GOOD = 0.95
LARGER_BACKBONE = (
    "The embedded backbone is small: from ten photos a class, a ViT-Ti got 13 to 21 of 100 images more right "
    "(--backbone vit_tiny_patch16_224 --weights FILE, in a new run)."
)


def echo(text: str, *, err: bool = False) -> None:
    """Print lines on the terminal, where names and paths that others chose do no harm."""
    click.echo(escaped(text), err=err)


def one_line(name: str) -> str:
    """A name as a part of a line."""
    return escaped(name).replace("\n", "\\n")


RUN = click.argument("run", type=click.Path(path_type=Path))
essential, images, output = option_group("Essentials"), option_group("Data"), option_group("Output")
source = option_group("Images and network")
as_json = output("--json", "as_json", is_flag=True, help="Print JSON for programs.")


@click.command(cls=MethodsCommand)
@setting_options("data")
@essential(
    "--run", "run_path", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of the run, new or existing."
)  # fmt: skip
@essential(
    "--config", "config_path", type=click.Path(path_type=Path), metavar="FILE",
    help="YAML file with settings, such as examples/train.yaml; options win over it."
)  # fmt: skip
@images(
    "--again", metavar="NAME",
    help="Learn this task again from the images that are there now, in place of its old version. "
    "[default: only new tasks]"
)  # fmt: skip
@setting_options(*(key for key in FLAGS if key != "data"))
@output(
    "--evaluate/--no-evaluate", default=True, help="Measure after each task, or leave it to 'evaluate'. [default: yes]"
)  # fmt: skip
@output(
    "--track", "trackers", multiple=True, type=click.Choice(list(TRACKERS)),
    help="Also log to TensorBoard, MLflow or Weights & Biases; may be given several times."
)  # fmt: skip
@output("--profile", "profiled", is_flag=True, help="Show where the time goes; kept in reports/profile.json.")
@as_json
def train(
    run_path: Path,
    config_path: Path | None,
    again: str | None,
    evaluate: bool,
    trackers: tuple[str, ...],
    profiled: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Learn the next task or tasks of a run.

    The images are in DIR/<class>/*, DIR/{train,val,test}/<class>/*, DIR/<task>/{train,test}/<class>/* (a stream of
    tasks), or in a CSV file with the columns path,label[,split][,task]. A detection set (COCO or YOLO) is learned box
    by box with --crop-boxes. When it was stopped, the same command continues.

    \b
    Example:
      duallora-edge train --data photos/ --run runs/site-a
      duallora-edge train --data more-photos/ --run runs/site-a
      duallora-edge train --again photos --run runs/site-a
    """
    from duallora_edge.learner import distributed
    from duallora_edge.learner.device import pick_device
    from duallora_edge.learner.learner import Learner
    from duallora_edge.learner.terminal import TerminalCallback
    from duallora_edge.learner.timing import profiling

    with distributed.process_group():
        callbacks: list[Callback] = []
        if distributed.is_main():
            terminal = TerminalCallback(summary_follows=True)
            callbacks = [terminal, *(TRACKERS[name](run_path, terminal.say) for name in dict.fromkeys(trackers))]
        learner = Learner(run_path, config=config_path, callbacks=callbacks, **flags)
        config = learner.config  # all processes read it together
        if profiled and distributed.is_main():
            with profiling(pick_device(config.device)) as profile:
                metrics = learner.learn(again=again, evaluate=evaluate)
            write_json(run_path / "reports" / "profile.json", profile.to_json())
            echo(profile.table(), err=True)
        else:
            metrics = learner.learn(again=again, evaluate=evaluate)
        if distributed.is_main():
            if evaluate or as_json:
                show_metrics(metrics, as_json)
                accuracy = metrics.summary["last_accuracy"]
                if config.backbone == "embedded" and accuracy is not None and accuracy < GOOD:
                    echo(LARGER_BACKBONE, err=as_json)
            else:
                echo(f"Not measured; 'duallora-edge evaluate {run_path}' does it.")
            echo(f"Run: {run_path}  report: {run_path / 'reports' / 'report.html'}", err=as_json)


@click.command(cls=GroupedCommand)
@click.argument("images", metavar="SOURCE")
@essential(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE",
    help="The file to write; an older base adaptation is replaced."
)  # fmt: skip
@setting_options("backbone", "weights", "size", "resize", "seed")
@option_group("Data")(
    "--images", "count", type=int, metavar="N", help="Use this many images at most. [default: 2000]"
)  # fmt: skip
@setting_options("prefix_blocks", "second_order", "device", "precision")
def adapt(images: str, output: Path, count: int | None, **flags: Any) -> None:
    """Fit a backbone to another input size on images without labels, before anything is learned.

    'train' does the same with the images of the first task; this takes any others, such as a day in front of the
    camera. SOURCE is a folder of images, a video file or a camera such as /dev/video0. A camera gives one image a
    second. When it was stopped, the same command continues, except with a camera.

    \b
    Example:
      duallora-edge adapt day.mp4 -o base.safetensors --size 128
      duallora-edge train --data photos/ --run runs/site-a --size 128 --base base.safetensors
    """
    from duallora_edge.learner.adapt import MAX_FRAMES, adapt_source
    from duallora_edge.learner.config import load_config
    from duallora_edge.learner.terminal import TerminalCallback

    config = load_config(None, flags)
    base, sha256 = adapt_source(images, output, config, TerminalCallback(), MAX_FRAMES if count is None else count)
    echo(
        f"Adapted {config.backbone} to {base.size} px on {base.made_from['images']} images, sha256 {sha256[:12]}; "
        f"use it with 'duallora-edge train --base {output}' and --size {base.size}."
    )


@click.command(cls=GroupedCommand)
@RUN
@source("--data", metavar="SOURCE", help="Take the test images from here. [default: where they were learned]")
@source("--weights", metavar="FILE", help="File with the weights of the backbone, if it was moved.")
@source("--device", default="auto", metavar="NAME", help=f"{SETTINGS['device'].help} [default: auto]")
@output(
    "--compare", "others", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Show another run on the same stream beside this one; may be given several times."
)  # fmt: skip
@as_json
def evaluate(
    run: Path, data: str | None, device: str, weights: str | None, others: tuple[Path, ...], as_json: bool
) -> None:
    """Measure the run after each of its tasks, and write metrics.json and report.html.

    \b
    Example:
      duallora-edge evaluate runs/site-a
      duallora-edge evaluate runs/site-a --compare runs/site-a-sequential
    """
    from duallora_edge.learner.learner import Learner
    from duallora_edge.learner.terminal import TerminalCallback

    learner = Learner(run, callbacks=[TerminalCallback()], device=device, weights=weights)
    compared = [Learner(other) for other in others]
    metrics = learner.evaluate(data, comparisons=compared)
    show_metrics(metrics, as_json, [(other.path.name, other.metrics) for other in compared])
    echo(f"Report: {run / 'reports' / 'report.html'}", err=as_json)


@click.command()
@RUN
@click.option("--privacy", is_flag=True, help="List what the run stores about images, with sizes.")
@as_json
def status(run: Path, privacy: bool, as_json: bool) -> None:
    """Show tasks, classes, sizes and accuracy of a run; nothing is changed.

    \b
    Example:
      duallora-edge status runs/site-a
      duallora-edge status runs/site-a --privacy
    """
    opened = RunDirectory.open(run)
    value = privacy_list(opened) if privacy else describe(opened)
    if as_json:
        echo(json.dumps(value, indent=2))
    else:
        echo(privacy_text(value) if privacy else status_text(value))
        echo(f"Run: {run}")


@click.command()
@RUN
def rollback(run: Path) -> None:
    """Undo the last task of a run, exactly as if it had never been learned.

    \b
    Example:
      duallora-edge rollback runs/site-a
    """
    from duallora_edge.learner.learner import Learner
    from duallora_edge.learner.terminal import TerminalCallback

    learner = Learner(run, callbacks=[TerminalCallback()])
    name = learner.rollback()
    echo(f"Undid {one_line(name)}; {len(learner.tasks)} task(s) left.  Run: {run}")


@click.command()
@RUN
@click.argument("task")
def remove(run: Path, task: str) -> None:
    """Take one task out of a run: its adapters, bases, statistics and classes.

    Later tasks were learned on top of it and may become less accurate; 'evaluate' measures that. Removing the newest
    task is the same as 'rollback'.

    \b
    Example:
      duallora-edge remove runs/site-a dtd10
    """
    from duallora_edge.learner.learner import Learner
    from duallora_edge.learner.terminal import TerminalCallback

    learner = Learner(run, callbacks=[TerminalCallback()])
    learner.remove(task)
    echo(
        f"Removed {one_line(task)}; {len(learner.tasks)} task(s) left. 'duallora-edge evaluate {run}' measures them.  "
        f"Run: {run}"
    )


def show_metrics(metrics: Metrics, as_json: bool, comparisons: Sequence[tuple[str, Metrics]] = ()) -> None:
    """Print the headline numbers with one column for each run, or everything as JSON.

    After one task those that compare tasks say nothing new.
    """
    from duallora_edge.learner.report.definitions import DEFINITIONS, span

    if as_json:
        echo(json.dumps(metrics.to_json(), indent=2))
        return
    columns = [metrics, *(other for _, other in comparisons)]
    names = ["", *(name for name, _ in comparisons)]
    width = max(len(definition.title) for definition in DEFINITIONS.values())
    if comparisons:
        echo(" " * width + "".join(f"  {one_line(name) or 'this run':>15}" for name in names))
    several = any(len(column.tasks) > 1 for column in columns)
    for key, definition in DEFINITIONS.items():
        if definition.several_tasks and not several:
            continue
        values = "".join(f"  {definition.headline(c.summary[key], c.intervals[key]):>15}" for c in columns)
        ends = "" if comparisons or metrics.intervals[key] is None else f"  ({span(metrics.intervals[key])})"
        echo(f"{definition.title:<{width}}{values}{ends}")
    if not comparisons:
        echo("In brackets: intervals of 95 % for the number of test images.")


def describe(run: RunDirectory) -> dict[str, Any]:
    """What `status` prints, for programs."""
    from duallora_edge.learner.measurements import measured_rows
    from duallora_edge.learner.report.metrics import pool

    active, known = run.active_tasks(), measured_rows(run)
    row = known.get(run.digest(), ())
    tasks = []
    for index, entry in enumerate(active):
        info = run.read_info(entry)
        tasks.append(
            {
                "name": info.name,
                "classes": len(info.classes),
                "images": sum(info.counts.values()),
                "counts": dict(info.counts),
                "residual": info.residual,
                "bytes": folder_bytes(run.path / "tasks" / entry.folder),
                "accuracy": row[index].accuracy if row else None,
            }
        )
    return {
        "run": str(run.path),
        "method": run.config.method,
        "backbone": run.info.to_json(),
        "base_adaptation": _base_facts(run),
        "tasks": tasks,
        "classes": len({name for entry in active for name in run.read_info(entry).classes}),
        "accuracy": pool(row).accuracy if row else None,
        "in_training": run.training_steps(),
        "bytes": folder_bytes(run.path),
        "digest": run.digest(),
    }


def _base_facts(run: RunDirectory) -> dict[str, Any] | None:
    """Native size in pixels and number of images of the base adaptation, None where unknown.

    None without one, also where base.safetensors holds only the directions of the second-order summary.
    """
    made_from = run.base_made_from()
    if made_from is None or made_from.get("rank") == 0:
        return None
    found = {key: made_from.get(key) for key in ("native_size", "images")}
    return {key: value if isinstance(value, int) else None for key, value in found.items()}


def status_text(value: dict[str, Any]) -> str:
    from duallora_edge.learner.data.class_counts import describe_counts

    backbone = value["backbone"]
    lines = [
        f"{value['method']} on {backbone['name']}, {backbone['size']} px: {len(value['tasks'])} task(s), "
        f"{value['classes']} classes, {value['bytes'] / 1e6:.1f} MB, state {value['digest'][:12]}"
    ]
    base, fitted = value["base_adaptation"], "none"
    if base is not None:
        native, images = (base[key] or "?" for key in ("native_size", "images"))
        fitted = f"fitted from {native} to {backbone['size']} px on {images} images"
    lines.append(f"Base adaptation: {fitted}")
    if value["tasks"]:
        lines.append(f"{'task':<24} {'classes':>7} {'images':>7} {'MB':>6}  {'residual':<9} accuracy now")
    for task in value["tasks"]:
        accuracy = "not measured" if task["accuracy"] is None else f"{100 * task['accuracy']:.1f} %"
        lines.append(
            f"{one_line(task['name'])[:24]:<24} {task['classes']:>7} {task['images']:>7} {task['bytes'] / 1e6:>6.1f}  "
            f"{task['residual']:<9} {accuracy}"
        )
        lines.append(f"  {one_line(describe_counts(task['counts']))}")
    if value["in_training"] is not None:
        lines.append(f"A task is in training, {value['in_training']} steps done; 'duallora-edge train' continues it.")
    return "\n".join(lines)


STORED = {
    "adapters.safetensors": "low-rank updates of the network",
    "bases.safetensors": "directions of features that later updates must not touch",
    "discriminants.safetensors": "a linear classifier of the features",
    "head.safetensors": "a linear classifier",
    "kept_images.safetensors": "training images as pixels",
    "ridge_sums.safetensors": "sums of random features over the images of a class, and their Gram matrix",
    "split.safetensors": "fingerprints of the images, 80 bytes each: a hash and 512 bits of a blurred thumbnail",
    "statistics.safetensors": "number of images and mean feature of each class, one covariance in at most 256 "
    "directions, calibration curves",
    "task.json": "names and counts of the classes",
}


def privacy_list(run: RunDirectory) -> dict[str, Any]:
    """Everything the run stores about images, in files with sizes, and what is stored outside of it."""
    files = []
    shown = ", and test images as thumbnails; delete it as you like" if run.config.pictures else ""
    for entry in run.active_tasks():
        for path in sorted((run.path / "tasks" / entry.folder).iterdir()):
            what = STORED.get(path.name, "unknown")
            files.append({"file": str(path.relative_to(run.path)), "bytes": path.stat().st_size, "what": what})
    for name, what in (
        (BASE, "updates of the network and directions of its features, from images without labels; no pixels"),
        ("sources.json", "the folders the images came from"),
        ("checkpoint/state.safetensors", "updates of the task in training"),
        ("reports/rows.json", "counts of right and wrong answers on test images"),
        (PICTURES, "training images as thumbnails, for people; delete it as you like"),
        (ANSWERS, f"counts of answers by class{shown}"),
        (REPORT, f"what was measured, for people{shown}"),
    ):
        if (run.path / name).is_file():
            files.append({"file": name, "bytes": (run.path / name).stat().st_size, "what": what})
    kept = METHODS[run.config.method].keeps_images and run.config.kept_images_per_class > 0
    pictures = (PICTURES, ANSWERS, REPORT) if run.config.pictures else (PICTURES,)
    thumbnails = [name for name in pictures if (run.path / name).is_file()]
    return {
        "pixels": kept or bool(thumbnails),
        "kept_images": kept,
        "thumbnails": thumbnails,
        "files": files,
        "pixel_cache": str(cache_folder()),
    }


def privacy_text(value: dict[str, Any]) -> str:
    pixels = "TRAINING IMAGES ARE STORED in the run" if value["kept_images"] else "No pixels are stored in the run"
    if value["thumbnails"]:
        pixels += f"{',' if value['kept_images'] else ' but'} thumbnails in {', '.join(value['thumbnails'])}"
    lines = [
        f"{pixels}, and features only as means over the images of a class (which for a class "
        "of one image is that image's feature). About the images it holds:"
    ]
    lines += [f"{entry['bytes']:>12,} B  {one_line(entry['file']):<48} {entry['what']}" for entry in value["files"]]
    lines.append(
        f"Decoded images are cached outside the run in {value['pixel_cache']}; delete that folder to drop them."
    )
    return "\n".join(lines)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder, in bytes. Files may come and go meanwhile: a training may be at work."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += (Path(parent) / name).stat().st_size
    return size
