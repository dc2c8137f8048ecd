"""From the service's requests to what is done: every refusal names its field."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tdb.explainer.v1 import explain_pb2, explanation_pb2

from services.common.addresses import Kind, parse
from services.common.errors import InvalidArgument, inside
from services.explainer import wire
from services.explainer.engine.budget import Budget
from services.explainer.engine.explanations import MAX_CHARACTERS, Method
from services.explainer.making import Task
from services.explainer.scoring import MAX_ITEMS, Scoring
from services.explainer.stored import ExplainedModel

MAX_COMPONENTS = 10_000
MAX_TEXTS, MAX_TOKENS = 100, 1_024
MAX_NAME = 200

_HASH = re.compile(r"[0-9a-f]{1,128}")


@dataclass(frozen=True)
class Write:
    """A text that a person wrote: of a component, or an edit of the explanation `based_on`."""

    text: str
    model: ExplainedModel | None
    component: str
    based_on: str


@dataclass(frozen=True)
class Simulate:
    """What an explanation leads one to expect on `texts`: a stored one's id, or a text."""

    id: str
    text: str
    texts: tuple[tuple[str, ...], ...]
    seed: int


def model(given: explanation_pb2.ExplainedModel) -> ExplainedModel:
    """Raises InvalidArgument."""
    with inside("id"):
        found = name(given.id, "the id of a model is required, for example gpt2")
    if given.weights_hash:
        _check_hash(given.weights_hash)
    dictionaries: dict[str, str] = {}
    for number, each in enumerate(given.dictionaries):
        with inside(f"dictionaries[{number}]"):
            with inside("id"):
                dictionary = name(each.id, "the id of a dictionary is required")
                if dictionary in dictionaries:
                    raise InvalidArgument("stands twice")
            _check_hash(each.weights_hash)
            dictionaries[dictionary] = each.weights_hash
    return ExplainedModel(found, given.weights_hash, tuple(dictionaries.items()))


def _check_hash(given: str) -> None:
    if not _HASH.fullmatch(given):
        raise InvalidArgument(
            "is a hash in lower-case hexadecimal digits, as GetModel gives it",
            field="weights_hash",
        )


@lru_cache(2 * MAX_COMPONENTS)  # a table asks for the same again and again
def component(given: str) -> str:
    """An address of something that has explanations, as it is spelt. Raises InvalidArgument."""
    address = parse(given)
    if address.kind not in (Kind.NEURON, Kind.LATENT, Kind.HEAD) or address.is_node:
        raise InvalidArgument(
            f"{given}: neurons, latents and heads have explanations, for example neuron.3.17"
        )
    return str(address)


def components(given: Sequence[str]) -> list[str]:
    """At least one, each once. Raises InvalidArgument."""
    if not given:
        raise InvalidArgument("name at least one component", reason="REQUIRED")
    if len(given) > MAX_COMPONENTS:
        raise InvalidArgument(
            f"at most {MAX_COMPONENTS} fit in one call, these are {len(given)}", reason="TOO_LARGE"
        )
    seen: dict[str, None] = {}
    for number, each in enumerate(given):
        with inside(f"[{number}]"):
            address = component(each)
            if address in seen:
                raise InvalidArgument(f"{address} stands twice")
        seen[address] = None
    return list(seen)


def name(given: str, required: str) -> str:
    """Raises InvalidArgument where it is missing or far too long."""
    if not given:
        raise InvalidArgument(required, reason="REQUIRED")
    if len(given) > MAX_NAME:
        raise InvalidArgument(f"has at most {MAX_NAME} characters, this {len(given)}")
    return given


def id(given: str) -> str:
    """Of an explanation. Raises InvalidArgument."""
    return name(given, "the id of an explanation is required")


def text(given: str) -> str:
    """A text that a person wrote, without white space around it. Raises InvalidArgument."""
    found = given.strip()
    if not found:
        raise InvalidArgument("an explanation has a text", reason="REQUIRED")
    if len(found) > MAX_CHARACTERS:
        raise InvalidArgument(
            f"an explanation has at most {MAX_CHARACTERS} characters, this {len(found)}"
        )
    if any((sign < " " and sign not in "\n\t") or sign == "\x7f" for sign in found):
        raise InvalidArgument("holds a control character other than line break and tab")
    return found


def write(request: explanation_pb2.WriteExplanationRequest) -> Write:
    """Raises InvalidArgument."""
    with inside("text"):
        found = text(request.text)
    if request.based_on:
        with inside("based_on"):
            base = id(request.based_on)
        for field in ("model", "component"):
            if (field == "model" and request.HasField("model")) or (
                field == "component" and request.component
            ):
                raise InvalidArgument(
                    "is that of the explanation that based_on names: leave it out", field=field
                )
        return Write(found, None, "", base)
    if not request.HasField("model"):
        raise InvalidArgument(
            "the model is required where nothing is edited", field="model", reason="REQUIRED"
        )
    with inside("model"):
        of = model(request.model)
    with inside("component"):
        return Write(found, of, component(request.component), "")


