"""Prints what one client sees of replicas that fail in many ways: the scenes of ``balance.py`` and ``odd_replicas.py``.

``make faults`` runs it. An argument chooses the scenes whose names it is part of.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import balance, network, odd_replicas
from tests.balance import Outcome


@cache
def large(balancing: str) -> tuple[Outcome, Outcome]:
    """Of the small and of the large calls."""
    return odd_replicas.slow_for_large(balancing)


@cache
def failed() -> tuple[Outcome, Outcome]:
    """Of the client of the FAILED model, and of that of the other one."""
    with odd_replicas.one_lacks() as servers:
        return odd_replicas.failed_model(servers)


def health(name: str, status: grpc.StatusCode | None = None) -> Outcome:
    """Of the client of stubs, one of which has this health."""
    return odd_replicas.wrong_health(name, status)[0]


SCENES: dict[str, Callable[[], Outcome]] = {
    "kill -9 of one of three": balance.kill_one,
    "SIGTERM of one of three": balance.terminate_one,
    "rolling restart of all three": balance.rolling_restart,
    "one of three frozen for 8 s": lambda: balance.freeze_one(balance.RATE)[0],
    "one of three frozen for 8 s, 5 calls/s": lambda: balance.freeze_one(5)[0],
    "one of three fails every call": balance.one_fails_fast,
    "one of three fails every call, round robin": lambda: balance.one_fails_fast("round_robin"),
    "one of three is 4x slower": balance.one_is_slow,
    "one of three is 4x slower, round robin": lambda: balance.one_is_slow("round_robin"),
    "one of three is 4x slower, 12 callers": balance.one_is_slow_closed_loop,
    "one of three is 4x slower, 12 callers, round robin": lambda: balance.one_is_slow_closed_loop("round_robin"),
    "one of three has a full queue": balance.one_is_full,
    "DNS gone for 12 s": balance.names_gone,
    "one of three is 20x slower for large inputs: small calls": lambda: large("load")[0],
    "the same: large calls, 15/s": lambda: large("load")[1],
    "the same: small calls, round robin": lambda: large("round_robin")[0],
    "the same: large calls, 15/s, round robin": lambda: large("round_robin")[1],
    "model FAILED at one of three, 30 calls/s": lambda: failed()[0],
    "the same: another model, READY at all, 30 calls/s": lambda: failed()[1],
    "one of three stubs says SERVING, answers UNAVAILABLE": partial(health, "serving", grpc.StatusCode.UNAVAILABLE),
    "one of three stubs says SERVING, answers INTERNAL": partial(health, "serving", grpc.StatusCode.INTERNAL),
    "one of three stubs works, says NOT_SERVING": partial(health, "not serving"),
    "one of three stubs never answers a watch of health": partial(health, "hangs"),
    "one of three stubs has no watch of health": partial(health, "unimplemented"),
    "one of three stubs changes its health each 0.1 s": partial(health, "flips"),
    "1 % of packets lost, 10 calls/s": lambda: odd_replicas.far(loss=0.01),
    "50 ms to the replicas and back, 10 calls/s": lambda: odd_replicas.far(delay_ms=25),
    "50 ms and 1 % of packets lost, 10 calls/s": lambda: odd_replicas.far(loss=0.01, delay_ms=25),
    "clock of one of three steps by an hour": lambda: odd_replicas.clock_of_a_replica()[0],
    "clock of the client steps by an hour, 20 texts/s": odd_replicas.clock_of_the_client,
}


def impossible(name: str) -> str:
    """Why a scene cannot be had on this machine; "" if it can."""
    if "packets" in name or "50 ms" in name:
        return network.missing()
    return odd_replicas.Clock.missing() if "clock" in name else ""


def main() -> None:
    """Prints the table."""
    print(f"{balance.RATE:g} requests/s of {balance.IMAGE.nbytes} bytes, three replicas, one client.\n")
    print("| what happens | calls | failed | retries | p50 ms | p99 ms | worst ms |\n|" + " --- |" * 7)
    for name, scene in SCENES.items():
        if len(sys.argv) > 1 and sys.argv[1] not in name:
            continue
        if why := impossible(name):
            print(f"{name}: left out, {why}", file=sys.stderr)
        else:
            outcome = scene()
            print(outcome.row(name), flush=True)
            for failure in set(map(str, outcome.failures)):
                print(f"  {failure}", file=sys.stderr)


if __name__ == "__main__":
    main()
