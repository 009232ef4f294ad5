"""The HTTP port: a plain POST, who may do what on it, and the page in a real browser."""

import http.client
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import write_model

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
StartServer = Callable[..., Server]


def post(server: Server, path: str, body: bytes, kind: str = "text/plain", **headers: str) -> tuple[int, Any]:
    """The status and the JSON answered; underscores in the headers' names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Type": kind}
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body, named)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def form(**fields: bytes) -> tuple[bytes, str]:
    """A multipart body as curl and browsers make it."""
    parts = [
        b'--b0\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\nContent-Type: application/octet-stream'
        b"\r\n\r\n%s\r\n" % (name.encode(), content)
        for name, content in fields.items()
    ]
    return b"".join(parts) + b"--b0--\r\n", "multipart/form-data; boundary=b0"


@pytest.fixture
def png() -> bytes:
    return cv2.imencode(".png", np.arange(96, dtype=np.uint8).reshape(4, 8, 3))[1].tobytes()


def test_run_by_post(server: Server, png: bytes) -> None:
    described = {"dtype": "uint8", "shape": [4, 8, 3], "first": 2, "writable": True}  # RGB: the last of OpenCV's three
    assert post(server, "/models/describe/run", *form(image=png)) == (200, described)
    assert post(server, "/models/describe/run", png, "image/png") == (200, described)
    assert post(server, "/models/echo/run", b"Gr\xc3\xbc\xc3\x9fe") == (200, "Grüße")
    assert post(server, "/models/echo/run", b'{"a": [1, null]}', "application/json") == (200, {"a": [1, None]})
    form_answer = post(server, "/models/echo/run", *form(text=b"x", args=b'{"n": 1}'))
    assert form_answer == (200, {"data": "x", "args": {"n": 1}})
    plain_form = b"text=a%20b", "application/x-www-form-urlencoded"
    assert post(server, "/models/echo/run", *plain_form) == (200, "a b")
    status, answer = post(server, "/models/echo/run?view", *form(image=png))
    assert status == 200
    assert answer["answer"]["array"] == "uint8 4x8x3"
    assert (answer["answer"]["min"], answer["answer"]["max"]) == (0, 95)
    assert answer["answer"]["png"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "message"),
    [
        ("/models/nobody/run", b"x", "text/plain", 404, "there is no model 'nobody'"),
        ("/models/echo", b"x", "text/plain", 404, "post to /models/NAME/run"),
        ("/models/echo/delete", b"x", "text/plain", 404, "post to /models/NAME/run"),
        ("/models/echo/run", b"\xff\xfe", "text/plain", 400, "text must be UTF-8"),
        ("/models/echo/run", b"{", "application/json", 400, "JSON"),
        ("/models/echo/run", b"x", "video/mp4", 400, "send one of image"),
        ("/models/echo/run", b"", "multipart/form-data", 400, "malformed form"),
        ("/models/echo/run", b"--b\r\n\r\n", "multipart/form-data; boundary=b", 400, "malformed form"),
        ("/models/describe/run", b"no png", "image/png", 400, "image"),
        ("/models/misbehave/run", b'{"do": "raise"}', "application/json", 500, ""),
    ],
)
def test_bad_posts_are_refused(server: Server, path: str, body: bytes, kind: str, status: int, message: str) -> None:
    found, answer = post(server, path, body, kind)
    if "misbehave" in path:
        found, answer = post(server, path, *form(data=b"1", args=b'{"do": "raise"}'))
    assert found == status
    assert message in answer["error"]
    assert post(server, "/models/echo/run", b"still there") == (200, "still there")


def test_bodies_have_a_length_and_a_limit(start_server: StartServer) -> None:
    server = start_server(TMS_MAX_MESSAGE_MB=1)
    for length, status, message in [
        *((length, 400, "Invalid HTTP request") for length in ("", "-1", "1e3")),
        (str((1 << 20) + 1), 413, "TMS_MAX_MESSAGE_MB"),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=10)
        connection.putrequest("POST", "/models/echo/run")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == status
        assert message in answer.read().decode()
        connection.close()


def test_who_may_do_what(start_server: StartServer, tmp_path: Path) -> None:
    write_model(tmp_path, "one", "    def run(self, data, args):\n        return data")
    server = start_server(tmp_path, TMS_TOKEN="sesame", TMS_ADMIN_TOKEN="admin")
    run, reload = "/models/one/run", "/models/one/reload"
    assert post(server, run, b"x")[0] == 401
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/models", timeout=10)
    assert post(server, run, b"x", Authorization="Bearer sesame") == (200, "x")
    assert post(server, reload, b"", Authorization="Bearer sesame")[0] == 403  # also from the server's own host
    assert post(server, reload, b"", Authorization="Bearer admin")[0] == 200
    assert post(server, "/models/one/unload", b"", Authorization="Bearer admin")[1]["state"] == "UNLOADED"
    assert post(server, run, b"x", Authorization="Bearer sesame")[0] == 409
    assert post(server, "/models/one/load", b"", Authorization="Bearer admin")[1]["state"] == "READY"


def test_other_sites_pages_may_not(server: Server) -> None:
    here = f"127.0.0.1:{server.http_port}"
    for path in ("/models/echo/run", "/models/echo/reload"):
        for headers in (
            {"Origin": "http://evil.test"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site", "Origin": "http://other.test"},
            {"Origin": "http://evil.test:80", "Host": "evil.test:80"},  # a name made to stand for 127.0.0.1
        ):
            status, answer = post(server, path, b"x", **headers)
            assert status == 403, headers
            assert "page" in answer["error"]
        assert post(server, path, b"x", Origin=f"http://{here}", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("not installed here: chromium and chromedriver (Debian's chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: WebDriver, start_server: StartServer, tmp_path: Path) -> tuple[WebDriver, Server]:
    models = tmp_path / "models"
    shutil.copytree(ROOT / "models" / "edges", models / "edges")
    shutil.copytree(ROOT / "models" / "example", models / "example")
    write_model(
        models, "finder", "    def run(self, data, args):\n        return [{'box': [2, 2, 20, 12], 'text': 'a'}]"
    )
    body = "    run = None\n    def __init__(self):\n        raise RuntimeError('<b>no weights</b>')"
    write_model(models, "broken", body)
    server = start_server(models, ready=False)
    server.wait_for_log("serving 3 models")
    browser.set_window_size(1200, 900)
    browser.get("about:blank")
    browser.get(f"http://127.0.0.1:{server.http_port}/")
    return browser, server


def shot(browser: WebDriver, name: str) -> None:
    (ROOT / "build").mkdir(exist_ok=True)
    browser.save_screenshot(str(ROOT / "build" / f"{name}.png"))


def choose(browser: WebDriver, model: str) -> None:
    row = wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, f"tr[data-name={model}]"), f"{model}'s row")
    row[0].click()
    wait_for(lambda: browser.find_element(By.ID, "name").text.startswith(model), "the choice")


def text_of(browser: WebDriver, element: str) -> str:
    return str(browser.find_element(By.ID, element).text)


def test_the_page(page: tuple[WebDriver, Server], png: bytes, tmp_path: Path) -> None:
    browser, server = page
    photo = tmp_path / "photo.png"
    drawing = np.full((120, 200, 3), 255, np.uint8)
    cv2.circle(drawing, (100, 60), 40, (0, 0, 200), -1)
    cv2.imwrite(str(photo), drawing)

    choose(browser, "example")
    browser.find_element(By.ID, "text").send_keys("three little words")
    browser.find_element(By.CSS_SELECTOR, "#form button").click()
    wait_for(lambda: '"words": 3' in text_of(browser, "answer"), "the answer to a text")

    choose(browser, "edges")
    browser.find_element(By.ID, "file").send_keys(str(photo))
    wait_for(lambda: "uint8 120x200" in text_of(browser, "answer"), "the facts of an image")
    images = wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, ".preview img"), "the images")
    assert len(images) == 2
    wide = "return [...document.querySelectorAll('.preview img')].map(image => image.naturalWidth)"
    wait_for(lambda: browser.execute_script(wide) == [200, 200], "the images to be shown")
    shot(browser, "page")

    choose(browser, "finder")
    browser.find_element(By.ID, "file").send_keys(str(photo))
    polygon = wait_for(lambda: browser.find_elements(By.TAG_NAME, "polygon"), "the box that is drawn")
    assert polygon[0].get_attribute("points") == "2,2 20,2 20,12 2,12"

    choose(browser, "broken")
    wait_for(lambda: "<b>no weights</b>" in text_of(browser, "reason"), "the reason, as text")
    browser.find_element(By.CSS_SELECTOR, "#form button").click()
    wait_for(lambda: "no weights" in text_of(browser, "took"), "the error")

    choose(browser, "finder")
    browser.find_element(By.CSS_SELECTOR, "[data-action=unload]").click()
    wait_for(lambda: text_of(browser, "changed") == "UNLOADED", "the model to be unloaded")
    with server.client("finder") as client:
        assert client.model_info()[0]["state"] == "UNLOADED"
    browser.find_element(By.CSS_SELECTOR, "[data-action=load]").click()
    wait_for(lambda: text_of(browser, "changed") == "READY", "the model to be loaded")

    with server.client("example") as client:  # live rates
        row = "return document.querySelector('tr[data-name=example]').cells[2].textContent"

        def busy() -> bool:
            client.run_text("x")
            return float(browser.execute_script(row)) > 5

        wait_for(busy, "the rate to be shown")
    for line in browser.get_log("browser"):  # type: ignore[attr-defined]
        assert "409" in line["message"] or "favicon" in line["message"], line


def test_the_page_asks_for_the_token(browser: WebDriver, start_server: StartServer) -> None:
    server = start_server(TMS_TOKEN="sesame")
    browser.get(f"http://127.0.0.1:{server.http_port}/")
    wait_for(lambda: browser.find_element(By.ID, "token").is_displayed(), "the question")
    browser.find_element(By.ID, "token").send_keys("sesame")
    choose(browser, "echo")
    browser.find_element(By.ID, "text").send_keys("hello")
    browser.find_element(By.CSS_SELECTOR, "#form button").click()
    wait_for(lambda: '"hello"' in text_of(browser, "answer"), "the answer")


def test_the_page_on_a_phone(page: tuple[WebDriver, Server]) -> None:
    browser, _ = page
    browser.set_window_size(500, 900)
    browser.execute_cdp_cmd(  # type: ignore[attr-defined]
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    choose(browser, "example")
    shot(browser, "phone")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})  # type: ignore[attr-defined]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = (ROOT / "tiny_model_server" / "server" / "page.html").read_text()
    assert "http://www.w3.org/2000/svg" in text
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 0
