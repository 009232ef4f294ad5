"""The tables in docs/settings.md: ``python -m tests.settings_table`` prints them from the code."""

from dataclasses import MISSING, Field, fields
from typing import Any

from tiny_model_server.settings import MODEL_PREFIX, PREFIX, ModelOptions, Settings

HEAD = "| variable | default | meaning |\n| --- | --- | --- |"


def tables() -> list[str]:
    """Markdown tables of the server's settings and of each model's: variable, default, meaning."""
    return [_table(PREFIX, Settings), _table(f"{MODEL_PREFIX}<NAME>_", ModelOptions)]


def _table(prefix: str, kind: type[Any]) -> str:
    rows = [
        f"| `{prefix}{item.name.upper()}` | {_default(item)} | {item.metadata['doc']} |".replace("  ", " ")
        for item in fields(kind)
    ]
    return "\n".join([HEAD, *rows])


def _default(item: "Field[Any]") -> str:
    value = {} if item.default is MISSING else item.default
    if isinstance(value, tuple):
        value = ",".join(value)
    text = str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print("\n\n".join(tables()))
