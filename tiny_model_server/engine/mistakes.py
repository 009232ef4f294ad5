"""What people write wrong in a model's folder, and what to write instead."""

from __future__ import annotations

import inspect
import operator
import os
import re
import sys
import traceback
from collections.abc import Mapping, Set
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from reprlib import repr as short
from types import ModuleType
from typing import Any

from model_interface import ModelInterface, Pipeline
from tiny_model_server.errors import message_of, suggestion
from tiny_model_server.settings import ModelOptions, model_prefix

_METHODS = {"run": ("data", "args"), "run_batch": ("items", "args"), "get_input_shape": (), "warmup": (), "close": ()}
"""What the server passes to each method."""
_ATTRIBUTES = {name for name in dir(Pipeline) if name[0] != "_"} - _METHODS.keys()
_NO_EFFECT = (ModelOptions.__dataclass_fields__.keys() | {"metadata"}) - {"args"}  # on self
_PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}
"""Packages that are called otherwise than what is imported from them."""
_COUNT = re.compile("^(num|n)_")  # of num_workers
_LIKE = 0.82  # how much a name must be like one of the interface, from 0 to 1: "batch_size" is


def model_class(module: ModuleType, path: Path) -> type[ModelInterface]:
    """The class Model of a model's folder. TypeError says what is wrong with it."""
    plugin: Any = getattr(module, "Model", None)
    if not issubclass(type(plugin), type) or not issubclass(plugin, ModelInterface):
        hint = _instead(module, path, plugin)
        raise TypeError(f"{path / '__init__.py'} must define class Model(ModelInterface){hint}")
    _check_methods(plugin)
    if issubclass(plugin, Pipeline) and (isinstance(plugin.stages, str) or not plugin.stages):
        raise TypeError(f'a Pipeline names its models, as in stages = ["decode", "labels"]; it is {plugin.stages!r}')
    return plugin  # type: ignore[no-any-return]


def _instead(module: ModuleType, path: Path, found: Any) -> str:
    """What there is instead of a class Model(ModelInterface)."""
    if issubclass(type(found), type):
        return "; its class Model does not derive from ModelInterface"
    if found is not None:
        return f"; its Model is an object of {type(found).__name__}, not a class"
    for name, value in vars(module).items():
        if issubclass(type(value), type) and issubclass(value, ModelInterface) and value.__module__ == module.__name__:
            return f"; its class is called {name}: rename it to Model"
    for file in path.glob("[!_]*.py"):
        if re.search(r"^class Model\b", file.read_text(errors="replace"), re.MULTILINE):
            return f"; it is in {file.name}: write 'from .{file.stem} import Model'"
    return ""


def _near(name: str, right: Set[str]) -> str:
    """The name of the interface that is meant, as a hint: "num_workers" is almost one, "max_batch" begins one."""
    begun = [one for one in right if "_" in name and one.startswith(f"{name.lower()}_")]
    return suggestion(_COUNT.sub("", name), right, _LIKE) or suggestion(name, begun)


def _check_methods(plugin: type[ModelInterface]) -> None:
    """TypeError if the server could not call a method as it calls it."""
    if plugin.run is ModelInterface.run:
        batch = "" if plugin.run_batch is ModelInterface.run_batch else " return self.run_batch([data], args)[0]"
        raise TypeError(f"class Model has no run: write 'def run(self, data, args):{batch}'")
    for name, arguments in _METHODS.items():
        method, static = getattr(plugin, name), inspect.getattr_static(plugin, name)
        bound = isinstance(static, (staticmethod, classmethod)) or not hasattr(type(static), "__get__")
        problem = "" if callable(method) else f"{short(method)} is not a callable"
        with suppress(Exception):  # it is not written in Python, or describes itself wrongly
            signature = inspect.signature(method)
            try:
                signature.bind(*["self"] * (not bound), *arguments)
            except TypeError as error:
                problem = str(error)
        if problem:
            raise TypeError(f"write 'def {name}({', '.join(['self', *arguments])})' in class Model ({problem})")


def check_arguments(name: str, plugin: type[ModelInterface], arguments: Mapping[str, Any]) -> None:
    """TypeError if ``__init__`` cannot be called with the arguments that are set for the model of this name."""
    try:
        signature = inspect.signature(plugin)
    except Exception:  # it is not written in Python, or describes itself wrongly
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        wanted = ", ".join(f'"{one}": ...' for one in signature.parameters)
        variable = f"{model_prefix(name)}ARGS='{{{wanted}}}'"
        raise TypeError(f"__init__ of class Model: {error}; give defaults, or set {variable}") from None


def doubts(model: ModelInterface, path: Path) -> list[str]:
    """What has no effect in the model of this folder, though its author may think that it has."""
    plugin = type(model)
    found = [
        f"self.{name} has no effect: write {name} = ... as a class attribute, not in __init__"
        for name in sorted(vars(model).keys() & _NO_EFFECT)
        if vars(model)[name] is not getattr(plugin, name)
    ]
    unused = plugin.max_batch_size == 1 and plugin.run_batch is not ModelInterface.run_batch
    return found + ["run_batch is not called, because max_batch_size is 1"] * unused + _odd_names(plugin, path)


