"""The command ``tiny-model-server``, which is ``server.py`` of an installed package."""

import sys


def main() -> int:
    """Runs the launcher; where only the client was installed, says what is missing."""
    try:
        from tiny_model_server import cli
    except ModuleNotFoundError as error:
        print(f"error: {error}; the server needs: pip install 'tiny-model-server[server]'", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
