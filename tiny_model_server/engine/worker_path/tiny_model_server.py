"""Stands for the server's own package ``tiny_model_server``."""

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    __name__, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
assert _spec
assert _spec.loader
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
