"""Reloads models whose files change (TMS_RELOAD=1)."""

import logging
import threading
from pathlib import Path

import watchfiles

from tiny_model_server.engine.engine import Engine
from tiny_model_server.engine.repository import State

log = logging.getLogger("tiny_model_server.reload")

_LONGEST_BACKOFF_S = 10.0
_LOOK_MS = 5000  # how often to look whether it is still the same folder


def watch(engine: Engine, folder: Path, stop: threading.Event) -> None:
    """Reloads each model below ``folder`` when something in it changes, and loads new ones, until ``stop`` is set.

    While the folder cannot be watched, as it may be away for a moment, it is tried again.
    """
    backoff_s = 0.5
    while not stop.is_set():
        try:
            here, watched = folder.resolve(), _identity(folder)
            for changes in watchfiles.watch(
                here,
                stop_event=stop,
                raise_interrupt=False,
                ignore_permission_denied=True,  # of one folder in it; the others are watched
                rust_timeout=_LOOK_MS,
                yield_on_timeout=True,
            ):
                backoff_s = 0.5
                _reload(engine, here, {Path(path) for _, path in changes})
                if _identity(folder) != watched:  # the system goes on to watch the one that was moved away
                    log.warning("%s is another folder now", folder)
                    break
        except Exception as error:  # whatever the system reports, the watch goes on
            log.error("%s cannot be watched for changes: %s", folder, error)
        stop.wait(backoff_s)
        backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _reload(engine: Engine, folder: Path, changed: set[Path]) -> None:
    names = {path.relative_to(folder).parts[0] for path in changed if path != folder and path.is_relative_to(folder)}
    for name in sorted(names):
        try:
            if (folder / name / "__init__.py").is_file():
                log.info("model %s changed", name)
                engine.reload(name)
            elif not (folder / name).exists() and any(
                model.name == name and model.state is State.FAILED for model in engine.models()
            ):
                log.info("model %s, which could not be loaded, has gone", name)
                engine.forget(name, 0)
        except Exception as error:  # of this model alone
            log.error("model %r could not be reloaded: %s", name, error)
