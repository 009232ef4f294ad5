"""The HTTP port's answers as an ASGI application: probes, metrics, a page for people, a plain POST that runs a model.

A request is refused before its body is read, where the rest of it says enough. What may take time is done in threads;
health is answered by the loop itself, so also while every thread is busy.
"""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tiny_model_server import codec
from tiny_model_server.engine.engine import Call, Engine
from tiny_model_server.errors import Cancelled, InvalidInput, PermissionDenied, ServerError, Stopping
from tiny_model_server.protocols import open_inference
from tiny_model_server.protocols.open_inference_rest import Rest
from tiny_model_server.server import callers
from tiny_model_server.server.forms import read_input, view
from tiny_model_server.settings import Settings

log = logging.getLogger("tiny_model_server.web")

_PAGE = Path(__file__).with_name("page.html")
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_KNOWN = "get /, /livez, /readyz, /models, /metrics or /v2, or post to /models/NAME/run, load, unload or reload"
_TIMEOUT_S = 60.0
_BODY_S, _SLOWEST = 30.0, 1 << 16  # time for a body, and bytes for which it gets a second more, never more than that
_DRAIN_S, _MOST_DRAINED = (
    2.0,
    1 << 26,
)  # time and bytes in which a caller may still send what nobody reads, so that it reads why
_SPARE_THREADS = 8  # more than the engine admits, so that some are always left for refusals and admin calls
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'",
}


