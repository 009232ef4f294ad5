"""The local transport on one host: that it is taken, that nobody can abuse it, and that nothing of it stays behind."""

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import model_client
from model_client import ModelClient
from tests.conftest import ROOT, Server, only, shared_memory, wait_for
from tests.test_faults import write_model
from tiny_model_server import local_transport, schemas
from tiny_model_server.client import local
from tiny_model_server.errors import CODES
from tiny_model_server.local_transport import FINAL, HELLO, REQUEST

IMAGE = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
METHODS = schemas.methods("server", "server.Server")


def idle_connections(client: ModelClient) -> int:
    """Connections of the local transport that wait for the client's next calls."""
    connections = client._transport.locals
    return len(connections[0].idle.get(None, ())) if connections else 0


@pytest.fixture
def raw(server: Server) -> Iterator[local.LocalConnection]:
    made = local.LocalConnection(server.port, {})
    yield made
    made.close()


def run_application(code: str, server: Server) -> str:
    """What a process that runs this code, with the server's address as argument, says on stderr; it must succeed."""
    command = [sys.executable, "-c", code, server.address]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def send(one: local.LocalConnection, method: str, **fields: Any) -> tuple[int, Any]:
    """(status number, message or text) of a call whose places the test makes up."""
    one.send(METHODS[method].path.encode(), METHODS[method].request(**fields).SerializeToString(), 10, True)
    answer = one.receive(10)
    return answer.code, METHODS[method].response.FromString(answer.body) if not answer.code else answer.body.decode()


def test_it_is_taken(server: Server) -> None:
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
        assert idle_connections(client) == 1
        assert np.array_equal(client.run_image(IMAGE), IMAGE)
        assert idle_connections(client) == 1
        assert client.stats()["replicas"][f"127.0.0.1:{server.port}"]["calls"] == 2


def test_several_callers_have_a_connection_each(server: Server) -> None:
    with server.client("echo") as client:
        client.run_text("x")
        images = [np.full((100, 100), number, np.uint8) for number in range(64)]
        futures = [client.submit_image(image) for image in images]
        for image, future in zip(images, futures, strict=True):
            assert np.array_equal(future.result(), image)
        assert 1 < idle_connections(client) <= 64
        for image, answer in zip(images, client.map(images), strict=True):
            assert np.array_equal(answer, image)


@pytest.mark.parametrize("why", ["setting of the client", "setting of the server", "several addresses"])
def test_where_it_is_not_taken(
    start_server: Callable[..., Server], server: Server, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    addresses = [server.address]
    if why == "setting of the client":
        monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "0")
    elif why == "setting of the server":
        addresses = [start_server(TMS_LOCAL_TRANSPORT=0).address]
    else:
        addresses.append(start_server().address)
    with ModelClient("echo", addresses=addresses) as client:
        assert np.array_equal(client.run_image(IMAGE), IMAGE)
        assert idle_connections(client) == 0


def test_two_servers_do_not_mix(start_server: Callable[..., Server], server: Server) -> None:
    other = start_server()
    for one in (server, other):
        made = local.LocalConnection(one.port, {})
        code, answer = send(made, "GetPID")
        assert (code, answer.data) == (0, f'{{"pid": {one.process.pid}}}')
        assert made.server == f"127.0.0.1:{one.port}"
        made.close()


LIES: list[tuple[str, dict[str, Any]]] = [
    ("beyond the end", {"offset": 1 << 30}),
    ("before the start", {"offset": -64}),
    ("not aligned", {"offset": 1}),
    ("too long", {"length": 1 << 40}),
    ("a negative length", {"length": -1}),
    ("shorter than the shape", {"length": 64}),
]


@pytest.mark.parametrize(("what", "lie"), LIES)
def test_lies_about_the_place(raw: local.LocalConnection, what: str, lie: dict[str, Any]) -> None:
    raw.place([IMAGE])
    image = {"height": 480, "width": 640, "channels": 3, "dtype": "uint8"}
    true = {"offset": 0, "length": IMAGE.nbytes}
    code, text = send(raw, "RunImage", image=image | {"place": true | lie}, model="echo")
    assert code == CODES["INVALID_ARGUMENT"], text
    code, text = send(raw, "Run", data={"json": '{"$array": 0}', "arrays": [
        {"dtype": "uint8", "shape": [480, 640, 3], "place": true | lie}]}, model="echo")  # fmt: skip
    assert code == CODES["INVALID_ARGUMENT"], text
    code, answer = send(raw, "RunImage", image=image | {"place": true}, model="describe", accept_arrays=True)
    assert code == 0
    assert '"shape": [480, 640, 3]' in answer.data


