"""What production does to a server: crashes, full queues, vanished callers, reloads, stops, all under load."""

import contextlib
import os
import selectors
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import psutil
import pytest

import model_client
from tests.conftest import Server, only, running_engine, shared_memory, wait_for
from tiny_model_server import codec, schemas
from tiny_model_server.engine import busy_polling, engine, placement
from tiny_model_server.engine.buffers import place
from tiny_model_server.engine.call import Call
from tiny_model_server.errors import Overloaded
from tiny_model_server.settings import Settings, parse_devices

StartServer = Callable[..., Server]


def write_model(folder: Path, name: str, body: str) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(
        f"from model_interface import ModelInterface\nclass Model(ModelInterface):\n{body}\n"
    )
    return folder


ANSWERS = "    def run(self, data, args):\n        return {!r}"


class Load:
    """Callers in threads, each calling again and again; every failure and every answer is kept."""

    def __init__(self, call: Callable[[int], Any], callers: int = 8) -> None:
        self.failures: list[Exception] = []
        self.answers: list[Any] = []
        self.times: list[float] = []
        self._call = call
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(callers)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        number = index
        while not self._end.is_set():
            number += 1000
            started = time.monotonic()
            try:
                self.answers.append((number, self._call(number)))
            except Exception as error:
                self.failures.append(error)
            self.times.append(time.monotonic() - started)

    def more(self, count: int, timeout: float = 20) -> None:
        enough = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= enough, f"{count} more answers, {self.failures[:1]}", timeout)


def metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


# ---- queue, deadlines, callers that go


def test_idle_takes_no_cpu(server: Server) -> None:
    server.client("echo").run_text("warm")
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(1)
    used = sum(sum(process.cpu_times()[:2]) for process in processes) - sum(before)
    assert used < 0.05, f"{used} s of CPU in one idle second"


def test_a_full_queue_is_refused_at_once_with_a_time_to_come_back(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_QUEUE_SIZE=3, TMS_MODEL_WORKER_MAX_BATCH_SIZE=1)
    client = server.client("worker")
    client.run("first", {"sleep": 1})  # so that the batch time is known
    request = schemas.message("server", "server.TextArgs")(text="x", model="worker", args='{"sleep": 1}')
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor(4) as threads:
        call = channel.unary_unary("/server.Server/RunText")
        accepted = [threads.submit(call, request.SerializeToString()) for _ in range(4)]
        wait_for(lambda: client.model_info()[0]["queue_depth"] == 3, "a full queue")
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            call(request.SerializeToString())
        assert time.monotonic() - started < 0.1
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the queue is full: 3 of 3" in caught.value.details()
        trailing = dict(caught.value.trailing_metadata())
        assert 500 < int(trailing["grpc-retry-pushback-ms"]) < 5000
        assert all(future.result() for future in accepted)


def test_a_full_queue_refuses_a_large_array_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path, "slow", "    def run(self, data, args):\n        __import__('time').sleep(1)")
    monkeypatch.setenv("TMS_MODEL_SLOW_QUEUE_SIZE", "1")
    copied: list[int] = []
    monkeypatch.setattr(engine, "place", lambda *given: copied.append(1) or place(*given))
    with running_engine(Settings(models_dir=folder)) as running, ThreadPoolExecutor(2) as threads:
        model = running.wait(running.load("slow"))

        def call(size: int) -> Any:
            return running.run("slow", codec.encode(np.zeros(size, np.uint8)), {}, Call())

        accepted = [threads.submit(call, 1)]
        wait_for(lambda: copied and not model.batcher.depth, "a busy worker")
        accepted.append(threads.submit(call, 1))
        wait_for(lambda: model.batcher.depth == 1, "a full queue")
        before = len(copied)
        with pytest.raises(Overloaded, match="the queue is full: 1 of 1"):
            call(2 << 20)
        assert len(copied) == before
        assert [future.result() for future in accepted]


