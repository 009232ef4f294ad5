"""Each scene of chaos for some seconds, and that a wrong answer, or a call that may not fail, would be seen."""

import pytest

from tests import chaos
from tests.checked_load import MODELS, Failure, Result, checked_load
from tests.conftest import Server, wait_for


@pytest.mark.parametrize(("name", "least"), [("workers", 4), ("fleet", 2), ("replicas", 3)])
def test_every_answer_is_right_and_only_streams_fail(name: str, least: int) -> None:
    outcome = chaos.play(chaos.SCENES[name], seconds=4, seed=224, least=least)  # each begins with a kill
    assert outcome.faults == []
    assert outcome.events[0].name.startswith("kill")
    assert outcome.count() > 100
    assert outcome.count(*chaos.STREAMS) > 10


def test_wrong_answers_are_seen() -> None:
    """Those of a model that mixes up a batch, and loses and repeats values of streams."""
    server = Server(MODELS, TEST_WRONG=1)
    try:
        with checked_load("gRPC", server.address) as load:
            wait_for(lambda: load.calls.total() > 30, "some calls")
            wrong = load.stop().wrong
    finally:
        server.kill()
    assert {"batch", "stream"} <= {one.partition(":")[0] for one in wrong}
    assert any("'index': 3" in one and "as number 2" in one for one in wrong)  # lost
    assert any("'index': 2" in one and "as number 3" in one for one in wrong)  # twice


def test_only_what_may_fail_is_excused() -> None:
    event = chaos.Event("kill", 10, 11, chaos.STREAMS, "UNAVAILABLE")
    given = {
        "may": Failure("stream", "UNAVAILABLE", "", 9, 10.5),
        "a call": Failure("text", "UNAVAILABLE", "", 9, 10.5),
        "another status": Failure("stream", "INTERNAL", "", 9, 10.5),
        "before": Failure("stream", "UNAVAILABLE", "", 8, 9),
        "afterwards": Failure("stream", "UNAVAILABLE", "", 11.5, 12),
    }
    found = {name: chaos.Outcome(5, [event], [Result(failures=[one])]).faults for name, one in given.items()}
    assert [name for name, faults in found.items() if not faults] == ["may"]
    wrong = chaos.Outcome(5, [event], [Result(wrong=["stream: lost"])])
    assert wrong.faults == ["wrong answer: stream: lost"]
