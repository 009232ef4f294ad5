"""One model in its worker process: import the plug-in, read what it declares, run batches. No sockets in here.

The code of a model may do anything: raise SystemExit, return objects whose methods raise, fork. So ``attempt`` runs it,
and ``type`` recognizes what it returns, because ``isinstance`` would run the model's code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

import numpy as np

from model_interface import ModelInterface, Pipeline
from tiny_model_server import PLUGIN, codec, conversions
from tiny_model_server.engine import mistakes
from tiny_model_server.engine.annotations import Types
from tiny_model_server.errors import Cancelled, InvalidInput, ModelError, ServerError, message_of
from tiny_model_server.settings import ModelOptions


class SafeLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # Python 3.9 has no LoggerAdapter[...]
    """A log that never raises, though a model may break the logging, or raise an error that cannot be formatted."""

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """As Logger.log."""
        with suppress(BaseException):
            self.logger.disabled = False  # as dictConfig makes it
            super().log(level, msg, *args, **kwargs)


log = SafeLog(logging.getLogger("tiny_model_server.worker"), {})

DEFAULT_BATCH = 32
"""max_batch_size of a plug-in that has a run_batch of its own and names no size."""
ASYNC_CONCURRENCY = 16
"""concurrency of a plug-in whose run is a coroutine, that has no run_batch of its own and names none."""
_MAX_VALUES = 1 << 20  # of a generator whose caller wants a list: one that never ends would take all memory
_END = object()  # stands for the end of a generator
_COLOURS = {"rgb": "COLOR_RGB", "bgr": "COLOR", "gray": "GRAYSCALE", "unchanged": "UNCHANGED"}
"""OpenCV's ways to read an image file, by image_mode."""
# The name of torch's error, because torch may be missing, and the messages of onnxruntime and the CUDA libraries.
_OUT_OF_DEVICE_MEMORY = re.compile(
    "^OutOfMemoryError|CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED|Failed to allocate memory"
)


def import_plugin(name: str, path: Path) -> type[ModelInterface]:
    """The class Model of the plug-in folder ``path``, imported as a package ``models.<name>``.

    ``name`` may be any text: an alias, or the name of a folder that an orchestrator made.
    """
    name = re.sub(r"[^\w-]", "_", name)
    os.environ[PLUGIN] = f"{name}={path}"  # read by the package ``models``, here and in processes that the model starts
    return mistakes.model_class(importlib.import_module(f"models.{name}"), path)


def declared(plugin: type[ModelInterface], types: Types) -> dict[str, Any]:
    """What the class declares: options (those of None are resolved here), metadata, example, schema, stages, if async.

    All values are of Python's own classes: to unpickle one of the model's, the front would have to import the model.
    """
    options = {name: getattr(plugin, name, None) for name in ModelOptions.__dataclass_fields__ if name != "args"}
    batches = plugin.run_batch is not ModelInterface.run_batch
    if options["max_batch_size"] is None:
        options["max_batch_size"] = DEFAULT_BATCH if batches else 1
    if options["concurrency"] is None:
        options["concurrency"] = 1 if batches or not _is_async(plugin.run) else ASYNC_CONCURRENCY
    stages = plugin.stages if issubclass(plugin, Pipeline) else ()
    facts: dict[str, Any] = json.loads(json.dumps({"options": options, "stages": stages}, default=str))
    metadata = _checked_metadata(codec.parse_json(codec.json_only(plugin.metadata)) or {})
    return facts | {
        "is_async": is_async(plugin),
        "metadata": types.metadata | metadata,
        "schema": types.schema,
        "example": _encoded("class attribute example", plugin.example),
    }


def is_async(plugin: type[ModelInterface]) -> bool:
    """Whether the model needs an event loop: one of its methods is a coroutine or an async generator."""
    return any(_is_async(getattr(plugin, name)) for name in ("run", "run_batch", "warmup", "close"))


