"""Answers piece by piece. Put your own model in its place."""

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """Takes a text. ``run_stream`` gets each piece as it comes, and other calls get the list of all."""

    concurrency = 4  # callers that are answered at once in a worker
    example = "three little words"  # run once before the model counts as ready, and by `check`

    def __init__(self):
        self.most = 1000  # load weights here: this runs once in each worker

    def run(self, data, args):
        """Yields the words one by one, up to ``args["most"]``."""
        if not isinstance(data, str):
            raise InvalidInput("send a text")
        most = args.get("most", self.most)
        if not isinstance(most, int):
            raise InvalidInput("args['most'] must be a whole number")
        yield from data.split()[:most]
