"""Which explanation of a component is its best: the rule that docs/explanations.md calls Choice.

People first: the best rated, then the newest. Else the one that detection (of a head, head pairs)
puts highest by AUC, then what others publish the highest score for, then the newest. Numbers are
compared within one judge only: a language model's before the offline simulator's, and of several
the one that was asked last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.explainer.engine.explanations import Method
from services.explainer.engine.offline_simulator import OfflineSimulator

UNRATED = 3.0
"""What a human text without a rating counts as: better than a bad one."""

_HEADLINE = "ev_correlation"


@dataclass(frozen=True)
class Mark:
    """A number that choice goes by. `judge` says whose it is; of a published one, its name."""

    judge: str
    published: bool
    value: float
    created_ms: int


@dataclass(frozen=True)
class Candidate:
    """What choice knows of an explanation; `rating` is the mean, None where nobody rated it."""

    number: int
    id: str
    method: Method
    created_ms: int
    based_on: str
    rating: float | None
    marks: tuple[Mark, ...]


def best_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Explanations of one component, the best first, then the newest."""
    known = list(candidates)
    if len(known) < 2:
        return known
    by_id = {each.id: each for each in known}
    judges = _judges(known)

    def rank(each: Candidate) -> tuple[float, ...]:
        newest = (-each.created_ms, -each.number)
        if each.method is Method.HUMAN:
            return 0, -_rating(each, by_id), 0.0, *newest
        for place, judge in enumerate(judges, start=1):
            value = _value(each, judge)
            if value is not None:
                return 1, place, -value, *newest
        return 1, len(judges) + 1, 0.0, *newest

    return sorted(known, key=rank)


def _rating(candidate: Candidate, by_id: dict[str, Candidate]) -> float:
    """Its mean rating; of an edit that nobody rated, that of the text it was made from."""
    seen: set[str] = set()
    each: Candidate | None = candidate
    while each is not None and each.id not in seen:
        if each.rating is not None:
            return each.rating
        seen.add(each.id)
        each = by_id.get(each.based_on)
    return UNRATED


def _judges(candidates: Sequence[Candidate]) -> list[tuple[bool, str]]:
    """Whose numbers count, in this order: (published, judge)."""
    newest: dict[tuple[bool, str], int] = {}
    for each in candidates:
        for mark in each.marks:
            judge = (mark.published, mark.judge)
            newest[judge] = max(newest.get(judge, 0), mark.created_ms)
    return sorted(
        newest,
        key=lambda judge: (
            judge[0],
            judge[1] != _HEADLINE if judge[0] else judge[1] == OfflineSimulator.name,
            -newest[judge],
            judge[1],
        ),
    )


def _value(candidate: Candidate, judge: tuple[bool, str]) -> float | None:
    """The newest number of this judge."""
    found = [each for each in candidate.marks if (each.published, each.judge) == judge]
    return max(found, key=lambda each: each.created_ms).value if found else None
