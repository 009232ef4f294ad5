"""Models that are real programs: they fork, break what they find in their process, and answer with any class."""

import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import model_client
from tests.conftest import ROOT, Server, wait_for
from tests.test_package import run
from tests.test_workers import write

StartServer = Callable[..., Server]

PROGRAMS = """
    import enum, logging, os, sys, types
    from model_interface import InvalidInput, ModelInterface, count, observe

    class Label(str, enum.Enum):
        CAT = "cat"
        RGB = "rgb"
        WRONG = "INVALID_ARGUMENT"

    class Proxy:  # as of an object that is not bound
        @property
        def __class__(self):
            raise RuntimeError("working outside of a request")

    class Wrong(InvalidInput):
        status = Label.WRONG

    class Broken(logging.Handler):
        def emit(self, record):
            raise SystemExit(8)

    def stream():
        yield 1
        os.fork()
        yield 2

    class Model(ModelInterface):
        image_mode = Label.RGB
        devices = ["cpu"]
        timeout_s = 20

        def run(self, data, args):
            what = args.get("do")
            if what == "fork":
                os.fork()
            elif what == "exec" and not os.fork():
                os.execvp("there-is-no-such-program", ["x"])
            elif what == "exit" and not os.fork():
                sys.exit(3)
            elif what == "stream":
                return stream()
            elif what == "log":
                logging.getLogger().addHandler(Broken())
                raise ValueError("as usual")
            elif what == "stderr":
                sys.stderr.close()
                raise ValueError("as usual")
            elif what == "metrics":
                count(Label.CAT, 2)
                observe(Label.RGB, 1)
            elif what == "status":
                raise Wrong("as usual")
            elif what == "proxies":
                return (Proxy() for _ in range(2))
            return data

        def run_batch(self, items, args):
            what = args.get("whole")
            if what == "fork":
                if not os.fork():
                    raise ValueError("in the child")
            elif what == "proxy":
                return [Proxy(), *items[1:]]
            elif what:
                items = [f"answer {item}" for item in items]
                rows = dict(enumerate(items))
                return {"dict": rows, "view": types.MappingProxyType(rows), "set": set(items), "str": "xyz",
                        "bytes": b"xyz"}[what]
            return [self.run(item, args) for item in items]
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(models=write(tmp_path_factory.mktemp("programs"), "program", PROGRAMS))
    yield server
    server.kill()


@pytest.mark.parametrize("local", [True, False], ids=["local", "gRPC"])
@pytest.mark.parametrize("what", ["fork", "exec", "exit"])
def test_a_process_that_a_model_has_forked_answers_nobody(programs: Server, what: str, local: bool) -> None:
    address = ("localhost" if local else "127.0.0.1") + f":{programs.port}"
    client = model_client.ModelClient("program", addresses=[address], timeout=30)
    for number in range(5):
        assert client.run(["first", number], {"do": what}) == ["first", number]
        for other in range(3):
            assert client.run(["next", number, other]) == ["next", number, other]
        array = np.arange(50_000) + number
        assert np.array_equal(client.run(array), array)


def test_a_process_that_a_model_has_forked_answers_nobody_in_batches_and_streams(programs: Server) -> None:
    client = programs.client("program", timeout=30)
    for _ in range(3):
        assert client.run_batch([1, 2, 3], {"whole": "fork"}) == [1, 2, 3]
        assert list(client.run_stream(0, {"do": "stream"})) == [1, 2]
        assert client.run(0, {"do": "stream"}) == [1, 2]
        for number in range(5):
            assert client.run(number) == number


def test_a_fork_while_a_model_loads_does_not_serve(start_server: StartServer, tmp_path: Path) -> None:
    code = """
        import os
        from model_interface import ModelInterface
        first = os.getpid()
        class Model(ModelInterface):
            def __init__(self):
                os.fork()
            def run(self, data, args):
                return [data, os.getpid() == first]
    """
    client = start_server(models=write(tmp_path, "forks", code)).client("forks", timeout=30)
    for number in range(20):
        assert client.run(number) == [number, True]


@pytest.mark.parametrize("what", ["log", "stderr"])
def test_a_model_that_breaks_the_log_costs_nobody_the_answer(programs: Server, what: str) -> None:
    client = programs.client("program", timeout=30)
    before = wait_for(lambda: client.model_info()[0]["worker_pids"], "a worker")
    with pytest.raises(model_client.ModelFailed, match="raised ValueError: as usual"):
        client.run(1, {"do": what})
    assert client.run(1) == 1
    assert client.model_info()[0]["worker_pids"] == before


def test_the_front_meets_no_class_of_a_model(programs: Server) -> None:
    client = programs.client("program", timeout=30)
    before = wait_for(lambda: client.model_info()[0]["worker_pids"], "a worker")
    assert client.run(1, {"do": "metrics"}) == 1
    with pytest.raises(model_client.InvalidInput, match="as usual"):
        client.run(1, {"do": "status"})
    assert client.model_info()[0]["worker_pids"] == before


@pytest.mark.parametrize("whole", ["dict", "view", "set", "str", "bytes"])
def test_what_has_no_answer_for_each_item_is_no_batch(programs: Server, whole: str) -> None:
    answers = programs.client("program").run_batch([1, 2, 3], {"whole": whole}, return_exceptions=True)
    assert all("must return a sequence" in str(answer) for answer in answers)
    assert all(isinstance(answer, model_client.ModelFailed) for answer in answers)


def test_an_answer_without_a_class_is_one_items_affair(programs: Server) -> None:
    answers = programs.client("program").run_batch([1, 2, 3], {"whole": "proxy"}, return_exceptions=True)
    assert isinstance(answers[0], model_client.ModelFailed)
    assert answers[1:] == [2, 3]
    with pytest.raises(model_client.ModelFailed, match="cannot be encoded"):
        list(programs.client("program").run_stream(1, {"do": "proxies"}))


LOADS = {
    "no dict": ("metadata = [1]", "metadata must be a dict, not list"),
    "number": ("metadata = {'inputs': 7}", "must be a list of dicts"),
    "numbers": ("metadata = {'inputs': [3]}", "must be a list of dicts"),
    "one": ("metadata = {'outputs': {'name': 'x'}}", "must be a list of dicts"),
    "size": ("metadata = {'inputs': [{'shape': 5}]}", "must be a list of dicts .*'shape': 5"),
    "text": ("metadata = {'inputs': [{'shape': 'abc'}]}", "must be a list of dicts .*'shape': 'abc'"),
    "dtype": ("metadata = {'inputs': [{'dtype': [1]}]}", "must be a list of dicts .*'dtype': .1"),
    "shape": ("def get_input_shape(self): return [10**30]", "must return whole numbers"),
    "end": ("def warmup(self): raise EOFError('the file of weights ends')", "EOFError: the file of weights ends"),
}


@pytest.mark.parametrize("case", LOADS)
def test_what_is_wrong_with_a_model_is_reported_when_it_loads(tmp_path: Path, case: str) -> None:
    line, why = LOADS[case]
    code = f"from model_interface import ModelInterface\nclass Model(ModelInterface):\n    {line}\n"
    write(tmp_path, "odd", code + "    def run(self, data, args): return data\n")
    ran = run(sys.executable, ROOT / "server.py", "check", "odd", cwd=tmp_path, TMS_MODELS_DIR=str(tmp_path))
    assert re.search(f"^odd  FAILED .*{why}", ran.stdout), ran.stdout + ran.stderr


def test_a_model_may_set_options_to_none(start_server: StartServer, tmp_path: Path) -> None:
    code = """
        from model_interface import ModelInterface
        class Model(ModelInterface):
            devices = timeout_s = workers = image_mode = metadata = None
            def run(self, data, args):
                return data
    """
    client = start_server(models=write(tmp_path, "none", code)).client("none")
    assert client.run(np.arange(3)).tolist() == [0, 1, 2]


def test_a_worker_whose_model_leaks_descriptors_is_replaced(start_server: StartServer, tmp_path: Path) -> None:
    code = """
        from model_interface import ModelInterface
        kept = []
        class Model(ModelInterface):
            def run(self, data, args):
                if args.get("leak"):
                    kept.append(data)
                    try:
                        while True:
                            kept.append(open("/dev/null"))
                    except OSError:
                        pass
                return data
    """
    server = start_server(models=write(tmp_path, "leaks", code))
    for address in (server.address, f"localhost:{server.port}"):
        client = model_client.ModelClient("leaks", addresses=[address], timeout=30)
        for size in (10, 100_000):
            small, large = np.arange(size), np.arange(4 * size)
            try:
                client.run(small, {"leak": True})
            except model_client.ModelFailed:
                pass  # there may be no descriptor for the answer
            for array in (small, large, small):
                assert np.array_equal(client.run(array), array)
    server.wait_for_log("the model has left no descriptor free")


def test_a_folder_that_was_there_for_a_moment_does_not_spoil_health(start_server: StartServer, tmp_path: Path) -> None:
    write(tmp_path, "good", LEAN)
    server = start_server(models=tmp_path, TMS_RELOAD=1)
    client = server.client("good")
    assert client.run(1) == 1
    time.sleep(0.5)  # in which the watch begins
    write(tmp_path, "half", "raise ImportError('not all files are there')")
    server.wait_for_log("model half FAILED")
    assert readyz(server) == 503
    shutil.rmtree(tmp_path / "half")
    wait_for(lambda: readyz(server) == 200, "the server to be ready")
    assert [model["name"] for model in client.list_models()] == ["good"]
    write(tmp_path, "half", LEAN)
    wait_for(lambda: any(model["name"] == "half" for model in client.list_models()), "the model")
    assert server.client("half").run(2) == 2


LEAN = """
    from model_interface import ModelInterface
    class Model(ModelInterface):
        def run(self, data, args):
            return data
"""


def readyz(server: Server) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/readyz", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
