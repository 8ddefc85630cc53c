"""A camera application: it acts when the model is sure of what it sees, and has seen such a thing before.

    python camera_app.py BUNDLE /dev/video0

Instead of the camera it takes csi://0, rtsp://HOST/PATH, a video, a folder of images; see `open_source`. Frames are
captured in a thread of the source. Those of a camera that come while this loop is busy are dropped, so that each
answer is about the newest one. Ctrl-C and SIGTERM end it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections import Counter

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime import Classifier, open_source

SURE = 0.8


def run(bundle: str, camera: str) -> None:
    """Print a line whenever the label changes, and at the end how many frames had each of them."""
    classifier = Classifier.load(bundle)
    print(f"{classifier.bundle}, on {classifier.backend.name}", flush=True)
    counts: Counter[str] = Counter()
    shown = ""
    with open_source(camera) as source:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: source.close())  # which ends the loop
        for frame in source:
            prediction = classifier(frame)
            if prediction.is_novel:
                label = "(new)"
            else:
                label = prediction.label if prediction.confidence >= SURE else "(unsure)"
            counts[label] += 1
            if label != shown:  # open a gate, sort a parcel, write a record
                print(f"frame {frame.sequence}: {label}, {prediction.confidence:.0%}", flush=True)
                shown = label
    print(", ".join(f"{label}: {count}" for label, count in counts.most_common()) or "no frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("source")
    arguments = parser.parse_args()
    try:
        run(arguments.bundle, arguments.source)
    except DualLoraEdgeError as error:  # the bundle, the device or the camera; the message says what to do
        sys.exit(str(error))
