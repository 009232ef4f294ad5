"""Starting, checking, listing, stopping; broken plug-ins; wrong settings."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import model_client
from tests import settings_table
from tests.conftest import MODELS, ROOT, Server, only, shared_memory, wait_for
from tests.test_faults import ANSWERS, write_model
from tiny_model_server.settings import RENAMED, ModelOptions, Settings, SettingsError, model_overrides, renamed

BROKEN = ROOT / "tests" / "broken_models"
DEFAULTS = {"TMS_MODELS_DIR": MODELS, "TMS_HTTP_PORT": "off", "TMS_HOST": "127.0.0.1", "TMS_PORT": 0}
COMMANDS = """
import contextlib, io, json, os, sys
from tiny_model_server import cli
for line in sys.stdin:
    arguments, settings = json.loads(line)
    os.environ.update(settings)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    for name in settings:
        del os.environ[name]
    print(json.dumps([code, said.getvalue()]), flush=True)
"""
Refuse = Callable[..., str]


def run(*arguments: str, timeout: float = 60, **env: object) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
    settings = DEFAULTS | env
    return subprocess.run(
        [sys.executable, "server.py", *arguments],
        cwd=ROOT,
        env=clean | {key: str(value) for key, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def refuse() -> Iterator[Refuse]:
    """What commands say that are refused with code 2. One process runs them all, for its start takes long."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
    command = [sys.executable, "-c", COMMANDS]
    with subprocess.Popen(
        command, cwd=ROOT, env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin
        assert stdout

        def ask(*arguments: str, **env: object) -> str:
            settings = {name: str(value) for name, value in (DEFAULTS | env).items()}
            print(json.dumps([arguments, settings]), file=stdin, flush=True)
            code, said = json.loads(stdout.readline())
            assert code == 2
            return str(said)

        yield ask
        process.kill()


@pytest.fixture(scope="module")
def broken() -> Any:
    server = Server(models=BROKEN, ready=False, TMS_MODEL_HANGS_ON_IMPORT_LOAD_TIMEOUT_S=3)
    server.wait_for_log(r"serving \d+ models", timeout=60)
    yield server
    server.kill()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("syntax_error", "SyntaxError: invalid syntax"),
        ("needs_package", r"ModuleNotFoundError: .*pip install -r .*needs_package/requirements.txt"),
        ("no_class", r"must define class Model\(ModelInterface\)"),
        ("raises_in_init", "FileNotFoundError: weights.pt"),
        ("exits_on_import", "its worker exited with code 4 while loading"),
        ("hangs_on_import", "took longer than load_timeout_s=3 to load"),
        ("bad name", "a model's name is a letter"),
        ("bad_option", "class attribute max_batch_size = 'many' must be a whole number"),
    ],
)
def test_a_broken_plugin_says_why(broken: Server, name: str, reason: str) -> None:
    with pytest.raises(model_client.ModelUnavailable, match=f"(?s)model '{name}' could not be loaded: .*{reason}"):
        broken.client(name).run_text("x")
    state = next(model for model in broken.client().list_models() if model["name"] == name)
    assert state["state"] == "FAILED"
    assert "\n" not in state["reason"]
    assert state["reason"] in "\n".join(broken.log)


def test_a_broken_plugin_stops_no_other_and_is_no_unknown_one(broken: Server) -> None:
    assert broken.client("good").run_text("x") == "fine"
    with pytest.raises(model_client.ModelNotFound):
        broken.client("no_init").run_text("x")
    assert any("no_init is not a model folder: it has no __init__.py" in line for line in broken.log)
    status, answer = http(broken, "/readyz")
    assert (status, answer) == (503, {"ready": False})


def test_strict_makes_it_fatal() -> None:
    ran = run(TMS_MODELS_DIR=BROKEN, TMS_STRICT=1, TMS_MODEL_HANGS_ON_IMPORT_LOAD_TIMEOUT_S=1)
    assert ran.returncode == 1
    assert "TMS_STRICT=1: stopping" in ran.stderr


