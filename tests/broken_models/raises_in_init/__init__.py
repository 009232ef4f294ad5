"""Cannot be constructed."""

from model_interface import ModelInterface


class Model(ModelInterface):
    def __init__(self):
        raise FileNotFoundError("weights.pt")

    def run(self, data, args):
        return None
