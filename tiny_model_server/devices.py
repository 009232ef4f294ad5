"""Which GPU, cores, threads and memory a process gets: set before any framework is imported."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_CUDA = re.compile(r"(?:cuda:)?(\d+)|(GPU-[0-9a-fA-F-]+|MIG-[0-9a-zA-Z/-]+)")
_THREAD_VARIABLES = """OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS NUMEXPR_NUM_THREADS
VECLIB_MAXIMUM_THREADS OPENCV_FOR_THREADS_NUM""".split()
# glibc gives buffers of 128 KiB and more back to the system at once, and page-faults them anew for each image.
# One arena, so that what one thread has freed serves the next one.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30),
    "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1),
    "MALLOC_TOP_PAD_": (-2, 64 << 20),
    "MALLOC_ARENA_MAX": (-8, 1),
}

_ENOUGH_DESCRIPTORS = 1 << 16

CORES: frozenset[int] = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
"""The cores that the server was started with; empty where the system does not tell."""


def cpus(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """How many cores the server may use at once: those it has, or as many as its container is limited to."""
    cores = float(len(CORES) or os.cpu_count() or 1)
    try:
        quota, period = limit.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """How many bytes of memory the server may use: the machine's, or its container's limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(physical, int(limit.read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical


def descriptors() -> int:
    """Raises this process's limit of open descriptors as far as it may, and returns it."""
    try:
        import resource
    except ImportError:  # not on this system
        return _ENOUGH_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _ENOUGH_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def keep_to_one_core(seed: int) -> None:
    """Keeps this process to one of its cores, chosen by ``seed``, for threads that are started from now on.

    The gRPC process is bound by its interpreter lock, so a second core gives it nothing but hand-overs between cores:
    1.6x the rate at 64 small calls in flight, 2x at 8 images of 640x480 (BENCHMARKS.md).
    """
    if CORES:
        os.sched_setaffinity(0, {sorted(CORES)[seed % len(CORES)]})


def keep_memory() -> None:
    """Lets this process keep large buffers for the next image; memory then stays with it."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # musl has none
        for option, value in _MALLOC.values():
            mallopt(option, value)


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Gives this thread all of the server's cores for a while, so that a process started meanwhile has them from birth.

    A worker that starts on the front's one core and moves away later was seen to starve there for half a minute.
    """
    if not CORES:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse(text: str) -> tuple[str, ...]:
    """The devices of "auto", "cpu" or "cuda:0,cuda:1" as CUDA_VISIBLE_DEVICES takes them; ValueError says what is."""
    if text == "auto":
        return ("auto",)
    names = [name.strip() for name in text.strip("[]()").replace("'", "").split(",") if name.strip()]
    if names == ["cpu"]:
        return ("",)
    found = [_CUDA.fullmatch(name) for name in names]
    if not found or not all(found):
        raise ValueError('"auto", "cpu", or a list such as "cuda:0,cuda:1"')
    return tuple(match[1] or match[2] for match in found if match)


def gpus(env: Mapping[str, str] = os.environ, proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in env["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    try:
        return [str(index) for index in range(len(list(proc.iterdir())))]
    except OSError:
        return []


def environment(
    index: int, workers: int, devices: Sequence[str], env: Mapping[str, str], found: Sequence[str]
) -> dict[str, str]:
    """What to set for worker ``index`` of ``workers``, on a machine with the GPUs ``found``.

    Threads are the usable cores divided by the workers, at least one; a variable that the operator set stays.
    """
    chosen = found if tuple(devices) == ("auto",) else devices
    threads = str(threads_for(workers))
    changes = {name: threads for name in _THREAD_VARIABLES if name not in env}
    changes |= {name: str(value) for name, (_, value) in _MALLOC.items() if name not in env}
    if chosen:
        changes["CUDA_VISIBLE_DEVICES"] = chosen[index % len(chosen)]
    return changes


def threads_for(workers: int) -> int:
    """The usable cores divided by the workers, at least one."""
    return max(1, int(cpus()) // workers)