@pytest.mark.parametrize("lie", [{"dtype": "uint16"}, {"dtype": "object"}, {"height": 481}, {"height": -480}])
def test_lies_about_the_image(raw: local.LocalConnection, lie: dict[str, Any]) -> None:
    raw.place([IMAGE])
    image = {"height": 480, "width": 640, "channels": 3, "dtype": "uint8"} | lie
    code, text = send(raw, "RunImage", image=image | {"place": {"length": IMAGE.nbytes}}, model="echo")
    assert code == CODES["INVALID_ARGUMENT"], text


def test_lies_beside_bytes_in_the_message(raw: local.LocalConnection) -> None:
    """A place counts, and is looked at, also where the message has the bytes as well, at its end."""
    kind = METHODS["RunImage"].request
    lie = {"offset": 1 << 40, "length": 60_000}
    described = {"height": 200, "width": 300, "channels": 1, "dtype": "uint8", "place": lie}
    parts = [kind(model="describe"), kind(image=described), kind(image={"data": bytes(60_000)})]
    raw.send(METHODS["RunImage"].path.encode(), b"".join(part.SerializeToString() for part in parts), 10, True)
    answer = raw.receive(10)
    assert answer.code == CODES["INVALID_ARGUMENT"]
    assert b"do not lie in the shared memory" in answer.body
    assert send(raw, "RunText", text="x", model="echo")[1].data == '"x"'


def test_places_are_for_this_way_alone(server: Server) -> None:
    import grpc

    method = METHODS["RunImage"]
    image = {"height": 1, "width": 1, "channels": 1, "place": {"length": 1}}
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match="place is for callers"):
        channel.unary_unary(method.path)(method.request(image=image, model="echo").SerializeToString(), timeout=5)


def test_shared_memory_cannot_be_taken_away(raw: local.LocalConnection) -> None:
    raw.place([IMAGE])
    for segment in (raw.request, raw.response):
        os.ftruncate(segment.fd, 64 << 20)
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, 0)


def test_memory_that_grows_beyond_all_bounds(server: Server, raw: local.LocalConnection) -> None:
    with server.client("describe") as client:
        (before,) = client.model_info()[0]["worker_pids"]
    raw.place([IMAGE])
    image = {"height": 480, "width": 640, "channels": 3, "dtype": "uint8", "place": {"length": IMAGE.nbytes}}
    assert send(raw, "RunImage", image=image, model="echo")[0] == 0
    os.ftruncate(raw.request.fd, 1 << 62)
    assert send(raw, "RunImage", image=image, model="describe")[0] == 0  # its worker has not mapped it yet
    huge = {"height": 1 << 30, "width": 1 << 30, "channels": 1, "dtype": "uint8", "place": {"length": 1 << 60}}
    code, text = send(raw, "RunImage", image=huge, model="describe")
    assert code & ~FINAL == CODES["RESOURCE_EXHAUSTED"], text
    assert "TMS_MAX_MESSAGE_MB" in text
    far = image | {"place": {"length": IMAGE.nbytes, "offset": 1 << 60}}
    code, text = send(raw, "RunImage", image=far, model="describe")
    assert code == CODES["INVALID_ARGUMENT"], text
    assert "cannot be mapped" in text
    with server.client("describe") as client:
        assert client.run_text("x")
        assert client.model_info()[0]["worker_pids"] == [before]


def test_places_over_each_other_count_each_time(start_server: Callable[..., Server]) -> None:
    """Many images that name the same bytes are not copied without end."""
    server = start_server(only("describe", "echo"), TMS_MAX_MESSAGE_MB=4)
    with contextlib.closing(local.LocalConnection(server.port, {})) as one:
        one.place([IMAGE])
        place = {"length": IMAGE.nbytes}
        plain = {"height": 480, "width": 640, "channels": 3, "dtype": "uint8", "place": place}
        array = {"dtype": "uint8", "shape": [480, 640, 3], "place": place}
        for image in (plain, {"encoded": True, "place": place}):
            code, text = send(one, "RunBatchImage", images=[image] * 5, model="echo")
            assert code & ~FINAL == CODES["RESOURCE_EXHAUSTED"]
            assert "TMS_MAX_MESSAGE_MB" in text
        items = [{"json": '{"$bytes": 0}', "arrays": [array]}] * 5
        assert send(one, "RunBatch", items=items, model="echo")[0] & ~FINAL == CODES["RESOURCE_EXHAUSTED"]
        assert send(one, "RunBatchImage", images=[plain] * 4, model="describe", accept_arrays=True)[0] == 0


@given(noise=st.binary(max_size=80), greeted=st.booleans())
def test_noise_on_the_socket(server: Server, noise: bytes, greeted: bool) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(5)
        connection.connect(local_transport.address(server.port))
        if greeted:
            connection.sendall(HELLO.pack(2) + b"{}")
            _, fds, *_ = socket.recv_fds(connection, HELLO.size, 2)
            for fd in fds:
                os.close(fd)
        with contextlib.suppress(OSError):
            connection.sendall(noise)
    with server.client("echo") as client:
        assert client.run_text("x") == "x"


