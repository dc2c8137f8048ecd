"""Finding the rules that say most about where a component fires.

Greedy: of all conditions, and of pairs of conditions that narrow each other down, take the one
whose mean activation removes most of the squared error, give it the places where it holds, and go
on with the rest, until a rule would explain too little. A mean is shrunk towards silence by one
place, so that what was seen once weighs less. Of rules that explain the same, the plainest wins: a
token before its ending, one condition before two. So the same examples give the same text.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from services.explainer.engine.token_patterns import SCALE, Condition, Relation, Rule

MAX_RULES = 10
_LEAST_SHARE = 0.02
_COMPLEXITY = 0.03
_LEAST_STRENGTH = 0.05

Place = tuple[Sequence[Condition], float]
"""What holds at a place, and the activation there as a share of the largest, 0..1."""

_WHAT = (
    Relation.TOKEN, Relation.FROM, Relation.FOLDED, Relation.NUMBER, Relation.CAPITALISED,
    Relation.PUNCTUATION, Relation.LINE_BREAK, Relation.ENDING,
)  # fmt: skip
_WHERE = (
    Relation.PREVIOUS, Relation.TO, Relation.NEAR, Relation.REPEATED, Relation.FIRST,
    Relation.ONE_BACK, Relation.TO_FIRST, Relation.COPY, Relation.AFTER_COPY,
)  # fmt: skip
_PLAINEST_FIRST = (*_WHAT, *_WHERE, Relation.SELF, Relation.ANY)
_RANK = {relation: rank for rank, relation in enumerate(_PLAINEST_FIRST)}

# A key is the numbers of one or two conditions; the second is -1 where there is one.
_Key = tuple[int, int]


def learn(places: Iterable[Place], *, max_rules: int = MAX_RULES) -> tuple[Rule, ...]:
    """The rules for these places, the first that holds deciding."""
    places = list(places)
    values = [value for _, value in places]
    # What never goes with an activation explains none: only what holds at active places matters.
    known = _Conditions(holding for holding, value in places if value > 0)
    sums: dict[_Key, float] = defaultdict(float)
    for holding, value in places:
        if value > 0:
            for key in known.keys(holding):
                sums[key] += value
    keys_at = [[key for key in known.keys(holding) if key in sums] for holding, _ in places]
    counts: dict[_Key, int] = defaultdict(int)
    where: dict[_Key, list[int]] = defaultdict(list)
    for number, keys in enumerate(keys_at):
        for key in keys:
            counts[key] += 1
            where[key].append(number)
    total = sum(value * value for value in values)
    candidates = list(sums)
    covered = [False] * len(values)
    rules: list[Rule] = []
    while len(rules) < max_rules and candidates:
        gains = [_gain(sums[key], counts[key], key[1] >= 0) for key in candidates]
        gain = max(gains)
        # Sums that were added up in another order differ in the last digits.
        best = min(
            (key for key, each in zip(candidates, gains, strict=True) if each > gain - 1e-9),
            key=known.plainness,
        )
        strength = sums[best] / (counts[best] + 1)
        if gain < _LEAST_SHARE * total or strength < _LEAST_STRENGTH:
            break
        # As it is written, so that reading the text gives these rules.
        rules.append(Rule(_said(known.of(best)), float(f"{min(strength, 1.0) * SCALE:.3g}")))
        for number in where[best]:
            if covered[number]:
                continue
            covered[number] = True
            for key in keys_at[number]:
                counts[key] -= 1
                if values[number] > 0:
                    sums[key] -= values[number]
        candidates = [each for each in candidates if counts[each] > 0 and sums[each] > 1e-9]
    return tuple(rules)


class _Conditions:
    """The conditions that hold at some of the given places, by number; others are left out."""

    def __init__(self, places: Iterable[Sequence[Condition]]) -> None:
        self._known = list(dict.fromkeys(each for holding in places for each in holding))
        self._numbers = {condition: number for number, condition in enumerate(self._known)}

    def keys(self, holding: Sequence[Condition]) -> list[_Key]:
        """Each condition, and each that says what with each that says where."""
        what, where, every = [], [], []
        for condition in holding:
            number = self._numbers.get(condition)
            if number is None:
                continue
            every.append((number, -1))
            if condition.relation in _WHAT:
                what.append(number)
            elif condition.relation in _WHERE:
                where.append(number)
        return every + [(one, other) for one in what for other in where]

    def of(self, key: _Key) -> tuple[Condition, ...]:
        return tuple(self._known[number] for number in key if number >= 0)

    def plainness(self, key: _Key) -> tuple[int, list[tuple[int, str]]]:
        """Smaller is plainer."""
        conditions = self.of(key)
        return len(conditions), [(_RANK[each.relation], each.text) for each in conditions]


def _said(conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """With a subject: `any token after "x"`."""
    if conditions[0].relation in (Relation.PREVIOUS, Relation.NEAR):
        return Condition(Relation.ANY), *conditions
    return conditions


def _gain(total: float, count: int, narrowed: bool) -> float:
    """Squared error that the shrunk mean removes, less a little where two conditions are needed."""
    if count < 1 + narrowed:
        return 0.0
    mean = total / (count + 1)
    removed = 2 * mean * total - count * mean * mean
    return removed * (1 - _COMPLEXITY) if narrowed else removed
