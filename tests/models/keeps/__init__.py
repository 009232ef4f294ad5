"""Keeps the frame before this one, as a tracker does, and answers it."""

from model_interface import ModelInterface


class Model(ModelInterface):
    def __init__(self):
        self.before = None

    def run(self, data, args):
        before, self.before = self.before, data[:1]
        return before
