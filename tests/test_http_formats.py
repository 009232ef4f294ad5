"""HTTP inputs and answers in every format: numpy's files, named inputs, gzip, Accept; and what hostile ones get."""

import gzip
import http.client
import io
import json
import struct
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from tests.conftest import Server
from tests.test_faults import write_model
from tiny_model_server.errors import InvalidInput
from tiny_model_server.server.answers import accepted
from tiny_model_server.server.npy import read_npy, read_npz
from tiny_model_server.settings import Settings, SettingsError

StartServer = Callable[..., Server]
ANSWERS = """
    def run(self, data, args):
        import numpy as np
        what = args.get('what', '')
        image = np.arange(96, dtype='uint8').reshape(4, 8, 3)
        if isinstance(data, dict) and not what:
            return {name: [type(one).__name__, getattr(one, 'shape', None) or one] for name, one in data.items()}
        return {
            '': [type(data).__name__, getattr(data, 'shape', None) or str(data)],
            'same': data,
            'image': image,
            'gray': image[..., 0],
            'alpha': np.dstack([image, image[..., :1]]),
            'mask': image[..., 0] > 50,
            'beside': {'image': image, 'count': 3},
            'arrays': {'boxes': np.ones((2, 4), 'float32'), 'names': np.array(['a', 'bc']), 'count': 3, 'who': 'me'},
            'huge': {'count': 1 << 70},
            'text': 'Gr\\u00fc\\u00dfe',
            'bytes': b'RIFF\\0',
            'times': np.array(['2026-11-26'], 'datetime64[D]'),
            'flow': np.zeros((2, 2, 2), 'float32'),
            'none': None,
            'wide': np.zeros((1, 70000), 'uint8'),
            'long': list(range(args.get('n', 0))),
        }[what]
"""


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(write_model(tmp_path_factory.mktemp("formats"), "m", ANSWERS), TMS_MAX_MESSAGE_MB=4)
    yield server
    server.kill()


