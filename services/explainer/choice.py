"""Which explanation of a component is its best: the rule that docs/explanations.md calls Choice.

People first: the best rated, then the newest. Else the one that detection (of a head, head pairs)
puts highest by AUC, then what others publish the highest score for, then the newest. Numbers are
compared within one judge only: a language model's before the offline simulator's, and of several
the one that was asked last.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from services.explainer.engine.explanations import Method
from services.explainer.engine.offline_simulator import OfflineSimulator

UNRATED = 3.0
"""What a human text without a rating counts as: better than a bad one."""

_HEADLINE = "ev_correlation"


class Mark(NamedTuple):
    """A number that choice goes by. `judge` says whose it is; of a published one, its name."""

    judge: str
    published: bool
    value: float
    created_ms: int


class Candidate(NamedTuple):
    """What choice knows of an explanation; `rating` is the mean, None where nobody rated it, and
    of a judge's `marks` the last is the newest."""

    number: int
    id: str
    method: Method
    created_ms: int
    based_on: str
    rating: float | None
    marks: Sequence[Mark]


def best_first(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Explanations of one component, the best first, then the newest."""
    if len(candidates) < 2:
        return candidates
    judges = {judge: place for place, judge in enumerate(_judges(candidates), start=1)}
    by_id = {each.id: each for each in candidates}

    def rank(each: Candidate) -> tuple[float, ...]:
        if each.method is Method.HUMAN:
            return 0, -_rating(each, by_id), -each.created_ms, -each.number
        # Numbers of judges that come first hide those of later ones.
        place, value = len(judges) + 1, 0.0
        for judge, published, number, _ in each.marks:
            other = judges[published, judge]
            if other <= place:
                place, value = other, number
        return place, -value, -each.created_ms, -each.number

    return sorted(candidates, key=rank)


def _rating(candidate: Candidate, by_id: Mapping[str, Candidate]) -> float:
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
        for judge, published, _, created_ms in each.marks:
            newest[published, judge] = max(newest.get((published, judge), 0), created_ms)
    if len(newest) < 2:
        return list(newest)
    return sorted(
        newest,
        key=lambda judge: (
            judge[0],
            judge[1] != _HEADLINE if judge[0] else judge[1] == OfflineSimulator.name,
            -newest[judge],
            judge[1],
        ),
    )