def _is_async(method: Any) -> bool:
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def call_directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; of a generator, the first value. An async model has ``EventLoop.call`` for that."""
    result = function(*arguments)
    return next(result, None) if type(result) is GeneratorType else result


def construct(
    plugin: type[ModelInterface],
    options: ModelOptions,
    threads: int,
    types: Types,
    call: Callable[..., Any] = call_directly,
) -> tuple[ModelInterface, Any]:
    """The model, ready to run, and its input shape: a list, or None for any. ``call`` calls what may be async."""
    plugin.threads = threads
    model = call(partial(plugin, **options.args))
    answer = call(_warm_up, model, types)
    if plugin.warmup is ModelInterface.warmup:
        _encoded("the answer to its example cannot be encoded", answer)
    return model, mistakes.input_shape(model.get_input_shape())


def _encoded(what: str, value: Any) -> codec.Encoded | None:
    """The encoded value, None for None. TypeError says what it is that cannot be encoded, and why."""
    try:
        return None if value is None else codec.encode(value)
    except Exception as error:
        raise TypeError(f"{what}: {message_of(error)}") from error


def _warm_up(model: ModelInterface, types: Types) -> Any:
    """Runs warmup(). A model without one of its own gets its example as it would get it from a caller."""
    if model.example is None or type(model).warmup is not ModelInterface.warmup:
        return model.warmup()
    try:
        data, args = types.data(codec.decode(codec.encode(model.example))), types.args({})
    except InvalidInput as error:
        raise TypeError(f"its example does not fit the annotations of run: {error}") from None
    return model.run(data, args)


def _checked_metadata(metadata: Any) -> dict[str, Any]:
    """The metadata, if protocols can read the tensors that it describes. TypeError says what is wrong."""
    if not isinstance(metadata, dict):
        raise TypeError(f"class attribute metadata must be a dict, not {type(metadata).__name__}")
    for kind in ("inputs", "outputs"):
        tensors = metadata.get(kind) or []
        if not (isinstance(tensors, list) and all(map(_is_tensor, tensors))):
            wanted = "a list of dicts with name and dtype, texts, and shape, a list of whole numbers from -1"
            raise TypeError(f"metadata[{kind!r}] must be {wanted}; it is {tensors!r}")
    return metadata


def _is_tensor(described: Any) -> bool:
    if not isinstance(described, dict) or failed(attempt(mistakes.input_shape, described.get("shape"))):
        return False
    return all(isinstance(described.get(name), (str, type(None))) for name in ("name", "dtype"))


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the model returns, or the exception that it raises, of whatever class."""
    pid = os.getpid()
    try:
        return function(*arguments)
    except BaseException as error:
        return error
    finally:
        end_if_forked(pid)


def end_if_forked(pid: int) -> None:
    """Ends this process if it is not ``pid``: one that the model has forked must not answer in the worker's place."""
    if os.getpid() != pid:
        log.error("a process that the model has forked returned from the model's code: let it end by os._exit()")
        os._exit(1)


class Calls:
    """Takes what a model's methods return as their results. ``event_loop.AsyncCalls`` awaits it instead."""

    cancelled = False
    """True from the moment when nobody wants the batch any more; only an async model notices it."""

    def __call__(self, result: Any) -> Any:
        """The result of one method, which may be a generator."""
        if type(result) in (CoroutineType, AsyncGeneratorType):
            raise ModelError(f"the model returned {type(result).__name__}: declare its run with 'async def'")
        return result

    def all(self, results: list[Any]) -> Any:
        """The results of a batch."""
        return results


