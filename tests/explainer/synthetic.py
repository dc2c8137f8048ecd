"""Components whose behaviour is known, and a model on the test server that follows explanations."""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from services.explainer.engine.components import Component, Example, HeadExample
from services.explainer.engine.explanations import Explanation, Method, Provenance
from services.explainer.engine.token_patterns import TokenPattern
from tests.explainer.openai_server import Alternatives, Said

WORDS = (
    "the", "a", "of", "box", "red", "cat", "dog", "ran", "to", "and", "saw", "house", "tree",
    "green", "park", "went", "store", "Tom", "Anna", "Ben",
)  # fmt: skip
NAMES = 'Fires on the token " Mary" (10), the token " John" after " and" (5). Promotes " store".'
COLOURS = 'Fires on the token " red" (10), the token " green" (10). Promotes " box".'
HEAD = 'Looks from " her" to " Mary" (10), to an earlier copy of itself (6).'


def texts(number: int, *, length: int = 24, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """Text `number`: drawn words, half of the texts with some of `extra` among them."""
    draw = random.Random(number)
    found = [f" {draw.choice(WORDS)}" for _ in range(length)]
    if number % 2 and extra:
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(1, length - 1)
            chosen = draw.choice(extra).split("|")
            found[place : place + len(chosen)] = chosen
    return tuple(found)


def component(
    rules: str = NAMES, *, extra: Sequence[str] = (" Mary", " and| John"), count: int = 120
) -> Component:
    """A neuron that does what `rules` say, exactly, in units of its own (its maximum is 4)."""
    pattern = TokenPattern.parse(rules)
    examples = []
    for number in range(count):
        tokens = texts(number, extra=extra)
        activations = tuple(0.4 * value for value in pattern.on_tokens(tokens))
        examples.append(
            Example(token_texts=tokens, activations=activations, document_id=f"doc-{number}")
        )
    return Component(address="neuron.1.7", examples=tuple(examples), max_activation=4.0)


def head(rules: str = HEAD, *, count: int = 60) -> Component:
    """A head that does what `rules` say."""
    pattern = TokenPattern.parse(rules)
    examples = []
    for number in range(count):
        tokens = texts(number, length=14, extra=(" Mary| gave| her", " Mary| saw| a| her"))
        places = [(query, key) for query in range(len(tokens)) for key in range(query + 1)]
        values = tuple(pattern.on_pair(tokens, query, key) for query, key in places)
        examples.append(
            HeadExample(token_texts=tokens, pair_activations=values, document_id=f"doc-{number}")
        )
    return Component(address="head.1.2", examples=tuple(examples))


def explanation(text: str, *, component: str = "neuron.1.7") -> Explanation:
    return Explanation(component, text, Provenance(method=Method.HUMAN))


def enclosed(body: dict[str, Any], word: str) -> Any:
    """The data between the tags of a prompt."""
    user = body["messages"][1]["content"]
    (found,) = re.findall(rf"^<({word}-[0-9a-f]{{16}})>\n(.*)\n</\1>$", user, re.MULTILINE)
    return json.loads(found[1])


def plain(item: Any) -> tuple[list[str], dict[str, list[int]]]:
    """The tokens of an item cut in pieces, and the places of those that are marked, by mark."""
    tokens: list[str] = []
    marks: dict[str, list[int]] = {}
    for piece in [item] if isinstance(item, str) else item:
        name, text = next(iter(piece.items())) if isinstance(piece, dict) else ("", piece)
        for token in re.findall(r"\s?\S+", text):
            if name:
                marks.setdefault(name, []).append(len(tokens))
            tokens.append(token)
    return tokens, marks


def follower(*, spread: bool = False) -> Callable[[dict[str, Any]], Said]:
    """A model that understands token patterns perfectly and answers what is asked.

    With `spread`, each grade has an alternative next to it with a quarter of the probability.
    """

    def grade(strength: float) -> Sequence[tuple[str, Alternatives]]:
        value = round(min(strength, 10))
        other = max(value - 1, 0) if value > 5 else value + 1
        if not spread:
            return [(str(value), [(str(value), 1.0)])]
        return [(str(value), [(str(value), 0.75), (str(other), 0.25)])]

    def answer(body: dict[str, Any]) -> Said:
        name = body["response_format"]["json_schema"]["name"]
        pattern = TokenPattern.parse(enclosed(body, "explanation"))
        data = enclosed(body, "data")
        if name == "compare":
            counts = [
                sum(data[side].count(token) for token in pattern.promoted)
                for side in ("first", "second")
            ]
            strength = 5 + 5 * ((counts[0] > counts[1]) - (counts[0] < counts[1]))
            return Said(tokens=[('{"grade":', []), *grade(strength), ("}", [])])
        if name == "simulate":
            strengths = pattern.on_tokens([each["text"] for each in data])
            keys = ("activations", "token", "activation")
        else:
            strengths = [_graded(name, pattern, each["text"]) for each in data]
            keys = ("answers", "id", "grade")
        tokens: list[tuple[str, Alternatives]] = [(f'{{"{keys[0]}":[', [])]
        for number, strength in enumerate(strengths, start=1):
            comma = "," if number > 1 else ""
            tokens.append((f'{comma}{{"{keys[1]}":{number},"{keys[2]}": ', []))
            tokens += [*grade(strength), ("}", [])]
        return Said(tokens=[*tokens, ("]}", [])])

    return answer


def _graded(name: str, pattern: TokenPattern, item: Any) -> float:
    tokens, marks = plain(item)
    if name == "relate":
        if "from_and_to" in marks:
            (query,) = (key,) = marks["from_and_to"]
        else:
            (query,), (key,) = marks["from"], marks["to"]
        return 10.0 if pattern.on_pair(tokens, query, key) > 1 else 0.0
    strengths = pattern.on_tokens(tokens)
    if name == "fuzz":
        marked = [strengths[place] for place in marks["marked"]]
        return 10.0 if sum(marked) / len(marked) > 1 else 0.0
    return 10.0 if max(strengths) > 1 else 0.0
