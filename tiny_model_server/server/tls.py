"""The server's certificates: checked at the start, and read again when their files were renewed."""

import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc

from tiny_model_server.settings import Settings, SettingsError, client_certificate

log = logging.getLogger("tiny_model_server.tls")


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What grpcio's server needs for TLS, None without TMS_TLS_CERT; SettingsError if the files cannot be used."""
    if not (files := Files.of(settings)):
        return None
    return grpc.dynamic_ssl_server_credentials(files.configuration(), files.renewed, files.client_ca is not None)  # type: ignore[arg-type]


def own_channel(settings: Settings, address: str, timeout_s: float) -> grpc.Channel:
    """A channel to the server that was started with these settings, past all proxies; OSError if it is not there.

    With TLS, nothing is trusted but the server's own certificate. A server that asks for a client's is shown the one
    that the environment names for clients (TMS_CLIENT_CERT), or the server's own.
    """
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    if not (files := Files.of(settings)):
        return grpc.insecure_channel(address, options)
    own = [path.read_bytes() for path in client_certificate() or (files.key, files.cert)] if files.client_ca else []
    credentials = grpc.ssl_channel_credentials(files.cert.read_bytes(), *own)
    options.append(("grpc.ssl_target_name_override", files.name_at(address, timeout_s)))
    return grpc.secure_channel(address, credentials, options)


def own_context(settings: Settings) -> ssl.SSLContext | None:
    """The same for a connection to the HTTP port; None without TLS."""
    if not (files := Files.of(settings)):
        return None
    context = files.trusting_itself()
    if files.client_ca:
        key, cert = client_certificate() or (files.key, files.cert)
        context.load_cert_chain(cert, key)
    return context


class Files:
    """The certificate's files. The next handshake uses their new content after a change."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Reads the files; OSError or ValueError if they cannot be read or do not belong together."""
        self.cert, self.key, self.client_ca = cert, key, client_ca
        self._seen: list[int] = []
        self._renew()

    @classmethod
    def of(cls, settings: Settings) -> "Files | None":
        """The files that the settings name, None without TMS_TLS_CERT; SettingsError if they cannot be used."""
        cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
        if not (cert or key or client_ca):
            return None
        if not (cert and key):
            raise SettingsError("TLS needs both TMS_TLS_CERT and TMS_TLS_KEY; TMS_TLS_CLIENT_CA works only with them")
        try:
            return cls(cert, key, client_ca)
        except (OSError, ValueError) as error:
            raise SettingsError(f"TMS_TLS_CERT, TMS_TLS_KEY or TMS_TLS_CLIENT_CA cannot be used: {error}") from None

    def context(self) -> ssl.SSLContext:
        """The context for a handshake of the HTTP port. Wrong files do not replace the ones before."""
        self.renewed()
        return self._context

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """The files' content as gRPC takes it."""
        client_ca = self.client_ca.read_bytes() if self.client_ca else None
        return grpc.ssl_server_certificate_configuration([(self.key.read_bytes(), self.cert.read_bytes())], client_ca)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake: the new content if the files have changed and are good, else None."""
        try:
            if not self._renew():
                return None
            log.info("the certificate was renewed")
            return self.configuration()
        except (OSError, ValueError) as error:
            log.error("the renewed certificate is not used, the old one stays: %s", error)
            return None

    def name_at(self, address: str, timeout_s: float) -> str:
        """A name in the certificate that a server at "host:port" or "unix:path" shows, which must be of these files."""
        with _connect(address, timeout_s) as plain, self.trusting_itself().wrap_socket(plain) as secured:
            shown: Any = secured.getpeercert()
        names = [name for kind, name in sorted(shown.get("subjectAltName", ())) if kind in ("DNS", "IP Address")]
        names += [value for part in shown["subject"] for kind, value in part if kind == "commonName"]
        return next(iter(names), "").replace("*", "any")

    def trusting_itself(self) -> ssl.SSLContext:
        """The context of a client that trusts nothing but a server with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted, not its authority
        context.load_verify_locations(self.cert)
        return context

    def _renew(self) -> bool:
        """Reads the files if they have changed, and returns whether they have."""
        times = [path.stat().st_mtime_ns for path in (self.cert, self.key, self.client_ca) if path]
        if times == self._seen:
            return False
        self._seen = times
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)  # an ssl.SSLError is an OSError
        if self.client_ca:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        self._context = context
        return True


def _connect(address: str, timeout_s: float) -> socket.socket:
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    connection.connect(address.removeprefix("unix:"))
    return connection
