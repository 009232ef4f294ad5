"""Server-sent events: what a model yields for one input, sent to the caller as it comes.

The events are texts such as ``data: 1\\n\\n``, as the HTML standard describes them.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from starlette.types import Send

from tiny_model_server import codec
from tiny_model_server.errors import DeadlineExceeded, ServerError, Stopping

MEDIA_TYPE = "text/event-stream"
_HEADERS = {
    "Content-Type": f"{MEDIA_TYPE}; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would collect the events
}


async def send_events(
    events: AsyncGenerator[str, None], failed: Callable[[ServerError], str], send: Send, idle_s: float
) -> str:
    """Sends all events, and returns the text that is to be the last: that of ``failed`` if the stream fails midway.

    If it fails before its first event, the error is raised: no answer has begun. A caller that reads nothing for
    ``idle_s`` seconds gets no more.
    """
    async with aclosing(events):
        event = await anext(events, None)
        headers = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while event is not None:
                async with asyncio.timeout(idle_s):
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                event = await anext(events, None)
        except TimeoutError:
            return failed(DeadlineExceeded(f"the caller read nothing for {idle_s:g} s (TMS_STREAM_IDLE_S)"))
        except asyncio.CancelledError:
            return failed(Stopping("the server is stopping"))
        except ServerError as error:
            return failed(error)
    return ""


async def value_events(values: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """An event for each value, which is JSON, and one called "end"."""
    async for value in values:
        yield f"data: {value}\n\n"
    yield "event: end\ndata: null\n\n"


def error_event(error: ServerError) -> str:
    """An event called "error", as JSON with its text and its status."""
    return f"event: error\ndata: {codec.json_only({'error': str(error), 'status': error.status})}\n\n"