def test_a_deadline_that_cannot_be_met_is_refused_on_arrival(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_MAX_BATCH_SIZE=1)
    client = server.client("worker")
    client.run("first", {"sleep": 0.3})
    with ThreadPoolExecutor(5) as threads:
        running = [threads.submit(client.run, number, {"sleep": 0.3}) for number in range(5)]
        wait_for(lambda: client.model_info()[0]["queue_depth"] == 4, "a queue")
        started = time.monotonic()
        with pytest.raises(model_client.DeadlineExceeded, match="4 items are waiting, which takes about"):
            client.run("late", timeout=0.5)
        assert time.monotonic() - started < 0.3
        assert all(future.result() for future in running)


def test_work_that_nobody_waits_for_is_not_run(start_server: StartServer, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    server = start_server(TEST_CALLS=calls, TMS_MODEL_WORKER_MAX_BATCH_SIZE=1)
    client, leaving = server.client("worker"), server.client("worker")
    client.run("warm")
    with ThreadPoolExecutor(8) as threads:
        running = threads.submit(client.run, "running", {"sleep": 0.6})
        wait_for(lambda: "running" in calls.read_text(), "the first call to run")
        expired = threads.submit(client.run, "expired", {"own": 1}, 0.2)
        cancelled = threads.submit(leaving.run, "cancelled", {"own": 2})
        wait_for(lambda: client.model_info()[0]["queue_depth"] == 2, "both to queue")
        leaving.close()
        with pytest.raises(model_client.Cancelled):
            cancelled.result()
        with pytest.raises(model_client.DeadlineExceeded):
            expired.result()
        assert running.result()
    assert client.run("last")["item"] == "last"
    assert calls.read_text().split() == ["warm", "running", "last"]
    assert metrics(server)['tms_dropped_total{model="worker"}'] == 2


def test_health_answers_while_every_thread_and_queue_is_full(start_server: StartServer) -> None:
    server = start_server(TMS_THREADS=4, TMS_MODEL_WORKER_QUEUE_SIZE=2, TMS_MODEL_WORKER_MAX_BATCH_SIZE=1)
    client = server.client("worker")
    client.run(0)
    health = schemas.message("health", "grpc.health.v1.HealthCheckRequest")(service="worker").SerializeToString()
    with Load(lambda number: client.run(number, {"sleep": 0.3}), callers=40) as load:
        wait_for(lambda: len(load.failures) > 20, "refusals")
        with grpc.insecure_channel(server.address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            check(health, timeout=5)
            times = []
            for _ in range(20):
                started = time.monotonic()
                assert check(health, timeout=5) == b"\x08\x01"
                times.append(time.monotonic() - started)
        assert sorted(times)[10] < 0.2
        assert client.list_models()
    assert {type(error) for error in load.failures} == {model_client.Overloaded}


# ---- workers that die


def test_kill_minus_nine_of_a_worker_under_load_fails_nothing(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_WORKERS=2)
    client = server.client("worker")
    with Load(lambda number: client.run(number, {"sleep": 0.01})) as load:
        for _ in range(3):
            load.more(50)
            pids = client.model_info()[0]["worker_pids"]
            os.kill(pids[0], signal.SIGKILL)
            wait_for(
                lambda gone=pids[0]: gone not in (now := client.model_info()[0]["worker_pids"]) and len(now) == 2,
                "2 workers",
            )
        load.more(50)
    assert load.failures == []
    assert all(answer["item"] == number for number, answer in load.answers)
    assert metrics(server)['tms_worker_restarts_total{model="worker"}'] == 3


def test_only_the_item_that_kills_fails(start_server: StartServer) -> None:
    server = start_server()
    client, other = server.client("worker"), server.client("echo")
    with Load(lambda number: other.run(number)) as load:
        answers = client.run_batch([1, 2, "kill", 4, 5, 6], return_exceptions=True)
        load.more(50)
    assert [answers[index]["item"] for index in (0, 1, 3, 4, 5)] == [1, 2, 4, 5, 6]
    assert isinstance(answers[2], model_client.ModelFailed)
    assert "killed by SIGKILL (out of memory, or from outside), twice" in str(answers[2])
    assert load.failures == []
    assert max(load.times) < 2  # the neighbours don't wait for it


def test_memory_that_is_not_there_fails_the_call_only(server: Server) -> None:
    client = server.client("worker")
    with pytest.raises(model_client.ModelFailed, match="MemoryError|ArrayMemoryError"):
        client.run(1, {"allocate": 1})
    assert client.run(1)["item"] == 1


def test_too_few_results_are_nobodys_answers(server: Server) -> None:
    answers = server.client("worker").run_batch([1, 2, 3], {"too_few": 1}, return_exceptions=True)
    assert all("returned 1 results for 3 items" in str(answer) for answer in answers)


def test_device_memory_that_runs_out_halves_the_batch(server: Server) -> None:
    client = server.client("gpu_memory")
    assert client.run_batch(list(range(10))) == [
        [0, 2],
        [1, 2],
        [2, 3],
        [3, 3],
        [4, 3],
        [5, 2],
        [6, 2],
        [7, 3],
        [8, 3],
        [9, 3],
    ]
    answers = client.run_batch([1, 2, 3, 4, "huge"], return_exceptions=True)
    assert [answer[0] for answer in answers[:4]] == [1, 2, 3, 4]
    answers = client.run_batch(["huge", 1, 2, 3, 4], return_exceptions=True)
    assert [answer[0] for answer in answers[1:]] == [1, 2, 3, 4]
    with pytest.raises(model_client.ModelFailed, match="CUDA out of memory"):
        client.run("huge")


# ---- lifecycle


def test_load_unload_and_reload(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "one", ANSWERS.format("old"))
    server = start_server(models=tmp_path)
    client = server.client("one")
    (info,) = client.model_info()
    assert (info["state"], len(info["worker_pids"]), info["stages"]) == ("READY", 1, [])
    assert client.run(1) == "old"
    write_model(tmp_path, "one", ANSWERS.format("new"))
    (after,) = client.reload_model()
    assert alive(info["worker_pids"]) == []
    assert client.run(1) == "new"
    (scaled,) = client.load_model(workers=3)
    assert len(scaled["worker_pids"]) == 3
    assert alive(after["worker_pids"]) == []
    assert client.unload_model()[0]["state"] == "UNLOADED"
    assert alive(scaled["worker_pids"]) == []  # and so all their memory is back
    with pytest.raises(model_client.ModelUnavailable, match="model 'one' is not loaded"):
        client.run(1)
    assert client.health_check()["serving"]
    assert client.unload_model()[0]["state"] == "UNLOADED"
    assert client.load_model()[0]["state"] == "READY"
    assert client.run(1) == "new"
    write_model(tmp_path, "two", ANSWERS.format(2))  # came after the start
    assert server.client("two").load_model()[0]["state"] == "READY"
    assert server.client("two").run(1) == 2
    with pytest.raises(model_client.ModelNotFound):
        server.client("three").load_model()
    with pytest.raises(model_client.InvalidInput, match="workers = -1 must be a whole number from 1 to 256"):
        client.load_model(workers=-1)


def test_a_failed_reload_leaves_the_old_one_at_work(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "one", ANSWERS.format("old"))
    client = start_server(models=tmp_path).client("one")
    write_model(
        tmp_path,
        "one",
        "    def __init__(self):\n        raise RuntimeError('worse')\n    def run(self, data, args): ...",
    )
    with pytest.raises(
        model_client.ModelUnavailable, match=r"RuntimeError: worse \(__init__.py, line 4\); the old one"
    ):
        client.reload_model()
    assert client.run(1) == "old"
    assert client.model_info()[0]["state"] == "READY"


def test_a_failed_warm_up_is_a_failed_load_that_can_be_repaired(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "one", ANSWERS.format(1) + "\n    def warmup(self):\n        raise ValueError('cold')")
    server = start_server(models=tmp_path)
    client = server.client("one")
    with pytest.raises(model_client.ModelUnavailable, match="could not be loaded: ValueError: cold"):
        client.run(1)
    write_model(tmp_path, "one", ANSWERS.format("repaired"))
    client.load_model()
    assert client.run(1) == "repaired"


def test_reload_under_load_fails_nothing(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_WORKERS=2)
    client = server.client("worker")
    with Load(lambda number: client.run(number, {"sleep": 0.005})) as load:
        for _ in range(3):
            load.more(30)
            client.reload_model()
        load.more(30)
    assert load.failures == []
    assert all(answer["item"] == number for number, answer in load.answers)
    assert len({answer["pid"] for _, answer in load.answers}) == 8


def test_a_reload_takes_files_of_the_same_second_and_size(start_server: StartServer, tmp_path: Path) -> None:
    """Python would take its compiled code for current."""
    body = "    def run(self, data, args):\n        from .part import ANSWER\n        return [{!r}, ANSWER]"
    server = start_server(models=write_model(tmp_path, "one", body.format("old")), ready=False)
    files = [tmp_path / "one" / name for name in ("__init__.py", "part.py")]
    files[1].write_text("ANSWER = 'old'\n")
    with server.client("one") as client:
        client.load_model()
        assert client.run(1) == ["old", "old"]
        for file in files:
            times = file.stat()
            file.write_text(file.read_text().replace("'old'", "'new'"))
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        client.reload_model()
        assert client.run(1) == ["new", "new"]


def test_files_that_change_reload_their_model(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "one", ANSWERS.format("old"))
    server = start_server(models=tmp_path, TMS_RELOAD=1)
    client = server.client("one")
    assert client.run(1) == "old"

    def renewed() -> bool:
        write_model(tmp_path, "one", ANSWERS.format("new"))  # once more if the watch had not begun
        with contextlib.suppress(AssertionError):
            wait_for(lambda: client.run(1) == "new", "the reload", 4)
        return client.run(1) == "new"

    wait_for(renewed, "the reload")
    write_model(tmp_path, "two", ANSWERS.format(2))
    wait_for(lambda: "two" in [model["name"] for model in client.list_models()], "the new model")
    assert server.client("two").run(1) == 2
    assert server.stop() == 0


def test_lazy_models_load_at_their_first_call(start_server: StartServer) -> None:
    server = start_server(TMS_LAZY=1)
    client = server.client("echo")
    assert {model["state"] for model in client.list_models()} == {"UNLOADED"}
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(client.run, range(8))) == list(range(8))
    states = {model["name"]: model["state"] for model in client.list_models()}
    assert (states.pop("echo"), set(states.values())) == ("READY", {"UNLOADED"})
    client.unload_model()
    assert client.run(1) == 1


# ---- stopping


def test_sigterm_under_load_loses_no_accepted_call(start_server: StartServer) -> None:
    before = shared_memory()
    server = start_server()
    pids = [child.pid for child in psutil.Process(server.process.pid).children()]
    client = server.client("worker", timeout=3)
    with Load(lambda number: client.run(number, {"sleep": 0.05}), callers=16) as load:
        load.more(40)
        assert server.stop() == 0
    # What came after the stop finds no server; what was accepted was answered.
    assert {type(error) for error in load.failures} <= {model_client.ServerUnavailable}
    assert alive(pids) == []
    assert shared_memory() <= before
    assert not any("Traceback" in line for line in server.log)


def test_a_second_signal_hurries(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_TIMEOUT_S=100)
    client = server.client("worker")
    client.run(1)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.run, 1, {"sleep": 30}, 5)
        wait_for(lambda: metrics(server).get('tms_in_flight{model="worker"}') == 1, "the call")
        server.process.terminate()
        server.wait_for_log("stopping")
        started = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 5
        assert isinstance(call.exception(), model_client.ModelClientError)


