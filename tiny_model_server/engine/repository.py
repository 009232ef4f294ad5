"""From folders to loaded models: discovery, and the state of each model."""

import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from tiny_model_server.engine.batcher import Batcher
from tiny_model_server.engine.metrics import Metrics, ModelMetrics
from tiny_model_server.engine.pool import Loaded, Plugin, Pool, resident_memory
from tiny_model_server.errors import (
    DeadlineExceeded,
    ModelNotFound,
    ModelUnavailable,
    NotLoaded,
    NowAPipeline,
    Overloaded,
    ServerError,
    Stopping,
)
from tiny_model_server.settings import (
    ModelOptions,
    Settings,
    SettingsError,
    model_overrides,
    model_prefix,
    service_links,
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

    def __init__(
        self,
        plugin: Plugin,
        settings: Settings,
        metrics: Metrics,
        changed: Callable[[], None],
        known: Callable[[str], bool],
        reason: str = "",
    ) -> None:
        """``changed`` is called after each change of state, ``known`` tells whether there is a model of a name.

        A ``reason`` means that the folder cannot be loaded.
        """
        self._known = known
        self.name = plugin.name
        self._plugin = plugin
        self._settings = settings
        self._changed = changed
        self._lock = threading.Lock()  # one load, reload or unload at a time
        self._pool: Pool | None = None
        self._pools: list[Pool] = []  # during a reload there are two
        self._pools_lock = threading.Lock()
        self._unloadable = reason
        self.loaded: Loaded | None = None
        self._stopped = False
        self.wanted = False
        """True if it is meant to be loaded."""
        self.used = 0.0
        """When it was last called, on the monotonic clock."""
        self.state = State.FAILED if reason else State.UNLOADED
        self.reason = reason
        self.metrics = ModelMetrics(metrics, self.name)
        self.batcher = Batcher(ModelOptions().with_overrides(plugin.overrides).queue_size, self.metrics)
        self.metrics.queue_depth = lambda: self.batcher.depth
        self.metrics.workers = lambda: len(self.pids)
        self.metrics.wanted = lambda: self.wanted and not self.stages
        self.batcher.close(self._refusal(), drain=False)
        if reason:
            log.error("model %s FAILED: %s", self.name, reason)

    def load(self, workers: int = 0) -> None:
        """Starts the workers and waits until they are ready; calls queue meanwhile. ModelUnavailable says why not.

        ``workers`` (0: as it is) other than those it has starts that many in their place.
        """
        with self._lock:
            other = bool(workers) and self.loaded is not None and self.loaded.options.workers != workers
            if workers:
                self._plugin = replace(self._plugin, overrides=self._plugin.overrides | {"workers": workers})
            self.wanted = True
            if self.state is not State.READY:
                self._start()
            elif other:
                self._swap()

    def reload(self) -> None:
        """Starts new workers from the files as they are now, and lets the old ones finish; no call fails.

        ModelUnavailable says why the new ones cannot be started; the old ones then go on.
        """
        with self._lock:
            self.wanted = True
            if self.state is State.READY:
                self._swap()
            else:
                self._start()

    def unload(self) -> None:
        """Refuses new calls, finishes what is queued, and ends the workers, which gives all their memory back."""
        with self._lock:
            self.wanted = False
            if self._pool is None and self.state is not State.READY:
                return
            self._enter(State.UNLOADING)
            self.batcher.close(self._refusal(), drain=True)
            self._stop_pool(self.loaded.options.timeout_s if self.loaded else 0, drain=True)
            self.loaded = None
            self._enter(State.UNLOADED)
            self.batcher.close(self._refusal(), drain=False)

    def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets what is queued and running finish for ``grace_s`` seconds, stops the workers."""
        with self._pools_lock:
            self._stopped = True
            pools = list(self._pools)
        self.batcher.close(Stopping("the server is stopping"), drain=True)
        for pool in pools:
            pool.stop(grace_s, drain=grace_s > 0)
        self.batcher.close(Stopping("the server stopped before the model could answer"), drain=False)

    def open_if_lazy(self, deadline: float | None) -> None:
        """Begins to load an unloaded model, once it has finished to unload; its calls queue meanwhile."""
        if not self._lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded(f"the deadline passed before model {self.name!r} had been unloaded")
        if self.state is not State.UNLOADED or self._stopped:
            self._lock.release()
            return
        self.wanted = True
        self._enter(State.LOADING)
        self.batcher.open()
        try:  # the thread releases the lock: nobody is to unload the model before it has been loaded
            threading.Thread(target=self._load_quietly, name=f"load-{self.name}").start()
        except RuntimeError as error:  # too many threads just now
            self._enter(State.UNLOADED)
            self.batcher.close(Overloaded(f"the server cannot load the model now: {error}"), drain=False)
            self._lock.release()

    @property
    def stages(self) -> list[str]:
        """The models that this pipeline runs one after the other; empty for a model of its own."""
        return self.loaded.stages if self.loaded else []

    @property
    def pids(self) -> list[int]:
        """The worker processes that serve now."""
        return self._pool.pids if self._pool else []

    @property
    def memory(self) -> int:
        """Resident memory of its workers in bytes; 0 where the system does not tell."""
        return sum(map(resident_memory, self.pids))

    def describe(self) -> dict[str, Any]:
        """What is told of the model to those who ask, by the names of the contract's ModelInfo."""
        loaded = self.loaded
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "worker_pids": self.pids,
            "max_batch_size": loaded.options.max_batch_size if loaded else 0,
            "queue_depth": self.batcher.depth,
            "input_shape": loaded.input_shape if loaded else None,
            "metadata": loaded.metadata if loaded else {},
            "stages": self.stages,
        }

    def _load_quietly(self) -> None:
        try:
            self._start()
        except ServerError:
            pass  # its state and the log say why
        finally:
            self._lock.release()

    def _start(self) -> None:
        if self._unloadable:
            raise self._refusal()
        self._stop_pool(0)  # one that goes on trying to restart its workers
        self._enter(State.LOADING)
        self.batcher.open()
        pool = self._pool = self._new_pool()
        try:
            self.loaded = self._load(pool)
        except ModelUnavailable as error:
            self._stop_pool(0)
            self._enter(State.FAILED, str(error))
            self.batcher.close(self._refusal(), drain=False)
            raise self._refusal() from None
        self._begin(self.loaded)

    def _swap(self) -> None:
        old, grace_s = self._pool, self.loaded.options.timeout_s if self.loaded else 0
        pool = self._new_pool()
        try:
            self.loaded = self._load(pool)
        except ModelUnavailable as error:
            self._forget(pool)
            log.error("model %s: the new workers cannot be started, the old ones go on: %s", self.name, error)
            raise ModelUnavailable(f"model {self.name!r} could not be reloaded: {error}; the old one goes on") from None
        self._pool = pool
        if old:
            old.stop(grace_s)
            self._forget(old)
        self._begin(self.loaded)

    def _load(self, pool: Pool) -> Loaded:
        try:
            loaded = pool.start()
        except ModelUnavailable:
            raise
        except Exception as error:  # of the server itself; the state must not stay LOADING
            log.exception("model %s: an error while its workers were started", self.name)
            pool.stop(0)
            raise ModelUnavailable(f"the server failed: {type(error).__name__}: {error}") from None
        for stage in loaded.stages:
            if not self._known(stage):
                raise ModelUnavailable(f"it names the stage {stage!r}, and there is no such model")
        return loaded

    def _begin(self, loaded: Loaded) -> None:
        self.batcher.queue_size = loaded.options.queue_size
        if loaded.stages:  # it has no workers; what was queued while that was unknown is to come again
            self._stop_pool(0)
            self.batcher.close(NowAPipeline(f"model {self.name!r} has just been loaded; call again"), drain=False)
        self._enter(State.READY)

    def _new_pool(self) -> Pool:
        pool = Pool(self._plugin, self.batcher, self.metrics, self._settings, self._workers_changed)
        with self._pools_lock:
            if self._stopped:
                raise Stopping("the server is stopping")
            self._pools.append(pool)
        return pool

    def _forget(self, pool: Pool) -> None:
        with self._pools_lock:
            self._pools.remove(pool)

    def _stop_pool(self, grace_s: float, *, drain: bool = False) -> None:
        pool, self._pool = self._pool, None
        if pool:
            pool.stop(grace_s, drain=drain)
            self._forget(pool)

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
        return NotLoaded(f"model {self.name!r} is not loaded")


