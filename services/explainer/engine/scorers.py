"""What an explanation is worth, asked in five ways of the scoring half of a split.

    detection     which texts activate the component?        balanced accuracy, AUC
    fuzzing       are these the tokens that fire?            balanced accuracy, AUC
    simulation    how strongly at each token?                Pearson, explained variance
    head_pairs    which pairs does the head attend?          balanced accuracy, AUC
    intervention  which text was steered? (intervention.py)  accuracy

Every draw is by the seed that the score carries; no document that the explainer saw is used.
"""

from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.common.errors import FailedPrecondition, InvalidArgument
from services.explainer.engine import statistics
from services.explainer.engine.components import ACTIVE_SHARE, Example, HeadExample, Pair, keyed
from services.explainer.engine.explainers import firing
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.judges import Judge, MarkedPair, MarkedText
from services.explainer.engine.provider_judge import all_of
from services.explainer.engine.replies import FailureKind
from services.explainer.engine.scores import (
    Answer,
    Measure,
    Score,
    Scorer,
    classification,
    measured,
)
from services.explainer.engine.splits import Split

COUNT = 20
CALIBRATION = 3
_BOTH = (Measure.BALANCED_ACCURACY, Measure.AUC)


async def detection(
    explanation: Explanation, split: Split[Example], judge: Judge, *, seed: int, count: int = COUNT
) -> tuple[Score, ...]:
    """Up to `count` active texts of all strengths and as many quiet ones, in a drawn order."""
    _hold_apart(explanation, split)
    texts = _drawn(split, seed, count)
    said = await judge.detect(explanation, [each.token_texts for _, each in texts], seed=seed)
    answers = [
        Answer(label, probability, each.document_id)
        for (label, each), probability in zip(texts, said, strict=True)
    ]
    return classification(Scorer.DETECTION, _BOTH, answers, seed=seed, judge=judge.name)


async def fuzzing(
    explanation: Explanation, split: Split[Example], judge: Judge, *, seed: int, count: int = COUNT
) -> tuple[Score, ...]:
    """Active texts: in half of them the firing tokens are marked, in the others as many wrong ones.

    Which half a text is in is drawn, and so is where the wrong marks are.
    """
    _hold_apart(explanation, split)
    examples = sorted(
        split.scoring.spread(2 * count), key=lambda each: keyed(seed, "fuzz", *each.token_texts)
    )
    answers, texts = [], []
    wanted = 1
    for example in examples:
        right = firing(example)
        silent = [place for place in range(len(example.token_texts)) if place not in right]
        label = wanted if len(silent) >= len(right) else 1
        marked = right if label else _some(silent, len(right), seed, example)
        texts.append(MarkedText(example.token_texts, frozenset(marked)))
        answers.append((label, example.document_id))
        if label == wanted:
            wanted = 1 - wanted
    said = await judge.fuzz(explanation, texts, seed=seed)
    found = [
        Answer(label, probability, document)
        for (label, document), probability in zip(answers, said, strict=True)
    ]
    return classification(Scorer.FUZZING, _BOTH, found, seed=seed, judge=judge.name)


async def simulation(
    explanation: Explanation, split: Split[Example], judge: Judge, *, seed: int, count: int = COUNT
) -> tuple[Score, ...]:
    """Expected against true activations over all tokens of active and quiet texts.

    Pearson needs no unit. For the explained variance, expected values become activations by the
    line that fits best on texts of the explaining half, so that the scored ones do not help. `n`
    and failures count texts.
    """
    _hold_apart(explanation, split)
    scored = [each for _, each in _drawn(split, seed, count)]
    fitted = [*split.explaining.spread(CALIBRATION), *split.explaining.quiet[:CALIBRATION]]
    said = await all_of(
        [judge.simulate(explanation, each.token_texts, seed=seed) for each in (*scored, *fitted)]
    )
    expected, actual, documents, n = _simulated(scored, said[: len(scored)])
    failures = Counter(each for each in said[: len(scored)] if isinstance(each, FailureKind))
    known, true, _, _ = _simulated(fitted, said[len(scored) :])
    calibrated = statistics.Calibration.fit(known, true).apply(expected)
    pearson = measured(
        Scorer.SIMULATION,
        Measure.PEARSON,
        statistics.pearson,
        expected,
        actual,
        documents,
        failures,
        seed,
        judge.name,
        n,
    )
    if not known.size:
        return (pearson,)
    explained = measured(
        Scorer.SIMULATION,
        Measure.EXPLAINED_VARIANCE,
        statistics.explained_variance,
        calibrated,
        actual,
        documents,
        failures,
        seed,
        judge.name,
        n,
    )
    return pearson, explained


