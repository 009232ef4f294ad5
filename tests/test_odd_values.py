"""Answers of models in rare shapes: each arrives equal by every protocol, or fails with a message that says why."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import model_client
from model_client import ModelClient
from tests.conftest import Server
from tests.test_faults import write_model
from tests.test_open_inference_bytes import INFER, elements_of, framed
from tests.test_values import post

ANSWERS = """
    metadata = {metadata}
    def run(self, data, args):
        import numpy as np
        from model_interface import InvalidInput
        def silent():
            raise InvalidInput()
        return {{
            "dimensions": lambda: np.zeros((1,) * 33),
            "empty rows": lambda: [np.zeros((70_000, 0))],
            "few empty rows": lambda: np.zeros((3, 0)),
            "name": lambda: {{"a\\ud800": np.arange(3)}},
            "nested": lambda: {{"label": "cat", "scores": {{"cat": 0.5, "dog": "none"}}, "top": 0.5}},
            "bytes": lambda: {{"raw": {{"b": b"xyz"}}}},
            "times": lambda: np.array(["2020-01-01"], "M8[D]"),
            "complex": lambda: {{"z": np.array([1j])}},
            "silent": silent,
            "key": lambda: {{np.longdouble(1.5): 1}},
        }}[data]()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder, "whole", ANSWERS.format(metadata={}))
    write_model(folder, "rows", ANSWERS.format(metadata={"batch": True}))
    server = Server(folder)
    yield server
    server.kill()


def by_grpc(server: Server, model: str, texts: list[str]) -> tuple[Any, list[bytes]]:
    """(outputs as (name, datatype, shape), raw contents) of an Open Inference request."""
    tensor = {"name": "x", "datatype": "BYTES", "shape": [len(texts)]}
    request = INFER.request(
        model_name=model, inputs=[tensor], raw_input_contents=[framed([text.encode() for text in texts])]
    )
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER.path, INFER.request.SerializeToString, INFER.response.FromString)
        answer = call(request, timeout=20)
    return [(one.name, one.datatype, list(one.shape)) for one in answer.outputs], list(answer.raw_output_contents)


def by_rest(server: Server, model: str, texts: list[str]) -> tuple[int, Any]:
    tensor = {"name": "x", "datatype": "BYTES", "shape": [len(texts)], "data": texts}
    return post(server, f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())


def clients(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[ModelClient]:
    """One that uses the local transport, where there is one, and one that does not."""
    found = [server.client("whole")]
    found[0].run("few empty rows")
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "0")
    return [*found, server.client("whole")]


@pytest.mark.parametrize(("answer", "message"), [("dimensions", "32 dimensions"), ("empty rows", "rows without")])
def test_an_array_that_cannot_be_sent_fails_where_it_is_made(
    answers: Server, monkeypatch: pytest.MonkeyPatch, answer: str, message: str
) -> None:
    for client in clients(answers, monkeypatch):
        with pytest.raises(model_client.ModelFailed, match=f"cannot serialize this array .*{message}"):
            client.run(answer)
        with pytest.raises(model_client.ModelFailed, match=message):
            list(client.run_stream(answer))
        (error,) = client.run_batch([answer], return_exceptions=True)
        assert isinstance(error, model_client.ModelFailed)
        assert client.run("few empty rows").shape == (3, 0)
    with pytest.raises(TypeError, match=message):
        answers.client("whole").run(np.zeros((1,) * 33) if answer == "dimensions" else np.zeros((70_000, 0)))


def test_an_error_without_a_text_is_named_alike_by_all_transports(
    answers: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in clients(answers, monkeypatch):
        with pytest.raises(model_client.InvalidInput) as caught:
            client.run("silent")
        assert caught.value.details() == "InvalidInput"
        with pytest.raises(model_client.InvalidInput, match="item 0: InvalidInput"):
            client.run_batch(["silent"])
    assert post(answers, "/models/whole/run", b'"silent"') == (
        400,
        {"error": "InvalidInput", "status": "INVALID_ARGUMENT"},
    )


def test_a_key_of_any_float_is_its_text(answers: Server) -> None:
    assert answers.client("whole").run("key") == {"1.5": 1}


@pytest.mark.parametrize("rows", [1, 2])
def test_nested_answers_of_rows_are_one_json_a_row(answers: Server, rows: int) -> None:
    scores = {"cat": 0.5, "dog": "none"}
    outputs, raw = by_grpc(answers, "rows", ["nested"] * rows)
    assert outputs == [("label", "BYTES", [rows]), ("scores", "BYTES", [rows]), ("top", "FP64", [rows])]
    assert elements_of(raw[0]) == [b"cat"] * rows
    assert [json.loads(one) for one in elements_of(raw[1])] == [scores] * rows
    status, answer = by_rest(answers, "rows", ["nested"] * rows)
    assert status == 200
    assert answer["outputs"][0]["data"] == ["cat"] * rows
    assert [json.loads(one) for one in answer["outputs"][1]["data"]] == [scores] * rows
    assert elements_of(by_grpc(answers, "rows", ["bytes"] * rows)[1][0]) == [b'{"b": "eHl6"}'] * rows


@pytest.mark.parametrize(("answer", "name", "row"), [("times", "output", ["2020-01-01"]), ("complex", "z", [[0, 1]])])
def test_arrays_without_a_datatype_are_one_json_a_row(answers: Server, answer: str, name: str, row: Any) -> None:
    outputs, raw = by_grpc(answers, "rows", [answer] * 3)
    assert outputs == [(name, "BYTES", [3])]
    assert [json.loads(one) for one in elements_of(raw[0])] == [row] * 3


@pytest.mark.parametrize("model", ["whole", "rows"])
def test_a_name_that_utf8_cannot_hold_is_the_models_error(answers: Server, model: str) -> None:
    with pytest.raises(grpc.RpcError, match="the model's answer has half of a surrogate pair") as caught:
        by_grpc(answers, model, ["name"])
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    status, answer = by_rest(answers, model, ["name"])
    assert (status, answer["status"]) == (500, "INTERNAL")
    assert "half of a surrogate pair" in answer["error"]


def test_http_answers_do_not_wait_for_acknowledgements(answers: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", answers.http_port, timeout=20)
    took = []
    for _ in range(20):
        begun = time.monotonic()
        connection.request("POST", "/models/whole/run", b'"key"', {"Content-Type": "application/json"})
        assert connection.getresponse().read() == b'{"1.5": 1}\n'
        took.append(time.monotonic() - begun)
    connection.close()
    assert min(took[1:]) < 0.03  # a delayed ACK takes 40 ms, each time


SLOW = """
    max_batch_size = 16
    queue_size = 100
    def run(self, data, args):
        return data
    def run_batch(self, items, args):
        import time
        time.sleep(0.005)
        return items
"""


def test_several_batches_larger_than_the_queue_wait_for_each_other(tmp_path: Path) -> None:
    server = Server(write_model(tmp_path, "slow", SLOW))
    try:
        client = server.client("slow")
        wanted = [list(range(begin, begin + 600)) for begin in range(0, 6000, 1000)]
        futures = [client.submit_batch(items, retry=False) for items in wanted]
        assert [future.result() for future in futures] == wanted
    finally:
        server.kill()
