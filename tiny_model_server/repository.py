"""From folders to loaded models: discovery, and the state of each model."""

import logging
import re
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from tiny_model_server.batcher import Batcher, Item
from tiny_model_server.errors import ModelNotFound, ModelUnavailable, ServerError, Stopping
from tiny_model_server.pool import Loaded, Plugin, Pool
from tiny_model_server.settings import (
    ModelOptions,
    Settings,
    SettingsError,
    model_overrides,
    model_prefix,
    stray_overrides,
)

log = logging.getLogger("tiny_model_server.repository")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


class State(StrEnum):
    """Where a model stands."""

    UNLOADED = "UNLOADED"
    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"


class ServedModel:
    """One model folder: its queue, its workers, its state."""

    def __init__(self, plugin: Plugin, settings: Settings, changed: Callable[[], None], reason: str = "") -> None:
        """``changed`` is called after each change of state; a ``reason`` means that the folder cannot be loaded."""
        self.name = plugin.name
        self._plugin = plugin
        self._settings = settings
        self._changed = changed
        self._lock = threading.Lock()  # one load or unload at a time
        self._pool: Pool | None = None
        self.loaded: Loaded | None = None
        self.state = State.FAILED if reason else State.UNLOADED
        self.reason = reason
        self.batcher = Batcher(ModelOptions().with_overrides(plugin.overrides).queue_size)
        self.batcher.close(self._refusal(), drain=False)
        if reason:
            log.error("model %s FAILED: %s", self.name, reason)

    def load(self) -> None:
        """Starts the workers and waits until they are ready; calls queue meanwhile. ModelUnavailable says why not."""
        with self._lock:
            if self.state is State.READY:
                return
            self._enter(State.LOADING)
            self.batcher.open()
            pool = self._pool = Pool(self._plugin, self.batcher, self._settings, self._workers_changed)
            try:
                self.loaded = pool.start()
            except ModelUnavailable as error:
                self._pool = None
                self._enter(State.FAILED, str(error))
                self.batcher.close(self._refusal(), drain=False)
                raise self._refusal() from None
            self.batcher.queue_size = self.loaded.options.queue_size
            self._enter(State.READY)

    def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets what is queued and running finish for ``grace_s`` seconds, stops the workers."""
        self.batcher.close(Stopping("the server is stopping"), drain=True)
        pool = self._pool
        if pool:
            pool.stop(grace_s)
        self.batcher.close(Stopping("the server stopped before the model could answer"), drain=False)

    def submit(self, items: list[Item]) -> None:
        """Queues the items of one call, all or none."""
        self.batcher.put(items)

    @property
    def pids(self) -> list[int]:
        """The worker processes that serve now."""
        return self._pool.pids if self._pool else []

    def _enter(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state is State.FAILED:
            log.error("model %s FAILED: %s", self.name, reason)
        else:
            log.info("model %s %s", self.name, state)
        self._changed()

    def _workers_changed(self, reason: str | None) -> None:
        """Hears from the pool that no worker can be started any more (and why), or that one runs again."""
        if reason and self.state is State.READY:
            self._enter(State.FAILED, reason)
            self.batcher.close(self._refusal(), drain=False)
        elif not reason and self.state is State.FAILED:
            self.batcher.open()
            self._enter(State.READY)

    def _refusal(self) -> ServerError:
        if self.state is State.FAILED:
            return ModelUnavailable(f"model {self.name!r} could not be loaded: {self.reason}")
        return ModelUnavailable(f"model {self.name!r} is not loaded")


class Repository:
    """The models that were found in the models folder."""

    def __init__(self, settings: Settings, changed: Callable[[], None] = lambda: None) -> None:
        """Finds every model; SettingsError if the folder cannot be read or a model's setting is wrong."""
        self._models = {
            name: ServedModel(Plugin(name, path, {} if reason else model_overrides(name)), settings, changed, reason)
            for name, path, reason in discover(settings.models_dir)
        }
        for variable in stray_overrides(list(self._models)):
            log.warning("%s belongs to no model that was found, or names no option", variable)

    def model(self, name: str) -> ServedModel:
        """The model of this name; ModelNotFound tells which there are."""
        try:
            return self._models[name]
        except KeyError:
            known = ", ".join(self._models) or "none"
            raise ModelNotFound(f"there is no model {name[:80]!r}; there are: {known}") from None

    def models(self) -> list[ServedModel]:
        """All models by name."""
        return list(self._models.values())


def discover(folder: Path) -> list[tuple[str, Path, str]]:
    """(name, path, reason) of each model folder by name; a reason says why it can't be loaded, "" that it may be.

    Folders without ``__init__.py``, hidden ones and those that begin with "_" are no models.
    """
    try:
        paths = sorted(path for path in folder.resolve().iterdir() if path.is_dir())
    except OSError as error:
        raise SettingsError(f"TMS_MODELS_DIR={str(folder)!r} must be a readable folder: {error}") from None
    found: list[tuple[str, Path, str]] = []
    prefixes: dict[str, str] = {}
    for path in paths:
        if path.name.startswith((".", "_")):
            continue
        if not (path / "__init__.py").is_file():
            log.warning("%s is no model: it has no __init__.py", path)
            continue
        reason = ""
        if not _NAME.fullmatch(path.name):
            reason = "a model's name is a letter, then up to 63 letters, digits, _ and -"
        elif (other := prefixes.setdefault(model_prefix(path.name), path.name)) != path.name:
            reason = f"its settings {model_prefix(path.name)}* would be those of model {other!r} too"
        found.append((path.name, path, reason))
    return found
