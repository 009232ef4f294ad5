"""openapi.json: valid for a real validator, true to what the server does, and its page in a real browser."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.select import Select

from tests.conftest import Server, wait_for
from tests.test_faults import write_model
from tests.test_http_formats import send
from tests.test_page import Page, chromium  # noqa: F401  # a fixture
from tiny_model_server.server.answers import accepted

StartServer = Callable[..., Server]
TYPED = """
from dataclasses import dataclass, field
import numpy as np
from pydantic import BaseModel
from model_interface import ModelInterface


class Node(BaseModel):
    name: str
    definitions: dict[str, int] = {}
    children: list["Node"] = []


class Model(ModelInterface):
    example = {"name": "root", "children": [{"name": "leaf"}]}

    def run(self, data: Node, args: dict[str, int]) -> list[Node]:
        return data.children
"""
IMAGE = """
    example = "x"

    def run(self, data, args):
        import numpy as np
        if args.get('fail'):
            raise RuntimeError('<b>broken</b>')
        return np.full((40, 60, 3), 200, 'uint8') if args.get('image') else data
"""
HOSTILE = "<img src=x onerror=alert(1)> {a}?#"


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = write_model(tmp_path_factory.mktemp("openapi"), "plain", IMAGE)
    (models / "my-tree").mkdir()
    (models / "my-tree" / "__init__.py").write_text(TYPED)
    (models / HOSTILE).mkdir()
    (models / HOSTILE / "__init__.py").touch()
    server = Server(models)
    yield server
    server.kill()


def document(server: Server) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/openapi.json", timeout=20) as answer:
        return json.load(answer)


def test_a_validator_accepts_it(described: Server, server: Server) -> None:
    for one in (described, server):  # also of all the test models
        OpenAPIV31SpecValidator(document(one)).validate()
    assert document(described)["openapi"] == "3.1.0"


def test_every_model_is_in_it(described: Server) -> None:
    found = document(described)
    assert {path for path in found["paths"] if path.endswith("/run")} == {
        "/models/plain/run",
        "/models/my-tree/run",
        "/models/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%20%7Ba%7D%3F%23/run",
    }
    run = found["paths"]["/models/my-tree/run"]["post"]
    body = run["requestBody"]["content"]["application/json"]
    assert body["example"] == {"name": "root", "children": [{"name": "leaf"}]}
    assert body["schema"]["properties"]["children"]["items"] == {"$ref": "#/components/schemas/my-tree.Node"}
    node = found["components"]["schemas"]["my-tree.Node"]
    assert node["properties"]["children"]["items"] == {"$ref": "#/components/schemas/my-tree.Node"}
    assert node["properties"]["definitions"]["type"] == "object"
    answer = run["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["items"] == {"$ref": "#/components/schemas/my-tree.Node"}
    assert run["parameters"][0]["content"]["application/json"]["schema"]["additionalProperties"] == {"type": "integer"}
    assert "schema" in found["paths"]["/models/plain/run"]["post"]["requestBody"]["content"]["application/json"]


def test_it_says_what_the_server_does(described: Server) -> None:
    """Each GET without parameters is there; each example is accepted; each type of an answer can be asked for."""
    found = document(described)
    for path, item in found["paths"].items():
        if "get" in item and "{" not in path:
            ready = path != "/readyz"  # a model has failed
            assert send(described, method="GET", path=path)[0] == (200 if ready else 503), path
    for path in ("/models/plain/run", "/models/my-tree/run"):
        run = found["paths"][path]["post"]
        example = json.dumps(run["requestBody"]["content"]["application/json"]["example"]).encode()
        assert send(described, example, path=path, Content_Type="application/json")[0] == 200
        assert {*run["responses"]["200"]["content"], "application/zip"} == {*accepted("*/*")}
        for kind in run["responses"]["200"]["content"]:
            answer = send(described, example, path=path, Content_Type="application/json", Accept=kind)
            assert answer[0] in (200, 406)
            assert b"names no format" not in answer[2]
        for kind in run["requestBody"]["content"]:
            answer = send(described, b"x", path=path, Content_Type=kind)
            assert b"no type of an input" not in answer[2]


def test_it_follows_the_models(start_server: StartServer, tmp_path: Path) -> None:
    models = write_model(tmp_path, "one", IMAGE)
    server = start_server(models, TMS_RELOAD=1)
    assert "/models/two/run" not in document(server)["paths"]
    write_model(models, "two", IMAGE)
    assert send(server, method="POST", path="/models/two/load")[0] == 200
    assert "/models/two/run" in document(server)["paths"]


def test_it_needs_the_token(start_server: StartServer) -> None:
    server = start_server(TMS_TOKEN="sesame")
    assert send(server, method="GET", path="/openapi.json")[0] == 401
    found = json.loads(send(server, method="GET", path="/openapi.json", Authorization="Bearer sesame")[2])
    assert found["security"] == [{"token": []}]
    assert send(server, method="GET", path="/docs")[0] == 200


@pytest.fixture
def page(chromium: WebDriver, described: Server) -> Iterator[Page]:  # noqa: F811
    chromium.get_log("browser")  # type: ignore[attr-defined]
    page = Page(chromium, described)
    page.open("docs")
    yield page
    hosts = page.script(
        "return [...new Set(performance.getEntriesByType('resource').map(one => new URL(one.name).host))]"
    )
    assert hosts == [f"127.0.0.1:{described.http_port}"]
    for line in chromium.get_log("browser"):  # type: ignore[attr-defined]
        assert "the server responded with a status of" in line["message"], line


def opened(page: Page, path: str) -> Any:
    summaries = wait_for(lambda: [one for one in page.all("summary") if path in one.text], path)
    summaries[0].click()
    details = summaries[0].find_element(By.XPATH, "..")
    wait_for(lambda: any(one.is_displayed() for one in details.find_elements(By.TAG_NAME, "button")), "its form")
    return details


def test_the_page_lists_and_tries(page: Page) -> None:
    wait_for(lambda: "Run my-tree" in page.text("main"), "the operations")
    assert HOSTILE in page.text("main")
    tree = opened(page, "/models/my-tree/run")
    for summary in tree.find_elements(By.CSS_SELECTOR, "details details summary"):
        summary.click()
    assert "#/components/schemas/my-tree.Node" in tree.text
    assert '"children"' in tree.text
    assert "429: the server has too much to do" in tree.text
    tree.find_element(By.CSS_SELECTOR, "button").click()
    wait_for(lambda: "200 OK" in tree.text and '"leaf"' in tree.text, "the answer to the example")
    plain = opened(page, "/models/plain/run")
    args = plain.find_element(By.CSS_SELECTOR, "input")
    args.send_keys('{"image": 1}')
    Select(plain.find_elements(By.CSS_SELECTOR, "select")[-1]).select_by_visible_text("image/png")
    plain.find_element(By.CSS_SELECTOR, "button").click()
    wait_for(lambda: page.script("return document.querySelector('form img')?.naturalWidth") == 60, "the image")
    args.clear()
    args.send_keys('{"fail": 1}')
    plain.find_element(By.CSS_SELECTOR, "button").click()
    wait_for(lambda: "500" in plain.text and "<b>broken</b>" in plain.text, "the error")


def test_the_page_changes_a_model(page: Page) -> None:
    change = opened(page, "/models/{name}/{action}")
    change.find_element(By.CSS_SELECTOR, "input").send_keys("plain")
    Select(change.find_element(By.CSS_SELECTOR, "select")).select_by_visible_text("reload")
    change.find_element(By.CSS_SELECTOR, "button").click()
    wait_for(lambda: '"state": "READY"' in change.text, "the model's state")


def test_the_page_with_a_token(chromium: WebDriver, start_server: StartServer) -> None:  # noqa: F811
    page = Page(chromium, start_server(TMS_TOKEN="sesame"))
    page.open("docs", width=390)
    page.wait("#error", "TMS_TOKEN")
    page.find("#token").send_keys("sesame\t")
    wait_for(lambda: "Run echo" in page.text("main"), "the operations")
    assert page.script("return document.documentElement.scrollWidth") <= 390
    page.browser.get_log("browser")  # type: ignore[attr-defined]
