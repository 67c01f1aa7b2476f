"""What users read, tried: Swagger UI in a real browser, and the README's Python against a server with the bundled collection."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import IndexConfig
from engine.demo import documents, text
from engine.encoding.hashing import LexicalEncoder
from engine.index.commit import create
from engine.index.reader import Reader
from engine.store.objects import open_store
from handler.routes.table import ENDPOINTS
from serving import ROOT, serving

BROWSERS = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


@pytest.mark.slow
def test_swagger_ui_shows_every_operation_in_a_real_browser_without_a_foreign_host(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    browser_path = next((path for path in BROWSERS if os.path.exists(path)), None)
    if browser_path is None:
        pytest.skip("needs a browser: the Debian package chromium")
    hosts, mistakes = set(), []
    with serving(index_dir=str(tmp_path)) as server, playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else "inline"))
        page.on("console", lambda message: mistakes.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.goto(f"{server.url}/swagger-ui")
        page.wait_for_selector(".opblock", timeout=60_000)
        shown = {
            (
                block.query_selector(".opblock-summary-method").inner_text(),
                block.query_selector(".opblock-summary-path").get_attribute("data-path"),
            )
            for block in page.query_selector_all(".opblock")
        }
        answer = _try_out(page)
        browser.close()
    assert shown == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}
    assert hosts <= {server.url.removeprefix("http://"), "inline"}
    assert mistakes == []
    assert '"alive"' in answer


def _try_out(page: Any) -> str:
    """The answer to GET /livez, sent from the page."""
    page.click("#operations-service-livez .opblock-summary")
    page.click("#operations-service-livez .try-out__btn")
    page.click("#operations-service-livez .execute")
    page.wait_for_selector("#operations-service-livez .live-responses-table .response-col_description code", timeout=20_000)
    return str(page.inner_text("#operations-service-livez .live-responses-table"))


async def _index_the_demo(folder: Path) -> None:
    """What `make run` does before it serves."""
    store = open_store(str(folder))
    await create(store, "demo", IndexConfig())
    items = list(documents())
    tokens, offsets = LexicalEncoder().encode_documents([text(item) for item in items])
    await Reader(store).writer("demo").add(tokens, offsets, fields=[dict(item) for item in items])


def test_the_python_of_the_readme_works_as_it_stands(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    asyncio.run(_index_the_demo(tmp_path))
    with serving(index_dir=str(tmp_path), model="hashing") as server, contextlib.redirect_stdout(io.StringIO()) as printed:
        names: dict[str, Any] = {}
        exec(compile(code.replace("http://127.0.0.1:8080", server.url), "README.md", "exec"), names)
        names["client"].close()
    lines = printed.getvalue().splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"\d+ \d+\.\d+ .*[Bb]ridge.*", lines[0]), lines
    assert "elescope" in lines[3], lines
