"""The HTTP port's ASGI application: probes, metrics, a page for people, and POST to run a model.

If the headers of a request are enough to refuse it, its body is not read. Work that may take time is done in threads;
health is answered by the event loop itself, also while all threads are busy.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager, suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tiny_model_server import codec, request_ids
from tiny_model_server.codec import Encoded
from tiny_model_server.engine.call import Call, Run
from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import ServedModel
from tiny_model_server.errors import InvalidInput, Overloaded, ServerError, Stopping
from tiny_model_server.protocols import openai_rest
from tiny_model_server.protocols.open_inference_rest import Rest
from tiny_model_server.protocols.openai_rest import Chat, OpenAI
from tiny_model_server.server import events, openapi
from tiny_model_server.server.answers import JSON, accepted, answer, compressed, json_response
from tiny_model_server.server.bodies import Body, read_body
from tiny_model_server.server.forms import read_input
from tiny_model_server.server.siblings import Siblings, labelled
from tiny_model_server.server.sites import Sites
from tiny_model_server.server.view import view
from tiny_model_server.settings import Settings

_T = TypeVar("_T")
_Begin = Callable[[Body, Call], Response | AbstractContextManager[Run]]
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
_PATHS = (
    "get /, /livez, /readyz, /models, /models/NAME, /metrics, /openapi.json, /docs or /v2, "
    "or post to /models/NAME/run, load, unload or reload"
)
_TIMEOUT_S = 60.0
_DRAIN_S = 2.0  # time to read and drop the rest of a body
_SPARE_THREADS = 8  # beyond what the engine admits: some are always left for refusals and for changing models
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
}


class Web:
    """Answers for probes, metrics and pages; describes, runs and changes models; speaks protocols that have HTTP."""

    def __init__(self, engine: Engine, settings: Settings, grpc_port: int = 0) -> None:
        self._engine, self._grpc_port = engine, grpc_port
        self._sites = Sites(settings)
        self._rest, self._siblings = Rest(engine), Siblings(settings)
        self._threads = ThreadPoolExecutor(settings.threads + _SPARE_THREADS, thread_name_prefix="http")
        gets = {"/": self._page, "/livez": self._live, "/readyz": self._ready, "/models": self._models}
        gets |= {"/page/{file}": self._page, "/docs": self._page, "/openapi.json": self._openapi}
        gets |= {"/stats": self._stats, "/models/{name}": self._model, "/metrics": self._metrics}
        posts: dict[str, Any] = {name: partial(self._change, name) for name in ("load", "unload", "reload")}
        posts["run"] = self._run
        routes = [Route(path, answer) for path, answer in gets.items()]
        routes += [Route(f"/models/{{name:path}}/{name}", answer, methods=["POST"]) for name, answer in posts.items()]
        routes.append(Route("/models/{name:path}/logs", self._lines))
        if "open_inference" in settings.protocols:
            routes.append(Route("/v2{rest:path}", self._open_inference, methods=["GET", "POST"]))
        if "openai" in settings.protocols:
            routes += self._openai_routes(OpenAI(engine))
        handlers: Any = {HTTPException: _http_error, ServerError: _server_error, Exception: _fault}
        self._app = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        scope["path"] = scope["path"].rstrip("/") or "/"
        asked = Headers(scope=scope)
        # A POST whose length is not known may be followed by what its sender means as the body.
        unread = scope["method"] == "POST" or _has_length(asked)
        request_id = request_ids.checked(asked.get(request_ids.HEADER))
        MutableHeaders(scope=scope)["X-Request-Id"] = request_id  # where the call's metadata have it from

        async def read() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.update(_HEADERS | {"Date": formatdate(usegmt=True), "X-Request-Id": request_id})
                self._sites.mark(asked, headers)
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
            await (self._sites.preflight(Request(scope)) or self._app)(scope, read, respond)
        except asyncio.CancelledError:  # the server stops
            response = await _server_error(Request(scope), Stopping("the server is stopping"))
            response.headers["X-Request-Id"] = request_id
            with suppress(RuntimeError):  # the answer has begun
                await response(scope, receive, send)

    async def _live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready, more = self._engine.ready and not self._engine.stopping, {}
        if self._siblings and "own" not in request.query_params:
            others = {number: body is not None for number, body in (await self._siblings.ask("/readyz")).items()}
            more = {"replicas": dict(sorted((others | {self._siblings.own: ready}).items()))}
            ready = ready and all(others.values())
        return json_response({"ready": ready} | more, 200 if ready else 503)

    async def _page(self, request: Request) -> Response:
        self._sites.check(request)
        shown = "docs.html" if request.scope["path"] == "/docs" else "index.html"
        path = _PAGE / request.path_params.get("file", shown)
        if path not in set(_PAGE.iterdir()):
            raise HTTPException(404)
        media_type = f"{_PAGE_TYPES[path.suffix]}; charset=utf-8"
        return Response(path.read_bytes(), headers={"Cache-Control": "no-cache"}, media_type=media_type)

    async def _metrics(self, request: Request) -> Response:
        self._sites.check(request)
        text = await asyncio.to_thread(self._engine.metrics.text)
        if self._siblings and "own" not in request.query_params:
            text = labelled(await self._siblings.ask("/metrics") | {self._siblings.own: text})
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _models(self, request: Request) -> Response:
        return await self._described(request, lambda: {"models": self._descriptions()})

    async def _openapi(self, request: Request) -> Response:
        needs_token = bool(self._engine.settings.token)
        return await self._described(request, lambda: openapi.document(self._descriptions(), needs_token=needs_token))

    async def _model(self, request: Request) -> Response:
        return await self._described(request, lambda: self._engine.model(request.path_params["name"]).describe())

    async def _stats(self, request: Request) -> Response:
        """Each model's state, and numbers of it, some of them counted since the start."""
        port = self._grpc_port
        return await self._described(
            request, lambda: {"models": list(map(_numbers, self._engine.models())), "grpc_port": port}
        )

    def _descriptions(self) -> list[dict[str, Any]]:
        return [model.describe() for model in self._engine.models()]

    async def _described(self, request: Request, make: Callable[[], Any]) -> Response:
        """JSON of what ``make`` returns; made in a thread, for it may be large."""
        self._admit(request)
        return await asyncio.to_thread(lambda: compressed(request, json_response(make())))

    async def _lines(self, request: Request) -> Response:
        return await self._described(request, lambda: {"lines": self._engine.model(request.path_params["name"]).lines})

    async def _change(self, action: str, request: Request) -> Response:
        self._admit(request, changes=True)
        change, name = getattr(self._engine, action), request.path_params["name"]
        return await self._in_thread(
            request, lambda body, call: json_response(self._engine.wait(change(name)).describe())
        )

    async def _run(self, request: Request) -> Any:
        name, views = request.path_params["name"], "view" in request.query_params
        self._admit(request, model=name)
        if unknown := request.query_params.keys() - {"args", "view"}:
            raise InvalidInput(f"there is no parameter {min(unknown)[:40]!r} of the URL; there are args and view")
        formats = accepted(",".join(request.headers.getlist("accept")))
        if formats[0] == events.MEDIA_TYPE:
            return self._stream(request, name, _view_text if views else None)

        def run(body: Body, call: Call) -> Response:
            value, args = _input(request, body)
            begun, as_json = time.monotonic(), formats[0] == JSON
            found = self._engine.run(name, value, args, call, json_only=as_json and not views)
            if views:
                return json_response({"ms": 1000 * (time.monotonic() - begun), "answer": view(codec.decode(found))})
            return Response(found.text + "\n", media_type=JSON) if as_json else answer(codec.decode(found), formats)

        return await self._in_thread(request, run)

    def _stream(self, request: Request, name: str, text: Callable[[Encoded], str] | None) -> Any:
        def begin(body: Body, call: Call) -> AbstractContextManager[Run]:
            value, args = _input(request, body)
            return self._engine.streaming(name, value, args, call, json_only=text is None)

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
                        return await events.send_events(made, failed, send, self._engine.settings.stream_idle_s)

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
            self._check_size(len(value.text))
            yield value.text if text is None else await self._thread(partial(text, value))

    async def _open_inference(self, request: Request) -> Response:
        method, fields = self._rest.find("POST" if request.method == "POST" else "GET", request.scope["path"])
        if not method:
            raise HTTPException(404)
        if method not in ("ServerLive", "ServerReady"):
            changes = method in ("RepositoryModelLoad", "RepositoryModelUnload")
            self._admit(request, changes=changes, model=fields["model_name"] if method == "ModelInfer" else None)
        answer = partial(self._rest.answer, method, fields, request.headers)
        if request.method == "POST":
            return await self._in_thread(request, answer)
        return answer(b"", _call(request, Future()))

    def _openai_routes(self, api: OpenAI) -> list[Route]:
        async def models(request: Request) -> Response:
            return await self._described(request, api.models)

        async def model(request: Request) -> Response:
            self._admit(request)
            return json_response(await self._thread(lambda: api.model(request.path_params["name"])))

        async def embeddings(request: Request) -> Response:
            self._admit(request, has_body=True)
            return await self._in_thread(request, api.embeddings, None)

        async def chat(request: Request) -> Any:
            self._admit(request, has_body=True)
            completion = Chat(self._engine, api)
            return self.event_stream(request, completion.begin, completion.events, openai_rest.error_event)

        return [
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route(openai_rest.PATHS["embeddings"], embeddings, methods=["POST"]),
            Route(openai_rest.PATHS["chat"], chat, methods=["POST"]),
        ]

    def _admit(
        self, request: Request, *, changes: bool = False, model: str | None = None, has_body: bool = False
    ) -> None:
        """Refuses a request by its headers alone; ``changes`` says that it changes models.

        PermissionDenied or Unauthenticated if it may not be answered, ModelNotFound if the model that it is to run is
        not there, HTTPException if it must have a body whose length is not known.
        """
        self._sites.check(request, changes=changes)
        call = _call(request, Future())
        self._engine.access.authenticate(call.metadata)
        if changes:
            self._engine.access.authorize(call)
        if model is not None:
            self._engine.model(model)
        if (has_body or model is not None) and not _has_length(request.headers):
            raise HTTPException(411, "send Content-Length, or the body in chunks")

    async def _in_thread(
        self, request: Request, work: Callable[[Body, Call], Response], timeout_s: float | None = _TIMEOUT_S
    ) -> Response:
        """Runs ``work(body, call)`` in a thread and returns its result. The call ends if the caller disconnects."""
        async with self._arrived(request, timeout_s) as (body, call):
            return await self._thread(lambda: compressed(request, self._bounded(work(body.expand(), call))))

    def _bounded(self, response: Response) -> Response:
        """The response; Overloaded, not to be sent again, if it is too large."""
        self._check_size(len(response.body))
        return response

    def _check_size(self, size: int) -> None:
        if size > self._engine.settings.max_message_mb << 20:
            raise Overloaded(f"the answer has {size} bytes, more than TMS_MAX_MESSAGE_MB allows", retry_after_ms=-1)

    async def _thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @asynccontextmanager
    async def _arrived(self, request: Request, timeout_s: float | None) -> AsyncIterator[tuple[Body, Call]]:
        """A request's body, and its call, which ends if the caller disconnects."""
        ended: Future[None] = Future()
        async with read_body(request, self._engine) as body:
            call = _call(request, ended, timeout_s)
            disconnected = asyncio.ensure_future(_disconnected(request))
            disconnected.add_done_callback(lambda _: ended.cancel())
            try:
                yield body, call
            finally:
                disconnected.cancel()
                call.on_end = lambda callback: False  # else the call and what it registered would keep each other alive


