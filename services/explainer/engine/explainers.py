"""Making explanations: a language model is asked in one of five ways, or rules are learnt offline.

All of them see the explaining half of a split and nothing else; which documents they saw stands in
the explanation's provenance, and scorers hold to it.
"""

import json
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine import instructions
from services.explainer.engine.budget import Ledger
from services.explainer.engine.components import Component, Example, HeadExample, TextScore, keyed
from services.explainer.engine.explanations import (
    MAX_CHARACTERS,
    Explanation,
    Method,
    Provenance,
)
from services.explainer.engine.judges import MarkedPair
from services.explainer.engine.pattern_learning import Place, learn
from services.explainer.engine.prompts import STRING, Prompt, ask, object_of
from services.explainer.engine.provider import OnText, Provider, answer
from services.explainer.engine.provider_judge import pair_segments, segments
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.splits import Split
from services.explainer.engine.token_patterns import (
    SCALE,
    TokenPattern,
    pair_conditions,
    token_conditions,
)

FIRES_SHARE = 0.3
"""A token is marked as firing above this share of its example's peak."""

_REPLY_TOKENS = 200
REPLY_CHARACTERS = 500
_PAIRS, _SUMMARY, _ACTIVE, _SILENT, _READ_OUTS = 5, 10, 10, 8, 20
_LEARNT_EXAMPLES, _LEARNT_PAIRS, _PATTERN_PROMOTED = 24, 150, 5
_BEGUN = re.compile(
    r'\s*(?:```(?:json)?\s*)?\{\s*"explanation"\s*:\s*'
    r'"((?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*)'
)

AnySplit = Split[Example] | Split[HeadExample]


async def explain(
    method: Method,
    component: Component,
    split: AnySplit,
    provider: Provider,
    ledger: Ledger,
    *,
    seed: int,
    on_text: OnText | None = None,
) -> Explanation | FailureKind:
    """One explanation by a language model; what went wrong with it is no exception. `on_text` hears
    the explanation as far as it is written.

    Raises InvalidArgument where the method is not for such a component, FailedPrecondition where it
    lacks what the method reads, and what `Provider.complete` raises.
    """
    prompt, documents = prompt_for(method, component, split, seed=seed)
    on_reply = None if on_text is None else lambda reply: on_text(begun(reply))
    reply = await provider.complete(prompt, ledger, on_reply)
    found = answer(reply, prompt)
    if isinstance(found, FailureKind):
        return found
    text = _one_line(found["explanation"])
    if not 0 < len(text) <= REPLY_CHARACTERS:
        return FailureKind.MALFORMED
    provenance = Provenance(
        method=method,
        model=provider.model,
        provider=provider.host,
        prompt_hash=prompt.hash,
        seed=split.seed,
        documents=documents,
    )
    return Explanation(component.address, text, provenance)


def begun(reply: str) -> str:
    """The explanation in the beginning of a reply; empty where there is none yet."""
    found = _BEGUN.match(reply)
    return _one_line(json.loads(f'"{found[1]}"', strict=False)) if found else ""


def prompt_for(
    method: Method, component: Component, split: AnySplit, *, seed: int
) -> tuple[Prompt, frozenset[str]]:
    """What a language model is asked, and the documents it is shown; asking costs nothing yet."""
    if component.address != split.component:
        raise InvalidArgument(
            f"the examples are those of {split.component}, not of {component.address}",
            field="component",
        )
    documents = split.explaining.documents
    data: object
    if method is Method.OUTPUT_CENTRED:
        task, data, documents = instructions.OUTPUT_CENTRED, _outputs(component), frozenset()
    elif method is Method.ATTENTION_HEAD and component.is_head:
        task, data = instructions.ATTENTION_HEAD, _head_pairs(of_heads(split))
    elif component.is_head:
        raise InvalidArgument(
            f"{component.address} is a head: its methods are attention_head, output_centred and "
            "token_pattern",
            field="method",
        )
    elif method is Method.TOKEN_ACTIVATION_PAIRS:
        task, data = instructions.TOKEN_ACTIVATION_PAIRS, _token_pairs(of_tokens(split))
    elif method is Method.MAX_ACTIVATION_SUMMARY:
        task, data = instructions.MAX_ACTIVATION_SUMMARY, _summary(of_tokens(split))
    elif method is Method.CONTRASTIVE:
        task, data = instructions.CONTRASTIVE, _contrast(of_tokens(split))
    else:
        raise InvalidArgument(
            f"{component.address} is not explained by a language model with {method.value}",
            field="method",
        )
    schema = object_of(explanation=STRING)
    prompt = ask(method.value, task, data, schema, max_tokens=_REPLY_TOKENS, seed=seed)
    return prompt, documents


def token_pattern(component: Component, split: AnySplit) -> Explanation:
    """The offline explanation: rules learnt from the examples, and what the component promotes."""
    if component.address != split.component:
        raise InvalidArgument(
            f"the examples are those of {split.component}, not of {component.address}",
            field="component",
        )
    is_head = component.is_head
    places = _pair_places(of_heads(split)) if is_head else _token_places(of_tokens(split))
    promoted = tuple(
        each.text for each in component.promoted[:_PATTERN_PROMOTED] if each.score > 0 and each.text
    )
    pattern = TokenPattern(learn(places), promoted)
    while len(str(pattern)) > MAX_CHARACTERS:
        # Tokens can be long; what is said last matters least.
        if pattern.promoted and len(pattern.rules) <= 1:
            pattern = TokenPattern(pattern.rules, pattern.promoted[:-1])
        else:
            pattern = TokenPattern(pattern.rules[:-1], pattern.promoted)
    provenance = Provenance(
        method=Method.TOKEN_PATTERN, seed=split.seed, documents=split.explaining.documents
    )
    return Explanation(component.address, str(pattern), provenance)


