"""The codec alone: every value comes back as it was, and what cannot be serialized says so."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tiny_model_server import codec
from tiny_model_server.codec import Encoded
from tiny_model_server.errors import InvalidInput
from tiny_model_server.shared_memory import Segment

any_array = arrays.arrays(
    st.one_of(
        arrays.boolean_dtypes(),
        arrays.integer_dtypes(),
        arrays.unsigned_integer_dtypes(),
        arrays.floating_dtypes(sizes=(16, 32, 64)),
        arrays.complex_number_dtypes(sizes=(64, 128)),
        arrays.unicode_string_dtypes(max_len=4),
        arrays.byte_string_dtypes(max_len=4),
        arrays.datetime64_dtypes(),
    ),
    arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(max_size=9)
)
trees = st.recursive(
    st.one_of(scalars, any_array),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        little = one.astype(one.dtype.newbyteorder("<"))
        return other.dtype == little.dtype and one.shape == other.shape and little.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(trees)
def test_what_is_encoded_comes_back(value: Any) -> None:
    encoded = codec.encode(value)
    json.loads(encoded.text)
    assert same(value, codec.decode(encoded))


@given(trees)
def test_arrays_cross_shared_memory_bit_for_bit(value: Any) -> None:
    encoded = codec.encode(value)
    segment = Segment()
    read = segment.read(segment.write(encoded.arrays))
    assert same(value, codec.decode(Encoded(encoded.text, read)))
    segment.close()


def test_a_segment_grows_and_old_views_stay_valid() -> None:
    segment = Segment()
    (small,) = segment.read(segment.write([np.arange(10)]))
    other = Segment(__import__("os").dup(segment.fd))
    large = np.arange(1_000_000)
    places = segment.write([large])
    assert np.array_equal(other.read(places)[0], large)
    segment.close()
    other.close()
    assert small.shape == (10,)


@given(trees)
def test_json_only_is_json(value: Any) -> None:
    json.loads(codec.json_only(value))


def test_json_only_is_lists() -> None:
    value = {"a": np.arange(4).reshape(2, 2), "b": (np.float32(0.5), np.int8(3)), "c": b"\x00", "d": math.inf, 5: None}
    assert codec.json_only(value) == '{"a": [[0, 1], [2, 3]], "b": [0.5, 3], "c": "AA==", "d": null, "5": null}'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, object()}, "cannot serialize object at ["),
        ({"a": [0, object()]}, "cannot serialize object at .a[1]: "),
        ({(1, 2): 0}, "a key of type tuple"),
        ({"x": np.array([object()])}, "object at .x[0]: "),
        (np.zeros(2, "V4"), "cannot serialize an array of dtype"),
    ],
)
def test_what_cannot_be_serialized_says_where(value: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        codec.encode(value)
    assert message in str(caught.value)


@given(st.text(max_size=30), st.lists(any_array, max_size=2))
def test_any_text_is_a_value_or_an_error(text: str, found: list[Any]) -> None:
    try:
        codec.decode(Encoded(text, found))
    except InvalidInput:
        pass


def test_signatures_differ_by_shape_but_not_by_values_or_bytes() -> None:
    def signature(value: Any) -> Any:
        return codec.signature(codec.encode(value))

    assert signature(np.zeros(3)) == signature(np.ones(3))
    assert signature(np.zeros(3)) != signature(np.zeros(4))
    assert signature(np.zeros(3)) != signature(np.zeros(3, np.float32))
    assert signature({"a": np.zeros(3), "b": b"1"}) == signature({"a": np.ones(3), "b": b"22"})
    assert signature("text") == signature(3) == ()
