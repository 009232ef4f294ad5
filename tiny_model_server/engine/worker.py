"""The worker process: loads one model and runs its batches. It knows no gRPC, and may die without harm to others.

Started as ``python worker_path FD``, FD being the control connection. The front sends the plug-in to import and the
options, the worker what its class declares, then "ready" or "failed". Then each slot gets a connection and a
response buffer.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tiny_model_server import codec, custom_metrics, logs
from tiny_model_server.engine import mistakes, runner
from tiny_model_server.engine.annotations import types_of
from tiny_model_server.engine.runner import Calls, Runner, attempt, failed, log
from tiny_model_server.engine.worker_connection import WorkerConnection
from tiny_model_server.errors import InvalidInput, ModelError, ServerError, message_of
from tiny_model_server.shared_memory import Segment

_CLOSE_S = 10.0  # that Model.close() has
_EXIT_S = 2.0  # that functions of atexit have


class _Buffers(NamedTuple):
    """The shared buffers of a caller, mapped here."""

    request: Segment
    response: Segment
    caller_owned: bool

    def close(self) -> None:
        """Ends both mappings. An array that the model retains stays valid."""
        self.request.close()
        self.response.close()


class Slot:
    """Runs one batch at a time: takes it from its socket, runs it, sends the outcomes.

    Arrays come in shared buffers. They go into the item's response buffer or, if it has none, into the slot's own.
    """

    def __init__(self, end: int, response: int, model: tuple[str, Any, Any, Any], loop: Any) -> None:
        """``model`` is (name, model, options, types); ``loop`` the EventLoop of an async one, or None."""
        self._connection = WorkerConnection(socket.socket(fileno=end))
        self._response = Segment(response)
        self._calls: Calls = loop.calls(self._connection) if loop else Calls()
        self._runner = Runner(*model, self._calls)
        self._buffers: dict[int, _Buffers] = {}

    def serve(self) -> None:
        """Runs batches until the front closes the socket, or has ended."""
        try:
            poll = select.poll()
            poll.register(self._connection.socket, select.POLLIN)
            # A thread that waits in recv is woken in vain whenever the front takes an answer.
            while (self._connection.pending() or poll.poll()) and (message := self._connection.receive()):
                self._serve(*message)
        except EOFError:
            pass
        except OSError as error:
            if error.errno == errno.EMFILE:
                log.error("the model has left no descriptor free; the worker ends")
        finally:
            self._connection.close()

    def _serve(self, message: Any, fds: list[int]) -> None:
        if message is False:  # it cancels a batch that has just ended
            return
        self._calls.cancelled = False
        args, items, streams, fresh, closed, ids = message
        logs.request_ids.set(ids)
        for (name, owned), request, response in zip(fresh, fds[::2], fds[1::2]):
            self._buffers[name] = _Buffers(Segment(request), Segment(response), owned)
        for name in closed:
            self._buffers.pop(name).close()
        inputs: list[tuple[int, weakref.ref[Any]]] = []
        started = time.monotonic()
        outcomes = self._stream(args, items, inputs) if streams else self._outcomes(args, items, inputs)
        retained = self._retained(inputs)
        self._connection.send((outcomes, time.monotonic() - started, retained, custom_metrics.drain()))
        logs.request_ids.set("")

    def _retained(self, inputs: list[tuple[int, weakref.ref[Any]]]) -> set[int]:
        """The buffers of which the model has kept an input, or a view of one: the front must not write to them again.

        Of memory that is the caller's own, the model gets a copy. An input that is alive is kept, whenever the others
        are collected.
        """
        retained = {name for name, reference in inputs if reference() is not None}
        for name in [name for name in retained if self._buffers[name].caller_owned]:
            self._buffers[name].request.detach()
            retained.remove(name)
        return retained

    def _outcomes(self, args: str, items: Sequence[Any], inputs: list[Any]) -> list[Any]:
        """(status or None, JSON or message, places) of each item."""
        try:
            return self._run(args, items, inputs)
        except Exception as error:
            _end_without_descriptors(error)
            log.error("a batch could not be read, or its outcomes could not be written", exc_info=error)
            outcome = error if isinstance(error, ServerError) else ModelError(message_of(error, named=True))
            return [runner.encode_outcome(outcome, True) for _ in items]

    def _run(self, args: str, items: Sequence[Any], inputs: list[Any]) -> list[Any]:
        results = self._runner.run([self._receive(item, inputs) for item in items], args)
        outcomes = [runner.encode_outcome(result, json_only) for result, (_, _, json_only, _, _) in zip(results, items)]
        others = [array for (_, _, arrays), item in zip(outcomes, items) if item[4] is None for array in arrays]
        places = iter(self._response.write(others))
        written: list[Any] = []
        for (status, text, arrays), (*_, name) in zip(outcomes, items):
            own = [next(places) for _ in arrays] if name is None else self._buffers[name].response.write(arrays)
            written.append((status, text, own))
        return written

    def _stream(self, args: str, items: Sequence[Any], inputs: list[Any]) -> list[Any]:
        """Sends each value as (status or None, JSON or message, places). Waits after each until the front agrees."""
        values = self._runner.stream(self._receive(items[0], inputs), args)
        for value in values:
            status, text, arrays = runner.encode_outcome(value, items[0][2])
            try:
                places = self._response.write(arrays)
            except Exception as error:  # there is no memory for them
                status, text, places = ModelError.status, message_of(error, named=True), []
            self._connection.send((status, text, places))
            message = self._connection.receive()
            if not (message and message[0]):
                break
        values.close()
        return []

    def _receive(self, item: Any, inputs: list[Any]) -> codec.Encoded | ServerError:
        """The input, or an error if its memory cannot be mapped."""
        text, places, _, name, _ = item
        try:
            arrays = self._buffers[name].request.read(places) if places else []
        except (OSError, OverflowError) as error:
            _end_without_descriptors(error)
            return InvalidInput(f"the shared memory of the request cannot be mapped: {error}")
        inputs += [(name, weakref.ref(_owner(array))) for array in arrays]
        return codec.Encoded(text, arrays)


def _end_without_descriptors(error: BaseException) -> None:
    """Raises an error again that says that this process has no descriptor free: another worker can do the work."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        raise error