def rating(request: explanation_pb2.RateExplanationRequest) -> int | None:
    """Raises InvalidArgument."""
    if not request.HasField("rating"):
        return None
    if not 1 <= request.rating <= 5:
        raise InvalidArgument("is 1 (wrong) to 5 (right), or absent", field="rating")
    return request.rating


def method(given: int) -> Method:
    """A method that makes explanations. Raises InvalidArgument."""
    known = ", ".join(
        f"METHOD_{each.name}" for each in Method if each not in (Method.HUMAN, Method.IMPORTED)
    )
    if given == explanation_pb2.METHOD_UNSPECIFIED:
        raise InvalidArgument(f"a method is required: {known}", reason="REQUIRED")
    found = wire.METHODS[given]
    if found in (Method.HUMAN, Method.IMPORTED):
        raise InvalidArgument(f"nothing can be made by it: the methods are {known}")
    return found


def scoring(given: explain_pb2.Scoring) -> Scoring:
    """Raises InvalidArgument."""
    if not given.scorers:
        raise InvalidArgument("name at least one score", field="scorers", reason="REQUIRED")
    found = []
    for number, each in enumerate(given.scorers):
        if each == explanation_pb2.SCORER_UNSPECIFIED:
            raise InvalidArgument(
                "a scorer is required", field=f"scorers[{number}]", reason="REQUIRED"
            )
        if wire.SCORERS[each] in found:
            raise InvalidArgument("stands twice", field=f"scorers[{number}]")
        found.append(wire.SCORERS[each])
    items = given.items if given.HasField("items") else None
    if items is not None and not 1 <= items <= MAX_ITEMS:
        raise InvalidArgument(f"is in 1..{MAX_ITEMS}, or absent", field="items")
    return Scoring(
        scorers=tuple(found),
        judge=wire.JUDGES[given.judge],
        items=items,
        seed=given.seed if given.HasField("seed") else None,
    )


def task(request: explain_pb2.ExplainRequest, author: str) -> Task:
    """Raises InvalidArgument."""
    with inside("method"):
        how = method(request.method)
    found = None
    if request.HasField("scoring"):
        with inside("scoring"):
            found = scoring(request.scoring)
    made = Task(method=how, seed=request.seed, scoring=found, author=author)
    with inside("component"):
        address = component(request.component)
    made.check(address)
    return made


def dataset(given: str) -> str:
    """Raises InvalidArgument."""
    with inside("dataset"):
        return name(given, "the name of a dataset is required")


def budget(
    request: explain_pb2.ExplainRequest
    | explain_pb2.ExplainManyRequest
    | explain_pb2.ScoreRequest
    | explain_pb2.SimulateRequest,
) -> Budget:
    """Raises InvalidArgument."""
    if not request.HasField("budget"):
        return Budget()
    given = request.budget
    with inside("budget"):
        if not (given.HasField("max_tokens") or given.HasField("max_cost")):
            raise InvalidArgument("give max_tokens, max_cost or both", reason="REQUIRED")
        return Budget(
            max_tokens=given.max_tokens if given.HasField("max_tokens") else None,
            max_cost=given.max_cost if given.HasField("max_cost") else None,
        )


def simulate(request: explain_pb2.SimulateRequest) -> Simulate:
    """Raises InvalidArgument."""
    which = request.WhichOneof("explanation")
    if which is None:
        raise InvalidArgument("give an id or a text", field="explanation", reason="REQUIRED")
    with inside(which):
        given = id(request.id) if which == "id" else text(request.text)
    if not request.texts:
        raise InvalidArgument("give at least one text", field="texts", reason="REQUIRED")
    if len(request.texts) > MAX_TEXTS:
        raise InvalidArgument(
            f"at most {MAX_TEXTS} fit in one call, these are {len(request.texts)}", field="texts"
        )
    for number, each in enumerate(request.texts):
        if not 1 <= len(each.tokens) <= MAX_TOKENS:
            raise InvalidArgument(
                f"a text has 1 to {MAX_TOKENS} tokens, this {len(each.tokens)}",
                field=f"texts[{number}].tokens",
            )
    return Simulate(
        id=given if which == "id" else "",
        text=given if which == "text" else "",
        texts=tuple(tuple(each.tokens) for each in request.texts),
        seed=request.seed,
    )
