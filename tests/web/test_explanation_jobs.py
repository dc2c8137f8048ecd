"""Jobs, the library of explanations and imports in a real browser over the real service."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.web.driving import answered, library, rows, shoot, start
from tests.web.planted import DATASET, LAYER, Planted, explainer, forget, planted

pytestmark = pytest.mark.browser
SLOW_MS = 30_000


@pytest.fixture(scope="module")
def there(product: str, product_folder: Path) -> Iterator[Planted]:
    with planted(product, product_folder / "data") as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_explained(there: Planted) -> Iterator[None]:
    yield
    forget(there)


def test_the_rows_of_a_table_become_a_job(page: Page, there: Planted) -> None:
    start(page)
    nodes = [row.get_attribute("data-node") or "" for row in rows(page).all()]
    own = {node.split("~")[0] for node in nodes if node.startswith(f"head.{LAYER}.")}
    page.get_by_role("button", name="explain rows…").click()
    form = page.get_by_role("dialog", name="Explain these rows")
    expect(form).to_contain_text(f"{len(own)} heads of {DATASET}")
    expect(form).to_contain_text("are in no dataset")
    expect(form).to_contain_text("nobody is asked, so it costs nothing")
    shoot(page, "explanations-job-form")
    form.get_by_role("button", name="start", exact=True).click()
    expect(form).to_be_hidden()
    for component in sorted(own):
        cell = page.locator(f"tr.row[data-node^='{component}~'] td.explains").first
        expect(cell).to_contain_text("token pattern · head pairs AUC 1.00", timeout=SLOW_MS)
    page.reload()
    answered(page)
    shown = library(page, "jobs")
    job = shown.get_by_role("listitem").first
    expect(job).to_contain_text(f"done: {len(own)} components")
    expect(job).to_contain_text(f"{len(own)} explained")
    expect(job).to_contain_text("token pattern")
    shoot(page, "explanations-jobs")


def test_a_range_of_a_dataset_becomes_a_job(page: Page, there: Planted) -> None:
    explainer(
        there.product,
        "WriteExplanation",
        {"model": there.of(), "component": f"neuron.{LAYER}.0", "text": "a name"},
    )
    start(page)
    shown = library(page, "jobs")
    shown.get_by_text("new job on a range of a dataset").click()
    shown.get_by_role("combobox", name="dataset").select_option(DATASET)
    shown.get_by_role("combobox", name="group").select_option(f"neuron.{LAYER}")
    last = shown.get_by_role("textbox", name="to", exact=True)
    last.fill("99")
    expect(shown.get_by_role("alert")).to_contain_text("The dataset holds 0 to 15.")
    last.fill("9")
    expect(shown).to_contain_text("10 components; nobody is asked")
    shoot(page, "explanations-job-range")
    shown.get_by_role("button", name="start", exact=True).click()
    job = shown.get_by_role("listitem").filter(has_text=f"neuron.{LAYER}.0 to neuron.{LAYER}.9")
    expect(job.first).to_contain_text("done: 10 components", timeout=SLOW_MS)
    expect(job.first).to_contain_text("8 explained")
    expect(job.first).to_contain_text("2 skipped (2 never active)")


def test_jobs_that_cannot_be_listed_say_why(page: Page, there: Planted) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(status=400, json={"code": "unavailable", "message": "the service starts"})

    page.route("**/ListJobs", refuse)
    start(page)
    shown = library(page, "jobs")
    expect(shown.get_by_role("alert")).to_contain_text("The service starts.")
    page.unroute("**/ListJobs")
    expect(shown.get_by_role("alert")).to_have_count(0, timeout=SLOW_MS)


def test_explanations_are_found_by_words(page: Page, there: Planted) -> None:
    for index, text in enumerate(("names of people", "a shop", "a name, or a shop")):
        explainer(
            there.product,
            "WriteExplanation",
            {"model": there.of(), "component": f"neuron.{LAYER}.{index}", "text": text},
        )
    start(page)
    shown = library(page, "search")
    field = shown.get_by_role("searchbox", name="What is looked for")
    expect(field).to_be_focused()
    expect(shown.get_by_role("option", name="by meaning (not configured)")).to_have_attribute(
        "disabled", ""
    )
    field.fill("name")
    field.press("Enter")
    found = shown.locator(".found li")
    expect(found).to_have_count(2)
    expect(found.first.locator(".theirs")).to_contain_text("human")
    shoot(page, "explanations-search")
    field.fill("name shop")
    field.press("Enter")
    expect(found).to_have_count(1)
    shown.get_by_role("combobox", name="Components").select_option("heads")
    shown.get_by_role("button", name="search", exact=True).last.click()
    expect(shown).to_contain_text("Nothing says that")
    shown.get_by_role("combobox", name="Components").select_option(f"neuron.{LAYER}")
    shown.get_by_role("combobox", name="Method").select_option("METHOD_TOKEN_PATTERN")
    shown.get_by_role("button", name="search", exact=True).last.click()
    expect(shown).to_contain_text("Nothing says that")
    shown.get_by_role("combobox", name="Method").select_option("METHOD_HUMAN")
    shown.get_by_role("button", name="search", exact=True).last.click()
    found.first.get_by_role("button").click()
    expect(page.locator(f"[data-component='neuron.{LAYER}.2']")).to_be_visible()
    expect(page.get_by_role("article").first).to_contain_text("a name, or a shop")


def test_published_explanations_are_taken_over(page: Page, there: Planted) -> None:
    start(page)
    shown = library(page, "import")
    own = shown.get_by_role("listitem").filter(has_text=DATASET)
    expect(own).to_contain_text("2 explanations")
    own.get_by_role("button", name="import").click()
    expect(own).to_contain_text("2 added", timeout=SLOW_MS)
    own.get_by_role("button", name="import").click()
    expect(own).to_contain_text("0 added, 2 were here already", timeout=SLOW_MS)
    shoot(page, "explanations-import")
    shown.get_by_role("button", name="search", exact=True).click()
    shown.get_by_role("combobox", name="Method").select_option("METHOD_IMPORTED")
    field = shown.get_by_role("searchbox", name="What is looked for")
    field.fill("shop games")
    field.press("Enter")
    expect(shown).to_contain_text("Nothing says that")
    field.fill("shop")
    field.press("Enter")
    first = shown.locator(".found li").first
    expect(first.locator(".theirs")).to_contain_text("imported")
    expect(first).to_contain_text("ev_correlation 0.42")
    first.get_by_role("button").click()
    card = page.get_by_role("article").first
    expect(card).to_contain_text("things of a shop")
    expect(card.get_by_role("table")).to_contain_text("0.42")
