"""The site in a headless browser: ``pytest -m browser tests/test_site.py``."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

# What a page has that nobody should see: one object, read by `assert` below.
LOOK = """() => {
  const width = document.documentElement.clientWidth;
  const right = document.querySelector("article").getBoundingClientRect().right;
  const wide = [];
  for (const formula of document.querySelectorAll(".katex")) {
    // Tables scroll by themselves.
    if (formula.closest(".md-typeset__table")) continue;
    for (const part of formula.querySelectorAll(".katex-html .base")) {
      if (part.getBoundingClientRect().right > right + 1) wide.push(formula.textContent);
    }
  }
  const formulas = [...document.querySelectorAll(".arithmatex")];
  const images = [...document.querySelectorAll("article img")];
  return {
    overflow: Math.max(0, document.documentElement.scrollWidth - width),
    wide: wide,
    plain: formulas.filter(element => !element.querySelector(".katex")).map(element => element.textContent),
    wrong: [...document.querySelectorAll(".katex-error")].map(element => element.textContent),
    missing: images.filter(image => image.complete && !image.naturalWidth).map(image => image.src),
  };
}"""
FINE = {"overflow": 0, "wide": [], "plain": [], "wrong": [], "missing": []}

# What people look for, and pages of which search must name one among its first five.
WORDS = {
    "personalization": {"personalization"},
    "heterogeneity": {"concepts"},
    "non-IID": {"concepts", "tutorial"},
    "convergence": {"concepts", "tutorial"},
    "client drift": {"concepts"},
    "client selection": {"concepts"},
    "hyperparameters": {"sweeps"},
    "resume": {"checkpoints"},
    "fairness": {"diagnostics"},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site and serve it; the address of its first page."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=200)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("index.html"))
    yield f"http://127.0.0.1:{server.server_port}", pages
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    paths = [path for path in map(shutil.which, BROWSERS) if path]
    with sync_api.sync_playwright() as playwright:
        # Playwright's own, if it was installed.
        own = Path(playwright.chromium.executable_path).exists()
        chromium = playwright.chromium.launch(executable_path=None if own else paths[0], args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page(site, browser, width):
    address, names = site
    assert len(names) > 40
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults = []

    def read_message(message):
        if message.type in ("error", "warning"):
            faults.append(message.text)

    def read_request(request):
        # The site needs no network.
        if not request.url.startswith((address, "data:", "blob:")):
            faults.append(request.url)

    page.on("console", read_message)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", read_request)
    for name in names:
        page.goto(f"{address}/{name}/", wait_until="load")
        look = page.evaluate(LOOK)
        assert (name, look, faults) == (name, FINE, [])
    page.goto(f"{address}/rules/")
    assert page.locator(".katex-display").count() > 15
    page.close()


def test_search_finds_what_people_look_for(site, browser):
    address, _ = site
    page = browser.new_page()
    page.goto(address, wait_until="load")
    query = page.locator("[data-md-component=search-query]")
    # The index is fetched when somebody types, and then there are results.
    query.press_sequentially("client")
    page.wait_for_selector("a.md-search-result__link", state="attached")
    for words, expected in WORDS.items():
        query.fill("")
        query.press_sequentially(words)
        # The results of the words before are still there, and new ones take a moment.
        for _ in range(40):
            page.wait_for_timeout(500)
            paths = page.locator("a.md-search-result__link").evaluate_all("links => links.map(link => link.pathname)")
            # Links to parts of a page follow the one to the page.
            pages = list(dict.fromkeys(path.strip("/") for path in paths))
            if expected & set(pages[:5]):
                break
        else:
            pytest.fail(f"{words}: {pages}")
    page.close()


def test_dark_pages_show_dark_pictures(site, browser):
    address, _ = site
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"{address}/gallery/", wait_until="load")
        shown = page.locator("article img:visible").evaluate_all("images => images.map(image => image.src)")
        assert any(source.endswith("/bands.png") for source in shown) == (scheme == "light")
        assert any(source.endswith("/bands_dark.png") for source in shown) == (scheme == "dark")
        page.close()
