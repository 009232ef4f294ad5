"""Reloads models whose files change (TMS_RELOAD=1)."""

import logging
import threading
from pathlib import Path

import watchfiles

from tiny_model_server.engine import Engine
from tiny_model_server.errors import ServerError

log = logging.getLogger("tiny_model_server.reload")


def watch(engine: Engine, folder: Path, stop: threading.Event) -> None:
    """Reloads each model below ``folder`` when something in it changes, and loads new ones, until ``stop`` is set."""
    folder = folder.resolve()
    for changes in watchfiles.watch(folder, stop_event=stop, raise_interrupt=False):
        names = {Path(path).relative_to(folder).parts[0] for _, path in changes if Path(path) != folder}
        for name in sorted(names):
            if not (folder / name / "__init__.py").is_file():
                continue
            try:
                log.info("model %s changed", name)
                engine.reload(name)
            except ServerError as error:
                log.error("%s", error)
