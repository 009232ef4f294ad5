"""What a caller gets from a model: every kind of value, through a real server and its worker processes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError

import model_client
from tests.conftest import Server, only, wait_for
from tiny_model_server import codec, schemas
from tiny_model_server.client import calls


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files of several kinds and sizes, smooth enough for JPEG."""
    folder = tmp_path_factory.mktemp("images")
    rows, columns = np.indices((427, 640))
    colour = np.dstack([rows * 255 // 426, columns * 255 // 639, (rows + columns) * 255 // 1065]).astype(np.uint8)
    cv2.imwrite(str(folder / "large.jpg"), colour)
    cv2.imwrite(str(folder / "gray.png"), colour[..., 2])
    cv2.imwrite(str(folder / "small.png"), colour[:300, :451])
    return folder


DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()


@pytest.fixture(autouse=True, params=["same host", "gRPC"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "1" if request.param == "same host" else "0")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 2)])
def test_images_of_every_dtype_arrive_bit_for_bit(server: Server, dtype: str, shape: tuple[int, ...]) -> None:
    image = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    answer = server.client("echo").run_image(image)
    assert answer.dtype == image.dtype
    assert np.array_equal(answer, image)
    answer[0, 0] = 1  # the application owns what it was given


def test_images_of_odd_layout_arrive_as_they_look(server: Server) -> None:
    image = np.arange(60, dtype=">f4").reshape(10, 6)[::2, ::-1]
    assert np.array_equal(server.client("echo").run_image(image), image)
    assert server.client("describe").run_image(np.ones((4, 5, 1), np.uint8))["shape"] == [4, 5]
    assert server.client("describe").run_image(np.ones((4, 5, 3), np.uint8))["writable"]


def test_a_large_image(server: Server) -> None:
    image = np.random.default_rng(1).integers(0, 256, (1080, 1920, 3), np.uint8)
    assert np.array_equal(server.client("echo").run_image(image), image)


@pytest.mark.parametrize("given", ["path", "str", "bytes"])
def test_image_files_are_decoded_by_the_server(server: Server, images: Path, given: str) -> None:
    path = images / "large.jpg"
    image = {"path": path, "str": str(path), "bytes": path.read_bytes()}[given]
    expected = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.array_equal(server.client("echo").run_image(image), expected)


def test_image_mode_decides_what_a_file_is_decoded_to(server: Server, images: Path) -> None:
    path = images / "gray.png"
    answer = server.client("masks").run_image_to_image(path, {"mask": 1})
    assert np.array_equal(answer, cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127)


def test_files_of_different_sizes_in_one_batch(server: Server, images: Path) -> None:
    paths = [images / name for name in ("large.jpg", "gray.png", "small.png")]
    shapes = [answer["shape"] for answer in server.client("describe").run_image_batch(paths)]
    assert shapes == [[427, 640, 3], [427, 640, 3], [300, 451, 3]]


@pytest.mark.parametrize("text", ["", "a text", "Grüße, 世界 🌍", 'quotes " and \\ and \n', "x" * 3_000_000])
def test_texts(server: Server, text: str) -> None:
    assert server.client("echo").run_text(text) == text


def test_args_reach_the_model(server: Server) -> None:
    args = {"top": 3, "nested": {"list": [1, 2.5, None, True]}, "numpy": np.float32(0.5), "$odd": "$"}
    answer = server.client("echo").run_text("x", args)
    assert answer == {"data": "x", "args": args}


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        12345678901234567890,
        -0.5,
        "text",
        [],
        {},
        [1, [2, {"three": [None]}]],
        {"$array": 0, "x": 1},
        {"$dict": {}},
        b"\x00\xff",
        {"bytes": b"", "list": [b"1"]},
    ],
)
def test_json_values_come_back_as_they_are(server: Server, value: object) -> None:
    assert server.client("echo").run(value) == value


def test_numbers_that_json_lacks(server: Server) -> None:
    answer = server.client("echo").run([float("nan"), float("inf"), -float("inf")])
    assert np.isnan(answer[0])
    assert answer[1:] == [float("inf"), -float("inf")]


