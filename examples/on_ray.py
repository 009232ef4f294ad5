"""Serves the same models folder on a Ray cluster: Ray Serve's gRPC ingress, the same contract, the same ModelClient.

Run ``python examples/on_ray.py`` (it needs requirements-ray.txt beside the server's own), with the settings of
the server. It joins the cluster that RAY_ADDRESS names, or starts one here. Each model is a deployment. ``workers`` is
the number of its replicas, each with one worker process. If ``max_workers`` is higher, Ray scales between the two by
calls in flight. Each replica gets a GPU if the cluster has one and ``devices`` is not "cpu".
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import grpc  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import gRPCOptions  # noqa: E402
from ray.serve.grpc_util import RayServegRPCContext  # noqa: E402

from tiny_model_server import schemas  # noqa: E402
from tiny_model_server.engine.call import Call  # noqa: E402
from tiny_model_server.engine.engine import Engine  # noqa: E402
from tiny_model_server.errors import ServerError  # noqa: E402
from tiny_model_server.protocols import native  # noqa: E402
from tiny_model_server.settings import ModelOptions, Settings  # noqa: E402

METHODS = schemas.methods(native.SCHEMA, native.SERVICE)
LOCAL = {"ListModels", "GetModelStates", "GetPID", "GetNumParallelWorkers"}
"""Calls that the ingress answers itself."""
REFUSED = {"StopServer", "LoadModel", "UnloadModel", "ReloadModel"}
"""Calls that change the server. Here Ray does that."""
TIMEOUT_S = 300.0


class Running:
    """An engine whose event loop runs in a thread of its own; its blocking methods may be called from other threads."""

    def __init__(self, settings: Settings) -> None:
        self.engine, self._loop = Engine(settings), asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()
        self._wait(self.engine.use_loop())

    def stop(self) -> None:
        """Ends the workers and the loop."""
        self._wait(self.engine.stop(5))
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Served:
    """One replica of one model: an engine with only that model, and its stages if it is a pipeline."""

    def __init__(self, name: str) -> None:
        self.running = Running(replace(Settings.from_env(), one_core=False))
        engine = self.running.engine
        model = engine.wait(engine.load(name, workers=1))
        for stage in model.stages:
            engine.wait(engine.load(stage, workers=1))
        engine.started = True
        self.handlers = native.handlers(engine)
        self.replica = serve.get_replica_context().replica_id.unique_id

    async def answer(self, method: str, request: bytes, metadata: dict[str, str]) -> tuple[str, str, bytes]:
        """Returns (status, replica or error message, response), as the server itself would answer."""
        call = Call(time.monotonic() + TIMEOUT_S, metadata=metadata, repeatable=metadata.get("tms-retry") != "no")
        try:
            parsed = METHODS[method].request.FromString(request)
            response = await asyncio.to_thread(self.handlers[method], parsed, call)
            return "OK", self.replica, response.SerializeToString()
        except ServerError as error:
            return error.status, str(error), b""

    def stream(self, method: str, request: bytes, metadata: dict[str, str]) -> Iterator[tuple[str, str, bytes]]:
        """Yields what ``answer`` returns, once for each value that the model yields."""
        call = Call(time.monotonic() + TIMEOUT_S, metadata=metadata)
        try:
            for response in self.handlers[method](METHODS[method].request.FromString(request), call):
                yield "OK", self.replica, response.SerializeToString()
        except ServerError as error:
            yield error.status, str(error), b""

    def __del__(self) -> None:
        self.running.stop()


class Bytes(bytes):
    """A serialized response, with the method that Ray calls."""

    def SerializeToString(self) -> bytes:
        """Returns the bytes."""
        return bytes(self)


class Ingress:
    """Sends each call to the deployment of the model that it names."""

    def __init__(self, **models: Any) -> None:
        self.models = models

    async def unary(self, method: str, request: bytes, context: RayServegRPCContext) -> Any:
        """Answers a unary call."""
        if method in LOCAL:
            return self.local(method)
        if method in REFUSED:
            return self.fail(
                context, "UNIMPLEMENTED", "on Ray, models are changed by Ray: deploy again, or use its API"
            )
        handle = self.handle(method, request, context)
        if handle is None:
            return Bytes()
        status, said, response = await handle.answer.remote(method, request, dict(context.invocation_metadata()))
        if status != "OK":
            return self.fail(context, status, said)
        context.set_trailing_metadata([("tms-replica", said)])
        return Bytes(response)

    async def streamed(self, method: str, request: bytes, context: RayServegRPCContext) -> AsyncIterator[Any]:
        """Answers a streaming call."""
        handle = self.handle(method, request, context)
        if handle is None:
            return
        metadata = dict(context.invocation_metadata())
        async for status, said, response in handle.options(stream=True).stream.remote(method, request, metadata):
            if status != "OK":
                self.fail(context, status, said)
                return
            yield Bytes(response)

    def handle(self, method: str, request: bytes, context: RayServegRPCContext) -> Any:
        """Returns the deployment of the model that a request names, or fails the call and returns None."""
        parsed = METHODS[method].request.FromString(request)
        name = parsed.data if method == "GetInputShape" else parsed.model
        if name not in self.models:
            known = ", ".join(sorted(self.models)) or "none"
            self.fail(context, "NOT_FOUND", f"there is no model {name!r}; there are: {known}")
        return self.models.get(name)

    def fail(self, context: RayServegRPCContext, status: str, message: str) -> Bytes:
        """Ends a call with an error."""
        context.set_code(grpc.StatusCode[status])
        context.set_details(message)
        return Bytes()

    def local(self, method: str) -> Any:
        """Answers a call that needs no model."""
        if method == "GetModelStates":
            states = METHODS[method].response()
            for name in sorted(self.models):
                states.models.add(name=name, state="READY")
            return states
        answers = {"ListModels": sorted(self.models), "GetPID": {"pid": os.getpid()}}
        return METHODS[method].response(data=json.dumps(answers.get(method, {"num_workers": 1})))


def _add(method: str) -> None:
    async def unary(self: Ingress, request: bytes, grpc_context: RayServegRPCContext) -> Any:
        return await self.unary(method, request, grpc_context)

    async def streamed(self: Ingress, request: bytes, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        async for response in self.streamed(method, request, grpc_context):
            yield response

    setattr(Ingress, method, streamed if METHODS[method].server_streaming else unary)


for _method in METHODS:
    _add(_method)


def add_servicer(servicer: Any, server: Any) -> None:
    """Registers the contract with Ray's proxy. Requests stay bytes until they reach a replica."""
    kinds = {False: grpc.unary_unary_rpc_method_handler, True: grpc.unary_stream_rpc_method_handler}
    table = {name: kinds[method.server_streaming](lambda request, context: None) for name, method in METHODS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(native.SERVICE, table),))