def test_check_and_list() -> None:
    good = run("check", "declares")
    assert good.returncode == 0, good.stderr
    assert re.fullmatch(r"declares  READY  +\d+\.\d s  batch \d+ +no example, so run\(\) was not .*\n", good.stdout)
    checked = run("check", "example", "edges", TMS_MODELS_DIR="models").stdout.splitlines()
    assert [line.split()[:2] for line in checked] == [["example", "READY"], ["edges", "READY"], ["2", "models:"]]
    assert "answers its example with uint8[" in checked[1]
    bad = run("check", "raises_in_init", TMS_MODELS_DIR=BROKEN)
    assert bad.returncode == 1
    assert re.match(r"raises_in_init  FAILED .* FileNotFoundError: weights.pt", bad.stdout)
    assert "FileNotFoundError: weights.pt" in bad.stderr
    listed = run("list", "--models", str(BROKEN))
    assert listed.returncode == 0
    assert "bad name" in listed.stdout
    assert "cannot be loaded: a model's name" in listed.stdout


def test_check_of_all_models_and_of_paths(tmp_path: Path) -> None:
    for name, answer in {"one": "1", "two": "2 / 0"}.items():
        write_model(tmp_path, name, ANSWERS.format("") + f"\n    def run(self, data, args): return {answer}"
                    "\n    example = 1")  # fmt: skip
    checked = run("check", "--models", str(tmp_path))
    assert checked.returncode == 1
    lines = checked.stdout.splitlines()
    assert re.match(r"one  READY .* answers its example with 1$", lines[0])
    assert re.match(r"two  FAILED .* ZeroDivisionError", lines[1])
    assert lines[2] == "2 models: 1 ready, 1 failed"
    for path in (f"{tmp_path}/one/", f"{tmp_path}/one/__init__.py"):
        by_path = run("check", path, TMS_MODELS_DIR="/no/such/folder")
        assert by_path.returncode == 0, by_path.stderr
        assert by_path.stdout.startswith("one  READY")


def test_a_model_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "single.py").write_text("class Model(ModelInterface): pass\n")
    (tmp_path / "other.py").write_text("")
    listed = run("list", "--models", str(tmp_path))
    assert listed.stdout == ""
    assert f"{tmp_path}/single.py is not a model folder: it is a file; move it to single/__init__.py" in listed.stderr
    assert "other" not in listed.stderr


def test_a_pipeline_is_checked_with_its_stages(tmp_path: Path) -> None:
    write_model(tmp_path, "first", ANSWERS.format("done"))
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "__init__.py").write_text(
        "from model_interface import Pipeline\n\n\nclass Model(Pipeline):\n    stages = ['first']\n    example = 'x'\n"
    )
    checked = run("check", "line", "--models", str(tmp_path))
    assert checked.returncode == 0, checked.stderr
    assert "answers its example with 'done'" in checked.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nobody"], "there is no model 'nobody'"),
        (["check", "./no/such"], "there is no folder ./no/such"),
        (["check", "./tests"], "./tests is not a model's folder: it has no __init__.py"),
        (["check", "--models", "docs"], "there is no model in .*/docs; make one: tiny-model-server new NAME"),
        (
            ["check", "--models", "/no/such"],
            "must be a readable folder: .*; make a first model in it: tiny-m",
        ),
        (["--prot", "1"], "unknown: --prot .did you mean '--port'[?].; see .* serve --help"),
        (["chekc"], "invalid choice: 'chekc' .*check"),
        (["--port", "many"], "error: --port='many' must be a whole number from 0 to 65535"),
        (["--strict=maybe"], "error: --strict='maybe' must be 0 or 1"),
        (["serve", "--token", "geheim\u00df"], "error: --token must be printable ASCII"),
        (["new", "9x"], "'9x' cannot be the name of a model: a model's name is a letter"),
        (["new", "x", "--kind", "fortran"], "invalid choice: 'fortran' .*text"),
        (["new", "example", "--models", "models"], "models/example exists already; nothing was changed"),
        (["new", "optical-flow", "--models", "models"], "'optical_flow' has the same settings TMS_MODEL_OPTICAL_FLOW_"),
        (["new", "x", "--models", "README.md"], "README.md.* exists already|Not a directory"),
        (["dockerfile", "--models", "/no/such"], "there is no folder /no/such; make a first model in it"),
        (["dockerfile", "--models", "/usr"], "/usr is not below this folder, in which the image is to be built"),
        (["dockerfile", "--models", "models", "--wheel", "gone.whl"], "there is no wheel gone.whl"),
    ],
)
def test_a_wrong_argument_is_named(refuse: Refuse, arguments: list[str], message: str) -> None:
    said = refuse(*arguments)
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_a_refused_command_ends_its_process() -> None:
    for ran in (run("check", "nobody"), run("--port", "many"), run(TMS_STRICT="maybe"), run(TMS_MODEL_ECHO_ARGS="[]")):
        assert ran.returncode == 2
        assert re.search("^error: |there is no model 'nobody'", ran.stderr, re.M), ran.stderr
        assert "Traceback" not in ran.stderr


