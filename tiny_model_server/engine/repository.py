"""From folders to loaded models: discovery, and the state of each model."""

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from tiny_model_server import json_arrays
from tiny_model_server.engine.batcher import Batcher
from tiny_model_server.engine.metrics import Metrics, ModelMetrics
from tiny_model_server.engine.pool import Pool, resident_memory
from tiny_model_server.engine.worker_process import Loaded, Plugin
from tiny_model_server.errors import ModelNotFound, ModelUnavailable, NowAPipeline, ServerError, Stopping, suggestion
from tiny_model_server.logs import escaped
from tiny_model_server.settings import (
    ModelOptions,
    Settings,
    SettingsError,
    model_overrides,
    model_prefix,
    name_problem,
    service_links,
)

log = logging.getLogger("tiny_model_server.repository")


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
        self, plugin: Plugin, settings: Settings, metrics: Metrics, repository: "Repository", reason: str = ""
    ) -> None:
        """A ``reason`` means that the folder cannot be loaded."""
        self.name = plugin.name
        self._plugin, self._settings, self._repository = plugin, settings, repository
        self._turn = asyncio.Lock()  # one load, reload or unload at a time
        self._pools: list[Pool] = []  # during a reload there are two
        self._loading: asyncio.Task[None] | None = None
        self._unloadable = reason
        self._stopped = False
        self.loaded: Loaded | None = None
        self.wanted = False
        """True if it is meant to be loaded."""
        self.used = 0.0
        """When it was last called, on the monotonic clock."""
        self.state = State.FAILED if reason else State.UNLOADED
        self.reason = reason
        self.metrics = ModelMetrics(metrics, self.name)
        self.batcher = Batcher(ModelOptions(**plugin.overrides).queue_size, self.metrics)
        self.metrics.queue_depth = lambda: self.batcher.depth
        self.metrics.workers = lambda: len(self.pids)
        self.metrics.wanted = lambda: self.wanted and not self.stages
        self.batcher.close(self._refusal(), drain=False)
        if reason:
            log.error("model %s FAILED: %s", self.name, reason)

    async def load(self, workers: int = 0, *, anew: bool = False) -> None:
        """Starts the workers and waits until they are ready; calls queue meanwhile. ModelUnavailable says why not.

        ``workers`` (0: as it is) other than those it has starts that many in their place, and ``anew`` new ones from
        the files as they are now. No call fails: the old ones continue until then, or if new ones cannot be started.
        """
        async with self._turn:
            same = not anew and workers in (0, self.loaded.options.workers if self.loaded else 0)
            if workers:
                self._plugin = replace(self._plugin, overrides=self._plugin.overrides | {"workers": workers})
            self.wanted = True
            if self.state is not State.READY or not same:
                await self._start()

    async def begin_to_load(self) -> None:
        """Begins to load an unloaded model, once it has finished to unload; its calls queue meanwhile."""
        await self._turn.acquire()
        if self.state is not State.UNLOADED or self._stopped:
            self._turn.release()
            if self._stopped:
                raise Stopping("the server is stopping")
            return
        self.wanted = True
        self._open()
        self._loading = asyncio.create_task(self._load_quietly())  # nobody unloads the model before it ends

    async def _load_quietly(self) -> None:
        try:
            with suppress(ServerError):  # its state and the log give the reason
                await self._start()
        finally:
            self._turn.release()

    async def settle(self) -> None:
        """Waits until it is not being loaded or unloaded; ModelUnavailable if it is not loaded then."""
        async with self._turn:
            if self.loaded is None:
                raise self._refusal()

    async def unload(self) -> None:
        """Refuses new calls, finishes what is queued, and ends the workers, which frees all their memory."""
        async with self._turn:
            self.wanted = False
            if not self._pools and self.state is not State.READY:
                return
            self._enter(State.UNLOADING)
            self.batcher.close(self._refusal(), drain=True)
            await self._end(self._pools, self.loaded.options.timeout_s if self.loaded else 0, drain=True)
            self.loaded = None
            self._enter(State.UNLOADED)
            self.batcher.close(self._refusal(), drain=False)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets what is queued and running finish for ``grace_s`` seconds, stops the workers."""
        self._stopped = True
        self.batcher.close(Stopping("the server is stopping"), drain=True)
        await self._end(self._pools, grace_s, drain=grace_s > 0)
        if self._loading:
            await asyncio.wait([self._loading])
        self.batcher.close(Stopping("the server stopped before the model could answer"), drain=False)

    @property
    def stages(self) -> list[str]:
        """The models that this pipeline runs one after the other; empty for a model of its own."""
        return self.loaded.stages if self.loaded else []

    @property
    def pids(self) -> list[int]:
        """The worker processes that serve now."""
        return [pid for pool in self._pools for pid in pool.pids]

    @property
    def lines(self) -> list[str]:
        """The last lines that its workers have logged and printed."""
        return list(self._plugin.lines.copy())  # at once, while the loop adds others

    @property
    def memory(self) -> int:
        """Resident memory of its workers in bytes; 0 where the system does not report it."""
        return sum(map(resident_memory, self.pids))

    def describe(self) -> dict[str, Any]:
        """Facts about the model, by the names of the contract's ModelInfo; its example, as JSON, is for HTTP alone."""
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
            "example": json_arrays.example(loaded.example) if loaded else None,
            "stages": self.stages,
            "schema": loaded.schema if loaded else {},
        }

    async def _start(self) -> None:
        """Starts new workers. If the model is READY the old ones serve until then; else its calls queue."""
        if self._unloadable:
            raise self._refusal()
        old, was_ready = list(self._pools), self.state is State.READY
        if not was_ready:
            await self._end(old)  # such as go on trying to restart their workers
            self._open()
        try:
            loaded = await self._start_pool()
        except ModelUnavailable as error:
            await self._end([pool for pool in self._pools if pool not in old])
            if not was_ready:
                self._enter(State.FAILED, str(error))
                self.batcher.close(self._refusal(), drain=False)
                raise self._refusal() from None
            log.error("model %s: the new workers cannot be started, the old ones continue: %s", self.name, error)
            why = f"model {self.name!r} could not be reloaded: {error}; the old one continues"
            raise ModelUnavailable(why) from None
        grace_s = self.loaded.options.timeout_s if self.loaded else 0
        self.loaded = loaded
        await self._end(old, grace_s)
        self.batcher.queue_size = loaded.options.queue_size
        if loaded.stages:  # it has no workers; what was queued while that was unknown is to come again
            await self._end(self._pools)
            self.batcher.close(NowAPipeline(f"model {self.name!r} has just been loaded; call again"), drain=False)
        self._enter(State.READY)

    async def _start_pool(self) -> Loaded:
        if self._stopped:
            raise Stopping("the server is stopping")
        pool = Pool(self._plugin, self.batcher, self.metrics, self._settings, self._workers_changed)
        self._pools.append(pool)
        loaded = await pool.start()
        for stage in loaded.stages:
            if stage == self.name:
                raise ModelUnavailable(f"the pipeline names itself as a stage, {stage!r}; name other models")
            if stage not in self._repository.names:
                hint = suggestion(stage, self._repository.names)
                raise ModelUnavailable(f"it names the stage {stage!r}, and there is no such model{hint}")
        return loaded

    async def _end(self, pools: list[Pool], grace_s: float = 0, *, drain: bool = False) -> None:
        await asyncio.gather(*(pool.stop(grace_s, drain=drain) for pool in pools))
        self._pools = [pool for pool in self._pools if pool not in pools]

    def _open(self) -> None:
        self._enter(State.LOADING)
        self.batcher.open()

    def _enter(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state is State.FAILED:
            log.error("model %s FAILED: %s", self.name, reason)
        else:
            log.info("model %s %s", self.name, state)
        self._repository.changed()

    def _workers_changed(self, reason: str | None) -> None:
        """No worker can be started any more (for this reason), or one runs again."""
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
    """The models in the models folder."""

    def __init__(self, settings: Settings, metrics: Metrics, changed: Callable[[], None]) -> None:
        """Finds every model; SettingsError if the folder cannot be read or a model's setting is wrong.

        ``changed`` is called after each change of a model's state.
        """
        self._settings = settings
        self._metrics = metrics
        self.changed = changed
        self._models: dict[str, ServedModel] = {}
        for name, path, reason in self._folders():
            self.add(name, path, reason)
        if links := service_links():
            log.info("variables that Kubernetes sets for Services are not settings: %s", ", ".join(links))

    def find(self) -> None:
        """Adds the model folders that are new, and the aliases of them; the log says if that cannot be done."""
        try:
            found = list(self._folders())
        except SettingsError as error:
            log.error("new models cannot be looked for: %s", error)
            return
        for name, path, reason in found:
            try:
                self.add(name, path, reason)
            except SettingsError as error:
                self.add(name, path, str(error))

    def add(self, name: str, path: Path, reason: str = "") -> ServedModel:
        """The model of this name; if there is none, the folder ``path``, wherever it is, becomes it."""
        if name not in self._models:
            plugin = Plugin(name, path, {} if reason else model_overrides(name))
            model = ServedModel(plugin, self._settings, self._metrics, self, reason)
            self._models = dict(sorted((self._models | {name: model}).items()))
        return self._models[name]

    def remove(self, name: str) -> None:
        """Forgets a model, with its metrics; it must have been stopped."""
        self._models = {known: model for known, model in self._models.items() if known != name}
        self._metrics.forget(name)

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return list(self._models)

    def model(self, name: str) -> ServedModel:
        """The model of this name; ModelNotFound names those that there are."""
        try:
            return self._models[name]
        except KeyError:
            hint, known = suggestion(name[:80], self.names), ", ".join(self.names) or "none"
            raise ModelNotFound(f"there is no model {name[:80]!r}{hint}; there are: {known}") from None

    def models(self) -> list[ServedModel]:
        """All models by name."""
        return list(self._models.values())

    def _folders(self) -> Iterator[tuple[str, Path, str]]:
        """(name, path, reason) of the folders found, and of their aliases; see ``discover``."""
        found = discover(self._settings.models_dir)
        yield from found
        for alias, folder in self._settings.aliases:
            known = next((path for name, path, _ in found if name == folder), None)
            yield alias, known or Path(folder), "" if known else f"there is no folder {folder!r}, its alias"


def discover(folder: Path) -> list[tuple[str, Path, str]]:
    """(name, path, reason) of each model folder by name; a reason says why it can't be loaded, "" that it may be.

    Folders without ``__init__.py``, hidden ones and those that begin with "_" are no models. Nor is what cannot be
    read, as the ``lost+found`` of a volume; the log names it. SettingsError if ``folder`` itself cannot be read.
    """
    try:
        paths = sorted(folder.resolve().iterdir())
    except (OSError, RuntimeError) as error:  # RuntimeError: links that point to each other
        hint = "; make a first model in it: tiny-model-server new NAME" if type(error) is FileNotFoundError else ""
        raise SettingsError(f"TMS_MODELS_DIR={str(folder)!r} must be a readable folder: {error}{hint}") from None
    found: list[tuple[str, Path, str]] = []
    prefixes: dict[str, str] = {}
    for path in paths:
        if path.name.startswith((".", "_")):
            continue
        if problem := _problem(path):
            if problem != _FILE:
                log.warning("%s is not a model folder: %s", escaped(str(path)), problem)
            continue
        reason = name_problem(path.name)
        if not reason and (other := prefixes.setdefault(model_prefix(path.name), path.name)) != path.name:
            reason = f"its settings {model_prefix(path.name)}* would be those of model {other!r} too"
        found.append((escaped(path.name), path, reason))
    return found


_FILE = "it is a file"


def _problem(path: Path) -> str:
    """Why this entry of the models folder is not a model folder; "" if it is one."""
    try:
        mode = path.stat().st_mode
        if path.suffix == ".py" and stat.S_ISREG(mode) and "(ModelInterface)" in path.read_text(errors="replace"):
            return f"it is a file; move it to {path.stem}/__init__.py"
        if not stat.S_ISDIR(mode):
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
