"""The soak in short, and that it fails where something leaks."""

import numpy as np
import pytest

from tests import soak


def test_each_transport_answers_every_kind_of_call(capsys: pytest.CaptureFixture[str]) -> None:
    status = soak.main("6", "2", "500", "200")
    lines = capsys.readouterr().out.splitlines()
    assert status == 0, lines
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| ---", *["| local", "| gRPC", "| HTTP"] * 4]
    for way in soak.WAYS:
        (counts,) = (line for line in lines if line.startswith(f"{way}: "))
        assert all(f" {kind}" in counts for kind in ("text", "image", "stream"))


def test_leaks_of_model_and_client_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_LEAK_KB", "3000")
    monkeypatch.setenv("TEST_LEAK_CLIENTS", "1")
    assert soak.main("5", "2.5", "100", "200", "local") == 1
    found = capsys.readouterr().out
    assert "local: workers_mib grew by" in found
    assert "the client's process had" in found


def held(**grown: float) -> soak.Held:
    return soak.Held(**dict.fromkeys(soak.NAMES, 100.0) | grown)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", soak.NAMES)
def test_growth_of_anything_is_a_fault(name: str) -> None:
    times = [float(second) for second in range(100)]
    noise = np.random.default_rng(0).normal(0, 4, 100)

    def found(slope: float) -> list[str]:
        samples = [held(**{name: 100 + slope * time + more}) for time, more in zip(times, noise, strict=True)]
        return soak.faults("gRPC", times, samples, 8, 8)

    assert found(0) == []
    (fault,) = found(0.5)
    assert f"gRPC: {name} grew by" in fault


def test_growth_is_that_of_the_second_half_and_needs_samples() -> None:
    times = [float(second) for second in range(100)]
    samples = [held(front_mib=min(50, time)) for time in times]
    assert soak.faults("gRPC", times, samples, 8, 3) == []
    with pytest.raises(ValueError, match="too few"):
        soak.growth([1, 2], [1, 2])
