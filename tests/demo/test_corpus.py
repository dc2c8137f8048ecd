"""The corpus needs nothing but Python, repeats itself exactly, and keeps its secrets."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations as pairs
from itertools import islice, product
from pathlib import Path

import pytest

from demo import corpus
from demo.behaviours import BEHAVIOURS, Prompt, evaluation_prompts
from demo.corpus import (
    COLOURS,
    NAMES,
    PLACES,
    PLURALS,
    SURNAMES,
    THINGS,
    WOMEN,
    Combination,
    combinations,
    documents,
    held_out,
    ordered,
    short_lists,
)

ROOT = Path(__file__).parents[2]
PRINT_DOCUMENTS = (
    "import sys; sys.path.insert(0, {root!r}); from demo import corpus;"
    " corpus.main(['--seed', '7', '--documents', '40'])"
)


def training_documents(steps: int = 20, of_each: int = 50) -> list[str]:
    """Documents of the streams that `demo.train` reads: one seed per step."""
    return [
        text
        for s in range(steps)
        for stream in (documents(f"0/{s}"), short_lists(f"0/{s}", 5))
        for text in islice(stream, of_each)
    ]


_FULL = re.compile(rf"\b(?:{'|'.join(NAMES)}) (?:{'|'.join(SURNAMES)})\b")
_FORMS = {form: thing for thing, plural in PLURALS.items() for form in (thing, plural)}
_COLOURED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(_FORMS)})\b")
_IS_COLOURED = re.compile(rf"\b({'|'.join(_FORMS)}) (?:is|are|was|were) ({'|'.join(COLOURS)})\b")


def facts_in(text: str) -> set[str]:
    """Full names and coloured things; written apart from `corpus.combinations`, as its check."""
    coloured = {f"{c} {_FORMS[t]}" for c, t in _COLOURED.findall(text)}
    said = {f"{c} {_FORMS[t]}" for t, c in _IS_COLOURED.findall(text)}
    return {*_FULL.findall(text), *coloured, *said}


def held_out_facts(text: str) -> set[Combination]:
    people = {fact for fact in facts_in(text) if fact.split()[0] in NAMES}
    both = [*pairs(people, 2), *pairs(facts_in(text) - people, 2)]
    return {pair for pair in (ordered("facts", a, b) for a, b in both) if held_out(pair)}


def put_together(text: str, combination: Combination) -> bool:
    """Whether `text` holds the pair; written apart from `corpus.combinations`, as its check."""
    kind, a, b = combination
    if kind == "facts":
        return {a, b} <= facts_in(text)
    if kind == "person":
        parts = [text]
    elif kind == "holder":  # the colour may be said one sentence later
        return re.search(rf"\b{a}\b", text) is not None and b in facts_in(text)
    else:
        parts = re.split(r"[.?!]", text)
    one = rf"\b(?:{a}|{PLURALS.get(a, a)})\b"
    other = rf"\b(?:{b}|{PLURALS.get(b, b)})\b"
    return any(re.search(one, part) and re.search(other, part) for part in parts)


def word_pairs() -> list[Combination]:
    """Every pair of two words that a text can put together."""
    return [
        *(ordered("person", a, b) for a, b in pairs(NAMES, 2)),
        *(ordered("beside", a, b) for a, b in pairs(THINGS, 2)),
        *(("owner", a, b) for a, b in product(NAMES, THINGS)),
        *(("where", a, b) for a, b in product(THINGS, PLACES)),
    ]


HELD_OUT = sorted(filter(held_out, word_pairs()))


def held_out_in(texts: list[str]) -> list[Combination]:
    everything = " ".join(texts)
    found = sorted({pair for text in texts for pair in held_out_facts(text)})
    for combination in HELD_OUT:
        if all(word in everything for word in combination[1:]):
            word = combination[1]  # only texts with the word are worth a search
            if any(put_together(text, combination) for text in texts if word in text):
                found.append(combination)
    return found


def test_imports_the_standard_library_only() -> None:
    tree = ast.parse((ROOT / "demo" / "corpus.py").read_text())
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def run_isolated(hash_seed: str) -> str:
    """Runs the generator without site-packages, so an import of anything else fails."""
    command = [sys.executable, "-S", "-E", "-c", PRINT_DOCUMENTS.format(root=str(ROOT))]
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_same_seed_same_documents_in_any_process() -> None:
    one = run_isolated("1")
    assert one == run_isolated("2")
    assert one.count("\n") == 40


def test_seeds_differ() -> None:
    assert list(islice(documents(0), 5)) == list(islice(documents(0), 5))
    assert list(islice(documents(0), 5)) != list(islice(documents(1), 5))


def test_no_training_text_holds_a_held_out_pair() -> None:
    texts = training_documents()
    assert held_out_in(texts) == []
    assert not any(held_out(pair) for text in texts for pair in combinations(text))


def test_the_search_finds_held_out_pairs_where_nothing_holds_them_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: the same generator without the rule, searched by the same function."""
    monkeypatch.setattr(corpus, "held_out", lambda pair: False)
    found = held_out_in(training_documents(steps=10))
    assert {kind for kind, _, _ in found} == {"facts", "person", "beside", "owner", "where"}
    assert len(found) > 100


