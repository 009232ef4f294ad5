"""A models folder as it is in real life: what is no model, what is half one, what changes and goes."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import model_client
from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import ANSWERS, write_model
from tiny_model_server.engine.repository import discover

NOBODY = 10001


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A models folder with one good model and all that may lie beside it, for a user that is not root."""
    folder = tmp_path / "models"
    write_model(folder, "good", ANSWERS.format("good"))
    (folder / "lost+found").mkdir(mode=0o700)
    (folder / "secret").mkdir(mode=0o700)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "README.md").write_text("a file")
    (folder / "half").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "__pycache__").mkdir()
    (folder / "..2026_01").mkdir()
    write_model(tmp_path / "store", "linked", ANSWERS.format("linked"))
    (folder / "..data").symlink_to(tmp_path / "store")
    (folder / "linked").symlink_to("..data/linked")
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "__init__.py")
    write_model(folder, "link_in", "")
    (folder / "link_in" / "__init__.py").unlink()
    (folder / "link_in" / "__init__.py").symlink_to("gone.py")
    for path in (tmp_path, *tmp_path.parents):
        if path == tmp_path or path.name.startswith(("pytest-", "popen-")):  # which pytest keeps to their owner
            path.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


SKIPPED = ["lost+found", "secret", "dangling", "loop", "half", "pipes", "link_in"]


