"""Starts Tiny Model Server: ``python server.py [serve | check | list | health | new | dockerfile | proto]``."""

import sys

from tiny_model_server.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
