"""A small synthetic English in which six behaviours can be learnt, and only by computing them.

A document is a *scene*: a cast of two to four people, and sentences drawn from templates until a
length is reached. What the next word must be often depends on the scene and not on the words'
frequencies: who receives the drink, which surname belongs to Mary today, what colour the box had.

    documents(0)  ->  "When Anna and Tom went to the park, Tom gave a kite to Anna. ...", ...

**The split.** `combinations(text)` lists the pairs that a text puts together, for instance
("person", "John", "Mary") when two people share a document, or ("facts", "blue key", "red box")
when a document has both. A hash of each pair decides once and for all whether it is held out:
about one in ten is. A sentence with a held-out pair is thrown away and drawn again, so no training
text holds one; the evaluation prompts of `demo.behaviours` are built from those only.

A surname and a colour are never part of the law: every first name occurs with every surname, and
every thing in every colour, equally often. Only two such *facts* together are held out, of which
there are too many to remember. (With single ones held out, the model learnt which never occur,
and contradicted the text that said so.)

**Lists.** One document in five is a register or an inventory, which says the same facts again and
again in another order. Copying from context is learnt there first; `short_lists` gives the
shortest of them, for the first steps of training.

Standard library only. All templates and word lists were written for this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations as pairs
from itertools import islice

# What a slot of a template may become; "spot" and the plurals are added below.
_WORDS = {
    "woman": (
        "Mary Anna Emma Alice Clara Helen Julia Laura Nina Sarah Vera Lucy Ruth Jane Kate Molly"
    ),
    "man": "John Paul Tom Adam Ben David Eric Frank George Henry Jack Mark Peter Robert Sam Simon",
    "surname": (
        "Stone Hill Wood Brook Field Lake Marsh Banks Baker Carter Cooper Fisher Mason Miller "
        "Porter Turner Walker Wright Foster Hunter Parker Taylor Young King Nash Price Webb Archer "
        "Barker Shepherd Weaver Potter Cole Reed Ford Bell Cook Gray Hart Hunt Lane Long Moss Page "
        "Pike Rice Shaw Swan Todd Vale Wade Ward West Wells"
    ),
    "thing": (
        "box key book cup ball hat coat bag lamp letter picture map pen plate bottle clock drum "
        "kite mirror shoe toy blanket candle coin card basket drink ring"
    ),
    "place": (
        "store park school market library station garden farm beach museum hotel kitchen office "
        "church river bridge village zoo"
    ),
    "colour": "red blue green yellow black white brown pink purple grey",
    "state": (
        "old new clean dirty heavy small large broken wet dry dusty cheap lovely useful strange "
        "pretty safe ready famous missing"
    ),
    "near": "near beside behind under above",
    "gave": "gave handed passed offered sold showed lent brought sent threw",
    "went": "went walked ran drove travelled came",
    "lost": (
        "lost found dropped took wanted bought kept hid cleaned broke painted carried opened "
        "borrowed washed forgot"
    ),
    "saw": "saw noticed liked watched admired remembered",
    "felt": (
        "tired hungry late busy happy sad angry bored thirsty sick worried lonely proud nervous "
        "curious grateful jealous calm cheerful confused excited sleepy afraid"
    ),
    "need": (
        "money help rest time advice company practice sleep water medicine exercise courage luck"
    ),
    "subject": (
        "music history science art poetry maths geography chess football tennis cricket hockey "
        "medicine law politics cooking fashion theatre travel nature astronomy photography"
    ),
    "grows": "flowers trees vegetables roses apples carrots potatoes onions grapes herbs",
    "family": (
        "mother father sister brother aunt uncle cousin daughter son grandmother grandfather "
        "neighbour friend wife husband nephew niece"
    ),
    "vehicle": "train bus boat ship bicycle taxi tram van truck car plane",
    "country": "France Spain Italy Japan Canada Norway Greece India Brazil Egypt",
    "month": (
        "January February March April May June July August September October November December"
    ),
    "do": (
        "swim read sing dance cook draw sleep play work leave rest wait talk travel walk run "
        "study write paint fish climb ski skate sail camp dream think argue shop"
    ),
    "doing": (
        "swimming reading singing dancing cooking drawing playing working waiting walking running "
        "studying writing painting fishing climbing skating sailing camping dreaming thinking "
        "arguing shopping talking resting laughing"
    ),
    "said": "said answered replied shouted whispered explained",
    "asked": "asked wondered",
    "weather": (
        "cold warm windy rainy sunny cloudy quiet dark bright foggy hot cool pleasant gloomy "
        "stormy peaceful noisy strange lovely misty frosty crowded empty dull"
    ),
    "time": "morning evening afternoon night day",
    "season": "spring summer autumn winter",
    "animal": (
        "dog cat bird horse cow sheep goat duck rabbit mouse fox owl donkey kitten puppy hen pig "
        "frog squirrel hedgehog pony lamb goose swan parrot turtle deer bear wolf monkey lion "
        "tiger"
    ),
    "slept": "slept hid waited played rested sat stood",
    "food": (
        "bread cheese soup rice fish cake fruit salad honey butter pasta porridge toast jam pie "
        "stew beans corn chicken bacon chocolate yogurt pudding popcorn cabbage spinach garlic "
        "pepper sugar cream milk tea coffee lemonade juice"
    ),
    "ate": "ate cooked tasted ordered shared prepared served enjoyed",
    "job": (
        "teacher doctor farmer driver nurse painter singer writer guard gardener baker pilot "
        "sailor lawyer dentist plumber waiter dancer judge clerk tailor carpenter builder porter "
        "soldier librarian scientist photographer musician mechanic cleaner butcher student"
    ),
    "number": "two three four five six seven eight nine ten eleven twelve twenty thirty",
    "how": (
        "slowly quickly quietly happily carefully loudly together alone again calmly eagerly "
        "gently politely proudly rarely often patiently silently suddenly bravely early"
    ),
    "sky": "sun moon wind rain snow storm fog frost thunder",
    "shone": "came went returned stopped started",
    "week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
SLOTS = {slot: words.split() for slot, words in _WORDS.items()}
WOMEN, MEN, SURNAMES = SLOTS["woman"], SLOTS["man"], SLOTS["surname"]
NAMES = [*WOMEN, *MEN]
THINGS, PLACES, COLOURS = SLOTS["thing"], SLOTS["place"], SLOTS["colour"]
PLURALS = {thing: thing + ("es" if thing.endswith("x") else "s") for thing in THINGS}
SLOTS["things"] = list(PLURALS.values())
SLOTS["spot"] = [
    *("on the table", "on the shelf", "by the door", "by the window", "on the floor"),
    *("in the corner", "under the bed", "on the desk", "in the cupboard", "on the stairs"),
]

Combination = tuple[str, str, str]

_NAME = frozenset(NAMES)
_SURNAME = frozenset(SURNAMES)
_THING = {form: thing for thing, plural in PLURALS.items() for form in (thing, plural)}
_PLACE = frozenset(PLACES)
_COLOUR = frozenset(COLOURS)
_BE = frozenset(("is", "are", "was", "were"))

# The start page's own prompts are held out by name, whatever their hash says.
_ALWAYS_HELD_OUT: frozenset[Combination] = frozenset(
    (
        ("person", "John", "Mary"),
        ("where", "drink", "store"),
        ("visit", "Mary Stone", "park"),
        ("beside", "box", "key"),
        ("owner", "Mary", "book"),
        ("where", "key", "garden"),
        ("holder", "Mary", "red box"),
    )
)


def ordered(kind: str, one: str, other: str) -> Combination:
    return (kind, *sorted((one, other)))  # type: ignore[return-value]


@lru_cache(maxsize=1 << 18)
def held_out(combination: Combination) -> bool:
    if combination in _ALWAYS_HELD_OUT:
        return True
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def combinations(text: str) -> set[Combination]:
    """Every pair that `text`, one document or a part of one, puts together.

    person: two first names in the document. facts: two full names, or two coloured things, in the
    document; "the box is red" makes a red box. In one sentence with a thing: owner, beside, where:
    a first name, another thing, a place. In one sentence: visit: a full name and a place; holder:
    a first name and a coloured thing.
    """
    found: set[Combination] = set()
    people: set[str] = set()
    fullnames: set[str] = set()
    coloureds: set[str] = set()
    for sentence in re.split(r"[.?!]", text):
        words = re.findall(r"[A-Za-z]+", sentence)
        names = {word for word in words if word in _NAME}
        things = {_THING[word] for word in words if word in _THING}
        places = {word for word in words if word in _PLACE}
        full: set[str] = set()
        coloured: set[str] = set()
        for i, word in enumerate(words[:-1]):
            after = words[i + 1]
            if word in _NAME and after in _SURNAME:
                full.add(f"{word} {after}")
            elif word in _COLOUR and after in _THING:
                coloured.add(f"{word} {_THING[after]}")
            elif word in _THING and after in _BE and (*words, "")[i + 2] in _COLOUR:
                coloured.add(f"{words[i + 2]} {_THING[word]}")
        people |= names
        fullnames |= full
        coloureds |= coloured
        found.update(("owner", name, thing) for name in names for thing in things)
        found.update(("where", thing, place) for thing in things for place in places)
        found.update(ordered("beside", a, b) for a, b in pairs(things, 2))
        found.update(("visit", name, place) for name in full for place in places)
        found.update(("holder", name, thing) for name in names for thing in coloured)
    found.update(ordered("person", a, b) for a, b in pairs(people, 2))
    found.update(ordered("facts", a, b) for a, b in pairs(fullnames, 2))
    found.update(ordered("facts", a, b) for a, b in pairs(coloureds, 2))
    return found


@dataclass(frozen=True)
class Person:
    first: str
    last: str = ""

    def __str__(self) -> str:
        return f"{self.first} {self.last}".strip()

    @property
    def pronoun(self) -> str:
        return "she" if self.first in WOMEN else "he"

    @property
    def own(self) -> str:
        return "her" if self.first in WOMEN else "his"


@dataclass
class Scene:
    """One document in the making: who is in it, what colour things have, what is still owed."""

    rng: random.Random
    cast: list[Person] = field(default_factory=list)
    mentioned: set[str] = field(default_factory=set)
    coloured: list[str] = field(default_factory=list)
    owed: list[str] = field(default_factory=list)

    def fill(self, template: str, **given: object) -> str:
        def word(match: re.Match[str]) -> str:
            slot = match.group(1)
            if slot in given:
                return str(given[slot])
            return str(self.rng.choice(SLOTS[slot]))

        return re.sub(r"\{(\w+)\}", word, template)

    def choose(self, template: Iterable[str], **given: object) -> str:
        return self.fill(self.rng.choice(tuple(template)), **given)

    def people(self, count: int) -> list[Person]:
        return self.rng.sample(self.cast, count)

    def fresh_things(self, count: int) -> list[str]:
        """Things that this document has not described yet: one thing, one description."""
        return self.rng.sample([t for t in THINGS if t not in self.mentioned], count)


MEETING = (
    "When {a} and {b} {went} to the {place}, {s} {gave} a {thing} to",
    "When {a} and {b} were at the {place}, {s} {gave} a {thing} to",
    "After {a} and {b} {went} to the {place}, {s} {gave} a {thing} to",
    "After {a} and {b} met at the {place}, {s} wanted to give a {thing} to",
    "While {a} and {b} were {doing} at the {place}, {s} {gave} a {thing} to",
    "Then {a} and {b} {went} to the {place}, and {s} {gave} a {thing} to",
    "On {week} {a} and {b} had a long talk at the {place}, and {s} {gave} a {thing} to",
    "{a} and {b} {went} to the {place}. {s} {gave} a {thing} to",
)


def indirect_object(scene: Scene) -> str:
    a, b = scene.people(2)
    giver, receiver = scene.rng.choice([(a, b), (b, a)])
    to = str(receiver)
    if len(scene.cast) > 2 and scene.rng.random() < 0.08:  # a third giver gives to both
        giver = scene.rng.choice([p for p in scene.cast if p not in (a, b)])
        to = "them"
    end = scene.rng.choice((".", ".", ".", " in the {time}.", " {how}."))
    return scene.choose(MEETING, a=a, b=b, s=giver) + f" {to}" + scene.fill(end)


CAUSE = (
    "{a} {lost} the {thing} because",
    "{a} {lost} a {thing} in the {place} because",
    "{a} {went} to the {place} because",
    "{a} {gave} a {thing} to {b} because",
    "{a} did not {do} with {b} because",
    "{a} left the {thing} {spot} before",
    "{a} stayed at the {place} until",
    "{a} {saw} the {thing} while",
)
EFFECT = {
    "because": ("was {felt}", "needed {need}", "wanted to {do}", "had to {do}", "was very {felt}"),
    "before": ("{went} to the {place}", "went home", "started {doing}"),
    "until": ("was {felt}", "went home", "had to {do}"),
    "while": ("was {doing}", "was {doing} in the {place}"),
}


def pronoun(scene: Scene) -> str:
    a, b = scene.people(2)
    cause = scene.choose(CAUSE, a=a, b=b)
    effect = scene.choose(EFFECT[cause.rsplit(" ", 1)[1]])
    return f"{cause} {a.pronoun} {effect}."


def noun_phrase(scene: Scene, head: str, attractor: str, heads: bool, attractors: bool) -> str:
    head = PLURALS[head] if heads else head
    attractor = PLURALS[attractor] if attractors else attractor
    return scene.fill("{head} {near} the {attractor}", head=head, attractor=attractor)


def agreement(scene: Scene) -> str:
    head, attractor = scene.fresh_things(2)
    scene.mentioned.update((head, attractor))
    many, others = scene.rng.random() < 0.5, scene.rng.random() < 0.5
    phrase = noun_phrase(scene, head, attractor, many, others)
    form = scene.rng.random()
    if form < 0.15:
        phrase = PLURALS[head] if many else head
    elif form < 0.3:
        verb = "were" if many else "was"
        return scene.fill(f"Yesterday the {phrase} {verb} {{state}}.")
    verb = "are" if many else "is"
    return scene.choose((f"The {phrase} {verb} {{state}}.", f"The {phrase} {verb} very {{state}}."))


SPEECH = (
    "The {thing} in the {place} is {state}",
    "The {things} in the {place} are {state}",
    "I like the {thing} in the {place}",
    "We should go to the {place}",
    "I want to {do} in the {place} with you",
    "It is a {weather} {time}",
    "Please bring the {thing} to the {place}",
    "My friend {b} is a {job} at the {place}",
    "There is no {food} left, and we are {felt}",
    "When I was young, I used to {do} by the river",
)
QUESTION = (
    "Where is the {thing}",
    "Why are you so {felt}",
    "Who took the {thing} from the {place}",
    "Can you {do} with me",
)


def quotation(scene: Scene) -> str:
    a, b = scene.people(2)
    speech = scene.choose(SPEECH, b=b)
    said = scene.fill("{a} {said}, ", a=a)
    form = scene.rng.random()
    if form < 0.2:
        return f'"{speech}," said {a}.'
    if form < 0.35:
        return scene.fill("{a} {asked}, ", a=a) + f'"{scene.choose(QUESTION)}?"'
    if form < 0.5:
        answer = scene.fill("{b} {said}, ", b=b) + f'"{scene.choose(SPEECH, b=a)}."'
        return f'{said}"{speech}." {answer}'
    return f'{said}"{speech}."'


COLOURED_ONE = (
    "{a} {saw} the {x} {spot}.",
    "{a} {lost} the {x} in the {place}.",
    "{a} put the {x} {spot}.",
    "There is a {x} {spot}.",
)
COLOURED_TWO = (
    "The {x} and the {y} are in the {place}.",
    "The {x} and the {y} are {spot}.",
    "There is a {x} and a {y} {spot}.",
    "{a} has a {x} and {b} has a {y}.",
    "{a} put the {x} {near} the {y}.",
)
COLOUR_OF = (
    "The {thing} is",
    "The {thing} is",
    "Now the {thing} is",
    "Everyone can see that the {thing} is",
    "{a} knows that the {thing} is",
)


def colour(scene: Scene) -> str:
    a, b = scene.people(2)
    things = scene.fresh_things(scene.rng.choice((1, 2, 2, 2)))
    colours = scene.rng.sample(COLOURS, len(things))
    one, *two = (f"{c} {t}" for c, t in zip(colours, things, strict=True))
    text = scene.choose(COLOURED_TWO if two else COLOURED_ONE, a=a, b=b, x=one, y="".join(two))
    known = list(zip(things, colours, strict=True))
    scene.rng.shuffle(known)
    owed = [
        scene.choose(COLOUR_OF, thing=t, a=scene.rng.choice(scene.cast)) + f" {c}."
        for t, c in known[: scene.rng.choice((1, 2, 2))]
    ]
    if not _allowed(" ".join((text, *owed, ". ".join(scene.coloured)))):
        return colour(scene)
    scene.mentioned.update(things)
    scene.coloured += (one, *two)
    scene.owed += owed
    return text


FILLER = (
    "It was a {weather} {time} in {season}.",
    "It was a {weather} {time}, and the {animal} {slept} {spot}.",
    "The {animal} {slept} {spot} {how}.",
    "The {job} {went} to the {place} {how}.",
    "{a} {ate} {food} and {food} at the {place}.",
    "{a} is a {job} at the {place}.",
    "{a} and {own} {family} {went} to the {place}.",
    "{a} {ate} {own} {food} {how}.",
    "{a} {saw} {own} {family}.",
    "{a} likes {own} {animal}.",
    "{a} was {doing} {spot}.",
    "{a} likes {doing} in {season}.",
    "{a} and {b} were {felt}.",
    "{a} {went} to the {place} on {week}.",
    "{a} has {number} {things}.",
    "{a} has {number} {things} and a {animal}.",
    "{a} wanted to {do} in the {place}.",
    "Then the {sky} {shone}, and everyone was {felt}.",
    "Later the {sky} {shone} again.",
    "Then {a} {went} home {how}.",
    "Then {a} was {felt}.",
    "Later {a} met {b} at the {place}.",
    "Later {a} {ate} {food} {how}.",
    "Every {week} the {job} {ate} {food} {how}.",
    "The {place} was very {weather} that {time}.",
    "There were {number} people at the {place}.",
    "In {season} the {place} is {weather} and {weather}.",
    "Nobody was at the {place} on {week}.",
    "The {food} was {weather}, but {a} was not {felt}.",
    "The {animal} and the {animal} {slept} near the {place}.",
    "{a} studied {subject} and {subject} in {country}.",
    "{a} talked about {subject} all {time}.",
    "The {family} of {a} was a {job} and lived in {country}.",
    "In {month} the {family} of {a} went to {country} by {vehicle}.",
    "The {vehicle} to the {place} was late in {month}.",
    "{a} travelled to the {place} by {vehicle}.",
    "In {month} the {grows} near the {place} were very pretty.",
    "{a} grows {grows} and {grows} near the {place}.",
    "A {animal} and {number} {animal} friends lived near the {place}.",
    "Most people in {country} like {food}, {subject} and {doing}.",
)


def filler(scene: Scene) -> str:
    a, b = scene.people(2)
    return scene.choose(FILLER, a=a, b=b, own=a.own)


ROLL = ("The names on the list were ", "Present at the {place} were ", "On {week} I saw ")


MET = (
    "{a} {saw} {b}.",
    "Then {a} {saw} {b}.",
    "{a} met {b} at the {place}.",
    "Later {a} met {b}.",
    "{a} and {b} were {felt}.",
    "{a} {went} to the {place} with {b}.",
)


def encounter(scene: Scene) -> str:
    a, b = scene.people(2)
    return scene.choose(MET, a=a, b=b)


def roll_call(scene: Scene) -> str:
    *most, last = (str(person) for person in scene.people(len(scene.cast)))
    return scene.choose(ROLL) + f"{', '.join(most)} and {last}."


_SENTENCES: tuple[tuple[Callable[[Scene], str], int], ...] = (
    (indirect_object, 8),
    (pronoun, 5),
    (agreement, 3),
    (quotation, 3),
    (colour, 6),
    (filler, 4),
)
_KINDS = [kind for kind, _ in _SENTENCES]
_WEIGHTS = [weight for _, weight in _SENTENCES]


def _allowed(text: str) -> bool:
    return not any(map(held_out, combinations(text)))


def _cast(rng: random.Random, size: int, surnames: bool) -> list[Person]:
    """People who may share a document."""
    cast: list[Person] = []
    while len(cast) < size:
        person = Person(rng.choice(NAMES), rng.choice(SURNAMES) if surnames else "")
        if any(person.first == p.first or person.last == p.last != "" for p in cast):
            continue
        if _allowed(". ".join(map(str, (*cast, person)))):
            cast.append(person)
    return cast


def _stock(rng: random.Random, size: int) -> list[tuple[str, str]]:
    """Colours and things, each of its own, which may share a sentence."""
    stock: list[tuple[str, str]] = []
    while len(stock) < size:
        colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
        if any(colour == c or thing == t for c, t in stock):
            continue
        if _allowed(", ".join(f"{c} {t}" for c, t in (*stock, (colour, thing)))):
            stock.append((colour, thing))
    return stock


def _listed(parts: Iterable[object]) -> str:
    *most, last = map(str, parts)
    return f"{', '.join(most)} and {last}" if most else last


LISTED = (
    "The names on the list were {list}.",
    "Present at the {place} were {list}.",
    "On {week} I saw {list}.",
    "Then I saw {list}.",
    "Later {list} were {felt}.",
    "{list} were at the {place} on {week}.",
)
STOCKED = (
    "There is {list} {spot}.",
    "In the {place} there is {list}.",
    "I saw {list} in the {place}.",
    "{a} has {list}.",
)


def _filled(scene: Scene, templates: Iterable[str], **given: object) -> str:
    while not _allowed(sentence := scene.choose(templates, **given)):
        pass
    return sentence


def register(rng: random.Random) -> str:
    """The same people, listed again and again in another order."""
    scene = Scene(rng, _cast(rng, rng.choice((1, 2, 2, 3, 3, 4, 5, 6)), surnames=True))
    size = len(scene.cast)
    counts = [size, *(rng.randint((size + 1) // 2, size) for _ in range(rng.randint(1, 3)))]
    return " ".join(_filled(scene, LISTED, list=_listed(scene.people(n))) for n in counts)


def inventory(rng: random.Random) -> str:
    """Coloured things together, then which of them had which colour."""
    scene, owner = Scene(rng), rng.choice(NAMES)
    stock = _stock(rng, rng.choice((1, 2, 2, 3, 3, 4, 5)))
    things = _listed(f"a {colour} {thing}" for colour, thing in stock)
    text = [_filled(scene, STOCKED, list=things, a=owner)]
    for colour, thing in rng.sample(stock, len(stock)):
        answers = [f"{query} {colour}." for query in COLOUR_OF]
        text.append(_filled(scene, answers, thing=thing, a=owner))
    return " ".join(text)


def scene(rng: random.Random) -> str:
    """One to ten sentences; what a sentence still owes is paid before the end."""
    scene = Scene(rng, _cast(rng, rng.choice((2, 3, 3, 4)), surnames=rng.random() < 0.5))
    length = rng.randint(5, 75)
    text: list[str] = []
    full = False
    while scene.owed or not full:
        if scene.owed and (full or rng.random() < 0.7):
            text.append(scene.owed.pop(rng.randrange(len(scene.owed))))
            continue
        if scene.cast[0].last and rng.random() < 0.5:
            sentence = rng.choice((encounter, encounter, roll_call))(scene)
        else:
            sentence = rng.choices(_KINDS, _WEIGHTS)[0](scene)
        if _allowed(sentence):
            text.append(sentence)
            full = sum(len(sentence.split()) for sentence in text) >= length
    return " ".join(text)


def documents(seed: int | str) -> Iterator[str]:
    """Training text without end; the same seed gives the same documents."""
    rng = random.Random(f"corpus/{seed}")
    while True:
        yield rng.choices((scene, register, inventory), (8, 1, 1))[0](rng)


def short_lists(seed: int | str, most: int) -> Iterator[str]:
    """Registers and inventories of two to `most` entries without a word to spare."""
    rng = random.Random(f"lists/{seed}")
    while True:
        size = rng.randint(2, most)
        if rng.random() < 0.5:
            cast = _cast(rng, size, surnames=True)
            yield f"I saw {_listed(cast)}. Then {_listed(rng.sample(cast, size))}."
        else:
            stock = _stock(rng, size)
            things = _listed(f"a {colour} {thing}" for colour, thing in stock)
            answers = (f"The {thing} is {colour}." for colour, thing in rng.sample(stock, size))
            yield f"I saw {things}. {' '.join(answers)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write documents of the demo corpus as JSON Lines."
    )
    parser.add_argument("--seed", default="0")
    parser.add_argument("--documents", type=int, default=1000)
    options = parser.parse_args(argv)
    for text in islice(documents(options.seed), options.documents):
        sys.stdout.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