def test_calls_that_are_refused_leave_no_memory(start_server: StartServer) -> None:
    server = start_server()
    client = server.client("echo")
    client.unload_model()
    text = "x" * 20_000
    front = psutil.Process(server.process.pid)

    def refuse(count: int) -> int:
        for _ in range(count):
            with pytest.raises(model_client.ModelUnavailable):
                client.run_text(text, retry=False)
        return front.memory_info().rss

    before = refuse(500)
    assert refuse(1500) - before < 10 << 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_many_signals_end_it_with_the_same_code(start_server: StartServer, number: signal.Signals) -> None:
    server = start_server(TMS_DRAIN_DELAY_S=0.1)
    while server.process.poll() is None:
        server.process.send_signal(number)
        time.sleep(0.005)
    assert server.process.returncode == 0


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("kind", ["array", "file"])
def test_shapes_share_a_batch_only_where_the_model_mixes_them(
    start_server: Callable[..., Server], tmp_path: Path, mixes: bool, kind: str
) -> None:
    """Arrays are grouped by shape in the queue, image files when the worker has decoded them."""
    body = f"""
    max_batch_size = 8
    mix_shapes = {mixes}

    def run(self, data, args):
        return self.run_batch([data], args)[0]

    def run_batch(self, items, args):
        import time
        time.sleep(0.3)
        return [[list(item.shape) for item in items]] * len(items)"""
    server = start_server(write_model(tmp_path / "models", "shapes", body))
    images: list[Any] = [np.zeros((4 + number % 2, 6), np.uint8) for number in range(8)]
    own = [list(image.shape) for image in images]
    if kind == "file":
        images = [cv2.imencode(".png", image)[1].tobytes() for image in images]
        own = [[*shape, 3] for shape in own]
    with server.client("shapes") as client, ThreadPoolExecutor(9) as threads:
        first = threads.submit(client.run_image, np.zeros((9, 9), np.uint8))
        begun = 'tms_batch_size_count{model="shapes"}'
        wait_for(lambda: metrics(server).get(begun) == 1, "the first to be at work")
        batches = list(threads.map(client.run_image, images))
        assert first.result() == [[9, 9]]
        assert metrics(server)[begun] >= (3 if kind == "array" and not mixes else 2)
    assert all(shape in batch for shape, batch in zip(own, batches, strict=True))
    assert max(map(len, batches)) > 1
    assert any(len({tuple(shape) for shape in batch}) > 1 for batch in batches) == mixes


