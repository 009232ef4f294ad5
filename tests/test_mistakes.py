"""The first mistakes of a new user: each is reported at once, with what to write instead."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Server

CLASS = "from pathlib import Path\nfrom model_interface import ModelInterface, Pipeline\nclass Model(ModelInterface):\n"
RUN = "    def run(self, data, args): return data\n"
WHOLE = CLASS + RUN
PIPELINE = CLASS.replace("(ModelInterface)", "(Pipeline)")
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
        r"write 'def run\(self, data, args\)' in class Model, not 'def run\(self, data\)'",
    ),
    "run_no_self": (file(CLASS + "    def run(data, args): return data"), r"not 'def run\(data, args\)'"),
    "run_three": (
        file(CLASS + "    async def run(self, data, args, more): pass"),
        r"not 'def run\(self, data, args, more",
    ),
    "batch_one": (model("def run_batch(self, items): return items"), r"write 'def run_batch\(self, items, args\)'"),
    "warmup_two": (model("def warmup(self, data): pass"), r"write 'def warmup\(self\)' in class Model"),
    "run_value": (file(CLASS + "    run = 3"), r"run of class Model must be a method: 'def run\(self, data, args\)'"),
    "run_bacth": (model("def run_bacth(self, items, args): pass"), "'run_bacth', .*did you mean 'run_batch'"),
    "shpae": (model("def get_input_shpae(self): return [3]"), "'get_input_shpae', .*did you mean 'get_input_shape'"),
    "warm_up": (model("def warm_up(self): pass"), "'warm_up', which nothing uses .did you mean 'warmup'"),
    "camel": (model("def runBatch(self, items, args): pass"), "did you mean 'run_batch'"),
    # its options
    "batchsize": (model("max_batchsize = 8"), "class attribute 'max_batchsize', .*did you mean 'max_batch_size'"),
    "batch_size": (model("batch_size = 8"), "did you mean 'max_batch_size'"),
    "worker": (model("worker = 2"), "did you mean 'workers'"),
    "examples": (model("examples = [1]"), "did you mean 'example'"),
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
    "by_folder": (
        file("from by_folder.helpers import x\n" + WHOLE, helpers="x = 1"),
        "own folder: write 'from . import ...'",
    ),
    "no_package": (
        file("import sklaern\n" + WHOLE),
        r"pip install sklaern, and name it in .*requirements.txt",
    ),
    "not_listed": (
        {"__init__.py": "import no_such_thing\n" + WHOLE, "requirements.txt": "numpy\n"},
        r"name no_such_thing in .*requirements.txt; install what it needs: pip install -r .*requirements.txt",
    ),
    "not_installed": (
        {"__init__.py": "import no_such_thing\n" + WHOLE, "requirements.txt": "numpy\nno-such-thing==1\n"},
        r"\(install what it needs: pip install -r .*requirements.txt\)",
    ),
    "weights": (
        model("def __init__(self): open('weights.bin')"),
        r"line 4\) \(a relative path begins in .*; for the model's folder write Path\(__file__\).parent / 'weights.bin'",
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
        r"self.max_batch_size has no effect: write max_batch_size = ... as a class attribute, .*TMS_MODEL_ON_SELF",
    ),
    "metadata_on_self": (model("def __init__(self): self.metadata = {}"), "self.metadata has no effect"),
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
        base=WHOLE.replace("Model(", "Base(") + "    def look(self): return self.examples",
    ),
    "endless": file(CLASS + "    example = 1\n    def run(self, data, args):\n        while True: yield data"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, files in {**{name: files for name, (files, _) in {**FAILED, **WARNED}.items()}, **FINE}.items():
        (folder / name).mkdir()
        for file_name, text in files.items():
            (folder / name / file_name).write_text(text)
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
