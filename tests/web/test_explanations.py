"""Explanations in a real browser over the real service, without a language model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Request, Route, expect

from tests.web.driving import answered, rows, shoot, start
from tests.web.planted import DATASET, LAYER, WORDS, Planted, explainer, forget, planted

pytestmark = pytest.mark.browser
LIST = "**/tdb.explainer.v1.ExplainerService/ListExplanations"
ANY = "**/tdb.explainer.v1.ExplainerService/*"
SLOW_MS = 30_000


@pytest.fixture(scope="module")
def there(product: str, product_folder: Path) -> Iterator[Planted]:
    with planted(product, product_folder / "data") as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_explained(there: Planted) -> Iterator[None]:
    """Each test begins without explanations of what is planted."""
    yield
    forget(there)


def written(there: Planted, component: str, text: str) -> dict[str, Any]:
    asked = {"model": there.of(), "component": component, "text": text}
    made: dict[str, Any] = explainer(there.product, "WriteExplanation", asked)["explanation"]
    return made


def opened(page: Page, component: str) -> Locator:
    page.goto(f"#component={component}&dataset={DATASET}")
    page.reload()
    view = page.locator(f"[data-component='{component}']")
    expect(view).to_be_visible()
    return view.get_by_role("region", name="Explanations", exact=True)


def cells(page: Page, component: str) -> Locator:
    return page.locator(f"tr.row[data-node^='{component}~'] td.explains")


def head_of_table(page: Page) -> str:
    """A head of the planted layer that has a row."""
    node = page.locator(f"tr.row[data-node^='head.{LAYER}.']").first.get_attribute("data-node")
    assert node is not None
    return node.split("~")[0]


def test_a_row_is_explained_where_it_stands(page: Page, there: Planted) -> None:
    asked: list[str] = []
    page.on("request", lambda made: asked.append(made.url.rsplit("/", 1)[1]))
    start(page)
    component = head_of_table(page)
    button = page.get_by_role("button", name=f"Explain {component}", exact=True)
    expect(button.first).to_be_enabled()
    assert asked.count("ListExplanations") == 1
    button.first.click()
    own = cells(page, component)
    word = WORDS[int(component.rsplit(".", 1)[1])]
    expect(own.first).to_contain_text(f'to "{word}"', timeout=SLOW_MS)
    for cell in own.all():
        expect(cell).to_contain_text("token pattern · head pairs AUC 1.00")
    expect(button).to_have_count(0)
    shoot(page, "explanations-table")

    own.first.get_by_role("button").focus()
    whole = page.get_by_role("tooltip")
    expect(whole).to_contain_text("token pattern · head pairs AUC 1.00")
    expect(whole).to_contain_text("over 24 items")
    page.keyboard.press("Escape")
    expect(whole).to_have_count(0)

    page.locator(f"tr.row[data-node^='{component}~']").first.click()
    details = page.get_by_role("region", name=f"What {component} does")
    expect(details).to_contain_text(f'to "{word}"')
    spare = page.locator(".details-box").evaluate("e => e.scrollHeight - e.clientHeight")
    assert spare <= 0
    shoot(page, "explanations-row")


def test_a_key_explains_the_chosen_row(page: Page, there: Planted) -> None:
    start(page)
    component = head_of_table(page)
    page.locator(f"tr.row[data-node^='{component}~'] .address").first.click()
    page.keyboard.press("e")
    details = page.get_by_role("region", name=f"What {component} does")
    expect(details).to_contain_text("token pattern · head pairs AUC 1.00", timeout=SLOW_MS)
    page.keyboard.press("e")
    expect(page.locator(f"[data-component='{component}']")).to_be_visible()
    expect(page.get_by_role("article").first).to_contain_text("Looks from")


def test_what_others_said_is_marked(page: Page, there: Planted) -> None:
    start(page)
    component = head_of_table(page)
    written(there, component, "looks back at a name")
    page.reload()
    answered(page)
    cell = cells(page, component).first
    expect(cell).to_contain_text("looks back at a name")
    expect(cell.locator(".theirs")).to_contain_text("human")
    expect(cell).to_contain_text("not scored")


def test_explanations_filter_and_the_column_can_go(page: Page, there: Planted) -> None:
    start(page)
    component = head_of_table(page)
    every = rows(page).count()
    written(there, component, "looks back at a name")
    page.reload()
    answered(page)
    expect(cells(page, component).first).to_contain_text("looks back")
    field = page.get_by_role("textbox", name="Filter by what it does")
    field.fill("name human")
    few = rows(page).count()
    assert 0 < few < every
    assert few == page.locator(f"tr.row[data-node^='{component}~']").count()
    field.fill("none")
    expect(rows(page)).to_have_count(every - few)
    field.fill("")
    switch = page.get_by_role("checkbox", name="explanations")
    switch.uncheck()
    expect(page.locator("td.explains")).to_have_count(0)
    page.reload()
    answered(page)
    expect(switch).not_to_be_checked()
    expect(page.locator("td.explains")).to_have_count(0)
    switch.check()
    expect(cells(page, component).first).to_contain_text("looks back")


def test_a_table_of_ten_thousand_rows(page: Page, there: Planted) -> None:
    component = f"head.{LAYER}.2"
    written(there, component, "looks back at a name")
    start(page)
    asked: list[int] = []

    def note(made: Request) -> None:
        if made.url.endswith("ListExplanations"):
            asked.append(len((made.post_data_json or {})["components"]))

    page.on("request", note)
    page.get_by_role("combobox", name="rows").select_option("10000")
    expect(page.locator(".table-bar")).to_contain_text("10000 rows", timeout=SLOW_MS)
    answered(page)
    page.get_by_role("textbox", name="Filter by what it does").fill("looks back")
    expect(page.locator(".table-bar")).to_contain_text("of 10000 rows")
    expect(cells(page, component).first).to_contain_text("looks back")
    assert len(asked) == 1
    assert 500 < asked[0] <= 10_000
    page.get_by_role("button", name="clear filters").click()
    assert rows(page).count() < 120


def test_a_component_is_explained_scored_edited_rated_and_forgotten(
    page: Page, there: Planted
) -> None:
    component = f"neuron.{LAYER}.2"
    panel = opened(page, component)
    expect(panel).to_contain_text("Nobody has explained it yet.")
    panel.get_by_role("button", name="explain…").click()
    form = panel.get_by_role("form", name=f"Explain {component}")
    for scorer in ("fuzzing", "simulation"):
        form.get_by_role("checkbox", name=scorer).check()
    offered = form.get_by_role("combobox", name="method").locator("option")
    expect(offered.filter(has_text="contrastive")).to_have_attribute("disabled", "")
    expect(offered.filter(has_text="contrastive")).to_contain_text("needs a language model")
    expect(form).to_contain_text("TDB_PROVIDER_URL")
    shoot(page, "explanations-form")
    form.get_by_role("button", name="explain", exact=True).click()
    first = panel.get_by_role("article").first
    expect(first).to_contain_text(f'the token "{WORDS[2]}"', timeout=SLOW_MS)
    scores = first.get_by_role("table")
    expect(scores.get_by_role("row", name="detection AUC")).to_contain_text("1.00")
    for row in ("fuzzing accuracy", "simulation correlation", "simulation explained variance"):
        expect(scores.get_by_role("row", name=row)).to_be_visible()
    expect(scores.get_by_role("row", name="detection AUC")).to_contain_text("offline")
    first.get_by_text("where it came from").click()
    for fact in ("token pattern", DATASET, "seed", "version", "local"):
        expect(first.locator(".provenance-facts")).to_contain_text(fact)

    first.get_by_role("button", name="edit").click()
    text = first.get_by_role("textbox", name=f"Edit the explanation of {component}")
    expect(text).to_be_focused()
    text.fill("the word store")
    first.get_by_role("button", name="store as yours").click()
    edit = panel.get_by_role("article").filter(has=page.get_by_text("the word store", exact=True))
    expect(edit).to_contain_text("an edit of “Fires on")
    expect(panel.get_by_role("article")).to_have_count(2)
    expect(panel.get_by_role("article").first).to_contain_text("the word store")

    edit.get_by_role("radio", name="4, mostly right").focus()
    page.keyboard.press("Space")
    expect(edit.locator(".rating")).to_contain_text("4.0 by 1 user")
    page.keyboard.press("ArrowRight")
    expect(edit.locator(".rating")).to_contain_text("5.0 by 1 user")
    edit.get_by_role("button", name="take back").click()
    expect(edit.locator(".rating")).not_to_contain_text("by 1 user")
    shoot(page, "explanations-history")

    panel.get_by_role("button", name="write one").click()
    panel.get_by_role("textbox", name=f"What {component} does").fill("shops")
    panel.get_by_role("button", name="store", exact=True).click()
    expect(panel.get_by_role("article")).to_have_count(3)
    words = [each.inner_text() for each in panel.locator(".history .explanation p.text").all()]
    assert len(words) == 2

    edit.get_by_role("button", name="delete").click()
    question = page.get_by_role("dialog", name="Delete this explanation?")
    expect(question).to_contain_text("cannot be brought back")
    shoot(page, "explanations-delete")
    question.get_by_role("button", name="Not now").click()
    expect(panel.get_by_role("article")).to_have_count(3)
    edit.get_by_role("button", name="delete").click()
    question.get_by_role("button", name="Delete").click()
    expect(panel.get_by_role("article")).to_have_count(2)
    expect(panel).not_to_contain_text("the word store")


def test_an_edit_of_a_deleted_one_says_so(page: Page, there: Planted) -> None:
    component = f"neuron.{LAYER}.3"
    before = written(there, component, "parks")
    asked = {"basedOn": before["id"], "text": "the word park"}
    explainer(there.product, "WriteExplanation", asked)
    explainer(there.product, "DeleteExplanation", {"id": before["id"]})
    panel = opened(page, component)
    expect(panel.get_by_role("article")).to_contain_text("an edit of one that was deleted")


def test_what_cannot_be_explained_says_why(page: Page, there: Planted) -> None:
    """A refusal stands where it was asked for, and the page goes on."""
    component = f"neuron.{LAYER}.4"
    made = written(there, component, "drinks of some sort")
    panel = opened(page, component)
    card = panel.get_by_role("article")
    card.get_by_role("button", name="score").click()
    form = panel.get_by_role("form", name="Score this explanation")
    form.get_by_role("button", name="score", exact=True).click()
    expect(panel.get_by_role("group", name="Explaining")).to_contain_text(
        re.compile("token pattern|language model"), timeout=SLOW_MS
    )
    panel.get_by_role("button", name="dismiss").click()
    expect(panel.get_by_role("group", name="Explaining")).to_have_count(0)
    expect(card).to_contain_text(made["text"])


def test_the_explainer_service_is_away(page: Page, there: Planted) -> None:
    page.route(ANY, lambda route: route.abort())
    start(page)
    bar = page.locator(".table-bar")
    expect(bar).to_contain_text("explanations: the service is away")
    expect(rows(page)).to_have_count(50)
    expect(page.locator("td.explains")).to_have_count(0)
    expect(page.get_by_role("alert")).to_have_count(0)
    panel = opened(page, f"neuron.{LAYER}.1")
    expect(panel).to_contain_text("No explanations without the explainer service")
    expect(page.locator(".example").first).to_be_visible()
    shoot(page, "explanations-away")
    page.unroute(ANY)
    panel.get_by_role("button", name="Try again").click()
    expect(panel).to_contain_text("Nobody has explained it yet.")


def test_a_refused_list_leaves_the_table(page: Page, there: Planted) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(
            status=400, json={"code": "resource_exhausted", "message": "too many at once"}
        )

    page.route(LIST, refuse)
    start(page)
    note = page.locator(".table-bar").get_by_text("the service is away")
    expect(note).to_have_attribute("title", "Too many at once.")
    expect(rows(page)).to_have_count(50)


def test_explanations_on_a_tablet_and_in_the_dark(page: Page, there: Planted) -> None:
    component = f"neuron.{LAYER}.5"
    written(there, component, "a book " * 40)
    page.set_viewport_size({"width": 820, "height": 1100})
    panel = opened(page, component)
    expect(panel.get_by_role("article")).to_be_visible()
    page.get_by_role("button", name=re.compile("^Colours")).click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, "explanations-tablet")
    page.keyboard.press("Escape")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, "explanations-table-tablet")