def send(
    server: Server,
    body: bytes = b"x",
    query: str = "",
    method: str = "POST",
    path: str = "/models/m/run",
    **headers: str,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    named = {"Content-Type": "text/plain"} | {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"http://127.0.0.1:{server.http_port}{path}{query}"
    request = urllib.request.Request(url, body if method == "POST" else None, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def asked(server: Server, what: str, accept: str, **args: Any) -> tuple[int, http.client.HTTPMessage, bytes]:
    query = "?args=" + urllib.request.quote(json.dumps({"what": what} | args))  # type: ignore[attr-defined]
    return send(server, query=query, Accept=accept)


def error_of(answer: tuple[int, Any, bytes], code: int) -> str:
    assert answer[0] == code, answer
    text: str = json.loads(answer[2])["error"]
    return text


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(compress: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


def multipart(*parts: tuple[str, bytes, bytes]) -> tuple[bytes, str]:
    """Parts (name, headers, content) as one body; the headers begin with what follows the name."""
    made = b"".join(
        b'--b0\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), headers, content)
        for name, headers, content in parts
    )
    return made + b"--b0--\r\n", "multipart/form-data; boundary=b0"


PNG = cv2.imencode(".png", np.arange(96, dtype=np.uint8).reshape(4, 8, 3))[1].tobytes()
IMAGE = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)


def decoded(file: bytes) -> np.ndarray[Any, Any]:
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[..., [2, 1, 0, 3][: image.shape[2]]]


# ---- answers


@pytest.mark.parametrize(
    ("what", "accept", "kind"),
    [
        ("image", "", "application/json"),
        ("image", "*/*", "application/json"),
        ("image", "image/png", "image/png"),
        ("image", "image/*", "image/png"),
        ("image", "IMAGE/PNG", "image/png"),
        ("image", "image/jpeg, image/png;q=0.9", "image/jpeg"),
        ("image", "image/jpeg;q=0.1, image/png;q=0.9", "image/png"),
        ("image", "image/png;q=0, image/*", "image/jpeg"),
        ("image", "image/webp, image/png", "image/png"),
        ("image", "text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", "application/json"),
        ("text", "image/png, application/json;q=0.5", "application/json"),
        ("text", "image/png, */*;q=0.1", "application/json"),
        ("text", "text/plain", "text/plain; charset=utf-8"),
        ("text", "text/*;q=1.000", "text/plain; charset=utf-8"),
        ("bytes", "application/octet-stream", "application/octet-stream"),
        ("beside", "image/png", "image/png"),
        ("times", "application/x-npy", "application/x-npy"),
        ("arrays", "application/x-npz", "application/x-npz"),
        ("arrays", "application/zip", "application/zip"),
        ("image", "application/x-npz, application/x-npy", "application/x-npy"),
    ],
)
def test_answers_by_accept(formats: Server, what: str, accept: str, kind: str) -> None:
    code, headers, body = asked(formats, what, accept)
    assert (code, headers["Content-Type"]) == (200, kind)
    assert body
    if kind == "application/json":
        assert json.loads(body) == (IMAGE.tolist() if what == "image" else "Grüße")


def test_an_answer_without_accept_is_json(formats: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", formats.http_port, timeout=20)
    connection.request("POST", "/models/m/run", "x", {"Content-Type": "text/plain"})
    assert json.load(connection.getresponse()) == ["str", "x"]
    connection.close()


def test_answers_arrive_equal(formats: Server) -> None:
    assert np.array_equal(decoded(asked(formats, "image", "image/png")[2]), IMAGE)
    assert np.array_equal(decoded(asked(formats, "beside", "image/png")[2]), IMAGE)
    assert np.array_equal(decoded(asked(formats, "gray", "image/png")[2]), IMAGE[..., 0])
    assert np.array_equal(decoded(asked(formats, "alpha", "image/png")[2])[..., :3], IMAGE)
    assert np.array_equal(decoded(asked(formats, "mask", "image/png")[2]), 255 * (IMAGE[..., 0] > 50))
    assert decoded(asked(formats, "image", "image/jpeg")[2]).shape == IMAGE.shape
    for what, dtype in (("image", "uint8"), ("times", "datetime64[D]"), ("flow", "float32")):
        array = np.load(io.BytesIO(asked(formats, what, "application/x-npy")[2]))
        assert array.dtype == dtype
    with np.load(io.BytesIO(asked(formats, "arrays", "application/x-npz")[2])) as found:
        assert {name: found[name].tolist() for name in found} == {
            "boxes": [[1] * 4] * 2,
            "names": ["a", "bc"],
            "count": 3,
            "who": "me",
        }
        assert found["boxes"].dtype == np.float32
    assert asked(formats, "text", "text/plain")[2].decode() == "Grüße"
    assert asked(formats, "bytes", "application/octet-stream")[2] == b"RIFF\0"
    code, _, body = send(
        formats, PNG, '?args={"what":"same"}', Content_Type="application/octet-stream", Accept="image/png"
    )
    assert (code, body) == (200, PNG)  # the bytes of an image file are one


@pytest.mark.parametrize(
    ("what", "accept", "message"),
    [
        ("text", "image/png", "of type str, which can be sent as application/json, text/plain"),
        ("flow", "image/*", "which can be sent as application/json, application/x-npy"),
        ("arrays", "application/x-npy", "which can be sent as application/json, application/x-npz, application/zip"),
        ("huge", "application/x-npz", "can be sent as application/json"),
        ("none", "text/plain", "can be sent as application/json"),
        ("image", "image/webp", "Accept names no format of answers; there are application/json, image/png"),
        ("image", "image/png;q=0", "Accept names no format"),
        ("image", "image/png;q=0.0, video/*", "Accept names no format"),
        ("wide", "image/jpeg", "no .jpg file can have shape (1, 70000)"),
        ("image", "image/jpeg;q=0.1, text/event-stream;q=0", None),
    ],
)
def test_answers_that_are_not_acceptable(formats: Server, what: str, accept: str, message: str | None) -> None:
    answer = asked(formats, what, accept)
    if message is None:
        assert answer[0] == 200
    else:
        assert message in error_of(answer, 406)


SAME = '?args={"what":"same"}'


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_answers_that_are_too_large(formats: Server, accept: str) -> None:
    body = npy(np.zeros(1_000_000, np.float32))
    answer = send(formats, body, SAME, Content_Type="application/x-npy", Accept=accept)
    assert "bytes, more than TMS_MAX_MESSAGE_MB allows" in error_of(answer, 429)
    assert send(formats, body, SAME, Content_Type="application/x-npy", Accept="application/x-npy")[2] == body


def test_arrays_that_are_too_large_for_json(start_server: StartServer, tmp_path: Path) -> None:
    """Lists of their numbers would take many times the memory that the request has."""
    server = start_server(write_model(tmp_path, "m", ANSWERS))
    body = gzip.compress(npy(np.zeros((1 << 27) + 1, np.uint8)), 1)
    for query in (SAME, SAME + "&view"):
        answer = send(server, body, query, Content_Type="application/x-npy", Content_Encoding="gzip")
        if query == SAME:
            assert "too many for JSON; ask for another format" in error_of(answer, 400)
        else:
            assert json.loads(answer[2])["answer"]["array"] == "uint8 134217729"


def test_images_of_other_numbers_take_little_memory(formats: Server) -> None:
    process = psutil.Process(formats.process.pid)
    for dtype, most in (np.uint8, 1 << 30), (np.bool_, 32 << 20):  # the first finds what each image takes
        before = process.memory_info().rss
        body = npy(np.eye(1900, dtype=dtype))
        code, _, image = send(formats, body, SAME, Content_Type="application/x-npy", Accept="image/png")
        assert (code, decoded(image).max()) == (200, 255 if dtype is np.bool_ else 1)
        assert process.memory_info().rss - before < most


@pytest.mark.parametrize(
    "accept",
    ["q=abc", "a/b/c", "é/é", "(", ";", "image/png,,image/jpeg"]
    + [f"image/png;q={quality}" for quality in ("abc", "2", "-1", "", "1e3", "nan", "0.12345", "٣")],
)
def test_malformed_accept(formats: Server, accept: str) -> None:
    assert "malformed Accept" in error_of(asked(formats, "image", accept.encode().decode("latin-1")), 400)


def test_a_long_accept_is_read_quickly(formats: Server) -> None:
    for accept in ("image/png," * 3000 + "*/*", "a/b;" + "c=d;" * 6000, "a" * 30_000, "a/b;q=0;" + ";" * 30_000):
        begun = time.monotonic()
        assert asked(formats, "image", accept)[0] in (200, 400, 406)
        assert time.monotonic() - begun < 2


# ---- inputs


@pytest.mark.parametrize(
    "array",
    [
        IMAGE,
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(3),
        np.zeros((0, 3), np.int8),
        np.array(["a", "bc"]),
        np.array([1 + 2j]),
        np.array(["2026-11-26"], "datetime64[D]"),
    ],
    ids=str,
)
def test_arrays_arrive_equal(formats: Server, array: np.ndarray[Any, Any]) -> None:
    for body, kind in ((npy(array), "application/x-npy"), (npz(a=array, b=IMAGE), "application/x-npz")):
        accept = kind if kind.endswith("y") else "application/zip"
        code, _, file = send(formats, body, '?args={"what":"same"}', Content_Type=kind, Accept=accept)
        assert code == 200
        loaded = np.load(io.BytesIO(file))
        found = loaded if kind.endswith("y") else loaded["a"]
        assert found.dtype == array.dtype.newbyteorder("<")
        assert np.array_equal(found, array)
        if not kind.endswith("y"):
            loaded.close()


@pytest.mark.parametrize(
    ("body", "kind"),
    [(npy(np.zeros((0, 4))), "application/x-npy"), (b"", "application/octet-stream"), (b"", "image/png")],
)
def test_the_first_input_is_empty(start_server: StartServer, tmp_path: Path, body: bytes, kind: str) -> None:
    """Nothing lies in the memory that it shares with the worker, and an empty file cannot be mapped."""
    server = start_server(write_model(tmp_path, "m", ANSWERS))
    answer = send(server, body, SAME, Content_Type=kind)
    if kind == "image/png":
        assert "image file" in error_of(answer, 400)
    else:
        assert (answer[0], json.loads(answer[2])) == (200, [] if "npy" in kind else "")


def test_texts_that_unicode_lacks(formats: Server) -> None:
    """numpy raises a SystemError at each look at them."""
    body = npy(np.array([0x7FFFFFFF] * 40, np.uint32).view("<U1"))
    for query in (SAME, SAME + "&view", ""):
        answer = send(formats, body, query, Content_Type="application/x-npy")
        assert "an array of <U1 has characters that Unicode lacks" in error_of(answer, 400)


def test_named_inputs(formats: Server) -> None:
    npy_type, json_type = b"\r\nContent-Type: application/x-npy", b"\r\nContent-Type: application/json"
    body, kind = multipart(
        ("left", npy_type, npy(IMAGE)),
        ("right", b'; filename="r.npy"', npy(IMAGE[:2])),
        ("more", b'; filename="r.NPZ"\r\nContent-Type: application/octet-stream', npz(compress=True, x=IMAGE)),
        ("image", b'; filename="c.png"', PNG),
        ("view", b'; filename="c.png"', PNG),
        ("scores", json_type, b"[1, 2.5]"),
        ("table", b'; filename="t.json"', b'{"a": 1}'),
        ("caption", b"", "Grüße".encode()),
        ("latin", b"\r\nContent-Type: text/plain; charset=ISO-8859-1", "Grüße".encode("latin-1")),
        ("sound", b'; filename="s.wav"\r\nContent-Type: audio/wav', b"RIFF\0"),
        ("Zür\u4e2d", b"", b"name"),
    )
    code, _, answer = send(formats, body, Content_Type=kind)
    assert code == 200, answer
    assert json.loads(answer) == {
        "left": ["ndarray", [4, 8, 3]],
        "right": ["ndarray", [2, 8, 3]],
        "more": ["dict", {"x": IMAGE.tolist()}],
        "image": ["ndarray", [4, 8, 3]],
        "view": ["ndarray", [4, 8, 3]],
        "scores": ["list", [1, 2.5]],
        "table": ["dict", {"a": 1}],
        "caption": ["str", "Grüße"],
        "latin": ["str", "Grüße"],
        "sound": ["bytes", "UklGRgA="],
        "Zür\u4e2d": ["str", "name"],
    }


def test_one_field_of_a_form(formats: Server) -> None:
    """image, text and data are the input itself; a field of another name is in a dict, also if it is the only one."""
    for part, expected in (
        (("image", b'; filename="c.png"', PNG), ["ndarray", [4, 8, 3]]),
        (("image", b'; filename="c.npy"', npy(IMAGE[:1])), ["ndarray", [1, 8, 3]]),
        (("data", b"", b'"x"'), ["str", "x"]),
        (("other", b"\r\nContent-Type: application/x-npy", npy(IMAGE)), {"other": ["ndarray", [4, 8, 3]]}),
        (("$array", b"", b"0"), {"$array": ["str", "0"]}),
    ):
        body, kind = multipart(part)
        assert json.loads(send(formats, body, Content_Type=kind)[2]) == expected


def test_bytes(formats: Server) -> None:
    answer = send(formats, b"\0\xff", Content_Type="application/octet-stream")
    assert json.loads(answer[2]) == ["bytes", str(b"\0\xff")]


def test_args_beside_every_kind_of_body(formats: Server) -> None:
    query = '?args={"what":"text"}'
    bodies = [
        (b"x", "text/plain"),
        (b"1", "application/json"),
        (PNG, "image/png"),
        (npy(IMAGE), "application/x-npy"),
        (npz(a=IMAGE), "application/x-npz"),
        (b"x", "application/octet-stream"),
        (b"text=x", "application/x-www-form-urlencoded"),
        multipart(("text", b"", b"x")),
        multipart(("a", b"", b"x"), ("b", b"", b"x")),
    ]
    for body, kind in bodies:
        assert json.loads(send(formats, body, query, Content_Type=kind)[2]) == "Grüße", kind
    body, kind = multipart(("text", b"", b"x"), ("args", b"", b'{"what": "text"}'))
    assert json.loads(send(formats, body, Content_Type=kind)[2]) == "Grüße"
    assert "send them once" in error_of(send(formats, body, query, Content_Type=kind), 400)
    for wrong in ("?args=[1]", "?args={", "?args=1"):
        assert error_of(send(formats, b"x", wrong), 400)
    assert "there is no parameter 'arg'" in error_of(send(formats, b"x", "?arg={}"), 400)
    answer = send(formats, b"3", query, Content_Type="application/json", Accept="text/event-stream")
    assert answer[2] == b'data: "Gr\\u00fc\\u00dfe"\n\nevent: end\ndata: null\n\n'


def header(text: str) -> bytes:
    """A .npy file whose header is this text, without content."""
    encoded = text.encode("latin-1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded


OBJECTS = io.BytesIO()
np.save(OBJECTS, np.array([{}, None]), allow_pickle=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "malformed .npy"),
        (b"\x93NUMPY", "malformed .npy"),
        (b"\x93NUMPY\x09\x00" + bytes(200), "malformed .npy"),
        (npy(IMAGE)[:-1], "needs 96 bytes, not 95"),
        (npy(IMAGE) + b"x", "needs 96 bytes, not 97"),
        (npy(IMAGE)[:40], "malformed .npy"),
        (OBJECTS.getvalue(), "a pickle, which is never loaded"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': ()}") + b"cos\nsystem\n(S'id'\ntR.", "a pickle"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,)}"), "needs 8000000000 bytes"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"), "negative"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 0)}"), "rows without elements"),
        (header("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000,)}"), "no model takes"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1.5,)}"), "malformed .npy"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': " + "(1," * 40 + ")" * 40 + "}"), "malformed .npy"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1," * 40 + ")}") + bytes(8), "32 dimensions"),
        (header("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,)}") + bytes(8), "no model takes"),
        (header("{'descr': '<f16', 'fortran_order': False, 'shape': (1,)}") + bytes(16), "no model takes"),
        (header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}") + bytes(8), "malformed .npy"),
        (header("__import__('os').system('id')"), "malformed .npy"),
        (header("(" * 60_000), "malformed .npy"),
        (header("[" * 3000), "malformed .npy"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "malformed .npy"),
    ],
)
def test_hostile_arrays(formats: Server, body: bytes, message: str) -> None:
    begun = time.monotonic()
    assert message in error_of(send(formats, body, Content_Type="application/x-npy"), 400)
    archive = zipfile.ZipFile(file := io.BytesIO(), "w")
    archive.writestr("a.npy", body)
    archive.close()
    assert message in error_of(send(formats, file.getvalue(), Content_Type="application/x-npz"), 400)
    assert time.monotonic() - begun < 5


