"""The HTTP port's ASGI application: probes, metrics, a page for people, and POST to run a model.

If the headers of a request are enough to refuse it, its body is not read. Work that may take time is done in threads;
health is answered by the event loop itself, also while all threads are busy.
"""

import asyncio
import math
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager, suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tiny_model_server import access, codec
from tiny_model_server.codec import Encoded
from tiny_model_server.engine.call import Call, Run
from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import Cancelled, PermissionDenied, ServerError, Stopping
from tiny_model_server.protocols import openai_rest
from tiny_model_server.protocols.open_inference_rest import Rest
from tiny_model_server.protocols.openai_rest import Chat, OpenAI
from tiny_model_server.server import events
from tiny_model_server.server.events import send_events
from tiny_model_server.server.forms import read_input
from tiny_model_server.server.view import view
from tiny_model_server.settings import Settings

_T = TypeVar("_T")
_Begin = Callable[[bytearray, Call], Response | AbstractContextManager[Run]]
_PAGE = Path(__file__).with_name("page")
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
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
_V1_PATHS = "get /v1/models, or post to /v1/embeddings or /v1/chat/completions, if TMS_PROTOCOLS names openai"
_PATHS = "get /, /livez, /readyz, /models, /metrics or /v2, or post to /models/NAME/run, load, unload or reload"
_TIMEOUT_S = 60.0
_BODY_S = 30.0  # the time for a body at first, and the most that it may have left at any moment
_MIN_BYTES_PER_S = 1 << 16  # the time left grows by a second for so many bytes
_DRAIN_S = 2.0  # time to read and drop the rest of a body
_SPARE_THREADS = 8  # beyond what the engine admits: some are always left for refusals and for changing models
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
}