def _odd_names(plugin: type[ModelInterface], path: Path) -> list[str]:
    """The methods and class attributes that nothing seems to use, and whose name is almost one of the interface."""
    ours = (ModelInterface, Pipeline)
    classes = [one for one in plugin.__mro__ if issubclass(one, ModelInterface) and one not in ours]
    defined = [(name, value) for one in classes for name, value in vars(one).items()]
    names = [name for name, _ in defined]
    source, found = _source(plugin, path), []
    for name, value in defined:
        kind = _METHODS.keys() if inspect.isroutine(value) else _ATTRIBUTES
        if name in dir(Pipeline) or name[0] == "_" or isinstance(value, (type, property)):
            continue
        hint = _near(name, kind - set(names))
        if hint and len(re.findall(rf"\b{name}\b", source)) == names.count(name):
            found.append(f"class Model has {name!r}, which nothing uses{hint}")
    return found


def _source(plugin: type[ModelInterface], path: Path) -> str:
    """The code that may use what the class defines: of its folder, of other folders beside it, and of its bases."""
    bases = {one.__module__ for one in plugin.__mro__} - {ModelInterface.__module__, "abc", "builtins"}
    modules = [module for name, module in list(sys.modules.items()) if name in bases or name.startswith("models.")]
    files = {Path(file) for module in modules if (file := getattr(module, "__file__", None))}
    for folder, pattern in ((path, "*.py"), (path, "*/*.py"), (path.parent, "_*.py"), (path.parent, "_*/*.py")):
        files |= {*folder.glob(pattern)}
    texts = []
    for file in files:
        with suppress(OSError):  # it may have gone
            texts.append(file.read_text(errors="replace") if file.suffix == ".py" else "")
    return "\n".join(texts)


def input_shape(shape: Any) -> list[int] | None:
    """What ``get_input_shape`` returned, as a list of Python's own numbers. ValueError if it is not a shape."""
    if shape is None:
        return None
    with suppress(TypeError):
        sizes = [-2 if type(size) is bool else operator.index(size) for size in shape]
        if all(-1 <= size < 1 << 63 for size in sizes):  # protocols have 64 bits for it
            return sizes
    right = "whole numbers in a list, such as [224, 224, 3] (-1: any size), or None"
    raise ValueError(f"get_input_shape() must return {right}, not {short(shape)}")


def describe(error: BaseException, path: Path) -> str:
    """Why a plug-in could not be loaded, in one line: what was raised, where in its folder, and what to do."""
    reason = " ".join(message_of(error, named=True).split())
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    inside = [(os.path.relpath(file, path), line) for file, line in frames if file.startswith(f"{path}{os.sep}")]
    where = " ({}, line {})".format(*inside[-1]) if inside else ""
    return f"{reason}{where}{_remedy(error, reason, path)}"


def from_folder(error: BaseException, path: Path) -> BaseException | None:
    """The error with a traceback that begins in the model's folder; None for a mistake that was found elsewhere."""
    begin = error.__traceback__
    while begin and not begin.tb_frame.f_code.co_filename.startswith(f"{path}{os.sep}"):
        begin = begin.tb_next
    if not begin and type(error) in (TypeError, ValueError):
        return None
    return BaseException.with_traceback(error, begin or error.__traceback__)


def _remedy(error: BaseException, reason: str, path: Path) -> str:
    if isinstance(error, ImportError):
        if reason.startswith("ImportError: cannot import name 'ModelInterface'"):
            return " (write 'from model_interface import ModelInterface')"
        return _remedy_of_import(str(error.name or "").partition(".")[0], path, type(error) is ModuleNotFoundError)
    file = error.filename if isinstance(error, FileNotFoundError) else "FILE" if "NO_SUCHFILE" in reason else None
    if isinstance(file, str) and not os.path.isabs(file):
        where = f"a relative path begins in {os.getcwd()}"
        return f" ({where}; for the model's folder write Path(__file__).parent / {file!r})"
    if "asyncio.run() cannot be called from a running event loop" in reason:
        return " (an async model has a loop: await in 'async def warmup(self)')"
    return ""


def _remedy_of_import(name: str, path: Path, missing: bool) -> str:
    """What to do if a module is missing, or something in it, as in another version of it."""
    for dots, folder in ((".", path), ("..", path.parent)):
        found = name and ((folder / f"{name}.py").is_file() or (folder / name).is_dir())
        if found and (dots == "." or name[0] == "_"):
            return f" (it is in {folder}: write 'from {dots} import {name}' or 'from {dots}{name} import ...')"
    if name == "models":
        return ""
    needs, package = path / "requirements.txt", _PACKAGES.get(name, name)
    text = needs.read_text(errors="replace").replace("_", "-").lower() if needs.is_file() else ""
    listed = bool(name) and package.replace("_", "-").lower() in text
    add = "" if listed else f"name {package} in {needs}, and "
    own = "; for the model's own folder write 'from . import ...'" if name == path.name else ""
    return f" ({add}install what it needs: {install_command(needs)}{own})" if listed or (name and missing) else ""


def install_command(requirements: Path) -> str:
    """What installs a file of requirements for this interpreter, which may lack pip, as uv makes environments."""
    if find_spec("pip"):
        return f"{sys.executable} -m pip install -r {requirements}"
    return f"uv pip install -r {requirements} --python {sys.executable}"
