"""Which web pages may call the HTTP port: its own, and those of the sites in TMS_CORS_ORIGINS."""

import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from tiny_model_server import access
from tiny_model_server.errors import PermissionDenied
from tiny_model_server.settings import Settings

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
}


class Sites:
    """The rules for requests that browsers send for web pages."""

    def __init__(self, settings: Settings) -> None:
        self._own_names = {"localhost", socket.gethostname().lower(), *map(str.lower, settings.allowed_hosts)}
        self._origins = frozenset(settings.cors_origins)
        self._pages_may_change = settings.admin_rule == "token"

    def check(self, request: Request, *, changes: bool = False) -> None:
        """PermissionDenied if another site's page sent this; also a page whose name resolves to this host.

        The owner of a site can let its name resolve to 127.0.0.1. Then its page may send requests to this host from the
        user's browser, but the browser gives that name as Host. A browser sends Origin with each POST.

        A page of TMS_CORS_ORIGINS may do all but what ``changes`` the server: its request comes from the user's own
        browser, which would count as local. The admin token lets it do that as well.
        """
        headers, host = request.headers, request.headers.get("host", "")
        allowed = self._allowed(headers) and (self._pages_may_change or not changes)
        foreign = request.method == "POST" and not allowed and _is_foreign(headers, host)
        local = request.client is not None and access.is_loopback(request.client.host)
        if foreign or (local and host and not self._is_own_name(host)):
            raise PermissionDenied(
                "a page of another site may not do this; on this host, use localhost or 127.0.0.1, or add the name "
                "that you use to TMS_ALLOWED_HOSTS; TMS_CORS_ORIGINS lets pages of other sites run models"
            )

    def preflight(self, request: Request) -> Response | None:
        """The answer to a browser that asks what a page of another site may do; None for any other request."""
        asks = request.method == "OPTIONS" and "access-control-request-method" in request.headers
        return Response(status_code=204, headers=_PREFLIGHT) if asks and self._allowed(request.headers) else None

    def mark(self, asked: Mapping[str, str], answered: MutableHeaders) -> None:
        """Adds the headers that let a browser show the answer to the page that asked."""
        if self._origins:
            answered.add_vary_header("Origin")
        if self._allowed(asked):
            answered["Access-Control-Allow-Origin"] = "*" if "*" in self._origins else asked["origin"]
            answered["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"

    def _allowed(self, headers: Mapping[str, str]) -> bool:
        return "origin" in headers and bool({"*", headers["origin"]} & self._origins)

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return access.address(name) is not None or bool({name, "*"} & self._own_names)


def _is_foreign(headers: Mapping[str, str], host: str) -> bool:
    return (
        headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        or headers.get("origin", f"http://{host}").partition("://")[2] != host
    )
