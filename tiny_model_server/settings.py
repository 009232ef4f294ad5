"""All settings, frozen and checked. Only this file reads the server's environment variables (``TMS_*``)."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tiny_model_server.errors import suggestion

log = logging.getLogger("tiny_model_server.settings")

PREFIX = "TMS_"
MODEL_PREFIX = "TMS_MODEL_"
RENAMED = {"TMS_DOORS": "TMS_PROTOCOLS", "TMS_LANE": "TMS_LOCAL_TRANSPORT", "TMS_AWAKE_US": "TMS_BUSY_POLL_US"}
"""Old names of settings, which work until the next version."""
# What Kubernetes sets in a pod for each Service of its namespace; one may be called tms, tms-http or tms-model-x.
_SERVICE_LINK = re.compile(
    r"TMS_(\w+_)?(SERVICE_HOST=.*|SERVICE_PORT(_\w+)?=.*|PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://\S+"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=.*)"
)
_ORIGIN = re.compile(r"\*|https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?")  # as browsers send one
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_CUDA = re.compile(r"(?:cuda:)?(\d+)|(GPU-[0-9a-fA-F-]+|MIG-[0-9a-zA-Z/-]+)")
_CLIENT = {"TMS_ADDRESS", "TMS_TLS", "TMS_TLS_CA", "TMS_CLIENT_CERT", "TMS_CLIENT_KEY"}  # read by the client
_MODZY_PORT = "PSC_MODEL_PORT"  # Modzy's own name for what is TMS_PORT here
_FLAGS = {"0": False, "false": False, "no": False, "off": False, "1": True, "true": True, "yes": True, "on": True}
Parse = Callable[[str], Any]
"""Makes a value of a text; its ValueError says what is allowed."""


class SettingsError(Exception):
    """A wrong setting; the message names the variable, the value and what is allowed."""


def _number(kind: type[int] | type[float], low: float, high: float = 1_000_000) -> Parse:
    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise ValueError(f"a {'whole ' if kind is int else ''}number from {low} to {high}")

    return parse


def _matching(pattern: str, allowed: str) -> Parse:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(allowed)
        return text

    return parse


def _one_of(*names: str) -> Parse:
    matching = _matching("|".join(names), f"one of {', '.join(names)}")
    return lambda text: matching(text.lower())


_LEVEL = "(?i:debug|info|warning|error)"
_levels = _matching(
    rf"{_LEVEL}(,[^=,\s]+={_LEVEL})*",
    "one of debug, info, warning, error, and may go on with libraries, such as info,urllib3=debug",
)


def _flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ValueError("0 or 1")
    return _FLAGS[text.lower()]


def _port_or_off(text: str) -> int | None:
    return None if text.lower() == "off" else int(_number(int, 0, 65535)(text))


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(name for name in _names(text) if name)
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("origins such as https://app.example.com,http://localhost:3000, or *")
    return origins


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [item.strip().partition("=") for item in text.split(",") if item.strip()]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError("names and folders such as big=net,small=net")
    return tuple((name, folder) for name, _, folder in pairs)


def _json_object(text: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise ValueError('a JSON object such as {"size": 3}')


def parse_devices(text: str) -> tuple[str, ...]:
    """The devices of "auto", "cpu" or "cuda:0,cuda:1" as CUDA_VISIBLE_DEVICES takes them; ValueError for others."""
    names = [name.strip() for name in text.strip("[]()").replace("'", "").split(",") if name.strip()]
    if names in (["auto"], ["cpu"]):
        return ("auto",) if names == ["auto"] else ("",)
    found = [_CUDA.fullmatch(name) for name in names]
    if not found or not all(found):
        raise ValueError('"auto", "cpu", or a list such as "cuda:0,cuda:1"')
    return tuple(match[1] or match[2] for match in found if match)


_socket_mode = _matching("0?[0-7]{3}", "a file's mode in octal, such as 0600 or 0660")
_token = _matching("([!-~]([ -~]*[!-~])?)?", "printable ASCII without spaces around it, as it is sent in a header")
_port = _number(int, 0, 65535)
_count = _number(int, 1, 1 << 31)
_count_or_0 = _number(int, 0, 1 << 31)
_seconds = _number(float, 0)


def _env(default: Any, parse: Parse, doc: str) -> Any:
    """A field that a variable of the environment sets; tokens are never shown."""
    return field(default=default, metadata={"parse": parse, "doc": doc}, repr=parse is not _token)


@dataclass(frozen=True)
class Settings:
    """The server's settings; each field is the variable ``TMS_<FIELD>``."""

    host: str = _env("0.0.0.0", lambda text: text.strip("[]"), "address to listen on; [::] for IPv6 too")
    port: int = _env(50000, _port, "gRPC port; 0: any free port")
    http_port: int | None = _env(8080, _port_or_off, "HTTP port; 0: any free port, off: none")
    socket: str = _env("", str, "path of a unix socket to listen on as well")
    socket_mode: str = _env("0600", _socket_mode, "mode of that socket's file; who can connect counts as local")
    allowed_hosts: tuple[str, ...] = _env((), _names, "more host names that HTTP callers on this host may use; *: any")
    cors_origins: tuple[str, ...] = _env((), _origins, "origins whose web pages may run models, or *; none: no others")
    protocols: tuple[str, ...] = _env(
        ("native", "open_inference", "openai"), _names, "protocols that the server speaks"
    )
    models_dir: Path = _env(Path("models"), Path, "folder whose subfolders are the models")
    aliases: tuple[tuple[str, str], ...] = _env((), _pairs, "more models, as name=folder: big=net,small=net")
    max_loaded: int = _env(0, _count_or_0, "most models loaded at once: those used last; 0: no limit")
    log_level: str = _env("info", _levels, "least severe level that is logged; of libraries: info,urllib3=debug")
    log_format: str = _env("text", _one_of("text", "json"), "text, or json: one object a line")
    access_log: bool = _env(False, _flag, "1: logs a line for each call")
    max_message_mb: int = _env(512, _number(int, 1, 2047), "largest request or answer, in MiB")
    max_items: int = _env(100_000, _number(int, 1), "most inputs in one request (texts, images, values, rows)")
    max_inflight_mb: int = _env(0, _count_or_0, "most MiB of all requests in the server; 0: a quarter of the memory")
    threads: int = _env(256, _number(int, 1, 4096), "most calls in the server at once; a quarter from one connection")
    stream_idle_s: float = _env(10.0, _number(float, 0.1), "seconds that a caller may send or read nothing in a call")
    local_transport: bool = _env(True, _flag, "1: clients on this host use a unix socket and shared memory: faster")
    one_core: bool = _env(True, _flag, "1: the main process stays on one core, which is faster; workers use all cores")
    busy_poll_us: int = _env(300, _number(int, 0, 10000), "microseconds to poll before sleeping; not on one core")
    replicas: int = _env(
        1,
        _number(int, 1, 256),
        "servers to start, on ports that follow; they share cores, GPUs and each model's workers",
    )
    replica: int = _env(0, _number(int, 0, 256), "which of them a process is, from 1: the server sets it itself")
    strict: bool = _env(False, _flag, "1: the server stops if a model fails to load at the start")
    lazy: bool = _env(False, _flag, "1: each model is loaded at its first call")
    reload: bool = _env(False, _flag, "1: each model is reloaded when its files change")
    drain_delay_s: float = _env(1.0, _seconds, "seconds that a stopping server accepts calls, while clients leave")
    grace_s: float = _env(30.0, _seconds, "seconds that accepted calls have to finish when the server stops")
    max_image_pixels: int = _env(1 << 27, _count, "largest image file that is decoded, in pixels")
    max_connection_age_s: float = _env(6.0, _number(float, 1), "seconds after which a gRPC client must connect anew")
    tls_cert: Path | None = _env(None, _path, "PEM file of the server's certificate chain; turns TLS on")
    tls_key: Path | None = _env(None, _path, "PEM file of its key")
    tls_client_ca: Path | None = _env(None, _path, "PEM file; only clients with a certificate from it are answered")
    mesh_capacity_mb: int = _env(0, _count_or_0, "ModelMesh: MiB for models; 0: three quarters of the memory")
    mesh_default_mb: int = _env(256, _count, "ModelMesh: MiB assumed for a model that was not measured yet")
    mesh_models_dir: Path | None = _env(
        None, _path, "ModelMesh: its sidecar, on this host, may load what is in this folder, whatever TMS_ADMIN says"
    )
    modzy_model: str = _env("", str, "Modzy: the model that is served, if there are several")
    token: str = _env("", _token, "token that every call must send; health needs none")
    admin: str = _env(
        "local",
        _one_of("local", "host", "token", "off"),
        "who may stop the server and change its models: local (this user and root, on this host), host (every user of "
        "this host), token (who sends TMS_ADMIN_TOKEN), off (nobody)",
    )
    admin_token: str = _env("", _token, "token to stop the server or change its models; if set, everybody needs it")

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ, flags: Mapping[str, str] = {}) -> Settings:
        """Reads the environment; SettingsError for a value that is not allowed or a variable that does not exist.

        ``flags`` are variables that the command line sets; they win, and errors name the flag.
        """
        links = service_links(env)
        old = {new: env[name] for name, new in RENAMED.items() if name in env}
        env = old | {name: value for name, value in env.items() if name not in links and name not in RENAMED}
        env |= flags
        known = {PREFIX + item.name.upper() for item in fields(cls)}
        for name in sorted(env.keys() - known - _CLIENT):
            if name.startswith(PREFIX) and not name.startswith(MODEL_PREFIX):
                wrong = f"{name} is not a setting of the server{suggestion(name, known)}"
                raise SettingsError(f"{wrong}; there are {', '.join(sorted(known))}")
        given = _values(cls, PREFIX, env, flags)
        if "modzy" in given.get("protocols", ()) and _MODZY_PORT in env:
            given.setdefault("port", _parsed(_MODZY_PORT, env[_MODZY_PORT], cls.__dataclass_fields__["port"]))
        settings = cls(**given)
        if settings.replica > settings.replicas:
            raise SettingsError(f"TMS_REPLICA={settings.replica} must be at most TMS_REPLICAS={settings.replicas}")
        return settings

    @property
    def sharing(self) -> int:
        """How many replicas share the machine with this one, itself included."""
        return self.replicas if self.replica else 1

    @property
    def admin_rule(self) -> str:
        """Who may change the server in effect: "local", "host", "token" or "off"."""
        if self.admin == "off" or (self.admin == "token" and not self.admin_token):
            return "off"
        return "token" if self.admin_token else self.admin

    def describe(self) -> str:
        """All settings in one line, for the log at start; secrets only as set or not."""
        shown = {item.name: getattr(self, item.name) for item in fields(self)}
        shown |= {item.name: "(set)" if shown[item.name] else "(unset)" for item in fields(self) if not item.repr}
        return " ".join(f"{PREFIX}{name.upper()}={value}" for name, value in shown.items())


