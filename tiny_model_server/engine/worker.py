"""The child process: import, construct, warm up, run. No gRPC in here; it dies and is replaced alone.

Started as ``python tiny_model_server/worker_path FD``; FD is the control socket. On it the front sends the plug-in to
import, hears what its class declares, sends the options and one socket and two segments for each slot, and hears
"ready" or "failed". Each slot then takes batches from its own socket until that is closed.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from model_interface import ModelInterface
from tiny_model_server import codec, custom_metrics, logs
from tiny_model_server.engine.runner import (
    Runner,
    SafeLog,
    declared,
    describe,
    encode_outcome,
    end_if_forked,
    import_plugin,
    is_shape,
)
from tiny_model_server.engine.worker_connection import Pipe
from tiny_model_server.errors import InvalidInput, ModelError, ServerError, message_of
from tiny_model_server.shared_memory import Place, Segment

log = SafeLog(logging.getLogger("tiny_model_server.worker"))

_CLOSE_S = 10.0  # that Model.close() has
_EXIT_S = 2.0  # that functions of atexit have


class _Caller(NamedTuple):
    """The buffers of a caller on this host; ``owned`` says that the request buffer is the caller's own memory."""

    request: Segment
    response: Segment
    owned: bool

    def close(self) -> None:
        """Lets both go; what the model keeps of them stays."""
        self.request.close()
        self.response.close()


class Slot:
    """One batch at a time: a socket for control, a segment for what comes in, one for what goes out."""

    def __init__(self, fds: Sequence[int], runner: Runner) -> None:
        self._pipe = Pipe(socket.socket(fileno=fds[0]))
        self._inbox = Segment(fds[1])
        self._outbox = Segment(fds[2])
        self._callers: dict[int, _Caller] = {}  # those that share memory with us
        self._runner = runner

    def serve(self) -> None:
        """Runs batches until the front closes the socket, or is gone."""
        try:
            self._serve()
        finally:
            self._pipe.close()  # so that the front does not wait for this slot

    def _serve(self) -> None:
        while True:
            try:
                (args, items, streams, new_inbox, fresh, gone), fds = self._pipe.receive()
                if new_inbox:
                    self._inbox.close()
                    self._inbox = Segment(fds.pop(0))
                for (name, owned), request, response in zip(fresh, fds[::2], fds[1::2]):
                    self._callers[name] = _Caller(Segment(request), Segment(response), owned)
                for name in gone:
                    self._callers.pop(name).close()
                alive: list[tuple[int | None, weakref.ref[Any]]] = []
                started = time.monotonic()
                outcomes: list[Any] = []
                if streams:
                    self._stream(args, items, alive)
                else:
                    outcomes = self._outcomes(args, items, alive)
                # A model that keeps its input (or a view of it) gets to own it: the front then fills another segment,
                # but for memory that an application fills. What is kept is alive, whenever the rest is collected.
                kept = {name for name, reference in alive if reference() is not None}
                for name in [name for name in kept if name is not None and self._callers[name].owned]:
                    self._callers[name].request.detach()
                    kept.remove(name)
                seconds = time.monotonic() - started
                self._pipe.send((outcomes, seconds, kept, custom_metrics.drain()))
            except EOFError:
                return
            except OSError as error:
                if error.errno == errno.EMFILE:
                    log.error("the model has left no descriptor free; the worker ends")
                return

    def _outcomes(self, args: str, items: Sequence[Any], alive: list[Any]) -> list[Any]:
        """What ``_run`` makes of the batch; if it fails, for want of memory say, an error for each item."""
        try:
            return self._run(args, items, alive)
        except Exception as error:
            _end_without_descriptors(error)
            log.error("a batch could not be read, or its answer not be written", exc_info=error)
            outcome = error if isinstance(error, ServerError) else ModelError(message_of(error, named=True))
            return [encode_outcome(outcome, True) for _ in items]

    def _run(self, args: str, items: Sequence[Any], alive: list[Any]) -> list[Any]:
        received = self._receive(items, alive)
        readable = [one for one in received if isinstance(one, codec.Encoded)]
        answers = iter(self._runner.run(readable, codec.parse_args(args)))
        results = [one if isinstance(one, ServerError) else next(answers) for one in received]
        del received, readable
        encoded = [encode_outcome(result, item[2]) for result, item in zip(results, items)]
        try:
            return self._write(encoded, [item[4] for item in items])
        except OSError as error:
            _end_without_descriptors(error)
            log.error("no memory for the answers: %s", error)
            return [(ModelError.status, f"there is no memory for the model's answer: {error}", [])] * len(items)

    def _write(
        self, encoded: Sequence[tuple[str | None, str, list[codec.Array]]], callers: Sequence[int | None]
    ) -> list[tuple[str | None, str, list[Place]]]:
        """Puts the arrays of the answers where their callers look for them, or into the slot's own segment."""
        outcomes: list[tuple[str | None, str, list[Place]]] = []
        ours: list[tuple[list[Place], codec.Array]] = []
        for (status, text, arrays), caller in zip(encoded, callers):
            places = [] if caller is None or not arrays else self._callers[caller].response.write(arrays)
            if caller is None:
                ours += [(places, array) for array in arrays]
            outcomes.append((status, text, places))
        for (places, _), place in zip(ours, self._outbox.write([array for _, array in ours])):
            places.append(place)
        return outcomes

    def _stream(self, args: str, items: Sequence[Any], alive: list[Any]) -> None:
        """Sends each value as (status, text, places), and goes on when the front says so."""
        values = self._values(args, items, alive)
        for value in values:
            self._pipe.send(self._written(value, items[0][2]))
            if not self._pipe.receive()[0]:
                break
        values.close()

    def _values(self, args: str, items: Sequence[Any], alive: list[Any]) -> Generator[Any, None, None]:
        try:
            (packed,) = self._receive(items, alive)
            if isinstance(packed, ServerError):
                raise packed
            values = self._runner.stream(packed, codec.parse_args(args))
            del packed
        except Exception as error:
            yield error if isinstance(error, ServerError) else ModelError(message_of(error, named=True))
            return
        yield from values

    def _written(self, value: Any, plain: bool) -> tuple[str | None, str, list[Place]]:
        status, text, arrays = encode_outcome(value, plain)
        try:
            return status, text, self._outbox.write(arrays)
        except Exception as error:  # no memory for them
            return ModelError.status, f"the answer cannot be handed over: {message_of(error, named=True)}", []

    def _receive(self, items: Sequence[Any], alive: list[Any]) -> list[codec.Encoded | ServerError]:
        """The inputs, and an error in the place of one whose memory cannot be mapped."""
        packed: list[codec.Encoded | ServerError] = []
        for text, places, _, source, *_ in items:
            try:
                arrays = (self._inbox if source is None else self._callers[source].request).read(places)
            except (OSError, OverflowError) as error:
                _end_without_descriptors(error)
                packed.append(InvalidInput(f"the memory in which the request lies cannot be mapped: {error}"))
                continue
            alive += [(source, weakref.ref(_owner(array))) for array in arrays]
            packed.append(codec.Encoded(text, arrays))
        return packed


