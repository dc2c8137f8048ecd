"""Exact effects beside the estimates, and a second prompt beside the first, in a real browser."""

import json
import re

import pytest
from playwright.sync_api import Page, expect

from tests.web.driving import PROMPT, ablate, answered, head, number, rows, shoot, start

pytestmark = pytest.mark.browser
OTHER = PROMPT.replace("John gave", "Mary gave")


def verified(page: Page) -> dict[str, float]:
    return {
        row.get_attribute("data-node") or "": float(value)
        for row in rows(page).all()
        if (value := row.locator("td.verifiedEffect").get_attribute("data-value"))
    }


def test_every_row_is_verified_and_a_new_run_forgets_it(page: Page) -> None:
    difference = start(page)
    with page.expect_request("**/Verify") as asked:
        page.keyboard.press("V")
    expect(page.locator(".verification")).to_contain_text(
        re.compile(r"rank correlation \+0\.\d+ over 50 nodes")
    )
    effects = verified(page)
    assert set(json.loads(asked.value.post_data or "")["nodes"]) == set(effects)
    assert len(effects) == 50
    shoot(page, "verified")
    node = head(page)
    ablate(page, node)
    assert difference - number(page) == pytest.approx(effects[node], rel=1e-3)
    assert verified(page) == {}
    page.keyboard.press("u")
    assert verified(page) == effects


def test_a_row_is_verified_by_its_key_and_other_rows_leave_it_its_value(page: Page) -> None:
    start(page)
    page.keyboard.press("j")
    page.keyboard.press("v")
    first = rows(page).first
    expect(first.locator("td.verifiedEffect")).to_have_attribute("data-value", re.compile(r"\d"))
    expect(page.locator("tr.details")).to_contain_text("verified total effect")
    spare = page.locator(".details-box").evaluate("e => e.scrollHeight - e.clientHeight")
    assert spare <= 0
    effects = verified(page)
    assert len(effects) == 1
    page.get_by_role("combobox", name="rows").select_option("20")
    answered(page)
    expect(rows(page)).to_have_count(20)
    assert verified(page) == effects


def test_prompt_b_stands_beside_the_first(page: Page) -> None:
    difference = start(page)
    page.get_by_role("button", name="compare with another prompt").click()
    field = page.get_by_role("textbox", name="prompt B")
    expect(field).to_be_focused()
    field.fill(OTHER)
    expect(page.get_by_label("Tokens of prompt B")).to_contain_text("␣Mary")
    field.press("Enter")
    expect(page.get_by_test_id("objective-before")).to_be_visible()
    answered(page)
    assert number(page) == pytest.approx(difference, rel=1e-4)
    assert number(page, "objective-before") < 0
    headings = page.locator(".node-table thead").inner_text()
    assert "before" not in headings
    assert re.search(r"total\s+B", headings)
    ablate(page, head(page))
    assert number(page, "objective-before") == pytest.approx(difference, rel=1e-4)
    page.get_by_role("combobox", name="beside").select_option("b")
    answered(page)
    assert number(page, "objective-before") < 0
    shoot(page, "beside-b")
    page.get_by_role("button", name="remove", exact=True).click()
    answered(page)
    assert "compare=" not in page.url