def test_the_help_says_where_the_settings_are() -> None:
    assert "python server.py serve --help lists all settings." in " ".join(run("--help").stdout.split())


def test_a_flag_beside_every_setting(start_server: Callable[..., Server]) -> None:
    printed = run("serve", "--help").stdout
    words = " ".join(printed.split())
    for item in fields(Settings):
        assert f"--{item.name.replace('_', '-')} " in words
        assert " ".join(item.metadata["doc"].split()) in words
    command = [sys.executable, "server.py", "--max-items", "7", "--models", str(only("echo")), "--reload", "--lazy=0"]
    server = start_server(MODELS, command=command, TMS_MAX_ITEMS=5, TMS_RELOAD=0)
    server.wait_for_log(f"to try the models: http://127.0.0.1:{server.http_port}/$")
    found = server.wait_for_log("settings: .*").group()
    assert "TMS_MAX_ITEMS=7 " in found
    assert "TMS_RELOAD=True TMS_DRAIN" in found
    assert "TMS_LAZY=False" in found
    server.wait_for_log("serving 1 models")


def test_an_empty_models_folder_is_served_with_a_warning(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server(models=tmp_path)
    server.wait_for_log(f"WARNING .*there is no model in {tmp_path} yet; make one: tiny-model-server new NAME")
    assert server.client().list_models() == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TMS_PORT", "many", "TMS_PORT='many' must be a whole number from 0 to 65535"),
        ("TMS_PORT", "70000", "TMS_PORT='70000' must be"),
        ("TMS_STRICT", "maybe", "must be 0 or 1"),
        ("TMS_LOG_LEVEL", "loud", "must be one of debug, info, warning, error"),
        ("TMS_THREADS", "0", "TMS_THREADS='0' must be"),
        ("TMS_GRACE_S", "nan", "TMS_GRACE_S='nan' must be a number from 0 to 1000000"),
        ("TMS_TOKEN", "geheim\u00df", "error: TMS_TOKEN must be printable ASCII without spaces around"),
        ("TMS_ADMIN_TOKEN", " secret", "must be printable ASCII without spaces around"),
        ("TMS_POTR", "1", "TMS_POTR is not a setting of the server (did you mean 'TMS_PORT'?); there are TMS_ACCESS"),
        ("TMS_MODELS_DIR", "/no/such/folder", "must be a readable folder"),
        ("TMS_MODEL_ECHO_WORKERS", "-1", "TMS_MODEL_ECHO_WORKERS='-1' must be a whole number"),
        ("TMS_MODEL_ECHO_ARGS", "[]", "must be a JSON object"),
        (
            "TMS_MODEL_ECHO_WOKRERS",
            "2",
            "WOKRERS sets nothing (did you mean 'TMS_MODEL_ECHO_WORKERS'?); the models",
        ),
        (
            "TMS_MODEL_ECOH_WORKERS",
            "2",
            "ECOH_WORKERS sets nothing (did you mean 'TMS_MODEL_ECHO_WORKERS'?); the models",
        ),
        ("TMS_MODEL_NOBODY_WORKERS", "2", "TMS_MODEL_NOBODY_WORKERS sets nothing"),
    ],
)
def test_a_wrong_setting_is_named_and_stops_the_start(refuse: Refuse, variable: str, value: str, message: str) -> None:
    said = refuse(**{variable: value})
    assert message in said
    assert "Traceback" not in said


