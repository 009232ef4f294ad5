"""The command line: its commands, and a flag beside every setting."""

import argparse
import logging
import signal
import sys
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path

from tiny_model_server import __version__, logs, replicas, scaffold
from tiny_model_server.errors import suggestion
from tiny_model_server.settings import PREFIX, Settings, SettingsError, default_text, flag_of, renamed

log = logging.getLogger("tiny_model_server")

_GROUPS = {
    "host": "where it listens",
    "protocols": "what it serves",
    "log_level": "log",
    "max_message_mb": "limits",
    "local_transport": "speed",
    "strict": "start, change and stop",
    "max_image_pixels": "limits",
    "tls_cert": "security",
    "mesh_capacity_mb": "orchestrators",
    "token": "security",
}
"""The settings with which a group begins in the help."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 good, 1 a model failed, 2 a wrong setting or argument."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    flags = {name: value for name, value in vars(options).items() if name.startswith(PREFIX)}
    try:
        settings = Settings.from_env(flags=flags)
        if options.command == "check" and settings.log_level.lower() == "info":  # its lines are the report
            settings = replace(settings, log_level="warning")
        logs.configure(settings.log_level, settings.log_format, access_log=settings.access_log)
        for warning in renamed():
            log.warning(warning)
        return _run(settings, options)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # of a command; a server stops by itself
        return 128 + signal.SIGINT


def program() -> str:
    """How the user has called this program, for messages that say what to call next."""
    ways = {"server.py": "python server.py", "__main__.py": "python -m tiny_model_server"}
    return ways.get(Path(sys.argv[0]).name, "tiny-model-server")


def _run(settings: Settings, options: argparse.Namespace) -> int:
    if options.command == "serve" and settings.replicas > 1 and not settings.replica:
        return replicas.supervise(settings)
    from tiny_model_server import checks, serve  # they need much memory, and the supervisor needs neither

    match options.command:
        case "check":
            return checks.check_models(settings, options.target)
        case "list":
            return checks.list_models(settings)
        case "health":
            return checks.health(settings)
        case "new":
            return scaffold.new_model(settings.models_dir, options.name, options.kind, program())
        case "dockerfile":
            return scaffold.dockerfile(settings.models_dir, options.wheel)
        case "proto":
            return scaffold.proto()
        case _:
            return serve.serve(settings)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options; the command is ``serve`` if the arguments begin with none."""
    first = arguments[0] if arguments else ""
    if first[:1] in ("", "-") and first not in ("-h", "--help", "--version"):
        arguments = ["serve", *arguments]
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag_of(PREFIX + item.name) for item in fields(Settings)]
        hint = suggestion(unknown[0].partition("=")[0], ["--models", *flags])
        parser.error(f"unknown: {unknown[0]}{hint}; see {program()} {options.command} --help")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Serves every model folder by gRPC and HTTP.",
        epilog=f"{program()} serve --help lists all settings. {program()} new NAME makes a first model.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, does: str, *shown: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        _add_flags(command, shown)
        return command

    server = add("serve", "load every model and serve (what happens without a command)", *Settings.__dataclass_fields__)
    server.usage = f"{program()} [serve] [--SETTING VALUE ...]"
    server.epilog = (
        "A flag wins over the environment variable of its name: --http-port over TMS_HTTP_PORT. "
        "Tokens belong into the environment, because all users of the host can read flags."
    )
    check = add("check", "load, warm up and run models without serving, and print a line for each", "models_dir")
    check.add_argument("target", nargs="*", help="a model's name, or the path of its folder; none: all models")
    add("list", "print the models that are found", "models_dir")
    add("health", "exit with 0 if the server on this host has all its models ready", "host", "port", "socket")
    new = add("new", "make the folder of a new model, which `check` passes at once", "models_dir")
    new.add_argument("name", help="the name of the model and of its folder")
    new.add_argument("--kind", choices=scaffold.kinds(), default="text", help="what the model begins as (text)")
    docker = add("dockerfile", "print a Dockerfile for the models folder", "models_dir")
    docker.add_argument("--wheel", type=Path, help="a wheel of the server to install instead of the released one")
    add("proto", "print server.proto, the contract of the server's own gRPC calls")
    return parser


def _add_flags(parser: argparse.ArgumentParser, shown: Collection[str]) -> None:
    """Adds a flag for each setting. The help lists those of ``shown``."""
    title, groups = "", {}
    for item in fields(Settings):
        if (title := _GROUPS.get(item.name, title)) not in groups:
            groups[title] = parser.add_argument_group(title)
        variable = PREFIX + item.name.upper()
        default = f" ({text})" if (text := default_text(item)) else ""
        flag = isinstance(item.default, bool)
        groups[title].add_argument(
            *(["--models"] if item.name == "models_dir" else []),
            flag_of(variable),
            dest=variable,
            metavar="0|1" if flag else "VALUE",
            default=argparse.SUPPRESS,
            nargs="?" if flag else None,
            const="1" if flag else None,
            help=item.metadata["doc"] + default if item.name in shown else argparse.SUPPRESS,
        )
