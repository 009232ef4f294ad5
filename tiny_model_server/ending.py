"""Ends the process in time, though a thread may hang."""

import faulthandler
import os
import threading

_LAST_S = 2.0


def within(seconds: float) -> None:
    """Ends the process with code 1 after ``seconds``, with a traceback of each thread. A later call replaces this one.

    A thread of C code does it, which needs no interpreter lock, so that a stop that hangs cannot prevent it.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


def leave(code: int) -> int:
    """Returns the exit code. Ends the process with it in two seconds, because Python would wait for busy threads."""
    within(3 * _LAST_S)  # replaces the limit of the stop: it may be near, and its exit code is another
    last = threading.Timer(_LAST_S, os._exit, [code])
    last.daemon = True
    last.start()
    return code