def _owner(array: Any) -> Any:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def main() -> None:
    """Serves one model until the front closes the connections."""
    code = 1
    try:
        _serve(WorkerConnection(socket.socket(fileno=int(sys.argv[1]))))
        code = 0
    except EOFError:  # the front does not need this process
        pass
    except BaseException:
        log.exception("the worker fails")
    _end(code)


def _serve(control: WorkerConnection) -> None:
    spec, _ = _receive(control)
    logs.configure_worker(*spec["log"])
    name, path = spec["name"], Path(spec["path"])

    def load(function: Callable[..., Any], *arguments: Any) -> Any:
        """What a step of loading returns. If it fails, the front gets the reason, and the process ends."""
        result = attempt(function, *arguments)
        if failed(result):
            log.error("model %s could not be loaded", name, exc_info=mistakes.from_folder(result, path))
            control.send(("failed", mistakes.describe(result, path)))
            _end(1)
        return result

    plugin = load(runner.import_plugin, name, path)
    types = load(types_of, plugin)
    for problem in types.problems:
        log.warning("model %s: %s", name, problem)
    control.send(("declared", load(runner.declared, plugin, types) | {"pid": os.getpid()}))
    (options, threads), _ = _receive(control)
    loop: Any = None
    if runner.is_async(plugin):
        from tiny_model_server.engine.event_loop import EventLoop  # the other models need no asyncio

        loop = EventLoop()
    call = loop.call if loop else runner.call_directly
    load(mistakes.check_arguments, name, plugin, options.args)
    model, input_shape = load(runner.construct, plugin, options, threads, types, call)
    for doubt in load(mistakes.doubts, model, path):
        log.warning("model %s: %s", name, doubt)
    control.send(("ready", input_shape))
    _, fds = _receive(control)
    slots = [Slot(end, response, (name, model, options, types), loop) for end, response in zip(fds[::2], fds[1::2])]
    if loop:
        loop.run_beside(ThreadPoolExecutor(len(slots)), [slot.serve for slot in slots])
    else:
        others = [threading.Thread(target=slot.serve) for slot in slots[1:]]
        for thread in others:
            thread.start()
        slots[0].serve()  # in the main thread, which some libraries need
        for thread in others:
            thread.join()
    _end_in(_CLOSE_S, f"close() of model {name!r}")
    call(model.close)


def _receive(connection: WorkerConnection) -> tuple[Any, list[int]]:
    message = connection.receive()
    assert message  # its socket blocks
    return message


def _end_in(seconds: float, what: str) -> None:
    """Ends this process at the latest then."""

    def end() -> None:
        log.error("%s takes longer than %g s; the worker ends", what, seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _end(code: int) -> NoReturn:
    """Ends this process, whatever threads the model has left running; Python itself would wait for them."""
    try:
        _end_in(_EXIT_S, "what the model has registered with atexit")
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        log.exception("what the model left to be done at exit fails")
    finally:
        os._exit(code)
