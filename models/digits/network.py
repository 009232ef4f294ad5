"""The network and its input; ``train.py`` and the model share them."""

import cv2
import numpy as np
from torch import nn

from model_interface import InvalidInput


class Network(nn.Sequential):
    """Nx1x8x8 float32 in 0..1 to N x 10 logits."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, 10),
        )  # fmt: skip


def to_input(image: np.ndarray) -> np.ndarray:
    """An image HxW or HxWx3 (uint8 0..255, or floats 0..1) as 1x8x8 float32 in 0..1."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InvalidInput("a digit is an image HxW or HxWx3")
    scale = 255 if image.dtype == np.uint8 else 1
    grey = image.astype(np.float32) / scale
    if grey.ndim == 3:
        grey = grey.mean(axis=2)
    return cv2.resize(grey, (8, 8), interpolation=cv2.INTER_AREA)[None]
