"""Answers piece by piece. Put your own model in its place."""

from collections.abc import Iterator
from dataclasses import dataclass

from model_interface import ModelInterface


@dataclass
class Options:
    """The args of a call; the server refuses others."""

    most: int = 1000


class Model(ModelInterface):
    """Takes a text. ``run_stream`` gets each piece as it comes, and other calls get the list of all."""

    concurrency = 4  # callers that are answered at once in a worker
    example = "three little words"  # run once before the model counts as ready, and by `check`

    def __init__(self) -> None:
        self.separator = None  # load weights here: this runs once in each worker

    def run(self, data: str, args: Options) -> Iterator[str]:
        """Yields the words one by one."""
        yield from data.split(self.separator)[: args.most]