def _end_without_descriptors(error: BaseException) -> None:
    """Raises an error again that says that this process has no descriptor free: another worker can do the work."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        raise error


def _owner(array: Any) -> Any:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _load(control: Connection, spec: dict[str, Any]) -> tuple[Runner, ModelInterface, int] | None:
    name, path, pid = spec["name"], Path(spec["path"]), os.getpid()
    try:
        plugin = import_plugin(name, path)
        end_if_forked(pid)
        control.send(("declared", declared(plugin) | {"pid": os.getpid()}))
        try:
            options, threads = control.recv()
        except EOFError:  # the front has no use for this process
            return None
        plugin.threads = threads
        model = plugin(**options.args)
        model.warmup()
        shape = model.get_input_shape()
        input_shape = None if shape is None else [int(size) for size in shape]
        if not is_shape(input_shape):
            raise ValueError(f"get_input_shape() must return whole numbers from -1, not {input_shape}")
        end_if_forked(pid)
    except BaseException as error:  # a plug-in may raise anything, SystemExit too
        end_if_forked(pid)
        log.error("model %s could not be loaded", name, exc_info=error)
        control.send(("failed", describe(error, path)))
        return None
    control.send(("ready", input_shape))
    return Runner(name, model, options), model, options.concurrency


def _receive_slots(control: Connection, runner: Runner, count: int) -> list[Slot]:
    return [Slot([reduction.recv_handle(control) for _ in range(3)], runner) for _ in range(count)]


def main() -> None:
    """Serves one model until the front lets go."""
    code = 1
    try:
        code = _serve(Connection(int(sys.argv[1])))
    except BaseException:
        log.exception("the worker fails")
    _end(code)


def _serve(control: Connection) -> int:
    spec = control.recv()
    logs.configure(spec["log_level"], spec["log_format"])
    loaded = _load(control, spec)
    if loaded is None:
        return 1
    runner, model, count = loaded
    slots = _receive_slots(control, runner, count)
    threads = [threading.Thread(target=slot.serve) for slot in slots[1:]]
    for thread in threads:
        thread.start()
    slots[0].serve()
    for thread in threads:
        thread.join()
    _end_in(_CLOSE_S, f"close() of model {spec['name']!r}")
    model.close()
    return 0


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
