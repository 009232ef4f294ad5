"""The access log of the HTTP port: counts the bytes of each request that a model or an operator's call answers."""

from typing import Any
from urllib.parse import quote

from starlette.types import Message, Receive, Scope, Send

_LONGEST = 200  # characters of a path; a caller may send 32 KB, to fill the disk


class HttpAccessLog:
    """An ASGI application that logs the calls of another one, which puts what it knows of a call into the scope."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        sizes, status = {"in": 0, "out": 0}, 499  # its caller left

        async def read() -> Message:
            message = await receive()
            sizes["in"] += len(message.get("body", b""))
            return message

        async def respond(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            sizes["out"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, read, respond)
        finally:
            if call := scope.get("call"):
                call.bytes_in, call.bytes_out = sizes["in"], sizes["out"]
                path = quote(scope["path"][:_LONGEST])  # without spaces, after which it could name other facts
                call.log_access(f"{scope['method']} {path}", str(status))
