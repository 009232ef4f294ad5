"""mmesh.ModelRuntime: ModelMesh's sidecar loads models from any path by ids of its own, and routes calls by these ids.

The sidecar has no token. It may load what TMS_ADMIN lets it or, from this host, what is in TMS_MESH_MODELS_DIR.
Loads and unloads of one id come one after the other. A load whose caller has gone ends, and leaves nothing behind.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_model_server import __version__, schemas
from tiny_model_server.engine import placement
from tiny_model_server.engine.engine import Call, Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import Cancelled, InvalidInput, ModelError, ModelNotFound, ServerError
from tiny_model_server.server import callers
from tiny_model_server.settings import ModelOptions, SettingsError

SCHEMA = "model_mesh"
SERVICE = "mmesh.ModelRuntime"

_LOADS_AT_ONCE = 4
_MIB = 1 << 20
# Where these calls carry the model's name: field numbers. The sidecar passes on no other calls.
_NAME_FIELDS = {
    "inference.GRPCInferenceService": {"ModelInfer": 1, "ModelMetadata": 1},
    "server.Server": dict.fromkeys(
        ("RunText", "RunImage", "RunBatchText", "RunBatchImage", "RunImageToImage", "Run", "RunBatch", "RunStream"), 2
    )
    | {"GetInputShape": 1},
}


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method; SettingsError if the sidecar would not start with these settings."""
    door = _ModelMesh(engine)
    return {name: getattr(door, name) for name in schemas.methods(SCHEMA, SERVICE)}


class _ModelMesh:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._methods = schemas.methods(SCHEMA, SERVICE)
        self._turns: dict[str, _Turn] = {}
        self._lock = threading.Lock()
        self._adopted: set[str] = set()
        self._measured: dict[str, int] = {}  # bytes, by path
        self._default = engine.settings.mesh_default_mb * _MIB
        self._capacity = engine.settings.mesh_capacity_mb * _MIB or placement.memory() * 3 // 4
        least = max(2 * self._default, min(512 * _MIB, 10 * self._default))
        if self._capacity < least:
            raise SettingsError(
                f"TMS_MESH_CAPACITY_MB is {self._capacity // _MIB}; with TMS_MESH_DEFAULT_MB={self._default // _MIB} "
                f"ModelMesh wants at least {least // _MIB}"
            )

    def loadModel(self, request: Any, call: Call) -> Any:
        self._authorize(call, path := Path(request.modelPath).resolve())
        if not request.modelId or not request.modelPath:
            raise InvalidInput("send modelId, and modelPath: a folder with an __init__.py that holds class Model")
        with self._turn(request.modelId):
            if (known := self._find(request.modelId)) and known.state is State.READY:
                return self._loaded(request, known)
            model = self._engine.adopt(request.modelId, path)
            self._adopted.add(request.modelId)
            gone, loaded = threading.Event(), threading.Event()

            def end() -> None:
                gone.set()
                if not loaded.is_set():
                    threading.Thread(target=model.stop, args=(0,), name="undo").start()

            if not call.on_end(end):
                end()
            try:
                self._engine.load(request.modelId)
                loaded.set()
                if not gone.is_set():
                    return self._loaded(request, model)
                raise Cancelled("the load was cancelled")
            except ServerError as error:
                self._forget(request.modelId, 0)
                if gone.is_set():
                    raise Cancelled("the load was cancelled") from None
                raise ModelError(str(error)) from None  # other codes say that no load was tried

    def unloadModel(self, request: Any, call: Call) -> Any:
        self._authorize(call)
        with self._turn(request.modelId):
            self._unload(request.modelId)
        return self._answer("unloadModel")

    def predictModelSize(self, request: Any, call: Call) -> Any:
        size = self._measured.get(request.modelPath, self._default)
        return self._answer("predictModelSize", sizeInBytes=size)

    def modelSize(self, request: Any, call: Call) -> Any:
        model = self._engine.model(request.modelId)
        if model.state is not State.READY:
            raise ModelNotFound(f"model {request.modelId!r} is not loaded")
        return self._answer("modelSize", sizeInBytes=model.memory or self._default)

    def runtimeStatus(self, request: Any, call: Call) -> Any:
        self._authorize(call)
        if not self._engine.started:
            return self._answer("runtimeStatus", status="STARTING")
        for model in self._engine.models():
            with self._turn(model.name):
                self._unload(model.name)
        calls = {
            f"{service}/{method}": {"idInjectionPath": [field]}
            for service, fields in _NAME_FIELDS.items()
            for method, field in fields.items()
        }
        return self._answer(
            "runtimeStatus",
            status="READY",
            capacityInBytes=self._capacity,
            maxLoadingConcurrency=_LOADS_AT_ONCE,
            modelLoadingTimeoutMs=int(ModelOptions().load_timeout_s * 1000),
            defaultModelSizeInBytes=self._default,
            runtimeVersion=__version__,
            methodInfos=calls,
        )

    def _authorize(self, call: Call, path: Path | None = None) -> None:
        """PermissionDenied if the caller may not load from this path, or may not be the sidecar."""
        folder = self._engine.settings.mesh_models_dir
        within = folder and (path is None or path.is_relative_to(folder.resolve()))
        if within and callers.on_this_host(call.peer, call.metadata):
            return
        self._engine.authorize(call)

    def _answer(self, method: str, **fields: Any) -> Any:
        return self._methods[method].response(**fields)

    def _loaded(self, request: Any, model: ServedModel) -> Any:
        size = self._measured[request.modelPath] = model.memory or self._default
        return self._answer("loadModel", sizeInBytes=size, maxConcurrency=model.metrics.places)

    def _find(self, name: str) -> ServedModel | None:
        try:
            return self._engine.model(name)
        except ModelNotFound:
            return None

    def _unload(self, name: str) -> None:
        model = self._find(name)
        if model and name in self._adopted:
            self._forget(name, model.loaded.options.timeout_s if model.loaded else 0)
        elif model:
            model.unload()

    def _forget(self, name: str, grace_s: float) -> None:
        self._engine.forget(name, grace_s)
        self._adopted.discard(name)

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Waits until no other load or unload of this id is under way."""
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.users += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[name]


class _Turn:
    """The lock of one model id, and how many hold it or wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
