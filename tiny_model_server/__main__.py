"""The command ``tiny-model-server``: the same as ``server.py``, for an installed package."""

import sys


def main() -> int:
    """Runs the command line; if only the client is installed, reports what the server needs."""
    try:
        from tiny_model_server import cli
    except ModuleNotFoundError as error:
        print(f"error: {error}; the server needs: pip install 'tiny-model-server[server]'", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
