"""A network that loses and delays packets, between this process and replicas in a network namespace of their own.

Not every kernel has netem. So a process relays the packets between two TUN devices: one here, one in the namespace. TCP
meets the loss and the delay as in a real network. Needs root and /dev/net/tun.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE, THERE = "198.18.71.1", "198.18.71.2"
"""Of the range that is reserved for tests of networks."""
_SET_NAME = 0x400454CA  # TUNSETIFF
_TUN_WITHOUT_HEADER = 0x1001  # IFF_TUN | IFF_NO_PI
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_MTU = 1500


def missing() -> str:
    """Why there can be no such network here; "" if there can."""
    if os.geteuid() != 0:
        return "only root may make a network namespace"
    return "" if Path("/dev/net/tun").exists() else "there is no /dev/net/tun"


@dataclass
class Network:
    """What runs a command in the namespace."""

    pid: int

    @property
    def enter(self) -> list[str]:
        """The beginning of a command that is to run at ``THERE``."""
        return ["nsenter", "--target", str(self.pid), "--net"]


@contextmanager
def network(loss: float = 0, delay_ms: float = 0) -> Iterator[Network]:
    """A network that loses this part of all packets, and takes so long for each, in both directions."""
    command = [sys.executable, __file__, str(loss), str(delay_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as relay:
        try:
            assert relay.stdout
            assert relay.stdout.readline() == "ready\n", "the relay did not start"
            yield Network(relay.pid)
        finally:
            relay.kill()


def main(loss: str, delay_ms: str) -> None:
    """Relays until it is killed."""
    name = f"tms{os.getpid() % 10**9}"
    here = _device(name)
    _run("ip", "address", "add", HERE, "peer", THERE, "dev", name)
    _run("ip", "link", "set", name, "mtu", str(_MTU), "up")
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    there = _device(name)
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", THERE, "peer", HERE, "dev", name)
    _run("ip", "link", "set", name, "mtu", str(_MTU), "up")
    print("ready", flush=True)
    relay(here, there, float(loss), float(delay_ms) / 1000)


def relay(here: int, there: int, loss: float, delay_s: float) -> None:
    """Hands each packet of one device to the other, in order, unless it is lost."""
    other = {here: there, there: here}
    chance = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []
    poll = select.poll()
    count = 0
    for device in other:
        poll.register(device, select.POLLIN)
    while True:
        pause_ms = max(0.0, waiting[0][0] - time.monotonic()) * 1000 if waiting else None
        for device, _ in poll.poll(pause_ms):
            for packet in _packets(device):
                count += 1
                if chance.random() >= loss:
                    heapq.heappush(waiting, (time.monotonic() + delay_s, count, other[device], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            os.write(waiting[0][2], waiting[0][3])
            heapq.heappop(waiting)


def _packets(device: int) -> Iterator[bytes]:
    for _ in range(64):
        try:
            yield os.read(device, 2 * _MTU)
        except BlockingIOError:
            return


def _device(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _SET_NAME, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
    return device


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
