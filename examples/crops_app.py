"""A detector finds things, the model names them: all boxes of a picture in one inference.

    python crops_app.py BUNDLE PICTURE

The detector here takes whatever stands out from an even background (OpenCV, the extra `[camera]`). Put yours in place
of `find`: `detections.xyxy` of supervision and `result.boxes.xyxy.cpu().numpy()` of Ultralytics are such boxes.
"""

from __future__ import annotations

import argparse
import sys

import cv2
import numpy as np

from duallora_edge.errors import DualLoraEdgeError
from duallora_edge.runtime import Classifier, read_image

CONTRAST = 50  # of 255, to the background
SMALLEST = 0.0005  # of the picture


def find(picture: np.ndarray) -> np.ndarray:
    """Boxes float32 [N, 4] of left, top, right, bottom, from left to right."""
    background = np.median(picture, axis=(0, 1))
    mask = (np.abs(picture - background).max(axis=2) > CONTRAST).astype(np.uint8)
    shapes, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found = [cv2.boundingRect(shape) for shape in shapes]
    boxes = [(x, y, x + width, y + height) for x, y, width, height in found if width * height > SMALLEST * mask.size]
    return np.array(sorted(boxes), np.float32).reshape(-1, 4)


def run(bundle: str, path: str) -> None:
    """Print a line for each thing in the picture."""
    classifier, picture = Classifier.load(bundle), read_image(path)
    boxes = find(picture)
    for (left, top, right, bottom), prediction in zip(boxes, classifier.crops(picture, boxes), strict=True):
        label = "(new)" if prediction.is_novel else prediction.label
        print(f"{left:.0f},{top:.0f} to {right:.0f},{bottom:.0f}: {label}, {prediction.confidence:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("picture")
    arguments = parser.parse_args()
    try:
        run(arguments.bundle, arguments.picture)
    except DualLoraEdgeError as error:  # the bundle, the device or the picture; the message says what to do
        sys.exit(str(error))