async def head_pairs(
    explanation: Explanation,
    split: Split[HeadExample],
    judge: Judge,
    *,
    seed: int,
    count: int = COUNT,
) -> tuple[Score, ...]:
    """Strong pairs, the best of each of up to `count` texts, against as many weak ones.

    Half of the weak pairs come from the same texts, half from quiet ones where there are any; they
    are drawn among pairs below a tenth of the head's largest activation.
    """
    _hold_apart(explanation, split)
    found: list[tuple[int, HeadExample, Pair]] = []
    active = split.scoring.spread(count)
    for number, example in enumerate(active):
        found.append((1, example, example.strongest))
        quiet = split.scoring.quiet
        other = quiet[number // 2 % len(quiet)] if quiet and number % 2 else example
        limit = ACTIVE_SHARE * split.scale
        weak = np.flatnonzero(np.array(other.pair_activations) <= limit)
        if weak.size:
            place = int(weak[keyed(seed, "weak", str(number)) % len(weak)])
            found.append((0, other, other.pairs([place])[0]))
    found.sort(key=lambda each: keyed(seed, "pair", str(each[2]), *each[1].token_texts))
    pairs = [MarkedPair(each.token_texts, pair.query, pair.key) for _, each, pair in found]
    said = await judge.relate(explanation, pairs, seed=seed)
    answers = [
        Answer(label, probability, each.document_id)
        for (label, each, _), probability in zip(found, said, strict=True)
    ]
    return classification(Scorer.HEAD_PAIRS, _BOTH, answers, seed=seed, judge=judge.name)


async def score(
    scorer: Scorer,
    explanation: Explanation,
    split: Split[Example] | Split[HeadExample],
    judge: Judge,
    *,
    seed: int,
    count: int = COUNT,
) -> tuple[Score, ...]:
    """By name, any scorer that asks about the examples of a split."""
    return await _OF_SPLITS[scorer](explanation, split, judge, seed=seed, count=count)


def _drawn(split: Split[Example], seed: int, count: int) -> list[tuple[int, Example]]:
    """Active (1) and quiet (0) examples for scoring, as many of each, in a drawn order."""
    if count < 1:
        raise InvalidArgument("must be at least 1", field="count")
    count = min(count, len(split.scoring.active), len(split.scoring.quiet))
    texts = [(1, each) for each in split.scoring.spread(count)]
    texts += [(0, each) for each in split.scoring.quiet[:count]]
    return sorted(texts, key=lambda each: keyed(seed, "order", *each[1].token_texts))


def _some(places: Sequence[int], count: int, seed: int, example: Example) -> Sequence[int]:
    """`count` of the places, drawn by the seed for this example."""
    return sorted(places, key=lambda place: keyed(seed, "mark", str(place), *example.token_texts))[
        :count
    ]


def _simulated(
    examples: Sequence[Example], said: Sequence[list[float] | FailureKind]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str], int]:
    """Expected and true activations of all tokens, the document of each, and how many texts."""
    expected: list[float] = []
    actual: list[float] = []
    documents: list[str] = []
    n = 0
    for example, values in zip(examples, said, strict=True):
        if isinstance(values, FailureKind):
            continue
        n += 1
        expected += values
        actual += example.activations
        documents += [example.document_id] * len(values)
    return np.array(expected, dtype=np.float64), np.array(actual, dtype=np.float64), documents, n


def _hold_apart(explanation: Explanation, split: Split[Example] | Split[HeadExample]) -> None:
    """Refuses to score an explanation on what its explainer saw."""
    if explanation.component != split.component:
        raise InvalidArgument(
            f"explains {explanation.component}, and the examples are those of {split.component}",
            field="explanation",
        )
    shared = explanation.provenance.documents & split.scoring.documents
    if shared:
        raise FailedPrecondition(
            f"{len(shared)} documents of the scoring examples were shown to the explainer: split "
            f"with the seed of the explanation, {explanation.provenance.seed}",
            reason="DOCUMENTS_SHARED",
        )


_OF_SPLITS: dict[Scorer, Callable[..., Coroutine[Any, Any, tuple[Score, ...]]]] = {
    Scorer.DETECTION: detection,
    Scorer.FUZZING: fuzzing,
    Scorer.SIMULATION: simulation,
    Scorer.HEAD_PAIRS: head_pairs,
}
