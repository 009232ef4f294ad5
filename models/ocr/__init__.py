"""Finds and reads text in photographs, with the PP-OCR networks that the package rapidocr ships as ONNX."""

import logging
from typing import Any

import numpy as np
from rapidocr import RapidOCR

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """An image HxWx3 uint8 in RGB in, a list of texts with their positions out."""

    example = np.full((64, 64, 3), 255, np.uint8)
    metadata = {"description": "PP-OCRv6, small: detection, orientation, recognition."}

    def __init__(self) -> None:
        self.engine = RapidOCR(
            params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": self.threads}
        )
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)

    def run(self, data: Any, args: dict[str, Any]) -> list[dict[str, Any]]:
        """``[{"text", "score", "box"}]``, the box being its 4 corners (4x2 float32: x, y)."""
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[2:] != (3,):
            raise InvalidInput("send an image HxWx3 of uint8 in RGB, or an image file")
        found = self.engine(np.ascontiguousarray(data[..., ::-1]))  # RapidOCR takes BGR
        if found.txts is None:
            return []
        return [
            {"text": text, "score": score, "box": box}
            for text, score, box in zip(found.txts, found.scores, found.boxes, strict=True)
        ]
