"""Finding the rules that say most about where a component fires.

Greedy: of all conditions, and of pairs of conditions that narrow each other down, take the one
whose mean activation removes most of the squared error, give it the places where it holds, and go
on with the rest, until a rule would explain too little. A mean is shrunk towards silence by one
place, so that what was seen once weighs less. Ties go to what is simpler, then to what is written
first, so that the same examples give the same text.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product

from services.explainer.engine.token_patterns import SCALE, Condition, Relation, Rule

MAX_RULES = 10
_LEAST_SHARE = 0.02
_COMPLEXITY = 0.03
_LEAST_STRENGTH = 0.05

_Key = tuple[Condition, ...]
Place = tuple[Sequence[Condition], float]
"""What holds at a place, and the activation there as a share of the largest, 0..1."""

_WHAT = (
    Relation.TOKEN, Relation.FOLDED, Relation.NUMBER, Relation.CAPITALISED, Relation.PUNCTUATION,
    Relation.LINE_BREAK, Relation.ENDING, Relation.FROM,
)  # fmt: skip
_WHERE = (
    Relation.PREVIOUS, Relation.NEAR, Relation.REPEATED, Relation.FIRST, Relation.TO,
    Relation.ONE_BACK, Relation.TO_FIRST, Relation.COPY, Relation.AFTER_COPY,
)  # fmt: skip


def learn(places: Iterable[Place], *, max_rules: int = MAX_RULES) -> tuple[Rule, ...]:
    """The rules for these places, the first that holds deciding."""
    keys_at: list[list[_Key]] = []
    values: list[float] = []
    sums: dict[_Key, float] = defaultdict(float)
    counts: dict[_Key, int] = defaultdict(int)
    where: dict[_Key, list[int]] = defaultdict(list)
    for number, (holding, value) in enumerate(places):
        keys = _keys(holding)
        keys_at.append(keys)
        values.append(value)
        for key in keys:
            sums[key] += value
            counts[key] += 1
            where[key].append(number)
    total = sum(value * value for value in values)
    # What never goes with an activation explains none.
    candidates = [key for key, value in sums.items() if value > 0]
    covered = [False] * len(values)
    rules: list[Rule] = []
    while len(rules) < max_rules and candidates:
        gain, best = max(
            ((_gain(sums[key], counts[key], len(key)), _Ordered(key)) for key in candidates),
        )
        strength = sums[best.key] / (counts[best.key] + 1)
        if gain < _LEAST_SHARE * total or strength < _LEAST_STRENGTH:
            break
        # As it is written, so that reading the text gives these rules.
        rules.append(Rule(best.key, float(f"{min(strength, 1.0) * SCALE:.3g}")))
        for number in where[best.key]:
            if covered[number]:
                continue
            covered[number] = True
            for other in keys_at[number]:
                sums[other] -= values[number]
                counts[other] -= 1
        candidates = [each for each in candidates if counts[each] > 0 and sums[each] > 1e-9]
    return tuple(rules)


def _keys(holding: Sequence[Condition]) -> list[_Key]:
    what = [each for each in holding if each.relation in _WHAT]
    where = [each for each in holding if each.relation in _WHERE]
    return [*((each,) for each in holding), *product(what, where)]


def _gain(total: float, count: int, conditions: int) -> float:
    """Squared error that the shrunk mean removes, less a little for each further condition."""
    if count < 1 or (conditions > 1 and count < 2):
        return 0.0
    mean = total / (count + 1)
    removed = 2 * mean * total - count * mean * mean
    return removed * (1 - _COMPLEXITY * (conditions - 1))


class _Ordered:
    """Makes ties end the same way: the key that is shorter, then earlier in the alphabet, wins."""

    def __init__(self, key: _Key) -> None:
        self.key = key

    def __lt__(self, other: "_Ordered") -> bool:
        mine = (len(self.key), [str(each) for each in self.key])
        return mine > (len(other.key), [str(each) for each in other.key])
