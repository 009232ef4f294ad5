"""The tables in docs/settings.md: ``python -m tests.settings_table`` prints them from the code."""

from dataclasses import Field, fields
from typing import Any

from tiny_model_server.settings import MODEL_PREFIX, PREFIX, ModelOptions, Settings, default_text

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
    text = default_text(item)
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    print("\n\n".join(tables()))
