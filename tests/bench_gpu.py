"""Measures and checks what only a machine with a GPU shows (``make bench-gpu``); needs torch, and no network.

``python tests/bench_gpu.py [--tiny] [--out FILE] [SECTION ...]`` prints Markdown tables for BENCHMARKS.md. Exits with 1
if a section failed; the others run all the same. Without a GPU, or with ``--tiny``, the sizes are small, and what
needs CUDA is skipped with its reason. It leaves the settings of the GPU alone.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient, ModelClientError  # noqa: E402
from tests import load, load_part  # noqa: E402

MODELS = ROOT / "tests" / "gpu_models"
LONGEST_S = {"placement": 60, "memory": 60, "copies": 60, "network": 190}
GOAL = 0.95  # of the model alone
LOAD_S = 90
NO_GPU = "skipped: no NVIDIA GPU"
PRETENDED = ["GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002"]
"""What stands for GPUs on a machine without one: workers are spread over them all the same."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured: of an H100 or H200, or little."""

    network: dict[str, Any]
    batches: tuple[int, ...]  # the first one is used by most rows
    servers: tuple[tuple[int, int, int], ...]  # (replicas, workers, batch) of each
    callers: int
    in_flight: int  # of a caller by map
    call: int  # images of a call by run_image_batch
    seconds: float
    copies: tuple[tuple[int, tuple[int, ...]], ...]  # (items of a batch, shape of each)
    mib: int  # of an item, of which four fit


REAL = Sizes(
    network={"width": 64, "blocks": [3, 4, 6, 3], "side": 224},
    batches=(64, 32, 128),
    servers=((1, 1, 64), (1, 2, 64), (1, 2, 32), (1, 2, 128), (2, 2, 64)),
    callers=8,
    in_flight=64,
    call=32,
    seconds=3,
    copies=((1, (224, 224, 3)), (1, (480, 640, 3)), (1, (1080, 1920, 3)), (64, (224, 224, 3))),
    mib=512,
)
TINY = Sizes(
    network={"width": 8, "blocks": [1, 1], "side": 32},
    batches=(4,),
    servers=((1, 2, 4),),
    callers=1,
    in_flight=16,
    call=4,
    seconds=0.2,
    copies=((1, (32, 32, 3)), (4, (32, 32, 3))),
    mib=1,
)


def smi(*arguments: str) -> list[str]:
    """The lines that nvidia-smi prints; none where there is none, or it fails."""
    try:
        ran = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return ran.stdout.splitlines()


@cache
def uuids() -> list[str]:
    """The GPUs of this machine."""
    return [line.strip() for line in smi("--query-gpu=uuid", "--format=csv,noheader") if line.startswith("GPU-")]


def migs() -> list[str]:
    """The MIG devices of this machine."""
    return [line.rpartition("UUID: ")[2].rstrip(")") for line in smi("-L") if "UUID: MIG-" in line]


def check(right: bool, what: str) -> None:
    """AssertionError if something is not as it must be."""
    if not right:
        raise AssertionError(what)


def row(*cells: object) -> None:
    """Prints a row of a table; a float with three digits."""
    print(f"| {' | '.join(f'{one:.3g}' if isinstance(one, float) else str(one) for one in cells)} |", flush=True)


def head(*cells: str) -> None:
    row(*cells)
    row(*["---"] * len(cells))


@contextlib.contextmanager
def serving(replicas: int = 1, **env: object) -> Iterator[load.Server]:
    """A server of the models, each of which is loaded when it is first called."""
    with load.serving(MODELS, replicas, TMS_LAZY=1, TMS_DRAIN_DELAY_S=0, **env) as server:
        yield server


# ---- which worker sees which GPU


@dataclass(frozen=True)
class Placement:
    """A server's settings, and the devices that its workers must have: one each, in turn."""

    settings: str
    visible: list[str]
    env: dict[str, object]
    workers: int = 2
    replicas: int = 1


