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
    COLOURED_ONE,
    COLOURED_TWO,
    COLOURS,
    FILLER,
    HELD_OUT,
    MEETING,
    MEN,
    NAMES,
    PLURALS,
    SPEECH,
    WOMEN,
    Combination,
    Person,
    Scene,
    combinations,
    noun_phrase,
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


_KINDS: dict[str, list[Combination]] = {
    kind: sorted(c for c in HELD_OUT if c[0] == kind)
    for kind in ("person", "surname", "owner", "beside", "where", "colour")
}


def _draw(scene: Scene, kind: str) -> Combination:
    return scene.rng.choice(_KINDS[kind])


_ASIDES = [sentence for sentence in FILLER if "{a}" in sentence and "{b}" not in sentence]


def _aside(scene: Scene, person: Person) -> str:
    """A neutral sentence about `person`, to stand before or inside a prompt."""
    return scene.choose(_ASIDES, a=person, own=person.own) + " "


def _stranger(scene: Scene, *known: str, among: list[str] = NAMES) -> Person:
    return Person(scene.rng.choice([name for name in among if name not in known]))


def _indirect_object(scene: Scene) -> list[Prompt]:
    person, where = _draw(scene, "person"), _draw(scene, "where")
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


def _induction(scene: Scene) -> list[Prompt]:
    one, two = _draw(scene, "surname"), _draw(scene, "surname")
    while one[1] == two[1] or one[2] == two[2]:
        two = _draw(scene, "surname")
    met, again = scene.rng.choice(_MET), scene.rng.choice(_AGAIN)
    a, b = Person(*one[1:]), Person(*two[1:])
    introduction = scene.fill(met, a=a, b=b)
    return [
        Prompt(
            f"{introduction} {scene.fill(again, a=asked.first)}",
            f" {asked.last}",
            f" {other.last}",
            f"the {which} person",
            (held,),
        )
        for asked, other, held, which in ((a, b, one, "first"), (b, a, two, "second"))
    ]


def _agreement(scene: Scene) -> list[Prompt]:
    held = _draw(scene, "beside")
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
        held = scene.rng.choice([c for c in _KINDS["owner"] if c[1] in names])
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
    held = _draw(scene, "where")
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
    one, two = _draw(scene, "colour"), _draw(scene, "colour")
    while one[1] == two[1] or one[2] == two[2]:
        two = _draw(scene, "colour")
    cast = {"a": _stranger(scene), "b": _stranger(scene)}
    x, y = " ".join(one[1:]), " ".join(two[1:])
    both = scene.choose(COLOURED_TWO, x=x, y=y, **cast)
    aside = _aside(scene, cast["a"]) if scene.rng.random() < 0.5 else ""
    query = scene.rng.choice(COLOUR_OF)
    prompts = []
    for held, other, which in ((one, two, "first of two"), (two, one, "second of two")):
        text = f"{both} {aside}{scene.fill(query, thing=held[2], **cast)}"
        prompts.append(Prompt(text, f" {held[1]}", f" {other[1]}", which, (held,)))
    text = f"{scene.choose(COLOURED_ONE, x=x, **cast)} {scene.fill(query, thing=one[2], **cast)}"
    wrong = scene.rng.choice([c for c in COLOURS if c != one[1]])
    return [*prompts, Prompt(text, f" {one[1]}", f" {wrong}", "the only one", (one,))]


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
            (("surname", "Mary", "Stone"),),
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
            (("colour", "red", "box"),),
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
