"""The page in a real browser, on the real product: a first visitor, and what may go wrong."""

import json
import re
import subprocess
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.web.driving import (
    ATTRIBUTE,
    PROMPT,
    Complaints,
    ablate,
    answered,
    calls,
    head,
    number,
    rows,
    shoot,
    start,
)

pytestmark = pytest.mark.browser


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
    page.locator(".objective-card").get_by_role("button", name="copy as curl").click()
    expect(page.get_by_text("copied")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["objectiveValue"] == pytest.approx(number(page), rel=1e-4)


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
