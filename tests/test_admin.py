"""Who may stop the server and change its models; who is local; what its log and its health command say."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import model_client
from model_client import ModelClient
from tests.conftest import MODELS, ROOT, Server, free_port, only, wait_for
from tests.test_cli import run as run_server
from tests.test_faults import write_model
from tests.test_security import Certificates, tls
from tests.test_web import post
from tiny_model_server import access, logs, schemas
from tiny_model_server.engine.call import Call
from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import PermissionDenied
from tiny_model_server.settings import Settings

StartServer = Callable[..., Server]
NATIVE = schemas.methods("server", "server.Server")
OPEN_INFERENCE = schemas.methods("open_inference", "inference.GRPCInferenceService")
MODZY = schemas.methods("modzy", "ModzyModel")
NOS = schemas.methods("nos", "nos.inference.InferenceService")
MESH = schemas.methods("model_mesh", "mmesh.ModelRuntime")
NOBODY = 65534


def ask(server: Server, rpc: schemas.Method, metadata: Any = (), channel: Any = None, **fields: Any) -> str:
    """The name of the status that a call ends with."""
    made = channel or grpc.insecure_channel(server.address)
    stub = made.unary_unary(rpc.path, rpc.request.SerializeToString, rpc.response.FromString)
    try:
        stub(rpc.request(**fields), timeout=20, metadata=metadata)
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        if not channel:
            made.close()


@contextmanager
def another_user() -> Iterator[None]:
    """Sockets made in here belong to another user."""
    "localhost".encode("idna")  # which imports what that user may not read
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make sockets of another user")


def test_who_is_meant() -> None:
    rules = {
        (): "local",
        ("TMS_ADMIN=local",): "local",
        ("TMS_ADMIN_TOKEN=x",): "token",
        ("TMS_ADMIN=local", "TMS_ADMIN_TOKEN=x"): "token",
        ("TMS_ADMIN=host", "TMS_ADMIN_TOKEN=x"): "token",
        ("TMS_ADMIN=host",): "host",
        ("TMS_ADMIN=token", "TMS_ADMIN_TOKEN=x"): "token",
        ("TMS_ADMIN=token",): "off",
        ("TMS_ADMIN=off", "TMS_ADMIN_TOKEN=x"): "off",
    }
    for settings, rule in rules.items():
        assert Settings.from_env(dict(one.split("=") for one in settings)).admin_rule == rule, settings
    assert run_server(TMS_ADMIN="everybody").returncode == 2


@pytest.mark.parametrize(
    "peer", ["ipv4:10.0.0.1:1", "ipv6:%5B2001:db8::1%5D:1", "", "ipv4:localhost:1", "ipv4:127.0.0.1:1"]
)
def test_others_need_the_token(peer: str) -> None:
    """The last of the peers is of this host, but no process has this connection."""
    engine = Engine(Settings(models_dir=MODELS))
    with pytest.raises(PermissionDenied, match="TMS_ADMIN_TOKEN"):
        engine.access.authorize(Call(peer=peer))
    engine = Engine(Settings(models_dir=MODELS, admin_token="secret"))
    for metadata in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
        with pytest.raises(PermissionDenied, match="TMS_ADMIN_TOKEN"):
            engine.access.authorize(Call(peer=peer, metadata=metadata))
    engine.access.authorize(Call(peer=peer, metadata={"authorization": "Bearer secret"}))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_user_of_a_connection(host: str) -> None:
    """Also of a connection between the families, which the server sees as one of IPv4."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        port = listener.getsockname()[1]
        for target in {host, "::ffff:127.0.0.1"} if host == "127.0.0.1" else {host}:
            with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET) as mine:
                mine.connect((target, port))
                accepted, address = listener.accept()
                with accepted:
                    peer = f"ipv6:%5B{address[0]}%5D:{address[1]}" if ":" in host else f"ipv4:{address[0]}:{address[1]}"
                    assert access.by_this_user(peer, [port])
                    assert access.by_this_user(peer)
                    assert not access.by_this_user(peer, [port + 1])
        assert not access.by_this_user(peer)  # it has ended


