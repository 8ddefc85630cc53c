"""What an input size buys: accuracy against latency, with and without the base adaptation, as a table and a picture.

    DUALLORA_EDGE_ASSETS=... python benchmarks/streams.py cifar100-10 --methods sizes --out out/sizes
    python benchmarks/frontier.py out/sizes

Reads what `duallora-edge compare` left in the folder; writes frontier.md and frontier.png there. Accuracies are those
of the stored results, latencies are measured now, all models in turns in one process: medians of single images in ONNX
Runtime, as ratios to the first model of the largest size, with the 5th to 95th percentile of bootstrap resamples.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import click
import numpy as np
from matplotlib.figure import Figure

from duallora_edge.compare import single_image_times
from duallora_edge.files import read_json, write_atomic
from duallora_edge.learner.report.comparison import BLUE, GREY, style_axes, to_png
from duallora_edge.learner.report.picture_sheet import INK
from duallora_edge.learner.run_directory import RunDirectory


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", default=200, show_default=True, type=click.IntRange(20))
def main(folder: Path, rounds: int) -> None:
    accuracies: dict[str, list[float]] = {}
    runs: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        accuracies.setdefault(result["variant"], []).append(100 * result["last"])
        runs.setdefault(result["variant"], path.with_suffix(""))
    times = single_image_times(runs, rounds)
    opened = {label: RunDirectory.open(run) for label, run in runs.items()}
    infos = {label: run.info for label, run in opened.items()}
    peer = max(infos, key=lambda label: infos[label].size)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, rounds, (1000, rounds))
    lines = ["| model | px | adapted | accuracy | ms | of the largest |", "|---|---|---|---|---|---|"]
    points: dict[bool, list[tuple[float, float, int]]] = {True: [], False: []}
    for label in sorted(infos, key=lambda label: (infos[label].size, label)):
        ratios = np.median(times[label][draws], axis=1) / np.median(times[peer][draws], axis=1)
        low, high = np.quantile(ratios, (0.05, 0.95))
        milliseconds, accuracy = float(np.median(times[label])), mean(accuracies[label])
        adapted = bool((opened[label].base_made_from() or {}).get("rank"))
        points[adapted].append((milliseconds, accuracy, infos[label].size))
        ratio = milliseconds / float(np.median(times[peer]))
        lines.append(
            f"| `{label}` | {infos[label].size} | {'yes' if adapted else 'no'} | {accuracy:.1f} | {milliseconds:.1f} "
            f"| {ratio:.2f} ({low:.2f}-{high:.2f}) |"
        )
    table = "\n".join(lines) + "\n"
    write_atomic(folder / "frontier.md", table)
    write_atomic(folder / "frontier.png", picture(points))
    click.echo(table)


def picture(points: dict[bool, list[tuple[float, float, int]]]) -> bytes:
    """Accuracy over latency, one line with and one without the adaptation, each point named by its size."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    largest = max([*points[False], *points[True]])  # where both lines end
    for adapted, color, name in ((True, BLUE, "adapted"), (False, GREY, "as it was trained")):
        chosen = sorted({*points[adapted], largest})
        axes.plot([p[0] for p in chosen], [p[1] for p in chosen], marker="o", color=color, label=name)
        offset = (-12, 7) if adapted else (2, -13)
        for milliseconds, accuracy, size in chosen if adapted else chosen[:-1]:
            axes.annotate(
                f"{size} px", (milliseconds, accuracy), offset, textcoords="offset points", fontsize=8, color=INK
            )
    axes.margins(y=0.1)
    axes.set_xlabel("ms per image, ONNX Runtime, 2 threads")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, loc="lower right")
    style_axes(axes, "Input size: what it costs and what it buys")
    return to_png(figure)


if __name__ == "__main__":
    main()
