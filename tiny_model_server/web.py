"""The HTTP port: probes, metrics, a page for people, and a plain POST that runs a model."""

import base64
import email
import ipaddress
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST

from tiny_model_server import codec, pictures
from tiny_model_server.codec import EncodedImage
from tiny_model_server.engine import Call, Engine
from tiny_model_server.errors import InvalidInput, PermissionDenied, ServerError
from tiny_model_server.protocols import open_inference
from tiny_model_server.protocols.open_inference_rest import Rest
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.web")

_PAGE = Path(__file__).with_name("page.html")
_HTTP_STATUS = {
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
_TIMEOUT_S = 60.0
_LONGEST_LIST = 32  # items of an array that the page shows as they are


class WebServer:
    """Answers GET /, /livez, /readyz, /models and /metrics, POST /models/NAME/ACTION, and /v2 (Open Inference)."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Binds the port; SettingsError if it cannot be had."""

        rest = Rest(open_inference.handlers(engine)) if "open_inference" in settings.doors else None
        handler = type("Handler", (_Handler,), {"engine": engine, "rest": rest})
        try:
            self._server = ThreadingHTTPServer((settings.host, settings.http_port or 0), handler)
        except OSError as error:
            raise SettingsError(
                f"TMS_HTTP_PORT={settings.http_port} cannot be listened on: {error.strerror}; "
                "choose another, 0 for a free one, or off"
            ) from None
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Answers requests, in threads of its own."""
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def stop(self) -> None:
        """Closes the port."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a silent connection is kept
    disable_nagle_algorithm = True
    engine: Engine
    rest: Rest | None

    def do_GET(self) -> None:
        try:
            self._get() if self.command == "GET" else self._post()
        except ServerError as error:
            later = getattr(error, "retry_after_ms", None)
            more = {"Retry-After": str(-(-later // 1000))} if later else {}
            self._answer(_HTTP_STATUS.get(error.status, 500), {"error": str(error), "status": error.status}, more)
        except Exception as error:
            log.exception("%s %s failed", self.command, self.path)
            self._answer(500, {"error": f"a fault in the server: {type(error).__name__}: {error}"})

    do_POST = do_GET

    def _get(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        engine = self.engine
        if self._is_rest():
            self._answer_rest(b"")
        elif path == "":
            self._send(200, "text/html; charset=utf-8", _PAGE.read_bytes())
        elif path == "/livez":
            self._answer(200, {"live": True})
        elif path == "/readyz":
            ready = engine.ready and not engine.stopping
            self._answer(200 if ready else 503, {"ready": ready})
        elif path == "/models":
            engine.authenticate(self._metadata())
            self._answer(200, {"models": [model.describe() for model in engine.models()]})
        elif path == "/metrics":
            self._send(200, CONTENT_TYPE_LATEST, engine.metrics.text())
        else:
            known = "/, /livez, /readyz, /models, /metrics, /v2, and POST /models/NAME/run"
            self._answer(404, {"error": f"there is no {path}; there are {known}"})

    def _post(self) -> None:
        body, metadata = self._body(), self._metadata()
        if self._is_rest():
            return self._answer_rest(body)
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")]
        if len(parts) != 4 or parts[1] != "models" or parts[3] not in ("run", "load", "unload", "reload"):
            return self._answer(404, {"error": "post to /models/NAME/run, or load, unload, reload"})
        self._refuse_other_sites()
        call = self._call(metadata)
        self.engine.authenticate(metadata)
        if parts[3] == "run":
            return self._run(parts[2], body, call)
        self.engine.authorize(call)
        self._answer(200, getattr(self.engine, parts[3])(parts[2]).describe())

    def _is_rest(self) -> bool:
        return self.rest is not None and (self.path + "/").startswith("/v2/")

    def _answer_rest(self, body: bytes) -> None:
        assert self.rest
        metadata, path = self._metadata(), unquote(urlsplit(self.path).path)
        if not path.startswith("/v2/health/"):
            self.engine.authenticate(metadata)
        if self.command == "POST":
            self._refuse_other_sites()
        answer = self.rest.answer(self.command, path, metadata, body, self._call(metadata))
        self._send(answer.status, answer.kind, answer.body, answer.headers)

    def _call(self, metadata: Mapping[str, str]) -> Call:
        host, port = self.client_address[:2]
        peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        return Call(time.monotonic() + _TIMEOUT_S, peer, metadata)

    def _metadata(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _run(self, name: str, body: bytes, call: Call) -> None:
        data, args = _input(self.headers.get("Content-Type", ""), body)
        if "view" not in parse_qs(urlsplit(self.path).query, keep_blank_values=True):
            answer = self.engine.run(name, codec.pack(data), args, call, plain=True)
            return self._send(200, "application/json", answer.text.encode() + b"\n")
        begun = time.monotonic()
        value = codec.unpack(self.engine.run(name, codec.pack(data), args, call))
        self._answer(200, {"ms": 1000 * (time.monotonic() - begun), "answer": _view(value)})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        limit = self.engine.settings.max_message_mb << 20
        if not (length.isascii() and length.isdigit() and int(length) <= limit):
            self.close_connection = True  # what follows cannot be told from the next request
            raise InvalidInput(f"send Content-Length, of {limit} bytes at most (TMS_MAX_MESSAGE_MB), not {length!r}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            raise InvalidInput(f"the body has {len(body)} bytes, but Content-Length says {length}")
        return body

    def _refuse_other_sites(self) -> None:
        """PermissionDenied if another site's page sent this, or a page whose name was made to stand for this host."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")
        if origin is not None:  # a browser; a name that leads to this host must be this host's own
            renamed = _is_local(self.client_address[0]) and not _is_local(urlsplit(f"//{host}").hostname)
            foreign = foreign or urlsplit(origin).netloc != host or renamed
        if foreign:
            raise PermissionDenied(
                "another site's page may not do this; from this host, ask for localhost or 127.0.0.1"
            )

    def _answer(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(value).encode() + b"\n", headers)

    def _send(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"
        more = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": policy} | dict(headers or {})
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | more).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)


def _is_local(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _input(kind: str, body: bytes) -> tuple[Any, dict[str, Any]]:
    """(data, args) of a form with image=@file, text= or data= (JSON), and args= (JSON); or of a body of one kind."""
    fields: dict[str, Any] = {}
    message = email.message_from_bytes(b"Content-Type: " + kind.encode("latin-1") + b"\r\n\r\n" + body)
    if message.get_content_type() == "multipart/form-data" and message.is_multipart():
        for part in message.get_payload():
            name = part.get_param("name", header="content-disposition")  # type: ignore[union-attr]
            fields[str(name)] = part.get_payload(decode=True)  # type: ignore[union-attr]
    elif message.get_content_type() == "application/x-www-form-urlencoded":
        fields = {name: value[-1].encode() for name, value in parse_qs(body.decode(errors="replace")).items()}
    elif message.get_content_maintype() == "image":
        fields = {"image": body}
    elif message.get_content_type() in ("application/json", "text/plain"):
        fields = {"data" if kind.startswith("application/json") else "text": body}
    args = codec.parse_args(_text(fields.pop("args", b"")))
    parsers: dict[str, Callable[[bytes], Any]] = {"image": EncodedImage, "text": _text, "data": _json}
    field, content = fields.popitem() if len(fields) == 1 else ("", b"")
    if parse := parsers.get(field):
        return parse(content), args
    raise InvalidInput(
        "send one of image (a file), text or data (JSON), and args (a JSON object) if you like, as a form; "
        "or a body of type image/*, text/plain or application/json"
    )


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidInput("text must be UTF-8") from None


def _json(data: bytes) -> Any:
    return codec.parse_json(_text(data))


def _view(value: Any) -> Any:
    """An answer as the page shows it: small arrays as lists, others by their facts, a picture if they may be one."""
    if isinstance(value, dict):
        return {key: _view(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_view(item) for item in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if not isinstance(value, np.ndarray) or value.size <= _LONGEST_LIST:
        return json.loads(codec.plain_json(value))
    facts: dict[str, Any] = {"array": f"{codec.dtype_name(value.dtype)} {'x'.join(map(str, value.shape))}"}
    if value.dtype.kind in "biuf":
        with np.errstate(all="ignore"):
            facts |= {"min": float(np.nanmin(value)), "max": float(np.nanmax(value)), "mean": float(np.nanmean(value))}
        facts = json.loads(codec.plain_json(facts))
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3)):
            facts["png"] = "data:image/png;base64," + base64.b64encode(pictures.image_file(value)).decode()
    return facts
