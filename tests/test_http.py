"""The HTTP port as hostile, slow and unusual callers use it: where requests end, what they may take, who is let in."""

import http.client
import json
import re
import resource
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import psutil
import pytest

from tests.conftest import Server, wait_for
from tests.test_admin import PROXIES, health
from tests.test_faults import write_model
from tests.test_security import Certificates, tls
from tests.test_web import form, post

StartServer = Callable[..., Server]
SLOW = """
    def run(self, data, args):
        import time
        time.sleep(float(args.get('s', 5)))
        return data
"""


def connect(server: Server, timeout: float = 30) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.http_port), timeout)


def talk(server: Server, data: bytes, quiet: float = 1.0) -> bytes:
    """What the server answers until it closes, or says nothing for a while."""
    answer = b""
    with connect(server) as connection:
        connection.sendall(data)
        connection.settimeout(quiet)
        try:
            while part := connection.recv(1 << 16):
                answer += part
        except (TimeoutError, ConnectionResetError):
            pass
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]


def states(server: Server) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/models", timeout=20) as answer:
        return {model["name"]: model["state"] for model in json.load(answer)["models"]}


def metric(server: Server, name: str) -> float:
    """A metric of the model slow."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=20) as answer:
        found = re.search(rf'^{name}\{{model="slow"\}} (\S+)', answer.read().decode(), re.M)
    return float(found[1]) if found else 0.0


def at_work(server: Server) -> float:
    return metric(server, "tms_in_flight")


def live(server: Server) -> float:
    """Seconds that the server takes to say that it lives, on a new connection."""
    begun = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/livez", timeout=20) as answer:
        assert answer.status == 200
    return time.monotonic() - begun


@pytest.fixture
def slow(start_server: StartServer, tmp_path: Path) -> Server:
    server: Server = start_server(write_model(tmp_path, "slow", SLOW), TMS_MAX_MESSAGE_MB=4, TMS_MAX_INFLIGHT_MB=6)
    return server


INNER = b"POST /models/echo/unload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
CLOSE = "Connection: close\r\n"
POST = b"POST /models/echo/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER, 200),
        (b"HEAD /livez HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER, 200),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER, 404),
        (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER, 404),
        (b"POST /livez HTTP/1.1\r\nHost: x\r\n\r\n" + INNER, 405),
        (POST + b"\r\n" + INNER, 411),
        (POST + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
        (POST + b"Content-Length: 1\r\nContent-Length: 0\r\n\r\n" + INNER, 400),
        (POST + b"Content-Length: -1\r\n\r\n" + INNER, 400),
        (POST + b"Content-Length: +0\r\n\r\n" + INNER, 400),
        (POST + b"Content-Length : 0\r\n\r\n" + INNER, 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + INNER, 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n" + INNER, 400),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 70_000 + b"\r\n\r\n" + INNER, 400),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n" + INNER, 400),
    ],
)
def test_one_request_has_one_answer(server: Server, request_: bytes, status: int) -> None:
    assert statuses(talk(server, request_)) == [status]
    assert states(server)["echo"] == "READY"


def test_a_request_after_a_request_is_answered(server: Server) -> None:
    request = POST + b"Content-Length: 2\r\n\r\nhi"
    assert statuses(talk(server, request + request.replace(b"hi", b"ho"))) == [200, 200]


def test_a_connection_is_used_again_unless_a_body_was_not_read(server: Server) -> None:
    wrong = POST.replace(b"text/plain", b"application/json") + b"Content-Length: 1\r\n\r\n{"
    good = POST + b"Content-Length: 2\r\n\r\nhi"
    assert statuses(talk(server, wrong + good)) == [400, 200]
    unread = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    assert statuses(talk(server, unread + good)) == [404]


def test_methods_and_paths(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)
    for method, path, status, allowed in [
        ("HEAD", "/livez", 200, ""),
        ("HEAD", "/models", 200, ""),
        ("HEAD", "/v2/health/live", 200, ""),
        ("GET", "/models/", 200, ""),
        ("DELETE", "/models", 405, "GET"),
        ("PUT", "/models/echo/run", 405, "POST"),
        ("GET", "/models/echo/run", 405, "POST"),
        ("OPTIONS", "/v2", 405, "GET"),
        ("GET", "/v2/nothing", 404, ""),
    ]:
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == status, (method, path)
        assert allowed in (answer.headers["Allow"] or "")
        assert (body == b"") == (method == "HEAD")
        assert int(answer.headers["Content-Length"]) > 0
        assert "Server" not in answer.headers
    connection.close()


def test_bodies_in_chunks(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=20)
    for size in (0, 3, 1 << 20):
        parts = iter([b"x" * size, b"y" * size]) if size else iter([])
        connection.request(
            "POST",
            "/models/echo/run",
            parts,
            {"Content-Type": "text/plain", "Transfer-Encoding": "chunked"},
            encode_chunked=True,
        )
        assert json.load(connection.getresponse()) == "x" * size + "y" * size
    connection.close()


def test_a_body_in_tiny_chunks_is_refused(server: Server) -> None:
    """Each chunk takes as much time as a large one."""
    tiny = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000
    assert statuses(talk(server, tiny)) in ([400], [])  # unless the answer is lost, for it goes on sending
    assert post(server, "/models/echo/run", b"x") == (200, "x")


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (
            b'--x\r\nContent-Disposition: form-data; name="' + b";" * 100_000 + b'"\r\n\r\nhi\r\n--x--\r\n',
            "x",
            "header",
        ),
        (b"--x\r\n" + b"A: b\r\n" * 50_000 + b"\r\nhi\r\n--x--\r\n", "x", "header"),
        (b"--x\r\nContent-Disposition: form-data; name=text\r\n\r\nhi\r\n" * 9 + b"--x--\r\n", "x", "two fields"),
        (
            b"".join(b"--x\r\nContent-Disposition: form-data; name=a%d\r\n\r\nhi\r\n" % i for i in range(100_000)),
            "x",
            "send one of image",
        ),
        (b"--x\r\nContent-Disposition: form-data; name=text\r\n\r\nhi", "x", "ends before its last boundary"),
        (
            b"--x\r\nContent-Disposition: form-data; name=a\r\nContent-Transfer-Encoding: base64\r\n\r\naGk=\r\n--x--",
            "x",
            "base64",
        ),
        (b"--x\r\n", "b" * 900, ""),
    ],
    ids=["long header", "many headers", "one field often", "many fields", "cut off", "base64", "long boundary"],
)
def test_hostile_forms(server: Server, body: bytes, kind: str, message: str) -> None:
    begun = time.monotonic()
    status, answer = post(server, "/models/echo/run", body, f"multipart/form-data; boundary={kind}")
    assert time.monotonic() - begun < 5
    assert status == 400
    assert message in answer["error"]


def test_hostile_forms_by_url_encoding(server: Server) -> None:
    kind = "application/x-www-form-urlencoded"
    assert post(server, "/models/echo/run", b"&".join(b"a%d=1" % i for i in range(100_000)), kind)[0] == 400
    assert post(server, "/models/echo/run", b"text=%ff", kind)[0] == 400
    assert post(server, "/models/echo/run", b"text=a&text=b", kind)[0] == 400
    assert post(server, "/models/echo/run", b"text=", kind) == (200, "")


def test_large_forms_arrive_equal(server: Server) -> None:
    content = "".join(map(chr, range(32, 127))) * 30_000 + "\r\n--b0\r\n--b\r"
    assert post(server, "/models/echo/run", *form(text=content.replace("--b0", "--b1").encode()))[1] == (
        content.replace("--b0", "--b1")
    )


def unsent(server: Server, headers: bytes, path: bytes = b"/models/slow/run") -> tuple[int, bytes]:
    """The answer to a request of which only the headers are sent."""
    with connect(server) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (path, headers))
        connection.settimeout(5)
        answer = connection.recv(1 << 16)
    return statuses(answer)[0], answer


def test_requests_that_are_refused_before_the_body_is_read(
    start_server: StartServer, slow: Server, tmp_path: Path
) -> None:
    length = b"Content-Length: %d\r\n"
    assert unsent(slow, length % (5 << 20))[0] == 413
    assert unsent(slow, length % 5, b"/models/nobody/run")[0] == 404
    assert unsent(slow, length % 5, b"/models/slow/paint")[0] == 404
    assert unsent(slow, length % 5, b"/v2/models/nobody/infer")[0] == 404
    assert unsent(slow, length % 5 + b"Origin: http://evil.test\r\n")[0] == 403
    server = start_server(tmp_path, TMS_TOKEN="sesame")
    for path in (b"/models/slow/run", b"/models/slow/unload", b"/v2/models/slow/infer", b"/v2/repository/index"):
        assert unsent(server, length % 5, path)[0] == 401, path
    with pytest.raises(HTTPError) as caught:  # who sends first and reads then has the answer, too
        urllib.request.urlopen(f"http://127.0.0.1:{slow.http_port}/models/slow/run", b"x" * (6 << 20), timeout=20)
    assert caught.value.code == 413
    caught.value.close()


def test_bytes_under_way_are_bounded(slow: Server) -> None:
    with ExitStack() as stack:
        half = stack.enter_context(connect(slow))
        half.sendall(b"POST /models/slow/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (4 << 20))
        wait_for(lambda: unsent(slow, b"Content-Length: %d\r\n" % (3 << 20))[0] == 429, "the bytes to count")
        assert b"retry-after: 1\r\n" in unsent(slow, b"Content-Length: %d\r\n" % (3 << 20))[1].lower()
        chunked = stack.enter_context(connect(slow))
        chunked.sendall(b"POST /models/slow/run HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20))
        for _ in range(3):
            chunked.sendall(piece)
        assert statuses(chunked.recv(1 << 16)) == [429]
        assert post(slow, "/models/slow/run", *form(text=b"x", args=b'{"s": 0}'))[0] == 200
    wait_for(lambda: post(slow, "/models/slow/run", b"x" * (3 << 20), "image/x")[0] == 400, "the bytes to be let go")


def test_too_many_bytes_in_chunks(slow: Server) -> None:
    with connect(slow) as connection:
        connection.sendall(b"POST /models/slow/run HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            connection.sendall(b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20)))
        assert statuses(connection.recv(1 << 16)) == [413]


def test_health_while_every_thread_is_busy(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", SLOW), TMS_THREADS=4)
    with ThreadPoolExecutor(20) as threads:
        asked = [
            threads.submit(post, server, "/models/slow/run", *form(text=b"x", args=b'{"s": 1}')) for _ in range(20)
        ]
        wait_for(lambda: any(one.done() for one in asked), "one too many to be refused")
        for path in ("/livez", "/readyz", "/metrics", "/models", "/v2/health/ready"):
            begun = time.monotonic()
            with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}{path}", timeout=20) as answer:
                answer.read()
            assert time.monotonic() - begun < 0.9, path
        assert {one.result()[0] for one in asked} == {200, 429}


def test_requests_of_disconnected_callers_are_dropped(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", SLOW))
    body, kind = form(text=b"x", args=b'{"s": 2}')
    head = f"POST /models/slow/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"

    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(server)).sendall(head.encode() + body)
        wait_for(lambda: metric(server, "tms_queue_depth") == 3, "one at work, three queued")
    wait_for(lambda: metric(server, "tms_dropped_total") == 3, "the queued to be dropped", timeout=5)


def test_silent_connections_leave_room(start_server: StartServer) -> None:
    """More than the port may have; and the oldest of those that sent nothing whole make room for others."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = start_server()
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    try:
        with ExitStack() as stack:
            for number in range(1300):
                one = stack.enter_context(connect(server))
                one.sendall([b"", b"GET /li", POST + b"Content-Length: 9\r\n\r\nx"][number % 3])
            assert live(server) < 2
            assert len(psutil.Process(server.process.pid).net_connections("tcp")) < 1200
            assert post(server, "/models/echo/run", b"x") == (200, "x")
            with server.client("echo") as client:
                assert client.run_text("x") == "x"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_slow_headers_end_the_connection(server: Server) -> None:
    with connect(server) as silent, connect(server) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nHo")
        begun = time.monotonic()
        for _ in range(8):  # a byte now and then does not help
            time.sleep(0.5)
            slow.sendall(b"s")
        assert silent.recv(1) == slow.recv(1) == b""
        assert time.monotonic() - begun < 20