@needs_root
def test_other_users_of_the_host(start_server: StartServer) -> None:
    for admin, status in (("local", "PERMISSION_DENIED"), ("host", "OK")):
        server = start_server(TMS_ADMIN=admin)
        with another_user():
            http = socket.create_connection(("127.0.0.1", server.http_port))
            channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
            grpc.channel_ready_future(channel).result(20)
        assert ask(server, NATIVE["ReloadModel"], channel=channel, model="echo") == status
        assert ask(server, NATIVE["RunText"], channel=channel, model="echo", text="x") == "OK"
        channel.close()
        with http:
            http.sendall(b"POST /models/echo/reload HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (b" 200 " if status == "OK" else b" 403 ") in http.recv(100)
        assert ask(server, NATIVE["ReloadModel"], model="echo") == "OK"


@pytest.mark.parametrize(
    "header", ["forwarded", "x-forwarded-for", "x-forwarded-proto", "x-real-ip", "via", "x-envoy-internal"]
)
def test_who_comes_through_a_proxy_is_not_local(server: Server, header: str) -> None:
    metadata = [(header, "203.0.113.9")]
    for method, fields in [
        (NATIVE["StopServer"], {}),
        (NATIVE["UnloadModel"], {"model": "echo"}),
        (NATIVE["LoadModel"], {"model": "echo"}),
        (NATIVE["ReloadModel"], {"model": "echo"}),
        (OPEN_INFERENCE["RepositoryModelLoad"], {"model_name": "echo"}),
        (OPEN_INFERENCE["RepositoryModelUnload"], {"model_name": "echo"}),
    ]:
        assert ask(server, method, metadata, **fields) == "PERMISSION_DENIED", method.path
    for path in ("/models/echo/load", "/models/echo/unload", "/models/echo/reload"):
        assert post(server, path, b"", **{header: "203.0.113.9"})[0] == 403
    for path in ("/v2/repository/models/echo/load", "/v2/repository/models/echo/unload"):
        assert post(server, path, b"{}", **{header: "203.0.113.9"})[0] == 403
    assert ask(server, NATIVE["RunText"], metadata, model="echo", text="x") == "OK"


@pytest.mark.parametrize(
    ("settings", "words", "token"),
    [
        ({}, "TMS_ADMIN=local", ""),
        ({"TMS_ADMIN_TOKEN": "sesame"}, "admin token", "sesame"),
        ({"TMS_ADMIN": "token"}, "nobody (TMS_ADMIN=token, and no TMS_ADMIN_TOKEN is set)", None),
        ({"TMS_ADMIN": "off", "TMS_ADMIN_TOKEN": "sesame"}, "nobody (TMS_ADMIN=off)", None),
    ],
)
def test_every_protocol_asks(
    start_server: StartServer, settings: dict[str, str], words: str, token: str | None
) -> None:
    """From this host, by this user: the token is what counts once it is set."""
    server = start_server(
        only("echo", "masks"), TMS_PROTOCOLS="native,open_inference,modzy,nos", TMS_MODZY_MODEL="echo", **settings
    )
    assert any("who may stop the server and change its models" in line and words in line for line in server.log)
    calls: list[tuple[schemas.Method, dict[str, Any]]] = [
        (NATIVE["ReloadModel"], {"model": "echo"}),
        (NATIVE["UnloadModel"], {"model": "masks"}),
        (NATIVE["LoadModel"], {"model": "masks"}),
        (OPEN_INFERENCE["RepositoryModelUnload"], {"model_name": "masks"}),
        (OPEN_INFERENCE["RepositoryModelLoad"], {"model_name": "masks"}),
        (NOS["DeleteModel"], {"model_name": "masks"}),
        (NOS["InitModel"], {"model_name": "masks"}),
    ]
    for metadata, allowed in [((), token == ""), ([("authorization", "Bearer sesame")], token is not None)]:
        for method, fields in calls:
            assert (ask(server, method, metadata, **fields) == "OK") == allowed, (method.path, metadata)
        headers = {"Authorization": metadata[0][1]} if metadata else {}
        assert (post(server, "/models/echo/reload", b"", **headers)[0] == 200) == allowed
        assert (post(server, "/v2/repository/models/masks/load", b"", **headers)[0] == 200) == allowed
    if token != "":
        with grpc.insecure_channel(server.address) as channel:
            shutdown = channel.unary_unary(
                MODZY["Shutdown"].path, response_deserializer=MODZY["Shutdown"].response.FromString
            )
            assert shutdown(b"", timeout=20).status_code == 403
    with server.client("echo", **({"admin_token": "sesame"} if token == "sesame" else {})) as client:
        if token is None:  # by the local transport
            with pytest.raises(model_client.PermissionDenied, match="nobody"):
                client.stop_server()
        else:
            client.reload_model()
            client.stop_server()
            assert server.process.wait(20) == 0


def test_calls_that_would_load_an_unloaded_model(start_server: StartServer) -> None:
    """By nos a Predict loads, and by Modzy a Status: not what somebody who may has unloaded."""
    server = start_server(TMS_PROTOCOLS="native,nos,modzy", TMS_MODZY_MODEL="echo", TMS_ADMIN_TOKEN="sesame")
    admin = [("authorization", "Bearer sesame")]
    predict = {"method": "txt2vec", "model_name": "echo", "text_request": {"text": "x"}}
    assert ask(server, NOS["Predict"], **predict) == "OK"
    assert ask(server, NATIVE["UnloadModel"], admin, model="echo") == "OK"
    assert ask(server, NOS["Predict"], **predict) == "PERMISSION_DENIED"
    with grpc.insecure_channel(server.address) as channel:
        status = channel.unary_unary(MODZY["Status"].path, response_deserializer=MODZY["Status"].response.FromString)
        assert status(b"", timeout=20).status_code == 500
    assert ask(server, NATIVE["RunText"], model="echo", text="x") == "FAILED_PRECONDITION"
    assert ask(server, NOS["Predict"], admin, **predict) == "OK"


@pytest.mark.parametrize("admin", [{"TMS_ADMIN": "off"}, {"TMS_ADMIN_TOKEN": "sesame"}])
def test_what_a_model_mesh_sidecar_may(start_server: StartServer, tmp_path: Path, admin: dict[str, str]) -> None:
    answers = "    def run(self, data, args):\n        return data"
    inside, outside = tmp_path / "models", tmp_path / "elsewhere"
    for folder in (inside, outside):
        write_model(folder, "one", answers)
    (inside / "link").symlink_to(outside)
    (tmp_path / "none").mkdir()
    settings = {"TMS_PROTOCOLS": "native,model_mesh", **admin}
    server = start_server(tmp_path / "none", **settings)
    assert ask(server, MESH["runtimeStatus"]) == "PERMISSION_DENIED"
    assert ask(server, MESH["loadModel"], modelId="a", modelPath=str(inside / "one")) == "PERMISSION_DENIED"
    server = start_server(tmp_path / "none", TMS_MESH_MODELS_DIR=inside, **settings)
    assert ask(server, MESH["runtimeStatus"]) == "OK"
    for path in (outside / "one", inside / ".." / "elsewhere" / "one", inside / "link" / "one"):
        assert ask(server, MESH["loadModel"], modelId="a", modelPath=str(path)) == "PERMISSION_DENIED", path
    proxied = [("x-forwarded-for", "203.0.113.9")]
    assert ask(server, MESH["loadModel"], proxied, modelId="a", modelPath=str(inside / "one")) == "PERMISSION_DENIED"
    assert ask(server, MESH["loadModel"], modelId="a", modelPath=str(inside / "one")) == "OK"
    assert ask(server, NATIVE["RunText"], model="a", text="x") == "OK"
    assert ask(server, NATIVE["UnloadModel"], model="a") == "PERMISSION_DENIED"
    assert ask(server, MESH["unloadModel"], proxied, modelId="a") == "PERMISSION_DENIED"
    assert ask(server, MESH["unloadModel"], modelId="a") == "OK"


@pytest.mark.parametrize(("setting", "mode"), [({}, 0o600), ({"TMS_SOCKET_MODE": "0660"}, 0o660)])
def test_the_mode_of_a_unix_socket(
    start_server: StartServer, tmp_path: Path, setting: dict[str, str], mode: int
) -> None:
    path = tmp_path / "s.sock"
    start_server(TMS_SOCKET=path, **setting)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    with ModelClient("echo", addresses=[f"unix:{path}"]) as client:
        assert client.run_text("x") == "x"
        client.reload_model()


def test_what_callers_send_forges_no_log_line(start_server: StartServer, tmp_path: Path) -> None:
    forged = "x\n2026-01-01 00:00:00,000 INFO tiny_model_server: all is well\x1b[2J\u2028\x9b"
    write_model(tmp_path, "loud", "    def run(self, data, args):\n        raise ValueError(data)")
    server = start_server(tmp_path)
    with server.client("loud") as client, pytest.raises(model_client.ModelFailed):
        client.run_text(forged)
    server.wait_for_log("ValueError: x")
    with server.client(forged) as client, pytest.raises(model_client.ModelNotFound):
        client.run_text("x")
    assert not [line for line in server.log if line.startswith("2026-01-01 00:00:00,000 INFO")]
    assert not re.search("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028]", "".join(server.log))
    assert any(line.strip() == "Traceback (most recent call last):" for line in server.log)


def test_escapes() -> None:
    assert logs.escaped("Grüße, 猫") == "Grüße, 猫"
    assert logs.escaped("a\nb\r\t\x00\x1b[0m\x7f\x85\u202e\ud800") == (
        "a\\nb\\r\\t\\x00\\x1b[0m\\x7f\\x85\\u202e\\ud800"
    )


def health(server_settings: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
    env = clean | {key: str(value) for key, value in (server_settings | more).items()}
    command = [sys.executable, "server.py", "health"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "grpc_proxy", "all_proxy"), "http://127.0.0.1:9")


def test_the_health_command_where_no_server_is() -> None:
    """test_http.py asks servers of all kinds of hosts."""
    ran = health({"TMS_HOST": "127.0.0.1", "TMS_PORT": free_port(), "TMS_HTTP_PORT": "off"})
    assert ran.returncode == 1
    assert "not ready" in ran.stderr


def test_the_health_command_with_tls(start_server: StartServer, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    for name, mutual in (("models.test", True), ("*.models.test", False), ("10.9.8.7", True)):
        settings = tls(certificates.issue("server", name), TMS_HTTP_PORT="off")
        if mutual:
            settings["TMS_TLS_CLIENT_CA"] = certificates.ca
        server = start_server(**settings)
        ran = health(settings | {"TMS_PORT": server.port}, **PROXIES)
        assert (ran.returncode, ran.stdout.strip()) == (0, '{"ready": true}'), ran.stderr
    (tmp_path / "other").mkdir()
    stranger = Certificates(tmp_path / "other").issue("server", "models.test")
    ran = health(tls(stranger, TMS_HOST="127.0.0.1", TMS_PORT=server.port))  # another server has the port
    assert ran.returncode == 1
    assert "verify failed" in ran.stderr


def test_the_health_command_by_a_unix_socket(start_server: StartServer, tmp_path: Path) -> None:
    settings = {"TMS_SOCKET": tmp_path / "s.sock", "TMS_HTTP_PORT": "off", "TMS_PORT": 0}
    start_server(**settings)
    assert health(settings).stdout.strip() == '{"ready": true}'
    assert health({"TMS_PORT": 0}).returncode == 2


def test_health_says_no_while_a_model_is_missing(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "broken", "    def __init__(self):\n        raise ValueError('no')\n    run = None")
    server = start_server(tmp_path, ready=False)
    wait_for(lambda: any("FAILED" in line for line in server.log), "the failure")
    ran = health({"TMS_HOST": "127.0.0.1", "TMS_PORT": server.port})
    assert (ran.returncode, json.loads(ran.stdout)) == (1, {"ready": False})
