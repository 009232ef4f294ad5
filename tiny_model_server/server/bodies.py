"""Bodies of HTTP requests: read within a time limit, counted before they arrive, and decompressed within limits."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from tiny_model_server.engine.engine import Engine
from tiny_model_server.errors import Cancelled, InvalidInput

_BODY_S = 30.0  # the time for a body at first, and the most that it may have left at any moment
_MIN_BYTES_PER_S = 1 << 16  # the time left grows by a second for so many bytes
_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # what zlib calls their formats
_STEP = 1 << 20


class Body(bytearray):
    """A body. What is made of it counts as well (TMS_MAX_INFLIGHT_MB), until its request ends."""

    def __init__(self, engine: Engine, encoding: str) -> None:
        """HTTPException 415 if a body cannot come so encoded."""
        super().__init__()
        if encoding not in ("", "identity", *_WINDOWS):
            raise HTTPException(415, "send the body as it is, or with gzip", {"Accept-Encoding": "gzip, deflate"})
        self._window = _WINDOWS.get(encoding, 0)
        self._budget = engine.inflight
        self._most = min(engine.settings.max_message_mb << 20, self._budget.limit)
        self._arrived = self._made = 0

    def expect(self, size: int) -> None:
        """Counts that it has, or is to have, so many bytes. HTTPException 413 or Overloaded if it may not."""
        self._check(size)
        if size > self._arrived:
            self._budget.expect(size - self._arrived, self._arrived)
            self._arrived = size

    def arrived(self) -> None:
        """No more of it will arrive."""
        self._budget.arrived(self._arrived)

    def take(self, size: int) -> None:
        """Counts so many bytes that are made of it. HTTPException 413 or Overloaded if they are too many."""
        self._check(self._made + size)
        self._budget.take(size)
        self._made += size

    def release(self) -> None:
        """Counts nothing any more."""
        self._budget.give(self._arrived + self._made)

    def expand(self) -> "Body":
        """Itself, decompressed if it came so. InvalidInput if it is malformed."""
        if self._window:
            self[:] = self._expanded(zlib.decompressobj(self._window))
        return self

    def _expanded(self, decompressor: "zlib._Decompress") -> bytearray:
        expanded = bytearray()
        try:
            for begin in range(0, len(self), _STEP):
                rest = bytes(self[begin : begin + _STEP])
                while rest and not decompressor.eof:
                    made = decompressor.decompress(rest, _STEP)
                    self.take(len(made))
                    expanded += made
                    rest = decompressor.unconsumed_tail
        except zlib.error as error:
            raise InvalidInput(f"the compressed body is malformed: {error}") from None
        if not decompressor.eof or decompressor.unused_data:
            raise InvalidInput("the compressed body is cut off, or something follows it")
        return expanded

    def _check(self, size: int) -> None:
        if size > self._most:
            limits = "TMS_MAX_MESSAGE_MB and TMS_MAX_INFLIGHT_MB"
            raise HTTPException(413, f"a body may have {self._most} bytes ({limits}), not {size}")


@asynccontextmanager
async def read_body(request: Request, engine: Engine) -> AsyncIterator[Body]:
    """A request's body as it was sent. Its bytes are counted from before they arrive until the context ends."""
    body = Body(engine, request.headers.get("content-encoding", "").strip().lower())
    try:
        try:
            body.expect(int(request.headers.get("content-length", 0)))
            async with asyncio.timeout(_BODY_S) as limit:
                async for part in request.stream():
                    body.expect(len(body) + len(part))
                    body += part
                    later = (limit.when() or 0) + len(part) / _MIN_BYTES_PER_S
                    limit.reschedule(min(later, asyncio.get_running_loop().time() + _BODY_S))
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive in time; {len(body)} bytes of it did") from None
        except ClientDisconnect:
            raise Cancelled("the caller disconnected") from None
        finally:
            body.arrived()
        yield body
    finally:
        body.release()
