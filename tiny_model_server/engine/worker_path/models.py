"""The package ``models`` of a worker and of the processes that its model starts: it finds the worker's model.

The folder of the model may have any name, and its alias another one. The modules in it are found by their folder.
Folders beside it that begin with "_" hold code that models share.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from tiny_model_server import PLUGIN

_name, _, _folder = os.environ.get(PLUGIN, "").partition("=")
__path__ = [os.path.dirname(_folder)]  # which makes this module a package


class _Loader(SourceFileLoader):
    """Compiles a model's files anew: Python takes a file of the same second and size for one that has not changed."""

    def path_stats(self, path: Any) -> Any:
        raise OSError


class _Finder:
    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not f"{fullname}.".startswith((f"models.{_name}.", "models._")):
            return None
        if fullname != f"models.{_name}":
            spec = PathFinder.find_spec(fullname, path, target)
            if spec and isinstance(spec.loader, SourceFileLoader):
                spec.loader = _Loader(fullname, str(spec.origin))
            return spec
        file = os.path.join(_folder, "__init__.py")
        loader = _Loader(fullname, file)
        return importlib.util.spec_from_file_location(
            fullname, file, loader=loader, submodule_search_locations=[_folder]
        )


sys.meta_path.insert(0, _Finder)
