"""An engine without workers and without a loop: models run where they are called, by the worker's own code."""

import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from model_interface import ModelInterface
from tests.conftest import ROOT
from tiny_model_server.codec import Encoded, Placed
from tiny_model_server.engine import runner
from tiny_model_server.engine.annotations import types_of
from tiny_model_server.engine.batcher import Item, Outcome
from tiny_model_server.engine.call import Run
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.engine.runner import Calls, Runner
from tiny_model_server.engine.worker_process import Loaded
from tiny_model_server.errors import from_status
from tiny_model_server.settings import ModelOptions, Settings
from tiny_model_server.shared_memory import Segment, write_arrays

MOST_PIXELS = 1 << 18
os.environ |= {"OPENCV_IO_MAX_IMAGE_PIXELS": str(MOST_PIXELS), "OPENCV_LOG_LEVEL": "OFF"}  # read when cv2 is imported
FOLDER = ROOT / "build" / "fuzz" / "models"
PROTOCOLS = ("native", "open_inference", "openai", "model_mesh", "modzy", "nos")


class _Echo(ModelInterface):
    """Answers what it is sent."""

    def run(self, data, args):  # type: ignore[no-untyped-def]
        return data if not args else {"data": data, "args": args}


class _Rows(_Echo):
    metadata = {"batch": True}


class _Declares(_Echo):
    metadata = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "dtype": "float32"}],
    }


class Order(TypedDict, total=False):
    """What the model ``typed`` takes."""

    name: str
    count: int
    prices: list[float]
    image: np.ndarray[Any, np.dtype[np.uint8]]
    parts: dict[str, tuple[int, float | None]]


class Choice(TypedDict, total=False):
    """What it takes as args."""

    top: int
    labels: bool


class _Typed(ModelInterface):
    def run(self, data: Order, args: Choice) -> Any:
        return {"data": data, "args": args}


class _Letters(ModelInterface):
    metadata = {"task": "embeddings"}

    def run(self, data, args):  # type: ignore[no-untyped-def]
        return {"embedding": [float(len(str(data))), 1.0], "usage": {"prompt_tokens": 1}}


class _Chatty(ModelInterface):
    metadata = {"task": "chat"}

    def run(self, data, args):  # type: ignore[no-untyped-def]
        yield "you said "
        yield {"content": str(data)[:50]}
        yield {"tool_calls": [{"name": "f", "arguments": {}}], "usage": {"prompt_tokens": 2}}


class _Yields(ModelInterface):
    def run(self, data, args):  # type: ignore[no-untyped-def]
        yield from data if isinstance(data, list) else [data]


class _Masks(ModelInterface):
    def run(self, data, args):  # type: ignore[no-untyped-def]
        return {"image": data, "mask": np.zeros((2, 2), bool), "score": 0.5}


class _Files(_Echo):
    metadata = {
        "inputs": [{"name": "image", "media_types": ["image/png"]}, {"name": "job.json", "media_types": ["text/json"]}],
        "outputs": [{"name": "image", "media_type": "image/png"}, {"name": "results.json"}],
    }


MODELS: dict[str, type[ModelInterface]] = {
    "echo": _Echo,
    "rows": _Rows,
    "declares": _Declares,
    "typed": _Typed,
    "letters": _Letters,
    "chatty": _Chatty,
    "yields": _Yields,
    "files": _Files,
    "masks": _Masks,
}


class InlineExecutor(ThreadPoolExecutor):
    """Does everything at once, in the thread that asks."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


class InlineEngine(Engine):
    """The engine up to where a batch would go to a worker."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._runners = {model.name: _loaded(model) for model in self.models()}
        self.started = True

    def _put(self, run: Run, model: ServedModel) -> None:
        for item in run.make_items(model):
            item.resolve(self._streamed(item, run.name) if item.stream else self._outcome(item, run.name))

    def _outcome(self, item: Item, name: str) -> Outcome:
        """As ``Slot`` in the worker and ``WorkerSlot`` in the front make it."""
        with _Mapped(item) as value:
            [result] = self._runners[name].run([value], item.args)
        return _sent(item, *runner.encode_outcome(result, item.json_only))

    def _streamed(self, item: Item, name: str) -> Outcome:
        last: Outcome = Encoded("null", [])
        with _Mapped(item) as value:
            for result in self._runners[name].stream(value, item.args):
                last = _sent(item, *runner.encode_outcome(result, item.json_only))
                assert item.stream
                item.stream.put(last, lambda: None)
        return last if isinstance(last, Exception) else Encoded("null", [])

    def submit(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            work.send(None)
        except StopIteration as ended:
            done.set_result(ended.value)
        except Exception as error:
            done.set_exception(error)
        else:
            raise AssertionError("the engine would wait")
        return done

    def _on_loop(self, function: Callable[..., object], *arguments: Any) -> None:
        function(*arguments)

    async def load(self, name: str, workers: int = 0, *, anew: bool = False) -> ServedModel:
        return self.model(name)

    async def unload(self, name: str) -> ServedModel:
        return self.model(name)

    async def forget(self, name: str, grace_s: float) -> None:
        self._repository.remove(name)

    async def adopt(self, name: str, path: Path) -> ServedModel:
        model = await super().adopt(name, path)
        self._runners[name] = _loaded(model)
        return model

    def request_stop(self) -> None:
        pass


class _Mapped:
    """The value of an item as a worker maps it; the mapping ends with the block."""

    def __init__(self, item: Item) -> None:
        request, places = item.value.shared or (None, [])
        self._segment = Segment(request.request) if request and places else None
        self._value = Encoded(item.value.text, self._segment.read(places) if self._segment else [])

    def __enter__(self) -> Encoded:
        return self._value

    def __exit__(self, *_: Any) -> None:
        if self._segment:
            self._segment.fd = -1  # it is the front's
            self._segment.close()


def _sent(item: Item, status: str | None, text: str, arrays: list[Any]) -> Outcome:
    if status:
        return from_status(status, text)
    if item.response and not item.stream:
        places = write_arrays(item.response.response, arrays)
        return Encoded(text, [Placed(one.dtype, one.shape) for one in arrays], (item.response, places))
    return Encoded(text, [one.copy() for one in arrays])


def _loaded(model: ServedModel) -> Runner:
    plugin = MODELS.get(model.name, _Echo)
    types = types_of(plugin)
    facts = runner.declared(plugin, types)
    options = ModelOptions().declared(facts.pop("options"))
    made, shape = runner.construct(plugin, options, 1, types)
    model.loaded, model.state, model.wanted = Loaded(options, shape, **facts), State.READY, True
    model.batcher.open()
    return Runner(model.name, made, options, types, Calls())


@cache
def engine(**settings: Any) -> InlineEngine:
    """The engine with these settings, of which there is one in the process."""
    for name in MODELS:
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        (FOLDER / name / "__init__.py").touch()
    defaults: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "http_port": 0, "access_log": True, "threads": 64}
    defaults |= {"models_dir": FOLDER, "protocols": PROTOCOLS, "modzy_model": "echo", "admin": "host"}
    return InlineEngine(Settings(**defaults | settings))
