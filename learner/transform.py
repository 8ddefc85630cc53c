"""Images as the network reads them, for data loaders outside of this package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duallora_edge.errors import DataError
from duallora_edge.runtime.preprocess import Preprocessing, to_rgb


@dataclass(frozen=True)
class Transform:
    """The preprocessing of a run and the normalisation of its backbone in one, bit for bit. It can be pickled.

    Attributes:
        preprocessing: brings an image to the size of the network.
        mean, std: of the RGB values in 0..1.
    """

    preprocessing: Preprocessing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Normalised values float32 [3, S, S] of an image as `runtime.read_image` reads it, uint8 [H, W, 3] in RGB.

        Raises:
            DataError: It is something else. An image of Pillow is not taken, since it may lie on its side.
        """
        if not isinstance(image, np.ndarray):
            raise DataError(f"The transform takes an array, not {type(image).__name__}; read images with read_image.")
        pixels = torch.from_numpy(self.preprocessing(to_rgb(image)).copy()).permute(2, 0, 1).float()
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std
