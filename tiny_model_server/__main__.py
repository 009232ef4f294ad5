"""The command ``tiny-model-server``: the same as ``server.py``, for an installed package.

It must run on any Python 3, and without any package, so that it can say what is missing.
"""

import os
import sys

OLDEST = (3, 11)
"""The oldest Python that the server runs on."""


def main():  # type: () -> int
    """Runs the command line and returns its exit code: 2 if this Python lacks what the server needs."""
    if sys.version_info < OLDEST:
        found = "{} is Python {}.{}".format(sys.executable, *sys.version_info)
        return _refuse("the server needs Python {}.{} or newer; {}".format(*OLDEST, found))
    try:
        from tiny_model_server import cli

        return cli.main()  # which imports more
    except ModuleNotFoundError as error:
        if str(error.name).startswith("tiny_model_server"):
            raise
        return _refuse("{}, in {}".format(error, sys.executable))


def _refuse(reason):  # type: (str) -> int
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.join(root, ".venv", "bin", "python")
    advice = "the server needs: pip install 'tiny-model-server[server]'"
    if os.path.exists(os.path.join(root, "Makefile")):  # a clone
        advice = "use make serve, which installs what the server needs"
        if os.path.exists(python):
            advice = "use {} server.py, or make serve".format(os.path.relpath(python))
    print("error: {}; {}".format(reason, advice), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
