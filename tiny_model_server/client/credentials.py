"""The client's TLS: certificates, names, and the reason why a handshake failed."""

import socket
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

_PROBE_S = 2.0


@dataclass(frozen=True)
class Credentials:
    """Whether the client uses TLS, and its PEM files."""

    tls: bool = False
    ca: str = ""
    """File of the authorities that sign servers' certificates; the system's if empty."""
    cert: str = ""
    """File of the client's own certificate chain, for servers that ask for one."""
    key: str = ""
    server_name: str = ""
    """The name that servers' certificates must carry, if it is not the one in the address."""
    contents: tuple[bytes | None, ...] = field(default=(), repr=False)
    """Of the three files. Clients share a channel only if they have read the same."""

    def read(self) -> "Credentials":
        """The same with what is in the files now; ValueError or OSError if they cannot be read or do not fit."""
        if bool(self.cert) != bool(self.key):
            raise ValueError("a client's certificate needs both its files: cert and key")
        if not self.tls:
            return self
        self._context()
        files = (self.ca, self.cert, self.key)
        return replace(self, contents=tuple(Path(file).read_bytes() if file else None for file in files))

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What grpcio's channel needs; None for no TLS."""
        if not self.tls:
            return None
        ca, cert, key = self.contents
        return grpc.ssl_channel_credentials(ca, key, cert)

    def options(self, target: str) -> list[tuple[str, Any]]:
        """The channel options: by which name certificates are checked."""
        name = self.server_name
        if self.tls and not name and target.startswith(("ipv4:", "ipv6:")):
            name = target.partition(":")[2].split(",")[0].rpartition(":")[0].strip("[]")
        return [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)] if name else []

    def refusal(self, host: str, port: int, name: str) -> str | None:
        """Why TLS fails between this client and the server there; None if it works, or if no server is there."""
        try:
            with socket.create_connection((host, port), _PROBE_S) as plain:
                return self._handshake(plain, self.server_name or name)
        except OSError:
            return None

    def _handshake(self, plain: socket.socket, name: str) -> str | None:
        context = self._context()
        try:
            with context.wrap_socket(plain, server_hostname=name) as secured:
                if not self.tls:
                    return "the server speaks TLS; give the client ca=FILE, or tls=True for the system's authorities"
                # In TLS 1.3 the server checks the client's certificate last. If it is wrong, the server disconnects.
                if secured.recv(1):
                    return None
                mine = "not the client's, of which it does not know the authority" if self.cert else "none was sent"
                return f"the server wants a certificate it trusts, and {mine}"
        except ssl.SSLCertVerificationError as error:
            return f"the server's certificate is not trusted: {error.verify_message}"
        except ssl.SSLError as error:
            if not self.tls:
                return None
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                return "the server does not speak TLS"
            return f"the TLS handshake failed: {error.reason or error}"

    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca or None)
        context.set_alpn_protocols(["h2"])
        if not self.tls:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.cert:
            context.load_cert_chain(self.cert, self.key)
        return context
