"""The first mistakes of a new user: each is reported at once, with what to write instead."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model_client
from model_client import DeadlineExceeded, ModelNotFound, ModelUnavailable, ServerUnavailable
from tests.conftest import ROOT, Server, free_port
from tests.test_workers import write
from tiny_model_server.engine import mistakes

CLASS = "from pathlib import Path\nfrom model_interface import ModelInterface, Pipeline\nclass Model(ModelInterface):\n"
RUN = "    def run(self, data, args): return data\n"
WHOLE = CLASS + RUN
PIPELINE = CLASS.replace("(ModelInterface)", "(Pipeline)")
BASE = WHOLE.replace("Model(", "Base(") + "    def look(self): return self.examples\n"
Files = dict[str, str]


def model(line: str) -> Files:
    """A folder whose model is right but for this line of its class."""
    return {"__init__.py": f"{CLASS}    {line}\n{RUN}"}


def file(code: str, **others: str) -> Files:
    """A folder whose ``__init__.py`` is this code, and with other modules."""
    return {"__init__.py": code} | {f"{name}.py": text for name, text in others.items()}


FAILED: dict[str, tuple[Files, str]] = {
    # the class
    "no_class": (file("class Other: pass"), r"must define class Model\(ModelInterface\)$"),
    "other_name": (
        file(WHOLE.replace("class Model(", "class MyNet(")),
        "its class is called MyNet: rename it to Model",
    ),
    "no_base": (file("class Model:\n" + RUN), "its class Model does not derive from ModelInterface"),
    "an_object": (file(WHOLE + "Model = Model()"), "its Model is an object of Model, not a class"),
    "in_model_py": (file("", model=WHOLE), "it is in model.py: write 'from .model import Model'"),
    "syntax": (file("class Model(:"), r"SyntaxError: .*\(__init__.py, line 1\)"),
    "syntax_beside": (file("from . import part\n", part="x = = 1"), r"SyntaxError: .*\(part.py, line 1\)"),
    "name_error": (file(WHOLE + "np.zeros(3)"), r"NameError: name 'np' is not defined \(__init__.py, line 5\)"),
    # its methods
    "no_run": (file(CLASS + "    pass"), r"class Model has no run: write 'def run\(self, data, args\):'"),
    "only_batch": (
        file(CLASS + "    def run_batch(self, items, args): return items"),
        r"write 'def run\(self, data, args\): return self.run_batch\(\[data\], args\)\[0\]'",
    ),
    "run_one": (
        file(CLASS + "    def run(self, data): return data"),
        r"write 'def run\(self, data, args\)' in class Model \(too many positional arguments\)",
    ),
    "run_no_self": (file(CLASS + "    def run(data, args): return data"), r"write 'def run\(self, data, args\)'"),
    "run_three": (
        file(CLASS + "    async def run(self, data, args, more): pass"),
        r"missing a required argument: 'more'",
    ),
    "batch_one": (model("def run_batch(self, items): return items"), r"write 'def run_batch\(self, items, args\)'"),
    "warmup_two": (model("def warmup(self, data): pass"), r"write 'def warmup\(self\)' in class Model"),
    "run_value": (file(CLASS + "    run = 3"), r"write 'def run\(self, data, args\)' .*\(3 is not a callable"),
    # its options
    "option": (model("workers = 'two'"), "class attribute workers = 'two' must be a whole number from 1 to 256"),
    "shape_text": (model("def get_input_shape(self): return '224x224'"), r"such as \[224, 224, 3\].*not '224x224'"),
    "shape_digits": (model("def get_input_shape(self): return '224'"), "get_input_shape.. must return whole numbers"),
    "shape_float": (model("def get_input_shape(self): return [224.5, 3]"), r"not \[224.5, 3\]"),
    "shape_nested": (model("def get_input_shape(self): return [[224, 224], 3]"), r"not \[\[224, 224\], 3\]"),
    "shape_none": (model("def get_input_shape(self): return [None, 3]"), "-1: any size"),
    "shape_negative": (model("def get_input_shape(self): return [-2, 3]"), r"not \[-2, 3\]"),
    "shape_number": (model("def get_input_shape(self): return 224"), "not 224"),
    "metadata": (model("metadata = {'inputs': [{'shape': 'abc'}]}"), "must be a list of dicts with name and dtype"),
    # its example
    "example": (model("example = object()"), "class attribute example: cannot serialize object"),
    "answer": (
        file(CLASS + "    example = 1\n    def run(self, data, args): return object()"),
        "the answer to its example cannot be encoded: cannot serialize object",
    ),
    "example_shape": (
        model(
            "import numpy\n    metadata = {'inputs': [{'dtype': 'float32', 'shape': [-1, 3]}]}\n"
            "    example = numpy.zeros((2, 4))"
        ),
        r"its example does not fit its metadata: the model takes float32 of shape \[-1, 3\]",
    ),
    # imports and files
    "sibling": (file("import helpers\n" + WHOLE, helpers=""), "write 'from . import helpers' or 'from .helpers import"),
    "sibling_from": (file("from helpers import x\n" + WHOLE, helpers="x = 1"), "'from .helpers import ...'"),
    "sibling_deep": (
        file("from . import helpers\n" + WHOLE, helpers="import deeper", deeper=""),
        r"\(helpers.py, line 1\) .*write 'from . import deeper'",
    ),
    "interface": (
        file("from tiny_model_server import ModelInterface\n" + RUN.replace("    def", "def")),
        "write 'from model_interface import ModelInterface'",
    ),
    "by_folder": (
        file("from by_folder.helpers import x\n" + WHOLE, helpers="x = 1"),
        "pip install -r .*; for the model's own folder write 'from . import ...'",
    ),
    "shared": (file("import _shared\n" + WHOLE), "write 'from .. import _shared' or 'from .._shared import ...'"),
    "no_package": (
        file("import sklaern\n" + WHOLE),
        r"name sklaern in .*requirements.txt, and install what it needs: .*pip install -r .*requirements.txt",
    ),
    "not_listed": (
        {"__init__.py": "import no_such_thing\n" + WHOLE, "requirements.txt": "numpy\n"},
        r"name no_such_thing in .*requirements.txt, and install what it needs: .*pip install -r .*requirements.txt",
    ),
    "not_installed": (
        {"__init__.py": "import no_such_thing\n" + WHOLE, "requirements.txt": "numpy\nno-such-thing==1\n"},
        r"\(install what it needs: .*pip install -r .*requirements.txt\)",
    ),
    "weights": (
        model("def __init__(self): open('weights.bin')"),
        r"line 4\) \(a relative path begins in .*; for the model's folder write Path\(__file__\).parent / 'weights",
    ),
    "arguments": (
        model("def __init__(self, size, top=3): pass"),
        r"missing a required argument: 'size'; give defaults, or set TMS_MODEL_ARGUMENTS_ARGS='.\"size\": ..., \"top\"",
    ),
    "unknown_argument": (
        model("def __init__(self, size=3): pass"),
        "unexpected keyword argument 'szie'; give defaults",
    ),
    "asyncio_run": (
        file(
            CLASS
            + "    def __init__(self):\n        import asyncio\n        asyncio.run(self.run(1, {}))\n    async "
            + RUN.strip()
        ),
        r"an async model has a loop: await in 'async def warmup\(self\)'",
    ),
    # pipelines
    "stage": (
        file(PIPELINE + "    stages = ['god']"),
        "'god', .*did you mean 'good'",
    ),
    "stage_itself": (
        file(PIPELINE + "    stages = ['good', 'stage_itself']"),
        "names itself",
    ),
    "stage_text": (file(PIPELINE + "    stages = 'good'"), r"as in stages = \["),
    "no_stages": (file(PIPELINE + "    pass"), r"as in stages = \["),
}
WARNED: dict[str, tuple[Files, str]] = {
    "batch_of_one": (
        model("max_batch_size = 1\n    def run_batch(self, items, args): return items"),
        "run_batch is not called, because max_batch_size is 1",
    ),
    "on_self": (
        model("def __init__(self): self.max_batch_size = 8"),
        r"self.max_batch_size has no effect: write max_batch_size = ... as a class attribute, not in __init__",
    ),
    "metadata_on_self": (model("def __init__(self): self.metadata = {}"), "self.metadata has no effect"),
    "run_bacth": (model("def run_bacth(self, items, args): pass"), "'run_bacth', .*did you mean 'run_batch'"),
    "shpae": (model("def get_input_shpae(self): return [3]"), "'get_input_shpae', .*did you mean 'get_input_shape'"),
    "warm_up": (model("def warm_up(self): pass"), "'warm_up', which nothing uses .did you mean 'warmup'"),
    "camel": (model("def runBatch(self, items, args): pass"), "did you mean 'run_batch'"),
    "num_workers": (model("num_workers = 2"), "did you mean 'workers'"),
    "max_batch": (model("max_batch = 8"), "did you mean 'max_batch_size'"),
    "max_wait": (model("max_wait = 8"), "did you mean 'max_wait_ms'"),
    "batchsize": (model("max_batchsize = 8"), "'max_batchsize', which nothing uses .did you mean 'max_batch_size'"),
    "batch_size": (model("batch_size = 8"), "did you mean 'max_batch_size'"),
    "worker": (model("worker = 2"), "did you mean 'workers'"),
    "examples": (model("examples = [1]"), "did you mean 'example'"),
}
FINE: dict[str, Files] = {
    "good": file(WHOLE),
    "no_super": model("def __init__(self): print('loading', flush=True)"),
    "none": file(CLASS + "    example = 1\n    def run(self, data, args): pass"),
    "own_names": model(
        "device = 'cpu'\n    worker = 3\n    run_batches = staticmethod(len)\n    _max_batchsize = input_shape = [8]\n"
        "    def use(self): return self.device, self.worker, self.run_batches"
    ),
    "other_names": file(CLASS + "    def run(self, image, options=None, *more, verbose=False): return image"),
    "static": file(
        CLASS + "    @staticmethod\n    def run(data, args): return data\n    @classmethod\n    def warmup(cls): pass"
    ),
    "wrapped": file(
        "import functools\n"
        + CLASS
        + "    def run(self, *a): return a[0]\n    run_batch = functools.partialmethod(run)"
    ),
    "relative": file(
        "from .helpers import x\nfrom . import helpers\nimport models.relative.helpers\n" + WHOLE, helpers="x = 1"
    ),
    "shape_numpy": model("def get_input_shape(self):\n        import numpy\n        return numpy.array([-1, 3])"),
    "base_elsewhere": file(
        "from .base import Base\nclass Model(Base):\n    examples = [1]\n",
        base=BASE,
    ),
    "base_shared": file("from .._shared import Base\nclass Model(Base):\n    n_workers = 1\n"),
    "slow": file("import time\n" + CLASS + "    def run(self, data, args): time.sleep(5)"),
    "part_of_a_name": model("batch = max_ = load = 1"),
    "used_in_a_folder": file(
        CLASS + "    device = 'cpu'\n    def run(self, data, args):\n        from .sub.net import go; return go(self)",
        **{"sub/net": "def go(model): return model.device"},
    ),
    "used_by_a_base": file(
        "from threading import Event\nfrom model_interface import ModelInterface\n"
        "class Model(Event, ModelInterface):\n    timeout = 1\n" + RUN
    ),
    "callable_object": file(
        CLASS
        + "    class Net:\n        def __call__(self, data, args): return data\n    run, _run = Net(), Net()\n"
        + "    __signature__ = _run.__signature__ = 3"
    ),
    "endless": file(CLASS + "    example = 1\n    def run(self, data, args):\n        while True: yield data"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, files in {**{name: files for name, (files, _) in {**FAILED, **WARNED}.items()}, **FINE}.items():
        (folder / name).mkdir()
        for file_name, text in files.items():
            (folder / name / file_name).parent.mkdir(exist_ok=True)
            (folder / name / file_name).write_text(text)
    write(folder, "_shared", BASE.replace("examples", "n_workers"))
    server = Server(folder, ready=False, TMS_MODEL_UNKNOWN_ARGUMENT_ARGS='{"szie": 3}')
    server.wait_for_log(r"serving \d+ models", timeout=110)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def states(server: Server) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in server.client().list_models()}


def test_there_are_thirty() -> None:
    assert len(FAILED) >= 30


@pytest.mark.parametrize("name", FAILED)
def test_a_mistake_fails_the_model_with_what_to_write(states: dict[str, dict[str, Any]], name: str) -> None:
    state, pattern = states[name], FAILED[name][1]
    assert state["state"] == "FAILED"
    assert re.search(pattern, state["reason"]), state["reason"]
    assert "\n" not in state["reason"]


@pytest.mark.parametrize("name", WARNED)
def test_what_may_be_meant_is_a_warning(server: Server, states: dict[str, dict[str, Any]], name: str) -> None:
    assert states[name]["state"] == "READY"
    found = server.wait_for_log(f"WARNING .*model {name}: .*")
    assert re.search(WARNED[name][1], found.string), found.string


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine_is_not_complained_of(server: Server, states: dict[str, dict[str, Any]], name: str) -> None:
    assert states[name]["state"] == "READY", states[name]["reason"]
    assert not [line for line in server.log if f"WARNING tiny_model_server.worker: model {name}:" in line]


def test_a_traceback_begins_in_the_models_folder(server: Server) -> None:
    server.wait_for_log("ERROR .*model name_error could not be loaded")
    begin = next(number for number, line in enumerate(server.log) if "model name_error could not" in line)
    assert "Traceback" in server.log[begin + 1]
    assert re.search(r'File ".*/name_error/__init__.py", line 5', server.log[begin + 2])


def test_a_mistake_in_a_class_has_no_traceback_of_the_server(server: Server) -> None:
    server.wait_for_log("ERROR .*model no_run FAILED")
    begin = next(number for number, line in enumerate(server.log) if "model no_run could not be loaded" in line)
    assert not server.log[begin + 1].startswith(" ")


def test_a_requirement_is_installed_where_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = Path("models/m/requirements.txt")
    assert mistakes.install_command(needs) == f"{sys.executable} -m pip install -r {needs}"
    monkeypatch.setattr(mistakes, "find_spec", lambda name: None)
    assert mistakes.install_command(needs) == f"uv pip install -r {needs} --python {sys.executable}"


# ---- clients and commands


def with_model(name: str) -> Callable[[Server], model_client.ModelClient]:
    return lambda server: server.client(name, timeout=20)


def elsewhere(port: str, host: str = "127.0.0.1") -> Callable[[Server], model_client.ModelClient]:
    def client(server: Server) -> model_client.ModelClient:
        number = {"none": free_port(), "http": server.http_port}[port]
        return model_client.ModelClient("good", addresses=[f"{host}:{number}"], connect_timeout=0.5)

    return client


CALLS: dict[str, tuple[Callable[[Server], Any], Callable[[Any], Any], type[Exception], str]] = {
    "name": (
        with_model("goood"),
        lambda c: c.run(1),
        ModelNotFound,
        "no model 'goood' .did you mean 'good'",
    ),
    "no name": (with_model(""), lambda c: c.run(1), ModelNotFound, "no model ''; there are: an_object, answer,"),
    "failed": (
        with_model("no_run"),
        lambda c: c.run(1),
        ModelUnavailable,
        "class Model has no run: write",
    ),
    "no server": (
        elsewhere("none"),
        lambda c: c.run(1),
        ServerUnavailable,
        r"no server at 127.0.0.1:\d+: .*refused.*; start a server there: python server.py",
    ),
    "HTTP port": (
        elsewhere("http"),
        lambda c: c.run(1),
        ServerUnavailable,
        "this is a port of HTTP: give that of gRPC, which is 50000 by default",
    ),
    "HTTP port by name": (  # of its IP addresses, gRPC names the one that was tried last
        elsewhere("http", "localhost"),
        lambda c: c.run(1),
        ServerUnavailable,
        "this is a port of HTTP: give that of gRPC, which is 50000 by default",
    ),
    "missing file": (
        with_model("good"),
        lambda c: c.run_image("missing.jpg"),
        FileNotFoundError,
        "there is no such image file; a text is sent by run_text: 'missing.jpg'",
    ),
    "text as image": (with_model("good"), lambda c: c.run_image("some words"), FileNotFoundError, "sent by run_text"),
    "array as text": (
        with_model("good"),
        lambda c: c.run_text(np.zeros(3)),
        TypeError,
        "a text is a str, not array.*; an image is sent by run_image, any other value by run",
    ),
    "image of a batch": (
        with_model("good"),
        lambda c: c.run_image_batch(np.zeros((9, 9, 3), np.uint8)),
        TypeError,
        "takes a list of images.*for one image there is run_image",
    ),
    "args": (with_model("good"), lambda c: c.run(1, "top=3"), TypeError, "args must be a dict, not str"),
    "URL": (
        lambda server: None,
        lambda c: model_client.ModelClient("good", addresses=["http://localhost:50000"]),
        ValueError,
        "'http://localhost:50000' must be host:port, as in localhost:50000",
    ),
    "object": (
        with_model("good"),
        lambda c: c.run(object()),
        TypeError,
        "cannot serialize object at the top: send JSON",
    ),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_a_mistake_of_a_caller_is_answered_with_what_to_do(server: Server, mistake: str) -> None:
    client, call, kind, pattern = CALLS[mistake]
    with pytest.raises(kind, match=pattern):
        call(client(server))


def test_who_comes_while_models_are_loaded_reads_so(start_server: Callable[..., Server], tmp_path: Path) -> None:
    code = "import time\n" + CLASS + "    def __init__(self): time.sleep(60)\n" + RUN
    server = start_server(write(tmp_path, "large", code), ready=False)
    server.wait_for_log("model large LOADING")
    with pytest.raises(ServerUnavailable, match="a server is there, and loads its models: wait longer, with connect_"):
        server.client("large", connect_timeout=0.5).run(1)


@pytest.mark.parametrize("local", ["0", "1"])
def test_who_waits_too_short_reads_for_how_long(server: Server, monkeypatch: pytest.MonkeyPatch, local: str) -> None:
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", local)
    with pytest.raises(DeadlineExceeded, match="^slow: (no answer within timeout=0.5 s|the deadline passed before)"):
        server.client("slow").run(1, timeout=0.5)


def test_images_of_any_numeric_dtype_are_fine(server: Server) -> None:
    image = np.linspace(0, 1, 27).reshape(3, 3, 3)
    assert np.array_equal(server.client("good").run_image(image), image)


@pytest.mark.parametrize(
    ("way", "status", "pattern"),
    [
        (["models/good/run"], 405, "GET /models/good/run; .*post to /models/NAME/run"),
        (["-d", "text=x", "models/goood/run"], 404, "no model 'goood' .did you mean 'good'"),
        (["-d", "xx", "models/good/run"], 400, "send one of image .a file., text or data .JSON."),
    ],
)
def test_a_mistake_with_curl_is_answered_with_what_to_do(
    server: Server, way: list[str], status: int, pattern: str
) -> None:
    *options, path = way
    command = ["curl", "-s", "-w", "%{http_code}", *options, f"http://127.0.0.1:{server.http_port}/{path}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.endswith(str(status))
    assert re.search(pattern, answer), answer


@pytest.mark.parametrize(
    ("arguments", "env", "pattern"),
    [
        (["chek"], {}, "invalid choice: 'chek'.*check"),
        (["check", "goood"], {}, "there is no model 'goood' .did you mean 'good'"),
        (["check", "good"], {"TMS_MODEL_GOOD_WOKRERS": "2"}, "did you mean 'TMS_MODEL_GOOD_WORKERS'.*MAX_BATCH_SIZE"),
        (["check", "good"], {"TMS_MODEL_GOOD_ARGS": '{"a": ' + "[" * 30_000}, "ARGS='.*must be a JSON object such as"),
        ([], {"TMS_MODEL_GOOD_WOKRERS": "2"}, "WOKRERS sets nothing .did you mean 'TMS_MODEL_GOOD_WORKERS'"),
        ([], {"TMS_MODEL_GODO_WORKERS": "2"}, "did you mean 'TMS_MODEL_GOOD_WORKERS'.*the models are good, net"),
        ([], {"TMS_MODEL_NET_TIMEOUT": "2"}, "did you mean 'TMS_MODEL_NET_TIMEOUT_S'"),
        ([], {"TMS_HTPP_PORT": "2"}, "TMS_HTPP_PORT is not a setting of the server .did you mean 'TMS_HTTP_PORT'"),
    ],
)
def test_a_mistake_on_the_command_line_stops_with_2(
    tmp_path: Path, arguments: list[str], env: dict[str, str], pattern: str
) -> None:
    write(write(tmp_path, "good", WHOLE), "net", WHOLE)
    ran = command(tmp_path, arguments, env)
    assert ran.returncode == 2, ran.stderr
    assert re.search(pattern, ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr


def command(models: Path, arguments: list[str], env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
    return subprocess.run(
        [sys.executable, "server.py", *arguments],
        cwd=ROOT,
        env=clean | {"TMS_MODELS_DIR": str(models), "TMS_PORT": "0", "TMS_HTTP_PORT": "0"} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_variable_of_another_folder_does_not_stop_the_check_of_a_path(tmp_path: Path) -> None:
    write(write(tmp_path / "here", "good", WHOLE), "net", WHOLE)
    write(tmp_path / "there", "other", WHOLE)
    ran = command(tmp_path / "here", ["check", str(tmp_path / "there" / "other")], {"TMS_MODEL_NET_WORKERS": "1"})
    assert ran.returncode == 0, ran.stderr


def test_modelmesh_names_its_models_later(start_server: Callable[..., Server], tmp_path: Path) -> None:
    protocols = {"TMS_PROTOCOLS": "native,model_mesh", "TMS_MODEL_LATER_WORKERS": "2"}
    server = start_server(write(tmp_path, "good", WHOLE), ready=False, **protocols)
    server.wait_for_log("WARNING .*TMS_MODEL_LATER_WORKERS sets nothing")


def test_variables_of_aliases_and_services_are_no_mistakes(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server(
        write(tmp_path, "good", WHOLE),
        TMS_ALIASES="big=good",
        TMS_LAZY=1,
        TMS_MODEL_BIG_WORKERS=2,
        TMS_MODEL_X_SERVICE_HOST="10.0.0.1",
        TMS_MODEL_X_PORT="tcp://10.0.0.1:80",
    )
    assert server.client("big").run(1) == 1
