"""The page, in a real browser."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import write_model

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
BIN = Path(sys.executable).parent
StartServer = Callable[..., Server]
HOSTILE = "<img src=x onerror=alert(1)>"
MODELS = {
    "finder": "    def run(self, data, args):\n        return [{'box': [2, 2, 20, 12], 'text': 'a', 'score': 0.75}]",
    "detector": "    example = np.zeros((100, 100, 3), 'u1')\n    def run(self, data, args):\n"
    "        return {'boxes': np.full((40, 4), 0.5, 'f4') + [-0.25, -0.25, 0, 0], 'labels': ['cat'] * 40,\n"
    "                'points': [[3, 4]] * 9, 'mask': np.ones(data.shape[:2], bool), 'embedding': np.arange(384) / 384}",
    "kinds": "    example = np.ones(3, 'f4')\n    def run(self, data, args):\n"
    "        return {'is': type(data).__name__, 'dtype': str(getattr(data, 'dtype', '')), 'args': args}",
    "arrays": "    example = [np.zeros((4, 4)), np.ones(2, 'i8')]\n    def run(self, data, args):\n"
    "        return [f'{one.dtype} {one.shape} {one.sum():g}' for one in data]",
    "logs": "    def run(self, data, args):\n        logging.warning('<b>%s</b>', data)",
    "raises": "    def run(self, data, args):\n        raise KeyError('no such thing')",
    "pixels": "    def run(self, data, args):\n        yield data.shape\n        yield 1",
    "huge": "    example = np.zeros((8000, 8000, 3), 'u1')\n    metadata = {'description': {'not': 'a text'}}\n"
    "    def run(self, data, args):\n        return {'__proto__': [{'__proto__': 1, 'toString': 2}]}",
    "wide": "    example = [np.zeros((2000, 2000))]\n    def run(self, data, args):\n        return 1",
    "declares": "    metadata = {'inputs': [{'name': 'x', 'dtype': 'float32', 'shape': [-1, 4]}]}\n"
    "    def run(self, data, args):\n        return str(data.shape)",
    "text": "    example = 'Grüße, \"you\" & \\'me\\''\n"
    "    def run(self, data, args):\n        return {'data': data, 'args': args}",
    "waits": "    def run(self, data, args):\n        wait(data)\n        return 'the answer of waits'",
    "tokens": "    example = 'x'\n"
    "    def run(self, data, args):\n        yield 'one '\n        wait(data)\n        yield 'two'",
    "fails": "    def run(self, data, args):\n        yield 1\n        raise InvalidInput('no more')",
    "refuses": "    def run(self, data, args):\n        raise InvalidInput('<b>never</b>')",
    "hostile": f"    metadata = {{'description': {HOSTILE!r}}}\n    def run(self, data, args):\n"
    f"        return {{'a': {HOSTILE!r}, {HOSTILE!r}: [{{{HOSTILE!r}: {HOSTILE!r}}}], 'png': 'javascript:alert(1)'}}",
    "broken": "    def run(self, data, args):\n        return 1\n"
    "    def __init__(self):\n        raise RuntimeError('<b>no weights</b>')",
}
TYPED = """
from dataclasses import dataclass
from typing import Literal, Optional
from model_interface import ModelInterface


@dataclass
class Request:
    prompt: str
    numbers: list[int]
    style: Literal["short", "long"] = "short"
    count: int = 3
    share: float = 0.5
    loud: bool = False
    note: Optional[str] = None


@dataclass
class Options:
    seed: int = 1


class Model(ModelInterface):
    example = {"prompt": "Say", "numbers": [1, 2]}

    def run(self, data: Request, args: Options):
        return {"data": vars(data), "args": vars(args)}
"""
CROP = """
from dataclasses import dataclass
from typing import Annotated
import numpy as np
from model_interface import ModelInterface


@dataclass
class Request:
    photo: Annotated[np.ndarray, np.uint8, (None, None, 3)]
    boxes: list[list[int]]
    text: str = "it's \\"here\\""


class Model(ModelInterface):
    def run(self, data: Request, args):
        return {"boxes": data.boxes, "shape": data.photo.shape, "text": data.text}
"""
HELPERS = """
import logging
import time
from pathlib import Path
import numpy as np
from model_interface import InvalidInput


