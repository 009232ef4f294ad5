"""Reports with how many others an item was run; -1 is a bad item, -2 one that breaks the whole batch."""

import time

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    max_batch_size = 8

    def run(self, data, args):
        time.sleep(args.get("sleep", 0))
        if data < 0:
            raise InvalidInput(f"{data} is negative")
        return [data, 1]

    def run_batch(self, items, args):
        time.sleep(args.get("sleep", 0))
        if -2 in items:
            raise RuntimeError("the batch is broken")
        return [InvalidInput(f"{item} is negative") if item < 0 else [item, len(items)] for item in items]
