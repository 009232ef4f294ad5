"""Runs model.onnx by onnxruntime. Put your own file in its place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime

from model_interface import ModelInterface

Features = Annotated[np.ndarray, np.number, (4,)]  # the server refuses what is not an array or a list of four numbers


class Model(ModelInterface):
    """Takes four numbers, as the model.onnx beside this file does: "input", float32 [any, 4]."""

    max_batch_size = 32  # most inputs in one run_batch
    mix_shapes = True  # integers and floats may be in one batch
    example = [5.1, 3.5, 1.4, 0.2]  # run once before the model counts as ready, and by `check`

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads  # so that several workers share the cores
        providers = onnxruntime.get_available_providers()  # a GPU comes first where onnxruntime-gpu is installed
        self.session = onnxruntime.InferenceSession(str(Path(__file__).parent / "model.onnx"), options, providers)

    def run(self, data: Features, args: dict[str, Any]) -> dict[str, Any]:
        """Returns ``{"class": 0, "probabilities": array}``."""
        return self.run_batch([data], args)[0]

    def run_batch(self, items: Sequence[Features], args: dict[str, Any]) -> list[dict[str, Any]]:
        """The same for several inputs, in one pass through the network."""
        (probabilities,) = self.session.run(["output"], {"input": np.stack(items).astype(np.float32)})
        return [{"class": int(row.argmax()), "probabilities": row} for row in probabilities]
