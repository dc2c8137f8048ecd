"""Examples for explaining and examples for scoring, which never share a document.

Documents are dealt out, not examples: in the order of a keyed hash, every second one is for
scoring, first among the documents that activate the component, then among the rest. So both halves
have both sorts, the draw depends on nothing but seed, component and documents, and an overlap
cannot happen.

Where the source names no document, examples that share a run of tokens count as one. The same
sequence is one document whatever it is called.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine.components import (
    ACTIVE_SHARE,
    Component,
    Example,
    HeadExample,
    keyed,
)

WINDOW = 32
"""Tokens of a neuron's or latent's example that are kept, around its peak."""

_SHARED_RUN = 8

E = TypeVar("E", Example, HeadExample)


@dataclass(frozen=True)
class Half(Generic[E]):
    """Examples of one component: those that activate it, strongest first, and quiet ones.

    An example's `document_id` is its group's here; `documents` holds every name of every group.
    """

    active: tuple[E, ...]
    quiet: tuple[E, ...]
    documents: frozenset[str]

    def strongest(self, count: int) -> tuple[E, ...]:
        return self.active[:count]

    def spread(self, count: int) -> tuple[E, ...]:
        """Active examples over all strengths: evenly by rank, both ends included."""
        if count >= len(self.active):
            return self.active
        places = np.linspace(0, len(self.active) - 1, count).round().astype(int).tolist()
        return tuple(self.active[place] for place in places)


@dataclass(frozen=True)
class Split(Generic[E]):
    """One component's examples in two halves without a document in common.

    `scale` is the component's largest activation, `seed` what the halves were drawn with.
    """

    component: str
    explaining: Half[E]
    scoring: Half[E]
    scale: float
    seed: int


def split_tokens(
    component: Component,
    *,
    seed: int,
    window: int = WINDOW,
    shown: frozenset[str] = frozenset(),
) -> Split[Example]:
    """The halves for a neuron or latent, each example cut to `window` tokens. Documents that were
    `shown` to an explainer, of whatever examples it had, are not on the scoring side.

    An active example is cut around its peak, a quiet one where the seed says; a long active one
    also gives a quiet window where it has one. Raises FailedPrecondition where there are too few
    documents to explain on some and score on others.
    """
    if window < 1:
        raise InvalidArgument("must be at least 1", field="window")
    if component.is_head:
        raise InvalidArgument(f"{component.address} is a head: it has pairs", field="component")
    examples = [each for each in component.examples if isinstance(each, Example)]
    scale = component.scale
    cut = [
        part
        for example, documents in zip(examples, _documents(examples), strict=True)
        for part in _windows(example, documents, window, scale, seed)
    ]
    return _deal(component.address, cut, scale, seed, shown, needs_quiet=True)


def split_pairs(
    component: Component, *, seed: int, shown: frozenset[str] = frozenset()
) -> Split[HeadExample]:
    """The halves for a head, its examples whole. Raises as `split_tokens`.

    Weak pairs are in every text, so that there need be no quiet ones.
    """
    if not component.is_head:
        raise InvalidArgument(f"{component.address} is not a head", field="component")
    examples = [each for each in component.examples if isinstance(each, HeadExample)]
    whole = list(zip(examples, _documents(examples), strict=True))
    return _deal(component.address, whole, component.scale, seed, shown, needs_quiet=False)


@dataclass(frozen=True)
class _Documents:
    """The group of an example, and the name of its own document."""

    group: str
    own: str


def _windows(
    example: Example, documents: _Documents, window: int, scale: float, seed: int
) -> list[tuple[Example, _Documents]]:
    slack = len(example.token_texts) - window
    if slack <= 0:
        return [(example, documents)]
    found = []
    loud = [place for place, value in enumerate(example.activations) if _active(value, scale)]
    if loud:
        start = min(max(example.peak_position - window // 2, 0), slack)
        found.append(example.cut(start, start + window))
    quiet = _gaps(loud, window, len(example.token_texts))
    if quiet:
        start = quiet[keyed(seed, "window", *example.token_texts) % len(quiet)]
        found.append(example.cut(start, start + window))
    return [(each, documents) for each in found]


def _gaps(loud: Sequence[int], window: int, length: int) -> list[int]:
    """Where a window of a sequence may start so that it holds none of the places `loud`."""
    ends = [-1, *loud, length]
    return [
        start for left, right in pairwise(ends) for start in range(left + 1, right - window + 1)
    ]


def _active(value: float, scale: float) -> bool:
    return scale > 0 and value > ACTIVE_SHARE * scale


def _deal(
    address: str,
    examples: Sequence[tuple[E, _Documents]],
    scale: float,
    seed: int,
    shown: frozenset[str],
    *,
    needs_quiet: bool,
) -> Split[E]:
    active: dict[str, list[E]] = {}
    quiet: dict[str, list[E]] = {}
    names: dict[str, set[str]] = {}
    for example, documents in examples:
        sort = active if _active(example.peak, scale) else quiet
        kept = sort.setdefault(documents.group, [])
        grouped = replace(example, document_id=documents.group)
        if grouped not in kept:
            kept.append(grouped)
        names.setdefault(documents.group, set()).update((documents.group, documents.own))
    firing: list[str] = _shuffled(active, address, seed)
    rest: list[str] = _shuffled(quiet.keys() - active.keys(), address, seed)
    scoring = {*firing[1::2], *rest[1::2]}
    scoring -= {group for group in scoring if names[group] & shown}
    halves: list[Half[E]] = []
    for groups in ({*firing, *rest} - scoring, scoring):
        half = _half(groups, active, quiet, names, seed)
        if not half.active or (needs_quiet and not half.quiet):
            raise FailedPrecondition(
                f"{address} has examples of {len(firing)} documents that activate it and of "
                f"{len(rest)} others: too few to explain on some and to score on "
                f"{'others that were not shown' if shown else 'the rest'}",
                reason="TOO_FEW_DOCUMENTS",
            )
        halves.append(half)
    return Split(address, halves[0], halves[1], scale, seed)


def _half(
    groups: set[str],
    active: dict[str, list[E]],
    quiet: dict[str, list[E]],
    names: dict[str, set[str]],
    seed: int,
) -> Half[E]:
    firing = [each for group in groups for each in active.get(group, ())]
    rest = [each for group in groups for each in quiet.get(group, ())]
    firing.sort(key=lambda each: (-each.peak, keyed(seed, "rank", *each.token_texts)))
    rest.sort(key=lambda each: (keyed(seed, "quiet", *each.token_texts), each.peak))
    return Half(
        tuple(firing), tuple(rest), frozenset(name for group in groups for name in names[group])
    )


def _shuffled(documents: Iterable[str], address: str, seed: int) -> list[str]:
    return sorted(documents, key=lambda document: keyed(seed, address, document))


def _documents(examples: Sequence[E]) -> list[_Documents]:
    """The documents of each example, those together that may be the same."""
    own = [each.document_id or _text_name(each) for each in examples]
    leader = {name: name for name in own}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    seen: dict[tuple[str, ...], str] = {}
    for example, name in zip(examples, own, strict=True):
        runs = {example.token_texts}
        if not example.document_id:
            runs |= _runs(example.token_texts)
        for run in runs:
            first, second = sorted((find(seen.setdefault(run, name)), find(name)))
            leader[second] = first
    return [_Documents(find(name), name) for name in own]


def _text_name(example: Example | HeadExample) -> str:
    return f"text:{keyed(0, *example.token_texts):016x}"


def _runs(texts: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {texts[at : at + _SHARED_RUN] for at in range(len(texts) - _SHARED_RUN + 1)}