@pytest.mark.parametrize(
    "array",
    [
        np.array(3, np.float32),
        np.zeros((0, 4), np.int16),
        np.arange(24).reshape(1, 2, 3, 4),
        np.array([1 + 2j, 3], np.complex64),
        np.array(["ä", "long text"]),
        np.array([b"ab", b"c"]),
        np.array(["2026-01-01", "2026-01-02"], "datetime64[D]"),
        np.array([np.nan, np.inf, -0.0]),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_trees_with_arrays_of_any_dtype_and_rank(server: Server, array: np.ndarray) -> None:
    answer = server.client("echo").run({"deep": [{"array": array}], "n": 1})
    found = answer["deep"][0]["array"]
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert answer["n"] == 1


def test_batches_are_in_order(server: Server) -> None:
    client = server.client("echo")
    images = [np.full((3, 4), value, np.uint8) for value in range(50)]
    assert [int(answer[0, 0]) for answer in client.run_image_batch(images)] == list(range(50))
    assert client.run_text_batch(["a", "b", "c"]) == ["a", "b", "c"]
    answers = client.run_batch([1, {"array": np.arange(3)}, "x"])
    assert answers[0] == 1
    assert answers[1]["array"].tolist() == [0, 1, 2]
    assert answers[2] == "x"


def test_items_of_a_batch_share_a_call_of_the_model(server: Server) -> None:
    answers = server.client("batches").run_batch(list(range(20)))
    assert [answer[0] for answer in answers] == list(range(20))
    assert max(answer[1] for answer in answers) == 8


def test_callers_meet_in_one_batch(server: Server) -> None:
    client = server.client("batches")
    with ThreadPoolExecutor(17) as threads:
        threads.submit(client.run, 0, {"sleep": 0.5})  # the others wait for it
        time.sleep(0.1)
        answers = list(threads.map(lambda i: client.run(i, {"sleep": 0.05}), range(16)))
    assert [answer[0] for answer in answers] == list(range(16))
    assert max(answer[1] for answer in answers) > 1, answers


def test_items_with_other_args_or_shapes_never_share_a_batch(server: Server) -> None:
    client = server.client("batches")
    with ThreadPoolExecutor(8) as threads:
        slow = threads.submit(client.run, 0, {"sleep": 0.3})
        answers = list(threads.map(lambda i: client.run(i, {"sleep": 0.01, "own": i}), range(6)))
        slow.result()
    assert [answer[1] for answer in answers] == [1] * 6


def test_a_bad_item_fails_alone(server: Server) -> None:
    client = server.client("batches")
    for bad in (-1, -2):  # run_batch returns an exception in its place, or raises
        answers = client.run_batch([1, bad, 3], return_exceptions=True)
        assert [answers[0][0], answers[2][0]] == [1, 3]
        assert isinstance(answers[1], model_client.InvalidInput)
        assert "item 1" in str(answers[1])
        with pytest.raises(model_client.InvalidInput, match="item 1: .*negative"):
            client.run_batch([1, bad, 3])


def test_image_to_image(server: Server) -> None:
    image = np.random.default_rng(2).random((6, 8, 2)).astype(np.float32)
    assert np.array_equal(server.client("echo").run_image_to_image(image), image)
    with pytest.raises(model_client.ModelUnavailable, match=r"str, not an image.*RunImage"):
        server.client("masks").run_image_to_image(np.zeros((4, 4), np.uint8))


def test_a_model_may_keep_its_input(server: Server) -> None:
    client = server.client("keeps")
    client.run(np.full(100_000, 1))
    for value in range(2, 6):
        before = client.run(np.full(100_000, value))
        assert before[0] == value - 1


def test_input_shape_and_declared_inputs(server: Server) -> None:
    assert server.client("declares").get_input_shape() == [224, 224, 3]
    assert server.client("echo").get_input_shape() is None
    assert server.client("declares").run_image(np.full((2, 2, 3), 4, np.uint8)) == 4.0
    with pytest.raises(model_client.InvalidInput, match=r"uint8 of shape \[-1, -1, 3\].*float32 of shape \[2, 2, 3\]"):
        server.client("declares").run_image(np.zeros((2, 2, 3), np.float32))


MISBEHAVIOUR = [
    ("raise", model_client.ModelFailed, "raised KeyError: 'no such thing'"),
    ("invalid", model_client.InvalidInput, "the image is upside down"),
    ("exit", model_client.ModelFailed, "raised SystemExit: 3"),
    ("nonsense", model_client.ModelFailed, r"cannot be encoded: cannot serialize object at \.object\[0\]: "),
    ("junk", model_client.ModelFailed, "cannot be read: UnpicklingError"),
    ("cycle", model_client.ModelFailed, "nested too deeply"),
    ("die", model_client.ModelFailed, "exited with code 7, twice"),
    ("segfault", model_client.ModelFailed, "killed by SIGSEGV, twice"),
    ("hang", model_client.DeadlineExceeded, "longer than its timeout_s=2"),
]


@pytest.mark.parametrize(("what", "error", "message"), MISBEHAVIOUR, ids=[row[0] for row in MISBEHAVIOUR])
def test_a_model_that_misbehaves_fails_its_own_call_only(server: Server, what: str, error: type, message: str) -> None:
    client = server.client("misbehave")
    with pytest.raises(error, match=message) as caught:
        client.run("x", {"do": what})
    assert isinstance(caught.value, grpc.RpcError)
    assert client.run("x")["pid"]


@pytest.mark.parametrize("what", ["print", "threads"])
def test_a_model_may_print_and_start_threads(server: Server, what: str) -> None:
    assert server.client("misbehave").run("x", {"do": what})["pid"]


BAD_IMAGES = [
    (np.zeros((2, 2), object), "an image is an array of numbers"),
    (np.zeros((2, 2, 2, 2)), r"not float64 of shape \(2, 2, 2, 2\)"),
    (np.zeros((0, 4)), "HxW or HxWxC"),
    (np.array([["a"]]), "an array of numbers"),
    (b"no image at all", "15 bytes are not an image file"),
    (b"", "(no|not an) image file"),
    (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "(no|not an) image file"),
    (b"\x89PNG\r\n\x1a\n\x7f\xff\xff\xffIHDR" + bytes(17), "33 bytes .* this PNG announces at least 2147483667"),
]


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES)
def test_bad_images_are_refused(server: Server, image: object, message: str) -> None:
    with pytest.raises(model_client.InvalidInput, match=message) as caught:
        server.client("echo").run_image(image)  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_decompression_bomb_is_refused(start_server: object) -> None:
    server = start_server(TMS_MAX_IMAGE_PIXELS=10_000)  # type: ignore[operator]
    _, data = cv2.imencode(".png", np.zeros((200, 200), np.uint8))
    with pytest.raises(model_client.InvalidInput, match="could not be decoded|not an image file"):
        server.client("echo").run_image(data.tobytes())
    _, data = cv2.imencode(".png", np.zeros((90, 90), np.uint8))
    assert server.client("echo").run_image(data.tobytes()).shape == (90, 90, 3)


def test_unknown_models_and_empty_batches(server: Server) -> None:
    with pytest.raises(model_client.ModelNotFound, match="no model 'nobody'; there are: batches, declares"):
        server.client("nobody").run_text("x")
    with pytest.raises(model_client.InvalidInput, match="the batch is empty"):
        server.client("echo").run_text_batch([])


def test_deadlines(server: Server) -> None:
    with pytest.raises(model_client.DeadlineExceeded):
        server.client("misbehave").run(1, {"do": "hang"}, timeout=0.2)
    assert server.client("misbehave").run(1, timeout=10)["pid"]


def test_a_caller_that_vanishes_is_forgotten(server: Server) -> None:
    client = server.client("misbehave")
    pid = client.run(1)["pid"]
    caller = threading.Thread(target=lambda: pytest.raises(Exception, client.run, 1, {"do": "hang"}))  # noqa: B017
    caller.start()
    wait_for(lambda: client._transport.connected, "the call to be on its way")
    client.close()
    caller.join()
    other = server.client("misbehave").run(1)["pid"]  # waits for the hanging worker to be replaced
    assert isinstance(other, int)
    assert pid


def test_a_batch_may_be_larger_than_the_queue(start_server: object) -> None:
    server = start_server(only("batches"), TMS_MODEL_BATCHES_QUEUE_SIZE=2, TMS_MODEL_BATCHES_MAX_BATCH_SIZE=1)  # type: ignore[operator]
    for size in (2, 3, 9):
        assert len(server.client("batches").run_batch(list(range(size)))) == size


def test_mixed_load_reaches_its_own_callers(server: Server) -> None:
    client = server.client("echo")

    def call(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 256, rng.integers(1, 200, 2), np.uint8)
        return np.array_equal(client.run_image(image), image)

    with ThreadPoolExecutor(32) as threads:
        assert all(threads.map(call, range(400)))


LARGE = np.random.default_rng(1).random((3, 200, 300))
SMALL = np.arange(7, dtype=np.int16)


@pytest.mark.parametrize(
    "value",
    [
        LARGE,
        LARGE[:, ::-1] > 0.5,
        [LARGE, SMALL],
        [SMALL, LARGE],
        [LARGE, LARGE[0], np.zeros((0, 3))],
        {"text": "x" * 99_999, "array": LARGE.astype("<U9")},
        {"b": b"y" * 99_999, "nested": [{"array": LARGE.astype(np.complex64)}]},
        np.array(3.5),
        [SMALL] * 200,
    ],
    ids=lambda value: codec.encode(value).text[:20],
)
def test_arrays_large_and_small_both_ways(server: Server, value: object) -> None:
    with server.client("echo") as client:
        for _ in range(3):
            np.testing.assert_equal(client.run(value), value)
        np.testing.assert_equal(list(client.run_stream(value)), [value])
        np.testing.assert_equal(client.run_batch([value, 1, value]), [value, 1, value])


@pytest.mark.parametrize("value", [LARGE, [SMALL, LARGE], [LARGE, SMALL], [LARGE, LARGE], {"text": "x" * 99_999}])
def test_bytes_at_the_end_are_the_same_message(value: object) -> None:
    """For every parser; and those of other clients' messages are found where they end so, too."""
    kind = schemas.message("server", "server.RunArgs")
    whole = kind(model="m", args='{"a": 1}')
    encoded = codec.encode(value)
    whole.data.json = encoded.text
    for array in encoded.arrays:
        whole.data.arrays.add(dtype=codec.dtype_name(array.dtype), shape=array.shape, data=array.tobytes())
    sent = calls.value("Run", "m", value, {"a": 1}).inline()
    assert kind.FromString(sent) == whole
    at_end = bool(encoded.arrays) and encoded.arrays[-1] is not SMALL and encoded.arrays[-1].nbytes > schemas.LARGE
    whole.ClearField("model")
    whole.ClearField("args")
    for data in (sent, whole.SerializeToString()):
        found, trailing = schemas.parse_trailing(kind, data)
        assert (trailing is not None) == at_end
        if trailing is not None:
            assert not found.data.arrays[-1].data
            found.data.arrays[-1].data = bytes(trailing)
        assert found == kind.FromString(data)


@pytest.mark.parametrize("value", [LARGE, [SMALL, LARGE], [LARGE, SMALL], [LARGE, LARGE]])
def test_answers_with_bytes_at_the_end_are_for_every_parser(server: Server, value: object) -> None:
    """As a generated stub reads them, which knows no ends."""
    methods = schemas.methods("server", "server.Server")
    encoded, image = codec.encode(value), (LARGE[0] * 200).astype(np.uint8)
    request = methods["Run"].request(model="echo", data={"json": encoded.text})
    for array in encoded.arrays:
        request.data.arrays.add(dtype=codec.dtype_name(array.dtype), shape=array.shape, data=array.tobytes())
    height, width = image.shape
    described = {"height": height, "width": width, "channels": 1, "dtype": "uint8", "data": image.tobytes()}
    with grpc.insecure_channel(server.address) as channel:

        def call(name: str, request: object) -> object:
            kind = methods[name]
            stub = channel.unary_unary(kind.path, kind.request.SerializeToString, kind.response.FromString)
            return stub(request, timeout=10)

        answer = call("Run", request)
        assert (answer.data, list(answer.arrays)) == (encoded.text, list(request.data.arrays))
        answer = call("RunImageToImage", methods["RunImageToImage"].request(model="echo", image=described))
        assert answer.image == methods["RunImageToImage"].response(image=described).image


def test_the_end_of_what_is_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken for an array that protobuf would not; and none has us look for long."""
    kind = schemas.message("server", "server.RunArgs")
    array = b"\x1a" + schemas.varint(99_388) + bytes(99_388)  # Array.data
    value = b"\x12" + schemas.varint(len(array)) + array  # Value.arrays
    good = b"\x0a" + schemas.varint(len(value)) + value  # RunArgs.data
    assert len(schemas.parse_trailing(kind, good)[1] or b"") == 99_388
    number = b"\xff" * 9 + b"\x01"
    in_text = b"\x0d\x81\x01\x12\x04\x1a" + schemas.varint(len(good)) + good  # after four bytes that look like fields
    in_unknown = b"\xfa\x01" + schemas.varint(len(good)) + good  # whose length looks like a field
    for bad in (good[:-1], good + b"\x0a", b"\x0a\x00" * 200 + good, in_text, in_unknown, b"\xfa\x01\x01x" + good,
                b"\x08" + number + good, b"\xff" * 99_999, b"\x08" * 99_999, b"\x0a" + number + good):  # fmt: skip
        try:
            expected = kind.FromString(bad)
        except DecodeError:
            with pytest.raises(DecodeError):
                schemas.parse_trailing(kind, bad)
            continue
        found, trailing = schemas.parse_trailing(kind, bad)
        if trailing is not None:
            found.data.arrays[-1].data = bytes(trailing)
        assert found == expected
    with pytest.raises(IndexError):
        schemas._varint(b"\xff" * 20 + b"\x01", 0)  # no number of protobuf's is so long
    looked = []
    varint = schemas._varint
    monkeypatch.setattr(schemas, "_varint", lambda *args: looked.append(1) or varint(*args))
    schemas.parse_trailing(kind, b"\x08\x01" * 99_999 + good)
    assert 0 < len(looked) < 1000


def test_large_answers_are_the_applications_own(server: Server) -> None:
    """Their memory is written again when nobody has them any more, and no view of them: not before."""
    images = [np.full((300, 400, 3), number, np.uint8) for number in range(12)]
    with server.client("echo") as client:
        held = [client.run_image(image) for image in images[:6]]
        views = [client.run_image(image)[100:, :, 1] for image in images[6:]]
        for number in range(20):
            assert client.run_image(images[number % 12])[5, 5, 1] == number % 12
        for number, array in enumerate([*held, *views]):
            assert array.flags.writeable
            assert np.all(array == number)
        first = client.run_image(images[1])
        where = first.__array_interface__["data"]
        del first
        seen = [client.run_image(images[2]).__array_interface__["data"] for _ in range(2)]
        assert where in seen


@pytest.mark.parametrize("shape", [(1, 1), (5, 5, 5), (8, 16), (100, 200, 3), (600, 1000, 4)])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_pixels_after_the_message_are_the_same_message(shape: tuple[int, ...], dtype: str) -> None:
    array = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    kind = schemas.message("server", "server.ImageArgs")
    sent = calls.image("RunImage", "m", array[::-1], {"a": 1})
    height, width, channels = (*shape, 1)[:3]
    image = {"height": height, "width": width, "channels": channels, "dtype": dtype, "data": array[::-1].tobytes()}
    assert kind.FromString(sent.inline()) == kind(image=image, model="m", args='{"a": 1}', accept_arrays=True)
