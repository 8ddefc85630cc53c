"""The commands of the learner: train, evaluate, status, rollback, remove."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from duallora_edge.errors import RunError
from duallora_edge.files import cache_folder, write_json
from duallora_edge.learner import distributed
from duallora_edge.learner.config import load_config, read_yaml
from duallora_edge.learner.evaluate import measured_rows, report
from duallora_edge.learner.methods import METHODS
from duallora_edge.learner.report.definitions import DEFINITIONS
from duallora_edge.learner.report.metrics import Metrics, Row, TaskClasses, pool
from duallora_edge.learner.run_directory import RunDirectory
from duallora_edge.learner.timing import profiling
from duallora_edge.learner.train import Listener, measure_run, pick_device, train_run
from duallora_edge.text import escaped

METHOD_HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()) + "."
STAGES = {"decode": "reading images", "encode": "frozen prefix", "train": "training"}
PLAIN_INTERVAL = 10.0


class TerminalListener(Listener):
    """Lines and progress bars on standard error: bars on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.bars = Progress(
            TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self.bar: TaskID | None = None
        self.stage = ""
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        self._finish()
        self.console.print(escaped(text), markup=False, soft_wrap=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.console.is_terminal:
            if stage != self.stage:
                self._finish()
                self.bars.start()
                self.bar, self.stage = self.bars.add_task(STAGES[stage], total=total), stage
            if self.bar is not None:
                self.bars.update(self.bar, completed=done, total=total)
        elif time.monotonic() - self.last > PLAIN_INTERVAL:
            self.last = time.monotonic()
            self.console.print(f"  {STAGES[stage]} {done}/{total}")

    def row(self, state: int, row: Row) -> None:
        cell = pool(row)
        if cell.accuracy is not None:
            self.say(
                f"  after {state} task{'s' if state > 1 else ''}: {100 * cell.accuracy:.1f} % of {cell.n} test images"
            )

    def _finish(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bars.stop()
            self.bar, self.stage = None, ""


def echo(text: str, *, err: bool = False) -> None:
    """Print lines on the terminal, where names and paths that others chose do no harm."""
    click.echo(escaped(text), err=err)


def one_line(name: str) -> str:
    """A name as a part of a line."""
    return escaped(name).replace("\n", "\\n")


RUN = click.argument("run", type=click.Path(path_type=Path))


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(function)


@click.command()
@click.option("--data", help="Folder, CSV manifest or torchvision:NAME; the last one again when left out.")
@click.option(
    "--run", "run_path", required=True, type=click.Path(path_type=Path), help="Run directory (new or existing)."
)
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="YAML file with any of these settings.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    help="[dual_lora]  " + METHOD_HELP,
)
@click.option("--backbone", help="timm name NAME[.tag], or 'embedded'. [embedded]")
@click.option("--weights", help="safetensors file with the backbone's weights, instead of the hub.")
@click.option("--size", type=int, help="Input side in pixels. [the backbone's]")
@click.option("--resize", type=click.Choice(["crop", "squash"]), help="Centre square, or the whole frame. [crop]")
@click.option("--prefix-blocks", type=int, help="Blocks that stay frozen; -1 is all but one. [half]")
@click.option("--summaries", type=int, help="Frozen blocks that memory and classifier read. [3 or fewer]")
@click.option("--task-name", help="Name of the task. [the folder's]")
@click.option("--task-order", help="Names of the tasks of a stream, separated by commas. [folder names]")
@click.option("--classes-per-task", type=int, help="Split the classes into tasks of this many.")
@click.option("--class-order", help="'alphabetical' or 'seed:N'. [alphabetical]")
@click.option("--data-root", help="Where torchvision data sets lie or are downloaded to.")
@click.option("--test-fraction", type=float, help="Split off for the test where the data have none. [0.2]")
@click.option("--validation-fraction", type=float, help="Held back from training for calibration. [0.1]")
@click.option("--rank-orthogonal", type=int, help="[8]")
@click.option("--rank-residual", type=int, help="[8]")
@click.option("--residual", type=click.Choice(["auto", "isolated", "previous", "none"]), help="[auto]")
@click.option("--energy", type=float, help="Share of the features' energy that later tasks may not touch. [0.95]")
@click.option("--gate", type=click.Choice(["posterior", "open"]), help="What opens residual adapters. [posterior]")
@click.option("--calibration", type=click.Choice(["mixture", "temperature", "none"]), help="[mixture]")
@click.option("--classifier", type=click.Choice(["auto", "lda", "lda_f", "mean_f", "ridge", "heads"]), help="[auto]")
@click.option("--task-scale", type=float, help="Weight of each task vector (task_arithmetic). [0.25]")
@click.option("--kl-weight", type=float, help="Share of the distillation in the loss (task_arithmetic). [0]")
@click.option("--memory-per-class", type=int, help="Images stored and fine-tuned on (task_arithmetic). [10]")
@click.option("--epochs", type=int, help="[4]")
@click.option("--min-steps", type=int, help="At least this many steps a task. [120]")
@click.option("--batch-size", type=int, help="[32]")
@click.option("--learning-rate", type=float, help="[0.001]")
@click.option("--distillation", type=float, help="Pull of the features towards those before the task. [1]")
@click.option("--augment", type=click.Choice(["none", "light"]), help="[none]")
@click.option("--flip/--no-flip", default=None, help="Mirror half of the training images. [no]")
@click.option("--seed", type=int, help="[0]")
@click.option("--device", help="auto, cpu, cuda or cuda:N. [auto]")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Of the training's products. [auto]")
@click.option("--memory-budget", help="Stay within this much memory, such as 2GB: of the process, or on CUDA.")
@click.option(
    "--evaluate/--no-evaluate", default=True, help="Measure after each task, or leave it to 'evaluate'. [evaluate]"
)
@click.option("--profile", "profiled", is_flag=True, help="Tell where the time goes (reports/profile.json).")
@as_json
def train(
    run_path: Path, config_path: Path | None, evaluate: bool, profiled: bool, as_json: bool, **flags: Any
) -> None:
    """Learn the next task(s) of a run.

    The images may be laid out as DIR/<class>/*, DIR/{train,val,test}/<class>/*, DIR/<task>/{train,test}/<class>/*
    (a stream of tasks), or a CSV file with the columns path,label[,split][,task]. Stopped at any moment, the same
    command continues.

    \b
    Example:
      duallora-edge train --data photos/ --run runs/site-a
      duallora-edge train --data more-photos/ --run runs/site-a
    """
    if flags["task_order"] is not None:
        flags["task_order"] = tuple(name.strip() for name in flags["task_order"].split(","))
    with distributed.process_group():
        config = distributed.on_main(lambda: load_config(config_path, flags))
        given = [*(key for key, value in flags.items() if value is not None), *config_keys(config_path)]
        listener = TerminalListener() if distributed.is_main() else Listener()
        if profiled and distributed.is_main():
            with profiling(pick_device(config.device)) as profile:
                metrics = train_run(run_path, config, given, listener, evaluate=evaluate)
            write_json(run_path / "reports" / "profile.json", profile.to_json())
            listener.say(profile.table())
        else:
            metrics = train_run(run_path, config, given, listener, evaluate=evaluate)
        if distributed.is_main():
            if evaluate or as_json:
                show_metrics(metrics, as_json)
            else:
                echo(f"Not measured; 'duallora-edge evaluate {run_path}' does it.")
            echo(f"Run: {run_path}  report: {run_path / 'reports' / 'report.html'}", err=as_json)


@click.command()
@RUN
@click.option("--data", help="Read the test images from here instead of where they were learned.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.", show_default=True)
@click.option("--weights", help="The backbone's weights, when the file was moved.")
@click.option(
    "--compare", "others", multiple=True, type=click.Path(path_type=Path), help="Another run on the same stream."
)
@as_json
def evaluate(
    run: Path, data: str | None, device: str, weights: str | None, others: tuple[Path, ...], as_json: bool
) -> None:
    """Measure every state of a run on every task it knows; write metrics.json, plots and report.html.

    \b
    Example:
      duallora-edge evaluate runs/site-a
      duallora-edge evaluate runs/site-a --compare runs/site-a-sequential
    """
    opened = RunDirectory.open(run)
    comparisons = [(other.name, stored_metrics(RunDirectory.open(other))) for other in others]
    metrics = measure_run(opened, data, device, weights, TerminalListener())
    if comparisons:
        report(opened, metrics, comparisons)
    show_metrics(metrics, as_json, comparisons)
    echo(f"Report: {run / 'reports' / 'report.html'}", err=as_json)


@click.command()
@RUN
@click.option("--privacy", is_flag=True, help="List what is stored about the images, with sizes.")
@as_json
def status(run: Path, privacy: bool, as_json: bool) -> None:
    """Tasks, classes, sizes and accuracy of a run; reads only.

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
    """Undo the last task of a run. The state is then exactly the one before that task was learned.

    \b
    Example:
      duallora-edge rollback runs/site-a
    """
    opened = RunDirectory.open(run)
    with opened.locked():
        head = opened.head()
        if not head:
            raise RunError(f"The run {run} has no task to undo.")
        name = opened.read_info(head[-1]).name
        kept = opened.set_head(head[:-1])
    say_kept(kept)
    echo(f"Undid {one_line(name)}; {len(head) - 1} task(s) left.  Run: {run}")


@click.command()
@RUN
@click.argument("task")
def remove(run: Path, task: str) -> None:
    """Take one task out of a run: its adapters, bases, statistics and classes.

    Later tasks were learned on top of it and may answer a little worse; 'evaluate' measures it. Removing the
    newest task is the same as 'rollback'.

    \b
    Example:
      duallora-edge remove runs/site-a dtd10
    """
    opened = RunDirectory.open(run)
    with opened.locked():
        entry = opened.find(task)
        head = opened.head()
        if entry != head[-1] and not METHODS[opened.config.method].removable:
            raise RunError(f"Later tasks of {opened.config.method} build on {task}; only the newest can be removed.")
        kept = opened.set_head([other for other in head if other != entry])
    say_kept(kept)
    echo(
        f"Removed {one_line(task)}; {len(head) - 1} task(s) left. 'duallora-edge evaluate {run}' measures them.  "
        f"Run: {run}"
    )


def say_kept(folders: Sequence[Path]) -> None:
    """Tell which folders of deleted tasks stay."""
    for folder in folders:
        click.echo(f"{folder} stays: it holds files that the task did not write.", err=True)


def config_keys(path: Path | None) -> list[str]:
    """The settings that a YAML file names."""
    return [] if path is None else list(read_yaml(path))


def show_metrics(metrics: Metrics, as_json: bool, comparisons: Sequence[tuple[str, Metrics]] = ()) -> None:
    """Print the headline numbers, one column a run, or everything as JSON."""
    if as_json:
        echo(json.dumps(metrics.to_json(), indent=2))
        return
    columns = [metrics, *(other for _, other in comparisons)]
    names = ["", *(name for name, _ in comparisons)]
    width = max(len(definition.title) for definition in DEFINITIONS.values())
    if comparisons:
        echo(" " * width + "".join(f"  {one_line(name) or 'this run':>14}" for name in names))
    for key, definition in DEFINITIONS.items():
        values = "".join(f"  {definition.format(column.summary[key]):>14}" for column in columns)
        echo(f"{definition.title:<{width}}{values}")


def stored_metrics(run: RunDirectory) -> Metrics:
    """The metrics of a run's states as they were measured last. Raises `RunError` when a state was not measured."""
    head, known = run.head(), measured_rows(run)
    infos = [run.read_info(task) for task in head]
    try:
        rows = tuple(known[run.digest(head[:k])] for k in range(1, len(head) + 1))
        return Metrics(tuple(TaskClasses(info.name, info.classes) for info in infos), rows)
    except (KeyError, ValueError) as error:
        raise RunError(f"The run {run.path} was not measured; 'duallora-edge evaluate {run.path}' does it.") from error


def describe(run: RunDirectory) -> dict[str, Any]:
    """What `status` prints, for programs."""
    head, known = run.head(), measured_rows(run)
    row = known.get(run.digest(), ())
    tasks = []
    for index, entry in enumerate(head):
        info = run.read_info(entry)
        tasks.append(
            {
                "name": info.name,
                "classes": len(info.classes),
                "images": sum(info.counts.values()),
                "residual": info.residual,
                "bytes": folder_bytes(run.path / "tasks" / entry.folder),
                "accuracy": row[index].accuracy if row else None,
            }
        )
    return {
        "run": str(run.path),
        "method": run.config.method,
        "backbone": run.info.to_json(),
        "tasks": tasks,
        "classes": len({name for entry in head for name in run.read_info(entry).classes}),
        "accuracy": pool(row).accuracy if row else None,
        "in_training": run.training_steps(),
        "bytes": folder_bytes(run.path),
        "digest": run.digest(),
    }


def status_text(value: dict[str, Any]) -> str:
    backbone = value["backbone"]
    lines = [
        f"{value['method']} on {backbone['name']}, {backbone['size']} px: {len(value['tasks'])} task(s), "
        f"{value['classes']} classes, {value['bytes'] / 1e6:.1f} MB, state {value['digest'][:12]}"
    ]
    if value["tasks"]:
        lines.append(f"{'task':<24} {'classes':>7} {'images':>7} {'MB':>6}  {'residual':<9} accuracy now")
    for task in value["tasks"]:
        accuracy = "not measured" if task["accuracy"] is None else f"{100 * task['accuracy']:.1f} %"
        lines.append(
            f"{one_line(task['name'])[:24]:<24} {task['classes']:>7} {task['images']:>7} {task['bytes'] / 1e6:>6.1f}  "
            f"{task['residual']:<9} {accuracy}"
        )
    if value["in_training"] is not None:
        lines.append(f"A task is in training, {value['in_training']} steps done; 'duallora-edge train' continues it.")
    return "\n".join(lines)


STORED = {
    "adapters.safetensors": "low-rank updates of the network",
    "bases.safetensors": "directions of features that later updates must not touch",
    "head.safetensors": "a linear classifier",
    "kept_images.safetensors": "training images as pixels",
    "ridge_sums.safetensors": "sums of random features over the images of a class, and their Gram matrix",
    "statistics.safetensors": "per class the number of images and the mean feature, one covariance, calibration curves",
    "task.json": "names and counts of the classes",
}


def privacy_list(run: RunDirectory) -> dict[str, Any]:
    """Everything the run stores about images, in files with sizes, and what is stored outside of it."""
    files = []
    for entry in run.head():
        for path in sorted((run.path / "tasks" / entry.folder).iterdir()):
            what = STORED.get(path.name, "unknown")
            files.append({"file": str(path.relative_to(run.path)), "bytes": path.stat().st_size, "what": what})
    for name, what in (
        ("sources.json", "the folders the images came from"),
        ("checkpoint/state.safetensors", "updates of the task in training"),
        ("reports/rows.json", "counts of right and wrong answers on test images"),
    ):
        if (run.path / name).is_file():
            files.append({"file": name, "bytes": (run.path / name).stat().st_size, "what": what})
    pixels = METHODS[run.config.method].keeps_images and run.config.memory_per_class > 0
    return {"pixels": pixels, "files": files, "pixel_cache": str(cache_folder())}


def privacy_text(value: dict[str, Any]) -> str:
    pixels = "TRAINING IMAGES ARE STORED in the run" if value["pixels"] else "No pixels are stored in the run"
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
