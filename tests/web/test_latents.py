"""Latents in the table, and what is known of the dictionaries, in a real browser."""

import json
import re

import pytest
from playwright.sync_api import Page, expect

from tests.web.driving import ablate, answered, number, rows, shoot, start

pytestmark = pytest.mark.browser


def switch(page: Page, sublayer: str, to: str) -> None:
    group = page.get_by_role("group", name=f"What stands for the {sublayer}")
    with page.expect_request("**/Attribute"):
        group.get_by_role("button", name=to, exact=True).click()
    answered(page)
    expect(group.get_by_role("button", name=to, exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )


def kinds(page: Page) -> set[str]:
    nodes = [row.get_attribute("data-node") or "" for row in rows(page).all()]
    return {
        re.sub(r"^latent\.([\w-]+)-\d+\..*", r"latent \1", node).split(".")[0] for node in nodes
    }


def test_latents_stand_for_neurons_and_are_ablated(page: Page) -> None:
    difference = start(page)
    assert "neuron" in kinds(page)
    switch(page, "MLPs", "latents")
    assert {"latent demo-mlp_out", "head"} <= kinds(page)
    assert "neuron" not in kinds(page)
    assert number(page) == pytest.approx(difference, rel=1e-4)
    assert page.url.count("dictionary=demo-mlp_out-") == 4
    switch(page, "attention", "latents")
    assert kinds(page) & {"head", "neuron"} == set()
    assert "dictionary=demo&" in f"{page.url}&"

    foot = page.locator("tfoot")
    expect(foot).to_contain_text("bias + error + rest")
    foot.get_by_role("button", name="parts").click()
    expect(foot).to_contain_text("error.demo-mlp_out-3")
    shoot(page, "latents")

    node = page.locator("tr.row[data-node^='latent.']").first.get_attribute("data-node") or ""
    ablate(page, node)
    assert number(page) != pytest.approx(difference, rel=1e-4)
    expect(page.locator(".receipt")).to_contain_text("→ 0")
    switch(page, "MLPs", "neurons")
    assert "neuron" in kinds(page)
    expect(page.locator(".edit")).to_contain_text(f"ablate {node}")


def test_a_latent_is_traced_and_described(page: Page) -> None:
    start(page)
    switch(page, "MLPs", "latents")
    row = page.locator("tr.row[data-node^='latent.']").first
    node = row.get_attribute("data-node") or ""
    row.click()
    expect(page.locator(".component code")).to_have_text(node.split("~")[0])
    with page.expect_request("**/Attribute") as asked:
        page.keyboard.press("t")
    answered(page)
    assert json.loads(asked.value.post_data or "")["objective"] == {"tracedNode": {"node": node}}
    expect(page.locator(".objective-card")).to_contain_text(f"Pre-activation of {node}")


def test_an_attention_latent_says_which_tokens_it_comes_from(page: Page) -> None:
    start(page)
    switch(page, "attention", "latents")
    rows(page).and_(page.locator("[data-node*='attn_out']")).first.click()
    expect(page.locator(".details-box > .read-outs dt").last).to_have_text("comes from")
    expect(page.locator(".component dt").first).to_have_text("similar")
    spare = page.locator(".details-box").evaluate("e => e.scrollHeight - e.clientHeight")
    assert spare <= 0


def test_the_library_tells_how_well_each_dictionary_does(page: Page) -> None:
    start(page)
    page.get_by_role("button", name="8 dictionaries").click()
    library = page.get_by_role("dialog", name="Dictionaries")
    expect(library.locator("tbody tr")).to_have_count(8)
    expect(library).to_contain_text("demo-attn_out-2")
    expect(library).to_contain_text("mlp_out.3")
    shoot(page, "library")
    page.keyboard.press("Escape")
    expect(library).to_have_count(0)