class Web:
    """Answers GET /, /livez, /readyz, /models and /metrics, POST /models/NAME/ACTION, and /v2 (Open Inference)."""

    def __init__(self, engine: Engine, settings: Settings, grpc_port: int = 0) -> None:
        self._engine, self._grpc_port = engine, grpc_port
        self._own_names = {"localhost", socket.gethostname().lower(), *map(str.lower, settings.allowed_hosts)}
        self._rest = Rest(engine)
        self._threads = ThreadPoolExecutor(settings.threads + _SPARE_THREADS, thread_name_prefix="http")
        gets = {"/": self._page, "/livez": self._live, "/readyz": self._ready, "/models": self._models}
        gets |= {"/page/{file}": self._page, "/stats": self._stats}
        posts: dict[str, Any] = {name: partial(self._change, name) for name in ("load", "unload", "reload")}
        posts["run"] = self._run
        routes = [Route(path, answer) for path, answer in (gets | {"/metrics": self._metrics}).items()]
        routes += [Route(f"/models/{{name:path}}/{name}", answer, methods=["POST"]) for name, answer in posts.items()]
        if "open_inference" in settings.protocols:
            routes.append(Route("/v2{rest:path}", self._open_inference, methods=["GET", "POST"]))
        if "openai" in settings.protocols:
            routes += self._openai_routes(OpenAI(engine))
        handlers: Any = {HTTPException: _http_error, ServerError: _server_error, Exception: _fault}
        self._app = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        scope["path"] = scope["path"].rstrip("/") or "/"
        # A POST whose length is not known may be followed by what its sender means as the body.
        unread = scope["method"] == "POST" or _has_length(Headers(scope=scope))

        async def read() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.update(_HEADERS | {"Date": formatdate(usegmt=True)})
                if unread:
                    headers["Connection"] = "close"
            elif unread:  # if the connection is closed before the rest is read, the caller may lose the answer
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(_DRAIN_S):
                        while unread:
                            await read()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, read, answer)
        except asyncio.CancelledError:  # the server stops
            response = await _server_error(Request(scope), Stopping("the server is stopping"))
            with suppress(RuntimeError):  # the answer has begun
                await response(scope, receive, send)

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._engine.ready and not self._engine.stopping
        return _json({"ready": ready}, 200 if ready else 503)

    async def _page(self, request: Request) -> Response:
        self._refuse_other_sites(request)
        path = _PAGE / request.path_params.get("file", "index.html")
        if path not in set(_PAGE.iterdir()):
            raise HTTPException(404)
        media_type = f"{_PAGE_TYPES[path.suffix]}; charset=utf-8"
        return Response(path.read_bytes(), headers={"Cache-Control": "no-cache"}, media_type=media_type)

    async def _metrics(self, request: Request) -> Response:
        self._refuse_other_sites(request)
        text = await asyncio.to_thread(self._engine.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, request: Request) -> Response:
        self._admit(request)
        models = await asyncio.to_thread(lambda: [model.describe() for model in self._engine.models()])
        return _json({"models": models})

    async def _stats(self, request: Request) -> Response:
        """Each model's state, and numbers of it, some of them counted since the start."""
        self._admit(request)
        states = [
            {"name": one.name, "state": one.state, "reason": one.reason, "worker_pids": one.pids}
            | one.metrics.snapshot()
            for one in self._engine.models()
        ]
        return _json({"models": states, "grpc_port": self._grpc_port})

    async def _change(self, action: str, request: Request) -> Response:
        self._engine.access.authorize(self._admit(request))
        change, name = getattr(self._engine, action), request.path_params["name"]
        return await self._in_thread(request, lambda body, call: _json(self._engine.wait(change(name)).describe()))

    async def _run(self, request: Request) -> Any:
        self._admit(request)
        name, content_type = request.path_params["name"], request.headers.get("content-type", "")
        self._check_input(request, name)

        if events.MEDIA_TYPE in request.headers.get("accept", ""):
            return self._stream(request, name, content_type)

        def run(body: bytearray, call: Call) -> Response:
            data, args = read_input(content_type, body)
            begun = time.monotonic()
            if "view" not in request.query_params:
                answer = self._engine.run(name, codec.encode(data), args, call, json_only=True)
                return Response(answer.text + "\n", media_type="application/json")
            answer = self._engine.run(name, codec.encode(data), args, call)
            return _json({"ms": 1000 * (time.monotonic() - begun), "answer": view(codec.decode(answer))})

        return await self._in_thread(request, run)

    def _stream(self, request: Request, name: str, content_type: str) -> Any:
        def begin(body: bytearray, call: Call) -> AbstractContextManager[Run]:
            data, args = read_input(content_type, body)
            return self._engine.streaming(name, codec.encode(data), args, call, json_only=text is None)

        text = _view_text if "view" in request.query_params else None
        return self.event_stream(request, begin, events.value_events, events.error_event, text)

    def event_stream(
        self,
        request: Request,
        begin: _Begin,
        convert: Callable[[AsyncIterator[str]], AsyncGenerator[str, None]],
        failed: Callable[[ServerError], str],
        text: Callable[[Encoded], str] | None = None,
    ) -> Any:
        """The response that sends what a model yields as server-sent events; see ``events``.

        ``begin(body, call)`` is called in a thread and returns ``engine.streaming(...)``, to be asked for JSON only
        unless ``text`` makes JSON of the values, in a thread; or the whole response, if the request turns out to ask
        for no events. ``convert`` makes the events of the values' JSON texts, ``failed`` the last one of an error.
        """

        async def send_all(send: Send) -> str | Response:
            async with self._arrived(request, None) as (body, call):
                with ExitStack() as stack:
                    run = await self._thread(partial(_enter, stack, begin, body, call))
                    if isinstance(run, Response):
                        return run
                    async with aclosing(self._engine.stream_values(run)) as values:
                        made = convert(self._texts(values, text))
                        return await send_events(made, failed, send, self._engine.settings.stream_idle_s)

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            last = await send_all(send)  # after which a caller that reads nothing holds nothing but the last text
            if isinstance(last, Response):
                return await last(scope, receive, send)
            await send({"type": "http.response.body", "body": last.encode()})

        return respond

    async def _texts(
        self, values: AsyncIterator[Encoded], text: Callable[[Encoded], str] | None
    ) -> AsyncGenerator[str, None]:
        async for value in values:
            yield value.text if text is None else await self._thread(partial(text, value))

    async def _open_inference(self, request: Request) -> Response:
        method, fields = self._rest.find("POST" if request.method == "POST" else "GET", request.scope["path"])
        if not method:
            raise HTTPException(404)
        if method not in ("ServerLive", "ServerReady"):
            call = self._admit(request)
            if method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                self._engine.access.authorize(call)
        if method == "ModelInfer":
            self._check_input(request, fields["model_name"])
        answer = partial(self._rest.answer, method, fields, request.headers)
        if request.method == "POST":
            return await self._in_thread(request, answer)
        return answer(b"", _call(request, Future()))

    def _openai_routes(self, api: OpenAI) -> list[Route]:
        async def models(request: Request) -> Response:
            self._admit(request)
            return _json(api.models())

        async def model(request: Request) -> Response:
            self._admit(request)
            return _json(await self._thread(lambda: api.model(request.path_params["name"])))

        async def embeddings(request: Request) -> Response:
            self._admit(request)
            _check_length(request)
            return await self._in_thread(request, api.embeddings, None)

        async def chat(request: Request) -> Any:
            self._admit(request)
            _check_length(request)
            completion = Chat(self._engine, api)
            return self.event_stream(request, completion.begin, completion.events, openai_rest.error_event)

        gets, posts = {"": models, "/{name:path}": model}, {"embeddings": embeddings, "chat": chat}
        routes = [Route(f"/v1/models{path}", answer) for path, answer in gets.items()]
        return routes + [Route(openai_rest.PATHS[task], answer, methods=["POST"]) for task, answer in posts.items()]

    def _admit(self, request: Request) -> Call:
        """The call of a request; PermissionDenied or Unauthenticated if it may not be answered."""
        self._refuse_other_sites(request)
        call = _call(request, Future())
        self._engine.access.authenticate(call.metadata)
        return call

    def _check_input(self, request: Request, name: str) -> None:
        """Refuses an input before it is read: ModelNotFound, or HTTPException if its length is not known."""
        self._engine.model(name)
        _check_length(request)

    def _refuse_other_sites(self, request: Request) -> None:
        """PermissionDenied if another site's page sent this; also a page whose name resolves to this host.

        The owner of a site can let its name resolve to 127.0.0.1. Then its page may send requests to this host from the
        user's browser, but the browser gives that name as Host. A browser sends Origin with each POST.
        """
        headers, host = request.headers, request.headers.get("host", "")
        foreign = request.method == "POST" and (
            headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
            or headers.get("origin", f"http://{host}").partition("://")[2] != host
        )
        local = request.client is not None and access.is_loopback(request.client.host)
        if foreign or (local and host and not self._is_own_name(host)):
            raise PermissionDenied(
                "a page of another site may not do this; on this host, use localhost or 127.0.0.1, or add the name "
                "that you use to TMS_ALLOWED_HOSTS"
            )

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return access.address(name) is not None or bool({name, "*"} & self._own_names)

    async def _in_thread(
        self, request: Request, work: Callable[[bytearray, Call], Response], timeout_s: float | None = _TIMEOUT_S
    ) -> Response:
        """Runs ``work(body, call)`` in a thread and returns its result. The call ends if the caller disconnects."""
        async with self._arrived(request, timeout_s) as (body, call):
            return await self._thread(lambda: work(body, call))

    async def _thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @asynccontextmanager
    async def _arrived(self, request: Request, timeout_s: float | None) -> AsyncIterator[tuple[bytearray, Call]]:
        """A request's body, and its call, which ends if the caller disconnects."""
        ended: Future[None] = Future()
        async with self._body(request) as body:
            call = _call(request, ended, timeout_s)
            disconnected = asyncio.ensure_future(_disconnected(request))
            disconnected.add_done_callback(lambda _: ended.cancel())
            try:
                yield body, call
            finally:
                disconnected.cancel()
                call.on_end = lambda callback: False  # else the call and what it registered would keep each other alive

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """A request's body, read within a time limit.

        Its bytes are counted (TMS_MAX_INFLIGHT_MB) from before they arrive until the context ends.
        """
        budget, counted, body = self._engine.inflight, 0, bytearray()
        largest = min(self._engine.settings.max_message_mb << 20, budget.limit)

        def count(size: int) -> None:
            nonlocal counted
            if size > largest:
                limits = "TMS_MAX_MESSAGE_MB and TMS_MAX_INFLIGHT_MB"
                raise HTTPException(413, f"a body may have {largest} bytes ({limits}), not {size}")
            if size > counted:
                budget.expect(size - counted, counted)
                counted = size

        try:
            try:
                count(int(request.headers.get("content-length", 0)))
                async with asyncio.timeout(_BODY_S) as limit:
                    async for part in request.stream():
                        count(len(body) + len(part))
                        body += part
                        later = (limit.when() or 0) + len(part) / _MIN_BYTES_PER_S
                        limit.reschedule(min(later, asyncio.get_running_loop().time() + _BODY_S))
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive in time; {len(body)} bytes of it did") from None
            except ClientDisconnect:
                raise Cancelled("the caller disconnected") from None
            finally:
                budget.arrived(counted)
            yield body
        finally:
            budget.give(counted)


