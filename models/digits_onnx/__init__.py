"""The network of ``digits`` as ONNX, run by onnxruntime. Shows how to serve an exported file without PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Takes an image of a light digit on a dark ground, grey or RGB."""

    example = np.zeros((8, 8), np.uint8)
    metadata = {"description": "The network of the model digits, exported to ONNX.", "accuracy": 0.9861}

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads  # so that several workers share the cores
        self.session = onnxruntime.InferenceSession(str(Path(__file__).parent / "network.onnx"), options)

    def get_input_shape(self) -> list[int]:
        """The size that images are scaled to."""
        return [8, 8]

    def run(self, data: Any, args: dict[str, Any]) -> Any:
        """``{"digit", "probabilities"}``."""
        return self.run_batch([data], args)[0]

    def run_batch(self, items: Sequence[Any], args: dict[str, Any]) -> list[Any]:
        """The same for several images in one pass through the network."""
        (logits,) = self.session.run(["logits"], {"image": np.stack([prepare(image) for image in items])})
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return [{"digit": int(row.argmax()), "probabilities": row / row.sum()} for row in exponents]


def prepare(image: Any) -> np.ndarray:
    """An image HxW or HxWx3 (uint8 0..255, or floats 0..1) as 1x8x8 float32 in 0..1."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise InvalidInput("a digit is an image HxW or HxWx3")
    grey = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    return cv2.resize(grey.mean(axis=2) if grey.ndim == 3 else grey, (8, 8), interpolation=cv2.INTER_AREA)[None]