def placement(sizes: Sizes) -> None:
    """Every worker is pinned to one device, by the name that it was given."""
    gpus, mig = uuids(), migs()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    names = gpus or PRETENDED
    given = {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    servers = [
        Placement("CUDA_VISIBLE_DEVICES=UUIDs", names, given),
        Placement("the same, 2 replicas", names, given, replicas=2),
        Placement("devices = UUIDs", names, {"TMS_MODEL_WHERE_DEVICES": ",".join(names)}),
        Placement("devices = cpu", [""], {"TMS_MODEL_WHERE_DEVICES": "cpu"}, workers=1),
    ]
    if gpus:
        servers.append(Placement("none", list(map(str, range(len(gpus)))), {}))
    if mig:
        servers.append(Placement("devices = MIG UUIDs", mig, {"TMS_MODEL_WHERE_DEVICES": ",".join(mig)}))
    print("Which device each worker of the model `where` gets, and which torch sees there.\n")
    head("settings", "workers", "CUDA_VISIBLE_DEVICES of the workers", "torch sees")
    with ThreadPoolExecutor(len(servers)) as pool:
        found = list(pool.map(partial(pinned, gpus), servers))
    for cells, _ in found:
        row(*cells)
    for settings, missing in (("none", not gpus), ("devices = MIG UUIDs", not mig), ("several GPUs", len(gpus) < 2)):
        if missing:
            row(settings, "", "", f"skipped: there are {len(gpus)} GPUs and {len(mig)} MIG devices")
    problems = [problem for _, problem in found if problem]
    check(not problems, "; ".join(problems))


def pinned(gpus: list[str], one: Placement) -> tuple[list[object], str]:
    """The cells of a server's row, and what is wrong about it."""
    env = {"TMS_MODEL_WHERE_WORKERS": one.workers} | one.env
    with serving(one.replicas, **env) as server:
        answers = everywhere(server, one.workers, look=bool(gpus))
    got = sorted(str(answer["visible"]) for answer in answers)
    seen = sorted({", ".join(answer["seen"]) or "none" for answer in answers}) if gpus else [NO_GPU]
    cells = [one.settings, one.workers, ", ".join(map(repr, got)), "; ".join(seen)]
    wanted = sorted(one.visible[index % len(one.visible)] for index in range(one.workers))
    if got != wanted:
        return cells, f"{one.settings}: the workers have {got}, and should have {wanted}"
    names = dict(zip([*gpus, *map(str, range(len(gpus)))], gpus * 2, strict=True))
    for answer in answers if gpus else []:
        name = answer["visible"]
        right = [names[name]] if name in names else []
        if len(answer["seen"]) != 1 if name.startswith("MIG-") else answer["seen"] != right:
            return cells, f"{one.settings}: torch sees {answer['seen']} with CUDA_VISIBLE_DEVICES={name}"
    return cells, ""


def everywhere(server: load.Server, count: int, look: bool) -> list[dict[str, Any]]:
    """The answers of so many workers, each of its own."""
    with server.client("where") as client, ThreadPoolExecutor(2 * count) as pool:
        client.load_model(timeout=LOAD_S)
        found: dict[int, dict[str, Any]] = {}

        def ask() -> bool:
            calls = [pool.submit(client.run, 0.05, {"look": look}, LOAD_S) for _ in range(2 * count)]
            found.update({one["pid"]: one for one in (call.result() for call in calls)})
            return len(found) == count

        load.wait_for(ask, f"answers of {count} workers", LOAD_S)
    return list(found.values())


# ---- memory of the GPU that runs out


def memory(sizes: Sizes) -> None:
    """A batch that does not fit is halved until it does; an item that cannot fit fails alone; all memory comes back."""
    mib, huge = sizes.mib, 8 * sizes.mib
    room = 4 * mib + mib // 2
    print(f"A batch of items that take {mib} MiB each, where {room} MiB are left. A huge one takes {huge} MiB.\n")
    head("items", "sizes of the batches that were tried", "answered", "failed", "bytes kept afterwards", "worker")
    with serving(TMS_MODEL_MEMORY_ARGS=json.dumps({"room_mib": room})) as server, server.client("memory") as client:
        client.load_model(timeout=LOAD_S)
        pids = load.workers(client)
        for name, items, fits in (
            ("16", [mib] * 16, 16),
            ("4, which fit", [mib] * 4, 4),
            ("1 huge, then 4", [huge] + [mib] * 4, 4),
            ("8, the third huge", [mib] * 2 + [huge] + [mib] * 5, 7),
            ("16 again", [mib] * 16, 16),
        ):
            answers = client.run_batch(items, return_exceptions=True, timeout=LOAD_S)
            state = client.run("state")
            failed = [one for one in answers if isinstance(one, ModelClientError)]
            alive = "the same" if load.workers(client) == pids else "died"
            row(name, ", ".join(map(str, state["tried"])), len(items) - len(failed), len(failed), state["left"], alive)
            for item, answer in zip(items, answers, strict=True):
                if item == huge:
                    check(isinstance(answer, ModelClientError), f"an item of {huge} MiB was answered: {answer}")
                    check("out of memory" in str(answer), f"the error does not say that memory ran out: {answer}")
                else:
                    check(not isinstance(answer, ModelClientError), f"an item that fits failed: {answer}")
                    check(answer["mib"] == item, f"an item of {item} MiB was answered by {answer}")
            check(len(items) - len(failed) == fits, f"{len(items) - len(failed)} items were answered, not {fits}")
            check(max(state["tried"]) == len(items), f"the batch was not tried as a whole: {state['tried']}")
            check(state["left"] == 0, f"{state['left']} bytes of the GPU are still in use")
            check(alive == "the same", "the worker died")
        halvings = sum("no device memory for" in line for line in server.log)
        print(f"\n{halvings} batches were halved. The huge item's error: `{failed_text(client, huge)}`")


def failed_text(client: ModelClient, huge: int) -> str:
    """The first words of the error for an item that cannot fit."""
    answer = client.run_batch([huge], return_exceptions=True, timeout=LOAD_S)[0]
    return f"{type(answer).__name__}: {str(answer)[:120]}"


# ---- copies to the GPU


def copies(sizes: Sizes) -> None:
    """How fast inputs come from the memory that worker and caller share to the GPU."""
    print("GB/s from the inputs, as the model gets them, to the GPU.\n")
    ways = ["as they are", "np.stack", "pinned staging", "registered", "pinned alone", "register ms"]
    head("inputs", *ways)
    with serving() as server, server.client("copies") as client:
        client.load_model(timeout=LOAD_S)
        for count, shape in sizes.copies:
            images = [image.copy() for image in (load_part.frames(shape) * count)[:count]]
            found = client.run_image_batch(images, {"seconds": sizes.seconds / 15}, timeout=LOAD_S)[0]
            check(found["items"] == count, f"a batch had {found['items']} items, not {count}")
            row(f"{count} x {'x'.join(map(str, shape))}", *(found[way] for way in ways))


# ---- a network, alone and in the server


@cache
def sampler() -> Callable[[], list[float]]:
    """A function that returns the first GPU's utilization in %, its power in watts, and its clock in MHz."""
    try:
        import pynvml
    except ImportError:
        query = ("--query-gpu=utilization.gpu,power.draw,clocks.sm", "--format=csv,noheader,nounits")
        return lambda: [float(figure) for figure in smi(*query)[0].split(",")]
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: [
        pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    ]


def usage(seconds: float) -> str:
    """Takes so long; returns the means of what the sampler gave meanwhile, or why there are none."""
    end = time.monotonic() + seconds
    samples, problem = [], "" if uuids() else NO_GPU
    while (left := end - time.monotonic()) > 0:
        try:
            samples += [] if problem else [sampler()()]
        except Exception as error:
            problem = f"skipped: {type(error).__name__}: {error}"
        time.sleep(min(0.1, left))
    return problem or "{:.0f} %, {:.0f} W, {:.0f} MHz".format(*np.mean(samples, axis=0))


def alone(options: str, *batches: str) -> None:
    """The part that runs the network in a loop, without a server: with the next of these batch sizes each time."""
    from tests.gpu_models.network import Model

    model = Model(**json.loads(options))
    model.warmup()
    side = model.staging.shape[1]
    frames = load_part.frames((side, side, 3))

    def endless(batch: int) -> load_part.Calls:
        sets = [[frames[number % len(frames)].copy() for number in range(batch)] for _ in range(4)]
        while True:
            for items in sets:
                begun = time.perf_counter()
                answers = model.run_batch(items, {})
                yield len(items), time.perf_counter() - begun
                for one, answer in zip(items, answers, strict=True):
                    load_part.first_byte(one, answer)

    load_part.report([endless(int(batch)) for batch in batches], in_turn=True)


def network(sizes: Sizes) -> None:
    """Images a second of the model alone in a loop, and of the server with one worker and with two."""
    first = sizes.batches[0]
    command = [__file__, "--part", "alone", options(sizes, max(sizes.batches))]
    print("Images of a convolutional network. p50 is of a batch alone, and of a call in the server.\n")
    head(
        "what", "batch", "callers", "images/s", "of alone", "p50 ms", "p99 ms", "GPU", "front: cores", "workers: cores"
    )
    reached: dict[str, float] = {}
    with load.parts([[*command, *sizes.batches, first, first], [*command, first]]) as (one, another):

        def by_itself(name: str, batch: int, parts: list[Any], base: float | None = None) -> float:
            found = load.measured(parts, sizes.seconds, [[part.pid for part in parts]], usage)
            row(name, batch, "", *figures(found, base or found.rate), "", f"{found.cores[0]:.2f}")
            return found.rate

        base = {batch: by_itself("alone", batch, [one]) for batch in sizes.batches}
        by_itself("alone, in 2 processes", first, [one, another], base[first])
        for what, batch, way, found in served(sizes):
            row(what, batch, way, *figures(found, base[batch]), *(f"{cores:.2f}" for cores in found.cores))
            reached[f"{what}, batch {batch}, {way}"] = found.rate / base[batch]
        by_itself("alone, again", first, [one], base[first])
    most = max(reached, key=lambda name: reached[name])
    print(f"\nMost: {reached[most]:.2f} of the model alone ({most}).")
    check(sizes is not REAL or reached[most] >= GOAL, f"the server reaches {reached[most]:.2f} of the model alone")


def figures(found: load.Found, base: float) -> list[object]:
    return [f"{found.rate:.0f}", f"{found.rate / base:.2f}", f"{found.p50:.2f}", f"{found.p99:.2f}", found.extra]


def options(sizes: Sizes, batch: int) -> str:
    """The arguments of the network's Model."""
    return json.dumps(sizes.network | {"batch": batch})


def served(sizes: Sizes) -> Iterator[tuple[str, int, str, load.Found]]:
    """(workers, batch, callers, what they got) for servers with one and two workers, called in several ways."""
    many = [("map", sizes.callers, sizes.in_flight), ("batch", sizes.callers, sizes.call)]
    for replicas, workers, batch in sizes.servers:
        single = [("single", 1, 1)] if replicas == 1 else []
        yield from called(sizes, replicas, workers, batch, many + single if batch == sizes.batches[0] else many[:1])


def called(
    sizes: Sizes, replicas: int, workers: int, batch: int, ways: Sequence[tuple[str, int, int]]
) -> Iterator[tuple[str, int, str, load.Found]]:
    """As ``served``, of one server. A way is "map", "batch" or "single", so many callers, so much of each at once."""
    names = {"map": "map of {}", "batch": "2 x run_image_batch of {}", "single": "run_image"}
    env = {
        "TMS_MODEL_NETWORK_ARGS": options(sizes, batch),
        "TMS_MODEL_NETWORK_MAX_BATCH_SIZE": batch,
        "TMS_MODEL_NETWORK_WORKERS": workers,
        "TMS_MODEL_NETWORK_QUEUE_SIZE": 4096,
        "TMS_THREADS": 2048,  # a local call under way has a connection of its own
    }
    what = f"{workers} worker{'s'[: workers - 1]}" + (f", {replicas} replicas" if replicas > 1 else "")
    with serving(replicas, **env) as server:
        with server.client("network") as client:
            client.load_model(timeout=LOAD_S)
            load.wait_for(lambda: len(load.workers(client)) == workers, "all workers")
            watched = [load.fronts(server), load.workers(client)]
        side = sizes.network["side"]
        for way, count, each in ways:
            commands = load.callers(count, server.address, "network", f"{side}x{side}x3", way, each)
            with load.parts(commands) as parts:
                callers = f"{count} x {names[way].format(each)}"
                yield what, batch, callers, load.measured(parts, sizes.seconds, watched, usage)


# ---- all sections


SECTIONS: dict[str, Callable[[Sizes], None]] = {
    "placement": placement,
    "memory": memory,
    "copies": copies,
    "network": network,
}


def run_section(name: str, size: str, write: Callable[[str], None]) -> bool:
    """Runs a section in a process group of its own, which ends in time. Returns whether it went well."""
    command = [sys.executable, __file__, "--part", "section", name, size]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(LONGEST_S[name] + 15, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout
    for line in process.stdout:
        write(line)
    timer.cancel()
    well = process.wait() == 0
    ended = "" if well else " FAILED: see its error above, or in the log"
    write(f"\n({name}{ended}; {time.monotonic() - begun:.0f} s)\n\n")
    return well


def too_long(number: int, frame: object) -> None:
    raise TimeoutError("the section took too long")


def section(name: str, size: str) -> None:
    """The part that runs one section, for so long at most."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S[name])
    try:
        SECTIONS[name](TINY if size == "tiny" else REAL)
    except Exception as error:
        print(f"\n{type(error).__name__}: {error}", flush=True)
        raise


def machine() -> str:
    """One line about this machine."""
    gpus = smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    cores = len(os.sched_getaffinity(0))
    python = f"Python {sys.version.split()[0]}, torch {version('torch')}"
    return f"{'; '.join(gpus) or 'no NVIDIA GPU'}; {cores} cores; {python}."


def main() -> int:
    """Runs the sections; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", choices=[*SECTIONS, []], help=", ".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    size = "tiny" if given.tiny or not uuids() else "real"
    with load.tee(given.out) as write:
        write(machine() + "\n\n")
        failed = [name for name in given.sections or SECTIONS if not run_section(name, size, write)]
        write(f"FAILED: {', '.join(failed)}\n" if failed else "Every check passed.\n")
    return int(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        {"section": section, "alone": alone}[sys.argv[2]](*sys.argv[3:])
    else:
        sys.exit(main())
