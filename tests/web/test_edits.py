"""What the menu of a row does to the run, in a real browser."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.web.driving import PROMPT, answered, calls, head, number, rows, shoot, start

pytestmark = pytest.mark.browser
OTHER = PROMPT.replace("John gave", "Mary gave")


def compare(page: Page, prompt: str) -> None:
    page.get_by_role("button", name="compare with another prompt").click()
    page.get_by_role("textbox", name="prompt B").fill(prompt)
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("objective-before")).to_be_visible()
    answered(page)


def offer(page: Page, node: str, label: str) -> None:
    page.get_by_role("button", name=f"Actions of {node}", exact=True).click()
    page.get_by_role("menuitem", name=re.compile(f"^{label}")).click()
    expect(page.get_by_role("menu")).to_have_count(0)


def value(page: Page, node: str, side: str) -> float:
    cell = page.locator(f"tr.row[data-node='{node}'] td.activation.{side}")
    return float(cell.get_attribute("data-value") or "nan")


def test_a_head_gets_its_value_of_prompt_b(page: Page) -> None:
    start(page)
    compare(page, OTHER)
    node = head(page)
    there = value(page, node, "before")
    page.get_by_role("button", name=f"Actions of {node}", exact=True).click()
    shoot(page, "menu")
    page.keyboard.press("p")
    chips = page.locator(".edit")
    expect(chips.first).to_contain_text(f"patch {node} from B")
    expect(page.get_by_role("combobox", name="beside")).to_have_value("untouched")
    answered(page)
    assert value(page, node, "after") == pytest.approx(there, abs=1e-5)
    expect(page.locator(".receipt").first).to_contain_text("1 site")
    shoot(page, "patched")


def test_a_pair_is_masked_and_takes_the_place_of_its_ablation(page: Page) -> None:
    difference = start(page)
    node = head(page)
    page.get_by_role("button", name=f"Ablate {node}", exact=True).first.click()
    answered(page)
    offer(page, node, "mask")
    expect(page.locator(".edit")).to_have_count(1)
    expect(page.locator(".edit").first).to_contain_text(f"mask {node}")
    answered(page)
    assert value(page, node, "after") == 0
    assert number(page) != pytest.approx(difference, rel=1e-4)


def test_means_and_directions(page: Page) -> None:
    start(page)
    compare(page, OTHER)
    neuron = rows(page).and_(page.locator("[data-node^='neuron.']")).first
    node = neuron.get_attribute("data-node") or ""
    offer(page, node, "mean of A and B")
    expect(page.locator(".edit")).to_contain_text(f"mean {node} over 2 prompts, by position")
    answered(page)
    offer(page, node, "project out")
    expect(page.locator(".edit").last).to_contain_text(f"project {node.split('~')[0]} out of")
    answered(page)
    expect(page.locator(".receipt")).to_have_count(2)


def test_without_a_prompt_b_the_menu_says_what_is_missing(page: Page) -> None:
    start(page)
    node = head(page)
    asked = calls(page)
    page.get_by_role("button", name=f"Actions of {node}", exact=True).click()
    patch = page.get_by_role("menuitem", name=re.compile("^patch from B"))
    expect(patch).to_have_attribute("aria-disabled", "true")
    expect(patch).to_contain_text("another prompt")
    page.keyboard.press("p")
    expect(page.get_by_role("menu")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("menu")).to_have_count(0)
    expect(page.get_by_role("button", name=f"Actions of {node}", exact=True)).to_be_focused()
    assert asked == []
