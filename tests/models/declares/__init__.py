"""Declares what it takes, and is built with arguments from outside."""

from model_interface import ModelInterface


class Model(ModelInterface):
    metadata = {"inputs": [{"name": "image", "dtype": "uint8", "shape": [-1, -1, 3]}], "author": "tests"}

    def __init__(self, factor=1):
        self.factor = factor

    def get_input_shape(self):
        return (224, 224, 3)

    def run(self, data, args):
        return data.mean() * self.factor
