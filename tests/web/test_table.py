"""The node table in a real browser: sorting, filtering, read-outs and edits of a row."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.web.driving import ablate, answered, calls, head, number, rows, shoot, start

pytestmark = pytest.mark.browser
GET_MODEL = "**/tdb.inference.v1.InferenceService/GetModel"
LONGEST_MS = 100


def nodes(page: Page) -> list[str]:
    return [row.get_attribute("data-node") or "" for row in rows(page).all()]


def filter_field(page: Page, column: str) -> Locator:
    return page.get_by_role("textbox", name=f"Filter by {column}", exact=True)


def says_supports(page: Page, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """From now on the service tells something else of what it can do; all else is its own."""

    def answer(route: Route) -> None:
        response = route.fetch()
        facts = json.loads(response.text())
        change(facts["supports"])
        route.fulfill(response=response, body=json.dumps(facts))

    page.route(GET_MODEL, answer)


def without(*features: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(supports: list[dict[str, Any]]) -> None:
        for each in supports:
            if each["feature"] in features:
                each.pop("supported", None)
                each["reason"] = "left out by this test"

    return change


def test_a_long_table_draws_only_what_is_in_sight(page: Page) -> None:
    start(page)
    page.get_by_role("combobox", name="rows").select_option("1000")
    answered(page)
    expect(page.locator(".table-bar")).to_contain_text("1000 rows")
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


def test_the_address_and_the_place_sort(page: Page) -> None:
    start(page)
    page.get_by_role("button", name="node", exact=True).click()
    found = nodes(page)
    numbers = [[int(n) for n in re.findall(r"\d+", node)] for node in found if node[:4] == "head"]
    assert len(numbers) > 2
    assert numbers == sorted(numbers)
    page.get_by_role("button", name="at", exact=True).click()
    places = [int(node.split("~")[1].split("-")[0]) for node in nodes(page)]
    assert places == sorted(places)
    expect(page.locator("thead th.at")).to_have_attribute("aria-sort", "ascending")


def test_a_filter_shows_counts_and_explains_what_it_hides(page: Page) -> None:
    start(page)
    every = nodes(page)
    asked = calls(page)
    page.keyboard.press("f")
    expect(page.locator("#filter-node")).to_be_focused()
    page.keyboard.type("embed")
    embeddings = [node for node in every if node.startswith("embed")]
    assert 0 < len(embeddings) < len(every)
    assert nodes(page) == embeddings
    bar = page.locator(".table-bar")
    expect(bar).to_contain_text(f"{len(embeddings)} of 50 rows")
    expect(page).to_have_url(re.compile("filter=node"))
    assert asked == []

    def direct(where: str) -> float:
        cells = page.locator(f"{where} td.directEffect").all()
        return sum(float(cell.get_attribute("data-value") or "nan") for cell in cells)

    hidden = page.locator("tfoot tr", has_text="hidden by filters").locator("td.directEffect")
    text = (hidden.get_attribute("title") or "").replace("−", "-")
    shown = direct("tr.row")
    page.keyboard.press("Escape")
    assert float(text) + shown == pytest.approx(direct("tr.row"), abs=1e-9)
    expect(page.locator("tfoot")).not_to_contain_text("hidden by filters")
    expect(bar).to_contain_text("50 rows")
    expect(bar.get_by_role("button", name="Remove filter")).to_have_count(0)


def test_every_column_filters_and_the_link_keeps_it(page: Page, browser: Browser) -> None:
    start(page)
    ablate(page, head(page))
    every = nodes(page)
    for column in page.locator(".node-table thead input").all():
        name = (column.get_attribute("aria-label") or "").removeprefix("Filter by ")
        column.fill({"node": "neuron", "at": "13"}.get(name, "0.2"))
        expect(page.locator(".filters .chip")).to_have_count(1)
        few = nodes(page)
        assert len(few) < len(every), name
        column.fill("")
        expect(page.locator(".filters .chip")).to_have_count(0)
        assert nodes(page) == every
    filter_field(page, "total diff.").fill("> 0.01")
    filter_field(page, "at").fill("13")
    expect(page.locator(".filters .chip")).to_have_count(2)
    values = page.locator("tr.row td.totalEffect.difference").all()
    assert values
    assert all(float(cell.get_attribute("data-value") or "nan") > 0.01 for cell in values)
    expect(page).to_have_url(re.compile("filter=at.*filter=totalEffect.difference"))
    shoot(page, "filtered")
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(page.url)
        answered(other)
        assert nodes(other) == nodes(page)
    page.get_by_role("button", name="Remove filter: total diff.").click()
    expect(page.locator(".filters .chip")).to_have_count(1)
    expect(page).not_to_have_url(re.compile("difference"))


def test_a_filter_that_nothing_passes_says_so(page: Page) -> None:
    start(page)
    filter_field(page, "total").fill("1000")
    expect(rows(page)).to_have_count(0)
    nothing = page.locator(".nothing")
    expect(nothing).to_contain_text("No row passes the filters")
    expect(page.locator(".table-bar")).to_contain_text("0 of 50 rows")
    shoot(page, "nothing")
    nothing.get_by_role("button", name="clear filters").click()
    expect(rows(page)).to_have_count(50)
    expect(filter_field(page, "total")).to_have_value("")
    assert "filter" not in page.url


def test_a_filter_that_cannot_be_read_is_a_sentence(page: Page) -> None:
    start(page)
    field = filter_field(page, "direct")
    field.fill("much")
    expect(page.locator(".table-bar [role=alert]")).to_contain_text("no condition on direct")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(rows(page)).to_have_count(50)
    field.fill("+")
    expect(page.locator(".table-bar [role=alert]")).to_have_count(0)
    assert 0 < rows(page).count() < 50
    page.goto(f"{page.url.split('&filter')[0]}&filter=at:here")
    expect(page.locator(".notice")).to_contain_text("cannot be read")


def test_tokens_are_added_with_shift(page: Page) -> None:
    start(page)
    strip = page.get_by_label("Tokens of the prompt").get_by_role("button")
    strip.nth(1).click()
    one = set(nodes(page))
    strip.nth(3).click(modifiers=["Shift"])
    expect(filter_field(page, "at")).to_have_value("1, 3")
    assert set(nodes(page)) > one
    strip.nth(3).click(modifiers=["Shift"])
    strip.nth(1).click()
    expect(rows(page)).to_have_count(50)


def test_a_thousand_rows_stay_quick(page: Page) -> None:
    start(page)
    page.get_by_role("combobox", name="rows").select_option("1000")
    answered(page)
    spent = page.evaluate(
        """async () => {
            const painted = () => new Promise((done) =>
                requestAnimationFrame(() => setTimeout(done)));
            const timed = async (act) => {
                await painted();
                const began = performance.now();
                act();
                await painted();
                return performance.now() - began;
            };
            const field = document.querySelector("#filter-node");
            const type = (text) => () => {
                field.value = text;
                field.dispatchEvent(new Event("input", { bubbles: true }));
            };
            const sort = () => document.querySelector("th.totalEffect button").click();
            const best = { filter: Infinity, sort: Infinity };
            for (let i = 0; i < 5; i++) {
                best.filter = Math.min(best.filter, await timed(type(i % 2 ? "" : "head")));
                best.sort = Math.min(best.sort, await timed(sort));
            }
            return best;
        }"""
    )
    assert spent["filter"] < LONGEST_MS, spent
    assert spent["sort"] < LONGEST_MS, spent


def test_read_outs_stand_in_the_row_and_below_it(page: Page) -> None:
    with page.expect_response("**/Attribute") as answer:
        start(page)
    said = page.locator("tr.does")
    expect(said).to_have_count(50)
    heights = {e.evaluate("e => e.getBoundingClientRect().height") for e in said.all()}
    assert len(heights) == 1
    told = next(
        row
        for row in answer.value.json()["rows"]
        if row["node"].startswith("head.")
        and {score["score"] > 0 for score in row["outputTokens"]} == {True, False}
    )
    row = page.locator(f"tr.row[data-node='{told['node']}']")
    expect(row.locator("+ tr.does")).to_contain_text(re.compile("promotes .* ?demotes "))
    row.click()
    details = page.locator(".details-box > .read-outs")
    for name, sign in (("promotes", 1), ("demotes", -1)):
        chips = details.locator(f"dt:text-is('{name}') + dd .chip").all()
        titles = [chip.get_attribute("title") or "" for chip in chips]
        shown = [float(re.findall(r": (\S+) logits", t)[0].replace("−", "-")) for t in titles]
        scores = [score["score"] for score in told["outputTokens"] if sign * score["score"] > 0]
        assert shown == pytest.approx(sorted(scores, key=abs, reverse=True))
    expect(details.locator("dt")).to_have_text(
        ["promotes", "demotes", "reads by query", "reads by key"]
    )
    spare = page.locator(".details-box").evaluate("e => e.scrollHeight - e.clientHeight")
    assert spare <= 0
    shoot(page, "read-outs")


def test_without_read_outs_the_reason_stands_in_their_place(page: Page) -> None:
    says_supports(page, without("attribute.read_outs"))
    with page.expect_request("**/Attribute") as asked:
        start(page)
    assert "readOuts" not in (asked.value.post_data or "readOuts")
    expect(page.locator("tr.does")).to_have_count(0)
    rows(page).first.click()
    expect(page.locator(".details-box")).to_contain_text(
        "No token read-outs: Left out by this test."
    )


def test_a_value_is_set_and_a_head_is_scaled(page: Page) -> None:
    difference = start(page)
    node = head(page)
    rows(page).and_(page.locator(f"[data-node='{node}']")).click()
    page.get_by_role("button", name=f"Scale {node}", exact=True).click()
    field = page.get_by_role("textbox", name=f"Factor for {node}")
    expect(field).to_be_focused()
    asked = calls(page)
    for wrong in ("two", "1e999"):
        field.fill(wrong)
        field.press("Enter")
        expect(page.locator(".value-form [role=alert]")).to_contain_text("Type a number")
    assert asked == []
    field.fill("2")
    field.press("Enter")
    expect(page.locator(".edit")).to_contain_text(f"scale {node} × 2")
    answered(page)
    assert number(page) != pytest.approx(difference, rel=1e-4)
    receipt = page.locator(".receipt").inner_text()
    before, after = (float(x) for x in re.findall(r"([\d.]+) → ([\d.]+)", receipt)[0])
    assert after == pytest.approx(2 * before, rel=0.02)

    page.get_by_role("button", name=f"Set {node}", exact=True).click()
    page.get_by_role("textbox", name=f"New value of {node}").fill("0.5")
    shoot(page, "set")
    page.keyboard.press("Enter")
    expect(page.locator(".edit")).to_have_count(1)
    expect(page.locator(".edit")).to_contain_text(f"set {node} = 0.5")
    answered(page)
    expect(page.locator(".receipt")).to_contain_text("→ 0.500")
    page.get_by_role("button", name=f"Set {node}", exact=True).click()
    page.keyboard.press("Escape")
    expect(page.locator(".value-form")).to_have_count(0)


def test_an_embedding_is_ablated_but_not_set(page: Page) -> None:
    difference = start(page)
    node = next(node for node in nodes(page) if node.startswith("embed~"))
    rows(page).and_(page.locator(f"[data-node='{node}']")).click()
    expect(page.get_by_role("button", name=f"Set {node}", exact=True)).to_be_disabled()
    page.keyboard.press("a")
    expect(page.locator(".edit")).to_contain_text(f"ablate {node}")
    answered(page)
    assert number(page) != pytest.approx(difference, rel=1e-4)


def test_what_is_not_supported_says_why(page: Page) -> None:
    says_supports(page, without("target.residual", "intervention.scale"))
    start(page)
    asked = calls(page)
    node = next(node for node in nodes(page) if node.startswith("embed~"))
    rows(page).and_(page.locator(f"[data-node='{node}']")).click()
    embedding = page.get_by_role("button", name=f"Ablate {node}").first
    expect(embedding).to_be_disabled()
    expect(embedding).to_have_attribute("title", re.compile("cannot be edited: Left out"))
    page.keyboard.press("a")
    node = head(page)
    rows(page).and_(page.locator(f"[data-node='{node}']")).click()
    expect(page.get_by_role("button", name=f"Scale {node}", exact=True)).to_be_disabled()
    assert "Attribute" not in asked


def test_the_logit_lens_follows_the_chosen_token(page: Page) -> None:
    start(page)
    page.get_by_role("button", name="logit lens").click()
    lens = page.get_by_role("region", name="Logit lens")
    points = lens.locator("tbody th")
    expect(points).to_have_text(["embed", *(f"resid_post.{layer}" for layer in range(4))])
    expect(lens.locator("tbody tr").last).to_contain_text("␣Mary")
    difference = (lens.locator("tbody tr").last.locator("td").first.get_attribute("title")) or ""
    assert float(difference.replace("−", "-")) == pytest.approx(number(page), rel=1e-4)
    page.get_by_label("Tokens of the prompt").get_by_role("button").nth(1).click()
    expect(lens.locator("tbody tr").first).to_contain_text("␣Mary")
    expect(lens.locator("[data-waiting]")).to_have_count(0)
    shoot(page, "lens")
    page.reload()
    answered(page)
    expect(points).to_have_count(5)
