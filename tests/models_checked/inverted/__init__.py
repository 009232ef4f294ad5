"""Answers the negative of an image."""

from model_interface import ModelInterface


class Model(ModelInterface):
    def run(self, data, args):
        return 255 - data
