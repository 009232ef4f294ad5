"""Workers as processes: what models start, leave behind and break, and what the server itself may lack."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import model_client
from tests.conftest import ROOT, Server, running_engine, wait_for
from tests.test_faults import ANSWERS, Load, alive, write_model
from tests.test_package import environment, run, wheel  # noqa: F401 - a fixture
from tiny_model_server import codec, schemas
from tiny_model_server.engine import children
from tiny_model_server.engine.call import Call
from tiny_model_server.errors import InvalidInput
from tiny_model_server.settings import ModelOptions, Settings, SettingsError, model_overrides

StartServer = Callable[..., Server]


def write(folder: Path, name: str, code: str) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(code))
    return folder


def health(server: Server, name: str) -> int:
    """grpc.health.v1's answer: 1 is SERVING, 2 is NOT_SERVING."""
    methods = schemas.methods("health", "grpc.health.v1.Health")["Check"]
    request = methods.request(service=name).SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        answer = channel.unary_unary(methods.path)(request, timeout=10)
    return int(methods.response.FromString(answer).status)


# ---- models that start processes and threads

CRUNCH = """
    import multiprocessing, os, sys
    from concurrent.futures import ProcessPoolExecutor
    from model_interface import InvalidInput, ModelInterface

    def square(number):
        if number < 0:
            raise InvalidInput("negative")
        return number * number

    class Model(ModelInterface):
        timeout_s = 30
        example = [["spawn", "ProcessPoolExecutor"], [1, 2]]

        def run(self, data, args):
            (how, what), numbers = data
            if how == "joblib":
                from joblib import Parallel, delayed
                return Parallel(n_jobs=2)(delayed(square)(number) for number in numbers)
            context = multiprocessing.get_context(how)
            if what == "Pool":
                with context.Pool(2) as pool:
                    return pool.map(square, numbers)
            with ProcessPoolExecutor(2, mp_context=context) as pool:
                return list(pool.map(square, numbers))
"""
WAYS = [(how, what) for how in ("fork", "spawn", "forkserver") for what in ("ProcessPoolExecutor", "Pool")]
WAYS.append(("joblib", ""))


@pytest.fixture(scope="module")
def crunching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write(tmp_path_factory.mktemp("data") / "m", "crunch-er", CRUNCH)
    server = Server(models=folder, TMS_ALIASES="Zahlen=crunch-er")
    yield server
    server.kill()


@pytest.mark.parametrize(
    ("way", "name"), [*((way, "crunch-er") for way in WAYS), *((way, "Zahlen") for way in WAYS if way[1] != "Pool")]
)
def test_functions_of_a_models_module_run_in_processes_that_it_starts(
    crunching: Server, way: tuple[str, str], name: str
) -> None:
    if way[0] == "joblib":
        pytest.importorskip("joblib", reason="joblib is not installed")
    client = crunching.client(name, timeout=60)
    assert client.run([list(way), [1, 2, 3]]) == [1, 4, 9]
    if way[0] != "joblib":
        with pytest.raises(model_client.InvalidInput, match="negative"):
            client.run([list(way), [-1]])


