"""What the front starts as ``python worker_path FD`` in a model's interpreter; FD is the control socket.

It must run on Pythons that are too old for a worker, so that it can say so.
"""

import os
import pickle
import struct
import sys

OLDEST = (3, 9)
"""The oldest Python that a worker runs on."""


_HEADER = struct.Struct("<IQIB")  # as in worker_connection.py, which this Python may be unable to import
_MARK = 0x7E5A11ED


def _refuse(control: int, reason: str) -> None:
    os.read(control, 1 << 16)
    data = pickle.dumps(("failed", reason), 2)
    os.write(control, _HEADER.pack(_MARK, len(data), 0, 0) + data)
    sys.exit(1)


def main() -> None:
    """Becomes the guardian and, in a process below it, the worker."""
    control = int(sys.argv[1])
    need = "a model's own interpreter must be Python {}.{} or newer, with numpy".format(*OLDEST)
    found = "{} is Python {}.{}".format(sys.executable, *sys.version_info)
    if sys.version_info < OLDEST:
        return _refuse(control, f"{need}; {found}")
    from tiny_model_server.engine import guardian

    guardian.guard(control)
    sys.path.insert(1, os.getcwd())
    try:
        import numpy  # noqa: F401
    except Exception as error:
        return _refuse(control, f"{need}; {found}, where numpy cannot be imported: {type(error).__name__}: {error}")
    from tiny_model_server.engine import worker

    worker.main()


if __name__ == "__main__":
    main()
