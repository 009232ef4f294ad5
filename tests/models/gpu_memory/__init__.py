"""Pretends that a GPU has room for three items at once."""

from model_interface import ModelInterface


class OutOfMemoryError(RuntimeError):
    """What torch calls it."""


class Model(ModelInterface):
    max_batch_size = 16

    def run(self, data, args):
        if data == "huge":
            raise OutOfMemoryError("CUDA out of memory")
        return [data, 1]

    def run_batch(self, items, args):
        if len(items) > 3:
            raise OutOfMemoryError("CUDA out of memory")
        return [[item, len(items)] for item in items]