class Runner:
    """Runs batches on one model, in one slot."""

    def __init__(self, name: str, model: ModelInterface, options: ModelOptions, types: Types, calls: Calls) -> None:
        self._name = name
        self._model = model
        self._options = options
        self._types = types
        self._finished = calls

    def run(self, items: Sequence[codec.Encoded | ServerError], args_json: str) -> list[Any]:
        """One outcome an item, in order: the model's value, or a ServerError."""
        args = attempt(self._args, args_json)
        if failed(args):
            return [self._outcome(args)] * len(items)
        outcomes = [attempt(self._decode, item) for item in items]
        groups: dict[Any, list[int]] = {}
        for index, value in enumerate(outcomes):
            if not failed(value):
                groups.setdefault(self._group(value), []).append(index)
        for indices in groups.values():
            for index, result in zip(indices, self._run_group([outcomes[index] for index in indices], args)):
                outcomes[index] = result
        return [self._outcome(outcome) for outcome in outcomes]

    def stream(self, item: codec.Encoded | ServerError, args_json: str) -> Generator[Any, None, None]:
        """What the model yields for one item, or its only answer. A ServerError comes last if it fails."""
        result = attempt(lambda: self._finished(self._model.run(self._decode(item), self._args(args_json))))
        if type(result) is not GeneratorType:
            yield self._outcome(result)
            return
        try:
            while (value := attempt(next, result, _END)) is not _END:
                yield self._outcome(value)
                if failed(value):
                    return
        finally:
            self._outcome(attempt(result.close))

    def _group(self, value: Any) -> Any:
        """Equal for values that share a run_batch. The batcher did not know the shapes of image files."""
        mixes = self._options.mix_shapes or not isinstance(value, np.ndarray)
        return None if mixes else (value.shape, value.dtype.str)

    def _run_group(self, values: list[Any], args: dict[str, Any]) -> list[Any]:
        """One result, exception or ServerError a value."""
        if len(values) == 1:
            return [self._outcome(attempt(self._run_one, values[0], args))]
        results = attempt(self._run_batch, values, args)
        if not failed(results):
            return list(results)
        reason = message_of(results, named=True)
        if type(results) is Cancelled:
            return [results] * len(values)
        if type(results) is ModelError:  # of _run_batch
            log.error("%s", results)
            return [results] * len(values)
        # An exception keeps what the frames that it left refer to, above all tensors on the GPU. So none is kept while
        # other items run: not this one, and none of _run_one, of which _outcome makes a ServerError.
        del results
        if _OUT_OF_DEVICE_MEMORY.search(reason):
            log.warning("model %s: no device memory for %d items at once, halving", self._name, len(values))
            middle = len(values) // 2
            return self._run_group(values[:middle], args) + self._run_group(values[middle:], args)
        log.warning("model %s: run_batch raised, running its items one by one: %s", self._name, reason)
        return [self._outcome(attempt(self._run_one, value, args)) for value in values]

    def _run_batch(self, values: list[Any], args: dict[str, Any]) -> Any:
        """One result a value, or an exception. ModelError if run_batch returns anything else."""
        results = self._finished(self._model.run_batch(values, args))
        if failed(results):
            return results
        name, count = f"run_batch of model {self._name!r}", len(values)
        try:
            # iterable, but not one result an item
            if isinstance(results, (str, bytes, Mapping, AbstractSet)) or conversions.is_table(results):
                raise TypeError(f"not {type(results).__name__}")
            listed = list(islice(results, count + 1))  # it may never end
        except BaseException as error:
            raise ModelError(f"{name} must return a sequence: {message_of(error)}") from error
        if len(listed) != count:
            size = len(listed) if len(listed) < count else f"more than {count}"
            raise ModelError(f"{name} returned {size} results for {count} items")
        return self._finished.all(listed)

    def _run_one(self, value: Any, args: dict[str, Any]) -> Any:
        """The model's answer; of a generator all values, or the first error among them."""
        result = self._finished(self._model.run(value, args))
        if type(result) is not GeneratorType:
            return result
        listed = list(islice(result, _MAX_VALUES + 1))
        result.close()
        if len(listed) > _MAX_VALUES:
            raise ModelError(f"model {self._name!r} yields more than {_MAX_VALUES} values; call it by RunStream")
        return next(filter(failed, listed), listed)

    def _outcome(self, result: Any) -> Any:
        """A result, or the ServerError for an exception. The model may have returned it instead of raising it."""
        kind = type(result)
        if not failed(result) or kind in (ModelError, Cancelled):
            return result
        if issubclass(kind, InvalidInput):  # the model's own class of it may have any behaviour
            return InvalidInput(message_of(result))
        log.error("model %s raised", self._name, exc_info=result)
        return ModelError(f"model {self._name!r} raised {message_of(result, named=True)}")

    def _args(self, args_json: str) -> Any:
        return self._types.args(codec.parse_args(args_json))

    def _decode(self, item: codec.Encoded | ServerError) -> Any:
        if isinstance(item, ServerError):  # it could not be read
            raise item
        return self._types.data(codec.decode(item, self._decode_image))

    def _decode_image(self, data: bytes) -> Any:
        try:
            import cv2
        except ImportError:
            raise ModelError(f"model {self._name!r} needs opencv-python-headless to decode image files") from None
        mode = getattr(cv2, f"IMREAD_{_COLOURS[self._options.image_mode]}")
        try:
            image = cv2.imdecode(np.frombuffer(codec.whole_file(data), np.uint8), mode)
        except cv2.error as error:
            raise InvalidInput(f"the image file could not be decoded: {error.err}") from None
        if image is None:
            raise InvalidInput(f"{len(data)} bytes are not an image file that OpenCV can decode (JPEG, PNG, ...)")
        return image


def failed(result: Any) -> bool:
    """True for an exception, as ``attempt`` returns it."""
    return issubclass(type(result), BaseException)


def encode_outcome(result: Any, json_only: bool) -> tuple[str | None, str, list[codec.Array]]:
    """(None, JSON, arrays) of a value, (status, message, []) of an error."""
    if issubclass(type(result), ServerError):
        return result.status, str(result), []
    try:
        encoded = codec.Encoded(codec.json_only(result), []) if json_only else codec.encode(result)
    except InvalidInput as error:  # it is too large for JSON
        return error.status, str(error), []
    except BaseException as error:  # a result may be of any class, with any behaviour
        log.error("a result could not be encoded: %s", message_of(error))
        return ModelError.status, f"the model's answer cannot be encoded: {message_of(error)}", []
    return None, encoded.text, encoded.arrays
