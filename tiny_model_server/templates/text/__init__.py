"""Counts the words of a text. Put your own model in its place."""

from typing import Any

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Takes a text."""

    example = "three little words"  # run once before the model counts as ready, and by `check`

    def __init__(self) -> None:
        self.separator = None  # load weights here: this runs once in each worker

    def run(self, data: str, args: dict[str, Any]) -> dict[str, int]:
        """Returns ``{"words": 3}``. The annotation lets the server refuse what is not a text."""
        words = data.split(self.separator)
        if not words:
            raise InvalidInput("the text has no words")  # the caller's mistake; any other exception is the model's
        return {"words": len(words)}
