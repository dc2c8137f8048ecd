"""The page in a real browser, on the real product: a first visitor, and what may go wrong.

One product is started for the module, exactly as a user starts it. Every test gets a fresh browser
context, and whatever the browser complains about, or fetches from elsewhere, fails the test.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Route,
    expect,
    sync_playwright,
)

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "test-results"
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
PROMPT = "When Mary and John went to the store, John gave a drink to"
ATTRIBUTE = "**/tdb.inference.v1.InferenceService/Attribute"
# What Chromium itself says about a refused call; the page says it in a sentence as well.
REFUSED = re.compile(
    r"Failed to load resource: (the server responded with a status of 4\d\d|net::ERR_FAILED)"
)


def _absent(what: str) -> None:
    """Without it there is nothing to test here; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the product, started as a user starts it."""
    if not (ROOT / "gateway" / "static" / "index.html").is_file():
        _absent("the page is not built: run `npm run build` in web/")
    folder = tmp_path_factory.mktemp("product")
    env = {key: value for key, value in os.environ.items() if not key.startswith("TDB_")}
    env |= {
        "TDB_GATEWAY_PORT": "0",
        "TDB_INFERENCE_PORT": "0",
        "TDB_DATA_DIR": str(folder / "data"),
    }
    said = folder / "said.txt"
    with (
        said.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "tdb.cli", "up", "--demo"],
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
    pytest.fail(f"`tdb up --demo` printed no URL. It said:\n{said.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if executable is None:
        _absent("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


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


@pytest.fixture
def complaints(page: Page, product: str) -> Complaints:
    return Complaints(page, product)


@pytest.fixture
def page(browser: Browser, product: str) -> Iterator[Page]:
    context = browser.new_context(
        base_url=product, viewport={"width": 1280, "height": 860}, reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(10_000)
    own = Complaints(page, product)
    yield page
    context.close()
    assert [text for text in own if not REFUSED.match(text)] == []


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
    """Names of the calls made from now on, as they are made."""
    names: list[str] = []

    def note(url: str) -> None:
        if "/tdb.inference.v1.InferenceService/" in url:
            names.append(url.rsplit("/", 1)[1])

    page.on("request", lambda request: note(request.url))
    return names


def shoot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def ablate(page: Page, node: str) -> None:
    page.get_by_role("button", name=f"Ablate {node}", exact=True).first.click()
    expect(page.get_by_role("button", name=f"Remove: ablate {node}")).to_be_visible()
    answered(page)


def test_the_first_visitor_s_journey(page: Page, complaints: Complaints) -> None:
    difference = start(page)
    expect(page.get_by_label("prompt", exact=True)).to_have_value(PROMPT)
    assert difference > 0
    assert rows(page).count() == 50
    expect(page.locator("tr.row").first).to_have_attribute("data-node", re.compile(r"^head\."))
    expect(page.locator(".logits tr.target")).to_contain_text("␣Mary")
    expect(page.locator(".logits tr.distractor")).to_contain_text("␣John")
    shoot(page, "start")

    node = head(page)
    ablate(page, node)
    assert number(page) < difference
    assert number(page, "objective-before") == pytest.approx(difference, rel=1e-4)
    headings = page.locator(".node-table thead").inner_text()
    assert all(word in headings for word in ("before", "after", "diff."))
    before, after, change = (
        float(cell.get_attribute("data-value") or "nan")
        for cell in page.locator(f"tr[data-node='{node}'] td.totalEffect").all()
    )
    assert before > 0
    assert after == 0
    assert change == pytest.approx(-before)
    receipt = page.locator(".edit .receipt")
    expect(receipt).to_contain_text("1 site")
    expect(receipt).to_contain_text("→ 0")
    shoot(page, "ablated")

    page.get_by_role("button", name="Remove: ablate").click()
    expect(page.locator(".edit")).to_have_count(0)
    answered(page)
    assert number(page) == pytest.approx(difference, rel=1e-4)
    expect(page.get_by_test_id("objective-before")).to_have_count(0)
    assert complaints == []


def test_a_link_shows_exactly_the_same(page: Page, browser: Browser) -> None:
    start(page)
    ablate(page, head(page))
    ablate(page, head(page))
    shown = page.locator(".node-table").inner_text()
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(page.url)
        answered(other)
        assert number(other) == pytest.approx(number(page), rel=1e-4)
        assert other.locator(".node-table").inner_text() == shown
        assert other.locator(".edit").count() == 2
        assert other.url == page.url


def test_undo_goes_back_without_asking(page: Page) -> None:
    difference = start(page)
    ablate(page, head(page))
    asked = calls(page)
    page.keyboard.press("u")
    expect(page.locator(".edit")).to_have_count(0)
    assert number(page) == difference
    assert asked == []


def test_the_keyboard_moves_and_ablates(page: Page) -> None:
    start(page)
    node = head(page)
    chosen = page.locator("tr[data-chosen]")
    for _ in range(rows(page).count()):
        page.keyboard.press("j")
        if chosen.get_attribute("data-node") == node:
            break
    expect(page.locator("tr.details")).to_contain_text("estimated total effect")
    page.keyboard.press("a")
    expect(page.locator(".edit")).to_contain_text(f"ablate {node}")
    answered(page)
    page.keyboard.press("Escape")
    expect(page.locator("tr.details")).to_have_count(0)


def test_typing_tokenises_and_only_enter_asks(page: Page) -> None:
    start(page)
    asked = calls(page)
    prompt = page.get_by_label("prompt", exact=True)
    prompt.fill(PROMPT.replace("drink", "book"))
    expect(page.get_by_label("Tokens of the prompt")).to_contain_text("␣book")
    assert set(asked) == {"Tokenize"}
    before = page.url
    prompt.press("Enter")
    answered(page)
    assert "Attribute" in asked
    assert page.url != before


def test_a_target_of_two_tokens_is_a_sentence_under_its_field(page: Page) -> None:
    start(page)
    field = page.get_by_role("combobox", name="target")
    asked = calls(page)
    field.fill("␣Mary␣John")
    says = page.locator("#target-field-says")
    expect(says).to_contain_text("2 tokens")
    field.press("Enter")
    expect(says).to_have_attribute("role", "alert")
    assert "Attribute" not in asked
    assert field.input_value() == "␣Mary␣John"
    shoot(page, "two-tokens")


def test_a_refused_target_of_a_link_is_a_sentence_under_its_field(page: Page) -> None:
    page.goto(f"#prompt={quote(PROMPT)}&target={quote(' Mary John')}&distractor={quote(' John')}")
    expect(page.locator("#target-field-says")).to_contain_text("not one")
    expect(page.locator(".choices.target [data-wrong]")).to_have_count(1)


def test_the_model_suggests_targets(page: Page) -> None:
    start(page)
    page.get_by_label("Remove target ␣Mary").click()
    field = page.get_by_role("combobox", name="target")
    field.focus()
    expect(page.get_by_role("option", name="␣Mary")).to_be_visible()
    shoot(page, "suggestions")
    field.press("ArrowDown")
    field.press("Enter")
    expect(page.locator(".choices.target .chip")).to_have_count(1)


def test_a_prompt_beyond_the_context_is_a_sentence_under_it(page: Page) -> None:
    difference = start(page)
    page.get_by_label("prompt", exact=True).fill("the store " * 3000)
    page.get_by_label("prompt", exact=True).press("Enter")
    expect(page.locator("#prompt-says[role=alert]")).to_contain_text("reads at most")
    expect(page.locator("main[data-stale]")).to_be_visible()
    assert number(page) == difference


def test_an_empty_prompt_is_a_sentence_under_it(page: Page) -> None:
    start(page)
    page.get_by_label("prompt", exact=True).fill("")
    page.get_by_label("prompt", exact=True).press("Enter")
    expect(page.locator("#prompt-says[role=alert]")).to_contain_text("Type a prompt")


def test_an_edit_that_names_nothing_is_a_sentence_at_its_chip(page: Page) -> None:
    start(page)
    page.goto(f"{page.url}&edit=zero:head.99.0~1-0")
    chip = page.locator(".edits li", has_text="head.99.0~1-0")
    expect(chip.get_by_role("alert")).to_contain_text("does not exist")
    page.get_by_role("button", name="Remove: ablate head.99.0").click()
    answered(page)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_an_embedding_says_why_it_cannot_be_ablated(page: Page) -> None:
    start(page)
    page.get_by_role("combobox", name="rows").select_option("1000")
    answered(page)
    page.get_by_role("button", name="act", exact=False).first.click()
    embedding = page.get_by_role("button", name="Ablate embed~").first
    expect(embedding).to_be_disabled()
    expect(embedding).to_have_attribute("title", re.compile("cannot be ablated yet"))


def test_a_service_that_fails_leaves_the_answer_and_a_way_to_try_again(page: Page) -> None:
    start(page)
    page.route(
        ATTRIBUTE,
        lambda route: route.fulfill(
            status=400,
            content_type="application/json",
            body='{"code":"unavailable","message":"the engine is draining","details":[]}',
        ),
    )
    page.get_by_role("button", name="rerun").click()
    notice = page.locator(".notice")
    expect(notice).to_contain_text("The engine is draining.")
    assert rows(page).count() == 50
    shoot(page, "unavailable")
    page.unroute(ATTRIBUTE)
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_have_count(0)
    answered(page)


def test_a_service_that_is_starting_is_waited_for(page: Page) -> None:
    page.route("**/GetModel", lambda route: route.abort())
    page.goto("")
    expect(page.locator(".notice")).to_contain_text("cannot be reached")
    page.unroute("**/GetModel")
    answered(page)
    expect(page.locator(".notice")).to_have_count(0)


def test_a_server_that_wants_a_token_is_given_one(page: Page) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer s3cret":
            route.continue_()
        else:
            body = '{"code":"unauthenticated","message":"a token is needed","details":[]}'
            route.fulfill(status=401, content_type="application/json", body=body)

    page.route("**/tdb.inference.v1.InferenceService/*", guard)
    page.goto("")
    field = page.locator("#bearer")
    for token, says in (("wrong", "did not accept"), ("s3cret", None)):
        field.fill(token)
        field.press("Enter")
        if says:
            expect(page.locator(".unlock")).to_contain_text(says)
    answered(page)
    expect(page.locator(".unlock")).to_have_count(0)
    assert "s3cret" not in page.url


def test_a_link_to_a_model_that_is_not_served_says_so(page: Page) -> None:
    page.goto(f"#model=nobody&prompt={quote(PROMPT)}&target={quote(' Mary')}")
    expect(page.locator(".notice")).to_contain_text("nobody")
    expect(page.get_by_label("prompt", exact=True)).to_have_value(PROMPT)
    page.get_by_label("prompt", exact=True).press("Enter")
    answered(page)
    expect(page.locator(".notice")).to_have_count(0)


def test_an_example_is_a_link(page: Page) -> None:
    start(page)
    page.get_by_label("Examples").get_by_role("link").nth(2).click()
    expect(page.get_by_label("prompt", exact=True)).not_to_have_value(PROMPT)
    answered(page)
    page.go_back()
    expect(page.get_by_label("prompt", exact=True)).to_have_value(PROMPT)
    answered(page)


def test_the_request_can_be_copied(page: Page) -> None:
    start(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="copy as curl").click()
    expect(page.get_by_text("copied")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["objectiveValue"] == pytest.approx(number(page), rel=1e-4)


def test_a_long_table_draws_only_what_is_in_sight(page: Page) -> None:
    start(page)
    page.get_by_role("combobox", name="rows").select_option("1000")
    answered(page)
    expect(page.locator(".table-bar")).to_contain_text("1000 nodes")
    assert rows(page).count() < 120
    first = rows(page).first.get_attribute("data-node")
    page.locator("main").evaluate("main => main.scrollTo(0, 15000)")
    expect(rows(page).first).not_to_have_attribute("data-node", first or "")


def test_a_token_filters_the_table(page: Page) -> None:
    start(page)
    page.get_by_label("Tokens of the prompt").get_by_role("button").nth(1).click()
    nodes = [row.get_attribute("data-node") or "" for row in rows(page).all()]
    assert nodes
    assert all(re.search(r"[~-]1$|~1-", node) for node in nodes)


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize(
    ("device", "width", "height"), [("desk", 1280, 860), ("tablet", 820, 1180)]
)
def test_everything_fits(page: Page, look: str, device: str, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if look == "dark" else "light")
    start(page)
    for _ in range(2):
        for scroller in ("html", "main"):
            spare = page.locator(scroller).evaluate("e => e.scrollWidth - e.clientWidth")
            assert spare <= 0, f"{scroller} is {spare} px too wide"
        ablate(page, head(page))
    rows(page).nth(2).click()
    shoot(page, f"{device}-{look}")


def test_every_control_has_a_name(page: Page) -> None:
    start(page)
    ablate(page, head(page))
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim()
                || e.labels?.length))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_a_complaint_of_the_browser_is_caught(browser: Browser, product: str) -> None:
    """The negative control of what every other test relies on."""
    with browser.new_context() as context:
        page = context.new_page()
        complaints = Complaints(page, product)
        page.set_content("<script>setTimeout(() => { throw new Error('planted'); })</script>")
        page.evaluate("console.error('said')")
        page.evaluate("fetch('http://127.0.0.1:9/elsewhere').catch(() => {})")
        page.wait_for_timeout(200)
        assert any("planted" in text for text in complaints)
        assert "said" in complaints
        assert "fetched http://127.0.0.1:9/elsewhere" in complaints
