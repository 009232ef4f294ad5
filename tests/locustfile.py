"""Load by locust, through the real ModelClient: ``make locust``, or ``locust -f tests/locustfile.py --host HOST:PORT``.

Without ``--headless`` it has its page on port 8089, where all options below can be set. ``--max-p99-ms`` and
``--max-failures`` state a service level: if it is missed, locust exits with 1. ``--html report.html`` writes a report.
"""

import sys
import time
from pathlib import Path
from typing import Any

import gevent
import grpc.experimental.gevent
from locust import User, events, task

grpc.experimental.gevent.init_gevent()  # before any channel is made
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from model_client import ModelClient  # noqa: E402

TEXT = "three little words"


@events.init.add_listener
def read_the_clock(**kwargs: Any) -> None:
    gevent.get_hub().loop.update_now()  # else the time that imports took would count as time of the run


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument("--model", default="example", help="model that is called")
    parser.add_argument("--image-size", default="640x480", help="WIDTHxHEIGHT of the images")
    parser.add_argument(
        "--mix", default="image=1", help="shares of calls, of image, text, batch: image=8,text=1,batch=1"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images in a batch")
    parser.add_argument("--rate", type=float, default=0, help="calls a second of each user; 0: one after the other")
    parser.add_argument("--call-timeout", type=float, default=10, help="seconds a call may take")
    parser.add_argument("--balancing", default="load", choices=["load", "round_robin"], help="how replicas are chosen")
    parser.add_argument("--max-p99-ms", type=float, default=0, help="service level: slowest 99th percentile; 0: none")
    parser.add_argument(
        "--max-failures", type=float, default=-1, help="service level: greatest part that fails; -1: none"
    )


def shares(mix: str) -> dict[str, float]:
    """{"image": 0.8, ...} of "image=8,text=1,batch=1"; ValueError if it is none."""
    parsed = {name: float(share) for name, _, share in (part.partition("=") for part in mix.split(","))}
    if not set(parsed) <= {"image", "text", "batch"} or min(parsed.values()) < 0 or not sum(parsed.values()):
        raise ValueError(f"--mix {mix!r} must be as in image=8,text=1,batch=1")
    return {name: share / sum(parsed.values()) for name, share in parsed.items()}


@events.quitting.add_listener
def hold_to_the_service_level(environment: Any, **_: Any) -> None:
    options, total = environment.parsed_options, environment.stats.total
    missed = []
    if options.max_p99_ms and (total.get_response_time_percentile(0.99) or 0) > options.max_p99_ms:
        missed.append(f"p99 {total.get_response_time_percentile(0.99)} ms, more than {options.max_p99_ms:g}")
    if options.max_failures >= 0 and total.fail_ratio > options.max_failures:
        missed.append(f"{total.fail_ratio:.2%} failed, more than {options.max_failures:.2%}")
    if not total.num_requests and (options.max_p99_ms or options.max_failures >= 0):
        missed.append("no call was made")
    for what in missed:
        print(f"service level missed: {what}", file=sys.stderr)
    if missed:
        environment.process_exit_code = 1


class ModelUser(User):  # type: ignore[misc]
    """A caller with a client of its own."""

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.client = ModelClient(options.model, addresses=self.host, balancing=options.balancing)
        width, height = map(int, options.image_size.split("x"))
        self.random = np.random.default_rng()
        self.image = self.random.integers(0, 256, (height, width, 3), np.uint8)
        self.shares = shares(options.mix)
        self.calls = {
            "image": lambda timeout: self.client.run_image(self.image, timeout=timeout),
            "text": lambda timeout: self.client.run_text(TEXT, timeout=timeout),
            "batch": lambda timeout: self.client.run_image_batch([self.image] * options.batch_size, timeout=timeout),
        }

    def on_stop(self) -> None:
        self.client.close()

    def wait_time(self) -> float:
        rate = self.environment.parsed_options.rate
        return max(0.0, 1 / rate - self.took) if rate else 0.0

    @task
    def call(self) -> None:
        kind = str(self.random.choice(list(self.shares), p=list(self.shares.values())))
        begun, failed = time.perf_counter(), None
        try:
            self.calls[kind](self.environment.parsed_options.call_timeout)
        except Exception as error:
            failed = error
        self.took = time.perf_counter() - begun
        self.environment.events.request.fire(
            request_type="gRPC", name=f"{self.client.model} {kind}", response_time=1000 * self.took,
            response_length=0, exception=failed, context={},
        )  # fmt: skip
