"""Takes the time that its constructor is given, or always fails; for tests of balancing."""

import time

from model_interface import ModelInterface


class Model(ModelInterface):
    def __init__(self, ms=10, fails=False):
        self.ms = ms
        self.fails = fails

    def run(self, data, args):
        if self.fails:
            raise RuntimeError("this replica is broken")
        time.sleep(self.ms / 1000)
        return len(data)
