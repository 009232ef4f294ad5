"""What a worker process logs and prints: a pipe, from which the front's loop takes lines for its log.

A model may print without end, so each turn of the loop takes little, and a model that prints faster waits.
"""

import asyncio
import os
import secrets
from collections import deque
from contextlib import suppress
from typing import Any

from tiny_model_server import logs

KEPT = 200
"""Lines of a model that are kept."""
_READ = 1 << 11  # bytes of a turn
_PAUSE_S = 0.005  # between turns
_LONGEST = 1 << 14  # bytes of a line; a longer one is broken
_REST = 1 << 17  # bytes; a pipe holds less


class WorkerOutput:
    """The lines of one process. Belongs to the loop."""

    def __init__(self, descriptor: int, origin: dict[str, Any], kept: deque[str]) -> None:
        """Owns the pipe's end. ``origin`` has "model" and more about the process. All lines are added to ``kept``."""
        self.origin = origin
        self.mark = f"\x1e{secrets.token_hex(8)}"
        """What the process' records begin with. Of all other lines, the front says whose they are."""
        self._mark, self._descriptor, self._kept = self.mark.encode(), descriptor, kept
        self._buffer = b""
        self._loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        self._next: asyncio.Handle = self._loop.call_soon(self._wait)

    def close(self) -> None:
        """Takes the last lines, after the end of the process, and closes the pipe."""
        self._next.cancel()
        self._loop.remove_reader(self._descriptor)
        self._read(_REST)
        os.close(self._descriptor)
        lines = self._buffer.split(b"\n")
        self._log(lines if len(lines) <= KEPT else [b"(%d lines are left out)" % (len(lines) - KEPT), *lines[-KEPT:]])

    def _wait(self) -> None:
        self._loop.add_reader(self._descriptor, self._turn)

    def _turn(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._read(_READ)
        *lines, self._buffer = self._buffer.split(b"\n")
        if len(self._buffer) > _LONGEST:  # a record that is broken is no JSON any more
            lines += self._buffer.replace(self._mark, b"\n").split(b"\n")
            self._buffer = b""
        self._log(lines)
        self._next = self._loop.call_later(_PAUSE_S, self._wait)

    def _read(self, size: int) -> None:
        with suppress(BlockingIOError):
            self._buffer += os.read(self._descriptor, size)

    def _log(self, lines: list[bytes]) -> None:
        texts = [text for line in lines for text in self._texts(line)]
        self._kept += texts
        with suppress(OSError):  # standard error is closed
            if texts:
                logs.output.write("\n".join(texts), patience_ms=0)

    def _texts(self, line: bytes) -> list[str]:
        """A line as it is logged: what was printed, and the record that follows it."""
        printed, _, record = line.partition(self._mark)
        last = printed.rstrip(b"\r").rpartition(b"\r")[2]  # of a progress bar, a terminal would show that
        text = last.decode(errors="backslashreplace")
        texts = [logs.printed(text, self.origin)] if text.strip() else []
        return [*texts, record.decode(errors="replace")] if record else texts
