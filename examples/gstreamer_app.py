"""An application around a GStreamer pipeline of its own: one branch is recorded, the other one is classified.

    python gstreamer_app.py BUNDLE
    python gstreamer_app.py BUNDLE --camera 'v4l2src device=/dev/video0 ! jpegdec' --record clip.mkv

``--camera`` is everything up to decoded video: a test picture when it is left out, on a Jetson
``nvarguscamerasrc ! nvvidconv ! video/x-raw``, from a file ``filesrc location=clip.mkv ! decodebin``. GStreamer runs in
a process of its own, which is started again when the camera is lost or the file ends. Ctrl-C and SIGTERM end both.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime import Classifier, ExponentialSmoothing, Pipeline, open_source

TEST_PICTURE = "videotestsrc is-live=true pattern=ball ! video/x-raw,width=640,height=480,framerate=30/1"
# More than the model takes (here 64 to 256): the last step is left to the library, which scales as in training.
SIDE = 480
# The source ends in raw video of any colour format and of that size. The queue holds the newest frame alone, so that
# this branch never delays the other one.
CLASSIFIED = "queue leaky=downstream max-size-buffers=1 ! videoconvert ! aspectratiocrop aspect-ratio=1/1 ! videoscale"
# Matroska, for a file in it can be played however it came to its end. Instead: "autovideosink sync=false".
RECORDED = "queue ! videoconvert ! jpegenc ! matroskamux ! filesink location={file}"


def describe(camera: str, record: str | None) -> str:
    """The pipeline as text, as gst-launch-1.0 takes it."""
    if record is None:
        return f"{camera} ! {CLASSIFIED}"
    return f"{camera} ! tee name=all  all. ! {RECORDED.format(file=shlex.quote(record))}  all. ! {CLASSIFIED}"


def run(bundle: str, camera: str, record: str | None) -> None:
    """Print a line whenever the label changes, averaged over half a second, and the age of the picture."""
    classifier = Classifier.load(bundle)
    source = open_source(f"gst://{describe(camera, record)}", size=(SIDE, SIDE))
    # Captures, prepares and runs the model in three threads, each of them on another frame.
    with Pipeline(source, classifier, smoothing=ExponentialSmoothing(0.5)) as answers:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: answers.stop())
        shown = ""
        for answer in answers:
            prediction = answer.prediction
            if prediction.label != shown:
                shown = prediction.label
                what = f"{shown}, {prediction.confidence:.0%}{', novel' if prediction.is_novel else ''}"
                print(f"frame {answer.frame.sequence}: {what}, {answer.age_ms:.0f} ms old", flush=True)
        dropped = source.stats.dropped + answers.cameras[0].dropped
        print(f"{source.stats.captured} frames, {dropped} of them too many to classify")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--camera", metavar="PIPELINE", default=TEST_PICTURE)
    parser.add_argument("--record", metavar="FILE.mkv")
    arguments = parser.parse_args()
    try:
        run(arguments.bundle, arguments.camera, arguments.record)
    except DualLoraEdgeError as error:
        sys.exit(str(error))
