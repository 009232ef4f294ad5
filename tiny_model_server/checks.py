"""The commands that report on models and on a running server: ``check``, ``list`` and ``health``."""

import asyncio
import json
import os
import reprlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from tiny_model_server import codec, schemas
from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel, discover
from tiny_model_server.errors import ModelNotFound, ServerError
from tiny_model_server.server import tls
from tiny_model_server.server.health import SERVICE as HEALTH_SERVICE
from tiny_model_server.server.siblings import authority, own_host
from tiny_model_server.settings import Settings, SettingsError, check_overrides

_STOP_WORKERS_S = 5.0
_HEALTH_S = 2.0


def check_models(settings: Settings, targets: Sequence[str]) -> int:
    """Checks models, given by name or by the path of their folder; all of them if none is given.

    Each is loaded, warmed up, and run once with its ``example``. Prints a line for each. Returns 0 if all are good, 1
    if one has failed. SettingsError if a target is no model, or if there is no model at all.
    """
    settings = replace(settings, models_dir=Path(os.path.abspath(settings.models_dir)))
    folders: dict[Path, list[str]] = {} if targets else {settings.models_dir: []}
    for target in targets:
        parent, name = _place(settings, target)
        folders.setdefault(parent, []).append(name)
    good = [one for folder, names in folders.items() for one in asyncio.run(_check(settings, folder, names))]
    if len(good) > 1:
        print(f"{len(good)} models: {sum(good)} ready, {len(good) - sum(good)} failed")
    return 0 if all(good) else 1


def _place(settings: Settings, target: str) -> tuple[Path, str]:
    """The folder that holds a model, and the model's name there."""
    if os.sep not in target or target in dict(settings.aliases):
        return settings.models_dir, target
    path = Path(os.path.abspath(target))
    if path.name == "__init__.py":
        path = path.parent
    if not path.exists():
        raise SettingsError(f"there is no folder {target}")
    if not (path / "__init__.py").is_file():
        raise SettingsError(f"{target} is not a model's folder: it has no __init__.py")
    return path.parent, path.name


async def _check(settings: Settings, folder: Path, names: list[str]) -> list[bool]:
    """Checks these models of a folder, or all, one after the other. True for each that is good."""
    aliases = settings.aliases if folder == settings.models_dir else ()
    engine = Engine(replace(settings, models_dir=folder, aliases=aliases, lazy=True))  # loads stages of pipelines
    if folder == settings.models_dir:
        check_overrides([model.name for model in engine.models()], settings.protocols)
    await engine.use_loop()
    try:
        models = [engine.model(name) for name in names] or engine.models()
        if not models:
            raise SettingsError(f"there is no model in {folder}; make one: tiny-model-server new NAME")
        width = max(len(model.name) for model in models)
        return [await _check_one(engine, model, width) for model in models]
    except ModelNotFound as error:
        raise SettingsError(str(error)) from None
    finally:
        await engine.stop(_STOP_WORKERS_S)


async def _check_one(engine: Engine, model: ServedModel, width: int) -> bool:
    begun, good, batch = time.monotonic(), True, 0
    answer = "no example, so run() was not tried: give the class an example"
    try:
        await model.load()
        if model.loaded:
            batch = model.loaded.options.max_batch_size
        if model.loaded and model.loaded.example is not None:
            encoded = await asyncio.to_thread(engine.run, model.name, model.loaded.example, {}, Call())
            answer = f"answers its example with {_short.repr(codec.decode(encoded))}"
        await model.unload()
    except ServerError as error:
        good, answer = False, model.reason or str(error)
    seconds, state = time.monotonic() - begun, "READY " if good else "FAILED"
    print(f"{model.name:<{width}}  {state}  {seconds:5.1f} s  batch {batch or '-':<4}  {answer}", flush=True)
    return good


class _Short(reprlib.Repr):
    """Values in one line, of arrays only the dtype and the shape."""

    def repr_ndarray(self, array: Any, level: int) -> str:
        """float32[2, 3] of an array."""
        return f"{array.dtype}{list(array.shape)}"


_short = _Short()
_short.maxdict, _short.maxlist, _short.maxstring, _short.maxother = 8, 8, 80, 80


def list_models(settings: Settings) -> int:
    """Prints the model folders, and what is wrong with those that cannot be loaded."""
    for name, path, reason in discover(settings.models_dir):
        print(f"{name}\t{path}{f'  (cannot be loaded: {reason})' if reason else ''}")
    return 0


def health(settings: Settings) -> int:
    """Asks the server of these settings whether it is ready: 0 if it is, 1 if not. For containers' health checks.

    With TMS_REPLICAS, each replica must be ready.
    """
    answers = [_ready_at(settings, address) for address in _addresses(settings)]
    if None in answers:
        return 1
    print(json.dumps({"ready": all(answers)}))
    return 0 if all(answers) else 1


def _ready_at(settings: Settings, address: str) -> bool | None:
    """Whether the server there is ready; None, with a line on stderr, if none answers."""
    check = schemas.methods("health", HEALTH_SERVICE)["Check"]
    try:
        with tls.own_channel(settings, address, _HEALTH_S) as channel:
            ask = channel.unary_unary(check.path, check.request.SerializeToString, check.response.FromString)
            return bool(ask(check.request(), timeout=_HEALTH_S).status == check.response.SERVING)
    except (OSError, grpc.RpcError) as error:
        why = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else error
        print(f"not ready by gRPC at {address}: {why}", file=sys.stderr)
        return None


def _addresses(settings: Settings) -> list[str]:
    """Where a process on this host finds the server's replicas; SettingsError if the settings do not say."""
    if settings.socket:
        return [f"unix:{settings.socket}"]
    if not settings.port:
        raise SettingsError("TMS_PORT=0 takes a free port; for the health command, name one, or set TMS_SOCKET")
    ports = range(settings.port, settings.port + settings.replicas)
    return [authority(own_host(settings), port) for port in ports]
