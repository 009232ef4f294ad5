"""Marks the modules of the wheel that are no packages as typed; pyproject.toml has the rest.

A type checker reads the types of such a module only if a folder of its name has a py.typed. Python itself takes the
module: the folder has no __init__.py (PEP 420).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildTyped(build_py):
    """Builds the modules, and a folder with a py.typed for each."""

    def run(self) -> None:
        """Does nothing more for an editable install, in which the folder would take the module's place."""
        super().run()
        if not self.editable_mode:
            for module in self.py_modules:
                marker = Path(self.build_lib, module, "py.typed")
                marker.parent.mkdir(exist_ok=True)
                marker.touch()


setup(cmdclass={"build_py": BuildTyped})