def test_one_call_at_a_time(server: Server) -> None:
    """A caller that sends the next request before it has its answer is no client of ours: its connection ends."""
    made = local.LocalConnection(server.port, {})
    path, message = METHODS["GetPID"].path.encode(), b""
    request = REQUEST.pack(len(message), 5.0, 1, len(path)) + path + message
    made._socket.sendall(request + request)
    with pytest.raises(ConnectionError):
        made.receive(5)
    made.close()
    with server.client("echo") as client:
        assert client.run_text("x") == "x"


def test_a_request_in_pieces(raw: local.LocalConnection) -> None:
    path, message = METHODS["RunText"].path.encode(), METHODS["RunText"].request(text="x", model="echo")
    body = message.SerializeToString()
    for byte in REQUEST.pack(len(body), 5.0, 1, len(path)) + path + body:
        raw._socket.sendall(bytes([byte]))
        time.sleep(0.001)
    assert METHODS["RunText"].response.FromString(raw.receive(5).body).data == '"x"'


def test_a_caller_that_does_not_read(server: Server, raw: local.LocalConnection) -> None:
    """Its long answer waits for it, and nobody else does."""
    text = "x" * (4 << 20)
    raw.send(METHODS["RunText"].path.encode(), METHODS["RunText"].request(text=text, model="echo").SerializeToString(),
             10, True)  # fmt: skip
    with server.client("echo") as client:
        for _ in range(100):
            assert client.run_text("y") == "y"
    assert METHODS["RunText"].response.FromString(raw.receive(10).body).data == f'"{text}"'
    assert send(raw, "RunText", text="z", model="echo", accept_arrays=True)[1].data == '"z"'


