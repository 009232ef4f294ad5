"""The package ``models`` of a worker and of the processes that its model starts: it finds the worker's model.

The folder of the model may have any name, and its alias another one. The modules in it are found by their folder.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from tiny_model_server import PLUGIN

_name, _, _folder = os.environ.get(PLUGIN, "").partition("=")
__path__ = [os.path.dirname(_folder)]  # which makes this module a package


class _Finder:
    @staticmethod
    def find_spec(fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != f"models.{_name}":
            return None
        file = os.path.join(_folder, "__init__.py")
        return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=[_folder])


sys.meta_path.insert(0, _Finder)
