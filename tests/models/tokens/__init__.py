"""Yields numbers, as a language model yields tokens."""

import os
import time

import numpy as np

from model_interface import InvalidInput, ModelInterface

CLOSED = os.environ.get("TEST_CLOSED")


class Model(ModelInterface):
    def run(self, data, args):
        try:
            for index in range(data):
                if index == args.get("fail_at"):
                    raise InvalidInput("no more")
                if index == args.get("die_at"):
                    os._exit(9)
                time.sleep(args.get("sleep", 0))
                yield {"index": index, "array": np.full(100_000, index)}
        finally:
            if CLOSED:
                with open(CLOSED, "a") as file:
                    file.write("closed\n")