def _enter(stack: ExitStack, begin: _Begin, body: bytearray, call: Call) -> Response | Run:
    begun = begin(body, call)
    return begun if isinstance(begun, Response) else stack.enter_context(begun)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _call(request: Request, ended: "Future[None]", timeout_s: float | None = _TIMEOUT_S) -> Call:
    """What the engine must know of a request. The call ends when ``ended`` is done."""

    def on_end(callback: Callable[[], None]) -> bool:
        if ended.done():
            return False
        ended.add_done_callback(lambda _: callback())
        return True

    host, port = request.client or ("", 0)
    peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    return Call(deadline, peer, dict(request.headers), on_end)


def _has_length(headers: Mapping[str, str]) -> bool:
    return "content-length" in headers or "transfer-encoding" in headers


def _check_length(request: Request) -> None:
    if not _has_length(request.headers):
        raise HTTPException(411, "send Content-Length, or the body in chunks")


async def _http_error(request: Request, error: HTTPException) -> Response:
    paths = f"; {_V1_PATHS if _is_openai(request) else _PATHS}" if error.status_code in (404, 405) else ""
    text = f"{error.detail}: {request.method} {request.scope['path']}{paths}"
    return _error(request, error.status_code, text, None, error.headers)


async def _server_error(request: Request, error: ServerError) -> Response:
    wait_ms = getattr(error, "retry_after_ms", None) or 0
    headers = {"Retry-After": str(math.ceil(wait_ms / 1000))} if wait_ms > 0 else None
    return _error(request, _STATUS.get(error.status, 500), str(error), error, headers)


async def _fault(request: Request, error: Exception) -> Response:
    return await _server_error(request, ServerError(f"a fault in the server: {type(error).__name__}: {error}"))


def _error(
    request: Request, code: int, text: str, error: ServerError | None, headers: Mapping[str, str] | None
) -> Response:
    """An error in the form that callers of this path read."""
    if _is_openai(request):
        return _json(openai_rest.error(text, error), code, headers)
    return _json({"error": text} | ({"status": error.status} if error else {}), code, headers)


def _is_openai(request: Request) -> bool:
    return bool(request.scope["path"].startswith("/v1/"))


def _view_text(value: Encoded) -> str:
    return codec.json_only(view(codec.decode(value)))


def _json(value: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(codec.json_only(value) + "\n", code, headers, "application/json")
