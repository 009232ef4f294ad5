"""mmesh.ModelRuntime: ModelMesh's sidecar loads models from any path by ids of its own, and routes calls by these ids.

The sidecar has no token. It may load what TMS_ADMIN lets it or, from this host, what is in TMS_MESH_MODELS_DIR.
Loads and unloads of one id come one after the other. A load whose caller has disconnected leaves nothing behind.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from tiny_model_server import __version__, access, schemas
from tiny_model_server.engine import placement
from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel, State
from tiny_model_server.errors import Cancelled, InvalidInput, ModelError, ModelNotFound
from tiny_model_server.settings import ModelOptions, SettingsError

SCHEMA = "model_mesh"
SERVICE = "mmesh.ModelRuntime"

_MIB = 1 << 20
_NATIVE = "RunText RunImage RunBatchText RunBatchImage RunImageToImage Run RunBatch RunStream".split()
# The number of the field that has the model's name, by call. The sidecar passes on no other calls.
_NAME_FIELDS = dict.fromkeys((f"server.Server/{method}" for method in _NATIVE), 2) | {
    "server.Server/GetInputShape": 1,
    "inference.GRPCInferenceService/ModelInfer": 1,
    "inference.GRPCInferenceService/ModelMetadata": 1,
}


def handlers(engine: Engine) -> dict[str, Callable[[Any, Call], Any]]:
    """The function that answers each method; SettingsError if the sidecar would not start with these settings."""
    return schemas.handlers(_ModelMesh(engine), SCHEMA, SERVICE)


class _ModelMesh:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._locks: dict[str, threading.Lock] = {}  # by id
        self._adopted: set[str] = set()
        self._measured: dict[str, int] = {}  # bytes, by path
        self._default = engine.settings.mesh_default_mb * _MIB
        self._capacity = engine.settings.mesh_capacity_mb * _MIB or placement.memory() * 3 // 4
        least = max(2 * self._default, min(512 * _MIB, 10 * self._default))
        if self._capacity < least:
            why = f"ModelMesh wants at least {least // _MIB} with TMS_MESH_DEFAULT_MB={self._default // _MIB}"
            raise SettingsError(f"TMS_MESH_CAPACITY_MB is {self._capacity // _MIB}; {why}")

    def loadModel(self, request: Any, call: Call) -> dict[str, Any]:
        if not request.modelId or not request.modelPath or "\0" in request.modelPath:
            raise InvalidInput("send modelId, and modelPath: a folder with an __init__.py that holds class Model")
        self._authorize(call, path := Path(os.path.realpath(request.modelPath)))  # resolve() fails if links go round
        with self._lock(request.modelId):
            model = self._find(request.modelId)
            if not model or model.state is not State.READY:
                model = self._load(request.modelId, path, call)
        size = self._measured[request.modelPath] = model.memory or self._default
        return {"sizeInBytes": size, "maxConcurrency": model.metrics.places}

    def _load(self, name: str, path: Path, call: Call) -> ServedModel:
        """Waits for the load or until the caller disconnects. Then forgetting the model ends the load."""
        self._engine.wait(self._engine.adopt(name, path))
        self._adopted.add(name)
        loading, over = self._engine.submit(self._engine.load(name)), threading.Event()
        loading.add_done_callback(lambda _: over.set())
        if call.on_end(over.set):
            over.wait()
        if not call.on_end(over.set):
            self._forget(name, 0)
            wait([loading])
            raise Cancelled("the load was cancelled")
        if error := loading.exception():
            self._forget(name, 0)
            raise ModelError(str(error))  # other codes say that no load was tried
        return loading.result()

    def unloadModel(self, request: Any, call: Call) -> dict[str, Any]:
        self._authorize(call)
        self._unload(request.modelId)
        return {}

    def predictModelSize(self, request: Any, call: Call) -> dict[str, Any]:
        return {"sizeInBytes": self._measured.get(request.modelPath, self._default)}

    def modelSize(self, request: Any, call: Call) -> dict[str, Any]:
        model = self._engine.model(request.modelId)
        if model.state is not State.READY:
            raise ModelNotFound(f"model {request.modelId!r} is not loaded")
        return {"sizeInBytes": model.memory or self._default}

    def runtimeStatus(self, request: Any, call: Call) -> dict[str, Any]:
        self._authorize(call)
        if not self._engine.started:
            return {"status": "STARTING"}
        for model in self._engine.models():
            self._unload(model.name)
        return {
            "status": "READY",
            "capacityInBytes": self._capacity,
            "maxLoadingConcurrency": 4,
            "modelLoadingTimeoutMs": int(ModelOptions().load_timeout_s * 1000),
            "defaultModelSizeInBytes": self._default,
            "runtimeVersion": __version__,
            "methodInfos": {path: {"idInjectionPath": [field]} for path, field in _NAME_FIELDS.items()},
        }

    def _authorize(self, call: Call, path: Path | None = None) -> None:
        """PermissionDenied if the caller may not load from this path, or may not be the sidecar."""
        folder = self._engine.settings.mesh_models_dir
        within = folder and (path is None or path.is_relative_to(folder.resolve()))
        if not (within and access.on_this_host(call.peer, call.metadata)):
            self._engine.access.authorize(call)

    def _lock(self, name: str) -> threading.Lock:
        return self._locks.setdefault(name, threading.Lock())

    def _find(self, name: str) -> ServedModel | None:
        return next((model for model in self._engine.models() if model.name == name), None)

    def _unload(self, name: str) -> None:
        with self._lock(name):
            if not (model := self._find(name)):
                return
            if name in self._adopted:
                self._forget(name, model.loaded.options.timeout_s if model.loaded else 0)
            else:
                self._engine.wait(self._engine.unload(name))

    def _forget(self, name: str, grace_s: float) -> None:
        self._engine.wait(self._engine.forget(name, grace_s))
        self._adopted.discard(name)