def client_certificate(env: Mapping[str, str] = os.environ) -> tuple[Path, Path] | None:
    """(key, certificate) that the environment names for clients, if it does."""
    key, cert = env.get("TMS_CLIENT_KEY"), env.get("TMS_CLIENT_CERT")
    return (Path(key), Path(cert)) if key and cert else None


@dataclass(frozen=True)
class ModelOptions:
    """A model's options: ``ModelInterface`` documents them, ``TMS_MODEL_<NAME>_<KEY>`` overrides them."""

    max_batch_size: int = _env(1, _number(int, 1, 65536), "most inputs in one batch")
    max_wait_ms: float = _env(0.0, _number(float, 0, 60000), "how long a batch's first input waits for more, in ms")
    workers: int = _env(1, _number(int, 1, 256), "worker processes")
    max_workers: int = _env(0, _number(int, 0, 4096), "on Ray: most worker processes when it scales; 0: workers")
    concurrency: int = _env(1, _number(int, 1, 64), "calls that a worker runs at once")
    timeout_s: float = _env(60.0, _number(float, 0.001), "longest time of one batch")
    load_timeout_s: float = _env(300.0, _number(float, 0.001), "longest time of import, __init__ and warm-up")
    queue_size: int = _env(1024, _count, "most inputs waiting")
    image_mode: str = _env("rgb", _one_of("rgb", "bgr", "gray", "unchanged"), "what image files are decoded to")
    devices: tuple[str, ...] = _env(("auto",), parse_devices, "auto, cpu, or a list such as cuda:0,cuda:1")
    mix_shapes: bool = _env(False, _flag, "1: arrays of different shapes share a batch")
    args: dict[str, Any] = field(
        default_factory=dict, metadata={"parse": _json_object, "doc": "keyword arguments of Model(), as JSON"}
    )

    def declared(self, attributes: Mapping[str, Any]) -> ModelOptions:
        """These options with a model's class attributes as defaults; ValueError names a wrong one."""
        given = {item.name: attributes.get(item.name) for item in fields(self)}
        try:
            return replace(self, **{name: check_option(name, one) for name, one in given.items() if one is not None})
        except ValueError as error:
            raise ValueError(f"class attribute {error}") from None


