"""Optical flow between two frames: HxWx2 float32. Shows inputs of several arrays, and answers of any dtype."""

from typing import Any

import cv2
import numpy as np

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Two frames of one shape, HxW or HxWx3 uint8: by ``run([first, second])``, or as one image HxWx2 or HxWx6."""

    example = [np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)]

    def __init__(self) -> None:
        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def run(self, data: Any, args: dict[str, Any]) -> np.ndarray:
        """How far each pixel of the first frame moved: flow[y, x] is (dx, dy) in pixels."""
        if isinstance(data, np.ndarray) and data.ndim == 3 and data.shape[2] in (2, 6):
            data = np.split(data, 2, axis=2)
        if not isinstance(data, list) or len(data) != 2 or not all(isinstance(frame, np.ndarray) for frame in data):
            raise InvalidInput("send two frames: run([first, second]), or one image HxWx2 or HxWx6")
        first, second = (grey(frame) for frame in data)
        if first.shape != second.shape or min(first.shape) < 16:
            raise InvalidInput(
                f"the frames must have one shape of 16x16 at least, not {first.shape} and {second.shape}"
            )
        return self.flow.calc(first, second, None)


def grey(frame: np.ndarray) -> np.ndarray:
    """A frame as HxW uint8."""
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or frame.shape[2:] not in ((), (1,), (3,)):
        raise InvalidInput(f"a frame is HxW or HxWx3 of uint8, not {frame.dtype} of shape {frame.shape}")
    if frame.shape[2:] == (3,):
        return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    return np.ascontiguousarray(frame.reshape(frame.shape[:2]))
