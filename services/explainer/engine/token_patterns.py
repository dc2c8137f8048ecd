"""A component's behaviour as rules over tokens, and their one text form.

    Fires on the token " Mary" (10), the token " John" after " and" (6.5). Promotes " her", " us".
    Looks from " to" to an earlier copy of itself (8), to the first token (2.5).

The text is the explanation: people read it, edit it and store it, and `TokenPattern.parse` reads
it back, so what is scored is what is shown. A rule holds where all its conditions do, and says how
strongly the component fires there, 10 being its maximum. The first rule that holds decides; where
none does, the component is silent. For heads a rule is about a pair: the token it reads from
(the query) and the token it looks at (the key).

Which conditions hold at a place is decided in `token_conditions` and `pair_conditions` alone, for
learning rules and for applying them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.common.errors import InvalidArgument

SCALE = 10.0
_NEAR = 8
_ENDINGS = (3, 2)


class Relation(StrEnum):
    """What a condition says; the value is how it is written, before its text if it has one."""

    ANY = "any token"
    TOKEN = "the token"
    FOLDED = "any form of"
    ENDING = "a word ending in"
    NUMBER = "a number"
    CAPITALISED = "a capitalised word"
    PUNCTUATION = "punctuation"
    LINE_BREAK = "a line break"
    FIRST = "the first token"
    REPEATED = "a token that occurred before"
    PREVIOUS = "after"
    NEAR = "shortly after"
    FROM = "from"
    TO = "to"
    SELF = "to itself"
    ONE_BACK = "to the token before"
    TO_FIRST = "to the first token"
    COPY = "to an earlier copy of itself"
    AFTER_COPY = "to the token after an earlier copy of itself"


_WITH_TEXT = frozenset(
    {
        Relation.TOKEN,
        Relation.FOLDED,
        Relation.ENDING,
        Relation.PREVIOUS,
        Relation.NEAR,
        Relation.FROM,
        Relation.TO,
    }
)
_OF_PAIRS = frozenset(
    {
        Relation.FROM,
        Relation.TO,
        Relation.SELF,
        Relation.ONE_BACK,
        Relation.TO_FIRST,
        Relation.COPY,
        Relation.AFTER_COPY,
    }
)
_FIRES, _LOOKS = "Fires on ", "Looks "
"""How the text begins; what is said of pairs begins with a preposition."""
_LONGEST_FIRST = sorted(Relation, key=lambda relation: -len(relation.value))
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Condition:
    """One thing that is true of a token, or of a pair; `text` where the relation has one."""

    relation: Relation
    text: str = ""

    def __str__(self) -> str:
        if self.relation not in _WITH_TEXT:
            return self.relation.value
        return f"{self.relation.value} {json.dumps(self.text, ensure_ascii=False)}"


@dataclass(frozen=True)
class Rule:
    """Where all conditions hold, the component fires with `strength`, 0..10."""

    conditions: tuple[Condition, ...]
    strength: float

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.conditions))} ({self.strength:.3g})"


@dataclass(frozen=True)
class TokenPattern:
    """Rules, the first that holds first, and the tokens that the component promotes."""

    rules: tuple[Rule, ...]
    promoted: tuple[str, ...] = ()

    def __str__(self) -> str:
        fires = ", ".join(map(str, self.rules)) or "nothing found"
        text = f"{_LOOKS if self.is_of_pairs else _FIRES}{fires}."
        if self.promoted:
            quoted = (json.dumps(token, ensure_ascii=False) for token in self.promoted)
            text += f" Promotes {', '.join(quoted)}."
        return text

    @classmethod
    def parse(cls, text: str) -> "TokenPattern":
        """Reads the text form. Raises InvalidArgument where it is no token pattern."""
        reader = _Reader(text)
        if not reader.skip(_LOOKS):
            reader.expect(_FIRES)
        rules = [] if reader.skip("nothing found") else [reader.rule()]
        while rules and reader.skip(", "):
            rules.append(reader.rule())
        reader.expect(".")
        promoted = []
        if reader.skip(" Promotes "):
            promoted.append(reader.quoted())
            while reader.skip(", "):
                promoted.append(reader.quoted())
            reader.expect(".")
        reader.end()
        return cls(tuple(rules), tuple(promoted))

    @property
    def is_of_pairs(self) -> bool:
        """Whether it is about a head: where a token alone is looked at, it would never hold."""
        return any(each.relation in _OF_PAIRS for rule in self.rules for each in rule.conditions)

    def strength(self, holding: frozenset[Condition]) -> float:
        """How strongly the component fires where exactly these conditions hold, 0..10."""
        for rule in self.rules:
            if holding.issuperset(rule.conditions):
                return rule.strength
        return 0.0

    def on_tokens(self, texts: Sequence[str]) -> list[float]:
        """The strength expected at each token."""
        return [self.strength(frozenset(holding)) for holding in token_conditions(texts)]

    def on_pair(self, texts: Sequence[str], query: int, key: int) -> float:
        """The strength expected of a head at one pair."""
        return self.strength(frozenset(pair_conditions(texts, query, key)))


def token_conditions(texts: Sequence[str]) -> Iterator[tuple[Condition, ...]]:
    """For each token, the conditions that hold there."""
    seen: set[str] = set()
    for place, text in enumerate(texts):
        holding = [Condition(Relation.ANY), Condition(Relation.TOKEN, text), *_shapes(text)]
        if place == 0:
            holding.append(Condition(Relation.FIRST))
        else:
            holding.append(Condition(Relation.PREVIOUS, texts[place - 1]))
        if text in seen:
            holding.append(Condition(Relation.REPEATED))
        seen.add(text)
        near = dict.fromkeys(texts[max(place - _NEAR, 0) : place])
        holding += [Condition(Relation.NEAR, other) for other in near]
        yield tuple(holding)


def _shapes(text: str) -> Iterator[Condition]:
    word = text.strip()
    if "\n" in text:
        yield Condition(Relation.LINE_BREAK)
    if not word:
        return
    if word.casefold() != text:
        yield Condition(Relation.FOLDED, word.casefold())
    if word.isnumeric():
        yield Condition(Relation.NUMBER)
    elif word.isalpha():
        if word[0].isupper():
            yield Condition(Relation.CAPITALISED)
        for length in _ENDINGS:
            if len(word) > length + 1:
                yield Condition(Relation.ENDING, word[-length:].casefold())
    elif not any(sign.isalnum() for sign in word):
        yield Condition(Relation.PUNCTUATION)


def pair_conditions(texts: Sequence[str], query: int, key: int) -> tuple[Condition, ...]:
    """The conditions that hold for a head's pair."""
    holding = [
        Condition(Relation.ANY),
        Condition(Relation.FROM, texts[query]),
        Condition(Relation.TO, texts[key]),
    ]
    if key == query:
        holding.append(Condition(Relation.SELF))
    elif texts[key] == texts[query]:
        holding.append(Condition(Relation.COPY))
    if key == query - 1:
        holding.append(Condition(Relation.ONE_BACK))
    if key == 0:
        holding.append(Condition(Relation.TO_FIRST))
    elif key - 1 < query and texts[key - 1] == texts[query] and key != query:
        holding.append(Condition(Relation.AFTER_COPY))
    return tuple(holding)


