"""The six behaviours as prompts that only the behaviour answers.

Each prompt names the next token that the behaviour asks for and the token that a shortcut would
give: the other person, the other surname, the verb of the nearer noun. Prompts come in groups in
which a shortcut is right for one half only, for instance the same two people with either of them
giving, so that "always the first name" scores 50 %. Every prompt needs a pair of words which
`demo.corpus` holds out of all training text; `Prompt.held_out` says which.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from demo.corpus import (
    CAUSE,
    COLOUR_OF,
    COLOURED_TWO,
    COLOURS,
    FILLER,
    MEETING,
    MEN,
    NAMES,
    PLACES,
    PLURALS,
    SPEECH,
    SURNAMES,
    THINGS,
    WOMEN,
    Combination,
    Person,
    Scene,
    combinations,
    held_out,
    noun_phrase,
    ordered,
)


@dataclass(frozen=True)
class Prompt:
    text: str
    target: str
    distractor: str
    variant: str
    held_out: tuple[Combination, ...]
    determined: bool = True
    """False for a control where the target is only one of many right continuations."""


@dataclass(frozen=True)
class Behaviour:
    name: str
    title: str
    example: Prompt
    groups: Callable[[Scene], list[Prompt]]
    """One group of prompts, in which each shortcut fails as often as it succeeds."""


def _draw(scene: Scene, kind: str, one: list[str], other: list[str]) -> Combination:
    """A held-out pair of one word of each list."""
    while True:
        a, b = scene.rng.choice(one), scene.rng.choice(other)
        pair = ordered(kind, a, b) if one is other else (kind, a, b)
        if a != b and held_out(pair):
            return pair


_ASIDES = [sentence for sentence in FILLER if "{a}" in sentence and "{b}" not in sentence]


def _aside(scene: Scene, person: Person) -> str:
    """A neutral sentence about `person`, to stand before or inside a prompt."""
    return scene.choose(_ASIDES, a=person, own=person.own) + " "


def _stranger(scene: Scene, *known: str, among: list[str] = NAMES) -> Person:
    return Person(scene.rng.choice([name for name in among if name not in known]))


def _indirect_object(scene: Scene) -> list[Prompt]:
    person, where = _draw(scene, "person", NAMES, NAMES), _draw(scene, "where", THINGS, PLACES)
    first, second = scene.rng.sample(person[1:], 2)
    given = {"a": first, "b": second, "thing": where[1], "place": where[2]}
    meeting = scene.choose(MEETING, s="{s}", **given)
    held = (person, where) if where in combinations(meeting) else (person,)
    aside = _aside(scene, _stranger(scene, first, second))
    prompts = []
    for before, wording in (("", ""), (aside, ", after another person")):
        for giver, receiver, order in ((second, first, "ABB"), (first, second, "BAB")):
            text = before + scene.fill(meeting, s=giver)
            prompts.append(Prompt(text, f" {receiver}", f" {giver}", order + wording, held))
    return prompts


_MET = (
    "{a} met {b} at the {place}.",
    "{a} {went} to the {place}. {b} was {doing} {spot}.",
    "On {week} I saw {a} and {b}.",
    "The names on the list were {a} and {b}.",
    "When {a} and {b} were at the {place}, {b} {gave} a {thing} to {a}.",
)
_AGAIN = ("Then {a}", "Later {a}", "On {week} I saw {a}", "The {animal} {slept} {spot}. {a}")


def _two_facts(
    scene: Scene, firsts: list[str], seconds: list[str]
) -> tuple[list[tuple[str, str]], Combination]:
    """Two different first words with two different second words, held out together."""
    while True:
        two = list(zip(scene.rng.sample(firsts, 2), scene.rng.sample(seconds, 2), strict=True))
        pair = ordered("facts", *(" ".join(fact) for fact in two))
        if held_out(pair):
            return two, pair


def _induction(scene: Scene) -> list[Prompt]:
    facts, held = _two_facts(scene, NAMES, SURNAMES)
    a, b = (Person(*fact) for fact in facts)
    met, again = scene.rng.choice(_MET), scene.rng.choice(_AGAIN)
    introduction = scene.fill(met, a=a, b=b)
    return [
        Prompt(
            f"{introduction} {scene.fill(again, a=asked.first)}",
            f" {asked.last}",
            f" {other.last}",
            f"the {which} person",
            (held,),
        )
        for asked, other, which in ((a, b, "first"), (b, a, "second"))
    ]


def _agreement(scene: Scene) -> list[Prompt]:
    held = _draw(scene, "beside", THINGS, THINGS)
    head, attractor = scene.rng.sample(held[1:], 2)
    past = scene.rng.random() < 0.3
    opening, singular, plural = ("Yesterday the", "was", "were") if past else ("The", "is", "are")
    before = _aside(scene, _stranger(scene)) if scene.rng.random() < 0.3 else ""
    prompts = []
    for many in (True, False):
        for others in (False, True):
            phrase = noun_phrase(scene, head, attractor, many, others)
            target, distractor = (plural, singular) if many else (singular, plural)
            variant = (
                f"{'plural' if many else 'singular'} near {'plural' if others else 'singular'}"
            )
            text = f"{before}{opening} {phrase}"
            prompts.append(Prompt(text, f" {target}", f" {distractor}", variant, (held,)))
    return prompts


_OWNING = [cause for cause in CAUSE if "{thing}" in cause]


def _pronoun(scene: Scene) -> list[Prompt]:
    prompts = []
    for names, others, target, distractor in (
        (WOMEN, MEN, " she", " he"),
        (MEN, WOMEN, " he", " she"),
    ):
        held = _draw(scene, "owner", names, THINGS)
        other = _stranger(scene, among=others)
        cause = scene.rng.choice([c for c in _OWNING if "{b}" not in c])
        given = "{a} {gave} a {thing} to {b} because"
        for variant, before, template in (
            ("one person", "", cause),
            ("after the other gender", _aside(scene, other), cause),
            ("given to the other gender", "", given),
        ):
            text = before + scene.fill(template, a=held[1], b=other, thing=held[2])
            prompts.append(Prompt(text, target, distractor, variant, (held,)))
    return prompts


_PLACED = [speech for speech in SPEECH if "{thing" in speech and "{place}" in speech]


def _quotation(scene: Scene) -> list[Prompt]:
    held = _draw(scene, "where", THINGS, PLACES)
    a, b = _stranger(scene), _stranger(scene)
    given = {"thing": held[1], "things": PLURALS[held[1]], "place": held[2]}
    speech = scene.choose(_PLACED, **given)
    said = scene.fill("{a} {said},", a=a)
    other = scene.fill('{b} {said}, "{speech}."', b=b, speech=scene.choose(SPEECH, b=a))
    plain = scene.fill("{a} {lost} a {thing} in the {place}.", a=a, **given)
    mark, then = '"', " Then"
    return [
        Prompt(f'{said} "{speech}.', mark, then, "open", (held,)),
        Prompt(f'{other} {said} "{speech}.', mark, then, "open again", (held,)),
        Prompt(plain, then, mark, "control: never opened", (held,), determined=False),
        Prompt(f"{other} {plain}", then, mark, "control: closed", (held,), determined=False),
    ]


def _colour(scene: Scene) -> list[Prompt]:
    facts, held = _two_facts(scene, COLOURS, THINGS)
    cast = {"a": _stranger(scene), "b": _stranger(scene)}
    one, two = facts
    x, y = " ".join(one), " ".join(two)
    both = scene.choose(COLOURED_TWO, x=x, y=y, **cast)
    query = scene.rng.choice(COLOUR_OF)
    prompts = []
    for between, wording in (("", ""), (f"{_aside(scene, cast['a'])}", ", after an aside")):
        for asked, other, which in ((one, two, "first of two"), (two, one, "second of two")):
            text = f"{both} {between}{scene.fill(query, thing=asked[1], **cast)}"
            prompts.append(Prompt(text, f" {asked[0]}", f" {other[0]}", which + wording, (held,)))
    return prompts


BEHAVIOURS = (
    Behaviour(
        "indirect_object",
        "Indirect object: who receives",
        Prompt(
            "When Mary and John went to the store, John gave a drink to",
            *(" Mary", " John", "ABB"),
            (("person", "John", "Mary"), ("where", "drink", "store")),
        ),
        _indirect_object,
    ),
    Behaviour(
        "induction",
        "Induction: a name seen before",
        Prompt(
            "Mary Stone went to the park. Then Mary",
            *(" Stone", " Baker", "the only person"),
            (("visit", "Mary Stone", "park"),),
        ),
        _induction,
    ),
    Behaviour(
        "agreement",
        "Agreement: the verb of the right noun",
        Prompt(
            "The keys near the box",
            *(" are", " is", "plural near singular"),
            (("beside", "box", "key"),),
        ),
        _agreement,
    ),
    Behaviour(
        "pronoun",
        "Pronoun: she or he",
        Prompt(
            "Mary lost the book because",
            *(" she", " he", "one person"),
            (("owner", "Mary", "book"),),
        ),
        _pronoun,
    ),
    Behaviour(
        "quotation",
        "Quotation: close what was opened",
        Prompt(
            'Mary said, "The key in the garden is old.',
            *('"', " Then", "open"),
            (("where", "key", "garden"),),
        ),
        _quotation,
    ),
    Behaviour(
        "colour",
        "Binding: which colour the box had",
        Prompt(
            "Mary put the red box on the table. The box is",
            *(" red", " blue", "the only one"),
            (("holder", "Mary", "red box"),),
        ),
        _colour,
    ),
)


def _prompts(behaviour: Behaviour, seed: int) -> Iterator[Prompt]:
    scene = Scene(random.Random(f"prompts/{behaviour.name}/{seed}"))
    seen: set[str] = set()
    while True:
        group = behaviour.groups(scene)
        if seen.isdisjoint(prompt.text for prompt in group):
            seen.update(prompt.text for prompt in group)
            yield from group


def evaluation_prompts(count: int = 600, seed: int = 0) -> dict[str, list[Prompt]]:
    """`count` held-out prompts per behaviour, in whole groups if `count` divides by 12."""
    return {b.name: list(islice(_prompts(b, seed), count)) for b in BEHAVIOURS}


__all__ = ["BEHAVIOURS", "Behaviour", "Prompt", "evaluation_prompts"]