def test_settings_of_a_model_from_outside(start_server: Callable[..., Server]) -> None:
    server = start_server(
        only("declares", "echo", "misbehave"),
        TMS_MODEL_DECLARES_ARGS='{"factor": 10}',
        TMS_MODEL_MISBEHAVE_WORKERS=3,
    )
    assert server.client("declares").run(np.ones((2, 2, 3), np.uint8)) == 10
    client = server.client("misbehave")
    wait_for(lambda: spread(client) == 3, "three workers")


def spread(client: Any) -> int:
    pids = []
    threads = [threading.Thread(target=lambda: pids.append(client.run(1)["pid"])) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(set(pids))


def test_settings_are_frozen_and_all_described() -> None:
    settings = Settings.from_env({"TMS_ADMIN_TOKEN": "secret"})
    assert "secret" not in settings.describe() + repr(settings)
    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc]
    page = (ROOT / "docs" / "settings.md").read_text()
    assert all(table in page for table in settings_table.tables())
    assert model_overrides("my-net", {"TMS_MODEL_MY_NET_WORKERS": "2"}) == {"workers": 2}
    with pytest.raises(SettingsError, match="TMS_MODEL_X_TIMEOUT_S='soon' must be a number"):
        model_overrides("x", {"TMS_MODEL_X_TIMEOUT_S": "soon"})
    with pytest.raises(ValueError, match="class attribute workers = 0"):
        ModelOptions().declared({"workers": 0})


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_of_settings_work(old: str, new: str) -> None:
    value = {"TMS_PROTOCOLS": "native", "TMS_LOCAL_TRANSPORT": "0", "TMS_BUSY_POLL_US": "7"}[new]
    assert Settings.from_env({old: value}) == Settings.from_env({new: value}) != Settings()
    assert Settings.from_env({old: "nonsense", new: value}) == Settings.from_env({new: value})
    assert renamed({old: value, "TMS_PORT": "1"}) == [
        f"{old} is called {new} now; the old name works until the next version"
    ]
    assert f"| `{old}` | `{new}` |" in (ROOT / "docs" / "settings.md").read_text()


def test_an_old_name_is_reported_in_the_log() -> None:
    ran = run("list", TMS_DOORS="native")
    assert ran.returncode == 0
    assert "TMS_DOORS is called TMS_PROTOCOLS now" in ran.stderr


def test_two_servers_on_one_port(server: Server) -> None:
    ran = run(TMS_PORT=server.port)
    assert ran.returncode == 2
    assert f"TMS_PORT={server.port} cannot be listened on: is another server there?" in ran.stderr
    ran = run(TMS_HTTP_PORT=server.http_port)
    assert ran.returncode == 2
    assert f"TMS_HTTP_PORT={server.http_port} cannot be listened on: Address already in use" in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_good_order(start_server: Callable[..., Server], number: signal.Signals) -> None:
    server = start_server(only("misbehave", "worker"))
    workers = psutil.Process(server.process.pid).children(recursive=True)
    assert workers
    client = server.client("misbehave", timeout=10)
    outcome: list[Any] = []
    call = threading.Thread(target=lambda: outcome.append(client.run(1, {"do": "threads"})))
    call.start()
    call.join()
    server.process.send_signal(number)
    assert server.process.wait(10) == 0
    assert outcome[0]["pid"]
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_a_stop_finishes_what_was_accepted(start_server: Callable[..., Server]) -> None:
    server = start_server(only("batches"))
    client = server.client("batches")
    client.run(1)
    outcome: list[Any] = []
    call = threading.Thread(target=lambda: outcome.append(client.run_batch([1, 2], {"sleep": 1})))
    call.start()
    wait_for(lambda: psutil.Process(server.process.pid).num_threads(), "the server")
    threading.Event().wait(0.3)  # the call is on its way, or at work
    assert server.stop() == 0
    call.join()
    assert outcome == [[[1, 2], [2, 2]]]