def check_option(name: str, value: Any) -> Any:
    """The value that this field of ModelOptions gets; ValueError if it may not have it."""
    text = str(int(value) if isinstance(value, bool) else value)
    try:
        return ModelOptions.__dataclass_fields__[name].metadata["parse"](text)
    except ValueError as error:
        raise ValueError(f"{name} = {value!r} must be {error}") from None


def renamed(env: Mapping[str, str] = os.environ) -> list[str]:
    """Warnings for the operator about settings that are given by their old names."""
    old = sorted(RENAMED.keys() & env.keys())
    return [f"{name} is called {RENAMED[name]} now; the old name works until the next version" for name in old]


def service_links(env: Mapping[str, str] = os.environ) -> list[str]:
    """The ``TMS_*`` variables that Kubernetes has set for Services with such names; they are not settings."""
    return sorted(name for name, value in env.items() if _SERVICE_LINK.fullmatch(f"{name}={value}"))


def model_overrides(name: str, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options that the environment sets for a model; SettingsError for a value that is not allowed."""
    return _values(ModelOptions, model_prefix(name), env)


def check_overrides(names: Sequence[str], protocols: Sequence[str], env: Mapping[str, str] = os.environ) -> None:
    """SettingsError if no model of these names reads a ``TMS_MODEL_*`` variable; ModelMesh names its models later."""
    options = [item.name.upper() for item in fields(ModelOptions)]
    read = {model_prefix(name) + option for name in names for option in options}
    known = f"the models are {', '.join(names) or 'none'}, their options {', '.join(options)}"
    for stray in sorted(env.keys() - read - {*service_links(env)}):
        if stray.startswith(MODEL_PREFIX):
            problem = f"{stray} sets nothing{suggestion(stray, read)}; {known}"
            if "model_mesh" not in protocols:
                raise SettingsError(problem)
            log.warning(problem)


def model_prefix(name: str) -> str:
    """TMS_MODEL_MY_NET_ for a model called my-net."""
    return f"{MODEL_PREFIX}{re.sub(r'[^A-Z0-9]', '_', name.upper())}_"


def name_problem(name: str) -> str:
    """Why a model folder cannot have this name; "" if it can."""
    right = "a model's name is a letter from a to z, then up to 63 of them, digits, _ and -"
    return "" if _NAME.fullmatch(name) else right


def flag_of(variable: str) -> str:
    """--http-port for TMS_HTTP_PORT."""
    return "--" + variable.removeprefix(PREFIX).lower().replace("_", "-")


def default_text(item: Field[Any]) -> str:
    """The default of a field as a variable would set it; "" if it is empty."""
    value = {} if item.default is MISSING else item.default
    if isinstance(value, tuple):
        value = ",".join(value)
    return str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)


def _values(cls: Any, prefix: str, env: Mapping[str, str], flags: Mapping[str, str] = {}) -> dict[str, Any]:
    """The values of those fields of a dataclass that the environment sets."""
    found = {prefix + item.name.upper(): item for item in fields(cls) if prefix + item.name.upper() in env}
    return {
        item.name: _parsed(flag_of(name) if name in flags else name, env[name], item) for name, item in found.items()
    }


def _parsed(variable: str, text: str, item: Field[Any]) -> Any:
    try:
        return item.metadata["parse"](text)
    except ValueError as error:
        shown = f"{variable}={text!r}" if item.repr else variable
        raise SettingsError(f"{shown} must be {error}") from None
