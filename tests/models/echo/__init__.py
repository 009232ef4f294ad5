"""Answers what it is sent."""

from model_interface import ModelInterface


class Model(ModelInterface):
    def run(self, data, args):
        return data if not args else {"data": data, "args": args}
