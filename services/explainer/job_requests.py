"""From a request for many explanations to what is done: every refusal names its field."""

import asyncio
from collections.abc import Sequence

from google.protobuf.json_format import MessageToJson, Parse
from tdb.dataset.v1 import dataset_pb2, search_pb2
from tdb.explainer.v1 import explain_pb2

from services.common.addresses import parse
from services.common.errors import InvalidArgument, NotFound, inside
from services.explainer import requests
from services.explainer.engine.budget import Ledger
from services.explainer.engine.provider import Provider
from services.explainer.engine.provider_settings import HOW_TO_CONFIGURE, ProviderNotConfigured
from services.explainer.gate import Gate
from services.explainer.job_work import Plan
from services.explainer.making import Task
from services.explainer.store import group_of
from services.explainer.upstream import Upstream

MAX_COMPONENTS = 100_000
"""Components of a range."""
_PAGE = 1_000

Request = explain_pb2.ExplainManyRequest


def plan(request: Request, user: str, provider: Provider | None) -> Plan:
    """What is to be done with each component, and can be here.

    Raises InvalidArgument; FailedPrecondition where there is no language model or no price.
    """
    made = wanted(request, user)
    if made.task.asks_provider:
        if provider is None:
            raise ProviderNotConfigured(HOW_TO_CONFIGURE, field="method")
        if not request.HasField("budget"):
            raise InvalidArgument(
                "a budget is required where a language model is asked for many components; "
                "EstimateCost says what it may come to",
                field="budget",
                reason="REQUIRED",
            )
        with inside("budget"):
            Ledger(made.budget, provider.prices)
    return made


def wanted(request: Request, user: str) -> Plan:
    """What is asked for, whether or not it can be done here. Raises InvalidArgument."""
    requests.dataset(request.dataset)
    with inside("method"):
        method = requests.method(request.method)
    scoring = None
    if request.HasField("scoring"):
        with inside("scoring"):
            scoring = requests.scoring(request.scoring)
    task = Task(method=method, seed=request.seed, scoring=scoring, author=user)
    return Plan(
        dataset=request.dataset,
        task=task,
        budget=requests.budget(request),
        gate=gate(request.gate),
        again=request.again,
    )


def gate(given: explain_pb2.Gate) -> Gate:
    """Raises InvalidArgument."""
    made = Gate()
    if given.HasField("max_fraction_active"):
        if not 0 < given.max_fraction_active <= 1:
            raise InvalidArgument("is a share in (0, 1]", field="gate.max_fraction_active")
        made = Gate(max_fraction_active=given.max_fraction_active)
    if given.HasField("min_pattern_auc"):
        if not 0 <= given.min_pattern_auc <= 1:
            raise InvalidArgument("is an AUC in [0, 1]", field="gate.min_pattern_auc")
        made = Gate(
            max_fraction_active=made.max_fraction_active, min_pattern_auc=given.min_pattern_auc
        )
    return made


async def components(request: Request, task: Task, upstream: Upstream) -> list[str]:
    """The addresses that the request names, in its order.

    Raises InvalidArgument, NotFound where the dataset or all of a range is not there, and what the
    dataset service refuses.
    """
    which = request.WhichOneof("components")
    if which is None:
        raise InvalidArgument(
            "say which: a list, or a range", field="components", reason="REQUIRED"
        )
    if which == "list":
        with inside("list.components"):
            found = await asyncio.to_thread(_listed, request.list.components, task)
        await _dataset(request.dataset, upstream)
        return found
    with inside("range"):
        group, first, last = _range(request.range)
        with inside("first"):
            task.check(request.range.first)
    dataset = await _dataset(request.dataset, upstream)
    with inside("range"):
        return await _held(dataset, group, first, last, upstream)


def _listed(given: Sequence[str], task: Task) -> list[str]:
    """Ten thousand addresses take their time."""
    found = requests.components(given)
    kinds: dict[str, int] = {}
    for number, address in enumerate(found):
        kinds.setdefault(address.partition(".")[0], number)
    for number in kinds.values():
        with inside(f"[{number}]"):
            task.check(found[number])
    return found


def _range(given: explain_pb2.ComponentRange) -> tuple[str, int, int]:
    """The group, and the first and last index."""
    with inside("first"):
        first = requests.component(given.first)
    with inside("last"):
        last = requests.component(given.last)
    group = group_of(first)
    if group_of(last) != group:
        raise InvalidArgument(
            f"{last} is of {group_of(last)}, and the first of {group}: a range is of one kind and "
            "one layer or dictionary",
            field="last",
        )
    low, high = parse(first).index, parse(last).index
    assert low is not None
    assert high is not None
    if high < low:
        raise InvalidArgument(f"{last} comes before {first}", field="last")
    return group, low, high


async def _dataset(name: str, upstream: Upstream) -> dataset_pb2.Dataset:
    response = await upstream.dataset.ListDatasets(dataset_pb2.ListDatasetsRequest())
    for each in response.datasets:
        if each.name == name:
            return each
    there = ", ".join(each.name for each in response.datasets[:20]) or "none"
    raise NotFound(f"there is no dataset {name!r}; there are: {there}", field="dataset")


async def _held(
    dataset: dataset_pb2.Dataset, group: str, first: int, last: int, upstream: Upstream
) -> list[str]:
    held = next((each for each in dataset.groups if each.name == group), None)
    if held is None or held.first > last or held.last < first:
        there = ", ".join(f"{each.name}.{each.first}..{each.last}" for each in dataset.groups[:20])
        raise NotFound(
            f"the dataset {dataset.name!r} has nothing from {group}.{first} to {group}.{last}; it "
            f"has {there}"
        )
    first, last = max(first, held.first), min(last, held.last)
    if last - first >= MAX_COMPONENTS:
        raise InvalidArgument(
            f"at most {MAX_COMPONENTS} components fit in one job, these are up to "
            f"{last - first + 1}",
            reason="TOO_LARGE",
        )
    if held.records == held.last - held.first + 1:
        return [f"{group}.{index}" for index in range(first, last + 1)]
    found = []
    request = search_pb2.SearchRequest(dataset=dataset.name, groups=[group], limit=_PAGE)
    while True:
        response = await upstream.dataset.Search(request)
        if response.damaged_groups:  # what is missing is said of each component, when it is read
            return [f"{group}.{index}" for index in range(first, last + 1)]
        found += [*(each.component for each in response.components), *response.damaged]
        if not response.next_cursor:
            break
        request.cursor = response.next_cursor
    indices = sorted(parse(each).index or 0 for each in found)
    within = [f"{group}.{index}" for index in indices if first <= index <= last]
    if not within:
        raise NotFound(
            f"the dataset {dataset.name!r} has nothing from {group}.{first} to {group}.{last}"
        )
    return within


def to_text(request: Request) -> str:
    """As it is stored: a list of components stands with the job's components."""
    kept = Request()
    kept.CopyFrom(request)
    if kept.WhichOneof("components") == "list":
        kept.list.CopyFrom(explain_pb2.ComponentList())
    return MessageToJson(kept, indent=None)


def of_text(text: str) -> Request:
    """What `to_text` has written."""
    return Parse(text, Request())


def stored_plan(text: str, user: str, provider: Provider | None) -> Plan:
    """The plan of a stored job. Raises FailedPrecondition where it cannot be done any more."""
    return plan(of_text(text), user, provider)


def with_budget(text: str, budget: explain_pb2.Budget) -> str:
    """A stored request with another budget. Raises InvalidArgument."""
    request = of_text(text)
    request.budget.CopyFrom(budget)
    requests.budget(request)
    return MessageToJson(request, indent=None)
