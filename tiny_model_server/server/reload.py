"""Reloads models whose files change (TMS_RELOAD=1)."""

import logging
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import watchfiles

from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import State

log = logging.getLogger("tiny_model_server.reload")

_AGAIN_S = 2.0  # after a failure to watch
_LOOK_MS = 5000  # how often it is checked that the path leads to the same folder


def watch(engine: Engine, folder: Path, stop: threading.Event) -> None:
    """Reloads each model below ``folder`` when something in it changes, and loads new ones, until ``stop`` is set.

    If the folder cannot be watched, because it is missing for a moment, the watch is tried again.
    """
    while not stop.is_set():
        try:
            _watch(engine, folder, stop)
        except Exception as error:  # what the system may report is not known
            log.error("%s cannot be watched for changes: %s", folder, error)
            stop.wait(_AGAIN_S)


def _watch(engine: Engine, folder: Path, stop: threading.Event) -> None:
    """Watches a folder until another folder has its path; the system would still watch the old one."""
    here, watched = folder.resolve(), folder.stat()
    changes = watchfiles.watch(
        here,
        stop_event=stop,
        raise_interrupt=False,
        ignore_permission_denied=True,  # one such folder does not end the watch of the others
        rust_timeout=_LOOK_MS,
        yield_on_timeout=True,
    )
    for changed in changes:
        paths = {Path(path) for _, path in changed} - {here}
        _follow(engine, {here / path.relative_to(here).parts[0] for path in paths})
        if not os.path.samestat(folder.stat(), watched):
            log.warning("%s was replaced by another folder", folder)
            return


def _follow(engine: Engine, changed: set[Path]) -> None:
    """Reloads the models in these folders; all that are loaded, if one of the folders holds code that models share."""
    shared = {folder for folder in changed if folder.name.startswith("_")}
    names = {folder.name for folder in changed - shared if (folder / "__init__.py").is_file()}
    names |= {alias for alias, folder in engine.settings.aliases if folder in names}
    if shared:
        log.info("code that models share changed: %s", ", ".join(sorted(folder.name for folder in shared)))
        names |= {model.name for model in engine.models() if model.wanted}
    for name in sorted(names):
        log.info("model %s changed", name)
        _attempt(engine, name, engine.reload(name))
    gone = {folder.name for folder in changed if not folder.exists()}
    for model in engine.models():
        if model.name in gone and model.state is State.FAILED:
            log.info("model %s, which could not be loaded, has gone", model.name)
            _attempt(engine, model.name, engine.forget(model.name, 0))


def _attempt(engine: Engine, name: str, change: Coroutine[Any, Any, Any]) -> None:
    try:
        engine.wait(change)
    except Exception as error:  # of this model alone
        log.error("model %r could not be reloaded: %s", name, error)
