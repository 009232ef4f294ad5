"""Which GPU, cores, threads and memory a process gets: set before any framework is imported."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

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
"""The cores that the server was started with; empty where the system does not report them."""


def cpus(root: Path = Path("/")) -> float:
    """How many cores the server may use at once: those it has, or as many as its container is limited to.

    ``root`` is where the system's ``proc`` and ``sys`` lie.
    """
    limits = [float(len(CORES) or os.cpu_count() or 1)]
    for group in _control_groups(root, "cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # of v2, of v1
            with suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no limit
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
                limits.append(quota / period)
    return min(limit for limit in limits if limit > 0)  # v1 says -1 for no limit


def memory(root: Path = Path("/")) -> int:
    """How many bytes of memory the server may use: the machine's, or its container's limit; ``root`` as for cpus."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((group / name).read_text()))
    return min(limit for limit in limits if limit > 0)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders where this process' control groups may be, of v2 and of v1, from its own group up to the root.

    A container often sees its own group as the root, whatever ``/proc/self/cgroup`` names. So folders that are missing
    do not matter, and the root is always among them.
    """
    groups = {Path()}
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, group = line.split(":", 2)
            if controller in names.split(",") or not names:
                groups.add(Path(group.lstrip("/")))
    base = root / "sys/fs/cgroup"
    mounts = [base, base / "unified"]
    with suppress(OSError):  # there are none on other systems
        mounts += base.glob(f"*{controller}*")
    for mount in mounts:
        for path in groups:
            yield from (mount / folder for folder in (path, *path.parents) if ".." not in folder.parts)


def descriptors() -> int:
    """Raises this process' limit of open descriptors as far as it may, up to 65536, and returns it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (_ENOUGH_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < (wanted := min(hard, _ENOUGH_DESCRIPTORS)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
    return max(soft, wanted)


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


def gpus(env: Mapping[str, str] = os.environ, proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    found = ",".join(map(str, range(len(list(proc.iterdir()))))) if proc.is_dir() else ""
    return [name for name in env.get("CUDA_VISIBLE_DEVICES", found).split(",") if name.strip()]


def environment(
    index: int, workers: int, devices: Sequence[str], env: Mapping[str, str], found: Sequence[str]
) -> dict[str, str]:
    """What to set for worker ``index`` of ``workers``, on a machine with the GPUs ``found``.

    Threads are the usable cores divided by the workers, at least one; a variable that the operator set stays.
    """
    wanted = dict.fromkeys(_THREAD_VARIABLES, threads_for(workers)) | {name: n for name, (_, n) in _MALLOC.items()}
    changes = {name: str(value) for name, value in wanted.items() if name not in env}
    if chosen := found if tuple(devices) == ("auto",) else devices:
        changes["CUDA_VISIBLE_DEVICES"] = chosen[index % len(chosen)]
    return changes


def threads_for(workers: int) -> int:
    """The usable cores divided by the workers, at least one."""
    return max(1, int(cpus()) // workers)