def test_the_stop_does_not_wait_for_open_connections(start_server: StartServer) -> None:
    server = start_server(TMS_DRAIN_DELAY_S=0)
    with ExitStack() as stack:
        for sent in (b"", b"GET /li", POST + b"Content-Length: 9\r\n\r\nx", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"):
            stack.enter_context(connect(server)).sendall(sent)
        live(server)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 8


def test_a_stop_finishes_what_was_asked(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", SLOW), TMS_DRAIN_DELAY_S=0)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(post, server, "/models/slow/run", *form(text=b"x", args=b'{"s": 2}'))
        wait_for(lambda: at_work(server) == 1, "the call to be at work")
        assert server.stop() == 0
        assert asked.result() == (200, "x")


def test_a_stop_refuses_requests_that_take_too_long(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(write_model(tmp_path, "slow", SLOW), TMS_DRAIN_DELAY_S=0, TMS_GRACE_S=0.5)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(post, server, "/models/slow/run", *form(text=b"x", args=b'{"s": 60}'))
        wait_for(lambda: at_work(server) == 1, "the call to be at work")
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 12
        assert asked.result()[0] == 503
    assert not any("Traceback" in line for line in server.log)


def test_an_idle_server_sleeps(start_server: StartServer) -> None:
    server = start_server()
    process = psutil.Process(server.process.pid)
    live(server)
    before = process.num_ctx_switches()
    time.sleep(3)  # what is measured
    after = process.num_ctx_switches()
    assert after.voluntary - before.voluntary < 15


@pytest.mark.parametrize("host", ["[::]", "::", "[::1]", "localhost", "0.0.0.0", "127.0.0.1"])
def test_hosts(start_server: StartServer, host: str) -> None:
    server = start_server(TMS_HOST=host)
    shown = f"[{host.strip('[]')}]" if ":" in host else host
    assert any(f"gRPC on {shown}:{server.port}, HTTP on {shown}:{server.http_port}," in line for line in server.log)
    addresses = {"[::]": ["::1", "127.0.0.1"], "::": ["::1", "127.0.0.1"], "[::1]": ["::1"]}.get(host, ["127.0.0.1"])
    for address in addresses:
        for port in (server.port, server.http_port):
            socket.create_connection((address, port), 10).close()
        url = f"http://[{address}]:{server.http_port}" if ":" in address else f"http://{address}:{server.http_port}"
        with urllib.request.urlopen(f"{url}/models", timeout=10) as answer:
            assert answer.status == 200
        admin = urllib.request.Request(f"{url}/models/echo/reload", b"")
        with urllib.request.urlopen(admin, timeout=30) as answer:
            assert json.load(answer)["state"] == "READY"
    settings = {"TMS_HOST": host, "TMS_HTTP_PORT": "off", "TMS_TOKEN": "sesame"}
    without = start_server(**settings)
    ran = health(settings | {"TMS_PORT": without.port}, **PROXIES)
    assert (ran.returncode, ran.stdout.strip()) == (0, '{"ready": true}'), ran.stderr


def https(server: Server, context: ssl.SSLContext, path: str = "/livez") -> int:
    url = f"https://127.0.0.1:{server.http_port}{path}"
    with urllib.request.urlopen(url, timeout=20, context=context) as answer:
        return int(answer.status)


def test_tls(start_server: StartServer, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = start_server(**tls(certificates.issue("server", "127.0.0.1")))
    context = ssl.create_default_context(cafile=str(certificates.ca))
    assert https(server, context, "/models") == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/livez", timeout=20)

    def serial() -> str:
        return ssl.get_server_certificate(("127.0.0.1", server.http_port))

    first = serial()
    assert serial() == first
    certificates.issue("server", "127.0.0.1")
    assert (second := serial()) != first
    (tmp_path / "server.key").write_text("half a fi")
    assert serial() == second
    assert https(server, context) == 200


def test_mutual_tls(start_server: StartServer, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = start_server(**tls(certificates.issue("server", "127.0.0.1"), TMS_TLS_CLIENT_CA=certificates.ca))
    context = ssl.create_default_context(cafile=str(certificates.ca))
    with pytest.raises(OSError, match="(?i)certificate|reset|broken|EOF|closed"):
        https(server, context)
    own = certificates.issue("client", "a-client")
    context.load_cert_chain(own["cert"], own["key"])
    assert https(server, context, "/models") == 200


@pytest.mark.parametrize("path", ["/models", "/metrics", "/", "/v2", "/v2/models/echo", "/v2/models/echo/config"])
def test_a_page_whose_name_was_made_to_stand_for_this_host(server: Server, path: str) -> None:
    """A browser sends no Origin with what it gets from its own page's site."""

    def get(host: str) -> int:
        (status,) = statuses(talk(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{CLOSE}\r\n".encode(), 10))
        return status

    for host in ("evil.test", f"evil.test:{server.http_port}", "127.0.0.1.evil.test", "localhost.evil.test", "[evil"):
        assert get(host) == 403, host
    for host in ("localhost", f"127.0.0.1:{server.http_port}", "[::1]:80", "10.0.0.1", socket.gethostname()):
        assert get(host) == 200, host


def test_names_that_are_allowed(start_server: StartServer) -> None:
    server = start_server(TMS_ALLOWED_HOSTS="Models.test,other.test")
    for host, status in (("models.test", 200), ("other.test:80", 200), ("evil.test", 403)):
        assert statuses(talk(server, f"GET /models HTTP/1.1\r\nHost: {host}\r\n{CLOSE}\r\n".encode())) == [status]
    server = start_server(TMS_ALLOWED_HOSTS="*")
    assert statuses(talk(server, f"GET /models HTTP/1.1\r\nHost: evil.test\r\n{CLOSE}\r\n".encode())) == [200]


def strict(text: bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    body = (
        "    metadata = {'best': float('inf')}\n"
        "    def run(self, data, args):\n"
        "        import numpy as np\n"
        "        rows = np.array([1, np.nan, np.inf, -np.inf], args.get('dtype', 'float32'))\n"
        "        many = np.full((8, 8), np.nan, 'float32')\n"
        "        return {'score': float('nan'), 'rows': rows, 'many': many} if args.get('dict') else rows"
    )
    server = Server(write_model(tmp_path_factory.mktemp("scores"), "score", body))
    yield server
    server.kill()


def raw_post(server: Server, path: str, body: bytes, kind: str = "application/json") -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=20) as answer:
        read: bytes = answer.read()
    return read


def test_numbers_that_json_lacks(scores: Server) -> None:
    """They are null in JSON, and themselves in the formats that have them."""
    rows = [1, None, None, None]
    viewed = strict(raw_post(scores, "/models/score/run?view", *form(data=b"1", args=b'{"dict": 1}')))["answer"]
    assert (viewed["score"], viewed["rows"]) == (None, rows)
    assert (viewed["many"]["array"], viewed["many"]["min"], viewed["many"]["mean"]) == ("float32 8x8", None, None)
    for dtype, name in (("float16", "FP16"), ("float32", "FP32"), ("float64", "FP64")):
        asked: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
        asked["parameters"] = {"dtype": dtype}
        (output,) = strict(raw_post(scores, "/v2/models/score/infer", json.dumps(asked).encode()))["outputs"]
        assert (output["datatype"], output["data"]) == (name, rows)
        asked["parameters"]["binary_data_output"] = True
        binary = raw_post(scores, "/v2/models/score/infer", json.dumps(asked).encode())
        exact = np.frombuffer(binary[-4 * np.dtype(dtype).itemsize :], dtype)
        assert np.array_equal(exact, np.array([1, np.nan, np.inf, -np.inf], dtype), equal_nan=True)
    with urllib.request.urlopen(f"http://127.0.0.1:{scores.http_port}/models", timeout=20) as answer:
        (model,) = strict(answer.read())["models"]
    assert model["metadata"] == {"best": None}
    with scores.client("score") as client:
        assert np.array_equal(client.run(1), np.array([1, np.nan, np.inf, -np.inf], "float32"), equal_nan=True)


def test_uvicorn_logs_nothing_of_callers(start_server: StartServer) -> None:
    server = start_server()
    post(server, "/models/echo/run", b"x")
    talk(server, b"nonsense\x1b\r\n\r\n")
    talk(server, b"POST /models/echo/run HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n")
    talk(server, b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    server.stop()
    assert not [line for line in server.log if "uvicorn" in line or "Traceback" in line]
