"""All settings, frozen and checked; the only reader of the environment (``TMS_*``)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

PREFIX = "TMS_"
MODEL_PREFIX = "TMS_MODEL_"
RENAMED = {"TMS_DOORS": "TMS_PROTOCOLS", "TMS_LANE": "TMS_LOCAL_TRANSPORT", "TMS_AWAKE_US": "TMS_BUSY_POLL_US"}
"""Old names of settings, which work until the next version."""
_LONGEST_S = 1_000_000  # eleven days: more than that the system's calls do not take
# What Kubernetes sets in a pod for each Service of its namespace; one may be called tms, tms-http or tms-model-x.
_SERVICE_LINK = re.compile(
    r"TMS_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_PORT = re.compile(r"(?:tcp|udp|sctp)://\S+")
_CUDA = re.compile(r"(?:cuda:)?(\d+)|(GPU-[0-9a-fA-F-]+|MIG-[0-9a-zA-Z/-]+)")
_MODZY_PORT = "PSC_MODEL_PORT"  # Modzy's own name for what is TMS_PORT here
Check = Callable[[str], Any]


class SettingsError(Exception):
    """A wrong setting; the message names the variable, the value and what is allowed."""


def _number(kind: type[int] | type[float], low: float, high: float = float("inf")) -> Check:
    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low - 1)
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} from {low} to {high}" if high < float("inf") else f"{name}, at least {low}")
        return value

    return check


def _seconds(low: float) -> Check:
    return _number(float, low, _LONGEST_S)


def _flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
        raise ValueError("0 or 1")
    return text.lower() in ("1", "true", "yes", "on")


def _one_of(*allowed: str) -> Check:
    def check(text: str) -> str:
        for value in allowed:
            if text.lower() == value.lower():
                return value
        raise ValueError(f"one of {', '.join(allowed)}")

    return check


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [item.strip().partition("=") for item in text.split(",") if item.strip()]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError("names and folders such as big=net,small=net")
    return tuple((name, folder) for name, _, folder in pairs)


def _port_or_off(text: str) -> int | None:
    return None if text.lower() == "off" else int(_number(int, 0, 65535)(text))


def _folder(text: str) -> Path | None:
    return Path(text) if text else None


def _mode(text: str) -> str:
    if not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError("a file's mode in octal, such as 0600 or 0660")
    return text


def _token(text: str) -> str:
    if text != text.strip() or any(not " " <= character <= "~" for character in text):
        raise ValueError("printable ASCII without spaces around it, as it travels in a header")
    return text


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError('a JSON object such as {"size": 3}')
    return value


def parse_devices(text: str) -> tuple[str, ...]:
    """The devices of "auto", "cpu" or "cuda:0,cuda:1" as CUDA_VISIBLE_DEVICES takes them; ValueError says what is."""
    if text == "auto":
        return ("auto",)
    names = [name.strip() for name in text.strip("[]()").replace("'", "").split(",") if name.strip()]
    if names == ["cpu"]:
        return ("",)
    found = [_CUDA.fullmatch(name) for name in names]
    if not found or not all(found):
        raise ValueError('"auto", "cpu", or a list such as "cuda:0,cuda:1"')
    return tuple(match[1] or match[2] for match in found if match)


def _setting(default: Any, check: Check, doc: str, secret: bool = False) -> Any:
    return field(default=default, metadata={"check": check, "doc": doc, "secret": secret}, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """The server's settings; each field is the variable ``TMS_<FIELD>``."""

    host: str = _setting("0.0.0.0", str, "address to listen on; [::] for IPv6 too")
    port: int = _setting(50000, _number(int, 0, 65535), "gRPC port; 0 takes a free one")
    http_port: int | None = _setting(8080, _port_or_off, "HTTP port; 0 takes a free one, off opens none")
    socket: str = _setting("", str, "path of a unix socket to listen on as well")
    socket_mode: str = _setting("0600", _mode, "mode of its file: who may connect, and so counts as a local caller")
    allowed_hosts: tuple[str, ...] = _setting(
        (),
        _names,
        "more names by which this host's callers may ask the HTTP port, as a proxy that keeps Host does; *: any",
    )
    protocols: tuple[str, ...] = _setting(
        ("native", "open_inference"), _names, "protocols that are answered on the gRPC port"
    )
    models_dir: Path = _setting(Path("models"), Path, "folder whose subfolders are the models")
    aliases: tuple[tuple[str, str], ...] = _setting(
        (), _pairs, "more names for folders, each a model of its own with settings of its own: big=net,small=net"
    )
    max_loaded: int = _setting(
        0, _number(int, 0), "most models loaded at once; for one more, the least recently used is unloaded; 0: no limit"
    )
    log_level: str = _setting("info", _one_of("debug", "info", "warning", "error"), "least severe level that is logged")
    log_format: str = _setting("text", _one_of("text", "json"), "text, or one JSON object a line")
    max_message_mb: int = _setting(512, _number(int, 1, 2047), "largest request or answer, in MiB")
    max_items: int = _setting(
        100_000, _number(int, 1, 1_000_000), "most items (texts, images, values, rows) in one request"
    )
    max_inflight_mb: int = _setting(
        0,
        _number(int, 0),
        "most MiB of requests in the server at once; more is refused; 0: a quarter of the memory that it may use",
    )
    threads: int = _setting(
        256,
        _number(int, 1, 4096),
        "calls in the server at once; one more is refused, and so is more than a quarter on one connection",
    )
    stream_idle_s: float = _setting(
        10.0, _number(float, 0.1), "seconds after which a call is ended if its caller sends nothing or reads nothing"
    )
    local_transport: bool = _setting(
        True, _flag, "1: clients on this host send by unix socket and shared memory, which is faster"
    )
    one_core: bool = _setting(True, _flag, "1: the gRPC process keeps to one core, which is faster; workers use all")
    busy_poll_us: int = _setting(
        300,
        _number(int, 0, 10000),
        "microseconds that the gRPC process stays awake where waits mostly are shorter: small calls take a quarter "
        "less, and some CPU more; on one core it never does",
    )
    strict: bool = _setting(False, _flag, "1: a model that fails to load stops the start")
    lazy: bool = _setting(False, _flag, "1: a model is loaded at its first call")
    reload: bool = _setting(False, _flag, "1: a model is reloaded when its files change")
    drain_delay_s: float = _setting(
        1.0,
        _seconds(0),
        "seconds between NOT_SERVING and refusing calls when stopping, for clients to leave",
    )
    grace_s: float = _setting(30.0, _seconds(0), "seconds that accepted calls have to finish when stopping")
    max_image_pixels: int = _setting(1 << 27, _number(int, 1), "largest encoded image that is decoded, in pixels")
    max_connection_age_s: float = _setting(
        6.0,
        _seconds(1),
        "seconds after which a connection is renewed, so that clients find new replicas",
    )
    tls_cert: Path | None = _setting(None, Path, "PEM file of the server's certificate chain; turns TLS on")
    tls_key: Path | None = _setting(None, Path, "PEM file of its key")
    tls_client_ca: Path | None = _setting(None, Path, "PEM file: only clients with a certificate from it are answered")
    mesh_capacity_mb: int = _setting(
        0, _number(int, 0), "ModelMesh: memory for models, in MiB; 0: three quarters of the machine's or container's"
    )
    mesh_default_mb: int = _setting(256, _number(int, 1), "ModelMesh: a model's size until it was measured, in MiB")
    mesh_models_dir: Path | None = _setting(
        None, _folder, "ModelMesh: its sidecar, on this host, may load what is in this folder, whatever TMS_ADMIN says"
    )
    modzy_model: str = _setting("", str, "Modzy: the model that is served, where there are several")
    token: str = _setting("", _token, "token that every call must bring; health needs none", secret=True)
    admin: str = _setting(
        "local",
        _one_of("local", "host", "token", "off"),
        "who may stop the server and change its models: local (this user and root, on this host), host (every user of "
        "this host), token (who sends TMS_ADMIN_TOKEN), off (nobody)",
    )
    admin_token: str = _setting(
        "", _token, "token for stopping the server and changing its models; if set, everybody needs it", secret=True
    )

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Reads the environment; SettingsError for a value that is not allowed or a variable that does not exist."""
        links = service_links(env)
        old = {RENAMED[name]: value for name, value in env.items() if name in RENAMED}
        env = old | {name: value for name, value in env.items() if name not in links and name not in RENAMED}
        known = {PREFIX + item.name.upper(): item for item in fields(cls)}
        for name in env:
            if name.startswith(PREFIX) and not name.startswith(MODEL_PREFIX) and name not in known | _ELSEWHERE:
                raise SettingsError(f"{name} is no setting of the server; there are {', '.join(sorted(known))}")
        given = {item.name: _checked(name, env[name], item) for name, item in known.items() if name in env}
        if "modzy" in given.get("protocols", ()) and _MODZY_PORT in env:
            given.setdefault("port", _checked(_MODZY_PORT, env[_MODZY_PORT], known["TMS_PORT"]))
        return cls(**given)

    @property
    def admin_rule(self) -> str:
        """Who may change the server in effect: "local", "host", "token" or "off"."""
        if self.admin == "off" or (self.admin == "token" and not self.admin_token):
            return "off"
        return "token" if self.admin_token else self.admin

    def describe(self) -> str:
        """All settings in one line, for the log at start; secrets only as set or not."""
        hidden = {item.name for item in fields(self) if item.metadata["secret"]}
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return " ".join(
            f"{PREFIX}{name.upper()}={('(set)' if value else '(unset)') if name in hidden else value}"
            for name, value in values.items()
        )


# Read by the client, and allowed to stand in the same environment.
_ELSEWHERE = dict.fromkeys(["TMS_ADDRESS", "TMS_TLS", "TMS_TLS_CA", "TMS_CLIENT_CERT", "TMS_CLIENT_KEY"])


def client_certificate(env: Mapping[str, str] = os.environ) -> tuple[Path, Path] | None:
    """(key, certificate) that the environment names for clients, if it does."""
    key, cert = env.get("TMS_CLIENT_KEY"), env.get("TMS_CLIENT_CERT")
    return (Path(key), Path(cert)) if key and cert else None


@dataclass(frozen=True)
class ModelOptions:
    """What ``ModelInterface`` documents as class attributes, after ``TMS_MODEL_<NAME>_<KEY>`` had its say."""

    max_batch_size: int = _setting(1, _number(int, 1, 65536), "most items in one batch")
    max_wait_ms: float = _setting(0.0, _number(float, 0, 60000), "how long a batch may wait for company")
    workers: int = _setting(1, _number(int, 1, 256), "worker processes")
    max_workers: int = _setting(0, _number(int, 0, 4096), "on Ray: most worker processes when it scales; 0: workers")
    concurrency: int = _setting(1, _number(int, 1, 64), "threads in a worker that call run at once")
    timeout_s: float = _setting(60.0, _seconds(0.001), "longest time of one batch")
    load_timeout_s: float = _setting(300.0, _seconds(0.001), "longest time of import, __init__ and warm-up")
    queue_size: int = _setting(1024, _number(int, 1), "most items waiting")
    image_mode: str = _setting("rgb", _one_of("rgb", "bgr", "gray", "unchanged"), "what encoded images decode to")
    devices: tuple[str, ...] = _setting(("auto",), parse_devices, "auto, cpu, or a list such as cuda:0,cuda:1")
    mix_shapes: bool = _setting(False, _flag, "1: arrays of different shapes share a batch")
    args: dict[str, Any] = field(
        default_factory=dict,
        metadata={"check": _json_object, "doc": "keyword arguments of Model(), as JSON", "secret": False},
    )

    def declared(self, attributes: Mapping[str, Any]) -> ModelOptions:
        """These options with a plug-in's class attributes as defaults; ValueError names a wrong one."""
        changes = {}
        for item in fields(self):
            value = attributes.get(item.name)
            if value is None:
                continue
            try:
                changes[item.name] = item.metadata["check"](str(int(value) if isinstance(value, bool) else value))
            except ValueError as error:
                raise ValueError(f"class attribute {item.name} = {value!r} must be {error}") from None
        return replace(self, **changes)

    def with_overrides(self, overrides: Mapping[str, Any]) -> ModelOptions:
        """These options with values from ``model_overrides`` instead; ValueError names a wrong one."""
        for name, value in overrides.items():
            check_option(name, value)
        return replace(self, **overrides)


