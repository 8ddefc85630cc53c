"""Where frames come from: cameras, streams, videos, folders, raw bytes, arrays; all behind `open_source`."""

from __future__ import annotations

from duallora_edge.runtime.sources.files import SUFFIXES, find_images
from duallora_edge.runtime.sources.frame import Frame
from duallora_edge.runtime.sources.opening import open_source
from duallora_edge.runtime.sources.policy import Statistics
from duallora_edge.runtime.sources.source import EndOfStream, Source

__all__ = ["SUFFIXES", "EndOfStream", "Frame", "Source", "Statistics", "find_images", "open_source"]
