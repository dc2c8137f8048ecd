"""The intervention score: does steering the component make the model say what is claimed?

For each prompt the model goes on twice, once with the component amplified. A judge who knows the
explanation and neither the prompt nor which is which says where it was. Whichever comes first is
drawn by the seed. Texts that are the same are half right: steering did nothing.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from services.common.errors import InvalidArgument
from services.explainer.engine import statistics
from services.explainer.engine.components import keyed
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.judges import Judge
from services.explainer.engine.provider_judge import all_of
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import Measure, Score, Scorer, measured

Generate = Callable[[str], Awaitable[tuple[str, str]]]
"""From a prompt to what the model goes on with: (steered, unsteered)."""


async def intervention(
    explanation: Explanation,
    prompts: Sequence[str],
    generate: Generate,
    judge: Judge,
    *,
    seed: int,
) -> Score:
    """The share of prompts for which the judge finds the steered text; a half is chance.

    Raises whatever `generate` raises.
    """
    if not prompts:
        raise InvalidArgument("at least one prompt is needed", field="prompts")
    if len(set(prompts)) != len(prompts):
        raise InvalidArgument("a prompt stands twice: it would count twice", field="prompts")
    said = await all_of([_found(explanation, each, generate, judge, seed) for each in prompts])
    failures = Counter(each for each in said if isinstance(each, FailureKind))
    answered = [
        (prompt, each)
        for prompt, each in zip(prompts, said, strict=True)
        if not isinstance(each, FailureKind)
    ]
    right = np.array([each for _, each in answered], dtype=np.float64)
    return measured(
        Scorer.INTERVENTION,
        Measure.ACCURACY,
        statistics.mean,
        right,
        right,
        [prompt for prompt, _ in answered],
        failures,
        seed,
        judge.name,
    )


async def _found(
    explanation: Explanation, prompt: str, generate: Generate, judge: Judge, seed: int
) -> float | FailureKind:
    """1 where the judge finds the steered text, 0 where the other, a half where it cannot say."""
    steered, unsteered = await generate(prompt)
    if steered == unsteered:
        return 0.5
    first = keyed(seed, "first", prompt) % 2 == 0
    pair = (steered, unsteered) if first else (unsteered, steered)
    said = await judge.compare(explanation, *pair, seed=seed)
    if isinstance(said, FailureKind):
        return said
    if said == 0.5:
        return 0.5
    return float((said > 0.5) == first)