# ---- busy polling


def test_busy_polling_stops_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[float | None] = []
    takes, worthwhile = 0.0, True

    def select(self: Any, timeout: float | None = None) -> list[str]:
        polls.append(timeout)
        if timeout == 0:
            return ["event"] if len(polls) > 3 and not takes else []
        time.sleep(takes)
        return ["event"]

    monkeypatch.setattr(selectors.DefaultSelector, "select", select)
    with contextlib.closing(busy_polling.BusyPollingSelector(0.2, lambda: worthwhile)) as selector:

        def seen() -> list[float | None]:
            polls.clear()
            assert selector.select(5) == ["event"]
            return sorted(set(polls), key=str)

        assert [seen(), seen()] == [[5], [5]]  # too little is known yet
        assert (seen(), polls) == ([0], [0, 0, 0, 0])
        takes = 0.4
        assert [seen(), seen()] == [[0, 5], [5]]  # it takes longer: polls once in vain, then no more
        takes = 0.001
        assert [seen(), seen(), seen()] == [[5], [5], [0, 5]]
        worthwhile = False
        assert seen() == [5]


@pytest.mark.parametrize(("sleeps", "in_flight", "calls", "limit"), [(0.03, 1, 50, 0.25), (0.005, 16, 300, 0.9)])
def test_waits_that_do_not_pay_take_no_cpu(
    start_server: StartServer, tmp_path: Path, sleeps: float, in_flight: int, calls: int, limit: float
) -> None:
    """Of a model that takes longer than the process polls, and of many callers; with polling, it took twice as much."""
    body = f"    def run(self, data, args):\n        __import__('time').sleep({sleeps})\n        return data"
    server = start_server(write_model(tmp_path, "slow", body), TMS_BUSY_POLL_US=10000)
    front = psutil.Process(server.process.pid)
    with server.client("slow") as client:
        client.run_text("x")
        before = sum(front.cpu_times()[:2])
        assert list(client.map(["x"] * calls, in_flight=in_flight)) == ["x"] * calls
        assert sum(front.cpu_times()[:2]) - before < limit


