"""The shape of the tree: imports point one way, committed descriptor sets are current, files say their job."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each file may import what stands before it (and nothing after it): leaves first, the launcher last.
ORDER = [
    "tiny_model_server.errors",
    "tiny_model_server.budget",
    "tiny_model_server.codec",
    "tiny_model_server.shm",
    "tiny_model_server.pipe",
    "tiny_model_server.awake",
    "tiny_model_server.pictures",
    "tiny_model_server.tally",
    "tiny_model_server.devices",
    "tiny_model_server.settings",
    "tiny_model_server.callers",
    "tiny_model_server.logs",
    "tiny_model_server.wire",
    "tiny_model_server.tensors",
    "tiny_model_server.trust",
    "tiny_model_server.tracing",
    "tiny_model_server.lane",
    "tiny_model_server.channel",
    "tiny_model_server.arguments",
    "tiny_model_server.forks",
    "tiny_model_server.stats",
    "model_interface",
    "model_client",
    "tiny_model_server.guardian",
    "tiny_model_server.worker",
    "tiny_model_server.worker_path",
    "tiny_model_server.children",
    "tiny_model_server.load",
    "tiny_model_server.batcher",
    "tiny_model_server.pool",
    "tiny_model_server.repository",
    "tiny_model_server.engine",
    "tiny_model_server.admission",
    "tiny_model_server.protocols",
    "tiny_model_server.health",
    "tiny_model_server.tls",
    "tiny_model_server.grpc_server",
    "tiny_model_server.lane_server",
    "tiny_model_server.http_server",
    "tiny_model_server.forms",
    "tiny_model_server.web",
    "tiny_model_server.reload",
    "tiny_model_server.ending",
    "tiny_model_server.launcher",
    "tiny_model_server.__main__",
    "server",
]
CLIENT_NEEDS = {
    "errors",
    "arguments",
    "codec",
    "shm",
    "lane",
    "wire",
    "trust",
    "tracing",
    "channel",
    "forks",
    "stats",
}
SOURCES = [ROOT / "server.py", ROOT / "model_client.py", ROOT / "model_interface.py"]
SOURCES += sorted((ROOT / "tiny_model_server").rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:2]) if parts[1:] != ("__init__",) else parts[0]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in ORDER else node.module for name in deeper}
    return found


def test_imports_point_one_way() -> None:
    for path in SOURCES:
        name = module_of(path)
        if name == "tiny_model_server":
            continue
        for imported in imports(path):
            ours = next((module for module in ORDER if imported == module or imported.startswith(module + ".")), None)
            if ours and imported != name:
                assert ORDER.index(ours) < ORDER.index(name), f"{name} imports {imported}"


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
    code = "import sys, tiny_model_server.worker; print(sorted({'grpc', 'google.protobuf', 'cv2'} & set(sys.modules)))"
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
    # The pool hands it on to its workers, and a worker (and ``models``) to what its model starts; OpenTelemetry has
    # variables of its own.
    assert readers == {
        "settings.py",
        "model_client.py",
        "pool.py",
        "devices.py",
        "tracing.py",
        "worker.py",
        "models.py",
    }


def test_the_inside_stays_small() -> None:
    """Lines of code: docstrings and comments are asked for elsewhere, and are not to be saved on."""
    core = 0
    for path in (ROOT / "tiny_model_server").rglob("*.py"):
        text = path.read_text()
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
        docstrings = {
            line
            for node in strings
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        numbered = enumerate(text.splitlines(), 1)
        lines = sum(number not in docstrings and line.strip()[:1] not in ("", "#") for number, line in numbered)
        if path.parent.name == "protocols":
            assert lines < 250, f"{path.name}: a door converts, delegates and converts back"
        else:
            core += lines
    assert core <= 7300


def test_no_door_imports_another() -> None:
    doors = {path.stem for path in (ROOT / "tiny_model_server" / "protocols").glob("*.py")}
    for name in doors:
        found = imports(ROOT / "tiny_model_server" / "protocols" / f"{name}.py")
        assert not {"tiny_model_server.protocols", *(f"tiny_model_server.protocols.{other}" for other in doors)} & found


def test_nothing_depends_on_reference_counts_or_the_collector() -> None:
    """Weak references know what the application has dropped: a client, an array, a model's input. Nothing else does."""
    for path in SOURCES:
        text = path.read_text()
        for word in ("getrefcount", "__del__", "import gc", "gc.collect", "WeakValueDictionary", "WeakKeyDictionary"):
            assert word not in text, f"{path.name} has {word}"
        assert "weakref" not in text or path.name in {"model_client.py", "lane.py", "worker.py"}, path