def zipped(method: int = zipfile.ZIP_STORED, **files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_npy", ".npy"), content)
    return file.getvalue()


def lying_bomb() -> bytes:
    """An entry that says it has 128 bytes, and becomes 64 MB."""
    data = bytearray(zipped(zipfile.ZIP_DEFLATED, a_npy=npy(np.zeros(64 << 20, np.uint8))))
    size = struct.pack("<I", len(npy(np.zeros(64 << 20, np.uint8))))
    return bytes(data.replace(size, struct.pack("<I", 128)))


MANY = zipped(**{f"a{number}_npy": b"" for number in range(1500)})


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", 400, "cut off"),
        (b"PK", 400, "cut off"),
        (npz(a=IMAGE)[:-5], 400, "cut off"),
        (npz(a=IMAGE) + b"comment", 400, "cut off"),
        (npz(a=IMAGE)[40:], 400, "malformed .npz"),
        (zipped(a_txt=b"hi"), 400, ".npy files alone"),
        (zipped(zipfile.ZIP_BZIP2, a_npy=npy(IMAGE)), 400, "stored or deflated"),
        (zipped(zipfile.ZIP_LZMA, a_npy=npy(IMAGE)), 400, "stored or deflated"),
        (zipped(zipfile.ZIP_DEFLATED, a_npy=npy(np.zeros(64 << 20, np.uint8))), 413, "may have 4194304 bytes"),
        (lying_bomb(), 400, "malformed"),
        (MANY, 400, "1024 arrays"),
        (MANY[:-14] + struct.pack("<HH", 3, 3) + MANY[-10:], 400, "or too many"),
        (zipped(**{f"{'a' * 60_000}{number}_npy": b"" for number in range(5)}), 400, "1024 arrays, with short names"),
        (npz(a=IMAGE).replace(IMAGE.tobytes()[:8], b"corrupt!"), 400, "malformed .npz: Bad CRC-32"),
    ],
)
def test_hostile_archives(formats: Server, body: bytes, code: int, message: str) -> None:
    begun, process = time.monotonic(), psutil.Process(formats.process.pid)
    before = process.memory_info().rss
    for kind in ("application/x-npz", "application/zip"):
        assert message in error_of(send(formats, body, Content_Type=kind), code)
    assert time.monotonic() - begun < 5
    assert process.memory_info().rss - before < 24 << 20


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_one_name_twice(formats: Server) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for _ in range(2):
            archive.writestr("a.npy", npy(IMAGE))
    assert "of one name" in error_of(send(formats, file.getvalue(), Content_Type="application/zip"), 400)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("", b"", b"x")], "a part has no name"),
        ([("a", b"\r\nContent-Type: multipart/mixed; boundary=c", b"--c\r\n\r\nx\r\n--c--")], "no type of an input"),
        ([("a", b"\r\nContent-Type: multipart/form-data", b"x")], "no type of an input"),
        ([("a", b"\r\nContent-Type: text/plain; charset=rot13", b"x")], "charset 'rot13' is not known"),
        ([("a", b"\r\nContent-Type: text/plain; charset=zlib", b"x")], "charset 'zlib' is not known"),
        ([("a", b"\r\nContent-Type: text/plain; charset=" + b"x" * 900, b"x")], "is not known"),
        ([("a", b"; filename*=a\0b''x", b"x")], "malformed form: a part's headers: embedded null"),
        ([("a", b"\r\nContent-Type: text/plain; charset*=a\0b''x", b"x")], "malformed form: a part's headers"),
        ([("a", b"", b"\xff")], "text must be UTF-8"),
        ([("text", b"", b"x"), ("text", b"", b"x")], "two fields 'text'"),
        ([("a", b"", b"x"), ("a", b"", b"x")], "two fields 'a'"),
        ([("a", b"\r\nContent-Type: application/json", b"{")], "malformed JSON"),
        ([("a", b"\r\nContent-Type: application/x-npy", npy(IMAGE)[:-1])], "needs 96 bytes, not 95"),
        ([("args", b"", b"{}")], "send one of image"),
        ([("text", b"", b"x"), ("args", b"", b"{")], "args: malformed JSON"),
        ([("text", b"", b"x"), ("args", b"", b"[1]")], "args must be a JSON object"),
        ([(f"a{number}", b"", b"") for number in range(300)], "at most 256 fields"),
    ],
)
def test_hostile_parts(formats: Server, parts: list[tuple[str, bytes, bytes]], message: str) -> None:
    body, kind = multipart(*parts)
    assert message in error_of(send(formats, body, Content_Type=kind), 400)