def test_what_is_not_a_model_is_logged_in_one_line_each(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "server.py"), "list"]
    if not os.geteuid():
        if not shutil.which("setpriv"):
            pytest.skip("root is kept out of nothing, and there is no setpriv to be another user")
        user = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
        (folder / "secret").chmod(0o700)
        command = [*user, *command]
    env = os.environ | {"TMS_MODELS_DIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert [line.split("\t")[0] for line in ran.stdout.splitlines()] == ["good", "linked"]
    lines = ran.stderr.splitlines()
    for name in SKIPPED:
        assert len([line for line in lines if f"/{name} is not a model folder: " in line]) == 1
    assert len(lines) == len(SKIPPED)


def test_the_others_serve(folder: Path, start_server: Callable[..., Server]) -> None:
    write_model(folder, "truncated", "    def run(self, da")
    (folder / "empty").mkdir()
    (folder / "empty" / "__init__.py").touch()
    for name in ("with space", "neue\nzeile", "ünïcode"):
        write_model(folder, name, ANSWERS.format(1))
    write_model(folder, os.fsdecode(b"raw\xff"), ANSWERS.format(1))
    server = start_server(models=folder)
    assert server.client("good").run(1) == "good"
    assert server.client("linked").run(1) == "linked"
    models = {model["name"]: model for model in server.client("good").list_models()}
    failed = {name for name, model in models.items() if model["state"] == "FAILED"}
    assert failed == {"truncated", "empty", "with space", "neue\\nzeile", "ünïcode", "raw\\udcff"}
    assert not any("Traceback" in line and "worker" not in line for line in server.log if "neue" in line)
    for name in ("half", "pipes"):
        (folder / name / "__init__.py").unlink(missing_ok=True)
        write_model(folder, name, ANSWERS.format(name))  # what was half there is whole now
        assert server.client(name).load_model()[0]["state"] == "READY"
        assert server.client(name).run(1) == name


def test_a_folder_that_goes_while_serving_harms_nobody(start_server: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_model(folder, "one", ANSWERS.format("one"))
    write_model(folder, "two", ANSWERS.format("two"))
    server = start_server(models=folder, TMS_RELOAD=1)
    one = server.client("one")
    folder.rename(tmp_path / "away")
    assert one.run(1) == "one"
    assert one.load_model()[0]["state"] == "READY"
    with pytest.raises(model_client.ModelUnavailable, match="the old one continues"):
        one.reload_model()
    assert one.run(1) == "one"
    server.wait_for_log("new models cannot be looked for: ")
    (tmp_path / "away").rename(folder)
    assert one.reload_model()[0]["state"] == "READY"
    assert one.run(1) == "one"
    assert server.stop() == 0


def test_a_new_folder_with_a_wrong_setting_fails_alone(start_server: Callable[..., Server], tmp_path: Path) -> None:
    write_model(tmp_path, "one", ANSWERS.format("one"))
    protocols = "native,model_mesh"  # which names its models later
    server = start_server(models=tmp_path, TMS_PROTOCOLS=protocols, TMS_MODEL_TWO_WORKERS="many")
    write_model(tmp_path, "two", ANSWERS.format("two"))
    assert server.client("one").load_model()[0]["state"] == "READY"
    with pytest.raises(model_client.ModelUnavailable, match="TMS_MODEL_TWO_WORKERS='many' must be a whole number"):
        server.client("two").load_model()


def test_the_watch_survives_what_it_meets(start_server: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_model(folder, "one", ANSWERS.format("old"))
    server = start_server(models=folder, TMS_RELOAD=1)
    client = server.client("one")
    assert client.run(1) == "old"
    folder.rename(tmp_path / "away")
    write_model(folder, "one", ANSWERS.format("between"))

    def changed() -> bool:  # the watch may have to begin anew
        write_model(folder, "one", ANSWERS.format("new"))
        time.sleep(0.5)
        return bool(client.run(1) == "new")

    (folder / "loop").symlink_to("loop")
    wait_for(changed, "the reload", timeout=40)
    assert server.stop() == 0


def test_a_loop_of_links_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    env = os.environ | {"TMS_MODELS_DIR": str(tmp_path / "a")}
    command = [sys.executable, str(ROOT / "server.py"), "list"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "must be a readable folder" in ran.stderr
    assert discover(ROOT / "tests" / "models")


SHARES = """
    import multiprocessing
    from model_interface import ModelInterface
    from models._shared import text
    from .._shared.numbers import double

    def spawned(value):
        from models._shared import text
        return text.shout(value)

    class Model(ModelInterface):
        example = "a"
        def run(self, data, args):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return [text.shout(data), double(2), pool.map(text.shout, ["b"])[0], pool.map(spawned, ["c"])[0]]
"""


def test_models_share_the_code_of_a_folder_that_begins_with_an_underscore(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(textwrap.dedent(SHARES))
    write_model(tmp_path, "alone", ANSWERS.format("alone"))
    shared = tmp_path / "_shared"
    shared.mkdir()
    (shared / "__init__.py").write_text("")
    (shared / "text.py").write_text("def shout(text): return text.upper() + '!'\n")
    (shared / "numbers.py").write_text("def double(number): return 2 * number\n")
    command = [sys.executable, str(ROOT / "server.py"), "check", f"{tmp_path}/one"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "answers its example with ['A!', 4, 'B!', 'C!']" in ran.stdout, ran.stderr
    server = start_server(tmp_path, TMS_RELOAD=1, TMS_ALIASES="three=one")
    assert server.client("three").run_text("x") == ["X!", 4, "B!", "C!"]

    def change() -> bool:  # the watch begins some time after the load
        (shared / "text.py").write_text("def shout(text): return text.upper() + '?'\n")
        return any("code that models share changed: _shared" in line for line in server.log)

    wait_for(change, "the watch")
    for name in ("one", "two", "three"):
        wait_for(lambda name=name: server.client(name).run_text("x")[0] == "X?", f"the reload of {name}")
    assert server.client("one").run_text("x") == ["X?", 4, "B?", "C?"]
    assert server.client("alone").run_text("x") == "alone"
    file = tmp_path / "one" / "__init__.py"
    file.write_text(file.read_text().replace("double(2)", "double(3)"))
    for name in ("one", "three"):
        wait_for(lambda name=name: server.client(name).run_text("x")[1] == 6, f"the reload of {name}")
    assert server.client("two").run_text("x")[1] == 4
    assert not any("could not be reloaded" in line for line in server.log)
