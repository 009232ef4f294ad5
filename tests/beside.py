"""Measures this tree beside another checkout, in one run and in turns: ``python tests/beside.py FOLDER [ROW ...]``.

Each tree runs a server of its own and a client of its own; FOLDER is a checkout of another commit, whose code runs on
this environment's packages. Prints a Markdown table: medians of the turns, and the ratio of this tree to the other.
"""

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TURNS = int(os.environ.get("BESIDE_TURNS", "5"))
SECONDS = float(os.environ.get("BESIDE_SECONDS", "1"))
SHAPES = {"224": (224, 224, 3), "640": (480, 640, 3), "1080": (1080, 1920, 3)}
ROWS = [
    *(f"{way} {what} {count}" for way in ("local", "grpc") for what in ("text", *SHAPES) for count in (1, 8)),
    "local map 640",
    "local single 640",
    "local heavy 64",
    "local light 64",
    "local async 16",
]
MODELS = {
    "length": "    def run(self, data, args):\n        return len(data)\n",
    **{
        name: (
            "    max_batch_size = 32\n    def run(self, data, args):\n        return self.run_batch([data], args)[0]\n"
            "    def run_batch(self, items, args):\n"
            f"        __import__('time').sleep(({base} + {item} * len(items)) / 1000)\n"
            "        return [1] * len(items)\n"
        )
        for name, base, item in (("heavy", 10, 0.5), ("light", 2, 0.1))
    },
}


def models() -> Path:
    """A folder with the models that are measured."""
    folder = ROOT / "build" / "beside-models"
    for name, body in MODELS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        text = f"from model_interface import ModelInterface\nclass Model(ModelInterface):\n{body}"
        (folder / name / "__init__.py").write_text(text)
    return folder


class Tree:
    """A checkout with its server and its caller, each a process."""

    def __init__(self, folder: Path) -> None:
        """Starts both."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
        env |= {"TMS_HOST": "127.0.0.1", "TMS_PORT": "0", "TMS_HTTP_PORT": "off", "TMS_MODELS_DIR": str(models())}
        env |= {"PYTHONPATH": str(folder), "TMS_DRAIN_DELAY_S": "0"}
        self.server = subprocess.Popen(
            [sys.executable, "server.py"], cwd=folder, env=env, stderr=subprocess.PIPE, text=True
        )
        assert self.server.stderr
        lines = iter(self.server.stderr)
        port = next(found[1] for line in lines if (found := re.search(r"gRPC on \S+:(\d+)", line)))
        next(line for line in lines if "serving" in line)
        threading.Thread(target=lambda: list(lines), daemon=True).start()
        self.callers = {
            way: subprocess.Popen(
                [sys.executable, __file__, "--caller", port],
                cwd=folder,
                env=env | {"TMS_LANE": switch, "TMS_LOCAL_TRANSPORT": switch},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for way, switch in (("local", "1"), ("grpc", "0"))
        }

    def measure(self, row: str) -> dict[str, float]:
        """{"p50": us, "rate": calls/s, "cpu": us of the server's own process a call} of one row."""
        caller = self.callers[row.partition(" ")[0]]
        assert caller.stdin
        assert caller.stdout
        before = self._cpu()
        caller.stdin.write(row + "\n")
        caller.stdin.flush()
        found: dict[str, float] = json.loads(caller.stdout.readline())
        return found | {"cpu": (self._cpu() - before) * 1e6 / found["calls"]}

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self.server.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Ends all processes."""
        for caller in self.callers.values():
            caller.kill()
            caller.wait()
        self.server.send_signal(signal.SIGTERM)
        self.server.wait(20)


@contextmanager
def running(*folders: Path) -> Iterator[list[Tree]]:
    """Trees whose processes end with the block."""
    trees: list[Tree] = []
    try:
        for folder in folders:
            trees.append(Tree(folder))
        yield trees
    finally:
        for tree in trees:
            tree.stop()


def call(port: str) -> None:
    """Measures the rows that come by stdin, by the client in the current folder."""
    import numpy as np

    sys.path.insert(0, os.getcwd())
    from model_client import AsyncModelClient, ModelClient

    clients = {name: ModelClient(name, addresses=[f"127.0.0.1:{port}"]) for name in MODELS}
    images = {name: np.ones(shape, np.uint8) for name, shape in SHAPES.items()}

    def several(one: Callable[[], Any], at_once: int) -> dict[str, float]:
        for _ in range(20):
            one()
        times: list[float] = []
        begun = time.perf_counter()
        end = begun + SECONDS

        def caller() -> None:
            while (start := time.perf_counter()) < end:
                one()
                times.append(time.perf_counter() - start)

        threads = [threading.Thread(target=caller) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - begun
        return {"p50": statistics.median(times) * 1e6, "rate": len(times) / took, "calls": len(times) + 20}

    async def asynchronous(at_once: int) -> dict[str, float]:
        async with AsyncModelClient("length", addresses=[f"127.0.0.1:{port}"]) as client:
            await client.run_text("x")
            await asyncio.gather(*(client.run_text("x") for _ in range(100)))
            begun, done = time.perf_counter(), 0

            async def caller() -> None:
                nonlocal done
                while time.perf_counter() < begun + SECONDS:
                    await client.run_text("x")
                    done += 1

            await asyncio.gather(*(caller() for _ in range(at_once)))
            took = time.perf_counter() - begun
            return {"p50": 1e6 * took * at_once / done, "rate": done / took, "calls": done + 101}

    for line in sys.stdin:
        _, what, count = line.split()
        client = clients.get(what, clients["length"])
        if what == "async":
            found = asyncio.run(asynchronous(int(count)))
        elif what == "map":
            frames = [images[count]] * 400
            list(client.map(frames[:50]))
            begun = time.perf_counter()
            list(client.map(frames))
            took = time.perf_counter() - begun
            found = {"p50": 1e6 * took / 400, "rate": 400 / took, "calls": 450}
        elif what == "single":
            found = several(lambda client=client, image=images[count]: client.run_image(image), 1)  # type: ignore[misc]
        elif what in images:
            found = several(lambda client=client, image=images[what]: client.run_image(image), int(count))  # type: ignore[misc]
        else:
            found = several(lambda client=client: client.run_text("x"), int(count))  # type: ignore[misc]
        print(json.dumps(found), flush=True)


def main() -> None:
    """Prints the table."""
    other, rows = Path(sys.argv[1]).resolve(), [row for row in ROWS if not sys.argv[2:] or row in sys.argv[2:]]
    print("| row | p50 us | other | ratio | calls/s | other | ratio | front CPU us a call | other | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with running(ROOT, other) as trees:
        for row in rows:
            found: list[list[dict[str, float]]] = [[], []]
            for turn in range(TURNS):
                for index in (0, 1) if turn % 2 else (1, 0):
                    found[index].append(trees[index].measure(row))
            cells = [row]
            for figure in ("p50", "rate", "cpu"):
                ours, theirs = (statistics.median(one[figure] for one in side) for side in found)
                cells += [f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs if theirs else 0:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--caller"]:
        call(sys.argv[2])
    else:
        main()
