"""The folder with which ``sys.path`` of a worker begins, and so that of each process that its model starts.

It has the server's own modules by name, and ``models``. Nothing else of the place where the server is installed can be
imported from it: what a model needs comes from the model's own interpreter. ``multiprocessing`` (spawn and forkserver)
and joblib hand ``sys.path`` to their processes, so functions of a model's module can be unpickled there.
"""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


def load(name: str) -> None:
    """Puts the server's own module of this name into the place of the one that is being imported."""
    spec = importlib.util.spec_from_file_location(name, _ROOT / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