def test_they_do_where_another_package_is_called_models(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise RuntimeError('another package')\n")
    write(tmp_path / "models", "crunch", CRUNCH)
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMS_MODELS_DIR": "models"}
    command = [sys.executable, "-m", "tiny_model_server", "check", "crunch"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.startswith("crunch  READY "), ran.stderr
    assert ran.stdout.endswith(" answers its example with [1, 4]\n")


def test_a_thread_or_a_slow_close_does_not_hold_up_a_reload(start_server: StartServer, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    code = f"""
        import atexit, pathlib, threading, time
        from model_interface import ModelInterface
        class Model(ModelInterface):
            def __init__(self):
                threading.Thread(target=time.sleep, args=(1000,)).start()
                atexit.register(lambda: pathlib.Path({str(closed)!r}).write_text(self.text))
                self.text = ""
            def run(self, data, args):
                return "ok"
            def close(self):
                self.text = "closed"
    """
    slow = """
        import time
        from model_interface import ModelInterface
        class Model(ModelInterface):
            def run(self, data, args):
                return "ok"
            def close(self):
                time.sleep(1000)
    """
    write(write(tmp_path / "models", "threads", code), "slow", slow)
    server = start_server(models=tmp_path / "models")
    started = time.monotonic()
    server.client("threads").reload_model()
    server.client("threads").unload_model()
    assert time.monotonic() - started < 10
    assert closed.read_text() == "closed"
    server.client("slow").reload_model()
    assert time.monotonic() - started < 40  # by default it has 60 s
    server.wait_for_log(r"close\(\) of model 'slow' takes longer than 10 s")


FAMILY = """
    import os, subprocess, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from model_interface import ModelInterface

    def daemon():  # forks twice, into a session of its own
        read, write = os.pipe()
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.write(write, str(os.getpid()).encode())
                time.sleep(1000)
            os._exit(0)
        return int(os.read(read, 99))

    class Model(ModelInterface):
        def run(self, data, args):
            self.pool = ProcessPoolExecutor(1)
            self.pool.submit(abs, -1).result()
            tool = subprocess.Popen(["sleep", "1000"])
            session = subprocess.Popen(["sleep", "1001"], start_new_session=True)
            clean = subprocess.Popen(["sleep", "1002"], start_new_session=True, env={})
            return [os.getpid(), *self.pool._processes, tool.pid, session.pid, clean.pid, daemon()]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans can be found on Linux only")
@pytest.mark.parametrize(
    "end", ["kill the front", "kill the worker", "kill the guardian", "unload", "stop", "stuck", "deaf"]
)
def test_what_a_worker_has_started_ends_with_it(start_server: StartServer, tmp_path: Path, end: str) -> None:
    server = start_server(models=write(tmp_path, "family", FAMILY))
    client = server.client("family")
    pids = client.run(1)
    assert alive(pids) == pids
    assert len(pids) == 6
    if end == "kill the front":
        server.process.kill()
    elif end == "stuck":
        os.kill(pids[0], signal.SIGSTOP)
        server.process.kill()
    elif end == "deaf":
        for child in psutil.Process(server.process.pid).children():
            child.suspend()
        server.process.kill()
    elif end == "kill the worker":
        os.kill(pids[0], signal.SIGKILL)
    elif end == "kill the guardian":
        for child in psutil.Process(server.process.pid).children():
            child.kill()
    elif end == "unload":
        client.unload_model()
    else:
        assert server.stop() == 0
    wait_for(lambda: not alive(pids), "all to go", timeout=15)
    if end.startswith("kill the") and end != "kill the front":
        wait_for(lambda: client.model_info()[0]["worker_pids"], "another worker")
        assert len(client.run(1)) == 6


def test_shared_memory_of_multiprocessing_goes_with_the_worker(start_server: StartServer, tmp_path: Path) -> None:
    code = """
        from multiprocessing.shared_memory import SharedMemory
        from model_interface import ModelInterface
        class Model(ModelInterface):
            def __init__(self):
                self.memory = SharedMemory(create=True, size=4096)
            def run(self, data, args):
                return self.memory.name
    """
    client = start_server(models=write(tmp_path, "shares", code)).client("shares")
    path = Path("/dev/shm") / client.run(1)
    assert path.exists()
    os.kill(client.model_info()[0]["worker_pids"][0], signal.SIGKILL)
    wait_for(lambda: not path.exists(), "the tracker to remove it")


def test_process_one_leaves_no_zombies(tmp_path: Path) -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount", "--kill-child"]
    if os.geteuid() or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a PID namespace takes root and unshare")
    code = """
        import os, subprocess
        from model_interface import ModelInterface
        class Model(ModelInterface):
            def __init__(self):
                self.tool = subprocess.Popen(["sleep", "300"])
            def run(self, data, args):
                os._exit(3)
    """
    write(tmp_path, "fragile", code)
    drive = """
        import os, subprocess, sys, time
        import psutil
        from model_client import ModelClient
        subprocess.Popen(["sh", "-c", "(sleep 0.5; exit 5) & exit 0"]).wait()  # an orphan that is not the server's
        client = ModelClient("fragile", addresses=sys.argv[1], timeout=30)
        for number in range(3):
            try:
                client.run(number, retry=False)
            except Exception as error:
                print(error)
        end = time.monotonic() + 15
        while time.monotonic() < end:
            dead = [p.info for p in psutil.process_iter(["pid", "name", "status"]) if p.info["status"] == "zombie"]
            if not dead:
                break
            time.sleep(0.2)
        print("zombies:", dead)
        client.stop_server()
    """
    (tmp_path / "drive.py").write_text(textwrap.dedent(drive))
    script = (
        f"mount -t proc proc /proc; {sys.executable} {tmp_path}/drive.py unix:{tmp_path}/s > {tmp_path}/out 2>&1 & "
        f"exec {sys.executable} server.py 2> {tmp_path}/log"
    )
    env = {"TMS_MODELS_DIR": tmp_path, "TMS_PORT": 0, "TMS_HTTP_PORT": "off", "TMS_SOCKET": tmp_path / "s"}
    ran = subprocess.run(
        [*unshare, "bash", "-c", script],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in env.items()} | {"PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
    )
    out = (tmp_path / "out").read_text()
    assert ran.returncode == 0, (tmp_path / "log").read_text()
    assert "zombies: []" in out
    assert out.count("exited with code 3") == 3, out


# ---- models that raise, answer and write what they should not

ODD = """
    import itertools, sys
    from model_interface import InvalidInput, ModelInterface

    class Mute(Exception):
        def __str__(self):
            raise ValueError("no words")
        __repr__ = __str__

    class Rude(InvalidInput):
        status = 7
        def __str__(self):
            raise SystemExit

    class Hidden(InvalidInput):
        status = None

    class NoLength(list):
        def __len__(self):
            raise RuntimeError("no length")

    class NoItems(list):
        def __iter__(self):
            raise KeyboardInterrupt

    def broken():
        raise ValueError("bad row")
        yield

    RAISED = {
        "mute": Mute(), "rude": Rude(), "hidden": Hidden("hidden"), "surrogate": ValueError("half \\ud83d a pair"),
        "invalid surrogate": InvalidInput("half \\ud83d a pair"), "huge": ValueError("\\u6f22" * 1000000),
        "interrupt": KeyboardInterrupt(), "exit": SystemExit(3), "generator exit": GeneratorExit(),
        "stop": StopIteration(), "memory": MemoryError(), "recursion": RecursionError(), "base": BaseException("base"),
        "group": ExceptionGroup("several", [ValueError("one"), Mute()]),
    }
    ANSWERED = {
        "no length": lambda: NoLength([1]), "no items": lambda: NoItems([1]), "object": object,
        "returned": lambda: ValueError("bad row"), "returned mute": Mute, "generator": broken,
        "endless": lambda: itertools.count(), "key": lambda: {Mute: 1}, "own cycle": lambda: cycle(),
        "yielded": lambda: (item for item in (ValueError("bad row"),)), "surrogate key": lambda: {"\\ud83d": cycle()},
    }

    def cycle():
        found = []
        found.append(found)
        return found

    class Model(ModelInterface):
        timeout_s = 20

        def run(self, data, args):
            if data in RAISED:
                raise RAISED[data]
            return ANSWERED[data]() if data in ANSWERED else data

        def run_batch(self, items, args):
            if args.get("whole") in ("endless", "no length", "no items"):
                return {"endless": itertools.count(), "no length": NoLength(items), "no items": NoItems(items)}[
                    args["whole"]]
            if args.get("whole") == "values":
                return [ValueError("bad row")] * len(items)
            raise Mute
"""
RAISED = """mute rude hidden surrogate invalid-surrogate huge interrupt exit generator-exit stop memory recursion base
group""".split()
ANSWERED = """no-items object returned returned-mute generator endless key own-cycle yielded surrogate-key""".split()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(models=write(tmp_path_factory.mktemp("odd"), "odd", ODD))
    yield server
    server.kill()


@pytest.mark.parametrize("what", RAISED + ANSWERED)
def test_whatever_a_model_raises_or_answers_each_caller_gets_one_status(odd: Server, what: str) -> None:
    what = what.replace("-", " ")
    client = odd.client("odd", timeout=15)
    before = client.model_info()[0]["worker_pids"]
    errors = (model_client.ModelFailed, model_client.InvalidInput)
    with pytest.raises(errors) as caught:
        client.run(what)
    assert len(str(caught.value).encode()) < 10000
    if what in ("returned", "yielded", "generator"):
        assert "model 'odd' raised ValueError: bad row" in str(caught.value)
    with pytest.raises(errors):
        list(client.run_stream(what))
    batch = client.run_batch([1, what, 3], return_exceptions=True)
    assert (batch[0], batch[2]) == (1, 3)
    assert isinstance(batch[1], errors)
    assert client.run("fine") == "fine"
    assert client.model_info()[0]["worker_pids"] == before


@pytest.mark.parametrize("whole", ["endless", "no items", "values"])
def test_whatever_run_batch_returns_each_caller_gets_one_status(odd: Server, whole: str) -> None:
    answers = odd.client("odd", timeout=15).run_batch([1, 2, 3], {"whole": whole}, return_exceptions=True)
    assert len(answers) == 3
    assert all(isinstance(answer, model_client.ModelFailed) for answer in answers)
    words = {"endless": "returned more than 3 results for 3 items", "values": "raised ValueError: bad row"}
    assert words.get(whole, "") in str(answers[0])


def test_a_sibling_is_imported_relatively(tmp_path: Path) -> None:
    write(tmp_path, "steps", "import cleaning\n")
    write(tmp_path, "more", "from parts.one import two\n")
    (tmp_path / "more" / "parts").mkdir()
    (tmp_path / "steps" / "cleaning.py").write_text("")
    (tmp_path / "steps" / "requirements.txt").write_text("")
    for name, module in (("steps", "cleaning"), ("more", "parts")):
        ran = run(sys.executable, ROOT / "server.py", "check", name, cwd=tmp_path, TMS_MODELS_DIR=str(tmp_path))
        assert f"write 'from . import {module}'" in ran.stderr
        assert "pip install" not in ran.stderr


EVIL = """
    import os, signal, threading, time
    from model_interface import ModelInterface
    class Model(ModelInterface):
        timeout_s = 3
        def run(self, data, args):
            what = args.get("do")
            if what == "close all":
                os.closerange(0, 4096)
            elif what == "close some":
                os.closerange(0, 21)
            elif what == "garbage":
                for fd in range(3, 60):
                    try:
                        os.write(fd, b"x" * 100)
                    except OSError:
                        pass
            elif what == "group":
                os.killpg(0, 9)
            elif what == "parent":
                os.kill(os.getppid(), 9)
            elif what == "stop parent":
                os.kill(os.getppid(), signal.SIGSTOP)
                os._exit(3)
            elif what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif what == "block":
                signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
                time.sleep(100)
            return [data, os.getpid()]
"""
EVILS = ["close all", "close some", "garbage", "group", "parent", "stop parent", "stop", "block"]


@pytest.mark.parametrize("local", [0, 1])
def test_a_model_that_breaks_its_process_harms_nobody_else(
    start_server: StartServer, tmp_path: Path, local: int
) -> None:
    write_model(tmp_path, "good", ANSWERS.format("good"))
    server = start_server(models=write(tmp_path, "evil", EVIL), TMS_LOCAL_TRANSPORT=local)
    evil, good = server.client("evil", timeout=30), server.client("good")
    with Load(lambda number: (good.run(number), time.sleep(0.01)), callers=2) as load:
        for what in EVILS:
            started = time.monotonic()
            try:
                evil.run(1, {"do": what}, retry=False)
            except model_client.ModelClientError:
                pass  # whether it can still answer is its own affair
            assert time.monotonic() - started < 25, what
            assert wait_for(lambda: evil.run(2)[0] == 2, f"a worker after {what}"), what
        load.more(20)
    assert load.failures == []


# ---- what the server itself may lack


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are set on Linux only")
def test_a_brief_lack_of_descriptors_is_got_over(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(models=write_model(tmp_path, "one", ANSWERS.format("one")))
    client = server.client("one", timeout=30)
    assert client.run(1) == "one"
    pid = server.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    for more in range(12):  # descriptors that can still be opened
        (worker,) = wait_for(lambda: client.model_info()[0]["worker_pids"], "a worker")
        used = set(map(int, os.listdir(f"/proc/{pid}/fd")))
        free = [number for number in range(2000) if number not in used]
        os.kill(worker, signal.SIGKILL)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[more], hard))
        time.sleep(0.4)  # in which it tries
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        gone = [worker]
        wait_for(lambda gone=gone: client.model_info()[0]["worker_pids"] not in ([], gone), f"a worker after {more}")
        wait_for(lambda: client.model_info()[0]["state"] == "READY", "the model")
        assert client.run(1) == "one"


@pytest.mark.parametrize("local", [0, 1])
def test_a_batch_of_many_callers(start_server: StartServer, tmp_path: Path, local: int) -> None:
    """More descriptors than one message between front and worker may have."""
    body = "    max_batch_size = 300\n    def run_batch(self, items, args):\n        time.sleep(0.3)\n"
    models = write_model(tmp_path, "wide", body + "        return [[item, len(items)] for item in items]")
    source = models / "wide" / "__init__.py"
    source.write_text(
        "import time\n" + source.read_text() + "    def run(self, data, args):\n        return [data, 1]\n"
    )
    server = start_server(models=models, TMS_LOCAL_TRANSPORT=local, TMS_THREADS=2000)
    client = server.client("wide", timeout=20)
    with ThreadPoolExecutor(280) as threads:
        answers = list(threads.map(client.run, range(600)))
    assert [answer[0] for answer in answers] == list(range(600))
    assert max(answer[1] for answer in answers) > 130


def test_many_callers_share_memory_with_many_slots(start_server: StartServer, tmp_path: Path) -> None:
    """Each slot of a worker maps the memory of each caller, but not of more callers than it has descriptors for."""
    models = write_model(tmp_path, "slots", "    concurrency = 8\n" + ANSWERS.format("one"))
    server = start_server(
        models=models, command=("bash", "-c", 'ulimit -n 300; exec "$0" server.py', sys.executable), TMS_HTTP_PORT="off"
    )
    client = server.client("slots", timeout=20)
    pids = client.model_info()[0]["worker_pids"]
    with Load(lambda number: client.run(number), callers=40) as load:
        load.more(4000)
    assert not load.failures
    assert client.model_info()[0]["worker_pids"] == pids


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are set on Linux only")
def test_health_says_that_no_worker_can_be_started(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(models=write_model(tmp_path, "one", ANSWERS.format("one")))
    client = server.client("one", timeout=10)
    assert (client.run(1), health(server, "one")) == ("one", 1)
    with grpc.insecure_channel(server.address) as channel:
        methods = schemas.methods("health", "grpc.health.v1.Health")["Check"]
        check = channel.unary_unary(methods.path)
        request = methods.request(service="one").SerializeToString()
        assert check(request, timeout=10) == b"\x08\x01"
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        (worker,) = client.model_info()[0]["worker_pids"]
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: check(request, timeout=10) == b"\x08\x02", "NOT_SERVING")
        started = time.monotonic()
        with pytest.raises(model_client.ModelClientError):
            client.run(1, timeout=5, retry=False)
        assert time.monotonic() - started < 6
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
        wait_for(lambda: check(request, timeout=10) == b"\x08\x01", "SERVING")
    assert client.run(1) == "one"
    assert any("the server cannot run a worker now, and tries again: OSError" in line for line in server.log)


@pytest.mark.parametrize(
    "error",
    [OSError(11, "Resource temporarily unavailable"), OSError(12, "Cannot allocate memory"), MemoryError(),
     ZeroDivisionError("a mistake of the server")],
    ids=repr,
)  # fmt: skip
def test_the_supervisor_of_a_worker_survives_any_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    spawn, failures = children.spawn, []

    def fail(*arguments: Any, **options: Any) -> Any:
        if len(failures) < 3:
            failures.append(1)
            raise error
        return spawn(*arguments, **options)

    with running_engine(Settings(models_dir=write_model(tmp_path, "one", ANSWERS.format("one")))) as engine:
        model = engine.wait(engine.load("one"))
        monkeypatch.setattr(children, "spawn", fail)
        os.kill(model.pids[0], signal.SIGKILL)
        wait_for(lambda: len(failures) == 3 and model.pids, "another worker")
        wait_for(lambda: model.state == "READY", "the model")
        assert codec.decode(engine.run("one", codec.encode(1), {}, Call())) == "one"


def test_a_first_load_waits_for_what_the_server_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spawn, failures = children.spawn, []

    def fail(*arguments: Any, **options: Any) -> Any:
        if len(failures) < 3:
            failures.append(1)
            raise OSError(24, "Too many open files")
        return spawn(*arguments, **options)

    monkeypatch.setattr(children, "spawn", fail)
    with running_engine(Settings(models_dir=write_model(tmp_path, "one", ANSWERS.format("one")))) as engine:
        assert engine.wait(engine.load("one")).state == "READY"


# ---- the bounds of options


def test_the_bounds_of_an_option_hold_wherever_it_comes_from(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(
        models=write_model(tmp_path, "one", ANSWERS.format("one")), TMS_PROTOCOLS="native,open_inference,nos"
    )
    client = server.client("one")
    for workers in (100000, 257, -1, -(2**31)):
        with pytest.raises(model_client.InvalidInput, match="workers = .* must be a whole number from 1 to 256"):
            client.load_model(workers=workers)
    assert len(client.model_info()[0]["worker_pids"]) == 1
    assert client.run(1) == "one"


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", 257), ("workers", "2x"), ("max_batch_size", 0), ("max_batch_size", 1 << 20),
     ("timeout_s", float("nan")), ("timeout_s", float("inf")), ("queue_size", -1),
     ("concurrency", 65), ("image_mode", "cmyk"), ("max_wait_ms", -1)],
)  # fmt: skip
def test_overrides_and_class_attributes_are_checked_alike(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"TMS_MODEL_X_{name.upper()}='.*' must be"):
        model_overrides("x", {f"TMS_MODEL_X_{name.upper()}": str(value)})
    with pytest.raises(ValueError, match=f"{name} = .* must be"):
        ModelOptions().declared({name: value})


def test_an_engine_refuses_what_an_option_may_not_be(tmp_path: Path) -> None:
    with (
        running_engine(Settings(models_dir=write_model(tmp_path, "one", ANSWERS.format("one")))) as engine,
        pytest.raises(InvalidInput, match="from 1 to 256"),
    ):
        engine.wait(engine.load("one", 1000))


# ---- interpreters of models' own

WHERE = """
    import multiprocessing, sys
    import numpy as np
    from model_interface import ModelInterface
    def where(number):
        import tiny_model_server, model_interface
        return [np.__version__, sys.version.split()[0], np.__file__, tiny_model_server.__file__]
    class Model(ModelInterface):
        example = np.zeros((2, 2), np.uint8)
        def run(self, data, args):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                there = pool.map(where, [1])[0]
            try:
                import google.protobuf
                leaks = True
            except ImportError:
                leaks = False
            return {"same": there == where(0), "leaks": leaks, "array": data, "where": there}
"""


def python(version: str) -> str:
    """A Python of this version, if the machine has one that runs."""
    candidates = [*sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python")),
                  shutil.which(f"python{version}")]  # fmt: skip
    for candidate in filter(None, candidates):
        if not subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode:
            return str(candidate)
    pytest.skip(f"there is no Python {version} here")


def own_interpreter(folder: Path, version: str, *requirements: str) -> None:
    subprocess.run([python(version), "-m", "venv", "--without-pip", folder / ".venv"], check=True, timeout=100)
    if requirements:
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", folder / ".venv" / "bin" / "python"]
        ran = subprocess.run([*uv, *requirements], capture_output=True, text=True, timeout=200, check=False)
        if ran.returncode:
            pytest.skip(f"{requirements} cannot be installed: {ran.stderr[-200:]}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15"])
def test_a_models_own_python_may_be_of_any_version(start_server: StartServer, tmp_path: Path, version: str) -> None:
    write(tmp_path, "own", WHERE)
    own_interpreter(tmp_path / "own", version, "numpy")
    server = start_server(models=tmp_path, ready=False)
    server.wait_for_log("serving 1 models$", timeout=60)
    answer = server.client("own", timeout=60).run("text")
    assert answer.pop("where")[1].startswith(version)
    assert answer == {"same": True, "leaks": False, "array": "text"}


def test_a_python_that_is_too_old_is_refused_with_what_it_must_be(tmp_path: Path) -> None:
    write(tmp_path, "own", WHERE)
    own_interpreter(tmp_path / "own", "3.8")
    ran = run(sys.executable, ROOT / "server.py", "check", "own", cwd=tmp_path, TMS_MODELS_DIR=str(tmp_path))
    assert "a model's own interpreter must be Python 3.9 or newer, with numpy; " in ran.stderr
    assert "is Python 3.8" in ran.stderr


def test_a_python_without_numpy_is_refused_with_what_it_must_have(tmp_path: Path) -> None:
    write(tmp_path, "own", WHERE)
    own_interpreter(tmp_path / "own", ".".join(map(str, sys.version_info[:2])))
    ran = run(sys.executable, ROOT / "server.py", "check", "own", cwd=tmp_path, TMS_MODELS_DIR=str(tmp_path))
    assert "must be Python 3.9 or newer, with numpy" in ran.stderr
    assert "where numpy cannot be imported: ModuleNotFoundError" in ran.stderr


@pytest.mark.parametrize("broken", ["no permission", "no program"])
def test_a_python_that_cannot_be_started_is_named(tmp_path: Path, broken: str) -> None:
    write(tmp_path, "own", WHERE)
    path = tmp_path / "own" / ".venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text("nonsense")
    path.chmod(0o644 if broken == "no permission" else 0o755)
    ran = run(sys.executable, ROOT / "server.py", "check", "own", cwd=tmp_path, TMS_MODELS_DIR=str(tmp_path))
    assert f"its interpreter {path} cannot be started" in ran.stderr


@pytest.mark.timeout(400)
def test_an_installed_server_leaves_a_models_own_packages_to_it(
    wheel: Path,  # noqa: F811
    start_server: StartServer,
    tmp_path: Path,
) -> None:
    programs = environment(tmp_path / "venv", f"{wheel}[server]")
    version = ".".join(map(str, sys.version_info[:2]))
    write(tmp_path / "models", "own", WHERE.replace('"array": data, ', ""))
    own_interpreter(tmp_path / "models" / "own", version, "numpy<2.3" if version >= "3.10" else "numpy<2")
    server = start_server(tmp_path / "models", command=[programs / "tiny-model-server"], cwd=tmp_path)
    answer = server.client("own", timeout=60).run("text")
    assert answer["same"]
    assert not answer["leaks"]
    assert answer["where"][0].startswith(("2.2.", "1."))
    assert str(tmp_path / "models" / "own" / ".venv") in answer["where"][2]
    assert str(tmp_path / "venv") in answer["where"][3]
