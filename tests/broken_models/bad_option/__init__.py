"""Declares nonsense."""

from model_interface import ModelInterface


class Model(ModelInterface):
    max_batch_size = "many"

    def run(self, data, args):
        return None
