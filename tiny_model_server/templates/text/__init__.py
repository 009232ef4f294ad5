"""Counts the words of a text. Put your own model in its place."""

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Takes a text."""

    example = "three little words"  # run once before the model counts as ready, and by `check`

    def __init__(self):
        self.separator = None  # load weights here: this runs once in each worker

    def run(self, data, args):
        """Returns ``{"words": 3}``."""
        if not isinstance(data, str):
            raise InvalidInput("send a text")
        return {"words": len(data.split(self.separator))}
