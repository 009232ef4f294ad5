"""Is the server's own package ``tiny_model_server``: has its path, and runs its code in the place of this module's."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
__file__ = f"{__path__[0]}/__init__.py"
exec(compile(Path(__file__).read_bytes(), __file__, "exec"))
