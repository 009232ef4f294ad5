"""The package ``models`` of a worker and of the processes that its model starts: it finds the worker's model.

The folder of the model may have any name, and its alias another one; the modules beside it are found by their folders.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tiny_model_server import PLUGIN

_name, _, _folder = os.environ.get(PLUGIN, "").partition("=")
__path__ = [os.path.dirname(_folder)]  # which makes this module a package


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != f"models.{_name}":
            return None
        return importlib.util.spec_from_file_location(
            fullname, os.path.join(_folder, "__init__.py"), submodule_search_locations=[_folder]
        )


sys.meta_path.insert(0, _Finder())