def test_odd_names_of_parts(formats: Server) -> None:
    for disposition in (
        b"form-data",
        b'form-data; filename="x"',
        b"form-data; name*=utf-8''a",
        b"form-data; name=\xff",
    ):
        body = b"--b0\r\nContent-Disposition: " + disposition + b"\r\n\r\nx\r\n--b0--\r\n"
        assert error_of(send(formats, body, Content_Type="multipart/form-data; boundary=b0"), 400)


@pytest.mark.parametrize(
    "kind",
    [f"multipart/form-data; boundary*={name}" for name in ("a%00b''x", "idna''%ff.", "undefined''x%80")]
    + ["text/plain; charset*=a%00b''x"],
)
def test_a_content_type_that_cannot_be_decoded(formats: Server, kind: str) -> None:
    assert "malformed Content-Type" in error_of(send(formats, b"x", Content_Type=kind), 400)


def test_charsets_of_texts(formats: Server) -> None:
    assert send(formats, PNG, Content_Type="image/png; charset=binary")[0] == 200  # what `file --mime` calls it
    for charset in ("utf-8", "UTF-8", "iso-8859-1", "latin-1", "utf-16"):
        answer = send(formats, "ü".encode(charset), Content_Type=f"text/plain; charset={charset}")
        assert json.loads(answer[2]) == ["str", "ü"], charset
    for charset in ("punycode", "unicode_escape", "idna", "hex"):
        assert "send UTF-8" in error_of(send(formats, b"x", Content_Type=f"text/plain; charset={charset}"), 400)
    assert "must be US-ASCII" in error_of(send(formats, b"\xff", Content_Type="text/plain; charset=us-ascii"), 400)


