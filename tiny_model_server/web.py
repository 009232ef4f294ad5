"""The HTTP port: liveness, readiness, the models' states and metrics, for probes and people."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from tiny_model_server.engine import Engine
from tiny_model_server.settings import Settings, SettingsError

log = logging.getLogger("tiny_model_server.web")


class WebServer:
    """Answers GET /livez, /readyz, /models and /metrics."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Binds the port; SettingsError if it cannot be had."""

        class Handler(_Handler):
            pass

        Handler.engine = engine
        try:
            self._server = ThreadingHTTPServer((settings.host, settings.http_port or 0), Handler)
        except OSError as error:
            raise SettingsError(
                f"TMS_HTTP_PORT={settings.http_port} cannot be listened on: {error.strerror}; "
                "choose another, 0 for a free one, or off"
            ) from None
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Answers requests, in threads of its own."""
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def stop(self) -> None:
        """Closes the port."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a silent connection is kept
    engine: Engine

    def do_GET(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        engine = self.engine
        if path == "/livez":
            self._answer(200, {"live": True})
        elif path == "/readyz":
            ready = engine.ready and not engine.stopping
            self._answer(200 if ready else 503, {"ready": ready})
        elif path == "/models":
            states = [{"name": m.name, "state": m.state, "reason": m.reason} for m in engine.models()]
            self._answer(200, {"models": states})
        elif path == "/metrics":
            self._send(200, CONTENT_TYPE_LATEST, engine.metrics.text())
        else:
            self._answer(404, {"error": f"there is no {path or '/'}; there are /livez, /readyz, /models and /metrics"})

    def _answer(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode() + b"\n")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)
