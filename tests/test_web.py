"""The HTTP port: a plain POST, who may do what on it, and what the page asks for."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, Server
from tests.test_faults import write_model

PAGE = ROOT / "tiny_model_server" / "server" / "page"
StartServer = Callable[..., Server]


def post(server: Server, path: str, body: bytes, kind: str = "text/plain", **headers: str) -> tuple[int, Any]:
    """The status and the JSON answered; underscores in the headers' names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Type": kind}
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body, named)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def form(**fields: bytes) -> tuple[bytes, str]:
    """A multipart body as curl and browsers make it."""
    parts = [
        b'--b0\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\nContent-Type: application/octet-stream'
        b"\r\n\r\n%s\r\n" % (name.encode(), content)
        for name, content in fields.items()
    ]
    return b"".join(parts) + b"--b0--\r\n", "multipart/form-data; boundary=b0"


@pytest.fixture
def png() -> bytes:
    return cv2.imencode(".png", np.arange(96, dtype=np.uint8).reshape(4, 8, 3))[1].tobytes()


def test_run_by_post(server: Server, png: bytes) -> None:
    described = {"dtype": "uint8", "shape": [4, 8, 3], "first": 2, "writable": True}  # RGB: the last of OpenCV's three
    assert post(server, "/models/describe/run", *form(image=png)) == (200, described)
    assert post(server, "/models/describe/run", png, "image/png") == (200, described)
    assert post(server, "/models/echo/run", b"Gr\xc3\xbc\xc3\x9fe") == (200, "Grüße")
    assert post(server, "/models/echo/run", b'{"a": [1, null]}', "application/json") == (200, {"a": [1, None]})
    form_answer = post(server, "/models/echo/run", *form(text=b"x", args=b'{"n": 1}'))
    assert form_answer == (200, {"data": "x", "args": {"n": 1}})
    plain_form = b"text=a%20b", "application/x-www-form-urlencoded"
    assert post(server, "/models/echo/run", *plain_form) == (200, "a b")
    status, answer = post(server, "/models/echo/run?view", *form(image=png))
    assert status == 200
    assert answer["answer"]["array"] == "uint8 4x8x3"
    assert (answer["answer"]["min"], answer["answer"]["max"]) == (0, 95)
    assert answer["answer"]["png"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "message"),
    [
        ("/models/nobody/run", b"x", "text/plain", 404, "there is no model 'nobody'"),
        ("/models/echo", b"x", "text/plain", 405, "post to /models/NAME/run"),
        ("/models/echo/delete", b"x", "text/plain", 404, "post to /models/NAME/run"),
        ("/models/echo/run", b"\xff\xfe", "text/plain", 400, "text must be UTF-8"),
        ("/models/echo/run", b"{", "application/json", 400, "JSON"),
        ("/models/echo/run", b"x", "video/mp4", 400, "send one of image"),
        ("/models/echo/run", b"", "multipart/form-data", 400, "malformed form"),
        ("/models/echo/run", b"--b\r\n\r\n", "multipart/form-data; boundary=b", 400, "malformed form"),
        ("/models/describe/run", b"no png", "image/png", 400, "image"),
        ("/models/misbehave/run", b'{"do": "raise"}', "application/json", 500, ""),
    ],
)
def test_bad_posts_are_refused(server: Server, path: str, body: bytes, kind: str, status: int, message: str) -> None:
    found, answer = post(server, path, body, kind)
    if "misbehave" in path:
        found, answer = post(server, path, *form(data=b"1", args=b'{"do": "raise"}'))
    assert found == status
    assert message in answer["error"]
    assert post(server, "/models/echo/run", b"still there") == (200, "still there")


def test_bodies_have_a_length_and_a_limit(start_server: StartServer) -> None:
    server = start_server(TMS_MAX_MESSAGE_MB=1)
    for length, status, message in [
        *((length, 400, "Invalid HTTP request") for length in ("", "-1", "1e3")),
        (str((1 << 20) + 1), 413, "TMS_MAX_MESSAGE_MB"),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=10)
        connection.putrequest("POST", "/models/echo/run")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == status
        assert message in answer.read().decode()
        connection.close()


