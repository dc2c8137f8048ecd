"""A component's own view in a real browser, over a small dataset of the demo's own activations."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Locator, Page, Route, expect
from tdb.dataset.v1 import dataset_pb2, record_pb2

from services.dataset import groups
from services.dataset.importers import importing
from services.dataset.store import DatasetWriter
from tests.web.driving import answered, rows, shoot, start

pytestmark = pytest.mark.browser

DATASET = "component-test"
ELSEWHERE = "of-another-model"
LAYER = 1
HEADS = 3
ABSENT = 39
HELD = 30
TEXTS = [
    f"When {giver} and {taker} went to the {place}, {giver} gave a {thing} to {taker}"
    for giver, taker in (("Mary", "John"), ("Anna", "Tom"), ("John", "Mary"))
    for place in ("store", "park")
    for thing in ("drink", "book", "ball", "ring")
]
SLOW_MS = 30_000
"""For what waits behind the start page's own questions."""


def call(product: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{product}{method}", json=request, timeout=60)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def tensor(point: dict[str, Any]) -> NDArray[np.float32]:
    made = point["tensor"]
    return np.frombuffer(base64.b64decode(made["data"]), np.float32).reshape(made["shape"])


class Seen:
    """What the demo computes on TEXTS, by its own answers."""

    def __init__(self, product: str) -> None:
        self.product = product
        self.model = call(product, "tdb.inference.v1.InferenceService/GetModel", {})["model"]
        self.ids: list[list[int]] = []
        self.texts: dict[int, str] = {}
        self.neurons: list[NDArray[np.float32]] = []
        self.attention: list[NDArray[np.float32]] = []
        for text in TEXTS:
            points = [f"mlp_act.{LAYER}", f"attn_probs.{LAYER}"]
            run = {"run": {"prompt": {"text": text}}, "activations": points}
            found = call(product, "tdb.inference.v1.InferenceService/Run", run)
            self.ids.append([token.get("id", 0) for token in found["tokens"]])
            for token in found["tokens"]:
                self.texts[token.get("id", 0)] = token["text"]
            neurons, attention = map(tensor, found["activations"])
            self.neurons.append(neurons)
            self.attention.append(attention)
        peaks = np.max([each[:, :HELD].max(axis=0) for each in self.neurons], axis=0)
        self.strong = int(np.argmax(peaks))
        """The neuron that fires most."""

    def activations(self, text: str, point: str) -> NDArray[np.float32]:
        run = {"run": {"prompt": {"text": text}}, "activations": [point]}
        found = call(self.product, "tdb.inference.v1.InferenceService/Run", run)
        return tensor(found["activations"][0])

    def vocabulary(self) -> list[str]:
        size = max(self.texts) + 1
        return [self.texts.get(token, f"<{token}>") for token in range(size)]

    def neuron(self, index: int) -> record_pb2.ComponentRecord:
        values = [each[:, index] for each in self.neurons]
        return self._record(f"neuron.{LAYER}.{index}", values, pairs=False)

    def head(self, index: int) -> record_pb2.ComponentRecord:
        values = [each[index][np.tril_indices(each.shape[1])] for each in self.attention]
        return self._record(f"head.{LAYER}.{index}", values, pairs=True)

    def _record(
        self, component: str, values: list[NDArray[np.float32]], *, pairs: bool
    ) -> record_pb2.ComponentRecord:
        made = record_pb2.ComponentRecord(component=component)
        examples = []
        for number, (ids, own) in enumerate(zip(self.ids, values, strict=True)):
            example = record_pb2.Example(token_ids=ids, document_id=f"doc-{number}")
            (example.pair_activations if pairs else example.activations).extend(own.tolist())
            examples.append(example)
        peaks = [float(own.max()) for own in values]
        order = np.argsort([-peak for peak in peaks], kind="stable")
        made.top.extend(examples[place] for place in order)
        for half in (order[:12], order[12:]):
            made.quantiles.add(
                lower=peaks[half[-1]],
                upper=peaks[half[0]],
                fraction=0.5,
                examples=[examples[place] for place in half[:3]],
            )
        made.random.extend(examples[:2])
        every = np.concatenate([own.ravel() for own in values]).astype(np.float64)
        counts, edges = np.histogram(every, 24)
        statistics = made.statistics
        statistics.count = every.size
        statistics.max, statistics.min = every.max(), every.min()
        statistics.mean, statistics.variance = every.mean(), every.var()
        statistics.fraction_active = float((every > 0).mean())
        statistics.histogram.edges.extend(edges.tolist())
        statistics.histogram.counts.extend(counts.tolist())
        return made


def write(folder: Path, seen: Seen, model: dataset_pb2.RecordedModel) -> None:
    header = dataset_pb2.DatasetHeader(
        source=dataset_pb2.SOURCE_BUILT,
        model=model,
        corpus=dataset_pb2.Corpus(name="gifts", tokens=sum(map(len, seen.ids))),
    )
    with DatasetWriter(folder, header) as writer:
        for name, made in (
            (f"neuron.{LAYER}", [seen.neuron(index) for index in range(HELD)]),
            (f"head.{LAYER}", [seen.head(index) for index in range(HEADS)]),
        ):
            writer.write(groups.parse_component(f"{name}.0")[0], 0, made)
        writer.finish(seen.vocabulary())


@pytest.fixture(scope="module")
def seen(product: str, product_folder: Path) -> Iterator[Seen]:
    """The demo's activations, served as a dataset; another dataset is of another model."""
    found = Seen(product)
    folder = product_folder / "data" / "datasets"
    own = dataset_pb2.RecordedModel(
        id=found.model["id"], weights_hash=found.model["weightsHash"], tokenizer_hash=""
    )
    other = dataset_pb2.RecordedModel(id="gpt2", weights_hash="00" * 32)
    write(folder / DATASET, found, own)
    write(folder / ELSEWHERE, found, other)
    yield found
    for name in (DATASET, ELSEWHERE):
        call(product, "tdb.dataset.v1.DatasetService/DeleteDataset", {"dataset": name})


def visit(page: Page, component: str, dataset: str | None = DATASET) -> Locator:
    page.goto(f"#component={component}" + (f"&dataset={dataset}" if dataset else ""))
    page.reload()
    view = page.locator(f"[data-component='{component}']")
    expect(view).to_be_visible()
    return view


def value_in(cell: Locator) -> float:
    """The exact value that a token tells who points at it."""
    title = cell.get_attribute("title") or ""
    told = re.search(r": [a-z ,]+? ([−\d]\S*?)(,|$)", title)
    assert told is not None, title
    return float(told[1].replace("−", "-"))


def test_a_component_shows_where_it_fires(page: Page, seen: Seen) -> None:
    view = visit(page, f"neuron.{LAYER}.{seen.strong}")
    expect(view.get_by_role("button", name="top 24")).to_have_attribute("aria-pressed", "true")
    expect(view.locator(".example")).to_have_count(20)
    record = seen.neuron(seen.strong)
    end = view.get_by_test_id("scale-end").first
    expect(end).to_have_text(f"{record.statistics.max:.3g}".replace("-", "−"))
    strongest = record.top[0]
    peak = int(np.argmax(strongest.activations))
    cell = view.locator(".example").first.locator(f"[data-at='{peak}']")
    expect(cell).to_have_attribute("style", re.compile(r"--heat: 1\.000"))
    expect(cell).to_have_attribute("title", re.compile(r"activation .*, normalised 1\.00$"))
    expect(view.locator(".example").first).to_contain_text(strongest.document_id)
    expect(view.locator(".histogram g")).to_have_count(24)
    shoot(page, "component")

    view.get_by_role("button", name="Next examples").click()
    expect(view.locator(".example")).to_have_count(4)
    view.get_by_role("button", name="by strength 6").click()
    expect(view.locator("h3")).to_have_count(2)


def test_the_histogram_is_read_by_mouse_and_keys(page: Page, seen: Seen) -> None:
    view = visit(page, f"neuron.{LAYER}.{seen.strong}")
    caption = view.locator("figcaption")
    expect(caption).to_contain_text("logarithmic")
    view.locator(".histogram g").nth(3).locator(".hit").hover()
    expect(caption).to_contain_text("tokens,")
    count = seen.neuron(seen.strong).statistics.histogram.counts[0]
    view.locator(".histogram svg").focus()
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowRight")
    expect(caption).to_contain_text(f": {count} tokens")


def test_a_head_shows_what_each_token_reads(page: Page, seen: Seen) -> None:
    view = visit(page, f"head.{LAYER}.1")
    passage = view.locator(".example .passage").first
    example = seen.head(1).top[0]
    size = len(example.token_ids)
    square = np.zeros((size, size), np.float32)
    square[np.tril_indices(size)] = example.pair_activations
    query = size - 1
    passage.locator(f"[data-at='{query}']").hover()
    key = int(np.argmax(square[query]))
    told = passage.locator(f"[data-at='{key}']")
    expect(told).to_have_attribute("title", re.compile(r"write magnitude \d"))
    assert value_in(told) == pytest.approx(float(square[query, key]), abs=1e-5)
    shoot(page, "component-head")
    page.mouse.move(0, 0)
    view.get_by_role("button", name="is read", exact=True).click()
    expect(passage.locator("[data-at='0']")).to_have_attribute(
        "title", re.compile("summed over what it is read")
    )
    passage.focus()
    page.keyboard.press("ArrowRight")
    expect(passage.locator("[data-mark]")).to_have_attribute("data-at", "0")
    page.keyboard.press("Escape")
    expect(passage.locator("[data-mark]")).to_have_count(0)
    expect(view).to_be_visible()


def test_your_own_text_has_the_values_of_the_records(page: Page, seen: Seen) -> None:
    view = visit(page, f"neuron.{LAYER}.{seen.strong}")
    field = view.get_by_role("textbox", name="try your own text")
    field.fill(TEXTS[0])
    field.press("Enter")
    own = view.locator(".own-text .passage")
    expect(own).to_be_visible(timeout=SLOW_MS)
    for position, value in enumerate(seen.neurons[0][:, seen.strong]):
        told = value_in(own.locator(f"[data-at='{position}']"))
        assert told == pytest.approx(float(value), abs=1e-5)


def test_your_own_text_on_a_latent_and_a_head(page: Page, seen: Seen) -> None:
    for component, point in (
        ("latent.demo-mlp_out-1.5", "latents.demo-mlp_out-1"),
        (f"head.{LAYER}.0", f"attn_probs.{LAYER}"),
    ):
        view = visit(page, component)
        field = view.get_by_role("textbox", name="try your own text")
        field.fill("Mary went home")
        field.press("Enter")
        own = view.locator(".own-text .passage")
        expect(own).to_be_visible(timeout=SLOW_MS)
        values = seen.activations("Mary went home", point)
        if component.startswith("latent"):
            wanted = values[:, 5].tolist()
        else:
            wanted = values[0].sum(axis=0).tolist()
            view.get_by_role("button", name="is read", exact=True).click()
        told = [value_in(cell) for cell in own.locator("[data-at]").all()]
        assert told == pytest.approx(wanted, abs=1e-5)


def test_records_of_others_have_text_and_no_ids(
    page: Page, seen: Seen, product_folder: Path, shared_data: Path
) -> None:
    """Neuronpedia's real records, of a model and a dictionary that are not loaded."""
    folder = product_folder / "data" / "datasets" / "res-jb"
    importing.import_neuronpedia(shared_data / "neuronpedia-records", folder)
    listed = call(seen.product, "tdb.dataset.v1.DatasetService/ListDatasets", {})["datasets"]
    own = next(each for each in listed if each["name"] == "res-jb")
    view = visit(page, f"{own['groups'][0]['name']}.0", "res-jb")
    expect(view.locator(".example").first).to_be_visible()
    expect(view.get_by_role("alert")).to_contain_text("are about the model")
    expect(view).to_contain_text("The loaded model serves no dictionary with this latent.")
    shoot(page, "component-neuronpedia")
    call(seen.product, "tdb.dataset.v1.DatasetService/DeleteDataset", {"dataset": "res-jb"})


def test_a_text_is_debugged(page: Page, seen: Seen) -> None:
    view = visit(page, f"neuron.{LAYER}.{seen.strong}")
    place = int(seen.neuron(seen.strong).top[0].document_id.removeprefix("doc-"))
    view.get_by_role("button", name="Debug the text of example 1", exact=True).click()
    expect(view).to_have_count(0)
    field = page.locator("#prompt")
    expect(field).to_have_value(TEXTS[place])
    expect(field).to_be_focused()
    page.go_back()
    expect(view).to_be_visible()


def test_a_row_opens_its_component_and_back_closes_it(page: Page, seen: Seen) -> None:
    start(page)
    row = page.locator("tr.row[data-node^='head.']").first
    node = (row.get_attribute("data-node") or "").split("~")[0]
    row.click()
    page.locator("main").evaluate("main => main.scrollTo(0, 120)")
    page.keyboard.press("o")
    view = page.locator(f"[data-component='{node}']")
    expect(view).to_be_visible()
    assert f"component={node}" in page.url
    expect(rows(page).first).to_be_hidden()
    page.go_back()
    expect(view).to_have_count(0)
    answered(page)
    assert page.locator("main").evaluate("main => main.scrollTop") == 120
    page.go_forward()
    expect(view).to_be_visible()
    page.keyboard.press("Escape")
    expect(view).to_have_count(0)
    assert "component=" not in page.url


def test_what_is_missing_is_said(page: Page, seen: Seen) -> None:
    view = visit(page, f"neuron.{LAYER}.{ABSENT}")
    expect(view).to_contain_text(f"Of neuron.{LAYER} it has 0 to {HELD - 1}.")
    view = visit(page, f"neuron.{LAYER}.{seen.strong}", "nowhere")
    expect(view).to_contain_text("There is no dataset named nowhere.")
    view.get_by_role("button", name=DATASET).click()
    expect(view.locator(".example").first).to_be_visible()
    view = visit(page, f"neuron.{LAYER}.{seen.strong}", ELSEWHERE)
    expect(view.get_by_role("alert")).to_contain_text("are about the model gpt2; demo-gpt2")
    expect(view.get_by_role("textbox", name="try your own text")).to_be_enabled()


def test_the_dataset_service_is_away(page: Page, seen: Seen) -> None:
    page.route("**/tdb.dataset.v1.DatasetService/ListDatasets", lambda route: route.abort())
    view = visit(page, f"neuron.{LAYER}.{seen.strong}")
    expect(view.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.unroute("**/tdb.dataset.v1.DatasetService/ListDatasets")
    view.get_by_role("button", name="Try again").click()
    expect(view.locator(".example").first).to_be_visible()


def test_a_damaged_record_leaves_the_others(page: Page, seen: Seen, product_folder: Path) -> None:
    file = product_folder / "data" / "datasets" / DATASET / f"neuron.{LAYER}.00000.records"
    whole = file.read_bytes()
    try:
        broken = bytearray(whole)
        broken[len(whole) - 30] ^= 0xFF
        file.write_bytes(bytes(broken))
        view = visit(page, f"neuron.{LAYER}.{HELD - 1}")
        expect(view.get_by_role("alert")).to_contain_text(file.name)
        view.get_by_role("button", name="Previous component").click()
        other = page.locator(f"[data-component='neuron.{LAYER}.{HELD - 2}']")
        expect(other.locator(".example").first).to_be_visible()
    finally:
        file.write_bytes(whole)


def test_an_open_row_shows_where_its_component_fires(page: Page, seen: Seen) -> None:
    start(page)
    asked: list[str] = []
    page.on("request", lambda made: asked.append(made.url) if "GetRecord" in made.url else None)
    for _ in range(12):
        page.keyboard.press("j")
    held = [f"head.{LAYER}.{index}" for index in range(HEADS)]
    nodes = [row.get_attribute("data-node") or "" for row in rows(page).all()]
    node = next((node for node in nodes if node.split("~")[0] in held), None)
    assert node is not None, nodes
    page.locator(f"tr.row[data-node='{node}']").click()
    lines = page.locator(".in-row-line")
    expect(lines).to_have_count(3)
    expect(lines.first.locator("[style*='--heat: 1.000']").first).to_be_attached()
    assert len(asked) <= 2, "whoever moves through rows asks for none of them"
    spare = page.locator(".details-box").evaluate("e => e.scrollHeight - e.clientHeight")
    assert spare <= 0
    shoot(page, "component-row")
    before = len(asked)
    page.locator(f"tr.row[data-node='{node}']").click()
    page.locator(f"tr.row[data-node='{node}']").click()
    expect(lines).to_have_count(3)
    assert len(asked) == before


def library(page: Page) -> Locator:
    page.get_by_role("button", name=re.compile(r"^(\d+ datasets?|no dataset|datasets)")).click()
    return page.get_by_role("dialog", name="Datasets")


def test_the_library_finds_components(page: Page, seen: Seen) -> None:
    start(page)
    shown = library(page)
    expect(shown.get_by_role("row", name=re.compile(ELSEWHERE))).to_contain_text("not the loaded")
    own = shown.get_by_role("row", name=re.compile(DATASET))
    expect(own).to_contain_text("neurons of 1 layer, heads of 1 layer")
    expect(own).to_contain_text(str(HELD + HEADS))
    shown.get_by_role("combobox", name="Dataset").select_option(DATASET)
    shown.get_by_role("combobox", name="Components").select_option(f"neuron.{LAYER}")
    shown.get_by_role("button", name="search", exact=True).click()
    first = shown.locator(".dataset-search tbody tr").first
    expect(first).to_contain_text(f"neuron.{LAYER}.{seen.strong}")
    shown.get_by_role("textbox", name="text", exact=True).fill("nobody wrote this")
    shown.get_by_role("button", name="search", exact=True).click()
    expect(shown).to_contain_text("nothing meets this")
    shown.get_by_role("textbox", name="text", exact=True).fill("Anna gave a BOOK")
    shown.get_by_role("button", name="search", exact=True).click()
    expect(first).to_be_visible()
    shoot(page, "datasets")
    shown.get_by_role("textbox", name="≥").fill("many")
    shown.get_by_role("button", name="search", exact=True).click()
    expect(shown.get_by_role("alert")).to_contain_text("“many” is no number")
    first.get_by_role("button").click()
    expect(page.locator("[data-component]")).to_be_visible()
    assert f"dataset={DATASET}" in page.url


def test_a_build_shows_how_far_it_is(page: Page, seen: Seen) -> None:
    build = {
        "dataset": "being-built",
        "state": "BUILD_STATE_RUNNING",
        "model": seen.model["id"],
        "phase": "harvesting",
        "done": "430",
        "total": "1000",
        "unit": "tokens",
        "rate": 1200,
        "secondsLeft": 20,
    }
    asked = []

    def answer(route: Route) -> None:
        asked.append(route)
        if len(asked) > 3:
            route.continue_()
        else:
            route.fulfill(json={"builds": [build]})

    page.route("**/tdb.dataset.v1.DatasetService/ListDatasets", answer)
    view = visit(page, f"neuron.{LAYER}.{seen.strong}", None)
    expect(view.get_by_role("progressbar", name="Building being-built")).to_be_visible()
    expect(view).to_contain_text("harvesting 43 %, 1200 tokens/s, 20 seconds left")
    expect(page.get_by_role("button", name="0 datasets (building 43 %)")).to_be_visible()
    expect(view.locator(".example").first).to_be_visible(timeout=20_000)


def test_the_view_is_readable_in_the_dark_and_on_a_tablet(page: Page, seen: Seen) -> None:
    page.set_viewport_size({"width": 820, "height": 1100})
    view = visit(page, f"neuron.{LAYER}.{seen.strong}")
    expect(view.locator(".example").first).to_be_visible()
    page.get_by_role("button", name=re.compile("^Colours")).click()
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wide
    shoot(page, "component-tablet")
