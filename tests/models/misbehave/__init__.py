"""Does what a model should not, as args["do"] says."""

import os
import signal
import sys
import threading
import time

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    timeout_s = 2

    def run(self, data, args):
        what = args.get("do")
        if what == "raise":
            raise KeyError("no such thing")
        if what == "invalid":
            raise InvalidInput("the image is upside down")
        if what == "exit":
            sys.exit(3)
        if what == "die":
            os._exit(7)
        if what == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "hang":
            time.sleep(60)
        if what == "junk":  # writes into whatever socket it finds, the one to the server too
            for fd in range(100):
                if os.path.exists(f"/proc/self/fd/{fd}") and "socket" in os.readlink(f"/proc/self/fd/{fd}"):
                    os.write(fd, b"\0\0\0\4junk")
        if what == "nonsense":
            return {"object": [object()]}
        if what == "cycle":
            cycle = []
            cycle.append(cycle)
            return cycle
        if what == "print":
            print("to stdout", flush=True)
            os.write(1, b"raw bytes \xff\n")
        if what == "threads":
            for _ in range(4):
                threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
        return {"pid": os.getpid()}
