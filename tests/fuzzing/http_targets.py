"""What a caller sends to the HTTP port: whole connections, byte for byte, through the parser to the application."""

import asyncio
import base64
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import numpy as np

from tests.fuzzing import engine as engines
from tests.fuzzing import grpc_targets, mutators, oracle
from tests.fuzzing.mutators import Leaf
from tests.fuzzing.oracle import Finding, Target
from tiny_model_server.server.http_access_log import HttpAccessLog
from tiny_model_server.server.http_app import Web
from tiny_model_server.server.http_server import HttpServer, _Connection

PIXELS, PNG = grpc_targets.PIXELS, grpc_targets.PNG
_TURNS = 10_000
"""Turns of the loop in which a request that waits for nothing is answered; each value of a stream takes some."""
_HEAD = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r]*\r\n(.*?)\r\n\r\n", re.DOTALL)


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self, peer: str) -> None:
        super().__init__({"peername": (peer, 4321), "sockname": ("127.0.0.1", 8080)})
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def get_write_buffer_size(self) -> int:
        return 0


@cache
def _server() -> tuple[asyncio.AbstractEventLoop, HttpServer]:
    engine = engines.engine()
    web = Web(engine, engine.settings, 50000)
    web._threads = engines.InlineExecutor()
    loop = asyncio.new_event_loop()
    loop.set_default_executor(engines.InlineExecutor())
    return loop, HttpServer(HttpAccessLog(web), engine.settings, engine.inflight.limit // 2)


def run(data: bytes) -> None:
    """Sends what one connection brings, and reads the answers."""
    if not data:  # asyncio reports the end in another way
        return
    loop, server = _server()
    written = loop.run_until_complete(_converse(server, data))
    check_answers(bytes(written))
    if left := engines.engine().inflight.used:
        raise Finding(f"{left} bytes still count as under way")


async def _converse(server: HttpServer, data: bytes) -> bytearray:
    connection, transport = _Connection(server), _Transport("127.0.0.1")
    connection.connection_made(transport)
    connection.data_received(data)
    await _settle(server)
    if not transport.closed:
        connection.eof_received()
    connection.connection_lost(None)
    if not await _settle(server):
        tasks = [task.get_stack() for task in server.server_state.tasks]
        for task in list(server.server_state.tasks):
            task.cancel()
        await _settle(server)
        raise Finding(f"a request goes on after its connection: {tasks}")
    return transport.written


async def _settle(server: HttpServer) -> bool:
    """Lets all tasks run. Returns False if some wait for more than turns of the loop."""
    for _ in range(_TURNS):
        if not server.server_state.tasks:
            return True
        await asyncio.sleep(0)
    return False


def check_answers(written: bytes) -> None:
    """Checks the answers of a connection: their statuses, and that JSON is JSON."""
    while match := _HEAD.match(written):
        status, head = int(match[1]), match[2].lower()
        length = re.search(rb"content-length: (\d+)", head)
        body = written[match.end() :][: int(length[1])] if length else b""
        if status == 500 and not any(fault in body.decode() for fault in oracle.MODELS_FAULTS):
            raise Finding(f"500: {body[:500]!r}")
        whole = length and body and len(body) == int(length[1])
        if whole and b"content-type: application/json" in head and b"content-encoding" not in head:
            oracle.strict_json(body)
        written = written[match.end() + len(body) :] if length else b""


# ---- seeds


def request(path: str, body: bytes | None = None, content_type: str = "application/json", **headers: str) -> bytes:
    """A request as clients write it."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: localhost:8080"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def _npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version)
    return file.getvalue()


def _npz(*, compress: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


def form(**fields: tuple[str, bytes]) -> bytes:
    """A multipart form: (further headers, content) by name; the boundary is XX."""
    parts = [
        f'--XX\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        for name, (more, content) in fields.items()
    ]
    return b"".join(parts) + b"--XX--\r\n"


def _general() -> list[bytes]:
    paths = "/ /livez /readyz /models /models/echo /metrics /openapi.json /docs /v2 /stats /models/echo/logs /v1/models"
    seeds = [request(path) for path in paths.split()]
    seeds += [request("/page/page.js?own", Accept_Encoding="gzip", X_Request_Id="abc", Authorization="Bearer x")]
    seeds += [request(f"/models/echo/{name}", b"") for name in ("load", "unload", "reload")]
    options = (
        b"OPTIONS /models/echo/run HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\nAccess-Control-Request-Method: POST\r\n"
    )
    chunked = (
        b"POST /models/echo/run HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1]\r\n0\r\n\r\n"
    )
    seeds += [options + b"\r\n", chunked, b"GET / HTTP/1.0\r\n\r\n", request("/livez") + request("/readyz")]
    seeds += [
        b"POST /models/echo/run HTTP/1.1\r\nHost: [::1]:80\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
    ]
    seeds += [request("/models/yields/run?view", b"[1, 2]", Accept="text/event-stream")]
    accepts = ["image/png;q=0.5, */*;q=0.1", "application/x-npy", "text/plain, application/octet-stream", "image/jpeg"]
    return seeds + [request("/models/echo/run?view", b'{"a": [1]}', Accept=accept) for accept in accepts]


_ANSWER = ("echo", "masks")


def _bodies() -> list[bytes]:
    run, multipart = "/models/echo/run", "multipart/form-data; boundary=XX"
    array = b'{"$array": {"dtype": "float32", "data": [1, 2.5], "shape": [2, 1]}}'
    jsons = [b'{"a": [1, 2.5, null, "x"]}', array, b'"text"', b'[1e999, {"$float": "nan"}, -0]']
    seeds = [request(f"{run}?args={{%22a%22:1}}", one) for one in jsons]
    seeds += [request("/models/typed/run", b'{"name": "n", "count": 1, "prices": [1], "parts": {"a": [1, 2]}}')]
    npys = [_npy(PIXELS), _npy(np.asfortranarray(PIXELS[..., 0].astype(">f8"))), _npy(np.array(["a", "bc"]), (2, 0))]
    seeds += [request(run, one, "application/x-npy", Accept="application/x-npy") for one in npys]
    npzs = [_npz(a=PIXELS, b=np.float32(1)), _npz(compress=True, a=PIXELS)]
    seeds += [request(run, one, "application/x-npz", Accept="application/x-npz") for one in npzs]
    shown = [np.zeros((64, 64), np.uint8), np.linspace(0, 1, 5000), np.full((9, 9, 3), np.nan, np.float32)]
    seeds += [request(f"{run}?view", _npy(one), "application/x-npy", Accept_Encoding="gzip") for one in shown]
    for accept in ("image/png", "image/jpeg", "application/x-npz", "text/plain;q=0.1, image/*", "application/zip"):
        seeds += [request(f"/models/{name}/run", npys[0], "application/x-npy", Accept=accept) for name in _ANSWER]
    forms = [
        form(image=('; filename="a.png"\r\nContent-Type: image/png', PNG), args=("", b'{"top": 1}')),
        form(data=("", array), text=("", b"hi")),
        form(x=('; filename="a.npy"', npys[0]), y=('; filename="b.npz"', npzs[0]), z=('; filename="t.txt"', b"hi")),
        form(text=("\r\nContent-Type: text/plain; charset=utf-16", "hi".encode("utf-16"))),
    ]
    seeds += [request(run, one, multipart) for one in forms]
    seeds += [request(run, b"text=hello+you%21&args=%7B%22a%22%3A1%7D", "application/x-www-form-urlencoded")]
    seeds += [request(run, "h\xe9".encode("latin-1"), "text/plain; charset=iso-8859-1"), request(run, PNG, "image/png")]
    seeds += [request(run, PNG, "application/octet-stream", Accept="application/octet-stream, image/png")]
    seeds += [request(run, gzip.compress(jsons[0], mtime=0), Content_Encoding="gzip")]
    seeds += [request(run, zlib.compress(array), Content_Encoding="deflate", Accept_Encoding="gzip")]
    return seeds


def _open_inference() -> list[bytes]:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[1, 2.5]]}]
    texts = [
        {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "b"], "parameters": {"content_type": "str"}}
    ]
    bodies = [{"inputs": inputs, "parameters": {"a": 1}}, {"inputs": texts, "id": "1", "outputs": [{"name": "output"}]}]
    bodies += [{"inputs": [*inputs, {"name": "b", "datatype": "BOOL", "shape": [1], "data": [True]}]}]
    seeds = [request(f"/v2/models/{m}/infer", json.dumps(one).encode()) for one in bodies for m in ("echo", "rows")]
    binary = [{"name": "x", "datatype": "INT16", "shape": [2], "parameters": {"binary_data_size": 4}}]
    header = json.dumps({"inputs": binary, "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference_Header_Content_Length": str(len(header))}
    seeds += [request("/v2/models/echo/versions/1/infer", header + bytes(4), "application/octet-stream", **length)]
    seeds += [request(f"/v2/models/echo{more}") for more in ("", "/ready", "/config")]
    seeds += [request(f"/v2/repository/{more}", b'{"ready": true}') for more in ("index", "models/echo/load")]
    return seeds


def _openai() -> list[bytes]:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}}
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, image]},
    ]
    chat = {"model": "chatty", "messages": messages, "max_completion_tokens": 5, "temperature": 0.5, "user": "u"}
    plain = {"model": "chatty", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "n": 1}
    streamed = plain | {"stream": True, "stream_options": {"include_usage": True}}
    vectors = [
        {"model": "letters", "input": ["a", "b"], "encoding_format": "base64"},
        {"model": "letters", "input": "a"},
    ]
    seeds = [request("/v1/chat/completions", json.dumps(one).encode()) for one in (chat, plain, streamed)]
    seeds += [request("/v1/embeddings", json.dumps(one).encode(), Authorization="Bearer x") for one in vectors]
    return [*seeds, request("/v1/models"), request("/v1/models/letters"), request("/v1/models/echo")]


# ---- other requests


def mutate(data: bytes, rng: Random, leaf: Leaf) -> bytes:
    """Another connection: its head or its body is changed, and its length is mended most of the time."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found or rng.random() < 0.05:
        return leaf(data)
    if not body or rng.random() < 0.25:
        head = _line_changed(head, rng, leaf)
    else:
        body = _body(head, body, rng, leaf)
    if rng.random() < 0.93:
        head = re.sub(rb"(?i)(content-length: )\d+", lambda match: match[1] + str(len(body)).encode(), head)
    return head + found + body


def _line_changed(head: bytes, rng: Random, leaf: Leaf) -> bytes:
    lines = head.split(b"\r\n")
    at, kind = rng.randrange(len(lines)), rng.random()
    if kind < 0.6:
        name, colon, value = lines[at].partition(b": ")
        lines[at] = name + colon + leaf(value) if colon else leaf(name)
    elif kind < 0.75 and at:
        del lines[at]
    else:
        lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(_HEADERS))
    return b"\r\n".join(lines)


