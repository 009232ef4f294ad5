"""Reloads models whose files change (TMS_RELOAD=1)."""

import logging
import os
import threading
from pathlib import Path

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
        for model in sorted({here / path.relative_to(here).parts[0] for path in paths}):
            _reload(engine, model)
        if not os.path.samestat(folder.stat(), watched):
            log.warning("%s was replaced by another folder", folder)
            return


def _reload(engine: Engine, model: Path) -> None:
    name = model.name
    try:
        if (model / "__init__.py").is_file():
            log.info("model %s changed", name)
            engine.wait(engine.reload(name))
        elif not model.exists() and any(one.name == name and one.state is State.FAILED for one in engine.models()):
            log.info("model %s, which could not be loaded, has gone", name)
            engine.wait(engine.forget(name, 0))
    except Exception as error:  # of this model alone
        log.error("model %r could not be reloaded: %s", name, error)
