"""What a call may cost, from the very questions that it would ask; nothing is sent.

Explainers and judges run against a provider that notes what it is asked and answers nothing. Of a
job, a sample of its components is asked about; the others are taken to be alike. What was paid for
before and is kept costs nothing again: then it is less.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from services.common.errors import TdbError
from services.explainer.components import Subject
from services.explainer.engine import explainers
from services.explainer.engine.budget import Ledger, Usage
from services.explainer.engine.explainers import AnySplit
from services.explainer.engine.explanations import Explanation, Method, Provenance
from services.explainer.engine.prompts import Prompt
from services.explainer.engine.provider import OnText, Provider, ProviderAround, Reply
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Scorer
from services.explainer.making import OFFLINE, Task, nothing_shown, split_of
from services.explainer.scoring import Scorers, Scoring, asks_provider, is_pattern

SAMPLE = 24
"""Components of a job that are looked at."""
BYTES_PER_TOKEN = 3.5
REPLY_SHARE = 0.4
"""How much of the longest reply is expected."""
_USUAL_TEXT = "fires on " + "some words of a phrase " * 6
_LONGEST_TEXT = "\u5b57" * explainers.REPLY_CHARACTERS
_USUAL_STEERED = "what a model goes on with " * 6


@dataclass(frozen=True)
class Estimate:
    """Calls, and the tokens that are expected and those at most, were every call made once."""

    calls: int = 0
    expected: Usage = field(default_factory=Usage)
    most: Usage = field(default_factory=Usage)


class _Listener(ProviderAround):
    """A provider that notes what it is asked and has no answer."""

    def __init__(self, provider: Provider) -> None:
        super().__init__(provider)
        self.heard: list[Prompt] = []

    async def complete(
        self, prompt: Prompt, ledger: Ledger, on_text: OnText | None = None
    ) -> Reply:
        self.heard.append(prompt)
        return Reply(failure=FailureKind.REFUSED)


class _Steering:
    """Makes the model go on with nothing in particular, without asking it."""

    async def prepare(
        self, subject: Subject, *, prompts: int, seed: int, shown: frozenset[str]
    ) -> tuple[Sequence[str], Callable[[str], Awaitable[tuple[str, str]]]]:
        async def generate(prompt: str) -> tuple[str, str]:
            return f"{prompt} {_USUAL_STEERED}", f"{prompt} {_USUAL_STEERED}."

        return [f"prompt {number}" for number in range(prompts)], generate


async def of_explanation(subject: Subject, task: Task, provider: Provider) -> Estimate:
    """Of explaining one component, and scoring that. Raises what explaining it would raise."""
    component = subject.component
    split: AnySplit | None = None
    if task.method is not Method.OUTPUT_CENTRED:
        split = await split_of(component, task.seed)
    asking = _Listener(provider)
    if task.method is OFFLINE:
        assert split is not None
        usual = longest = explainers.token_pattern(component, split)
    else:
        shown = split or nothing_shown(component, task.seed)
        await explainers.explain(task.method, component, shown, asking, Ledger(), seed=task.seed)
        documents = shown.explaining.documents if split else frozenset()
        provenance = Provenance(method=task.method, seed=task.seed, documents=documents)
        usual = Explanation(component.address, _USUAL_TEXT, provenance)
        longest = replace(usual, text=_LONGEST_TEXT)
    made = _sum(asking.heard, asking.heard, provider)
    if task.scoring is None:
        return made
    return _added(made, await of_scores(usual, longest, subject, split, task.scoring, provider))


async def of_scores(
    usual: Explanation,
    longest: Explanation,
    subject: Subject,
    split: AnySplit | None,
    scoring: Scoring,
    provider: Provider,
) -> Estimate:
    """Of scoring an explanation that is as long as usual, or at most."""
    if not asks_provider(scoring.judge, is_pattern(usual.text)):
        return Estimate()
    heard = []
    for explanation in (usual, longest):
        asking = _Listener(provider)
        judged = Scorers(asking, _Steering())
        for scorer in scoring.scorers:
            try:
                if split is None and scorer is not Scorer.INTERVENTION:
                    made = explanation.provenance
                    split = await split_of(subject.component, made.seed or 0, made.documents)
                await judged.score(scorer, explanation, subject, split, scoring, Ledger())
            except TdbError:
                continue  # nobody has answered; or the score cannot be made, which costs nothing
        heard.append(asking.heard)
    return _sum(heard[0], heard[1], provider)


def of_many(sample: Sequence[Estimate], components: int) -> Estimate:
    """Of so many components, of which these are some; each takes at most what the largest takes."""
    if not sample:
        return Estimate()
    share = components / len(sample)

    def scaled(usages: Sequence[Usage]) -> Usage:
        return Usage(
            math.ceil(share * sum(each.prompt_tokens for each in usages)),
            math.ceil(share * sum(each.completion_tokens for each in usages)),
        )

    return Estimate(
        math.ceil(share * sum(each.calls for each in sample)),
        scaled([each.expected for each in sample]),
        Usage(
            components * max(each.most.prompt_tokens for each in sample),
            components * max(each.most.completion_tokens for each in sample),
        ),
    )


def spread(components: Sequence[str]) -> list[str]:
    """A sample of them, evenly."""
    if len(components) <= SAMPLE:
        return list(components)
    step = (len(components) - 1) / (SAMPLE - 1)
    return [components[round(step * number)] for number in range(SAMPLE)]


def _sum(usual: Sequence[Prompt], longest: Sequence[Prompt], provider: Provider) -> Estimate:
    expected, most = Usage(), Usage()
    for prompt in usual:
        size = len((prompt.system + prompt.user).encode(errors="replace"))
        reply = REPLY_SHARE * provider.most(prompt).completion_tokens
        expected = _plus(expected, Usage(math.ceil(size / BYTES_PER_TOKEN), math.ceil(reply)))
    for prompt in longest:
        most = _plus(most, provider.most(prompt))
    return Estimate(len(usual), expected, most)


def _added(one: Estimate, other: Estimate) -> Estimate:
    return Estimate(
        one.calls + other.calls,
        _plus(one.expected, other.expected),
        _plus(one.most, other.most),
    )


def _plus(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.prompt_tokens + other.prompt_tokens, one.completion_tokens + other.completion_tokens
    )
