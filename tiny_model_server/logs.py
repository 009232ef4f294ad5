"""How the server and its workers log: one line a record, as text or as JSON, to standard error.

Callers send much of what is logged, so no message can end its line or move a terminal's cursor: characters that are
not printable are escaped. The lines of a traceback are indented, so that none of them can pass for a record.
"""

import json
import logging
from datetime import datetime, timezone
from typing import Any


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).split("\n"))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def escaped(text: str) -> str:
    """A text with every character that is not printable written as in a Python string: a line's end as two letters."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure(level: str, style: str) -> None:
    """Sends every record of ``level`` ("debug", "info", ...) and above to standard error, as "text" or "json"."""
    handler = logging.StreamHandler()
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_Json() if style == "json" else _Text(text))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
