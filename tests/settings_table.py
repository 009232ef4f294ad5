"""The table in docs/settings.md: ``python -m tests.settings_table`` prints it from the code."""

from dataclasses import MISSING, Field, fields
from typing import Any

from tiny_model_server.settings import MODEL_PREFIX, PREFIX, ModelOptions, Settings


def rows() -> list[str]:
    """One line of Markdown for every setting: variable, default, meaning."""
    of_server = [(PREFIX + item.name.upper(), item) for item in fields(Settings)]
    of_models = [(f"{MODEL_PREFIX}<NAME>_{item.name.upper()}", item) for item in fields(ModelOptions)]
    return [f"| `{name}` | `{_default(item)}` | {item.metadata['doc']} |" for name, item in of_server + of_models]


def _default(item: "Field[Any]") -> str:
    value = {} if item.default is MISSING else item.default
    if isinstance(value, tuple):
        return ",".join(value)
    return str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)


if __name__ == "__main__":
    print("\n".join(rows()))