def test_about_one_pair_in_ten_is_held_out() -> None:
    every = word_pairs()
    assert len(HELD_OUT) / len(every) == pytest.approx(0.1, abs=0.02)


def test_what_is_not_held_out_is_in_the_training_text() -> None:
    """Words of held-out pairs are common by themselves; only the pair is missing."""
    seen = {pair for text in training_documents() for pair in combinations(text)}
    words = {(kind, word) for kind, *two in seen for word in two}
    assert {(kind, word) for kind, *two in HELD_OUT for word in two} <= words


def test_no_surname_and_no_colour_is_held_out_by_itself() -> None:
    """Nothing but the text before it can say which surname or colour comes next: all are seen
    with all, and in the long run equally often."""
    texts = training_documents(steps=200)
    seen = {fact for text in texts for fact in facts_in(text)}
    assert len({f"{a} {b}" for a, b in product(NAMES, SURNAMES)} - seen) < 20  # of 1,760
    assert {f"{a} {b}" for a, b in product(COLOURS, THINGS)} <= seen
    assert "Mary Stone" in seen


def test_every_prompt_needs_a_pair_that_is_held_out() -> None:
    for name, prompts in evaluation_prompts().items():
        assert len({prompt.text for prompt in prompts}) == len(prompts) == 600, name
        for prompt in prompts:
            text = f"{prompt.text}{prompt.target}."
            assert prompt.held_out, prompt
            assert all(map(held_out, prompt.held_out)), prompt
            assert all(put_together(text, pair) for pair in prompt.held_out), prompt
    for behaviour in BEHAVIOURS:
        example = behaviour.example
        text = f"{example.text}{example.target}."
        assert all(put_together(text, pair) for pair in example.held_out), example
        assert all(map(held_out, example.held_out))


def test_no_prompt_is_a_part_of_a_training_text() -> None:
    """The plain check, apart from every notion of pairs: none of the prompts' texts occurs."""
    everything = "\n".join(training_documents(steps=100))
    prompts = [prompt for many in evaluation_prompts().values() for prompt in many]
    asked = [*prompts, *(behaviour.example for behaviour in BEHAVIOURS)]
    assert [p.text for p in asked if f"{p.text}{p.target}" in everything] == []


def first_named(prompt: Prompt) -> str:
    named = [word for word in (prompt.target, prompt.distractor) if word.strip() in prompt.text]
    return min(named, key=lambda word: prompt.text.find(word.strip()))


def last_named(prompt: Prompt) -> str:
    return max((prompt.target, prompt.distractor), key=lambda word: prompt.text.rfind(word.strip()))


def nearest_noun(prompt: Prompt) -> str:
    plural = {" is": " are", " was": " were"}
    singular = min((prompt.target, prompt.distractor), key=lambda word: word not in plural)
    return plural[singular] if prompt.text.endswith("s") else singular


def first_name_in_text(prompt: Prompt) -> str:
    name = next(word for word in re.findall(r"\w+", prompt.text) if word in NAMES)
    return " she" if name in WOMEN else " he"


def last_name_in_text(prompt: Prompt) -> str:
    name = [word for word in re.findall(r"\w+", prompt.text) if word in NAMES][-1]
    return " she" if name in WOMEN else " he"


@pytest.mark.parametrize(
    ("behaviour", "shortcut", "share"),
    [
        ("indirect_object", first_named, 1 / 2),
        ("induction", first_named, 1 / 2),
        ("induction", last_named, 1 / 2),
        ("agreement", nearest_noun, 1 / 2),
        ("agreement", lambda prompt: max(prompt.target, prompt.distractor), 1 / 2),
        ("pronoun", lambda prompt: " she", 1 / 2),
        ("pronoun", first_name_in_text, 2 / 3),
        ("pronoun", last_name_in_text, 2 / 3),
        ("quotation", lambda prompt: '"', 1 / 2),
        ("quotation", lambda prompt: '"' if '"' in prompt.text else " Then", 3 / 4),
        ("colour", first_named, 1 / 2),
        ("colour", last_named, 1 / 2),
    ],
)
def test_no_shortcut_reaches_the_score(
    behaviour: str, shortcut: Callable[[Prompt], str], share: float
) -> None:
    prompts = evaluation_prompts()[behaviour]
    right = sum(shortcut(prompt) == prompt.target for prompt in prompts)
    assert right / len(prompts) == pytest.approx(share, abs=0.01)
