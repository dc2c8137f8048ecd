"""What tests of the page do with it, and how they read it."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Locator, Page, expect

SCREENSHOTS = Path(__file__).resolve().parents[2] / "test-results"
PROMPT = "When Mary and John went to the store, John gave a drink to"
ATTRIBUTE = "**/tdb.inference.v1.InferenceService/Attribute"


class Complaints(list[str]):
    """What the browser complained about on a page, and what the page fetched from elsewhere."""

    def __init__(self, page: Page, origin: str) -> None:
        super().__init__()

        def fetched(url: str) -> None:
            if urlsplit(url).netloc != urlsplit(origin).netloc and not url.startswith("data:"):
                self.append(f"fetched {url}")

        def console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self.append(message.text)

        page.on("console", console)
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("request", lambda request: fetched(request.url))


def rows(page: Page) -> Locator:
    return page.locator("tr.row")


def head(page: Page) -> str:
    """The first head of the table that is not ablated already."""
    row = page.locator("tr.row[data-node^='head.']:not(:has([data-ablated]))").first
    node = row.get_attribute("data-node")
    assert node is not None
    return node


def number(page: Page, name: str = "objective") -> float:
    text = page.get_by_test_id(name).get_attribute("data-value")
    assert text is not None
    return float(text)


def start(page: Page) -> float:
    """Opens the start page and returns the example's logit difference."""
    page.goto("")
    answered(page)
    return number(page)


def answered(page: Page) -> None:
    """Waits until nothing is on its way and the answer is that of the question."""
    expect(page.locator("main[aria-busy=false]:not([data-stale]) tr.row").first).to_be_visible()
    expect(page.locator("[data-waiting]")).to_have_count(0)


def calls(page: Page) -> list[str]:
    """Names of the calls made from now on, without the look at the queue.

    The header looks every few seconds whatever the visitor does, so no test may count it.
    """
    names: list[str] = []

    def note(url: str) -> None:
        name = url.rsplit("/", 1)[1]
        if "/tdb.inference.v1.InferenceService/" in url and name != "GetQueue":
            names.append(name)

    page.on("request", lambda request: note(request.url))
    return names


def shoot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def ablate(page: Page, node: str) -> None:
    page.get_by_role("button", name=f"Ablate {node}", exact=True).first.click()
    expect(page.get_by_role("button", name=f"Remove: ablate {node}")).to_be_visible()
    answered(page)


def library(page: Page, tab: str) -> Locator:
    """The dialog of explanations, at one of its tabs."""
    page.get_by_role("button", name=re.compile(r"^\d+ explanations?")).click()
    shown = page.get_by_role("dialog", name="Explanations", exact=True)
    tabs = shown.get_by_role("group", name="What to do with them")
    if tabs.get_by_role("button", name=tab).get_attribute("aria-pressed") != "true":
        tabs.get_by_role("button", name=tab).click()
    return shown