def wait(path):
    while not Path(path).exists():
        time.sleep(0.01)
"""
CONTRAST = """
const numbers = colour => (colour.match(/[\\d.]+/g) ?? []).map(Number);
const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, index) => sum + c * [.2126, .7152, .0722][index], 0);
const behind = element => {
  for (; element; element = element.parentElement) {
    const [r, g, b, alpha = 1] = numbers(getComputedStyle(element).backgroundColor);
    if (alpha === 1) return [r, g, b];
  }
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const has = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()) || element.value;
  if (!has || !element.checkVisibility() || element.disabled) continue;
  const [a, b] = [light(numbers(getComputedStyle(element).color)), light(behind(element))];
  const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (contrast < 4.5) found.push(`${element.outerHTML.slice(0, 80)}: ${contrast}`);
}
return found;
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[WebDriver]:
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
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page of a server in the browser: what somebody sees and does."""

    def __init__(self, browser: WebDriver, server: Server) -> None:
        self.browser, self.server = browser, server

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.browser.execute_cdp_cmd(command, parameters)  # type: ignore[attr-defined]

    def open(self, path: str = "", width: int = 1280, height: int = 800, dark: bool = False) -> None:
        mobile, scheme = width < 600, "dark" if dark else "light"
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.browser.get("about:blank")
        self.browser.get(f"http://127.0.0.1:{self.server.http_port}/{path}")

    def all(self, selector: str) -> list[Any]:
        return [one for one in self.browser.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]

    def find(self, selector: str) -> Any:
        return wait_for(lambda: self.all(selector), selector)[0]

    def text(self, selector: str) -> str:
        text = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent).join('\\n')"
        return str(self.browser.execute_script(text, selector))

    def wait(self, selector: str, text: str) -> None:
        wait_for(lambda: text in self.text(selector), f"{text!r} in {selector}, not {self.text(selector)!r}")

    def script(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def keys(self, *keys: str) -> None:
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def choose(self, model: str) -> None:
        self.find(f"#models a[data-name={model}]").click()
        self.find(f"article[data-model={model}]")

    def enter(self, kind: str, text: str) -> None:
        self.find(f"[data-kind={kind}]").click()
        area = self.find(f"[data-input={kind}]")
        area.clear()
        area.send_keys(text)

    def upload(self, path: Path) -> None:
        self.browser.find_element(By.CSS_SELECTOR, "[data-input=file]").send_keys(str(path))
        self.wait(".drop", path.name)

    def run(self) -> None:
        self.find("button.run").click()

    @property
    def chosen(self) -> str:
        return str(self.script("return document.querySelector('#models [aria-current]')?.dataset.name ?? ''"))


@pytest.fixture(scope="module")
def shared(chromium: WebDriver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    models = tmp_path_factory.mktemp("page") / "models"
    shutil.copytree(ROOT / "models" / "edges", models / "edges")
    shutil.copytree(ROOT / "models" / "example", models / "example")
    for name, body in MODELS.items():
        write_model(models, name, body)
        (models / name / "__init__.py").write_text(HELPERS + (models / name / "__init__.py").read_text())
    (write_model(models, "typed", "") / "typed" / "__init__.py").write_text(TYPED)
    (write_model(models, "crop", "") / "crop" / "__init__.py").write_text(CROP)
    (models / HOSTILE).mkdir()
    (models / HOSTILE / "__init__.py").touch()
    server = Server(models, ready=False)
    try:
        server.wait_for_log(r"serving \d+ models", timeout=60)
        yield Page(chromium, server)
    finally:
        server.kill()


@pytest.fixture
def page(shared: Page) -> Iterator[Page]:
    """The page of a server that each test leaves as it was. No test leaves an error in the console."""
    shared.browser.get_log("browser")  # type: ignore[attr-defined]
    shared.open()
    yield shared
    hosts = shared.script(
        "return [...new Set(performance.getEntriesByType('resource').map(one => new URL(one.name).host))]"
    )
    assert hosts in ([], [f"127.0.0.1:{shared.server.http_port}"])
    for line in shared.browser.get_log("browser"):  # type: ignore[attr-defined]
        # The browser itself reports what is answered with an error, which the page shows.
        assert "the server responded with a status of" in line["message"], line


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    drawing = np.full((120, 200, 3), 255, np.uint8)
    cv2.circle(drawing, (100, 60), 40, (0, 0, 200), -1)
    cv2.imwrite(str(tmp_path / "photo.png"), drawing)
    return tmp_path / "photo.png"


def test_the_list(page: Page) -> None:
    page.find("#models a[data-name=example]")
    assert len(page.all("#models a")) == len(MODELS) + 5
    page.wait("#models a[data-name=broken]", "FAILED: RuntimeError: <b>no weights</b>")
    page.wait("#models", HOSTILE)
    page.find("#states [data-state=FAILED]").click()
    assert [one.get_attribute("data-name") for one in page.all("#models a")] == [HOSTILE, "broken"]
    page.find("#states [data-state=all]").click()
    page.find("#filter").send_keys("EXAM")
    assert [one.get_attribute("data-name") for one in page.all("#models a")] == ["example"]
    page.find("#filter").send_keys("x")
    page.wait("#none", "No model fits")


def test_the_keyboard(page: Page) -> None:
    page.find("#models a")
    focused = "return document.activeElement.dataset.name ?? document.activeElement.id"
    page.keys("/")
    assert page.script(focused) == "filter"
    page.keys("ex", Keys.ARROW_DOWN)
    assert page.script(focused) == "example"
    outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keys(Keys.ENTER)
    page.find("article[data-model=example]")
    assert page.browser.current_url.endswith("#/models/example")
    page.keys(Keys.ARROW_UP)
    assert page.script(focused) == "filter"
    page.keys(Keys.ESCAPE)
    assert page.script("return document.getElementById('filter').value") == ""
    assert page.script(focused) == "example"
    page.keys(Keys.END)
    names = [one.get_attribute("data-name") for one in page.all("#models a")]
    assert page.script(focused) == names[-1]
    page.keys(Keys.ARROW_UP)
    assert page.script(focused) == names[-2]
    page.keys("/", "tok", Keys.ARROW_DOWN, Keys.ENTER)
    page.find("article[data-model=tokens]")
    page.enter("text", "/dev/null")
    page.find("[data-input=text]").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait("article .stream", "one two")
    page.keys("/")  # types into the field that has the focus
    assert page.find("[data-input=text]").get_attribute("value").endswith("/")


def test_text_and_json(page: Page) -> None:
    page.choose("text")
    assert page.find("[data-input=text]").get_attribute("value") == "Grüße, \"you\" & 'me'"
    page.run()
    page.wait("article .json", '"Grüße, \\"you\\" & \'me\'"')
    page.enter("json", '{"list": [1, 2], "none": null}')
    page.find("[data-input=args]").send_keys('{"top": 3}')
    page.run()
    page.wait("article .json", '{"data": {"list": [1, 2], "none": null}, "args": {"top": 3}}')
    page.enter("json", str(list(range(100))))
    page.run()
    page.wait("article .json", "92 more")
    assert "99" not in page.text("article .json")
    page.find("article .fold").click()
    page.wait("article .json", "98, 99]")
    page.wait("article .plot", "100 numbers")


def test_examples_are_filled_in(page: Page) -> None:
    page.choose("example")
    page.wait(".drop", "the model's example · 4x4")
    page.run()
    page.wait("article .json", '"shape": [4, 4, 3]')
    page.choose("kinds")
    assert "float32" in page.find("[data-input=json]").get_attribute("value")
    page.run()
    page.wait("article .json", '"is": "ndarray", "dtype": "float32"')
    page.choose("arrays")
    shown = page.find("[data-input=json]").get_attribute("value")
    assert json.loads(shown)[0] == {"$array": {"dtype": "float64", "shape": [4, 4]}}  # zeros
    page.run()
    page.wait("article .json", '"float64 (4, 4) 0", "int64 (2,) 2"')
    page.choose("declares")
    page.run()
    page.wait("article .json", "(1, 4)")
    page.choose("wide")
    page.run()
    page.wait("article .status", "an array of 4000000 elements is too large for JSON")
    page.choose("huge")
    page.wait(".drop", "Drop, paste or choose an image")
    page.enter("text", "x")
    page.run()
    page.wait("article .json", '"__proto__": 1, "toString": 2')
    page.choose("detector")  # its example is too large to be sent along; the page makes one of its size
    page.wait(".drop", "the model's example · 100x100")


def test_a_typed_model_has_a_form(page: Page) -> None:
    def field(name: str) -> Any:
        labels = (
            "return [...document.querySelectorAll('article label')].find(one => one.innerText.startsWith(arguments[0]))"
        )
        return page.script(f"{labels}.control", name)

    page.choose("typed")
    page.find("[data-kind=form]")
    found: dict[str, Any] = {"prompt": "Say", "numbers": [1, 2], "style": "short", "count": 3, "share": 0.5}
    found |= {"loud": False, "note": None}
    page.run()
    page.wait("article .status", "answered")
    copied = "return JSON.parse(document.querySelector('article .json')?.textContent ?? 'null')"
    assert page.script(copied) == {"data": found, "args": {"seed": 1}}
    field("prompt").send_keys(" it")
    field("count").clear()
    field("count").send_keys("4")
    field("style").send_keys("long")
    field("loud").click()
    field("numbers").clear()
    field("numbers").send_keys("[3]")
    field("seed").clear()
    field("seed").send_keys("2")
    page.run()
    found |= {"prompt": "Say it", "numbers": [3], "style": "long", "count": 4, "loud": True}
    page.wait("article .json", '"seed": 2')
    assert page.script(copied)["data"] == found
    page.find("[data-kind=json]").click()
    assert json.loads(page.find("[data-input=json]").get_attribute("value"))["numbers"] == [3]
    page.find("[data-kind=form]").click()
    field("numbers").send_keys("]")
    page.run()
    page.wait("article .status", "numbers: this is not JSON")
    field("numbers").clear()
    page.run()
    page.wait("article .status", "numbers is missing")
    field("numbers").send_keys('["a"]')
    page.run()
    page.wait("article .status", "400 INVALID_ARGUMENT: data.numbers.0")


def test_images(page: Page, photo: Path) -> None:
    page.choose("edges")
    page.upload(photo)
    page.run()
    wide = "return [...document.querySelectorAll('article .drawn img')].map(image => image.naturalWidth)"
    wait_for(lambda: page.script(wide) == [200, 200], "the input and the answer")
    page.find("article .over canvas")
    page.wait("article .json", "uint8 120x200")

    page.choose("finder")
    page.upload(photo)
    page.run()
    assert page.find("polygon").get_attribute("points") == "2,2 20,2 20,12 2,12"
    assert page.text("article .over text") == "a 0.75"
    assert page.text("article table td") == "[2,2,20,12]\na\n0.75"

    page.choose("detector")
    page.upload(photo)
    page.run()
    polygons = wait_for(lambda: page.all("polygon"), "the boxes")
    assert len(polygons) == 40
    assert polygons[0].get_attribute("points") == "50,30 100,30 100,60 50,60"  # parts of width and height
    assert len(page.all("article .over circle")) == 9
    page.find("article .over canvas")
    page.wait("article .plot", "embedding")


def test_an_image_by_drop_paste_and_camera(page: Page, photo: Path) -> None:
    page.choose("example")
    page.wait(".drop", "4x4")
    give = """
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], arguments[1], { type: "image/png" }));
        const how = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
        const event = arguments[2] === "drop" ? new DragEvent("drop", how) : new ClipboardEvent("paste", how);
        document.querySelector(arguments[2] === "drop" ? ".drop" : "body").dispatchEvent(event);
    """
    content = page.script("return btoa(String.fromCharCode(...arguments[0]))", list(photo.read_bytes()))
    for way in ("drop", "paste"):
        page.script(give, content, f"by-{way}.png", way)
        page.wait(".drop", f"by-{way}.png · 200x120")
    page.run()
    page.wait("article .json", '"shape": [120, 200, 3]')
    page.find("[data-input=camera]").click()
    wait_for(lambda: page.find("#camera-ok").is_enabled(), "the camera")
    page.find("#camera-ok").click()
    page.wait(".drop", "photo.jpg")
    page.run()
    size = "const image = document.querySelector('.drop img'); return [image.naturalHeight, image.naturalWidth]"
    page.wait("article .json", f'"shape": {json.dumps([*page.script(size), 3])}')
    page.find("[data-input=camera]").click()
    page.keys(Keys.ESCAPE)
    wait_for(lambda: not page.all("dialog"), "the end of the dialog")
    wait_for(lambda: not page.script("return document.getElementById('video').srcObject"), "the end of the camera")


def test_a_stream_is_shown_as_it_comes(page: Page, tmp_path: Path) -> None:
    page.choose("tokens")
    page.enter("text", str(tmp_path / "go"))
    page.run()
    page.wait("article .json", '"one "')
    page.find("button.cancel")
    (tmp_path / "go").touch()
    page.wait("article .stream", "one two")
    page.wait("article .status", "2 values")
    page.wait("article .snippet", "for value in model.run_stream(")
    page.choose("fails")
    page.run()
    page.wait("article .status", "INVALID_ARGUMENT: no more")
    assert page.text("article .json") == "1"


def test_an_answer_stays_with_its_model(page: Page, tmp_path: Path) -> None:
    page.choose("waits")
    page.enter("text", str(tmp_path / "go"))
    page.run()
    page.wait("article .status", "running")
    page.choose("text")
    page.run()
    page.wait("article .json", "Grüße")
    (tmp_path / "go").touch()
    wait_for(lambda: not page.all("#models a[data-name=waits] .busy"), "the end of the call")
    assert "waits" not in page.text("article .answer")
    page.browser.back()
    page.wait("article .json", "the answer of waits")
    assert page.chosen == "waits"
    page.browser.forward()
    page.wait("article .json", "Grüße")


def test_a_call_can_be_cancelled(page: Page, tmp_path: Path) -> None:
    page.choose("waits")
    page.enter("text", str(tmp_path / "go"))
    page.run()
    page.find("button.cancel").click()
    page.wait("article .status", "Cancelled")
    (tmp_path / "go").touch()
    page.run()
    page.wait("article .json", "the answer of waits")


def test_errors_are_shown_in_words(page: Page) -> None:
    page.choose("refuses")
    page.run()
    page.wait("article .status", "400 INVALID_ARGUMENT: <b>never</b>")
    assert "request" not in page.text("article .status")
    page.choose("raises")
    page.run()
    page.wait("article .status", "500 INTERNAL: model 'raises' raised KeyError")
    page.wait("article .status", "(request ")
    page.choose("refuses")
    page.find("[data-input=args]").send_keys("[1]")
    page.run()
    page.wait("article .status", "args must be a JSON object")
    page.enter("json", "{")
    page.run()
    page.wait("article .status", "JSON")
    page.find("[data-kind=image]").click()
    page.find("[data-input=args]").clear()
    page.run()
    page.wait("article .status", "choose an image first")
    page.choose("broken")
    page.wait("article .reason", "<b>no weights</b>")
    page.run()
    page.wait("article .status", "could not be loaded")
    page.open("#/models/nobody")
    page.wait("#model", "There is no model nobody.")


def test_text_of_models_is_never_markup(page: Page) -> None:
    page.choose("hostile")
    page.wait("article .about", HOSTILE)
    page.run()
    page.wait("article .json", HOSTILE)
    page.wait("article table", HOSTILE)
    page.enter("json", json.dumps({"a": HOSTILE}))
    page.wait("article .snippet", HOSTILE)
    next(one for one in page.all("#models a") if one.get_attribute("data-name") == HOSTILE).click()
    page.wait("h2", HOSTILE)
    assert page.script("return document.querySelectorAll('img[src=x], [onerror], article b').length") == 0
    inline = "const script = document.createElement('script'); script.textContent = 'window.hit = 1';"
    page.script(inline + "document.body.append(script)")
    assert page.script("return window.hit") is None
    (refused,) = page.browser.get_log("browser")  # type: ignore[attr-defined]
    assert "Content Security Policy" in refused["message"]


def test_snippets_do_what_the_page_does(page: Page, photo: Path) -> None:
    def snippet(language: str) -> str:
        page.find(f"[data-language={language}]").click()
        return page.text("article .snippet .code")

    def ran(language: str) -> str:
        command = (
            [sys.executable, "-c", snippet(language)] if language == "python" else ["bash", "-c", snippet(language)]
        )
        env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, cwd=photo.parent, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (snippet(language), done.stderr)
        return done.stdout

    page.choose("text")
    page.find("[data-input=args]").send_keys('{"a": "it\'s", "b": [true, null, 1.5]}')
    expected = {"data": "Grüße, \"you\" & 'me'", "args": {"a": "it's", "b": [True, None, 1.5]}}
    assert ran("python") == f"{expected}\n"
    assert json.loads(ran("curl")) == expected
    assert json.loads(json.loads(ran("grpcurl"))["data"]) == expected
    page.enter("json", '{"$odd": ["x\\n\\\\", -2, true]}')
    expected["data"] = {"$odd": ["x\n\\", -2, True]}
    assert ran("python") == f"{expected}\n"
    assert json.loads(ran("curl")) == expected
    assert "$odd" in json.loads(ran("grpcurl"))["data"]
    page.choose("kinds")
    for language in ("python", "curl", "grpcurl"):
        assert "float32" in ran(language)
    page.choose("arrays")
    for language in ("python", "curl", "grpcurl"):
        assert "float64 (4, 4) 0" in ran(language)
    page.choose("crop")
    page.find(".form input[type=file]").send_keys(str(photo))
    page.find(".form textarea").send_keys("[[2, 2, 20, 12]]")
    page.run()
    assert page.find("polygon").get_attribute("points") == "2,2 20,2 20,12 2,12"
    expected = {"boxes": [[2, 2, 20, 12]], "shape": [120, 200, 3], "text": 'it\'s "here"'}
    assert page.script("return JSON.parse(document.querySelector('article .json').textContent)") == expected
    assert ran("python") == f"{expected}\n"
    assert json.loads(ran("curl")) == expected
    assert json.loads(json.loads(ran("grpcurl"))["data"]) == expected
    page.choose("example")
    page.upload(photo)
    for language in ("python", "curl", "grpcurl"):
        assert "120" in ran(language)
    page.choose("tokens")
    page.enter("text", "/dev/null")
    page.run()
    page.wait("article .status", "2 values")
    assert ran("python") == "one \ntwo\n"
    assert 'data: "two"' in ran("curl")
    assert "two" in ran("grpcurl")
    page.choose("pixels")
    page.upload(photo)
    page.run()
    page.wait("article .status", "2 values")
    assert ran("python") == "[120, 200, 3]\n1\n"
    assert "data: [120, 200, 3]" in ran("curl")
    assert "[120, 200, 3]" in ran("grpcurl")


def test_unloading_asks_first(page: Page) -> None:
    page.choose("finder")
    page.find("[data-action=unload]").click()
    page.wait("#confirm", "Unload finder?")
    page.find("#confirm [data-close]").click()
    page.find("[data-action=unload]").click()
    page.keys(Keys.ESCAPE)
    wait_for(lambda: not page.all("dialog"), "the end of the dialog")
    with page.server.client("finder") as client:
        assert client.model_info()[0]["state"] == "READY"
        page.find("[data-action=unload]").click()
        page.find("#confirm-ok").click()
        page.wait("article .outcome", "UNLOADED")
        assert client.model_info()[0]["state"] == "UNLOADED"
        page.wait("#models a[data-name=finder]", "UNLOADED")
        page.run()
        page.wait("article .status", "409 FAILED_PRECONDITION: model 'finder' is not loaded")
        page.find("[data-action=load]").click()
        page.wait("article .outcome", "READY")
        pids = client.model_info()[0]["worker_pids"]
        page.find("[data-action=reload]").click()
        page.wait("article .outcome", "Reloaded")
        assert client.model_info()[0]["worker_pids"] != pids


def test_the_log_is_shown(page: Page) -> None:
    page.choose("logs")
    page.find("article .log summary").click()
    for text in ("first", "second"):
        page.enter("text", text)
        page.run()
        page.wait("article .log pre", f"<b>{text}</b>")


def test_charts_are_live(page: Page) -> None:
    page.choose("text")

    def value(chart: str) -> float:
        text = page.text(f"[data-chart={chart}] dd").strip("\u2013ms/ ")
        return float(text or 0)

    with page.server.client("text") as client:

        def busy() -> bool:
            client.run_text("x")
            return value("rate") > 3 and 0 < value("p50") <= value("p95") and value("batch") == 1

        wait_for(busy, "the charts")
    line = "return document.querySelector('[data-chart=rate] .line').getAttribute('d')"
    wait_for(lambda: "L" in page.script(line), "a line")
    page.wait("#models a[data-name=text] .about", "p95")


def test_nothing_is_polled_while_nobody_looks(page: Page) -> None:
    page.find("#models a")
    polls = "return performance.getEntriesByType('resource').filter(one => one.name.endsWith('/stats')).length"
    wait_for(lambda: page.script(polls) > 1, "the second poll")
    hide = "Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true });"
    page.script(hide + "window.since = performance.now()", True)
    wait_for(lambda: page.script("return performance.now() - window.since") > 5000, "two polls that do not come")
    seen = page.script(polls)
    assert seen <= 3
    page.script(hide + "document.dispatchEvent(new Event('visibilitychange'))", False)
    wait_for(lambda: page.script(polls) > seen, "another poll")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, True), (320, False)])
def test_it_is_readable_and_fits(page: Page, photo: Path, width: int, dark: bool) -> None:
    page.open(width=width, dark=dark)
    page.find("#models a")
    assert page.script(CONTRAST) == []
    assert page.script("return document.documentElement.scrollWidth") <= width
    for model in ("detector", "hostile", "broken"):
        page.open(f"#/models/{model}", width=width, dark=dark)
        page.find(f"article[data-model={model}]")
        page.upload(photo)
        page.run()
        wait_for(lambda: "running" not in page.text("article .status"), "an answer")
        assert page.script(CONTRAST) == []
        assert page.script("return document.documentElement.scrollWidth") <= width
        names = "return [...document.querySelectorAll('button, input, textarea, select')].filter(one => "
        names += "one.checkVisibility() && !one.textContent && !one.ariaLabel && !one.labels?.length)"
        assert page.script(f"{names}.map(one => one.outerHTML)") == []


def test_a_phone_shows_the_list_or_a_model(page: Page) -> None:
    page.open(width=390, height=844)
    page.find("#models a")
    assert not page.all("article")
    page.find("#models a[data-name=text]").click()
    page.find("article[data-model=text]")
    assert not page.all("#models a")
    page.find(".back").click()
    page.find("#models a")
    assert not page.all("article")
    page.browser.back()
    page.find("article[data-model=text]")


def test_forty_models(chromium: WebDriver, start_server: StartServer, tmp_path: Path) -> None:
    for number in range(40):
        write_model(tmp_path, f"model-{number:02}", "    def run(self, data, args):\n        return 'of 2'")
    page = Page(chromium, start_server(tmp_path, TMS_LAZY=1, TMS_MAX_LOADED=2))
    page.open()
    page.find("#models a")
    assert len(page.script("return [...document.querySelectorAll('#models a')]")) == 40
    page.wait("#summary", "0 of 40 ready")
    page.script("document.querySelector('[data-name=model-39]').scrollIntoView()")
    page.choose("model-39")
    assert page.find("article h2").rect["y"] < 200  # the model is in view, wherever the list is
    page.keys("/")
    page.keys("07", Keys.ENTER)
    page.find("article[data-model=model-07]")
    page.run()
    page.wait("article .json", "of 2")
    page.wait("#models a[data-name=model-07]", "READY")


def test_a_server_that_is_gone_is_reported(chromium: WebDriver, start_server: StartServer) -> None:
    page = Page(chromium, start_server())
    page.open()
    page.choose("echo")
    page.server.kill()
    page.wait("#notice", "The server does not answer")
    page.run()
    page.wait("article .status", "the server does not answer")
    chromium.get_log("browser")  # type: ignore[attr-defined]


def test_the_token_is_asked_for_once(chromium: WebDriver, start_server: StartServer) -> None:
    page = Page(chromium, start_server(TMS_TOKEN="sesame"))
    page.open()
    page.find("#token").send_keys("wrong", Keys.ENTER)
    page.wait("#token-error", "does not accept")
    page.find("#token").send_keys("sesame", Keys.ENTER)
    page.choose("echo")
    page.enter("text", "hello")
    page.run()
    page.wait("article .json", '"hello"')
    page.wait("article .snippet", "TMS_TOKEN")
    page.browser.refresh()
    page.find("article[data-model=echo]")
    assert not page.all("dialog")
    page.script("sessionStorage.clear()")
    page.browser.refresh()
    page.find("#ask-token")
    page.keys(Keys.ESCAPE)
    page.wait("#notice", "401 UNAUTHENTICATED")