def options_of(settings: Settings) -> dict[str, ModelOptions]:
    """Returns the options of every model that can be loaded here, and prints why others cannot."""
    running, found = Running(settings), {}
    engine = running.engine
    for model in engine.models():
        try:
            loaded = engine.wait(engine.load(model.name)).loaded
            assert loaded
            found[model.name] = loaded.options
            engine.wait(engine.unload(model.name))
        except ServerError as error:
            print(f"model {model.name} is left out: {error}", file=sys.stderr)
    running.stop()
    return found


def ray_options(name: str, options: ModelOptions, cpus: float, gpus: float) -> dict[str, Any]:
    """Returns the replicas, GPUs and autoscaling of a model's deployment, from the model's options."""
    at_once = max(1, options.max_batch_size * options.concurrency)
    settings: dict[str, Any] = {"name": name, "max_ongoing_requests": 2 * at_once + 2}
    settings["ray_actor_options"] = {"num_cpus": cpus, "num_gpus": int(gpus > 0 and options.devices != ("cpu",))}
    if options.max_workers > options.workers:
        limits = {"min_replicas": options.workers, "max_replicas": options.max_workers}
        settings["autoscaling_config"] = limits | {"target_ongoing_requests": at_once}
    else:
        settings["num_replicas"] = options.workers
    return settings


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    settings = Settings.from_env()
    os.environ["TMS_MODELS_DIR"] = str(settings.models_dir.resolve())
    paths = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    models = options_of(settings)
    ours = {name: value for name, value in os.environ.items() if name.startswith("TMS_") or name == "PYTHONPATH"}
    local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(runtime_env={"env_vars": ours}, **local)
    serve.start(grpc_options=gRPCOptions(port=settings.port, grpc_servicer_functions=["on_ray.add_servicer"]))
    has = ray.cluster_resources()
    most = sum(max(options.workers, options.max_workers) for options in models.values())
    cpus = min(1.0, has["CPU"] / (most + 1))  # a core for each replica, or less if there are fewer cores
    served = {
        name: serve.deployment(Served).options(**ray_options(name, options, cpus, has.get("GPU", 0))).bind(name)
        for name, options in models.items()
    }
    ingress = serve.deployment(Ingress).options(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    serve.run(ingress.bind(**served), name="tiny-model-server")
    print(f"serving {len(served)} models on Ray, gRPC on port {settings.port}", flush=True)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    import on_ray  # as a module, so that Ray's processes can import its classes by name

    on_ray.main()
