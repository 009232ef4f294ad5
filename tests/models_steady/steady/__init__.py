"""Takes the time that its constructor is given, also for large inputs, or always fails; for tests of balancing."""

import time

from model_interface import ModelInterface


class Model(ModelInterface):
    def __init__(self, ms=10, fails=False, large_ms=None):
        self.ms = ms
        self.large_ms = ms if large_ms is None else large_ms
        self.fails = fails

    def run(self, data, args):
        if self.fails:
            raise RuntimeError("this replica is broken")
        time.sleep((self.ms if len(data) < 100 else self.large_ms) / 1000)
        return len(data)
