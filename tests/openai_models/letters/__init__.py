"""Embeds a text as the counts of its letters; says in its usage how many characters it has read."""

import time

import numpy as np

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    metadata = {"task": "embeddings", "author": "tests"}
    max_wait_ms = 20
    queue_size = 2000

    def run_batch(self, items, args):
        time.sleep(args.get("sleep_s", 0))
        return [self._embed(text, len(items), args) for text in items]

    def run(self, data, args):
        return self.run_batch([data], args)[0]

    def _embed(self, text, size, args):
        if text == "batch":
            return np.array([size], np.float64)
        if text == "args":
            return [float(len(args)), *map(float, sorted(map(len, args)))]
        if text == "wrong":
            return InvalidInput("this text cannot be embedded")
        if text == "matrix":
            return np.zeros((2, 2))
        if text == "words":
            return {"embedding": "words"}
        if text == "usage":
            return {"embedding": [1], "usage": {"prompt_tokens": "many"}}
        counts = np.array([text.count(chr(97 + index)) for index in range(args.get("dimensions", 26))], np.float32)
        return {"embedding": counts / 4, "usage": {"prompt_tokens": len(text)}}
