"""Describes what arrived: type, dtype, shape, sum."""

import numpy as np

from model_interface import ModelInterface


class Model(ModelInterface):
    def run(self, data, args):
        if isinstance(data, np.ndarray):
            return {
                "dtype": str(data.dtype),
                "shape": data.shape,
                "first": data.flat[0],
                "writable": data.flags.writeable,
            }
        return {"type": type(data).__name__}