class Repository:
    """The models in the models folder."""

    def __init__(self, settings: Settings, metrics: Metrics, changed: Callable[[], None] = lambda: None) -> None:
        """Finds every model; SettingsError if the folder cannot be read or a model's setting is wrong."""
        self._settings = settings
        self._metrics = metrics
        self._changed = changed
        self._models: dict[str, ServedModel] = {}
        self._lock = threading.Lock()  # of changes; readers take the dictionary as it is
        with self._lock:
            for name, path, reason in self._folders(discover(settings.models_dir)):
                self._add(name, path, reason)
        if links := service_links():
            log.info("variables that Kubernetes sets for Services are no settings: %s", ", ".join(links))
        for variable in stray_overrides(list(self._models)):
            log.warning("%s belongs to no model that was found, or names no option", variable)

    def find(self) -> None:
        """Adds the model folders that are new, and the aliases of them; the log tells if that cannot be."""
        with self._lock:
            try:
                found = discover(self._settings.models_dir)
            except SettingsError as error:
                log.error("no new models can be looked for: %s", error)
                return
            for name, path, reason in self._folders(found):
                try:
                    self._add(name, path, reason)
                except SettingsError as error:
                    self._add(name, path, str(error))

    def _folders(self, found: list[tuple[str, Path, str]]) -> Iterator[tuple[str, Path, str]]:
        """The folders found, and the aliases of them."""
        yield from found
        for alias, folder in self._settings.aliases:
            known = next((path for name, path, _ in found if name == folder), None)
            yield alias, known or Path(folder), "" if known else f"there is no folder {folder!r}, its alias"

    def add(self, name: str, path: Path) -> ServedModel:
        """The model of this name; if there is none, the folder ``path``, wherever it is, becomes it."""
        with self._lock:
            return self._add(name, path, "")

    def remove(self, name: str) -> None:
        """Forgets a model, with its metrics; it must have been stopped."""
        with self._lock:
            self._models = {known: model for known, model in self._models.items() if known != name}
            self._metrics.forget(name)

    def _add(self, name: str, path: Path, reason: str) -> ServedModel:
        if name not in self._models:
            plugin = Plugin(name, path, {} if reason else model_overrides(name))
            model = ServedModel(plugin, self._settings, self._metrics, self._changed, self._known, reason)
            self._models = dict(sorted((self._models | {name: model}).items()))
        return self._models[name]

    def _known(self, name: str) -> bool:
        return name in self._models

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

    Folders without ``__init__.py``, hidden ones and those that begin with "_" are no models. Nor is what cannot be
    read, as the ``lost+found`` of a volume; the log tells of it. SettingsError if ``folder`` itself cannot be read.
    """
    try:
        paths = sorted(folder.resolve().iterdir())
    except (OSError, RuntimeError) as error:  # RuntimeError: links that point to each other
        raise SettingsError(f"TMS_MODELS_DIR={str(folder)!r} must be a readable folder: {error}") from None
    found: list[tuple[str, Path, str]] = []
    prefixes: dict[str, str] = {}
    for path in paths:
        if path.name.startswith((".", "_")):
            continue
        if problem := _problem(path):
            if problem != _FILE:
                log.warning("%s is no model: %s", printable(str(path)), problem)
            continue
        reason = ""
        if not _NAME.fullmatch(path.name):
            reason = "a model's name is a letter, then up to 63 letters, digits, _ and -"
        elif (other := prefixes.setdefault(model_prefix(path.name), path.name)) != path.name:
            reason = f"its settings {model_prefix(path.name)}* would be those of model {other!r} too"
        found.append((printable(path.name), path, reason))
    return found


_FILE = "it is a file"


def _problem(path: Path) -> str:
    """Why this entry of the models folder is no model; "" if it is one."""
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return _FILE
        names = os.listdir(path)
        if "__init__.py" not in names:
            return "it has no __init__.py"
        if not stat.S_ISREG((path / "__init__.py").stat().st_mode):
            return "its __init__.py is no file"
        with (path / "__init__.py").open("rb"):
            return ""
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def printable(name: str) -> str:
    """A file's name as it can be written into a log and sent, whatever bytes it has."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)
