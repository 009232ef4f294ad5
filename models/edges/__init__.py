"""An OpenCV model, image to image: the contours of an image. Shows answers that are images."""

from typing import Any

import cv2
import numpy as np

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """HxW or HxWx3 uint8 in, HxW uint8 out (255 on a contour)."""

    example = np.zeros((16, 16, 3), np.uint8)

    def run(self, data: Any, args: dict[str, Any]) -> np.ndarray:
        """``args["low"]`` and ``args["high"]`` are Canny's two thresholds (100 and 200 by default)."""
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[2:] not in ((), (3,)):
            raise InvalidInput("send an image HxW or HxWx3 of uint8")
        return cv2.Canny(data, args.get("low", 100), args.get("high", 200))
