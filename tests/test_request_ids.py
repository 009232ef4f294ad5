"""Ids of calls, from the client to the worker's log, the access log and the exception; and the access log itself."""

import asyncio
import json
import os
import pickle
import re
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import model_client
from model_client import AsyncModelClient, ModelClient, request_id
from tests.conftest import Server, only, wait_for
from tiny_model_server import request_ids, schemas

StartServer = Callable[..., Server]
SOCKET = f"{tempfile.gettempdir()}/tms-ids-{os.getpid()}"

LOGS = """
import logging
from model_interface import ModelInterface

log = logging.getLogger(__name__)

class Model(ModelInterface):
    max_batch_size = 8
    max_wait_ms = 300

    def run(self, data, args):
        if not isinstance(data, str):
            return data
        log.info("running %s", data)
        if data == "fail":
            raise ValueError("as usual")
        return (number for number in range(10**6)) if data == "stream" else data

    def run_batch(self, items, args):
        log.info("%d at once", len(items))
        return [ValueError("as usual") if item == "fail" else item for item in items]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "logs").mkdir()
    (folder / "logs" / "__init__.py").write_text(textwrap.dedent(LOGS))
    server = Server(folder, TMS_ACCESS_LOG=1, TMS_LOG_FORMAT="json", TMS_SOCKET=SOCKET)
    yield server
    server.kill()


@pytest.fixture(params=["local", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[ModelClient]:
    with by(request.param, server) as client:
        yield client


def by(transport: str, server: Server) -> ModelClient:
    """A client whose calls go by the local transport or by gRPC."""
    return ModelClient("logs", addresses=[server.address if transport == "local" else f"unix:{SOCKET}"])


def entries(server: Server, **fields: Any) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in list(server.log)]
    return [entry for entry in found if fields.items() <= entry.items()]


def entry(server: Server, **fields: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = wait_for(lambda: entries(server, **fields), f"a line with {fields}")
    assert len(found) == 1, found
    return found[0]


def access(server: Server, **fields: Any) -> dict[str, Any]:
    return entry(server, logger="tiny_model_server.access", **fields)


def test_from_the_client_to_the_worker(server: Server, client: ModelClient) -> None:
    mine = f"{client.addresses[0]} mine"
    with request_id(mine):
        assert client.run_text("hello") == "hello"
    line = entry(server, logger="models.logs", request_id=mine)
    assert (line["message"], line["model"]) == ("running hello", "logs")
    line = access(server, request_id=mine)
    assert (line["message"], line["status"], line["model"]) == ("/server.Server/RunText", "OK", "logs")
    assert line["queue_ms"] >= 250
    assert 0 < line["model_ms"] < 10_000
    assert line["bytes_in"] > len("hello")
    assert line["bytes_out"] > len("hello")
    assert line["peer"].startswith("unix:")


def test_arrays_in_shared_memory_count(server: Server, client: ModelClient) -> None:
    import numpy as np

    mine = f"{client.addresses[0]} arrays"
    with request_id(mine):
        client.run(np.zeros(1 << 20, np.uint8))
    line = access(server, request_id=mine)
    assert 1 << 20 < line["bytes_in"] < 1.01 * (1 << 20)
    assert 1 << 20 < line["bytes_out"] < 1.01 * (1 << 20)


def test_an_exception_has_the_id(server: Server, client: ModelClient) -> None:
    with pytest.raises(model_client.ModelFailed) as failed:
        client.run("fail")
    made = failed.value.request_id
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert pickle.loads(pickle.dumps(failed.value)).request_id == made
    assert access(server, request_id=made)["status"] == "INTERNAL"
    assert entry(server, logger="tiny_model_server.worker", request_id=made)["message"] == "model logs raised"
    with pytest.raises(model_client.ModelNotFound) as failed, request_id(f"{client.addresses[0]} none"):
        ModelClient("nobody", addresses=client.addresses).run(1)
    assert failed.value.request_id == f"{client.addresses[0]} none"
    assert access(server, request_id=failed.value.request_id)["status"] == "NOT_FOUND"


def test_each_item_of_a_batch_names_the_call(server: Server, client: ModelClient) -> None:
    mine = f"{client.addresses[0]} batch"
    with request_id(mine):
        answer, error = client.run_batch(["x", "fail"], return_exceptions=True)
    assert answer == "x"
    assert error.request_id == mine


def test_several_ids_of_a_batch(server: Server) -> None:
    ids = [f"of-a-batch-{number}" for number in range(6)]
    with by("local", server) as client:
        client.run("warm")
        futures = []
        for one in ids:
            with request_id(one):
                futures.append(client.submit(one))
        assert [future.result() for future in futures] == ids
    named = entry(server, message="6 at once")["request_id"].split(",")
    assert len(named) == 4
    assert set(named[:3]) <= set(ids)
    assert named[3] == "+3"


def test_streams_and_asyncio(server: Server, client: ModelClient) -> None:
    mine = f"{client.addresses[0]} stream"

    async def main() -> None:
        async with AsyncModelClient("logs", addresses=client.addresses) as other:
            with request_id(f"{mine} async"):
                assert await other.run("x") == "x"
                assert [value async for value in other.run_stream("x")] == ["x"]

    with request_id(mine):
        assert list(client.run_stream("x")) == ["x"]
    asyncio.run(main())
    assert access(server, request_id=mine)["message"] == "/server.Server/RunStream"
    both = wait_for(lambda: entries(server, logger="tiny_model_server.access", request_id=f"{mine} async")[1:], "both")
    assert both


def test_a_stream_that_its_caller_leaves(server: Server, client: ModelClient) -> None:
    mine = f"{client.addresses[0]} left"
    with request_id(mine):
        stream = client.run_stream("stream")
        next(stream)
    stream.close()
    assert access(server, request_id=mine)["status"] == "CANCELLED"


def test_another_client_gets_its_id(server: Server) -> None:
    method = schemas.methods("server", "server.Server")["RunText"]
    with grpc.insecure_channel(server.address) as channel:
        run = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)

        def answered(*metadata: tuple[str, str]) -> str:
            _, call = run.with_call(method.request(text="x", model="logs"), metadata=metadata)
            return str(dict(call.trailing_metadata())["x-request-id"])

        assert answered(("x-request-id", "theirs")) == "theirs"
        for wrong in ((), (("x-request-id", "y" * 129),), (("x-request-id", ""),)):
            assert re.fullmatch("[0-9a-f]{32}", answered(*wrong))
    assert access(server, request_id="theirs")["bytes_out"] > 0


def test_http(server: Server) -> None:
    url = f"http://127.0.0.1:{server.http_port}"
    for path, status in (("/models/logs/run", "200"), ("/models/nobody/run", "404")):
        request = urllib.request.Request(url + path, b'"x"', {"X-Request-Id": path, "Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                assert answer.headers["X-Request-Id"] == path
        except urllib.error.HTTPError as error:
            assert error.headers["X-Request-Id"] == path
            error.close()
        line = access(server, request_id=path)
        assert (line["message"], line["status"]) == (f"POST {path}", status)
        assert line["bytes_out"] > 0
    assert entry(server, logger="models.logs", request_id="/models/logs/run")
    line = access(server, request_id="/models/logs/run")
    assert (line["model"], line["bytes_in"]) == ("logs", 3)
    assert line["model_ms"] > 0
    request = urllib.request.Request(f"{url}/models/x%20status=200{'y' * 9000}/run", b"x", {"X-Request-Id": "forged"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    refused.value.close()
    message = access(server, request_id="forged")["message"]  # has no space before what looks like another fact
    assert message.startswith("POST /models/x%20status%3D200yyy")
    assert len(message) < 250
    urllib.request.urlopen(f"{url}/livez").close()
    assert not entries(server, message="GET /livez")


def test_refused_calls_are_logged(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(only("echo"), TMS_ACCESS_LOG=1, TMS_TOKEN="sesame")
    for local, peer in (("1", "unix:"), ("0", "ipv4:.*")):
        monkeypatch.setenv("TMS_LOCAL_TRANSPORT", local)
        unauthenticated = pytest.raises(model_client.Unauthenticated)
        with server.client("echo") as client, request_id(f"refused-{local}"), unauthenticated:
            client.run(1)
        status = "status=UNAUTHENTICATED .* "
        server.wait_for_log(rf"access: /server.Server/Run {status}peer={peer} request_id=refused-{local}$")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/models")
    refused.value.close()
    server.wait_for_log("access: GET /models status=401")


def test_off_by_default(start_server: StartServer) -> None:
    server = start_server(only("echo"))
    with server.client("echo") as client:
        client.run(1)
    assert server.stop() == 0
    assert not [line for line in server.log if "tiny_model_server.access" in line]


@pytest.mark.parametrize("text", ["", " a", "a ", "ü", "a\n", "x" * 129, 5])
def test_a_wrong_id_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="an id is 1 to 128 characters of printable ASCII"), request_id(text):
        pass
    assert re.fullmatch("[0-9a-f]{32}", request_ids.checked(text))


def test_forked_children_make_other_ids() -> None:
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, request_ids.for_call().encode())
        os._exit(0)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        os.close(writer)
        assert pipe.read().decode() != request_ids.for_call()