_HEADERS = (
    """Content-Encoding: gzip|Content-Encoding: deflate|Accept: application/json;q=0.3, image/png|Accept: */*
Accept: text/event-stream|Origin: http://evil|Sec-Fetch-Site: cross-site|X-Forwarded-For: 1.1.1.1|Connection: close
Transfer-Encoding: chunked|Content-Type: text/plain; charset=utf-16|Content-Type: application/x-npy|Host: evil.com
Content-Type: multipart/form-data; boundary=XX|Content-Type: multipart/form-data|Content-Type: image/png
Content-Type: text/plain; charset*=utf-8''x|Inference-Header-Content-Length: 3|Accept-Encoding: gzip;q=0
Authorization: Bearer x|X-Request-Id: \xe9|Expect: 100-continue|Upgrade: websocket|Accept: application/x-npz""".replace(
        "\n", "|"
    )
    .encode("latin-1")
    .split(b"|")
)


def _body(head: bytes, body: bytes, rng: Random, leaf: Leaf) -> bytes:
    if b"Content-Encoding: gzip" in head and rng.random() < 0.8:
        try:
            return gzip.compress(_body(b"", gzip.decompress(body), rng, leaf), 1, mtime=0)
        except (OSError, EOFError, zlib.error):
            return leaf(body)
    if body[:1] in (b"{", b"[", b'"') and rng.random() < 0.85:
        return _json(body, rng, leaf)
    if body.startswith(b"PK") and rng.random() < 0.7:
        return _zip(body, rng, leaf)
    if b"--XX" in body and rng.random() < 0.6:
        parts = re.split(rb"(--XX|\r\n\r\n|\r\n)", body)
        at = rng.randrange(len(parts))
        parts[at] = leaf(parts[at]) if rng.random() < 0.8 else rng.choice(parts)
        return b"".join(parts)
    return leaf(body)


