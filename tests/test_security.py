"""TLS, certificates of clients, tokens: who is let in, whose call fails at once, and renewal without a restart."""

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme

import model_client
from model_client import AsyncModelClient, ModelClient
from tests.conftest import Server
from tests.test_cli import run as run_server

StartServer = Callable[..., Server]


class Certificates:
    """An authority, and files of certificates from it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *hosts: str) -> dict[str, str]:
        made = self.authority.issue_cert(*hosts)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        made.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        return {"cert": str(cert), "key": str(key)}


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def tls(server: dict[str, str], **more: object) -> dict[str, object]:
    return {"TMS_TLS_CERT": server["cert"], "TMS_TLS_KEY": server["key"], **more}


def fails_at_once(client: ModelClient, pattern: str) -> None:
    begun = time.monotonic()
    with pytest.raises(model_client.Unauthenticated, match=pattern):
        client.run_text("x")
    assert time.monotonic() - begun < 3
    begun = time.monotonic()
    with pytest.raises(model_client.Unauthenticated, match=pattern):
        client.submit_text("x").result(timeout=20)
    assert time.monotonic() - begun < 3


def test_tls(start_server: StartServer, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(**tls(certificates.issue("server", "127.0.0.1", "localhost", "models.test")))
    with server.client("echo", ca=certificates.ca) as client:
        assert client.run_text("x") == "x"
        assert client.health_check()["serving"] == [server.address]
        assert client.model_info()[0]["state"] == "READY"
    with ModelClient("echo", "localhost", server.port, ca=certificates.ca) as client:
        assert client.run_text("x") == "x"
    twice = [server.address, f"127.0.0.3:{server.port}"]  # the second is not there
    with ModelClient("echo", addresses=twice, ca=certificates.ca, server_name="models.test") as client:
        assert client.run_text("x") == "x"
    with server.client("echo", ca=certificates.ca, server_name="other.test") as client:
        fails_at_once(client, "certificate is not trusted.*other.test")
    stranger = Certificates(certificates.ca.parent / "..")
    with server.client("echo", ca=stranger.ca) as client:
        fails_at_once(client, "certificate is not trusted: self.signed|unable to get local issuer")
    with server.client("echo") as client:
        fails_at_once(client, "the server speaks TLS; give the client ca=FILE")
        assert client.health_check()["stopped_serving"] == [server.address]
    with server.client("echo", tls=True) as client:
        fails_at_once(client, "certificate is not trusted")
    monkeypatch.setenv("TMS_TLS_CA", str(certificates.ca))
    with server.client("echo") as client:
        assert client.run_text("by the environment") == "by the environment"

    async def asynchronously() -> None:
        async with AsyncModelClient("echo", addresses=[server.address]) as client:
            assert await client.run_text("x") == "x"
        async with AsyncModelClient("echo", addresses=[server.address], ca=stranger.ca) as client:
            with pytest.raises(model_client.Unauthenticated, match="not trusted"):
                await client.run_text("x")

    asyncio.run(asynchronously())


def test_a_tls_client_at_a_plain_server(server: Server, certificates: Certificates) -> None:
    with server.client("echo", ca=certificates.ca) as client:
        fails_at_once(client, "the server does not speak TLS")


def test_mutual_tls(start_server: StartServer, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = certificates.issue("server", "127.0.0.1")
    server = start_server(**tls(issued, TMS_TLS_CLIENT_CA=certificates.ca))
    own = certificates.issue("client", "a-client")
    with server.client("echo", ca=certificates.ca, **own) as client:
        assert client.run_text("x") == "x"
    with server.client("echo", ca=certificates.ca) as client:
        fails_at_once(client, "the server wants a certificate it trusts, and none was sent")
    (certificates.ca.parent / "other").mkdir()
    stranger = Certificates(certificates.ca.parent / "other").issue("client", "a-client")
    with server.client("echo", ca=certificates.ca, **stranger) as client:
        fails_at_once(client, "the server wants a certificate it trusts, and not the client's")
    monkeypatch.setenv("TMS_TLS_CA", str(certificates.ca))
    monkeypatch.setenv("TMS_CLIENT_CERT", own["cert"])
    monkeypatch.setenv("TMS_CLIENT_KEY", own["key"])
    with server.client("echo") as client:
        assert client.run_text("x") == "x"


def test_a_renewed_certificate_is_used_without_a_restart(start_server: StartServer, certificates: Certificates) -> None:
    issued = certificates.issue("server", "127.0.0.1")
    server = start_server(**tls(issued), TMS_MAX_CONNECTION_AGE_S=1)

    def serial() -> int:
        pem = ssl.get_server_certificate(("127.0.0.1", server.port))
        return int.from_bytes(ssl.PEM_cert_to_DER_cert(pem)[:64], "big")

    first = serial()
    assert serial() == first
    with server.client("echo", ca=certificates.ca) as client:
        assert client.run_text("x") == "x"
        certificates.issue("server", "127.0.0.1")
        assert serial() != first
        second = serial()
        for _ in range(60):  # over some renewals of the connection
            assert client.run_text("x") == "x"
            time.sleep(0.05)
        Path(issued["key"]).write_text("half a fi")
        assert serial() == second
        server.wait_for_log("the renewed certificate is not used, the old one stays")
        assert client.run_text("x") == "x"


def test_a_token(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(TMS_TOKEN="open sesame", TMS_ADMIN_TOKEN="admin")
    with server.client("echo", token="open sesame") as client:
        assert client.run_text("x") == "x"
    with server.client("echo", admin_token="admin") as client:
        assert client.run_text("x") == "x"
    for wrong in ({}, {"token": "open sesam"}, {"token": "open sesame "}):
        with server.client("echo", **wrong) as client:
            fails_at_once(client, "send the server's token")
            assert client.stats()["retries"] == 0
            assert client.health_check()["serving"] == [server.address]  # probes bring no token
            with pytest.raises(model_client.Unauthenticated):
                list(client.run_stream("x"))
            with pytest.raises(model_client.Unauthenticated):
                client.stop_server()
    monkeypatch.setenv("TMS_TOKEN", "open sesame")
    with server.client("echo") as client:
        assert client.run_text("x") == "x"
    assert not any("sesame" in line or "admin" in line for line in server.log if "TOKEN=admin" in line)
    assert "open sesame" not in "\n".join(server.log)
    with grpc.insecure_channel(server.address) as channel:
        reflect = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(reflect(iter([b"\x3a\x00"]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_wrong_files_stop_the_start(certificates: Certificates) -> None:
    first, second = certificates.issue("first", "a.test"), certificates.issue("second", "a.test")
    for settings, message in [
        ({"TMS_TLS_CERT": first["cert"]}, "needs both TMS_TLS_CERT and TMS_TLS_KEY"),
        ({"TMS_TLS_CLIENT_CA": certificates.ca}, "works only with them"),
        (tls({"cert": first["cert"], "key": "/no/such/file"}), "cannot be used: .*No such file"),
        (tls({"cert": first["cert"], "key": second["key"]}), "cannot be used: .*(?i:key values mismatch)"),
        (tls(first, TMS_TLS_CLIENT_CA=first["key"]), "TMS_TLS_CLIENT_CA cannot be used"),
    ]:
        ran = run_server(**settings)
        assert ran.returncode == 2
        assert message.partition(":")[0] in ran.stderr


def test_wrong_files_fail_in_the_client_at_once(certificates: Certificates) -> None:
    own = certificates.issue("client", "a-client")
    with pytest.raises(FileNotFoundError):
        ModelClient("x", ca="/no/such/file")
    with pytest.raises(ValueError, match="needs both its files"):
        ModelClient("x", ca=certificates.ca, cert=own["cert"])
    with pytest.raises(OSError, match="(?i)ssl|pem|no certificate"):
        ModelClient("x", ca=own["key"])
    with pytest.raises(ValueError, match="balancing is one of load, round_robin"):
        ModelClient("x", balancing="best")
    assert "TMS_TLS" not in os.environ