class _Refusal(InvalidInput):
    """An error that HTTP has a status of its own for."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Web:
    """Answers GET /, /livez, /readyz, /models and /metrics, POST /models/NAME/ACTION, and /v2 (Open Inference)."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._own_names = {"localhost", socket.gethostname().lower(), *map(str.lower, settings.allowed_hosts)}
        self._rest = Rest(open_inference.handlers(engine)) if "open_inference" in settings.protocols else None
        self._threads = ThreadPoolExecutor(settings.threads + _SPARE_THREADS, thread_name_prefix="http")
        self._few_threads = ThreadPoolExecutor(2, thread_name_prefix="http-get")  # what is read while all are busy
        routes = [
            self._route("GET", "/", self._page),
            self._route("GET", "/livez", self._live),
            self._route("GET", "/readyz", self._ready),
            self._route("GET", "/models", self._models),
            self._route("GET", "/metrics", self._metrics),
            self._route("POST", "/models/{name:path}/run", self._run),
        ]
        routes += [
            self._route("POST", f"/models/{{name:path}}/{action}", partial(self._change, action))
            for action in ("load", "unload", "reload")
        ]
        if self._rest:
            routes += [self._route("GET POST", path, self._open_inference) for path in ("/v2", "/v2/{rest:path}")]
        self._app = Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_method})
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, and closes the connection if its body was not read to the end."""
        headers, rest = Headers(scope=scope), _Incoming(receive)
        # A POST whose headers do not say how long it is may be followed by what its sender takes for the body.
        size = headers.get("content-length", "0" if scope["method"] != "POST" else "unknown")
        rest.unread = "transfer-encoding" in headers or size == "unknown" or int(size) > 0
        scope["path"] = scope["path"].rstrip("/") or "/"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                rest.answered = True
                told = MutableHeaders(raw=message["headers"])
                told.update(_HEADERS | {"Date": formatdate(usegmt=True)})
                if rest.unread:
                    told["Connection"] = "close"
            elif rest.unread and not message.get("more_body"):
                await send({**message, "more_body": True})
                await rest.drain()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        if "content-length" in headers and "transfer-encoding" in headers:
            response = _refused(_Refusal(400, "send Content-Length or Transfer-Encoding, not both"))
            return await response(scope, receive, answer)
        try:
            await self._app(scope, rest.receive, answer)
        except asyncio.CancelledError:  # the server stops, and this task ends with it
            if not rest.answered:
                await _refused(Stopping("the server is stopping"))(scope, receive, send)

    def _route(self, methods: str, path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await answer(request)
            except ServerError as error:
                return _refused(error)
            except Exception as error:
                log.exception("%s %s failed", request.method, request.scope["path"])
                return _json(500, {"error": f"a fault in the server: {type(error).__name__}: {error}"})

        return Route(path, endpoint, methods=methods.split())

    async def _live(self, request: Request) -> Response:
        return _json(200, {"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._engine.ready and not self._engine.stopping
        return _json(200 if ready else 503, {"ready": ready})

    async def _page(self, request: Request) -> Response:
        self._refuse_other_sites(request)
        return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8")

    async def _metrics(self, request: Request) -> Response:
        self._refuse_other_sites(request)
        text = await self._in_thread(self._few_threads, self._engine.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        found = await self._in_thread(self._few_threads, lambda: [model.describe() for model in self._engine.models()])
        return _json(200, {"models": found})

    async def _change(self, action: str, request: Request) -> Response:
        self._engine.authorize(self._admit(request))
        model = await self._work(request, lambda call: getattr(self._engine, action)(request.path_params["name"]))
        return _json(200, model.describe())

    async def _run(self, request: Request) -> Response:
        self._admit(request)
        name, kind = request.path_params["name"], request.headers.get("content-type", "")
        self._engine.model(name)
        answer = self._viewed if "view" in request.query_params else self._plain
        async with self._body(request) as body:
            found: Response = await self._work(request, lambda call: answer(name, *read_input(kind, body), call))
            return found

    def _plain(self, name: str, data: Any, args: dict[str, Any], call: Call) -> Response:
        packed = self._engine.run(name, codec.encode(data), args, call, plain=True)
        return Response(packed.text.encode() + b"\n", media_type="application/json")

    def _viewed(self, name: str, data: Any, args: dict[str, Any], call: Call) -> Response:
        begun = time.monotonic()
        value = codec.decode(self._engine.run(name, codec.encode(data), args, call))
        return _json(200, {"ms": 1000 * (time.monotonic() - begun), "answer": view(value)})

    async def _open_inference(self, request: Request) -> Response:
        assert self._rest
        path: str = request.scope["path"]
        method, fields = self._rest.find("POST" if request.method == "POST" else "GET", path)
        if not method:
            raise _Refusal(404, f"there is no {request.method} {path}; see Open Inference Protocol v2")
        if method not in ("ServerLive", "ServerReady"):
            call = self._admit(request)
            if method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                self._engine.authorize(call)
            elif method == "ModelInfer":
                self._engine.model(fields["model_name"])
        answer = partial(self._rest.answer, method, fields, request.headers)
        if request.method == "POST":
            async with self._body(request, method == "ModelInfer") as body:
                found = await self._work(request, lambda call: answer(body, call))
        else:
            found = answer(b"", _call(request))
        return Response(found.body, found.status, found.headers, found.kind)

    def _admit(self, request: Request) -> Call:
        """The call of a request; PermissionDenied or Unauthenticated if it may not be answered."""
        self._refuse_other_sites(request)
        call = _call(request)
        self._engine.authenticate(call.metadata)
        return call

    def _refuse_other_sites(self, request: Request) -> None:
        """PermissionDenied if another site's page sent this, or a page whose name was made to stand for this host.

        A page of a site whose name its owner let point to this host may ask anything there in the user's browser; but
        the browser sends that name as Host. It sends an Origin with each POST, and none with a GET of the own site.
        """
        headers = request.headers
        host, origin = headers.get("host", ""), headers.get("origin")
        foreign = False
        if request.method not in ("GET", "HEAD"):
            foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
            foreign = foreign or (origin is not None and urlsplit(origin).netloc != host)
        here = request.client is not None and callers.is_loopback(request.client.host)
        asked_by_browser = origin is not None or request.method in ("GET", "HEAD")
        if foreign or (host and here and asked_by_browser and not self._is_own_name(host)):
            raise PermissionDenied(
                "another site's page may not do this; from this host, ask for localhost or 127.0.0.1, or name the host "
                "that you ask for in TMS_ALLOWED_HOSTS"
            )

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return callers.is_address(name) or name in self._own_names or "*" in self._own_names

    @asynccontextmanager
    async def _body(self, request: Request, needed: bool = True) -> AsyncIterator[bytearray]:
        """A request's body, which counts among the bytes under way from before it is read until it is let go."""
        budget, largest, clock = self._engine.inflight, self._engine.settings.max_message_mb << 20, time.monotonic
        taken, coming, body, more, due = 0, True, bytearray(), True, clock() + _BODY_S

        def take(size: int) -> None:
            nonlocal taken
            if size > min(largest, budget.limit):
                limit = f"{largest} bytes at most (TMS_MAX_MESSAGE_MB)"
                raise _Refusal(413, f"a body may have {limit} and {budget.limit} (TMS_MAX_INFLIGHT_MB), not {size}")
            if size > taken:
                budget.expect(size - taken, taken)
                taken = size

        if needed and not {"content-length", "transfer-encoding"} & set(request.headers):
            raise _Refusal(411, f"send Content-Length, {largest} at most (TMS_MAX_MESSAGE_MB), or the body in chunks")
        try:
            take(int(request.headers.get("content-length", 0)))
            while more:
                try:
                    async with asyncio.timeout(max(0, due - clock())):
                        message = await request.receive()
                except TimeoutError:
                    raise _Refusal(408, f"the body did not arrive in time; {len(body)} bytes of it did") from None
                if message["type"] == "http.disconnect":
                    raise Cancelled("the caller went away")
                take(len(body) + len(message["body"]))
                body += message["body"]
                more = message["more_body"]
                due = min(due + len(message["body"]) / _SLOWEST, clock() + _BODY_S)
            budget.arrived(taken)
            coming = False
            yield body
        finally:
            if coming:
                budget.arrived(taken)
            budget.give(taken)

    async def _work(self, request: Request, function: Callable[[Call], Any]) -> Any:
        """What a function returns that may block, in a thread; if the caller goes away, its call ends."""
        ending = _Ending()
        work = self._in_thread(self._threads, partial(function, _call(request, ending.add)))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            ending.end()
            return await work
        finally:
            gone.cancel()
            work.cancel()
            ending.end()

    def _in_thread(self, threads: ThreadPoolExecutor, function: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(threads, function)


class _Incoming:
    """What a caller still has to send of a request."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.unread = False
        """True if there is a body that was not read to its end."""
        self.answered = False
        """True once the answer has begun."""

    async def receive(self) -> Message:
        """The next message from the caller."""
        message = await self._receive()
        self.unread = message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Drops what still comes, for a moment: if bytes are unread when a connection is closed, the answer is lost."""
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while self.unread and dropped < _MOST_DRAINED:
                    dropped += len((await self.receive()).get("body", b""))


class _Ending:
    """Tells the parts of a call that it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._callbacks: list[Callable[[], None]] = []

    def add(self, callback: Callable[[], None]) -> bool:
        """Registers a function to be called at the end; False if that was before. Threads may share this."""
        with self._lock:
            if not self._ended:
                self._callbacks.append(callback)
            return not self._ended

    def end(self) -> None:
        """Calls what was registered, once."""
        with self._lock:
            self._ended = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


def _call(request: Request, on_end: Callable[[Callable[[], None]], bool] = lambda callback: True) -> Call:
    peer = ""
    if request.client:
        host, port = request.client
        peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
    return Call(time.monotonic() + _TIMEOUT_S, peer, dict(request.headers), on_end)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_route(request: Request, error: Exception) -> Response:
    return _json(404, {"error": f"there is no {request.scope['path']}; {_KNOWN}"})


async def _no_method(request: Request, error: Any) -> Response:
    return _json(405, {"error": f"{request.method} is not for {request.scope['path']}; {_KNOWN}"}, error.headers)


def _refused(error: ServerError) -> Response:
    code, headers = _STATUS.get(error.status, 500), {}
    if isinstance(error, _Refusal):
        code = error.code
    later = getattr(error, "retry_after_ms", None)
    if later and later > 0:
        headers["Retry-After"] = str(-(-later // 1000))
    return _json(code, {"error": str(error), "status": error.status}, headers)


def _json(code: int, value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(codec.standard_json(value).encode() + b"\n", code, headers, "application/json")