def _json(body: bytes, rng: Random, leaf: Leaf) -> bytes:
    """The JSON at the beginning with a change in it; what follows it stays."""
    try:
        text = body.decode("latin-1")
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return leaf(body)
    return json.dumps(mutators.tree(value, rng, leaf)).encode() + body[end:]


def _zip(body: bytes, rng: Random, leaf: Leaf) -> bytes:
    """The archive with one of its files changed, and the check sums that belong to it."""
    file = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as before, zipfile.ZipFile(file, "w") as after:
            entries = before.infolist()[:20]
            chosen = rng.choice(entries) if entries else None
            for one in entries:
                content = before.read(one)[: 1 << 16]
                name = leaf(one.filename.encode()).decode(errors="replace") if rng.random() < 0.1 else one.filename
                method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
                after.writestr(name, leaf(content) if one is chosen else content, method)
    except Exception:  # the archive was malformed already
        return leaf(body)
    return file.getvalue()


def targets() -> Iterator[Target]:
    """A target for each kind of body, all through the same application."""
    application = ("server/http_app.py", "server/http_server.py", "server/http_access_log.py", "server/sites.py")
    bodies = ("server/forms.py", "server/bodies.py", "server/npy.py", "server/answers.py", "json_arrays.py")
    yield Target("http", run, _general(), (*application, "server/answers.py", "server/events.py"), mutate)
    yield Target("http_bodies", run, _bodies(), (*bodies, "server/view.py", "engine/annotations.py"), mutate)
    yield Target("open_inference_rest", run, _open_inference(), ("protocols/open_inference_rest.py",), mutate)
    yield Target("openai", run, _openai(), ("protocols/openai_rest.py",), mutate)
