"""What people write wrong in a model's folder, and what to write instead."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from reprlib import repr as short
from types import ModuleType
from typing import Any

from model_interface import ModelInterface, Pipeline
from tiny_model_server.errors import message_of, suggestion
from tiny_model_server.settings import ModelOptions, model_prefix

_METHODS = {"run": ("data", "args"), "run_batch": ("items", "args"), "get_input_shape": (), "warmup": (), "close": ()}
"""What the server passes to each method."""
_OPTIONS = ModelOptions.__dataclass_fields__.keys() - {"args"}
_PACKAGES = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "PyYAML",
}
"""Packages that are called otherwise than what is imported from them."""
_LIKE = 0.82  # how much a name must be like one of the interface, from 0 to 1: "batch_size" is


def model_class(module: ModuleType, path: Path) -> type[ModelInterface]:
    """The class Model of a model's folder. TypeError says what is wrong with it."""
    plugin: Any = getattr(module, "Model", None)
    if not issubclass(type(plugin), type) or not issubclass(plugin, ModelInterface):
        hint = _instead(module, path, plugin)
        raise TypeError(f"{path / '__init__.py'} must define class Model(ModelInterface){hint}")
    _check_names(plugin)
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
    for file in sorted(path.glob("[!_]*.py")):
        if re.search(r"^class Model\b", file.read_text(errors="replace"), re.MULTILINE):
            return f"; it is in {file.name}: write 'from .{file.stem} import Model'"
    return ""


def _check_names(plugin: type[ModelInterface]) -> None:
    """TypeError for a method or class attribute that nothing uses, and whose name is almost one of the interface."""
    ours = (ModelInterface, Pipeline)
    classes = [one for one in plugin.__mro__ if issubclass(one, ModelInterface) and one not in ours]
    sources = ""
    for module in {inspect.getmodule(one) for one in classes}:
        with suppress(OSError, TypeError):
            sources += inspect.getsource(module)  # type: ignore[arg-type]
    defined = [(name, value) for one in classes for name, value in vars(one).items()]
    names = [name for name, _ in defined]
    for name, value in defined:
        is_method = inspect.isroutine(value)
        kind = _METHODS.keys() if is_method else {*dir(ModelInterface), *dir(Pipeline)} - _METHODS.keys()
        uses = len(re.findall(rf"\b{name}\b", sources)) - names.count(name)
        if name in dir(Pipeline) or name.startswith("_") or isinstance(value, (type, property)) or uses:
            continue
        if hint := suggestion(name, [one for one in kind if not one.startswith("_") and one not in names], _LIKE):
            what = "method" if is_method else "class attribute"
            raise TypeError(f"class Model has the {what} {name!r}, which nothing uses{hint}")


def _check_methods(plugin: type[ModelInterface]) -> None:
    """TypeError if the server could not call a method as it calls it."""
    if plugin.run is ModelInterface.run:
        batch = "" if plugin.run_batch is ModelInterface.run_batch else " return self.run_batch([data], args)[0]"
        raise TypeError(f"class Model has no run: write 'def run(self, data, args):{batch}'")
    for name, arguments in _METHODS.items():
        method = getattr(plugin, name)
        bound = isinstance(inspect.getattr_static(plugin, name), (staticmethod, classmethod))
        right = ", ".join(["self", *arguments])
        if not callable(method):
            raise TypeError(f"{name} of class Model must be a method: 'def {name}({right})'")
        try:
            signature = inspect.signature(method)
        except ValueError:  # it is not written in Python
            continue
        try:
            signature.bind(*([] if bound else ["self"]), *arguments)
        except TypeError:
            found = ", ".join(signature.parameters)
            raise TypeError(f"write 'def {name}({right})' in class Model, not 'def {name}({found})'") from None


def check_arguments(name: str, plugin: type[ModelInterface], arguments: Mapping[str, Any]) -> None:
    """TypeError if ``__init__`` cannot be called with the arguments that are set for the model of this name."""
    try:
        signature = inspect.signature(plugin)
    except ValueError:
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        wanted = ", ".join(f'"{one}": ...' for one in signature.parameters)
        variable = f"{model_prefix(name)}ARGS='{{{wanted}}}'"
        raise TypeError(f"__init__ of class Model: {error}; give defaults, or set {variable}") from None


def doubts(name: str, model: ModelInterface) -> list[str]:
    """What has no effect in a model, though its author may think that it has."""
    plugin, found = type(model), []
    if plugin.max_batch_size == 1 and plugin.run_batch is not ModelInterface.run_batch:
        found.append("run_batch is not called, because max_batch_size is 1")
    for option in sorted(vars(model).keys() & {*_OPTIONS, "metadata"}):
        if vars(model)[option] is not getattr(plugin, option):
            found.append(
                f"self.{option} has no effect: write {option} = ... as a class attribute, not in __init__"
                + (f", or set {model_prefix(name)}{option.upper()}" if option in _OPTIONS else "")
            )
    return found


def input_shape(shape: Any) -> list[int] | None:
    """What ``get_input_shape`` returned, as a list of Python's own numbers. ValueError if it is not a shape."""
    if shape is None:
        return None
    with suppress(TypeError):
        sizes = [size.__index__() if hasattr(type(size), "__index__") else -2 for size in shape]
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


def _remedy(error: BaseException, reason: str, path: Path) -> str:
    if isinstance(error, ImportError):
        return _remedy_of_import(error, path)
    if isinstance(error, FileNotFoundError) or "NO_SUCHFILE" in reason:
        file = error.filename if isinstance(error, OSError) else "FILE"
        if isinstance(file, str) and not os.path.isabs(file):
            where = f"a relative path begins in {os.getcwd()}"
            return f" ({where}; for the model's folder write Path(__file__).parent / {file!r})"
    if "asyncio.run() cannot be called from a running event loop" in reason:
        return " (an async model has a loop: await in 'async def warmup(self)')"
    return ""


def _remedy_of_import(error: ImportError, path: Path) -> str:
    first, needs = str(error.name or "").partition(".")[0], path / "requirements.txt"
    if first == path.name:
        return " (it is the model's own folder: write 'from . import ...' or 'from .MODULE import ...')"
    if first and ((path / f"{first}.py").is_file() or (path / first).is_dir()):
        return f" (it is in the model's folder: write 'from . import {first}' or 'from .{first} import ...')"
    if first == "models":
        return ""
    package = _PACKAGES.get(first, first)
    if not needs.is_file():
        return f" (pip install {package}, and name it in {needs})" if isinstance(error, ModuleNotFoundError) else ""
    listed = re.findall(r"(?m)^\s*([\w.-]+)", needs.read_text(errors="replace"))
    known = not package or _plain(package) in map(_plain, listed)
    add = "" if known else f"name {package} in {needs}; "
    return f" ({add}install what it needs: pip install -r {needs})"


def _plain(package: str) -> str:
    return re.sub("[-_.]+", "-", package).lower()
