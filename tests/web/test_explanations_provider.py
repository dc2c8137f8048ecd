"""What costs, in a real browser: who is asked and for how much is said first, and nothing is sent
before that was agreed to. The language model is the test server."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.explainer import synthetic
from tests.explainer.openai_server import (
    EMBEDDING_MODEL,
    KEY,
    MODEL,
    Fault,
    OpenAIServer,
    Said,
)
from tests.web.conftest import started
from tests.web.driving import answered, library, shoot, start
from tests.web.planted import DATASET, LAYER, WORDS, Planted, explainer, forget, planted, streamed

pytestmark = pytest.mark.browser
SLOW_MS = 60_000
PATTERN = 'Fires on the token " Mary" (10).'


class Model:
    """Explains with PATTERN and judges by what a token pattern says, when it is let."""

    def __init__(self) -> None:
        self._graded = synthetic.follower()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, body: dict[str, Any]) -> Said | str:
        self.gate.wait(60)
        if "explanation" in json.dumps(body["response_format"]):
            return json.dumps({"explanation": PATTERN})
        return self._graded(body)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def openai(model: Model) -> Iterator[OpenAIServer]:
    with OpenAIServer(model) as running:
        yield running
        model.gate.set()


@pytest.fixture(scope="module")
def product_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asking")


@pytest.fixture(scope="module")
def product(product_folder: Path, openai: OpenAIServer) -> Iterator[str]:
    """A product that may ask the test server."""
    variables = {
        "TDB_PROVIDER_URL": openai.url,
        "TDB_PROVIDER_MODEL": MODEL,
        "TDB_PROVIDER_KEY": KEY,
        "TDB_PROVIDER_PRICES": "0.5,1.5",
        "TDB_PROVIDER_CONCURRENCY": "2",
        "TDB_EMBEDDING_URL": openai.url,
        "TDB_EMBEDDING_MODEL": EMBEDDING_MODEL,
        "TDB_EMBEDDING_KEY": KEY,
    }
    with started(product_folder, "--demo", **variables) as url:
        yield url


@pytest.fixture(scope="module")
def there(product: str, product_folder: Path) -> Iterator[Planted]:
    with planted(product, product_folder / "data") as found:
        yield found


@pytest.fixture(autouse=True)
def from_the_beginning(there: Planted, openai: OpenAIServer, model: Model) -> Iterator[None]:
    openai.requests.clear()
    yield
    model.gate.set()
    openai.faults.clear()
    openai.pause_s = 0.0
    forget(there)


@pytest.fixture
def host(openai: OpenAIServer) -> str:
    return urlsplit(openai.url).hostname or ""


def opened(page: Page, component: str) -> Locator:
    page.goto(f"#component={component}&dataset={DATASET}")
    page.reload()
    view = page.locator(f"[data-component='{component}']")
    expect(view).to_be_visible()
    panel = view.get_by_role("region", name="Explanations", exact=True)
    expect(panel).to_contain_text("Nobody has explained it yet.")
    return panel


def proposed(page: Page, panel: Locator, method: str, *scorers: str) -> Locator:
    """Fills the form and asks for it; the question before anything is sent."""
    panel.get_by_role("button", name="explain…").first.click()
    form = panel.get_by_role("form")
    form.get_by_role("combobox", name="method").select_option(method)
    for scorer in scorers:
        form.get_by_role("checkbox", name=scorer).check()
    form.get_by_role("button", name="explain…").click()
    question = page.get_by_role("dialog", name=re.compile("^Ask "))
    expect(question).to_be_visible()
    return question


def test_the_cost_and_the_provider_are_said_first(
    page: Page, there: Planted, openai: OpenAIServer, host: str
) -> None:
    panel = opened(page, f"neuron.{LAYER}.0")
    question = proposed(page, panel, "METHOD_CONTRASTIVE", "simulation")
    expect(question).to_contain_text(host)
    expect(question).to_contain_text(MODEL)
    expect(question).to_contain_text(re.compile(r"about \$|under \$"))
    expect(question.get_by_role("button", name="Not now")).to_be_focused()
    shoot(page, "explanations-cost")
    question.get_by_role("button", name="Not now").click()
    expect(question).to_have_count(0)
    assert openai.requests == []

    panel.get_by_role("form").get_by_role("button", name="explain…").click()
    question.get_by_role("button", name=re.compile("^Send to")).click()
    card = panel.get_by_role("article").first
    expect(card).to_contain_text(PATTERN, timeout=SLOW_MS)
    expect(card).to_contain_text("contrastive · AUC 1.00", timeout=SLOW_MS)
    row = card.get_by_role("row", name="simulation correlation")
    expect(row).to_contain_text(MODEL, timeout=SLOW_MS)
    expect(panel.get_by_role("group", name="Explaining")).to_contain_text(
        re.compile(r"\d+ calls, [\d,]+ tokens, (\$|under \$)")
    )
    card.get_by_text("where it came from").click()
    expect(card.locator(".provenance-facts")).to_contain_text(host)
    assert len(openai.requests) > 1
    shoot(page, "explanations-provider")
    page.keyboard.press("Escape")
    answered(page)


def test_the_text_is_shown_while_it_is_written_and_can_be_stopped(
    page: Page, there: Planted, openai: OpenAIServer
) -> None:
    openai.pause_s = 0.7
    component = f"neuron.{LAYER}.1"
    panel = opened(page, component)
    question = proposed(page, panel, "METHOD_MAX_ACTIVATION_SUMMARY")
    question.get_by_role("button", name=re.compile("^Send to")).click()
    now = panel.get_by_role("group", name="Explaining")
    expect(now.locator(".writing-now")).to_contain_text("Fires", timeout=SLOW_MS)
    expect(now.locator(".writing-now")).not_to_contain_text("(10).")
    shoot(page, "explanations-writing")
    now.get_by_role("button", name="cancel").click()
    expect(now).to_have_count(0)
    expect(panel).to_contain_text("Nobody has explained it yet.")
    asked = {"model": there.of(), "components": [component]}
    assert explainer(there.product, "ListExplanations", asked).get("explanations", []) == []


def test_what_a_judge_did_not_answer_is_counted(
    page: Page, there: Planted, openai: OpenAIServer
) -> None:
    component = f"neuron.{LAYER}.2"
    asked = {"model": there.of(), "component": component, "text": PATTERN}
    explainer(there.product, "WriteExplanation", asked)
    page.goto(f"#component={component}&dataset={DATASET}")
    page.reload()
    card = page.get_by_role("article").first
    card.get_by_role("button", name="score").click()
    form = card.get_by_role("form", name="Score this explanation")
    expect(form.get_by_role("combobox", name="judged by")).to_contain_text(MODEL)
    form.get_by_role("button", name="score…").click()
    openai.faults.append(Fault(reply="no JSON at all"))
    page.get_by_role("button", name=re.compile("^Send to")).click()
    row = card.get_by_role("row", name="detection AUC")
    expect(row).to_contain_text("malformed", timeout=SLOW_MS)
    shoot(page, "explanations-failures")


def test_a_wrong_key_is_said_where_it_was_asked(
    page: Page, there: Planted, openai: OpenAIServer
) -> None:
    panel = opened(page, f"neuron.{LAYER}.3")
    question = proposed(page, panel, "METHOD_CONTRASTIVE")
    openai.faults.append(Fault(401, {"message": "Incorrect key", "code": "invalid_api_key"}))
    question.get_by_role("button", name=re.compile("^Send to")).click()
    wrong = panel.get_by_role("alert")
    expect(wrong).to_contain_text("TDB_PROVIDER_KEY", timeout=SLOW_MS)
    expect(wrong).not_to_contain_text(KEY)
    expect(panel.get_by_role("button", name="explain…")).to_be_enabled()


def test_a_job_is_paused_and_resumed_after_a_reload(
    page: Page, there: Planted, openai: OpenAIServer, model: Model, host: str
) -> None:
    start(page)
    shown = library(page, "jobs")
    shown.get_by_text("new job on a range of a dataset").click()
    shown.get_by_role("combobox", name="group").select_option(f"neuron.{LAYER}")
    shown.get_by_role("textbox", name="to", exact=True).fill("7")
    shown.get_by_role("combobox", name="method").select_option("METHOD_TOKEN_ACTIVATION_PAIRS")
    budget = shown.get_by_role("textbox", name="Budget in dollars")
    expect(budget).not_to_have_value("", timeout=SLOW_MS)
    expect(shown.locator(".estimate")).to_contain_text(host)
    expect(shown.locator(".estimate")).to_contain_text("8 components")
    shown.get_by_role("textbox", name="only if a token pattern").fill("0.9")
    budget.fill("none")
    expect(shown.get_by_role("button", name="start…")).to_be_disabled()
    budget.fill("0.5")
    shoot(page, "explanations-job-provider")
    model.gate.clear()
    shown.get_by_role("button", name="start…").click()
    assert openai.requests == []
    question = page.get_by_role("dialog", name=re.compile("about 8 components"))
    expect(question).to_contain_text("No more than $0.50 is spent.")
    question.get_by_role("button", name=re.compile("^Send to")).click()
    job = shown.get_by_role("listitem", name=re.compile(f"neuron.{LAYER}.0 to"))
    expect(job).to_contain_text("0 of 8 components")
    expect(job).to_contain_text("of at most $0.50")
    shoot(page, "explanations-job-running")
    job.get_by_role("button", name="pause").click()
    model.gate.set()
    expect(job).to_contain_text("paused at", timeout=SLOW_MS)

    page.reload()
    answered(page)
    shown = library(page, "jobs")
    expect(job).to_contain_text("paused at")
    job.get_by_role("button", name="resume…").click()
    field = job.get_by_role("textbox", name="Budget in dollars")
    expect(field).to_have_value("0.5")
    expect(job).to_contain_text(host)
    field.fill("1")
    shoot(page, "explanations-job-paused")
    job.get_by_role("button", name="resume", exact=True).click()
    expect(job).to_contain_text("done: 8 components", timeout=SLOW_MS)
    expect(job).to_contain_text("8 explained")
    expect(job).to_contain_text("of at most $1.00")


def test_a_job_without_money_stops_and_can_be_ended(
    page: Page, there: Planted, openai: OpenAIServer
) -> None:
    job = {
        "dataset": DATASET,
        "range": {"first": f"neuron.{LAYER}.0", "last": f"neuron.{LAYER}.7"},
        "method": "METHOD_OUTPUT_CENTRED",
        "budget": {"maxTokens": "10"},
    }
    streamed(there.product, "ExplainMany", job)
    start(page)
    shown = library(page, "jobs")
    own = shown.get_by_role("listitem").filter(has_text="output-centred")
    expect(own).to_contain_text("the budget does not allow the next call", timeout=SLOW_MS)
    own.get_by_role("button", name="cancel").click()
    question = page.get_by_role("dialog", name="End this job?")
    question.get_by_role("button", name="End it").click()
    expect(own).to_contain_text("cancelled at", timeout=SLOW_MS)


def test_explanations_are_found_by_meaning(page: Page, there: Planted, host: str) -> None:
    for index, word in enumerate(WORDS[:3]):
        asked = {
            "model": there.of(),
            "component": f"neuron.{LAYER}.{index}",
            "text": f"the word{word}",
        }
        explainer(there.product, "WriteExplanation", asked)
    start(page)
    shown = library(page, "search")
    shown.get_by_role("combobox", name="Search by").select_option("SEARCH_MODE_MEANING")
    field = shown.get_by_role("searchbox", name="What is looked for")
    field.fill("store")
    field.press("Enter")
    expect(shown).to_contain_text(f"is sent to {host}")
    expect(shown).to_contain_text("3 explanations have no embedding yet", timeout=SLOW_MS)
    shown.get_by_role("button", name="embed them…").click()
    question = page.get_by_role("dialog", name=re.compile("^Ask "))
    expect(question).to_contain_text("the texts of the explanations")
    shoot(page, "explanations-embed")
    question.get_by_role("button", name=re.compile("^Send to")).click()
    found = shown.locator(".found li")
    expect(found).to_have_count(3, timeout=SLOW_MS)
    expect(found.first).to_contain_text("the word store")
    expect(shown).not_to_contain_text("no embedding yet")
