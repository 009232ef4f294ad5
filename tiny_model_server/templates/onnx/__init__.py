"""Runs model.onnx by onnxruntime. Put your own file in its place."""

from pathlib import Path

import numpy as np
import onnxruntime

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Takes four numbers, as the model.onnx beside this file does: "input", float32 [any, 4]."""

    max_batch_size = 32  # most inputs in one run_batch
    example = [5.1, 3.5, 1.4, 0.2]  # run once before the model counts as ready, and by `check`

    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads  # so that several workers share the cores
        providers = onnxruntime.get_available_providers()  # a GPU comes first where onnxruntime-gpu is installed
        self.session = onnxruntime.InferenceSession(str(Path(__file__).parent / "model.onnx"), options, providers)

    def run(self, data, args):
        """Returns ``{"class": 0, "probabilities": array}``."""
        return self.run_batch([data], args)[0]

    def run_batch(self, items, args):
        """The same for several inputs, in one pass through the network."""
        (probabilities,) = self.session.run(["output"], {"input": np.stack([features(item) for item in items])})
        return [{"class": int(row.argmax()), "probabilities": row} for row in probabilities]


def features(item):
    """A list or an array of four numbers as float32."""
    try:
        return np.asarray(item, np.float32).reshape(4)
    except (TypeError, ValueError):
        raise InvalidInput("send four numbers") from None
