"""The life of a server process: load, serve, drain, stop."""

import asyncio
import logging
import os
import signal
import threading
from contextlib import suppress

from tiny_model_server import ending, local_transport
from tiny_model_server.engine import children
from tiny_model_server.engine.busy_polling import BusyPollingSelector
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.placement import cpus, keep_memory, keep_to_one_core
from tiny_model_server.engine.repository import State
from tiny_model_server.server.grpc_server import GrpcServer
from tiny_model_server.server.http_access_log import HttpAccessLog
from tiny_model_server.server.http_app import Web
from tiny_model_server.server.http_server import HttpServer
from tiny_model_server.server.local_server import LocalServer
from tiny_model_server.server.reload import watch
from tiny_model_server.server.siblings import authority
from tiny_model_server.settings import Settings, check_overrides

log = logging.getLogger("tiny_model_server")

_STOP_WORKERS_S = 5.0
_STOP_REST_S = 5.0


def serve(settings: Settings) -> int:
    """Serves until SIGTERM, SIGINT or StopServer; a second signal hurries the stop."""
    log.info("settings: %s", settings.describe())
    keep_memory()
    children.adopt_orphans()
    if settings.one_core:
        keep_to_one_core(settings.port or os.getpid())  # several servers on one host take several cores
    engine = Engine(settings)
    check_overrides([model.name for model in engine.models()], settings.protocols)
    cores = cpus() / settings.sharing
    few = max(2, int(cores) // 2)  # to each call belong a caller and a worker, which need cores too
    seconds = settings.busy_poll_us / 1e6 if cores >= 2 else 0
    selector = BusyPollingSelector(seconds, lambda: engine.calls <= few)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return ending.leave(runner.run(_serve(engine, settings)))


async def _serve(engine: Engine, settings: Settings) -> int:
    await engine.use_loop()
    loop, hurry, stopped = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    grpc_server = GrpcServer(engine, settings)
    http = None
    if settings.http_port is not None:
        web = Web(engine, settings, grpc_server.port)
        app = HttpAccessLog(web) if settings.access_log else web
        http = HttpServer(app, settings, engine.inflight.limit // 2)
    engine.access.ports = frozenset([grpc_server.port, *([http.port] if http else [])])
    local = _open_local(engine, settings, grpc_server)

    def obey(number: int) -> None:
        # The supervisor's first signal is SIGTERM. systemd sends it to each process as well, which is no hurry.
        if engine.stop_requested.is_set() and not (settings.replica and number == signal.SIGTERM):
            hurry.set()
            ending.within(_STOP_WORKERS_S + _STOP_REST_S)
            grpc_server.stop(0)
            if http:
                http.stop(0)
        engine.stop_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, obey, number)
    loop.add_signal_handler(signal.SIGCHLD, children.reap)
    grpc_server.start()
    if local:
        local.start()
    if http:
        http.start()
    http_at = f", HTTP on {authority(settings.host, http.port)}" if http else ""
    log.info("listening: gRPC on %s%s, pid %d", authority(settings.host, grpc_server.port), http_at, os.getpid())
    if http:
        page = authority("localhost" if settings.host in ("0.0.0.0", "::") else settings.host, http.port)
        log.info("to try the models: %s://%s/", "https" if settings.tls_cert else "http", page)
    log.info("protocols: %s", ", ".join(settings.protocols))
    log.info("who may stop the server and change its models: %s", engine.access.who_may())
    loading = asyncio.create_task(_load(engine, settings, stopped))
    await engine.stop_requested.wait()
    stopped.set()
    log.info("stopping")
    ending.within(settings.drain_delay_s + settings.grace_s + _STOP_WORKERS_S + _STOP_REST_S)
    grpc_server.refuse_health()
    with suppress(TimeoutError):
        await asyncio.wait_for(hurry.wait(), settings.drain_delay_s)
    grace_s = 0 if hurry.is_set() else settings.grace_s
    ended = grpc_server.stop(grace_s)
    if http:
        http.stop(grace_s)
    if local:
        await local.stop(grace_s)
    await asyncio.to_thread(ended.wait)
    if http:
        await asyncio.to_thread(http.join, grace_s + _STOP_WORKERS_S)
    await engine.stop(0 if hurry.is_set() else _STOP_WORKERS_S)
    failed = await loading
    for number in (signal.SIGTERM, signal.SIGINT):  # another one would end the process with another code
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    log.info("stopped")
    return 1 if failed else 0


def _open_local(engine: Engine, settings: Settings, grpc_server: GrpcServer) -> LocalServer | None:
    """The local transport, where it may be: for loopback callers of a server without TLS."""
    on_loopback = settings.host in ("0.0.0.0", "::", *local_transport.LOOPBACK)
    wanted = settings.local_transport and "native" in settings.protocols and not settings.tls_cert
    if not (wanted and on_loopback and local_transport.available()):
        return None
    try:
        return LocalServer(engine, grpc_server.port, grpc_server.replica)
    except OSError as error:
        log.warning("no local transport for clients on this host: %s", error)
        return None


async def _load(engine: Engine, settings: Settings, stopped: threading.Event) -> bool:
    """Loads the models. Returns True if the server is to end because one has failed."""
    await engine.start()
    if stopped.is_set():
        return False
    bad = [model.name for model in engine.models() if model.state is State.FAILED]
    good = len(engine.models()) - len(bad)
    log.info("serving %d models%s", good, f"; FAILED: {', '.join(bad)}" if bad else "")
    if settings.reload:
        threading.Thread(target=watch, args=(engine, settings.models_dir, stopped), name="reload").start()
    if not engine.models():
        log.warning("there is no model in %s yet; make one: tiny-model-server new NAME", settings.models_dir.resolve())
    if bad and settings.strict:
        log.error("TMS_STRICT=1: stopping, because not every model could be loaded")
        engine.request_stop()
        return True
    return False