@pytest.mark.parametrize("body", [b'{"a": 1}', PNG, bytes(300_000), b"a=1&b=2&c=3&d=4&e=5"])
def test_a_body_that_curl_calls_a_form(formats: Server, body: bytes) -> None:
    answer = send(formats, body, Content_Type="application/x-www-form-urlencoded")
    assert "curl -d and --data-binary send a form unless -H 'Content-Type: ...' says" in error_of(answer, 400)


def changed(data: st.DataObject, *files: bytes) -> bytes:
    """One of the files with some bytes changed, or cut off."""
    file = bytearray(data.draw(st.sampled_from(files)))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=6)):
        file[at] = byte
    return bytes(file[: data.draw(st.integers(0, len(file)) | st.just(len(file)))])


@given(st.data())
def test_changed_files_are_refused_or_read(data: st.DataObject) -> None:
    files = [npy(IMAGE[:1]), npy(np.array(["a", "bc"])), npy(np.zeros((2, 3), ">f8", order="F"))]
    npzs = [npz(a=IMAGE[:1], b=IMAGE[:1]), npz(compress=True, a=IMAGE)]
    with suppress(InvalidInput), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of headers that only Python 2 wrote
        assert read_npy(changed(data, *files)).nbytes < 1000
    with suppress(InvalidInput), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken: list[int] = []
        assert sum(array.nbytes for array in read_npz(changed(data, *npzs), taken.append).values()) <= sum(taken)


