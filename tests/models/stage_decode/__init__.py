"""The first stage: a text to numbers."""

import time

import numpy as np

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    workers = 2

    def run(self, data, args):
        time.sleep(args.get("sleep", 0))
        if not data.isdigit():
            raise InvalidInput(f"{data!r} is no number")
        return np.array([int(data)])
