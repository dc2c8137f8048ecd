"""One product for all tests of the page, started as a user starts it; a fresh browser context each.

Whatever the browser complains about on a page, or fetches from elsewhere, fails the test.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.web.driving import Complaints

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_S = 180
# What Chromium itself says about a refused call; the page says it in a sentence as well.
REFUSED = re.compile(
    r"Failed to load resource: (the server responded with a status of 4\d\d|net::ERR_FAILED)"
)


def _absent(what: str) -> None:
    """Without it there is nothing to test here; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def product_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the product runs; its data folder is `data` in it."""
    return tmp_path_factory.mktemp("product")


@pytest.fixture(scope="session")
def product(product_folder: Path) -> Iterator[str]:
    """URL of the product, started as a user starts it."""
    with started(product_folder, "--demo") as url:
        yield url


@contextmanager
def started(folder: Path, *flags: str, **variables: str) -> Iterator[str]:
    """URL of a product of its own; `variables` are added to its environment."""
    if not (ROOT / "gateway" / "static" / "index.html").is_file():
        _absent("the page is not built: run `npm run build` in web/")
    env = {key: value for key, value in os.environ.items() if not key.startswith("TDB_")}
    env |= {
        "TDB_GATEWAY_PORT": "0",
        "TDB_INFERENCE_PORT": "0",
        "TDB_DATASET_PORT": "0",
        "TDB_EXPLAINER_PORT": "0",
        "TDB_DATA_DIR": str(folder / "data"),
        "TDB_DEMO_DATASET": "0",
    } | variables
    said = folder / "said.txt"
    with (
        said.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "tdb.cli", "up", *flags],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield _url(process, said)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _url(process: subprocess.Popen[bytes], said: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        printed = re.search(r"^https?://\S+$", said.read_text(), re.MULTILINE)
        if printed:
            return printed[0].rstrip("/") + "/"
        if process.poll() is not None:
            break
        time.sleep(0.2)
    pytest.fail(f"`tdb up` printed no URL. It said:\n{said.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for the whole session: Playwright keeps the thread's event loop, which tests of services
    that come after these need."""
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if executable is None:
        _absent("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def complaints(page: Page, product: str) -> Complaints:
    return Complaints(page, product)


@pytest.fixture
def page(browser: Browser, product: str) -> Iterator[Page]:
    with new_page(browser, product) as page:
        yield page


@contextmanager
def new_page(browser: Browser, product: str) -> Iterator[Page]:
    """A fresh page; whatever the browser complained about fails the test at the end."""
    context = browser.new_context(
        base_url=product, viewport={"width": 1280, "height": 860}, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    own = Complaints(page, product)
    yield page
    context.close()
    assert [text for text in own if not REFUSED.match(text)] == []