@given(st.text(st.sampled_from('*/;=q01.,ajpngimetx -+\t"')))
def test_any_accept_is_read_or_refused(header: str) -> None:
    with suppress(HTTPException):
        assert accepted(header)


# ---- gzip


def test_compressed_bodies(formats: Server) -> None:
    for encoding, body in (
        ("gzip", gzip.compress(b"hi")),
        ("x-gzip", gzip.compress(b"hi")),
        ("deflate", zlib.compress(b"hi")),
        ("GZIP", gzip.compress(b"hi")),
        ("identity", b"hi"),
        ("", b"hi"),
    ):
        assert json.loads(send(formats, body, Content_Encoding=encoding)[2]) == ["str", "hi"], encoding
    body, kind = multipart(("text", b"", b"x"), ("args", b"", b'{"what": "same"}'))
    assert send(formats, gzip.compress(body), Content_Type=kind, Content_Encoding="gzip")[2] == b'"x"\n'
    events = send(formats, gzip.compress(b"hi"), Content_Encoding="gzip", Accept="text/event-stream")
    assert events[2].startswith(b'data: ["str", "hi"]\n\n')
    tensor = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    compressed = gzip.compress(json.dumps(tensor).encode())
    answer = send(formats, compressed, path="/v2/models/m/infer", Content_Encoding="gzip")
    assert answer[0] in (200, 400)
    assert b"JSON must be UTF-8" not in answer[2]


