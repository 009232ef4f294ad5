"""One model in its worker process: import the plug-in, read what it declares, run batches. No sockets in here."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from model_interface import ModelInterface, Pipeline
from tiny_model_server import PLUGIN, codec
from tiny_model_server.errors import CODES, InvalidInput, ModelError, ServerError, message_of
from tiny_model_server.settings import ModelOptions


class SafeLog:
    """A log that never raises, though a model may break what logs, or raise what cannot even be logged."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def warning(self, text: str, *values: object) -> None:
        """As Logger.warning."""
        self._log(logging.WARNING, text, *values)

    def error(self, text: str, *values: object, exc_info: BaseException | None = None) -> None:
        """As Logger.error."""
        self._log(logging.ERROR, text, *values, exc_info=exc_info)

    def exception(self, text: str) -> None:
        """As Logger.exception."""
        self.error(text, exc_info=sys.exc_info()[1])

    def _log(self, level: int, text: str, *values: object, exc_info: BaseException | None = None) -> None:
        try:
            self._logger.log(level, text, *values, exc_info=exc_info)
        except BaseException as error:
            with suppress(BaseException):
                self._logger.log(level, "%s: this cannot be logged whole: %s", text, type(error).__name__)


log = SafeLog(logging.getLogger("tiny_model_server.worker"))

DEFAULT_BATCH = 32
"""max_batch_size of a plug-in that has a run_batch of its own and names no size."""
_LARGEST_SIZE = 1 << 63  # of an array's dimension: protocols have 64 bits for it
_MOST_VALUES = 1 << 20  # of a generator whose caller wants a list: one that never ends must not take all memory


def import_plugin(name: str, path: Path) -> type[ModelInterface]:
    """The class Model of the plug-in folder ``path``, imported as a package ``models.<name>``.

    An alias may be any text, and so may the name of a folder that an orchestrator made.
    """
    name = re.sub(r"[^\w-]", "_", name)
    os.environ[PLUGIN] = f"{name}={path}"  # by which the package ``models`` finds it, in this process and its children
    module = importlib.import_module(f"models.{name}")
    plugin = getattr(module, "Model", None)
    if not (isinstance(plugin, type) and issubclass(plugin, ModelInterface)):
        raise TypeError(f"{path / '__init__.py'} must define class Model(ModelInterface)")
    return plugin


def declared(plugin: type[ModelInterface]) -> dict[str, Any]:
    """What the class declares: options (a batch size of None is resolved here), metadata, example, stages."""
    options: dict[str, Any] = {
        name: _plain(getattr(plugin, name, None)) for name in ModelOptions.__dataclass_fields__ if name != "args"
    }
    if options["max_batch_size"] is None:
        options["max_batch_size"] = 1 if plugin.run_batch is ModelInterface.run_batch else DEFAULT_BATCH
    if not isinstance(plugin.devices, (str, type(None))):
        options["devices"] = ",".join(plugin.devices)
    return {
        "options": options,
        "metadata": _checked_metadata(codec.parse_json(codec.json_only(plugin.metadata))),
        "example": None if plugin.example is None else codec.encode(plugin.example),
        "stages": [_plain(stage) for stage in plugin.stages] if issubclass(plugin, Pipeline) else [],
    }


