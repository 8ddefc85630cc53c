"""duallora-edge: continual learning of vision transformers for edge devices."""

__version__ = "0.2.0"
