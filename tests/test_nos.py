"""The pickles of nos: arrays and images by any protocol, and those that would be something else."""

import os
import pickle
import pickletools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.conftest import Server
from tests.test_faults import write_model
from tiny_model_server.errors import InvalidInput
from tiny_model_server.protocols.nos import _images

DTYPES = st.sampled_from(["bool", *"uint8 int16 uint16 int32 uint64 float16 float32 float64".split()])


@given(arrays.arrays(DTYPES, arrays.array_shapes(max_dims=3, max_side=4)), st.integers(3, 5), st.booleans())
def test_arrays_come_through_bit_for_bit(array: Any, protocol: int, fortran: bool) -> None:
    sent = np.asfortranarray(array) if fortran else array
    found = _images(pickle.dumps(sent, protocol=protocol))
    assert isinstance(found, np.ndarray)
    assert found.dtype == array.dtype
    assert np.array_equal(found.view(np.uint8), np.ascontiguousarray(array).view(np.uint8))
    listed = _images(pickle.dumps([sent, sent], protocol=protocol))
    assert [one.shape for one in listed] == [array.shape] * 2


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def shared(depth: int) -> Any:
    value: Any = ("x",)
    for _ in range(depth):
        value = (value, value, value)
    return value


def built(name: bytes, state: Any, *parts: Any) -> bytes:
    """A pickle that calls "module\\nname" with parts and sets a state, whatever this process has under that name."""
    made, stated = (pickle.dumps(value, protocol=3)[2:-1] for value in (parts, state))
    return b"\x80\x04c" + name + b"\n" + made + pickle.REDUCE + stated + pickle.BUILD + pickle.STOP


HOSTILE: dict[str, bytes] = {
    "os.system": pickle.dumps(Evil(os.system, "touch /tmp/tms-owned")),
    "eval": pickle.dumps(Evil(eval, "1")),
    "exec": pickle.dumps(Evil(exec, "x = 1")),
    "getattr": pickle.dumps(Evil(getattr, "x", "join")),
    "open": pickle.dumps(Evil(open, "/tmp/tms-owned", "w")),
    "import": pickle.dumps(Evil(__import__, "os")),
    "protocol 0": b"cos\nsystem\n(S'touch /tmp/tms-owned'\ntR.",
    "inst": b"(S'touch /tmp/tms-owned'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch /tmp/tms-owned'\no.",
    "ext": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x04X\x01\x00\x00\x00xQ.",
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "numpy's load": built(b"numpy\nload", None, "/etc/passwd"),
    "an unknown image class": built(b"PIL.Image\nopen", None, "/etc/passwd"),
    "an object array": pickle.dumps(np.array([object.__name__, 1], object)),
    "a pointer as dtype": built(b"numpy\ndtype", (3, "|", None, None, None, 8, 8, 0), "O8", False, True),
    "a structured array": pickle.dumps(np.zeros(2, [("a", "i4")])),
    "a masked array": pickle.dumps(np.ma.array([1, 2])),
    "a class that is no instance": b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93.",
    "state for a class": b"\x80\x04\x8c\x07_codecs\x8c\x06encode\x93}b.",
    "keys that take for ever": b"\x80\x04}" + pickle.dumps(shared(40), protocol=3)[2:-1] + b"K\x01s.",
    "a state that takes for ever to read": built(b"PIL.Image\nImage", [{}, shared(40), shared(40), None, b""]),
    "a set": pickle.dumps({1, 2}),
    "a number": pickle.dumps(5),
    "nothing": pickle.dumps(None),
    "a nested list": pickle.dumps([[np.zeros(2)]]),
    "an empty list": pickle.dumps([]),
    "an array of another size": pickle.dumps(np.zeros(4, np.uint8), protocol=4).replace(b"K\x04\x85", b"K\x7f\x85"),
    "a memo of four thousand millions": b"\x80\x04Nr\xff\xff\xff\xff.",
    "bytes that are not there": b"\x80\x04B\xff\xff\xff\x7fx.",
    "no pickle": b"\x89PNG\r\n",
    "an empty message": b"",
    "cut off": pickle.dumps(np.zeros((9, 9)))[:-20],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidInput):
        _images(HOSTILE[name])
    assert time.monotonic() - started < 1
    assert not Path("/tmp/tms-owned").exists()


@given(st.integers(3, 5), st.data())
def test_damaged_pickles(protocol: int, data: st.DataObject) -> None:
    """Any bytes of a good pickle changed: an array or InvalidInput, nothing else."""
    good = bytearray(pickle.dumps([np.zeros((2, 3)), np.ones(2, np.uint8)], protocol=protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = _images(bytes(good))
    except InvalidInput:
        return
    assert isinstance(found, (np.ndarray, list))


@given(st.lists(st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes]), max_size=12))
def test_any_instructions(codes: list[bytes]) -> None:
    try:
        _images(b"\x80\x04" + b"".join(code + b"\x01\x00\x00\x00" for code in codes) + b".")
    except InvalidInput:
        pass


def test_the_four_models_limit(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """As nos had it: at most so many models at a time; the one that was not called for longest leaves."""
    for number in range(4):
        write_model(tmp_path, f"m{number}", f"    def run(self, data, args):\n        return {number}")
    server = start_server(tmp_path, TMS_MAX_LOADED=2)
    with server.client("m0") as client:
        assert client.model_info()[0]["state"] == "READY"
        assert client.run_text("x") == 0
    for name in ("m2", "m3"):
        with server.client(name) as client:
            assert client.load_model()[0]["state"] == "READY"
            assert client.run_text("x") == int(name[1])
    for name, state in {"m0": "UNLOADED", "m1": "UNLOADED", "m2": "READY", "m3": "READY"}.items():
        with server.client(name) as client:
            assert client.model_info()[0]["state"] == state