def firing(example: Example) -> frozenset[int]:
    """The tokens of an active example that count as firing."""
    least = FIRES_SHARE * example.peak
    return frozenset(
        place for place, value in enumerate(example.activations) if value > max(least, 0.0)
    )


def near_misses(split: Split[Example], count: int) -> tuple[Example, ...]:
    """Quiet examples of the explaining half, first those with most tokens that fire elsewhere."""
    loud = {each.token_texts[each.peak_position] for each in split.explaining.active}
    ranked = sorted(
        split.explaining.quiet, key=lambda each: -len(loud.intersection(each.token_texts))
    )
    return tuple(ranked[:count])


def of_tokens(split: AnySplit) -> Split[Example]:
    """A neuron's or latent's split. Raises InvalidArgument."""
    if not isinstance(split.explaining.active[0], Example):
        raise InvalidArgument(f"{split.component} has examples by pair", field="component")
    return split


def of_heads(split: AnySplit) -> Split[HeadExample]:
    """A head's split. Raises InvalidArgument."""
    if not isinstance(split.explaining.active[0], HeadExample):
        raise InvalidArgument(f"{split.component} has examples by token", field="component")
    return split


def _token_pairs(split: Split[Example]) -> object:
    return [
        [
            [text, int(SCALE * max(value, 0.0) / split.scale)]
            for text, value in zip(each.token_texts, each.activations, strict=True)
        ]
        for each in split.explaining.strongest(_PAIRS)
    ]


def _summary(split: Split[Example]) -> object:
    examples = split.explaining.strongest(_SUMMARY)
    peaks = [each.token_texts[each.peak_position] for each in examples]
    return {
        "texts": [_highlighted(each) for each in examples],
        "strongest": list(dict.fromkeys(peaks)),
    }


def _contrast(split: Split[Example]) -> object:
    return {
        "active": [_highlighted(each) for each in split.explaining.spread(_ACTIVE)],
        "silent": ["".join(each.token_texts) for each in near_misses(split, _SILENT)],
    }


def _highlighted(example: Example) -> object:
    return segments(example.token_texts, dict.fromkeys(firing(example), "fires"))


def _head_pairs(split: Split[HeadExample]) -> object:
    found = []
    for example in split.explaining.strongest(_PAIRS):
        pair = example.strongest
        found.append(pair_segments(MarkedPair(example.token_texts, pair.query, pair.key)))
    return found


def _outputs(component: Component) -> object:
    if not component.promoted:
        raise FailedPrecondition(
            f"{component.address} comes without the tokens that it promotes",
            field="method",
            reason="NO_READ_OUTS",
        )

    def listed(scores: Sequence[TextScore]) -> list[list[str | float]]:
        return [[each.text, round(each.score, 3)] for each in scores[:_READ_OUTS]]

    return {"promoted": listed(component.promoted), "suppressed": listed(component.suppressed)}


def _token_places(split: Split[Example]) -> list[Place]:
    """What holds at each token of the examples that are learnt from, and how it fires there."""
    half = split.explaining
    examples = (*half.spread(_LEARNT_EXAMPLES), *near_misses(split, _LEARNT_EXAMPLES // 2))
    quiet = half.quiet[: _LEARNT_EXAMPLES // 2]
    return [
        (holding, max(value, 0.0) / split.scale)
        for example in dict.fromkeys((*examples, *quiet))
        for holding, value in zip(
            token_conditions(example.token_texts), example.activations, strict=True
        )
    ]


def _pair_places(split: Split[HeadExample]) -> list[Place]:
    """The same for pairs: the strongest of each example, and as many drawn by the seed."""
    half = split.explaining
    examples = (*half.spread(_LEARNT_EXAMPLES), *half.quiet[:_LEARNT_EXAMPLES])
    found: list[Place] = []
    for example in examples:
        values = np.array(example.pair_activations)
        generator = np.random.default_rng(keyed(split.seed, "pairs", *example.token_texts))
        drawn = generator.permutation(len(values))[:_LEARNT_PAIRS].tolist()
        loud = np.argsort(-values, kind="stable")[:_LEARNT_PAIRS].tolist()
        for pair in example.pairs(list(dict.fromkeys((*loud, *drawn)))):
            holding = pair_conditions(example.token_texts, pair.query, pair.key)
            found.append((holding, max(pair.value, 0.0) / split.scale))
    return found


def _one_line(text: str) -> str:
    """Without line breaks and without what nobody can see."""
    seen = (" " if unicodedata.category(sign) in ("Cc", "Zl", "Zp") else sign for sign in text)
    hidden = ("Cf", "Cs", "Co", "Cn")
    return " ".join("".join(s for s in seen if unicodedata.category(s) not in hidden).split())
