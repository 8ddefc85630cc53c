"""``duallora-edge run``."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duallora_edge.cli_groups import GroupedCommand, option_group
from duallora_edge.errors import StoreError
from duallora_edge.runtime.classifier import Classifier
from duallora_edge.runtime.commands.options import address, backend_group, backend_options, frame_size, trial_option
from duallora_edge.runtime.field.store import FILE as SLOTS_FILE
from duallora_edge.runtime.field.store import Store
from duallora_edge.runtime.service.bundle_watcher import BundleWatcher
from duallora_edge.runtime.service.monitor import Monitor, notify, watchdog
from duallora_edge.runtime.service.outlets import Changes, Write, outlets
from duallora_edge.runtime.service.pipeline import Answer, ExponentialSmoothing, Pipeline, Region
from duallora_edge.runtime.service.slot_keeper import SlotKeeper, Terms, open_slot
from duallora_edge.runtime.service.watcher import Watcher
from duallora_edge.runtime.sources import open_source
from duallora_edge.text import escaped

if TYPE_CHECKING:
    from duallora_edge.runtime.field.keeping import Keeper

SCHEMA = 1
LISTEN = ("127.0.0.1", 8080)
STOP_S = 10.0
# A name of a camera; no address or path begins so, as "gst://" and "/dev/video0" do not.
_NAMED = re.compile(r"([\w-]{1,40})=")
_OPEN = "There is no password and no encryption: anyone who can reach this address sees {what}."


def _region(context: click.Context, parameter: click.Parameter, value: str | None) -> Region | None:
    """Four shares of the picture such as 0.25,0,0.5,1."""
    if value is None:
        return None
    try:
        left, top, width, height = (float(part) for part in value.split(","))
        return Region(left, top, width, height)
    except ValueError as error:
        raise click.BadParameter(f"'{value}' is not a region such as 0.25,0,0.5,1: {error}.") from error


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Sources by the names of their cameras, numbers where none is given. Raises ``click.UsageError`` for twins."""
    named: dict[str, str] = {}
    for number, text in enumerate(sources, start=1):
        match = _NAMED.match(text)
        name, source = (match[1], text[match.end() :]) if match else (str(number), text)
        if name in named:
            raise click.UsageError(
                f"Two cameras are called '{name}'; give each a name of its own: --source NAME=SOURCE."
            )
        named[name] = source
    return named