@pytest.mark.parametrize(
    ("body", "encoding", "code", "message"),
    [
        (gzip.compress(bytes(64 << 20)), "gzip", 413, "may have 4194304 bytes"),
        (zlib.compress(bytes(64 << 20)), "deflate", 413, "may have 4194304 bytes"),
        (gzip.compress(b"hi")[:-1], "gzip", 400, "cut off"),
        (gzip.compress(b"hi") + b"x", "gzip", 400, "something follows"),
        (gzip.compress(b"") * 100_000, "gzip", 400, "something follows"),
        (b"", "gzip", 400, "cut off"),
        (b"hi", "gzip", 400, "malformed"),
        (b"hi", "br", 415, "or with gzip"),
        (b"hi", "gzip, gzip", 415, "or with gzip"),
        (b"hi", "x" * 9000, 415, "or with gzip"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value)[:30],  # gzip writes the time
)
def test_hostile_compressed_bodies(formats: Server, body: bytes, encoding: str, code: int, message: str) -> None:
    begun, process = time.monotonic(), psutil.Process(formats.process.pid)
    before = process.memory_info().rss
    assert message in error_of(send(formats, body, Content_Encoding=encoding), code)
    assert time.monotonic() - begun < 3
    assert process.memory_info().rss - before < 24 << 20


def test_expanded_bytes_count(start_server: StartServer, tmp_path: Path) -> None:
    """The budget of all requests is asked as well, and gets everything back."""
    server = start_server(write_model(tmp_path, "m", ANSWERS), TMS_MAX_MESSAGE_MB=8, TMS_MAX_INFLIGHT_MB=6)
    for _ in range(20):
        answer = send(
            server, gzip.compress(bytes(7 << 20)), Content_Encoding="gzip", Content_Type="application/octet-stream"
        )
        assert "TMS_MAX_INFLIGHT_MB" in error_of(answer, 429)
        assert send(server, gzip.compress(b" " * (2 << 20)), Content_Encoding="gzip")[0] == 200
        body = npz(compress=True, a=np.zeros(2 << 20, np.uint8))
        assert send(server, body, Content_Type="application/x-npz")[0] == 200


def test_compressed_answers(formats: Server) -> None:
    query = '?args={"what":"long","n":20000}'
    for accept in ("gzip", "deflate, gzip;q=0.5, br", "GZIP", "gzip;q=0.01", "nonsense;;, gzip"):
        code, headers, body = send(formats, query=query, Accept_Encoding=accept)
        assert (code, headers["Content-Encoding"]) == (200, "gzip")
        assert "Accept-Encoding" in headers["Vary"]
        assert len(body) == int(headers["Content-Length"]) < 80_000
        assert json.loads(gzip.decompress(body)) == list(range(20_000))
    for accept in (
        "",
        "identity",
        "gzip;q=0",
        "gzip ; q=0.000 , br",
        "x-gzip, gzipped",
        "gzip;q=0;" + " " * 20_000,
        "*",
    ):
        code, headers, body = send(formats, query=query, Accept_Encoding=accept)
        assert headers["Content-Encoding"] is None
        assert json.loads(body) == list(range(20_000))
    small = send(formats, Accept_Encoding="gzip")
    assert small[1]["Content-Encoding"] is None
    image = send(formats, query='?args={"what":"wide"}', Accept_Encoding="gzip", Accept="application/x-npy")
    assert image[1]["Content-Encoding"] is None
    events = send(formats, query=query, Accept_Encoding="gzip", Accept="text/event-stream")
    assert events[1]["Content-Encoding"] is None


# ---- ids, one model, other sites


def test_request_ids(formats: Server) -> None:
    for sent in ("abc-1", "x" * 128, "a b"):
        assert send(formats, X_Request_Id=sent)[1]["X-Request-Id"] == sent
    made = set()
    for sent in ("", "x" * 129, "\xe9", "a\tb"):
        made.add(send(formats, X_Request_Id=sent)[1]["X-Request-Id"])
    assert len(made) == 4
    assert all(len(one) == 32 for one in made)
    for path in ("/nothing", "/models/nobody/run", "/livez", "/models", "/v1/models/x"):
        for method in ("GET", "POST", "HEAD", "DELETE"):
            assert send(formats, method=method, path=path, X_Request_Id="me")[1]["X-Request-Id"] == "me", path
    events = send(formats, X_Request_Id="me", Accept="text/event-stream")
    assert events[1]["X-Request-Id"] == "me"


def test_an_id_cannot_inject_a_header(formats: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", formats.http_port, timeout=20)
    connection.connect()
    for injected in (b"a\r\n b", b"a\rSet-Cookie: x", b"a\nSet-Cookie: x", b"a\0b"):
        connection.sock.close()
        connection.connect()
        connection.sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %s\r\n\r\n" % injected)
        answer = http.client.HTTPResponse(connection.sock)
        answer.begin()
        assert answer.headers["Set-Cookie"] is None
        assert answer.status in (200, 400)
        answer.close()
    connection.close()


def test_one_model(formats: Server) -> None:
    code, _, body = send(formats, method="GET", path="/models/m")
    described = json.loads(body)
    assert (code, described["name"], described["state"]) == (200, "m", "READY")
    assert described == json.loads(send(formats, method="GET", path="/models")[2])["models"][0]
    assert send(formats, method="HEAD", path="/models/m")[0] == 200
    assert "no model 'nobody'" in error_of(send(formats, method="GET", path="/models/nobody"), 404)
    code, headers, _ = send(formats, method="DELETE", path="/models/m")
    assert code == 405
    assert "GET" in headers["Allow"]


APP = "https://app.example.com"


@pytest.mark.parametrize(("setting", "origin"), [(APP, APP), (f"http://localhost:3000, {APP}", APP), ("*", "null")])
def test_pages_of_other_sites(start_server: StartServer, setting: str, origin: str) -> None:
    server = start_server(TMS_CORS_ORIGINS=setting)
    foreign = {"Origin": origin, "Sec_Fetch_Site": "cross-site"}
    asks = foreign | {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    code, headers, body = send(server, method="OPTIONS", path="/models/echo/run", **asks)
    assert (code, body) == (204, b"")
    assert headers["Access-Control-Allow-Origin"] == ("*" if setting == "*" else origin)
    assert headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert "Authorization" in headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in headers
    for path in ("/models/echo/run", "/models/nobody/run"):
        code, headers, _ = send(server, path=path, **foreign)
        assert code == (200 if "echo" in path else 404)
        assert headers["Access-Control-Allow-Origin"] == ("*" if setting == "*" else origin)
        assert "Origin" in headers["Vary"]
    assert send(server, path="/models/echo/run", Accept="text/event-stream", **foreign)[1][
        "Access-Control-Allow-Origin"
    ]
    for path in ("/models/echo/unload", "/models/echo/load", "/models/echo/reload"):
        assert "another site" in error_of(send(server, path=path, **foreign), 403)
    answer = send(server, path="/v2/repository/models/echo/unload", **foreign)
    assert "another site" in error_of(answer, 403)
    if setting != "*":
        for other in ("https://evil.test", "http://app.example.com", f"{APP}.evil.test", "null"):
            code, headers, _ = send(server, path="/models/echo/run", Origin=other)
            assert (code, headers["Access-Control-Allow-Origin"]) == (403, None)
            asks = {"Origin": other, "Access_Control_Request_Method": "POST"}
            assert send(server, method="OPTIONS", path="/models/echo/run", **asks)[0] == 405


def test_no_pages_of_other_sites_by_default(formats: Server) -> None:
    asks = {"Origin": APP, "Access_Control_Request_Method": "POST"}
    code, headers, _ = send(formats, method="OPTIONS", **asks)
    assert (code, headers["Access-Control-Allow-Origin"], headers["Vary"]) == (405, None, None)
    assert send(formats, Origin=APP)[0] == 403
    assert send(formats, Origin=f"http://127.0.0.1:{formats.http_port}")[0] == 200


def test_pages_of_other_sites_with_the_admin_token(start_server: StartServer) -> None:
    server = start_server(TMS_CORS_ORIGINS=APP, TMS_ADMIN_TOKEN="boss")
    assert "admin token" in error_of(send(server, path="/models/echo/unload", Origin=APP), 403)
    assert send(server, path="/models/echo/unload", Origin=APP, Authorization="Bearer boss")[0] == 200
    assert send(server, path="/models/echo/load", Origin="https://evil.test", Authorization="Bearer boss")[0] == 403


def test_pages_of_other_sites_need_the_token_and_a_name(start_server: StartServer) -> None:
    server = start_server(TMS_CORS_ORIGINS="*", TMS_TOKEN="sesame")
    code, headers, _ = send(server, path="/models/echo/run", Origin=APP)
    assert (code, headers["Access-Control-Allow-Origin"]) == (401, "*")
    assert send(server, path="/models/echo/run", Origin=APP, Authorization="Bearer sesame")[0] == 200
    assert send(server, path="/models/echo/run", Origin=APP, Authorization="Bearer sesame", Host="evil.test")[0] == 403


@pytest.mark.parametrize("text", ["app.example.com", f"{APP}/", f"{APP}/path", "https://*.example.com", f"{APP} *"])
def test_wrong_origins_stop_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match=r"TMS_CORS_ORIGINS=.* must be origins such as https://app.example.com"):
        Settings.from_env({"TMS_CORS_ORIGINS": text})
    assert Settings.from_env({"TMS_CORS_ORIGINS": ""}).cors_origins == ()