def _plain(value: Any) -> Any:
    """A value of Python's own class. The front must not meet a class of the model: to read it, it would import that."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return str.__str__(value) if isinstance(value, str) else kind(value)
    return None if value is None else str(value)


def _checked_metadata(metadata: Any) -> dict[str, Any]:
    """The metadata, if protocols and the engine can read in it what they look for; TypeError says what is wrong."""
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise TypeError(f"class attribute metadata must be a dict, not {type(metadata).__name__}")
    for kind in ("inputs", "outputs"):
        described = metadata.get(kind) or []
        if not (isinstance(described, list) and all(isinstance(one, dict) for one in described)):
            raise TypeError(f"metadata[{kind!r}] must be a list of dicts with name, dtype and shape")
        for one in described:
            if not is_shape(one.get("shape")):
                raise TypeError(f"the shape in metadata[{kind!r}] must be a list of whole numbers from -1, not "
                                f"{one['shape']!r}")  # fmt: skip
            for key in ("name", "dtype"):
                if not isinstance(one.get(key), (str, type(None))):
                    raise TypeError(f"the {key} in metadata[{kind!r}] must be a text, not {one[key]!r}")
    return metadata


def is_shape(shape: Any) -> bool:
    """True for None, and for a list of sizes that protocols can write; -1 stands for any size."""
    return shape is None or (
        isinstance(shape, list) and all(type(size) is int and -1 <= size < _LARGEST_SIZE for size in shape)
    )


def describe(error: BaseException, path: Path) -> str:
    """Why a plug-in could not be loaded, in one line, with the requirements file to install if that may help."""
    reason = " ".join(message_of(error, named=True).split())
    needs = path / "requirements.txt"
    if isinstance(error, ImportError):
        first = str(error.name or "").partition(".")[0]
        if first and ((path / f"{first}.py").is_file() or (path / first).is_dir()):
            reason += f" (it is in the model's folder: write 'from . import {first}' or 'from .{first} import ...')"
        elif needs.exists():
            reason += f" (install what it needs: pip install -r {needs})"
    return reason


class Runner:
    """Runs batches on one model; slots share it."""

    def __init__(self, name: str, model: ModelInterface, options: ModelOptions) -> None:
        self._name = name
        self._model = model
        self._options = options
        self._pid = os.getpid()

    def run(self, packed: Sequence[codec.Encoded], args: dict[str, Any]) -> list[Any]:
        """One outcome an item, in order: the model's value, or a ServerError."""
        if len(packed) == 1:
            try:
                return [self._run_one(codec.decode(packed[0], self._decode_image), args)]
            except ServerError as error:
                return [error]
        outcomes: list[Any] = [None] * len(packed)
        groups: dict[Any, list[int]] = {}
        values: dict[int, Any] = {}
        for index, item in enumerate(packed):
            try:
                value = codec.decode(item, self._decode_image)
            except ServerError as error:
                outcomes[index] = error
                continue
            values[index] = value
            # Items share their shapes already, but for images that were files until now.
            mixes = self._options.mix_shapes or not isinstance(value, np.ndarray)
            groups.setdefault(None if mixes else (value.shape, value.dtype.str), []).append(index)
        for indices in groups.values():
            for index, outcome in zip(indices, self._run_group([values[i] for i in indices], args)):
                outcomes[index] = outcome
        return outcomes

    def _run_group(self, values: list[Any], args: dict[str, Any]) -> list[Any]:
        if len(values) > 1:
            try:
                results = self._call(self._model.run_batch, values, args)
            except BaseException as error:  # a model may raise anything, SystemExit too
                if _is_out_of_device_memory(error):
                    return self._in_halves(values, args)
                log.warning("model %s: run_batch raised, running its %d items one by one: %s: %s", self._name,
                            len(values), type(error).__name__, message_of(error))  # fmt: skip
            else:
                return self._one_each(results, len(values))
        return [self._run_one(value, args) for value in values]

    def _in_halves(self, values: list[Any], args: dict[str, Any]) -> list[Any]:
        log.warning("model %s: no device memory for %d items at once, halving", self._name, len(values))
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()
        middle = len(values) // 2
        return self._run_group(values[:middle], args) + self._run_group(values[middle:], args)

    def stream(self, packed: codec.Encoded, args: dict[str, Any]) -> Generator[Any, None, None]:
        """What the model yields for one item, or its only answer; a ServerError in the end if it fails."""
        try:
            result = self._call(self._model.run, codec.decode(packed, self._decode_image), args)
        except BaseException as error:
            yield self._error(error)
            return
        if not isinstance(result, types.GeneratorType):
            yield self._outcome(result)
            return
        try:
            while True:
                try:
                    value = self._outcome(self._call(next, result))
                except StopIteration:
                    return
                except BaseException as error:  # a GeneratorExit of the model's own, too
                    value = self._error(error)
                yield value
                if isinstance(value, ServerError):
                    return
        finally:
            try:
                result.close()
            except BaseException as error:
                self._error(error)  # which logs it; nobody waits for more

    def _one_each(self, results: Any, count: int) -> list[Any]:
        try:
            if isinstance(
                results, (str, bytes, Mapping, AbstractSet)
            ):  # its parts are not the items' answers, in order
                raise TypeError(f"not {type(results).__name__}")
            listed = self._call(list, islice(results, count + 1))  # what never ends is too long, too
        except BaseException as error:
            self._error(error)
            return [
                ModelError(f"run_batch of model {self._name!r} must return a sequence: {message_of(error)}")
            ] * count
        if len(listed) != count:
            size = len(listed) if len(listed) < count else f"more than {count}"
            message = f"run_batch of model {self._name!r} returned {size} results for {count} items"
            log.error(message)
            return [ModelError(message)] * count
        return [self._outcome(item) for item in listed]

    def _run_one(self, value: Any, args: dict[str, Any]) -> Any:
        try:
            result = self._call(self._model.run, value, args)
            if isinstance(result, types.GeneratorType):
                result = self._listed(result)
        except BaseException as error:
            return self._error(error)
        return self._outcome(result)

    def _listed(self, values: Generator[Any, None, None]) -> Any:
        """All values of a generator; the first error among them stands for all."""
        listed = self._call(list, islice(values, _MOST_VALUES + 1))
        values.close()
        if len(listed) > _MOST_VALUES:
            return ModelError(f"model {self._name!r} yields more than {_MOST_VALUES} values; call it by RunStream")
        return next((value for value in listed if isinstance(value, BaseException)), listed)

    def _outcome(self, result: Any) -> Any:
        """What the model answered, an exception that it returned being as good as one that it raised."""
        # By its type: isinstance asks the result for its class, which a proxy answers with an error.
        return self._error(result) if issubclass(type(result), BaseException) else result

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the model returns or raises, in this process.

        A process that the model has forked and that comes back from it ends: it must not answer in the worker's place.
        """
        try:
            return function(*arguments)
        finally:
            end_if_forked(self._pid)

    def _error(self, error: BaseException) -> ServerError:
        if isinstance(error, InvalidInput):
            return error
        log.error("model %s raised", self._name, exc_info=error)
        return ModelError(f"model {self._name!r} raised {message_of(error, named=True)}")

    def _decode_image(self, data: bytes) -> Any:
        try:
            import cv2
        except ImportError:
            raise ModelError(
                f"model {self._name!r} cannot decode image files: its interpreter lacks opencv-python-headless"
            ) from None
        flags = {
            "rgb": cv2.IMREAD_COLOR_RGB,
            "bgr": cv2.IMREAD_COLOR,
            "gray": cv2.IMREAD_GRAYSCALE,
            "unchanged": cv2.IMREAD_UNCHANGED,
        }
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags[self._options.image_mode]) if data else None
        except cv2.error as error:
            raise InvalidInput(f"the image file could not be decoded: {error.err}") from None
        if image is None:
            raise InvalidInput(f"{len(data)} bytes that are no image file which OpenCV can decode (JPEG, PNG, ...)")
        return image


def encode_outcome(result: Any, plain: bool) -> tuple[str | None, str, list[codec.Array]]:
    """(None, JSON, arrays) of a value, (status, message, []) of an error."""
    if issubclass(type(result), ServerError):  # a model's own class of InvalidInput may have any status
        known = isinstance(result.status, str) and CODES.get(result.status)
        return _plain(result.status) if known else ModelError.status, message_of(result), []
    try:
        packed = codec.Encoded(codec.json_only(result), []) if plain else codec.encode(result)
    except BaseException as error:  # a result may be of any class, with any behaviour
        log.error("a result could not be encoded: %s", message_of(error))
        return ModelError.status, f"the model's answer cannot be encoded: {message_of(error)}", []
    return None, packed.text, packed.arrays


def _is_out_of_device_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError by name, so that torch need not be there; onnxruntime and CUDA libraries by their words.
    words = (
        "CUDA out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "Failed to allocate memory",
    )
    text = message_of(error)
    return type(error).__name__ == "OutOfMemoryError" or any(word in text for word in words)


def end_if_forked(worker: int) -> None:
    """Ends this process at once if it is not the one of this id, but a fork of it that the model has made."""
    if os.getpid() != worker:
        log.error("a process that the model has forked came back from its code, and ends: let it end by os._exit()")
        os._exit(1)
