"""Asking why a node is what it is: tracing upstream and back, in a real browser."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.web.driving import PROMPT, answered, calls, number, rows, shoot, start

pytestmark = pytest.mark.browser
CRUMBS = ".crumbs"


def row(page: Page, kind: str) -> tuple[Locator, str]:
    """The first row of a kind of node, and its address."""
    found = page.locator(f"tr.row[data-node^='{kind}']").first
    return found, found.get_attribute("data-node") or ""


def trace(page: Page, kind: str, key: str | None = None) -> str:
    """Traces the first node of the kind by the keyboard; the menu's letter for heads."""
    found, node = row(page, kind)
    found.click()
    with page.expect_request("**/Attribute"):
        page.keyboard.press("t")
        if key:
            expect(page.get_by_role("menu")).to_be_visible()
            page.keyboard.press(key)
    answered(page)
    return node


def steps(page: Page) -> list[str]:
    return parse_qs(urlsplit(page.url).fragment).get("trace", [])


def test_a_head_is_traced_through_q_and_back(page: Page, browser: Browser) -> None:
    difference = start(page)
    card = page.locator(".objective-card")
    head = trace(page, "head.1", "q")
    assert steps(page) == [f"{head}:query"]
    expect(card).to_contain_text(f"Score of {head} through Q")
    expect(card).to_contain_text("with the key held constant")
    score = number(page)
    assert score != pytest.approx(difference, rel=1e-3)
    shoot(page, "traced")

    neuron = trace(page, "neuron.")
    assert steps(page) == [f"{head}:query", neuron]
    expect(card).to_contain_text(f"Pre-activation of {neuron}")
    expect(page.locator(CRUMBS)).to_contain_text(re.compile(rf"Mary.*{head} through Q.*{neuron}"))
    expect(page.locator(".logits tr.target")).to_contain_text("␣Mary")
    shown = page.locator(".node-table").inner_text()
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(page.url)
        answered(other)
        assert number(other) == pytest.approx(number(page), rel=1e-4)
        assert other.locator(".node-table").inner_text() == shown
        expect(other.locator(".logits tr.target")).to_contain_text("␣Mary")

    page.locator(CRUMBS).get_by_role("button", name=f"{head} through Q", exact=True).click()
    answered(page)
    assert number(page) == pytest.approx(score, rel=1e-4)
    asked = calls(page)
    page.keyboard.press("u")
    expect(card).to_contain_text(f"Pre-activation of {neuron}")
    assert asked == []
    page.get_by_role("button", name=f"Stop tracing {head} through Q").click()
    answered(page)
    assert steps(page) == [neuron]
    page.locator(CRUMBS).get_by_role("button", name="logit difference").click()
    answered(page)
    assert steps(page) == []
    assert number(page) == pytest.approx(difference, rel=1e-4)


def test_v_is_traced_on_what_comes_before_and_not_on_itself(page: Page) -> None:
    start(page)
    first = trace(page, "head.1", "v")
    expect(page.locator(".meaning")).to_contain_text("on logit difference ␣Mary − ␣John")
    found, node = row(page, "head.")
    found.click()
    button = page.get_by_role("button", name=f"trace {node} through V")
    expect(button).to_be_disabled()
    expect(button).to_have_attribute("title", re.compile("itself traced through V"))
    with page.expect_request("**/Attribute") as asked:
        page.get_by_role("button", name=f"trace {node} through K").click()
    answered(page)
    objective = json.loads(asked.value.post_data or "")["objective"]
    assert objective == {"tracedNode": {"node": node, "through": "THROUGH_KEY"}}
    expect(page.locator(CRUMBS)).to_contain_text(f"{first} through V")


def test_a_notice_of_the_service_stands_in_the_card(page: Page) -> None:
    start(page)
    page.goto(f"{page.url}&trace=head.3.0~13-9:query&trace=head.3.1~13-9:value")
    expect(page.locator(".objective-card .warning")).to_be_visible()
    assert number(page) == 0


def test_a_trace_that_names_nothing_is_a_sentence_at_its_crumb(page: Page) -> None:
    start(page)
    page.goto(f"{page.url}&trace=neuron.9.1~3")
    crumb = page.locator(".crumbs li", has_text="neuron.9.1~3")
    expect(crumb.get_by_role("alert")).to_be_visible()
    page.get_by_role("button", name="Stop tracing neuron.9.1~3").click()
    answered(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    assert PROMPT.split()[0] in page.url


def test_an_embedding_has_nothing_upstream(page: Page) -> None:
    start(page)
    asked = calls(page)
    found, _ = row(page, "embed~")
    found.click()
    page.keyboard.press("t")
    expect(page.get_by_role("menuitem")).to_contain_text("Nothing is upstream")
    page.keyboard.press("Escape")
    assert "Attribute" not in asked
    assert rows(page).count() == 50
