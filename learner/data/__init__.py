"""Images: where they lie, what is wrong with them, and their pixels at the size of the model.

Random views of images are in `duallora_edge.learner.data.augment`, the only module here that imports torch.
"""

from duallora_edge.learner.data.health import HealthReport
from duallora_edge.learner.data.images import DatasetImage, ImageFile, ImageRef, ImageSet, Stream, TaskData
from duallora_edge.learner.data.prepare import PixelSet, PreparedStream, PreparedTask, prepare
from duallora_edge.learner.data.sources import open_stream

__all__ = [
    "DatasetImage",
    "HealthReport",
    "ImageFile",
    "ImageRef",
    "ImageSet",
    "PixelSet",
    "PreparedStream",
    "PreparedTask",
    "Stream",
    "TaskData",
    "open_stream",
    "prepare",
]
