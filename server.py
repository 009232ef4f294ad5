"""Starts Tiny Model Server: ``python server.py [serve | check NAME | list]``."""

import sys

from tiny_model_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
