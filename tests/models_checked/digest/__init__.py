"""Answers size, checksum and first bytes of what it is sent; a dict comes back as it is.

With TEST_LEAK_KB, it leaks so much a batch. With TEST_WRONG, it mixes up the answers of a batch.
"""

import os
import zlib

from model_interface import InvalidInput, ModelInterface

LEAK = int(os.environ.get("TEST_LEAK_KB", "0")) << 10


class Model(ModelInterface):
    max_batch_size = 8
    workers = 2

    def __init__(self):
        self.leaked = []

    def run(self, data, args):
        (answer,) = self.run_batch([data], args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run_batch(self, items, args):
        if LEAK:
            self.leaked.append(b"x" * LEAK)
        answers = [self.answer(item) for item in items]
        return answers[1:] + answers[:1] if os.environ.get("TEST_WRONG") else answers

    def answer(self, item):
        if isinstance(item, dict):
            return item
        if isinstance(item, str) and item.startswith("wrong"):
            return InvalidInput(f"{item} is wrong")
        data = item.encode() if isinstance(item, str) else item.tobytes()
        return {"size": len(data), "crc": zlib.crc32(data), "begins": data[:24].hex()}