def test_a_worker_that_dies_after_its_answer(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """The call is run again by another worker, and answered once."""
    log = tmp_path / "ran"
    body = f"""
    def run(self, data, args):
        import os, pathlib
        log = pathlib.Path({str(log)!r})
        first = not log.exists()
        log.open("a").write("x")
        if first:
            os._exit(1)
        return [data, args]"""
    server = start_server(write_model(tmp_path / "models", "dies", body))
    with server.client("dies") as client:
        for number in range(3):
            assert client.run_text(f"text {number}", {"number": number}) == [f"text {number}", {"number": number}]
        assert log.read_text() == "x" * 4
        assert idle_connections(client) == 1


WRITES_ANYWHERE = """
    def run(self, data, args):
        import os
        def kept(fd):
            target = os.readlink(f"/proc/self/fd/{fd}")
            return fd < 3 or not target.startswith(("socket:", "pipe:", "/memfd:"))
        for fd in map(int, os.listdir("/proc/self/fd")) if args.get("junk") else ():
            try:
                if not kept(fd):
                    os.write(fd, b"junk" * 100)
            except OSError:
                pass
        return data"""


@pytest.mark.parametrize("way", ["same host", "gRPC"])
def test_a_model_that_writes_into_stray_descriptors(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Its own worker is given up; the caller has an answer at once, and its connection is as it was."""
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", str(int(way == "same host")))
    server = start_server(write_model(tmp_path / "models", "writes", WRITES_ANYWHERE))
    with server.client("writes") as client:
        assert client.run("x") == "x"
        for _ in range(3):
            begun = time.monotonic()
            with pytest.raises(model_client.ModelFailed):
                client.run("x", {"junk": True}, timeout=30)
            assert client.run(IMAGE.shape, timeout=30) == list(IMAGE.shape)
            assert time.monotonic() - begun < 15
        assert idle_connections(client) == int(way == "same host")


HANGS = {
    "in run": "time.sleep(60 * len(data))",
    "in its answer": (
        "import gc\n"
        "        from tiny_model_server.engine.worker_connection import WorkerConnection\n"
        "        for pipe in gc.get_objects() if data else ():\n"
        "            if isinstance(pipe, WorkerConnection):\n"
        "                os.write(pipe.socket.fileno(), b'half')\n"
        "        time.sleep(60 * len(data))"
    ),
}


@pytest.mark.parametrize("where", HANGS)
def test_a_model_that_hangs_among_callers_of_others(
    start_server: Callable[..., Server], tmp_path: Path, where: str
) -> None:
    """Its time limit ends it, however busy the thread is that serves all callers; and those of the other are served."""
    write_model(tmp_path, "quick", "    def run(self, data, args):\n        return data")
    body = f"    timeout_s = 3\n    def run(self, data, args):\n        import os, time\n        {HANGS[where]}"
    server = start_server(write_model(tmp_path, "hangs", body))
    ended = threading.Event()
    slowest: list[float] = []

    def calls() -> None:
        with server.client("quick") as client:
            while not ended.is_set():
                started = time.monotonic()
                assert client.run_text("x") == "x"
                slowest.append(time.monotonic() - started)

    callers = [threading.Thread(target=calls) for _ in range(4)]
    for caller in callers:
        caller.start()
    with server.client("hangs") as client:
        assert client.run_text("") is None
        started = time.monotonic()
        with pytest.raises(model_client.DeadlineExceeded, match="longer than its timeout_s"):
            client.run_text("x")
        assert 3 <= time.monotonic() - started < 6
    ended.set()
    for caller in callers:
        caller.join()
    assert max(slowest) < 2


def test_both_ways_to_one_worker(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker serves callers by gRPC and by the local transport, streams and batches. Each has its own answers."""
    body = (
        "    max_batch_size = 4\n    def run(self, data, args):\n        return data\n"
        "    def run_batch(self, items, args):\n        return items"
    )
    server = start_server(write_model(tmp_path, "echoes", body))
    local_calls = server.client("echoes")
    local_calls.run(0)
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "0")
    by_grpc = server.client("echoes")
    wrong: list[Any] = []

    def calls(client: ModelClient, first: int) -> None:
        for number in range(first, first + 200):
            kind = number % 4
            answer: Any = client.run(number)
            if kind == 1:
                answer = int(client.run_image(np.full((40, 40), number, np.int32))[0, 0])
            elif kind == 2:
                answer = client.run_batch([number, number])[1]
            elif kind == 3 and client is by_grpc:
                (answer,) = client.run_stream(number)
            if answer != number:
                wrong.append((number, answer))

    threads = [
        threading.Thread(target=calls, args=(client, 1000 * (one + 3 * (client is local_calls))))
        for one in range(3)
        for client in (local_calls, by_grpc)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert idle_connections(local_calls) == 3
    assert idle_connections(by_grpc) == 0
    local_calls.close()
    by_grpc.close()
    assert not wrong


def test_descriptors_that_run_out(start_server: Callable[..., Server]) -> None:
    """While there are none, callers go by gRPC; afterwards the local transport is there again."""
    server = start_server()
    front = psutil.Process(server.process.pid)
    before = front.num_fds()
    _, most = front.rlimit(psutil.RLIMIT_NOFILE)
    for spare in range(4):  # for nothing, the socket, one memory, both
        wait_for(lambda: front.num_fds() == before, "the end of the last connection")
        used = {int(name) for name in os.listdir(f"/proc/{front.pid}/fd")}
        limit = next(n for n in range(most) if n - sum(fd < n for fd in used) == spare)  # descriptors are below it
        front.rlimit(psutil.RLIMIT_NOFILE, (limit, most))
        with contextlib.suppress(OSError):
            local.LocalConnection(server.port, {}).close()
        front.rlimit(psutil.RLIMIT_NOFILE, (most, most))

        def again() -> bool:
            with contextlib.suppress(OSError):
                local.LocalConnection(server.port, {}).close()
                return True
            return False

        wait_for(again, "the local transport")


def test_no_descriptor_for_new_memory(start_server: Callable[..., Server]) -> None:
    """A model retains the input, and the front has no descriptor for another request buffer: the caller goes on."""
    server = start_server(models=only("keeps"))
    client = server.client("keeps", timeout=10)
    frame = np.zeros((10, 10), np.uint8)
    client.run_image(frame)
    front, pids = psutil.Process(server.process.pid), client.model_info()[0]["worker_pids"]
    before, (_, most) = front.num_fds(), front.rlimit(psutil.RLIMIT_NOFILE)
    for spare in range(3):
        used = {int(name) for name in os.listdir(f"/proc/{front.pid}/fd")}
        limit = next(n for n in range(most) if n - sum(fd < n for fd in used) == spare)
        front.rlimit(psutil.RLIMIT_NOFILE, (limit, most))
        for _ in range(3):
            with contextlib.suppress(model_client.Overloaded):  # gRPC has no memory to share either
                client.run_image(frame)
        front.rlimit(psutil.RLIMIT_NOFILE, (most, most))
    assert client.model_info()[0]["worker_pids"] == pids
    client.close()
    wait_for(lambda: front.num_fds() <= before, "the descriptors")


def test_a_greeting_that_is_nested_deeply(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_THREADS=2)
    for _ in range(4):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(5)
            connection.connect(local_transport.address(server.port))
            connection.sendall(HELLO.pack(60000) + b"[" * 60000)
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
    local.LocalConnection(server.port, {}).close()  # those hold no place
    assert not [line for line in server.log if "Traceback" in line]


def test_a_request_that_never_ends(server: Server) -> None:
    """A caller that stops in the middle holds up nobody but itself."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(local_transport.address(server.port))
        connection.sendall(HELLO.pack(2) + b"{}" + REQUEST.pack(1000, 1.0, 1, 4) + b"/ser")
        with server.client("echo") as client:
            assert client.run_text("x") == "x"


CHILD = """
import os, sys, numpy
from model_client import ModelClient
client = ModelClient("echo", addresses=[sys.argv[1]])
image = numpy.zeros((1080, 1920, 3), "uint8")
client.run_image(image)
assert client._transport.locals[0].idle
if sys.argv[2] == "busy":
    client.submit_image(image)
    client.submit_image(image)
os.kill(os.getpid(), 9)
"""


def test_clients_that_are_killed_leave_nothing(start_server: Callable[..., Server]) -> None:
    server = start_server()
    front = psutil.Process(server.process.pid)
    before = shared_memory()

    def memory() -> float:
        """MiB of the front and its workers, shared memory included."""
        processes = [front, *front.children(recursive=True)]
        return sum(one.memory_info().rss for one in processes) / (1 << 20)

    descriptors, sizes = front.num_fds(), []
    for number in range(12):
        command = [sys.executable, "-c", CHILD, server.address, "busy" if number % 2 else "idle"]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
        wait_for(lambda: front.num_fds() <= descriptors, f"the memory of client {number} to be given back")
        sizes.append(memory())
    assert max(sizes[6:]) - max(sizes[:6]) < 16, sizes  # one image in and out is 12
    assert shared_memory() == before
    with server.client("echo") as client:
        assert client.run_text("x") == "x"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried by root alone")


@needs_root
def test_another_users_client_does_not_take_part(server: Server) -> None:
    code = (
        "import os, sys\nsys.path.insert(0, '.')\nfrom model_client import ModelClient\n"
        "client = ModelClient('echo', addresses=[sys.argv[1]])\nos.setresuid(65534, 65534, 65534)\n"
        "print(client.run_text('x'), len(client._transport.locals[0].idle))"
    )
    command = [sys.executable, "-c", code, server.address]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ran.stdout == "x 0\n", ran.stderr


@needs_root
def test_another_users_server_gets_nothing(start_server: Callable[..., Server]) -> None:
    """Somebody else has taken the name: the server says so, and clients go by gRPC."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        f"import os, socket\nos.setresuid(65534, 65534, 65534)\ns = socket.socket(socket.AF_UNIX)\n"
        f"s.bind('\\0tiny-model-server:{port}')\ns.listen()\nprint('bound', flush=True)\n"
        "while True:\n    c, _ = s.accept()\n    print(c.recv(100), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as thief:
        assert thief.stdout
        assert thief.stdout.readline() == "bound\n"
        server = start_server(TMS_PORT=port)
        server.wait_for_log("no local transport for clients on this host")
        with server.client("echo", token="secret") as client:
            assert client.run_text("x") == "x"
            assert idle_connections(client) == 0
        thief.kill()
        assert "secret" not in thief.stdout.read()


def test_what_was_answered_belongs_to_the_application(server: Server) -> None:
    with server.client("echo") as client:
        first = client.run({"image": IMAGE, "name": "x"})
        second = client.run_image(IMAGE // 2)
        client.run_image(np.zeros_like(IMAGE))
        first["image"][0, 0] += 1
    assert np.array_equal(second, IMAGE // 2)
    assert np.array_equal(first["image"][1:], IMAGE[1:])


def test_several_workers_answer_into_the_same_memory(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = (
        "    def run(self, data, args):\n        import time\n        time.sleep(args.get('s', 0))\n        return data"
    )
    server = start_server(write_model(tmp_path, "echoes", body), TMS_MODEL_ECHOES_WORKERS=2)
    with server.client("echoes") as client:
        for size in (1000, 100, 2000, 50):
            image = np.full((size, size), size % 251, np.uint8)
            with server.client("echoes") as other:
                busy = other.submit_text("holds one of the workers", {"s": 0.2})
                assert np.array_equal(client.run_image(image), image)
                assert np.array_equal(client.run_image_batch([image, image])[1], image)
                busy.result()
        assert not [line for line in server.log if "restarting" in line]


def test_what_a_model_keeps_belongs_to_the_model(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """A model that holds on to frames sees each as it was sent, whatever is sent later."""
    body = (
        "    def __init__(self):\n        self.kept = []\n"
        "    def run(self, data, args):\n        self.kept.append(data[::2])\n"
        "        assert all((frame == frame[0, 0, 0]).all() for frame in self.kept)\n"
        "        return [int(frame[0, 0, 0]) for frame in self.kept]"
    )
    server = start_server(write_model(tmp_path, "retains", body))
    with server.client("retains") as client:
        for number in range(5):
            assert client.run_image(np.full((300, 300, 3), number, np.uint8)) == list(range(number + 1))
        assert idle_connections(client) == 1
        frame = model_client.shared_array((300, 300, 3))
        for number in range(5, 10):
            frame[:] = number
            assert client.run_image(frame) == list(range(number + 1))
        del frame
        assert client.run_image(np.full((300, 300, 3), 10, np.uint8)) == list(range(11))


def test_deadlines_and_late_answers(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = (
        "    def run(self, data, args):\n        import time\n        time.sleep(args.get('s', 0))\n        return data"
    )
    server = start_server(write_model(tmp_path, "slow", body))
    with server.client("slow") as client:
        assert client.run_text("warm") == "warm"
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(model_client.DeadlineExceeded):
                client.run_text("late", {"s": 0.6}, timeout=0.2)
            assert time.monotonic() - started < 0.5
            assert client.run_text("next") == "next"  # the late answer is nobody's
        assert idle_connections(client) == 1


def test_late_answers_under_load(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """Callers that give up in the middle, among others: every answer still reaches its own caller."""
    body = (
        "    def run(self, data, args):\n        import time\n        time.sleep(data % 7 / 300)\n        return data"
    )
    server = start_server(write_model(tmp_path, "echoes", body), TMS_MODEL_ECHOES_WORKERS=2)
    wrong: list[Any] = []

    def calls(client: ModelClient, first: int) -> None:
        for number in range(first, first + 150):
            try:
                answer = client.run(number, timeout=0.012 if number % 3 else 20)
                if answer != number:
                    wrong.append((number, answer))
            except model_client.DeadlineExceeded:
                pass

    with server.client("echoes") as client:
        client.run(0)
        threads = [threading.Thread(target=calls, args=(client, 1000 * one)) for one in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.run(7) == 7
    assert not wrong


def test_a_server_that_comes_back(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with server.client("echo", timeout=20) as client:
        assert client.run_text("x") == "x"
        server.kill()
        again: list[Server] = []
        starter = threading.Thread(target=lambda: again.append(start_server(TMS_PORT=server.port)))
        starter.start()
        assert np.array_equal(client.run_image(IMAGE), IMAGE)
        starter.join()
        wait_for(lambda: client.run_text("y") == "y" and idle_connections(client) == 1, "the local transport again")


def test_what_is_not_to_be_repeated(start_server: Callable[..., Server], tmp_path: Path) -> None:
    log = tmp_path / "ran"
    body = (
        f"    def run(self, data, args):\n        open({str(log)!r}, 'a').write('x')\n"
        "        import time\n        time.sleep(5)\n        return data"
    )
    server = start_server(write_model(tmp_path / "models", "once", body))
    with server.client("once") as client:
        future = client.submit_text("warm", timeout=0.1)
        with pytest.raises(model_client.DeadlineExceeded):
            future.result()
        wait_for(lambda: log.read_text() == "x", "the first")
        log.write_text("")
        calling = client.submit_text("y", retry=False, timeout=30)
        wait_for(lambda: log.read_text() == "x", "the call to be under way", timeout=15)
        server.kill()
        with pytest.raises(model_client.ServerUnavailable):
            calling.result()
    assert log.read_text() == "x"


def test_a_call_that_goes_on_by_grpc_leaves_the_connection_to_others(start_server: Callable[..., Server]) -> None:
    server = start_server(models=only("worker"), TMS_MODEL_WORKER_QUEUE_SIZE=1, TMS_MODEL_WORKER_MAX_BATCH_SIZE=1)
    client, other = server.client("worker", timeout=10), server.client("worker")
    client.run(1)
    with ThreadPoolExecutor(2) as threads:
        slow = [threads.submit(other.run, number, {"sleep": 0.5}) for number in range(2)]
        wait_for(lambda: other.model_info()[0]["queue_depth"], "a full queue")
        with contextlib.suppress(model_client.Overloaded):
            client.run(1)  # refused here, then repeated by gRPC
        assert [call.result()["item"] for call in slow] == [0, 1]
    assert client.run(1, retry=False)["item"] == 1


def test_memory_that_cannot_be_shared(server: Server, tmp_path: Path) -> None:
    """As where a container allows none: gRPC carries the image, also if it is not to be repeated; one line says so."""
    code = (
        "import logging, resource, sys, numpy\nlogging.basicConfig()\nfrom model_client import ModelClient\n"
        "client = ModelClient('echo', addresses=[sys.argv[1]])\nassert client.run_text('x') == 'x'\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "image = numpy.ones((1080, 1920, 3), 'uint8')\n"
        "for _ in range(3):\n    assert (client.run_image(image, retry=False) == image).all()\n"
    )
    assert run_application(code, server).count("local transport is not used") == 1


def test_a_token_is_asked_for_here_too(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_TOKEN="secret")
    for token, code in {"secret": 0, "wrong": CODES["UNAUTHENTICATED"]}.items():
        made = local.LocalConnection(server.port, {"authorization": f"Bearer {token}"})
        assert send(made, "RunText", text="x", model="echo")[0] == code
        made.close()
    with server.client("echo", token="secret") as client:
        assert client.run_text("x") == "x"
        assert idle_connections(client) == 1


def test_more_callers_than_the_server_takes(start_server: Callable[..., Server], caplog: Any) -> None:
    server = start_server(TMS_THREADS=2)
    made = [local.LocalConnection(server.port, {}) for _ in range(2)]
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        local.LocalConnection(server.port, {})
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
        assert idle_connections(client) == 0
    for one in made:
        one.close()


def test_large_messages_count_as_bytes_under_way(start_server: Callable[..., Server]) -> None:
    """One that does not fit is refused without being held; the connection goes on, and nothing stays counted."""
    server = start_server(TMS_MAX_INFLIGHT_MB=3)
    with (
        contextlib.closing(local.LocalConnection(server.port, {})) as one,
        contextlib.closing(local.LocalConnection(server.port, {})) as two,
    ):
        assert send(two, "RunText", text="y", model="echo")[1].data == '"y"'  # so that the server listens to it
        two._socket.sendall(REQUEST.pack(2 << 20, 20.0, 1, 4))  # and nothing of what it has announced
        wait_for(lambda: send(one, "RunText", text="x" * (2 << 20), model="echo")[0], "the refusal")
        assert send(one, "RunText", text="y", model="echo")[1].data == '"y"'
        two._socket.close()
        wait_for(lambda: not send(one, "RunText", text="x" * (2 << 20), model="echo")[0], "room again")
        for _ in range(5):
            assert send(one, "RunText", text="x" * (2 << 20), model="echo")[0] == 0
        code, text = send(one, "RunText", text="x" * (4 << 20), model="echo")
        assert code == CODES["RESOURCE_EXHAUSTED"] | FINAL
        assert "TMS_MAX_INFLIGHT_MB" in text
        assert send(one, "RunText", text="y", model="echo")[1].data == '"y"'


def test_large_messages_without_the_token_are_not_counted(start_server: Callable[..., Server]) -> None:
    """Who has no token takes no room from those who have it."""
    server = start_server(TMS_TOKEN="secret", TMS_MAX_INFLIGHT_MB=3)
    good = local.LocalConnection(server.port, {"authorization": "Bearer secret"})
    with contextlib.closing(good), contextlib.closing(local.LocalConnection(server.port, {})) as bad:
        assert send(bad, "RunText", text="y", model="echo")[0] == CODES["UNAUTHENTICATED"]
        bad._socket.sendall(REQUEST.pack(2 << 20, 20.0, 1, 4))
        assert send(good, "RunText", text="x" * (2 << 20), model="echo")[0] == 0
        bad._socket.sendall(bytes((2 << 20) + 4))
        assert bad.receive(10).code == CODES["UNAUTHENTICATED"]


def test_headers_are_what_the_rules_say() -> None:
    assert REQUEST.size == struct.calcsize("<IfBB") == 10
    assert local_transport.ANSWER.size == 6


def test_map_sends_ahead(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """One thread keeps as many connections busy as it may; answers stay in order."""
    body = "    def run(self, data, args):\n        __import__('time').sleep(0.2)\n        return data"
    server = start_server(write_model(tmp_path, "sleepy", body), TMS_MODEL_SLEEPY_WORKERS=4)
    with server.client("sleepy") as client:
        client.run(0)
        assert list(client.map(range(12), in_flight=8)) == list(range(12))
        assert idle_connections(client) == 8
        errors = list(client.map(range(3), timeout=0.001, return_exceptions=True))
        assert [type(error) for error in errors] == [model_client.DeadlineExceeded] * 3
        leaving = client.map(range(100), in_flight=4)
        assert next(leaving) == 0
        leaving.close()
        assert client.run(7) == 7


def test_map_over_a_server_that_comes_back(start_server: Callable[..., Server]) -> None:
    server = start_server()
    images = [np.full((100, 100), number, np.uint8) for number in range(200)]
    with server.client("echo", timeout=30) as client:
        answers = client.map(images)
        assert np.array_equal(next(answers), images[0])
        server.kill()
        starter = threading.Thread(target=lambda: start_server(TMS_PORT=server.port))
        starter.start()
        for image, answer in zip(images[1:], answers, strict=True):
            assert np.array_equal(answer, image)
        starter.join()


@pytest.mark.parametrize("child", ["pass", "assert client.run_text('of the child') == 'of the child'"])
def test_a_forked_child_that_ends(server: Server, child: str) -> None:
    """What it closes on its way out, called or not, is not the parent's connection."""
    code = (
        "import os, sys\nfrom model_client import ModelClient\n"
        "client = ModelClient('echo', addresses=[sys.argv[1]])\nassert client.run_text('x') == 'x'\n"
        f"if not (pid := os.fork()):\n    {child}\n    sys.exit()\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "assert client.run_text('y', retry=False) == 'y'\n"
        "assert len(client._transport.locals[0].idle[None]) == 1"
    )
    run_application(code, server)


def test_args_that_are_nested_deeply(start_server: Callable[..., Server]) -> None:
    """They are the caller's fault, however deep the server meets its limit, and no such call keeps a place."""
    server = start_server(only("echo", "keeps"), TMS_THREADS=4)
    with contextlib.closing(local.LocalConnection(server.port, {})) as one, server.client("echo") as client:
        for depth in range(1050, 880, -1):
            code, said = send(one, "RunText", text="x", model="echo", args='{"a":' * depth + "1" + "}" * depth)
            assert not code or "nested too deeply" in said
        assert client.run_text("x") == "x"


def test_a_fork_in_the_middle_of_map(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """Calls that were sent ahead are the parent's: it goes on, and the child has connections of its own."""
    body = "    def run(self, data, args):\n        __import__('time').sleep(0.05)\n        return data"
    server = start_server(write_model(tmp_path, "sleepy", body))
    code = (
        "import os, sys\nfrom model_client import Cancelled, ModelClient\n"
        "client = ModelClient('sleepy', addresses=[sys.argv[1]])\nassert client.run_text('x') == 'x'\n"
        "answers = client.map(map(str, range(20)))\nassert next(answers) == '0'\n"
        "if not (child := os.fork()):\n"
        "    assert client.run_text('of the child') == 'of the child'\n"
        "    try:\n        next(answers)\n    except Cancelled as error:\n"
        "        os._exit(0 if 'fork' in str(error) else 2)\n"
        "    os._exit(3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert list(answers) == [str(number) for number in range(1, 20)]"
    )
    run_application(code, server)


def test_arrays_that_are_handed_over_without_a_copy(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = "    def run(self, data, args):\n        data += 1\n        return int(data[0, 0]), int(data.sum())"
    server = start_server(write_model(tmp_path, "adds", body))
    frame = model_client.shared_array((2, 480, 640))
    assert frame.shape == (2, 480, 640)
    assert frame.dtype == np.uint8
    assert not frame.any()
    with server.client("adds") as client:
        for number in range(0, 20, 2):
            frame[:] = number
            first, total = client.run_image(frame[0])
            assert (first, total) == (number + 1, (number + 1) * 480 * 640)
            assert (frame[0] == number + 1).all()  # the model has the memory itself
            assert (frame[1] == number).all()
            assert client.run(frame[1]) == [number + 1, (number + 1) * 480 * 640]
            assert client.run_image_batch(list(frame))[1][0] == number + 2
        assert idle_connections(client) == 0  # the array has a connection of its own
        odd = frame[0, 1:, 1:]
        assert client.run_image(odd)[0] == odd[0, 0] + 1  # it is not in one piece: copied
        assert idle_connections(client) == 1
    assert frame.any()  # it is the application's, also when the connection has ended


def test_who_may_use_a_shared_array(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads, and clients by gRPC: each call is answered as with any array."""
    frame = model_client.shared_array(IMAGE.shape)
    frame[:] = IMAGE
    with server.client("echo") as client:
        for answer in [client.submit_image(frame) for _ in range(16)]:
            assert np.array_equal(answer.result(), IMAGE)
        assert all(np.array_equal(answer, IMAGE) for answer in client.map([frame] * 16))
        assert np.array_equal(client.run({"deep": [frame, frame[:8]]})["deep"][1], IMAGE[:8])
        wide = model_client.shared_array((3, 4), "float64")
        assert client.run(wide).tolist() == [[0] * 4] * 3
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "0")
    with server.client("echo") as client:
        assert np.array_equal(client.run_image(frame), IMAGE)
    assert model_client.shared_array(0).shape == (0,)
    with pytest.raises(ValueError, match="negative"):
        model_client.shared_array((-1, 2))


def test_a_shared_array_goes_with_its_last_user(start_server: Callable[..., Server]) -> None:
    """Memory and descriptors, of the application and the server; a worker maps the last one until the next comes."""
    server = start_server()
    front = psutil.Process(server.process.pid)
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
        (worker,) = map(psutil.Process, client.model_info()[0]["worker_pids"])
        mine, theirs, size = psutil.Process().num_fds(), front.num_fds(), worker.memory_info().rss
        for number in range(5):
            frame = model_client.shared_array((1080, 1920, 12))
            frame[:] = number
            assert client.run_image(frame).max() == number
            del frame
            # Other descriptors may have gone since they were counted, so the memory may go a moment later.
            wait_for(lambda: front.num_fds() <= theirs, "the server to let go")
            assert psutil.Process().num_fds() <= mine
            wait_for(lambda: worker.memory_info().rss - size < 8 << 20, "the memory of an array, which is 24 MiB")


def test_lies_about_caller_owned_memory(server: Server, tmp_path: Path) -> None:
    """Memory that its owner could take away, or that is none, is refused at the greeting."""
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    reading, writing = os.pipe()
    for fd in (unsealed, file, reading):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(5)
            connection.connect(local_transport.address(server.port))
            socket.send_fds(connection, [HELLO.pack(2)], [fd])
            with contextlib.suppress(ConnectionError):  # it may have been refused before or after this
                connection.sendall(b"{}")
                assert connection.recv(1) == b""
    for fd in (unsealed, file, reading, writing):
        os.close(fd)
    made = model_client.shared_array(1 << 20)
    memory = local._memory(made)
    assert memory
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