def test_who_may_do_what(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "one", "    def run(self, data, args):\n        return data")
    server = start_server(tmp_path, TMS_TOKEN="sesame", TMS_ADMIN_TOKEN="admin")
    run, reload = "/models/one/run", "/models/one/reload"
    assert post(server, run, b"x")[0] == 401
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/models", timeout=10)
    assert post(server, run, b"x", Authorization="Bearer sesame") == (200, "x")
    assert post(server, reload, b"", Authorization="Bearer sesame")[0] == 403  # also from the server's own host
    assert post(server, reload, b"", Authorization="Bearer admin")[0] == 200
    assert post(server, "/models/one/unload", b"", Authorization="Bearer admin")[1]["state"] == "UNLOADED"
    assert post(server, run, b"x", Authorization="Bearer sesame")[0] == 409
    assert post(server, "/models/one/load", b"", Authorization="Bearer admin")[1]["state"] == "READY"


def test_other_sites_pages_may_not(server: Server) -> None:
    here = f"127.0.0.1:{server.http_port}"
    for path in ("/models/echo/run", "/models/echo/reload"):
        for headers in (
            {"Origin": "http://evil.test"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site", "Origin": "http://other.test"},
            {"Origin": "http://evil.test:80", "Host": "evil.test:80"},  # a name made to stand for 127.0.0.1
        ):
            status, answer = post(server, path, b"x", **headers)
            assert status == 403, headers
            assert "page" in answer["error"]
        assert post(server, path, b"x", Origin=f"http://{here}", Sec_Fetch_Site="same-origin")[0] == 200


def get(server: Server, path: str, token: str = "") -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_pages_files(server: Server) -> None:
    assert b"page/app.js" in get(server, "/")[1]
    for path in PAGE.iterdir():
        assert get(server, f"/page/{path.name}") == (200, path.read_bytes())
    for path in ("nothing.js", "..%2fhttp_app.py", "%2e%2e/http_app.py", ".", "", "app.js%00"):
        assert get(server, f"/page/{path}")[0] == 404, path


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        assert "://" not in path.read_text().replace("http://www.w3.org/2000/svg", ""), path


def test_stats(start_server: StartServer, tmp_path: Path) -> None:
    body = "    def run(self, data, args):\n        return data / args.get('by', 1)"
    server = start_server(write_model(tmp_path, "halves", body), TMS_TOKEN="sesame")
    assert get(server, "/stats")[0] == 401

    def stats() -> dict[str, Any]:
        (model,) = json.loads(get(server, "/stats", "sesame")[1])["models"]
        return dict(model)

    before = stats()
    assert (before["name"], before["state"], before["reason"]) == ("halves", "READY", "")
    assert (before["answered"], before["failed"], before["p50_ms"], before["p95_ms"]) == (0, 0, None, None)
    assert len(before["worker_pids"]) == 1
    with server.client("halves", token="sesame") as client:
        for _ in range(8):
            client.run(2)
        with pytest.raises(Exception, match="division"):
            client.run(2, {"by": 0})
        after = stats()
    assert (after["answered"], after["failed"], after["batches"], after["items"]) == (9, 1, 9, 9)
    assert 0 < after["p50_ms"] <= after["p95_ms"] < 10_000
    assert json.loads(get(server, "/stats", "sesame")[1])["grpc_port"] == server.port


def test_arrays_in_json_have_a_dtype(server: Server) -> None:
    def run(data: str) -> tuple[int, Any]:
        return post(server, "/models/describe/run", data.encode(), "application/json")

    assert run('{"$array": {"dtype": "float32", "data": [[1, 2.5]]}}')[1]["dtype"] == "float32"
    assert run('{"$array": {"dtype": "int8", "data": [1, 2, 3, 4], "shape": [2, 2]}}')[1]["shape"] == [2, 2]
    empty = b'{"$array": {"dtype": "float64", "data": [], "shape": [2, 0]}}'
    assert post(server, "/models/echo/run", empty, "application/json") == (200, [[], []])
    for data in (
        '{"dtype": "float32"}',
        '{"data": [1]}',
        '{"dtype": "object", "data": [1]}',
        '{"dtype": "<U9999999", "data": ["a"]}',
        '{"dtype": ["float32"], "data": [1]}',
        '{"dtype": "float32", "data": ["1"]}',
        '{"dtype": "float32", "data": [[1], [2, 3]]}',
        '{"dtype": "float32", "data": [{"a": 1}]}',
        '{"dtype": "float32", "data": null}',
        '{"dtype": "uint8", "data": [300]}',
        '{"dtype": "uint8", "data": [1.5]}',
        '{"dtype": "uint8", "data": [-1]}',
        '{"dtype": "int64", "data": [1e300]}',
        '{"dtype": "float32", "data": [1], "shape": [2]}',
        '{"dtype": "float32", "data": [1], "shape": [1000000000, 1000000000]}',
        '{"dtype": "float32", "data": [1], "shape": "x"}',
        '{"dtype": "float32", "data": [], "shape": [1000000000, 0]}',
        '{"dtype": "float32", "data": ' + "[" * 60 + "1" + "]" * 60 + "}",
        '{"dtype": "float32", "data": [1], "more": 1}',
    ):
        status, answer = run(f'{{"$array": {data}}}')
        assert (status, answer["status"]) == (400, "INVALID_ARGUMENT"), data
        assert '"$array"' in answer["error"], answer
    assert post(server, "/models/echo/run", b'{"$array": 0}', "application/json") == (200, {"$array": 0})


def test_models_show_their_examples(start_server: StartServer, tmp_path: Path) -> None:
    examples = {
        "text": ("'hello'", "hello"),
        "none": ("None", None),
        "row": ("np.ones(2, 'f4')", {"$array": {"dtype": "float32", "shape": [2], "data": [1.0, 1.0]}}),
        "large": ("{'image': np.zeros((64, 64), 'u1')}", {"image": {"$array": {"dtype": "uint8", "shape": [64, 64]}}}),
        "bytes": ("b'1234'", None),
        "long": ("'x' * 5000", None),
        "odd": ("{'$array': 0, 'nan': float('nan')}", {"$array": 0, "nan": None}),
    }
    for name, (example, _) in examples.items():
        run = f"    example = {example}\n    def run(self, data, args):\n        return str(data)"
        write_model(tmp_path, name, run.replace("np.", "__import__('numpy')."))
    server = start_server(tmp_path)
    found = {model["name"]: model["example"] for model in json.loads(get(server, "/models")[1])["models"]}
    assert found == {name: shown for name, (_, shown) in examples.items()}


def test_a_view_of_what_is_large(start_server: StartServer, tmp_path: Path) -> None:
    answer = """{
        "boxes": np.zeros((100, 4), "f4"), "wave": np.arange(100_000, dtype="f4"), "cube": np.zeros((9, 9, 9)),
        "texts": np.array(["a"] * 50), "mask": np.eye(50, dtype=bool), "few": np.zeros((2, 2)),
        "nan": np.full(40, np.nan), "many": [np.zeros(4096)] * 40,
        "images": [np.zeros((9, 9), "u1")] * 40, "bytes": b"123", "none": np.zeros((0, 5)),
    }"""
    write_model(
        tmp_path,
        "large",
        f"    def run(self, data, args):\n        return {answer}".replace("np.", "__import__('numpy')."),
    )
    server = start_server(tmp_path)
    found = post(server, "/models/large/run?view", b"x")[1]["answer"]
    assert found["boxes"]["array"] == "float32 100x4"
    assert len(found["boxes"]["values"]) == 100
    assert "png" not in found["boxes"]
    assert (found["wave"]["every"], found["wave"]["values"][:2]) == (98, [0, 98])
    assert len(found["cube"]["values"]) == 9
    assert found["texts"]["values"] == ["a"] * 50
    assert found["mask"]["png"].startswith("data:image/png;base64,")
    assert found["few"] == [[0, 0], [0, 0]]
    assert (found["nan"]["min"], found["nan"]["values"]) == (None, [None] * 40)
    assert not [line for line in server.log if "Warning" in line]
    assert sum("values" in one for one in found["many"]) < 16
    assert sum("png" in one for one in found["images"]) == 31  # and the mask
    assert (found["bytes"], found["none"]) == ("3 bytes", [])
    streamed = urllib.request.Request(
        f"http://127.0.0.1:{server.http_port}/models/large/run?view",
        b"x",
        {"Content-Type": "text/plain", "Accept": "text/event-stream"},
    )
    with urllib.request.urlopen(streamed, timeout=30) as events:
        assert json.loads(events.readline().removeprefix(b"data: ")) == found
