"""The second stage: doubles, and counts what it saw."""

import time

from model_interface import ModelInterface, count


class Model(ModelInterface):
    def run(self, data, args):
        time.sleep(args.get("sleep", 0))
        count("doubled")
        return data * 2