def test_a_stop_during_the_start(start_server: Callable[..., Server]) -> None:
    server = start_server(models=BROKEN, ready=False)
    server.wait_for_log("model good READY")
    workers = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_kill_minus_nine_of_the_front_leaves_no_worker_and_no_file(start_server: Callable[..., Server]) -> None:
    before = shared_memory()
    server = start_server(only("misbehave", "worker"))
    client = server.client("misbehave", timeout=5)
    workers = psutil.Process(server.process.pid).children(recursive=True)
    call = threading.Thread(target=lambda: pytest.raises(Exception, client.run, 1, {"do": "hang"}))  # noqa: B017
    call.start()
    server.process.kill()
    wait_for(lambda: not any(worker.is_running() for worker in workers), "the workers to go")
    assert shared_memory() <= before
    call.join()


def test_log_as_json(start_server: Callable[..., Server]) -> None:
    server = start_server(only("misbehave"), TMS_LOG_FORMAT="json")
    with pytest.raises(model_client.ModelFailed):
        server.client("misbehave").run(1, {"do": "raise"})
    server.wait_for_log("model misbehave raised")
    entries = [json.loads(line) for line in list(server.log)]
    assert {"time", "level", "logger", "message"} <= set(entries[0])
    assert any("KeyError" in entry.get("exception", "") for entry in entries)


def http(server: Server, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_http(server: Server) -> None:
    assert http(server, "/livez") == (200, {"live": True})
    assert http(server, "/readyz") == (200, {"ready": True})
    states = {model["name"]: (model["state"], model["reason"]) for model in http(server, "/models")[1]["models"]}
    assert states["echo"] == ("READY", "")
    assert http(server, "/nothing")[0] == 404


def test_a_model_with_an_interpreter_of_its_own(start_server: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import sys\nfrom model_interface import ModelInterface\nfrom .part import SAYS\n"
        "class Model(ModelInterface):\n    def run(self, data, args):\n        return [sys.prefix, SAYS]\n"
    )
    (folder / "part.py").write_text("SAYS = 'relative imports work'\n")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", folder / ".venv"], check=True
    )
    packages = next((folder / ".venv").glob("lib/*/site-packages"))
    site = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "tests.pth").write_text(site + "\n")
    server = start_server(models=tmp_path)
    assert server.client("own").run(1) == [str(folder / ".venv"), "relative imports work"]


def test_one_folder_under_several_names(start_server: Callable[..., Server]) -> None:
    """Each name is a model of its own: its workers, its settings, its metrics."""
    server = start_server(
        only("declares"),
        TMS_ALIASES="org/twice=declares, thrice=declares,lost=nowhere",
        TMS_MODEL_ORG_TWICE_ARGS='{"factor": 2}',
        TMS_MODEL_THRICE_ARGS='{"factor": 3}',
    )
    image = np.full((2, 2, 3), 5, np.uint8)
    for name, answer in {"declares": 5, "org/twice": 10, "thrice": 15}.items():
        with server.client(name) as client:
            assert client.run_image(image) == answer
    assert any("model lost FAILED: there is no folder 'nowhere'" in line for line in server.log)
    with pytest.raises(AssertionError, match="TMS_ALIASES='x' must be names and folders such as big=net,small=net"):
        start_server(only("declares"), TMS_ALIASES="x")
