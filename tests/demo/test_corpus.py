"""The corpus needs nothing but Python, repeats itself exactly, and keeps its secrets."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from demo import corpus
from demo.behaviours import BEHAVIOURS, Prompt, evaluation_prompts
from demo.corpus import HELD_OUT, NAMES, PLURALS, WOMEN, Combination, combinations, documents

ROOT = Path(__file__).parents[2]
PRINT_DOCUMENTS = (
    "import sys; sys.path.insert(0, {root!r}); from demo import corpus;"
    " corpus.main(['--seed', '7', '--documents', '40'])"
)


def training_documents(steps: int = 20, of_each: int = 50) -> list[str]:
    """Documents of the stream that `demo.train` reads: one seed per step."""
    return [text for s in range(steps) for text in islice(documents(f"0/{s}"), of_each)]


def put_together(text: str, combination: Combination) -> bool:
    """Whether `text` holds the pair; written apart from `corpus.combinations`, as its check."""
    kind, a, b = combination
    if kind == "surname":
        return re.search(rf"\b{a} {b}\b", text) is not None
    if kind == "colour":
        forms = f"(?:{b}|{PLURALS[b]})"
        return re.search(rf"\b{a} {forms}\b|\b{forms} (?:is|are|was|were) {a}\b", text) is not None
    parts = [text] if kind == "person" else re.split(r"[.?!]", text)
    one = rf"\b(?:{a}|{PLURALS.get(a, a)})\b"
    other = rf"\b(?:{b}|{PLURALS.get(b, b)})\b"
    return any(re.search(one, part) and re.search(other, part) for part in parts)


def held_out_in(texts: list[str]) -> list[Combination]:
    everything = " ".join(texts)
    found = []
    for combination in sorted(HELD_OUT):
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
    assert all(HELD_OUT.isdisjoint(combinations(text)) for text in texts)


def test_the_search_finds_held_out_pairs_where_nothing_holds_them_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: the same generator without the rule, searched by the same function."""
    monkeypatch.setattr(corpus, "HELD_OUT", frozenset())
    found = held_out_in(training_documents(steps=10))
    assert {kind for kind, _, _ in found} == {kind for kind, _, _ in HELD_OUT}
    assert len(found) > 100


def test_what_is_not_held_out_is_in_the_training_text() -> None:
    """Words of held-out pairs are common by themselves; only the pair is missing."""
    seen = {pair for text in training_documents() for pair in combinations(text)}
    words = {(kind, word) for kind, *two in seen for word in two}
    assert {(kind, word) for kind, *two in HELD_OUT for word in two} <= words


def test_every_prompt_needs_a_pair_that_is_held_out() -> None:
    for name, prompts in evaluation_prompts().items():
        assert len({prompt.text for prompt in prompts}) == len(prompts) == 600, name
        for prompt in prompts:
            text = f"{prompt.text}{prompt.target}."
            assert prompt.held_out, prompt
            assert set(prompt.held_out) <= HELD_OUT, prompt
            assert all(put_together(text, pair) for pair in prompt.held_out), prompt
    for behaviour in BEHAVIOURS:
        example = behaviour.example
        text = f"{example.text}{example.target}."
        assert all(put_together(text, pair) for pair in example.held_out), example
        assert set(example.held_out) <= HELD_OUT


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
        ("colour", first_named, 2 / 3),
        ("colour", last_named, 2 / 3),
    ],
)
def test_no_shortcut_reaches_the_score(
    behaviour: str, shortcut: Callable[[Prompt], str], share: float
) -> None:
    prompts = evaluation_prompts()[behaviour]
    right = sum(shortcut(prompt) == prompt.target for prompt in prompts)
    assert right / len(prompts) == pytest.approx(share, abs=0.01)