def check_option(name: str, value: Any) -> None:
    """ValueError unless this field of ModelOptions may have this value, wherever it comes from."""
    (item,) = (item for item in fields(ModelOptions) if item.name == name)
    if isinstance(value, (tuple, dict)):
        return  # devices and args, which come parsed
    try:
        item.metadata["check"](str(int(value) if isinstance(value, bool) else value))
    except ValueError as error:
        raise ValueError(f"{name} = {value!r} must be {error}") from None


def renamed(env: Mapping[str, str] = os.environ) -> list[str]:
    """What to tell the operator about settings that are given by their old names."""
    old = sorted(RENAMED.keys() & env.keys())
    return [f"{name} is called {RENAMED[name]} now; the old name works until the next version" for name in old]


def service_links(env: Mapping[str, str] = os.environ) -> list[str]:
    """The ``TMS_*`` variables that Kubernetes has set for Services with such names, which are no settings."""
    return sorted(
        name
        for name, value in env.items()
        if _SERVICE_LINK.fullmatch(name)
        or (name.startswith(PREFIX) and name.endswith("_PORT") and _SERVICE_PORT.fullmatch(value))
    )


def model_overrides(name: str, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options that the environment sets for a model; SettingsError for a value that is not allowed."""
    prefix = model_prefix(name)
    options = {prefix + item.name.upper(): item for item in fields(ModelOptions)}
    return {item.name: _checked(variable, env[variable], item) for variable, item in options.items() if variable in env}


def stray_overrides(names: list[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """The ``TMS_MODEL_*`` variables that no model of these names reads: misspelt, most likely."""
    keys = [item.name.upper() for item in fields(ModelOptions)]
    read = {model_prefix(name) + key for name in names for key in keys}
    read.update(service_links(env))
    return sorted(variable for variable in env if variable.startswith(MODEL_PREFIX) and variable not in read)


def model_prefix(name: str) -> str:
    """TMS_MODEL_MY_NET_ for a model called my-net."""
    return f"{MODEL_PREFIX}{re.sub(r'[^A-Z0-9]', '_', name.upper())}_"


def _checked(variable: str, text: str, item: Field[Any]) -> Any:
    try:
        return item.metadata["check"](text)
    except ValueError as error:
        shown = variable if item.metadata["secret"] else f"{variable}={text!r}"
        raise SettingsError(f"{shown} must be {error}") from None