def _positive(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise click.BadParameter(f"{value} is not above 0.")
    return value


_source = option_group("Source")
_answers = option_group("Answers")
_live = option_group("Live page")
_updates = option_group("New bundles and classes")


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@_source(
    "--source", "sources", required=True, multiple=True, metavar="[NAME=]SOURCE",
    help="Where frames come from; see above. Several times for several cameras.",
)  # fmt: skip
@_source("--size", callback=frame_size, metavar="WxH", help="Size of raw frames and pipelines, or of a camera.")
@_source("--color", type=click.Choice(["rgb", "bgr", "gray"]), default="rgb", help="Channel order of raw frames.")
@_source("--rate", type=float, callback=_positive, help="Read files and folders at this many frames per second.")
@_source("--live/--no-live", default=None, help="Drop frames that come too fast. Default: for cameras and streams.")
@_source("--loop", is_flag=True, help="Start files and folders over when they end.")
@_source("--wait", is_flag=True, help="Keep trying when a camera or stream is not there at the start.")
@_answers("--every", type=click.IntRange(min=1), default=1, metavar="N", help="Classify only every N-th frame.")
@_answers("--roi", callback=_region, metavar="L,T,W,H", help="Classify a part: left, top, width, height from 0 to 1.")
@_answers(
    "--smooth", type=float, callback=_positive, metavar="SECONDS", help="Average the answers over about this time."
)
@_answers("--min-confidence", type=click.FloatRange(0, 1), default=0.0, help="Leave out less confident answers.")
@_answers("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes to print.")
@_answers("--frames", type=click.IntRange(min=1), help="Stop after this many answers.")
@_answers("--on-change", is_flag=True, help="Print an answer only when its label or is_novel is another one.")
@_answers(
    "--sink", type=click.Path(path_type=Path), metavar="FILE", help="Write the answers to a file that is rotated."
)
@_answers("--sink-mb", type=click.FloatRange(0.1), default=50, show_default=True, metavar="MB", help="Room for them.")
@_answers("--mqtt", metavar="mqtt://HOST/TOPIC", help="Publish the answers at a broker; mqtts:// for TLS.")
@_live("--show", is_flag=True, help="Serve a page with the live picture and the answers.")
@_live("--listen", callback=address, metavar="HOST:PORT", help="Serve health and metrics (and --show) there.")
@_updates("--watch", type=click.Path(path_type=Path), help="Always swap in the newest bundle of this folder.")
@_updates("--budget-ms", type=click.FloatRange(min=0), help="Give up a new bundle that is slower than this (p90).")
@_updates("--stop-first", is_flag=True, help="Drop the old bundle before loading the new one: needs less memory.")
@_updates("--allow-slower", is_flag=True, help="Swap in bundles that run on a slower backend too.")
@_updates(
    "--taught", type=click.Path(path_type=Path), metavar="DIR",
    help="Classes taught on this machine: a folder of images for each. 'teach' adds to it, also meanwhile.",
)  # fmt: skip
@_updates(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the most novel frames there; see 'kept'."
)
@_updates("--keep-mb", type=click.FloatRange(0.1), default=50, show_default=True, metavar="MB", help="Room for them.")
@backend_options
@backend_group(
    "--build", is_flag=True, help="Build a missing TensorRT engine; for a new bundle, while the old one answers."
)
@trial_option
def run(
    bundle: Path,
    sources: tuple[str, ...],
    size: tuple[int, int] | None,
    color: str,
    rate: float | None,
    live: bool | None,
    loop: bool,
    wait: bool,
    every: int,
    roi: Region | None,
    smooth: float | None,
    min_confidence: float,
    top: int,
    frames: int | None,
    on_change: bool,
    sink: Path | None,
    sink_mb: float,
    mqtt: str | None,
    show: bool,
    listen: tuple[str, int] | None,
    watch: Path | None,
    budget_ms: float | None,
    stop_first: bool,
    allow_slower: bool,
    taught: Path | None,
    keep: Path | None,
    keep_mb: float,
    build: bool,
    backend: str,
    threads: int | None,
    strict: bool,
    trial: bool,
) -> None:
    """Classify the frames of a camera, stream or file with the bundle BUNDLE; each answer is one JSON line.

    BUNDLE is the folder of a bundle, or a store that 'update' fills: its good bundle answers, and a new one is tried.

    Several cameras share one model: --source door=csi://0 --source yard=rtsp://HOST/PATH. Each answer names its camera.

    SOURCE is /dev/video0 or v4l2://0, csi://0 (a Jetson's camera), gst://PIPELINE, rtsp://HOST/PATH or another video
    address, a video file, an image, a folder of images, or - for raw frames on standard input. Cameras and streams:
    the newest frame is classified, older ones are dropped and counted, and a lost source is opened again. Files: every
    frame is classified.

    Only answers go to standard output, everything else to standard error; with --sink or --mqtt they go there instead.
    The command ends when the source does, or on Ctrl-C or SIGTERM, and then finishes in order.

    \b
    Example:
      duallora-edge run bundle --source csi://0 --smooth 0.5 --show
      duallora-edge run bundle --source photos/ --every 2
      ffmpeg -i clip.mp4 -f rawvideo -pix_fmt rgb24 - | duallora-edge run bundle --source - --size 640x480
    """
    named = _named(sources)
    store = Store(bundle) if (bundle / SLOTS_FILE).is_file() else None
    if store is not None and watch:
        raise click.UsageError(f"{bundle} is a store, which 'update' fills; leave out --watch.")
    taught = taught or (store.taught if store else None)

    def load(path: Path) -> Classifier:
        return Classifier.load(path, backend, threads, strict, build=build, trial=trial, taught=taught)

    watcher: Watcher | None = None
    with ExitStack() as stack:
        write = stack.enter_context(outlets(sink, sink_mb, mqtt, click.echo, _say))
        changes = Changes() if on_change else None
        classifier = open_slot(store, load) if store else load(bundle)
        _say(f"backend: {classifier.backend}")
        if taught:
            _say(classifier.health().taught_line)
        opened = {
            name: stack.enter_context(
                open_source(source, size=size, color=color, rate=rate, loop=loop, wait=wait, live=live)
            )
            for name, source in named.items()
        }
        smoothing = ExponentialSmoothing(smooth) if smooth else None
        pipeline = stack.enter_context(Pipeline(opened, classifier, every, roi, smoothing))
        monitor = Monitor(pipeline)
        if show or listen:
            from duallora_edge.runtime.service.live_server import LiveServer
            from duallora_edge.runtime.service.recorder import Recorder

            recorder = Recorder(monitor, taught, roi) if taught else None
            server = stack.enter_context(LiveServer(monitor, *(listen or LISTEN), pictures=show, recorder=recorder))
            _say(f"{'page' if show else 'health and metrics'}: {server.teach_url if show and taught else server.url}")
            if not server.is_local:
                _say(_OPEN.format(what="the camera and its answers" if show else "health and metrics"))
        if store is not None:
            terms = Terms(budget_ms=budget_ms, stop_first=stop_first, allow_slower=allow_slower)
            watcher = stack.enter_context(SlotKeeper(classifier, store, _say, terms))
        elif watch:
            watcher = BundleWatcher(classifier, watch, _say, budget_ms, stop_first, allow_slower)
            stack.enter_context(watcher)
        elif taught:
            watcher = stack.enter_context(Watcher(classifier, _say))
        keeper: Keeper | None = None
        if keep:
            from duallora_edge.runtime.field.keeping import Keeper

            keeper = stack.enter_context(closing(Keeper(keep, keep_mb)))
        stack.enter_context(watchdog(monitor.is_working))
        stack.enter_context(_stopped_by_signals(pipeline, watcher))
        notify("READY=1")
        _print_answers(pipeline, monitor, min_confidence, top, frames, _keeping(keeper, roi), changes, write)
        notify("STOPPING=1")
        _summary(monitor)
    if watcher is not None and watcher.is_stuck:
        _end_at_once(0)


def answer_json(answer: Answer, top: int) -> dict[str, Any]:
    """The line of an answer, as docs/camera.md describes it."""
    line = {
        "schema": SCHEMA,
        "camera": answer.camera,
        "sequence": answer.frame.sequence,
        "timestamp": round(answer.frame.timestamp, 6),
        "name": answer.frame.name,
        "age_ms": answer.age_ms,
        **answer.prediction.to_json(top),
    }
    if answer.instant is not answer.prediction:
        line["instant"] = {"label": answer.instant.label, "confidence": answer.instant.confidence}
    return line


def _keeping(keeper: Keeper | None, roi: Region | None) -> Callable[[Answer], None]:
    """Keeps what the model saw of the frame of each answer; that a disk is full is said once, and nothing ends."""
    failed = False

    def keep(answer: Answer) -> None:
        nonlocal failed
        try:
            if keeper is not None and not failed:
                keeper.add((roi(answer.frame) if roi else answer.frame).pixels, answer.instant)
        except (StoreError, OSError) as error:
            failed = True
            _say(f"no more frames are kept: {error}")

    return keep


def _print_answers(
    pipeline: Pipeline,
    monitor: Monitor,
    min_confidence: float,
    top: int,
    frames: int | None,
    keep: Callable[[Answer], None],
    changes: Changes | None,
    write: Write,
) -> None:
    for number, answer in enumerate(pipeline, start=1):
        monitor.add(answer)
        keep(answer)
        sure = answer.prediction.confidence >= min_confidence
        if sure and (changes is None or changes(answer.camera, answer.prediction)):
            write(json.dumps(answer_json(answer, top), allow_nan=False))
        if number == frames:
            return


@contextmanager
def _stopped_by_signals(pipeline: Pipeline, watcher: Watcher | None) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the answers within `STOP_S` seconds; the second one ends the process at once."""

    def stop(number: int, frame: object) -> None:
        for name in before:
            signal.signal(name, signal.SIG_DFL)
        pipeline.stop()
        if watcher is not None:
            watcher.cancel()
        # A model that hangs blocks the thread that waits for it, and that is this one.
        timer = threading.Timer(STOP_S, _end_at_once, (1,))
        timer.daemon = True
        timer.start()

    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _end_at_once(code: int) -> None:
    """End the process even though a library does not return."""
    _say("Ended while a model was loading or did not answer.")
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _say(text: str) -> None:
    click.echo(escaped(text), err=True)


def _summary(monitor: Monitor) -> None:
    health = monitor.health()
    seconds = health["uptime_s"]
    for name, camera in health["cameras"].items():
        _say(
            f"{f'camera {name}: ' if len(health['cameras']) > 1 else ''}{camera['answers']} answers in {seconds:.1f} s "
            f"({camera['answers'] / seconds:.1f} per second), {camera['dropped']} frames dropped, "
            f"{camera['refused']} refused, {camera['reconnects']} reconnects"
        )
        for line in (*camera["refusals"], camera["note"], camera["last_error"]):
            if line:
                _say(f"  {line}")
