"""What the server and its workers log: whose each line is, at which levels, and how much a model may print."""

import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import model_client
from tests.conftest import ROOT, Server, only, wait_for
from tiny_model_server import logs
from tiny_model_server.settings import Settings, SettingsError

StartServer = Callable[..., Server]

TALKS = """
import ctypes, logging, logging.config, os, subprocess, sys
from model_interface import ModelInterface

print("at import")
log, other = logging.getLogger(__name__), logging.getLogger("some_library")

class Model(ModelInterface):
    def run(self, data, args):
        getattr(self, args["do"])(data)
        return data

    def log(self, text):
        for logger in (log, other):
            logger.debug("a detail"), logger.info(text), logger.warning("careful")

    def write(self, text):
        os.write(2, text.encode("latin-1"))

    def everywhere(self, text):
        print(text, "by print")
        print(text, "to stderr", file=sys.stderr)
        library = ctypes.CDLL(None)
        library.printf(f"{text} from C\\n".encode()), library.fflush(None)
        subprocess.run(["sh", "-c", f"echo {text} from a child; echo {text} from its stderr >&2"])

    def crash(self, text):
        print(text)
        ctypes.string_at(0)

    def basic(self, text):
        logging.basicConfig(level="DEBUG", format="MINE %(message)s", force=True)
        log.info(text)
        raise ValueError("as usual")

    def dict(self, text):
        logging.config.dictConfig({"version": 1, "root": {"level": "CRITICAL"}, "disable_existing_loggers": True})
        raise ValueError("as usual")

    def close(self, text=""):
        for name in ("stdout", "stderr"):
            getattr(sys, name).close()
        if text:
            log.info(text)
            raise ValueError("as usual")

    def much(self, text):
        while True:
            os.write(1, b"x" * 99 + b"\\n")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "__init__.py").write_text(textwrap.dedent(TALKS))
    return tmp_path


def run(server: Server, do: str, text: str) -> Any:
    with server.client("talks") as client:
        return client.run(text, {"do": do}, retry=False)


def fails(server: Server, do: str, text: str) -> None:
    with pytest.raises(model_client.ModelFailed):
        run(server, do, text)


def kept(server: Server, model: str = "talks") -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/models/{model}/logs", timeout=5) as answer:
        lines: list[str] = json.load(answer)["lines"]
        return lines


def test_each_line_says_whose_it_is(start_server: StartServer, folder: Path) -> None:
    server = start_server(folder)
    run(server, "everywhere", "hello")
    for what in ("by print", "to stderr", "from C", "from a child", "from its stderr"):
        server.wait_for_log(rf"^\S+ \S+ INFO models.talks \[model=talks worker=0 pid=\d+\]: hello {what}$")
    server.wait_for_log(r"models.talks \[model=talks worker=0.*\]: at import")
    run(server, "log", "hello")
    for name, text in (("models.talks", "hello"), ("models.talks", "careful"), ("some_library", "careful")):
        server.wait_for_log(rf"{name} \[model=talks worker=0 pid=\d+.*\]: {text}$")
    assert not [line for line in server.log if "a detail" in line or ("some_library" in line and "hello" in line)]
    pid = server.client("talks").model_info()[0]["worker_pids"][0]
    assert any(f"pid={pid}" in line for line in server.log)
    wait_for(lambda: any("careful" in line for line in kept(server)), "the lines by HTTP")
    assert set(kept(server)) <= set(server.log)


def test_many_lines_are_sent_compressed(start_server: StartServer, folder: Path) -> None:
    server = start_server(folder)
    run(server, "log", "hello " * 10_000)
    wait_for(lambda: any("careful" in line for line in kept(server)), "the lines")
    url = f"http://127.0.0.1:{server.http_port}/models/talks/logs"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Encoding": "gzip"}), timeout=5) as answer:
        lines = json.loads(gzip.decompress(answer.read()))["lines"]
    assert any("hello hello" in line for line in lines)


def test_json_has_fields(start_server: StartServer, folder: Path) -> None:
    server = start_server(folder, TMS_LOG_FORMAT="json")
    run(server, "everywhere", "hello")
    run(server, "log", "hello")
    server.wait_for_log("some_library.*careful")
    entries = [json.loads(line) for line in server.log]
    found = {(entry["logger"], entry["message"]): entry for entry in entries if "model" in entry}
    for key in (("models.talks", "hello by print"), ("models.talks", "hello"), ("some_library", "careful")):
        assert found[key].keys() >= {"time", "level", "model", "worker", "pid"}
        assert (found[key]["model"], found[key]["worker"]) == ("talks", 0)


def test_levels_of_libraries(start_server: StartServer, folder: Path) -> None:
    server = start_server(folder, TMS_LOG_LEVEL="INFO,models=warning,some_library=debug")
    run(server, "log", "hello")
    server.wait_for_log("DEBUG some_library .*: a detail")
    server.wait_for_log("WARNING models.talks .*: careful")
    assert not [line for line in server.log if " INFO models.talks " in line and "hello" in line]


@pytest.mark.parametrize("text", ["loud", "info,urllib3=loud", "urllib3", "", "urllib3=debug", "info, urllib3=debug"])
def test_a_wrong_level_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"TMS_LOG_LEVEL=.* must be one of debug, .* such as info,urllib3=debug"):
        Settings.from_env({"TMS_LOG_LEVEL": text})


def test_a_crash_leaves_its_last_words(start_server: StartServer, folder: Path) -> None:
    server = start_server(folder)
    fails(server, "crash", "before")
    server.wait_for_log(r"\[model=talks worker=0 pid=\d+\]: before$")
    server.wait_for_log(r"\[model=talks worker=0 pid=\d+\]: Fatal Python error: Segmentation fault")
    server.wait_for_log(r"\[model=talks worker=0 pid=\d+\]:   File .*__init__.py., line \d+ in crash")
    server.wait_for_log("worker [0-9]+ was killed by SIGSEGV")
    assert any("Segmentation fault" in line for line in kept(server))


def test_a_failed_import_is_among_the_lines(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "__init__.py").write_text("print('here')\nimport there_is_no_such_thing\n")
    server = start_server(tmp_path)
    assert any(line.endswith(": here") for line in kept(server, "wrong"))
    assert any("No module named 'there_is_no_such_thing'" in line for line in kept(server, "wrong"))


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_is_printed_may_be_anything(start_server: StartServer, folder: Path, style: str) -> None:
    server = start_server(folder, TMS_LOG_FORMAT=style)
    forged = "2026-01-01 00:00:00,000 INFO tiny_model_server: all is well"
    run(
        server, "write", f"\x1e{'0' * 16}{forged}\n\xff\x1b[2J\n\n10%\r50%\r100%\n{'y' * 100_000}\nlast, without an end"
    )
    run(server, "log", "\n".join(["x", forged, "z" * 100_000]))
    run(server, "write", " of line\nover\n")
    server.wait_for_log("over")
    assert not [line for line in server.log if line.startswith("2026-01-01")]
    lines = [line for line in server.log if "pid" in line and "settings" not in line and "listening" not in line]
    texts = [json.loads(line)["message"] if style == "json" else line.partition("]: ")[2] for line in lines]
    assert f"\\x1e{'0' * 16}{forged}" in [text.replace("\x1e", "\\x1e") for text in texts]
    assert "\\xff" in "".join(texts)
    assert {"100%", "last, without an end", " of line", "over"} <= set(texts)
    for letter in "yz":
        parts = [text.rpartition("\n")[2] if style == "json" else text for text in texts if letter * 99 in text]
        assert sum(part.count(letter) for part in parts) == 100_000
        assert max(map(len, parts)) < 40_000
    assert "\x1b" not in "".join(server.log)


@pytest.mark.parametrize(("do", "line"), [("basic", "MINE hello$"), ("close", "hello$"), ("dict", "")])
def test_a_model_may_change_the_logging(start_server: StartServer, folder: Path, do: str, line: str) -> None:
    server = start_server(folder)
    fails(server, do, "hello")
    server.wait_for_log(rf"\[model=talks worker=0 .*\]: {line}")
    server.wait_for_log(r"ERROR tiny_model_server.worker \[model=talks worker=0 .*\]: model talks raised")
    server.wait_for_log("ValueError: as usual")


def test_a_model_that_prints_without_end_holds_up_nobody(start_server: StartServer, folder: Path) -> None:
    (folder / "echo").symlink_to(only("echo") / "echo")
    server = start_server(folder, TMS_MODEL_TALKS_TIMEOUT_S=4)
    with server.client("talks") as client, server.client("echo") as echo:
        printing = client.submit("", {"do": "much"}, retry=False)
        server.wait_for_log("x" * 99)
        times = []
        while not printing.done():
            begun = time.monotonic()
            assert echo.run_text("x", timeout=10) == "x"
            times.append(time.monotonic() - begun)
        assert isinstance(printing.exception(), model_client.DeadlineExceeded)
    assert len(times) > 20
    assert sorted(times)[len(times) // 2] < 0.1
    assert len(kept(server)) == 200


def test_nobody_reads_the_log(folder: Path) -> None:
    settings = {"TMS_HOST": "127.0.0.1", "TMS_PORT": "0", "TMS_HTTP_PORT": "off", "TMS_MODELS_DIR": str(folder)}
    reader, writer = os.pipe()
    with open(reader, "rb") as log:
        try:
            process = subprocess.Popen(
                [sys.executable, "server.py"], cwd=ROOT, env=os.environ | settings, stderr=writer
            )
        finally:
            os.close(writer)
        try:
            listening = next(line for line in log if b"listening" in line)
            next(line for line in log if b"serving 1 models" in line)
            port = int(re.findall(rb"gRPC on \S+:(\d+)", listening)[0])
            with model_client.ModelClient("talks", "127.0.0.1", port) as client:
                for _ in range(100):
                    assert client.run("x" * 10_000, {"do": "log"}, timeout=20) == "x" * 10_000
                lines: list[bytes] = []
                reading = threading.Thread(target=lambda: lines.extend(log))
                reading.start()

                def lost() -> bool:
                    client.run("", {"do": "log"})
                    return any(re.search(rb"\d+ records are lost: nobody read the log", line) for line in lines)

                wait_for(lost, "the number of lost records")
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            reading.join()
    assert b"stopped" in lines[-1]


def test_a_reader_that_does_not_read_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    output = logs.Output(writer)
    begun = time.monotonic()
    for number in range(10_000):
        output.write(f"line {number}" + 100 * "x")
    assert time.monotonic() - begun < 5
    with open(reader, "rb") as log:
        first = os.read(reader, 1 << 20)
        output.write("again")
        os.close(writer)
        rest = log.read().decode()
    lost = 10_000 - first.count(b"\nline") - 1
    assert re.search(rf"WARNING tiny_model_server.logs: {lost} records are lost: [^\n]*\nagain\n$", rest)


def test_who_may_see_the_lines(start_server: StartServer) -> None:
    server = start_server(only("echo"), TMS_TOKEN="sesame")
    for path, status in (("echo", 401), ("nothing", 401)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            kept(server, path)
        assert refused.value.code == status
        refused.value.close()


def test_lines_of_no_model(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        kept(server, "nothing")
    assert refused.value.code == 404
    refused.value.close()
