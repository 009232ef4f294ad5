"""The server's certificates: checked at the start, and read again when their files were renewed."""

import logging
import ssl
from pathlib import Path

import grpc

from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.tls")


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What grpcio's server needs for TLS, None without TMS_TLS_CERT; SettingsError if the files will not do."""
    if not (settings.tls_cert and settings.tls_key):
        if settings.tls_cert or settings.tls_key or settings.tls_client_ca:
            raise SettingsError("TLS needs both TMS_TLS_CERT and TMS_TLS_KEY; TMS_TLS_CLIENT_CA works only with them")
        return None
    files = _Files(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    try:
        first = files.read()
    except (OSError, ValueError) as error:
        raise SettingsError(f"TMS_TLS_CERT, TMS_TLS_KEY or TMS_TLS_CLIENT_CA cannot be used: {error}") from None
    return grpc.dynamic_ssl_server_credentials(first, files.renewed, settings.tls_client_ca is not None)  # type: ignore[arg-type]


class _Files:
    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._seen: list[int] = []

    def read(self) -> grpc.ServerCertificateConfiguration:
        """The files' content; OSError or ValueError if they cannot be read or do not belong together."""
        self._seen = self._times()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key)  # an ssl.SSLError is an OSError
        if self._client_ca:
            context.load_verify_locations(self._client_ca)
        client_ca = self._client_ca.read_bytes() if self._client_ca else None
        pair = (self._key.read_bytes(), self._cert.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], client_ca)

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake: the new content if the files have changed and are good, else None."""
        try:
            if self._times() == self._seen:
                return None
            renewed = self.read()
        except (OSError, ValueError) as error:
            log.error("the renewed certificate is not used, the old one stays: %s", error)
            return None
        log.info("the certificate was renewed")
        return renewed

    def _times(self) -> list[int]:
        return [path.stat().st_mtime_ns for path in (self._cert, self._key, self._client_ca) if path]
