"""Continuing the prompt, and what a component is without one, in a real browser."""

import json
import re
import subprocess
import sys

import pytest
from playwright.sync_api import Page, expect

from tests.web.driving import ablate, answered, calls, head, rows, shoot, start

pytestmark = pytest.mark.browser


def text(page: Page, branch: str) -> str:
    return page.locator(f".branch[data-branch={branch}] .generated").inner_text()


def test_the_prompt_is_continued_beside_its_twin(page: Page) -> None:
    start(page)
    page.keyboard.press("g")
    generated = page.locator(".generated .token")
    expect(generated.first).to_have_text(" Mary")
    expect(page.locator(".branch")).to_have_count(1)

    for _ in range(5):
        ablate(page, head(page))
    expect(page.locator(".branches")).to_have_attribute("data-outdated", "")
    page.get_by_role("textbox", name="tokens").fill("6")
    page.get_by_role("textbox", name="temperature").fill("1.5")
    page.get_by_role("textbox", name="seed").fill("3")
    page.get_by_label("past the end").check()
    with page.expect_request("**/Generate") as asked:
        page.get_by_role("button", name="generate").click()
    expect(page.get_by_role("button", name="generate")).to_be_visible()
    expect(page.locator(".branch")).to_have_count(2)
    for branch in ("edited", "twin"):
        expect(page.locator(f".branch[data-branch={branch}] .token")).to_have_count(6)
    differing = page.locator(".branch .differs").count()
    assert differing > 0
    assert differing % 2 == 0
    expect(page).to_have_url(re.compile("continue=6%2C1.5%2C3&past_end|continue=6,1.5,3&past_end"))
    request = json.loads(asked.value.post_data or "")
    assert (request["twin"], request["seed"]) == (True, 3)
    shoot(page, "continued")
    drawn = text(page, "edited")
    page.get_by_role("button", name="generate").click()
    expect(page.locator(".branch[data-branch=edited] .token")).to_have_count(6)
    assert text(page, "edited") == drawn


def test_what_cannot_be_generated_is_a_sentence_in_the_panel(page: Page) -> None:
    start(page)
    page.get_by_role("textbox", name="tokens").fill("99999")
    page.get_by_role("button", name="generate").click()
    expect(page.locator(".continuation [role=alert]")).to_contain_text("max_new_tokens")
    expect(page.locator(".notice")).to_have_count(0)


def test_a_program_that_was_copied_runs(page: Page) -> None:
    start(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for panel, says in ((".continuation", "' Mary'"), (".objective-card", "")):
        page.locator(panel).get_by_role("button", name="copy as Python").click()
        expect(page.get_by_text("copied")).to_be_visible()
        program = page.evaluate("navigator.clipboard.readText()")
        said = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert says in said.stdout
        expect(page.get_by_text("copied")).to_have_count(0)


def test_a_component_is_described_and_so_are_those_like_it(page: Page) -> None:
    start(page)
    asked = calls(page)
    rows(page).and_(page.locator("[data-node^='neuron.']")).first.click()
    component = page.locator(".component")
    expect(component.locator("dt")).to_contain_text([re.compile("similar"), re.compile("writes")])
    own = component.locator("code").inner_text()
    likest = component.locator("dt:text-is('similar') + dd button").first
    other = likest.locator(".token").inner_text()
    likest.click()
    expect(component.locator("code")).to_have_text(other)
    component.get_by_role("button", name=f"back to {own}").click()
    expect(component.locator("code")).to_have_text(own)
    answered(page)
    assert asked.count("DescribeComponent") == 2
    spare = component.evaluate("e => e.scrollHeight - e.clientHeight")
    assert spare <= 0
    shoot(page, "component")
