"""Four cameras and one model: what each of them gets, and what happens when one of them goes away.

    python benchmarks/cameras.py BUNDLE --images FOLDER --minutes 20 --json cameras.json

The images of FOLDER become four videos of 640 x 480 (H.264, 30 frames a second). Three are read as files in a loop, as
fast as a camera gives frames; the fourth comes from a GStreamer RTSP server, which is killed in the middle and started
again after 20 s. ``--batch N`` lets up to N frames that wait go through the model together, as on a GPU; without it
they go one by one, as a CPU does by itself. Memory is that of `soak.py`. Needs the system's Python with Debian's
gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-ugly, gstreamer1.0-libav and gstreamer1.0-rtsp.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from soak import SAMPLE_S, slope

from duallora_edge.files import write_json
from duallora_edge.runtime import Classifier, Prediction, open_source
from duallora_edge.runtime.classifier import Prepared
from duallora_edge.runtime.process_memory import read_pss
from duallora_edge.runtime.service.monitor import Monitor
from duallora_edge.runtime.service.pipeline import Pipeline

RATE, SIZE, SECONDS, AWAY_S = 30, (640, 480), 20, 20.0
CAMERAS = ("north", "east", "south", "rtsp")
SERVER = """
import sys, gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(
    f'( multifilesrc location="{sys.argv[2]}" loop=true caps="image/jpeg,framerate=30/1" ! jpegdec ! videoconvert '
    '! video/x-raw,format=I420 ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=30 '
    '! rtph264pay name=pay0 pt=96 )'
)
factory.set_shared(True)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[1])
server.get_mount_points().add_factory("/camera", factory)
server.attach(None)
GLib.MainLoop().run()
"""


class Batching(Classifier):
    """Lets up to ``limit`` frames through together, and counts how many there were."""

    limit = 1
    batches: Counter[int]

    @property
    def max_batch(self) -> int:
        return self.limit

    def answer(self, prepared: Sequence[Prepared]) -> list[Prediction]:
        self.batches[len(prepared)] += 1
        return super().answer(prepared)


def write_frames(images: Path, folder: Path, number: int) -> None:
    """Frames of a camera that pans over images, as JPEG files."""
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = np.random.default_rng(number).choice(len(paths), 2 * SECONDS)
    folder.mkdir()
    for index in range(SECONDS * RATE):
        with Image.open(paths[chosen[2 * index // RATE]]) as image:
            scaled = image.convert("RGB").resize((720, 540), Image.Resampling.BILINEAR)
        shift = 80 * (index % (RATE // 2)) // (RATE // 2)
        scaled.crop((shift, 30, shift + SIZE[0], 30 + SIZE[1])).save(folder / f"{index:05d}.jpg", quality=85)


def encode(frames: Path, video: Path) -> None:
    pipeline = (
        f"multifilesrc location={frames}/%05d.jpg caps=image/jpeg,framerate={RATE}/1 ! jpegdec ! videoconvert ! "
        f"x264enc speed-preset=ultrafast key-int-max={RATE} ! mp4mux ! filesink location={video}"
    )
    subprocess.run(["gst-launch-1.0", "-q", "-e", *pipeline.split()], check=True)


@contextmanager
def rtsp_server(port: int, frames: Path) -> Iterator[None]:
    command = ["/usr/bin/python3", "-c", SERVER, str(port), str(frames / "%05d.jpg")]
    server = subprocess.Popen(command)
    try:
        yield
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def serve(port: int, frames: Path, minutes: float, ends: threading.Event) -> None:
    """The camera of the RTSP server, away in the middle."""
    with rtsp_server(port, frames):
        ends.wait(30 * minutes)
    ends.wait(AWAY_S)
    if not ends.is_set():
        with rtsp_server(port, frames):
            ends.wait()


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--images", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(bundle: Path, images: Path, minutes: float, batch: int, threads: int, json_path: Path | None) -> None:
    ends, memory = threading.Event(), list[tuple[float, int]]()
    waits: dict[str, array[float]] = {}
    last, order = dict.fromkeys(CAMERAS, -1), 0
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        for number, camera in enumerate(CAMERAS):
            write_frames(images, folder / camera, number)
        for camera in CAMERAS[:3]:
            encode(folder / camera, folder / f"{camera}.mp4")
            shutil.rmtree(folder / camera)
        port = free_port()
        away = threading.Thread(target=serve, args=(port, folder / "rtsp", minutes, ends))
        away.start()
        stack.callback(away.join)
        stack.callback(ends.set)
        classifier = Batching.load(bundle, "cpu", threads)
        classifier.limit, classifier.batches = batch, Counter()
        sources: dict[str, Any] = {
            camera: open_source(str(folder / f"{camera}.mp4"), live=True, loop=True, rate=RATE)
            for camera in CAMERAS[:3]
        }
        sources["rtsp"] = open_source(f"rtsp://127.0.0.1:{port}/camera", wait=True)
        pipeline = stack.enter_context(Pipeline(sources, classifier))
        monitor = Monitor(pipeline)
        begin = sampled = time.monotonic()
        for answer in pipeline:
            monitor.add(answer)
            now = time.monotonic()
            order += answer.frame.sequence <= last[answer.camera]
            last[answer.camera] = answer.frame.sequence
            waits.setdefault(answer.camera, array("f")).append(answer.age_ms)
            if now - sampled >= SAMPLE_S:
                sampled = now
                memory.append((now - begin, read_pss().bytes or 0))
            if now - begin > 60 * minutes:
                break
        health = monitor.health()
    report: dict[str, Any] = {"minutes": minutes, "batch": batch, "out_of_order": order}
    for camera, facts in health["cameras"].items():
        p50, p90, longest = np.percentile(waits.get(camera, [np.nan]), (50, 90, 100))
        report[camera] = {key: facts[key] for key in ("captured", "answers", "dropped", "reconnects", "last_error")}
        report[camera]["age_ms"] = {"p50": float(p50), "p90": float(p90), "max": float(longest)}
    report["batches"] = {str(size): count for size, count in sorted(classifier.batches.items())}
    middle, low, high = slope(memory)
    report["pss_mb"] = [memory[0][1] / 1e6, memory[-1][1] / 1e6]
    report["pss_slope_mb_per_hour"] = {"line": middle, "p5": low, "p95": high}
    for key, value in report.items():
        click.echo(f"{key:<22} {value}")
    if json_path is not None:
        write_json(json_path, report)


if __name__ == "__main__":
    main()
