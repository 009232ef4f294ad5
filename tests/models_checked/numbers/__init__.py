"""Yields so many values that carry the caller's tag and their number, after a pause each; may fail on the way.

With TEST_WRONG, the third value is lost in half of the streams, and comes twice in the others.
"""

import os
import time

import numpy as np

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    concurrency = 8

    def run(self, data, args):
        for index in range(data["count"]):
            time.sleep(data["pause"])
            if index == data.get("fails_at"):
                raise InvalidInput(f"{data['tag']} fails")
            value = {"tag": data["tag"], "index": index, "array": np.full(data["size"], data["seed"] + index)}
            yield from [value] * self.times(data, index)

    def times(self, data, index):
        return 1 if index != 2 or not os.environ.get("TEST_WRONG") else data["seed"] % 2 * 2