class _Reader:
    """Reads the text form from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text.strip()
        self._at = 0

    def skip(self, wanted: str) -> bool:
        found = self._text.startswith(wanted, self._at)
        self._at += len(wanted) * found
        return found

    def expect(self, wanted: str) -> None:
        if not self.skip(wanted):
            raise self._error(f"{wanted.strip() or 'a space'} is expected")

    def end(self) -> None:
        if self._at != len(self._text):
            raise self._error("nothing more is expected")

    def quoted(self) -> str:
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except ValueError:
            value = None
        if not isinstance(value, str):
            raise self._error("a text in quotes is expected")
        return value

    def rule(self) -> Rule:
        conditions = [self._condition()]
        while not self.skip(" ("):
            self.expect(" ")
            conditions.append(self._condition())
        number = _NUMBER.match(self._text, self._at)
        if number is None or float(number[0]) > SCALE:
            raise self._error("a strength from 0 to 10 is expected")
        self._at = number.end()
        self.expect(")")
        return Rule(tuple(conditions), float(number[0]))

    def _condition(self) -> Condition:
        for relation in _LONGEST_FIRST:
            if relation in _WITH_TEXT:
                if self.skip(f"{relation.value} "):
                    return Condition(relation, self.quoted())
            elif self.skip(relation.value):
                return Condition(relation)
        raise self._error('a condition is expected, such as the token "x" or after "x"')

    def _error(self, expected: str) -> InvalidArgument:
        return InvalidArgument(
            f"not a token pattern: {expected} at character {self._at + 1}", field="text"
        )
