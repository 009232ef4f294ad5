"""Reports its worker; sleeps, dies, counts and allocates as args say."""

import os
import signal
import time

import numpy as np

from model_interface import ModelInterface, count, observe

CALLS = os.environ.get("TEST_CALLS")


class Model(ModelInterface):
    max_batch_size = 4

    def run(self, data, args):
        return self.run_batch([data], args)[0]

    def run_batch(self, items, args):
        if CALLS:
            with open(CALLS, "a") as file:
                file.writelines(f"{item}\n" for item in items)
        count("items", len(items))
        observe("size", len(items))
        time.sleep(args.get("sleep", 0))
        if "kill" in items:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.get("allocate"):
            np.ones(1 << 40)
        if args.get("too_few"):
            return [1]
        return [{"item": item, "pid": os.getpid(), "threads": self.threads, "env": dict(os.environ)} for item in items]