# ---- devices


def test_workers_are_spread_over_the_gpus() -> None:
    def of(index: int, workers: int, given: str, found: list[str]) -> Any:
        return placement.environment(index, workers, parse_devices(given), {}, found).get("CUDA_VISIBLE_DEVICES")

    assert [of(i, 4, "auto", ["0", "1"]) for i in range(4)] == ["0", "1", "0", "1"]
    assert of(0, 1, "auto", []) is None
    assert of(0, 1, "cpu", ["0"]) == ""
    assert [of(i, 2, "cuda:3, 1", ["0"]) for i in range(2)] == ["3", "1"]
    assert of(0, 1, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", []) == "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    assert placement.gpus({"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert placement.gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert placement.gpus({}, Path("/no/such/folder")) == []
    for wrong in ("gpu", "", "cuda:-1", "cuda:x"):
        with pytest.raises(ValueError, match="auto"):
            parse_devices(wrong)


def test_threads_are_divided_and_the_operators_word_counts(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert placement.threads_for(1) == max(1, int(placement.cpus()))
    limit = tmp_path / "sys" / "fs" / "cgroup" / "cpu.max"
    limit.parent.mkdir(parents=True)
    for text, cpus in {"max 100000": cores, "50000 100000": 0.5, "99900000 100000": cores, "nonsense": cores}.items():
        limit.write_text(text)
        assert placement.cpus(tmp_path) == cpus
    assert placement.threads_for(1000) == 1
    found = placement.environment(0, cores, ("auto",), {"OMP_NUM_THREADS": "7"}, [])
    assert "OMP_NUM_THREADS" not in found
    assert found["OPENBLAS_NUM_THREADS"] == "1"


def test_the_front_keeps_to_one_core_and_workers_have_all(start_server: StartServer) -> None:
    for one_core in (1, 0):
        server = start_server(TMS_ONE_CORE=one_core)
        server.client("echo").run(1)
        front = psutil.Process(server.process.pid)
        assert len(front.cpu_affinity()) == (1 if one_core else len(placement.CORES))
        for worker in front.children():
            assert set(worker.cpu_affinity()) == placement.CORES


def test_the_environment_is_there_before_the_model_is_imported(start_server: StartServer, tmp_path: Path) -> None:
    body = (
        "    devices = ['cuda:5', 'cuda:6']\n    workers = 2\n"
        "    def run(self, data, args):\n        import time; time.sleep(0.1); return SEEN"
    )
    write_model(tmp_path, "own", body)
    path = tmp_path / "own" / "__init__.py"
    path.write_text(
        "import os\nSEEN = os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']\n" + path.read_text()
    )
    client = start_server(models=tmp_path, CUDA_VISIBLE_DEVICES="0").client("own")
    seen = {tuple(answer) for answer in client.run_batch(list(range(8)))}
    threads = str(placement.threads_for(2))
    assert seen == {("5", threads), ("6", threads)}


# ---- streams and pipelines


def test_a_generator_streams(server: Server) -> None:
    client = server.client("tokens")
    started, first = time.monotonic(), 0.0
    seen = []
    for answer in client.run_stream(5, {"sleep": 0.2}):
        first = first or time.monotonic() - started
        seen.append(answer["index"])
        assert answer["array"][0] == answer["index"]
    assert seen == [0, 1, 2, 3, 4]
    assert first < 0.7 < time.monotonic() - started
    assert [answer["index"] for answer in client.run(3)] == [0, 1, 2]  # without a stream, the list
    assert list(server.client("echo").run_stream("x")) == ["x"]  # a stream of one
    assert len(list(client.run_stream(100))) == 100


def test_streams_fail_where_they_fail(server: Server) -> None:
    client = server.client("tokens")
    for args, error, message in (
        ({"fail_at": 2}, model_client.InvalidInput, "no more"),
        ({"die_at": 2}, model_client.ModelFailed, "exited with code 9"),
    ):
        stream = client.run_stream(5, args)
        assert [next(stream)["index"], next(stream)["index"]] == [0, 1]
        with pytest.raises(error, match=message):
            next(stream)
    with pytest.raises(model_client.DeadlineExceeded):
        list(client.run_stream(100, {"sleep": 0.05}, timeout=0.5))
    with pytest.raises(model_client.ModelNotFound):
        list(server.client("nobody").run_stream(1))
    assert len(list(client.run_stream(3))) == 3


def test_a_stream_that_is_left_early_ends_the_models_work(start_server: StartServer, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    client = start_server(only("tokens"), TEST_CLOSED=closed).client("tokens")
    stream = client.run_stream(1_000_000)
    for _ in range(3):
        next(stream)
    stream.close()
    wait_for(closed.exists, "the generator to be closed")
    assert len(list(client.run_stream(2))) == 2


def test_a_pipeline_runs_its_stages(server: Server) -> None:
    client = server.client("pipeline")
    assert client.run("21").tolist() == [42]
    assert client.run_text("4").tolist() == [8]
    assert client.model_info()[0]["stages"] == ["stage_decode", "stage_double"]
    before = metrics(server).get('tms_model_doubled_total{model="stage_double"}', 0)
    answers = client.run_batch(["1", "x", "3"], return_exceptions=True)
    assert [answers[0].tolist(), answers[2].tolist()] == [[2], [6]]
    assert isinstance(answers[1], model_client.InvalidInput)
    with pytest.raises(model_client.InvalidInput, match="'x' is no number"):
        client.run("x")
    assert metrics(server)['tms_model_doubled_total{model="stage_double"}'] == before + 2  # errors go no further
    assert metrics(server)['tms_requests_total{model="pipeline",status="INVALID_ARGUMENT"}'] == 2


def test_stages_run_at_once_for_different_calls(server: Server) -> None:
    client = server.client("pipeline")
    client.run("1")
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: client.run(str(number), {"sleep": 0.1}), range(8)))
    # One after the other it would take 1.6 s; the second stage alone takes 0.8 s.
    assert time.monotonic() - started < 1.3


def test_a_pipeline_with_a_wrong_stage_is_reported(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "__init__.py").write_text(
        "from model_interface import Pipeline\nclass Model(Pipeline):\n    stages = ['nobody']\n"
    )
    write_model(tmp_path, "good", ANSWERS.format(1))
    server = start_server(models=tmp_path)
    for call in (lambda: server.client("pipe").run(1), lambda: server.client("pipe").load_model()):
        with pytest.raises(model_client.ModelUnavailable, match="could not be loaded: it names the stage 'nobody'"):
            call()
    code = "from model_interface import Pipeline\nclass Model(Pipeline):\n    stages = ['good', 'pipe']\n"
    (tmp_path / "pipe" / "__init__.py").write_text(code)
    with pytest.raises(model_client.ModelUnavailable, match="names itself as a stage, 'pipe'; name other models"):
        server.client("pipe").load_model()
    (tmp_path / "pipe" / "__init__.py").write_text(code.replace(", 'pipe'", ""))
    server.client("pipe").load_model()
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").write_text(code)
    server.client("outer").load_model()
    with pytest.raises(model_client.ModelUnavailable, match="stage 'pipe', which is a pipeline itself"):
        server.client("outer").run(1)


# ---- metrics


def test_metrics_are_the_truth_with_several_workers_and_through_restarts(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_WORKERS=2)
    client = server.client("worker")
    with Load(lambda number: client.run(number, {"sleep": 0.002})) as load:
        load.more(100)
        client.reload_model()
        load.more(100)
    good = len(load.answers)
    with pytest.raises(model_client.ModelFailed):
        client.run("kill")
    good += len(client.run_batch([1, 2, 3]))
    assert load.failures == []
    found = metrics(server)

    def of(name: str, labels: str = "") -> float:
        return found[f'tms_{name}{{model="worker"{labels}}}']

    assert of("requests_total", ',status="OK"') == good
    assert of("requests_total", ',status="INTERNAL"') == 1
    assert of("request_seconds_count") == good + 1
    assert of("batch_size_sum") == of("queue_seconds_count") == good + 2  # the item that kills was tried twice
    assert of("model_items_total") == of("model_size_sum") == good
    assert of("compute_seconds_count") == of("model_size_count") == of("batch_size_count") - 2
    assert of("worker_restarts_total") == 2
    assert of("queue_depth") == of("in_flight") == 0
    wait_for(lambda: metrics(server)['tms_workers{model="worker"}'] == 2, "both workers")
    wait_for(lambda: metrics(server)['tms_busy_fraction{model="worker"}'] > 0.05, "a busy fraction")


# ---- all at once


@contextmanager
def every(seconds: float, action: Callable[[], Any]) -> Iterator[list[Exception | None]]:
    """The outcomes of an action that is repeated: an error, or None if there was none."""
    end, outcomes = threading.Event(), []

    def run() -> None:
        while not end.wait(seconds):
            try:
                action()
                outcomes.append(None)
            except Exception as error:
                outcomes.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcomes
    finally:
        end.set()
        thread.join()


@pytest.mark.timeout(180)
def test_chaos_fails_none_but_the_guilty(start_server: StartServer) -> None:
    server = start_server(TMS_MODEL_WORKER_WORKERS=2, TMS_MODEL_WORKER_TIMEOUT_S=1.5)
    client, guilty, echo = server.client("worker"), server.client("worker"), server.client("echo")
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)

    def kill_a_worker() -> None:
        os.kill(client.model_info()[0]["worker_pids"][0], signal.SIGKILL)

    def poison() -> None:
        with pytest.raises(model_client.ModelFailed, match="twice"):
            guilty.run("kill", {"guilty": 1})

    def hang() -> None:
        # kill_a_worker may meet it, and its second attempt, too.
        errors = model_client.DeadlineExceeded, model_client.ModelFailed
        with pytest.raises(errors, match="longer than its timeout_s|by SIGKILL .* twice"):
            guilty.run("hang", {"sleep": 60})

    with (
        Load(lambda number: client.run(number, {"sleep": 0.002}), callers=8) as load,
        Load(lambda number: np.array_equal(echo.run_image(image), image), callers=4) as neighbours,
        every(2.1, kill_a_worker) as kills,
        every(1.3, poison) as poisons,
        every(3.1, hang) as hangs,
        every(2.9, client.reload_model) as reloads,
    ):
        wait_for(lambda: min(map(len, (kills, poisons, hangs, reloads))) >= 2, "two of each", timeout=100)
        load.more(50)
    assert (load.failures, neighbours.failures) == ([], [])
    assert {*poisons, *hangs, *reloads} == {None}
    assert all(error is None or isinstance(error, (IndexError, ProcessLookupError)) for error in kills)  # nobody there
    assert all(answer["item"] == number for number, answer in load.answers)
    assert all(same for _, same in neighbours.answers)
    assert len(load.answers) > 500
    assert server.stop() == 0
