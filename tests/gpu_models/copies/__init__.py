"""Measures how fast its inputs, which lie in memory shared with the caller, come to the GPU in several ways."""

import mmap
import statistics
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch

from model_interface import ModelInterface

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def timed(copy, seconds: float) -> float:
    """The median time of a copy in seconds."""
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begun = time.perf_counter()
        copy()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[len(times) // 4 :])


def pages(arrays: list[np.ndarray]) -> list[tuple[int, int]]:
    """(address, bytes) of the pages that hold the arrays; neighbours that share a page are one."""
    found: list[tuple[int, int]] = []
    for one in sorted(arrays, key=lambda one: one.ctypes.data):
        begin = one.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(one.ctypes.data + one.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if found and begin <= sum(found[-1]):
            begin = found.pop()[0]
        found.append((begin, end - begin))
    return found


@contextmanager
def registered(arrays: list[np.ndarray]):
    """The pages of some arrays are page-locked for the GPU while the block runs."""
    with ExitStack() as stack:
        for address, size in pages(arrays):
            if error := int(torch.cuda.cudart().cudaHostRegister(address, size, 0)):
                with suppress(RuntimeError):  # CUDA reports the error once more to what comes next
                    torch.zeros(1, device=DEVICE)
                raise RuntimeError(f"cudaHostRegister returned {error}")
            stack.callback(torch.cuda.cudart().cudaHostUnregister, address)
        yield


class Model(ModelInterface):
    """Answers {way: GB/s, or why there is no such figure} to the first item of a batch."""

    max_batch_size = 64
    max_wait_ms = 1000

    def run(self, data, args):
        return self.run_batch([data], args)[0]

    def run_batch(self, items, args):
        return [measure(items, args["seconds"]), *[None] * (len(items) - 1)]


def measure(items: list[np.ndarray], seconds: float) -> dict[str, object]:
    """GB/s of each way, and the milliseconds that page-locking takes."""
    tensors = [torch.from_numpy(one) for one in items]
    staging = torch.empty(len(items), *items[0].shape, dtype=torch.uint8, pin_memory=CUDA)
    staged = staging.numpy()
    target = torch.empty_like(staging, device=DEVICE)

    def each() -> None:
        for row, one in zip(target, tensors, strict=True):
            row.copy_(one, non_blocking=True)

    def through_pinned() -> None:
        np.stack(items, out=staged)
        target.copy_(staging, non_blocking=True)

    def again() -> None:
        with registered(items):
            pass

    found: dict[str, object] = {"items": len(items)}

    def rate(way: str, copy) -> None:
        target.zero_()
        took = timed(copy, seconds)
        if not np.array_equal(target.cpu().numpy(), np.stack(items)):
            raise RuntimeError(f"{way}: what came to the device is not what was sent")
        found[way] = staging.nbytes / took / 1e9

    rate("as they are", each)
    rate("np.stack", lambda: target.copy_(torch.from_numpy(np.stack(items))))
    rate("pinned staging", through_pinned)
    rate("pinned alone", lambda: target.copy_(staging, non_blocking=True))
    try:
        if not CUDA:
            raise RuntimeError("skipped: no CUDA")
        with registered(items):
            rate("registered", each)
        found["register ms"] = timed(again, seconds) * 1000
    except RuntimeError as error:
        found.setdefault("registered", str(error))
        found["register ms"] = str(error)
    return found