def _enter(stack: ExitStack, begin: _Begin, body: Body, call: Call) -> Response | Run:
    begun = begin(body.expand(), call)
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
    call = request.scope["call"] = Call(deadline, peer, dict(request.headers), on_end)  # for the access log
    return call


def _input(request: Request, body: Body) -> tuple[Encoded, dict[str, Any]]:
    """(value, args) of a request to run a model."""
    content_type, args = request.headers.get("content-type", ""), request.query_params.get("args", "")
    data, found = read_input(content_type, body, args, body.take)
    return codec.encode(data), found


def _has_length(headers: Headers) -> bool:
    return "content-length" in headers or "transfer-encoding" in headers


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
        return json_response(openai_rest.error(text, error), code, headers)
    return json_response({"error": text} | ({"status": error.status} if error else {}), code, headers)


def _is_openai(request: Request) -> bool:
    """Whether OpenAI's clients read the answer; those whose base_url lacks /v1 do, too."""
    path = request.scope["path"]
    return path.startswith("/v1/") or f"/v1{path}" in openai_rest.PATHS.values()


def _numbers(model: ServedModel) -> dict[str, Any]:
    facts = {"name": model.name, "state": model.state, "reason": model.reason, "worker_pids": model.pids}
    return facts | model.metrics.snapshot()


def _view_text(value: Encoded) -> str:
    return codec.json_only(view(codec.decode(value)))
