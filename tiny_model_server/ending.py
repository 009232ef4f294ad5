"""The end of the process, whatever its threads are busy with."""

import faulthandler
import logging
import os
import threading

log = logging.getLogger("tiny_model_server")

_LAST_S = 2.0


def within(seconds: float) -> None:
    """Ends the process with code 1 after ``seconds``, and writes where its threads are; a later call replaces this one.

    A thread of C code does it, which needs no interpreter lock: an orderly stop that hangs cannot hold it up.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


def leave(code: int) -> int:
    """Returns the exit code, and ends the process with it soon, though Python would wait for busy threads."""

    def leave_now() -> None:
        busy = [thread.name for thread in threading.enumerate() if not thread.daemon and thread.is_alive()]
        log.warning("the process ends while threads are busy: %s", ", ".join(busy))
        os._exit(code)

    within(3 * _LAST_S)  # of the stop's own time little may be left, and that exit would have another code
    last = threading.Timer(_LAST_S, leave_now)
    last.daemon = True
    last.start()
    return code
