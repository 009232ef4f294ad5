"""Traces: a collector of the test's own receives a call in client, server, queue and worker, as one trace."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.conftest import ROOT, Server, wait_for


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._server.stop(0)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


CALLS = """
import asyncio
from model_client import AsyncModelClient, ModelClient, ModelClientError
with ModelClient("echo") as client:
    assert client.run_text("x") == "x"
    assert client.submit_text("x").result() == "x"
    assert client.run_text_batch(["a", "b"]) == ["a", "b"]
    try:
        client.run_batch([])
    except ModelClientError as error:
        assert error.code().name == "INVALID_ARGUMENT"
async def main():
    async with AsyncModelClient("echo") as client:
        assert await client.run_text("x") == "x"
asyncio.run(main())
"""


STREAMS = """
import numpy as np
from model_client import ModelClient
large = np.arange(3_000_000, dtype=np.uint8)
with ModelClient("echo") as client:
    for value in (large, 1):
        assert np.array_equal(client.run(value), value)
    assert list(client.run_stream("x")) == ["x"]
    assert next(iter(client.stats()["replicas"])) != "(none)"
"""


WITH_ID = """
from model_client import ModelClient, request_id
with ModelClient("echo") as client, request_id("order 66"):
    client.run("x")
    list(client.run_stream("x"))
"""


def traced(code: str, collector: Collector, start_server: Callable[..., Server], **settings: Any) -> Server:
    """Runs an application that is traced, with a server that is, too."""
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    server = start_server(**env, **settings)
    client = os.environ | env | {"TMS_ADDRESS": server.address, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=client, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return server


def test_large_messages_and_streams(collector: Collector, start_server: Callable[..., Server]) -> None:
    traced(STREAMS, collector, start_server)
    ways = [f"/server.Server/{name}" for name in ("Run", "Run", "RunStream")]

    def names() -> list[str]:
        return [span.name for span in collector.spans if span.name in ways]

    wait_for(lambda: sorted(names()) == sorted(2 * ways), "the spans of client and server", 20)
    assert len({span.trace_id for span in collector.spans}) == len(ways)


def test_one_trace_from_client_to_worker(collector: Collector, start_server: Callable[..., Server]) -> None:
    server = traced(CALLS, collector, start_server)

    def names() -> list[str]:
        return [span.name for span in collector.spans]

    wait_for(lambda: names().count("compute") == 5 and names().count("/server.Server/RunText") == 6, "all spans", 20)
    assert names().count("queue") == 5  # three single texts and a batch of two
    by_id = {span.span_id: span for span in collector.spans}
    for span in collector.spans:
        assert "grpc.health" not in span.name
        if span.name not in ("queue", "compute"):
            continue
        of_server = by_id[span.parent_span_id]
        of_client = by_id[of_server.parent_span_id]
        assert of_server.name == of_client.name
        assert not of_client.parent_span_id
        assert span.trace_id == of_server.trace_id == of_client.trace_id
        assert of_client.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 60
    failed = [span for span in collector.spans if span.name == "/server.Server/RunBatch"]
    assert len(failed) == 2
    server.wait_for_log("serving")


def test_spans_and_log_lines_have_the_id(collector: Collector, start_server: Callable[..., Server]) -> None:
    server = traced(WITH_ID, collector, start_server, TMS_ACCESS_LOG=1)
    wait_for(lambda: len(collector.spans) == 6, "client, server, queue and compute of a call; two of a stream", 20)
    for span in collector.spans:
        assert {one.key: one.value.string_value for one in span.attributes}["tms.request_id"] == "order 66"
    for path in ("Run", "RunStream"):
        server.wait_for_log(rf"access: /server.Server/{path} .* request_id=.order 66.")


def test_a_collector_that_is_not_there_fails_no_call(start_server: Callable[..., Server]) -> None:
    server = start_server(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    with server.client("echo") as client:
        assert [client.run_text("x") for _ in range(20)] == ["x"] * 20
    assert server.stop() == 0
