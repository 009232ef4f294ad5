"""The shape of the tree: imports point one way, committed descriptor sets are current, files say their job."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [
    ["errors", "request_ids"],
    ["conversions"],
    ["budget", "codec", "logs", "custom_metrics", "settings", "tracing", "ending", "local_transport"],
    ["shared_memory", "image_files", "access", "json_arrays"],
    ["schemas"],
    ["client.credentials", "client.stats", "client.fork_safety", "client.errors", "client.daemons"],
    ["client.addresses", "client.local"],
    ["client.siblings"],
    ["client.channel"],
    ["client.arguments"],
    ["client.calls"],
    ["client.call"],
    ["client.transport"],
    ["client.blocking", "client.aio"],
    ["model_interface", "model_client"],
    ["engine.guardian", "engine.placement", "engine.busy_polling", "engine.worker_connection", "engine.worker_output"],
    ["engine.annotations", "engine.mistakes"],
    ["engine.runner", "engine.children", "engine.metrics"],
    ["engine.event_loop"],
    ["engine.worker"],
    ["engine.worker_path"],
    ["engine.batcher"],
    ["engine.worker_slot"],
    ["engine.worker_process"],
    ["engine.pool"],
    ["engine.repository"],
    ["engine.call", "engine.buffers"],
    ["engine.engine"],
    ["protocols"],
    ["server.tls"],
    ["server.siblings"],
    ["server.grpc_call"],
    ["server.admission", "server.events", "server.npy", "server.bodies", "server.sites"],
    ["server.view", "server.openapi"],
    ["server.forms", "server.answers"],
    ["server.health"],
    ["server.grpc_server", "server.local_server", "server.http_server", "server.http_app", "server.reload"],
    ["server.http_access_log"],
    ["serve", "checks", "scaffold", "replicas"],
    ["cli"],
    ["__main__"],
    ["server"],
]
"""Each file may import what stands in a line before its own."""
MOST_LINES = 10580
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_THE_WAY = 2190
WAY_OF_A_REQUEST = [
    "server/grpc_server.py",
    "protocols/native.py",
    *(f"engine/{name}.py" for name in "engine call buffers batcher pool worker_process worker_slot".split()),
    *(f"engine/{name}.py" for name in "worker_connection worker runner".split()),
]
TOP = {"model_client", "model_interface", "server"}
ORDER = {
    name if name in TOP else f"tiny_model_server.{name}": rank for rank, layer in enumerate(LAYERS) for name in layer
}
CLIENT_NEEDS = {
    "errors",
    "request_ids",
    "conversions",
    "codec",
    "shared_memory",
    "local_transport",
    "schemas",
    "tracing",
} | {f"client.{path.stem}" for path in (ROOT / "tiny_model_server" / "client").glob("[a-z]*.py")}
SOURCES = [ROOT / "server.py", ROOT / "model_client.py", ROOT / "model_interface.py"]
SOURCES += [path for path in sorted((ROOT / "tiny_model_server").rglob("*.py")) if "templates" not in path.parts]


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return layered(name) or name


def layered(name: str) -> str | None:
    """The entry of ORDER to which a module belongs: its own, or that of the folder that holds it."""
    while name and name not in ORDER:
        name = name.rpartition(".")[0]
    return name or None


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if layered(name) not in (None, layered(node.module)) else node.module for name in deeper}
    return found


def test_imports_point_one_way() -> None:
    for path in SOURCES:
        name = module_of(path)
        for imported in imports(path):
            ours = layered(imported)
            if name in ORDER and ours and ours != name:
                assert ORDER[ours] < ORDER[name], f"{name} imports {imported}"


def test_the_client_needs_leaves_and_three_packages_only() -> None:
    allowed = {f"tiny_model_server.{name}" for name in CLIENT_NEEDS} | {"grpc", "grpc.aio", "numpy"}
    allowed |= {"google.protobuf", "google.protobuf.message"}
    allowed |= {"tqdm.auto"}  # only for map(progress=True)
    todo, seen = [ROOT / "model_client.py"], set()
    while todo:
        path = todo.pop()
        for name in imports(path):
            if name.partition(".")[0] in sys.stdlib_module_names or name in seen:
                continue
            seen.add(name)
            if name.startswith("opentelemetry"):  # only where traces are asked for
                continue
            assert name in allowed, f"{path.name} imports {name}"
            file = ROOT / (name.replace(".", "/") + ".py")
            todo += [file] if file.exists() else []


def test_no_grpc_in_the_worker() -> None:
    code = "import sys; from tiny_model_server.engine import worker\n"
    code += "print(sorted({'grpc', 'google.protobuf', 'cv2'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "proto",
    [ROOT / "server.proto", *(ROOT / "tiny_model_server/protocols").glob("*.proto")],
    ids=lambda path: path.name,
)
def test_descriptor_sets_are_current(proto: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh.binpb"
    arguments = ["-I", proto.parent, "--include_imports", f"--descriptor_set_out={fresh}", proto]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *map(str, arguments)], check=True)
    committed = ROOT / "tiny_model_server" / "protocols" / f"{proto.stem}.binpb"
    assert committed.read_bytes() == fresh.read_bytes(), "run: make proto"


def test_each_file_says_its_job_in_its_first_line() -> None:
    for path in SOURCES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        assert docstring.splitlines()[0].endswith("."), path


def test_only_settings_and_client_read_the_environment() -> None:
    readers = {path.name for path in SOURCES if "os.environ" in path.read_text()}
    # The pool hands it on to its workers, the supervisor to its replicas, and a worker (and ``models``) to what its
    # model starts; OpenTelemetry has variables of its own.
    assert readers == {
        "settings.py",
        "arguments.py",
        "worker_process.py",
        "replicas.py",
        "placement.py",
        "tracing.py",
        "runner.py",
        "models.py",
    }


def lines_of_code(path: Path) -> int:
    """Lines without blanks, comments and docstrings, which are asked for elsewhere, and are not to be saved on."""
    text = path.read_text()
    docstrings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    numbered = enumerate(text.splitlines(), 1)
    return sum(number not in docstrings and line.strip()[:1] not in ("", "#") for number, line in numbered)


def test_the_code_stays_small() -> None:
    sizes = {path: lines_of_code(path) for path in SOURCES}
    assert max(sizes.values()) <= MOST_LINES_OF_A_FILE, max(sizes, key=lambda path: sizes[path])
    assert sum(sizes.values()) <= MOST_LINES
    assert sum(sizes[ROOT / "tiny_model_server" / name] for name in WAY_OF_A_REQUEST) <= MOST_LINES_OF_THE_WAY
    for path in (ROOT / "tiny_model_server" / "protocols").glob("*.py"):
        assert sizes[path] <= 250, f"{path.name}: a protocol converts, delegates and converts back"


def test_functions_stay_short() -> None:
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert statistics.median((node.end_lineno or 0) - node.lineno + 1 for node in functions) < 10


def test_one_loop_owns_the_engine() -> None:
    """The engine needs no locks and no threads. A worker process is another matter: it runs models' code in threads."""
    for path in (ROOT / "tiny_model_server" / "engine").glob("*.py"):
        if path.stem != "worker":
            assert "threading" not in imports(path), path.name
            assert "ThreadPoolExecutor" not in path.read_text(), path.name


def test_no_protocol_imports_another() -> None:
    protocols = {path.stem for path in (ROOT / "tiny_model_server" / "protocols").glob("[a-z]*.py")} - {"tensors"}
    protocols -= {"open_inference_rest"}  # the HTTP form of open_inference
    for name in protocols:
        found = imports(ROOT / "tiny_model_server" / "protocols" / f"{name}.py")
        assert not {*(f"tiny_model_server.protocols.{other}" for other in protocols)} & found


def test_nothing_depends_on_reference_counts_or_the_collector() -> None:
    """Weak references know what the application has dropped: a client, an array, a model's input. Nothing else does."""
    for path in SOURCES:
        text = path.read_text()
        for word in ("getrefcount", "__del__", "import gc", "gc.collect", "WeakValueDictionary", "WeakKeyDictionary"):
            assert word not in text, f"{path.name} has {word}"
        assert "weakref" not in text or path.name in {"local.py", "worker.py"}, path
