"""Explaining and scoring a component with nobody to ask: functions that run in `OfflinePool`."""

import asyncio
from dataclasses import dataclass

from services.common.addresses import Kind, parse
from services.common.errors import TdbError
from services.explainer.engine import explainers, scorers
from services.explainer.engine.components import Component
from services.explainer.engine.explainers import AnySplit
from services.explainer.engine.explanations import Explanation
from services.explainer.engine.offline_simulator import OfflineSimulator
from services.explainer.engine.scores import Measure, Score, Scorer
from services.explainer.engine.splits import split_pairs, split_tokens


@dataclass(frozen=True, kw_only=True)
class Made:
    """An explanation, its scores, and those that could not be made with the reason."""

    explanation: Explanation
    scores: tuple[Score, ...] = ()
    unscored: tuple[tuple[Scorer, str], ...] = ()


def explain(
    component: Component,
    *,
    seed: int,
    scorers_asked: tuple[Scorer, ...],
    score_seed: int,
    count: int,
    least_auc: float | None,
) -> Made | None:
    """The token pattern with its scores; None where its AUC is below `least_auc`.

    Raises FailedPrecondition where there are too few documents.
    """
    split = split_of(component, seed)
    explanation = explainers.token_pattern(component, split)
    if least_auc is not None and _auc(explanation, split, seed) < least_auc:
        return None
    scores: list[Score] = []
    unscored: list[tuple[Scorer, str]] = []
    for scorer in scorers_asked:
        try:
            scores += _score(scorer, explanation, split, score_seed, count)
        except TdbError as error:
            unscored.append((scorer, error.reason))
    return Made(explanation=explanation, scores=tuple(scores), unscored=tuple(unscored))


def pattern_auc(component: Component, seed: int) -> float:
    """How well the token pattern tells texts (pairs, for a head) apart: the AUC, 0 where undefined.

    Raises FailedPrecondition where there are too few documents.
    """
    split = split_of(component, seed)
    return _auc(explainers.token_pattern(component, split), split, seed)


def split_of(component: Component, seed: int) -> AnySplit:
    if component.is_head:
        return split_pairs(component, seed=seed)
    return split_tokens(component, seed=seed)


def _auc(explanation: Explanation, split: AnySplit, seed: int) -> float:
    is_head = parse(explanation.component).kind is Kind.HEAD
    scorer = Scorer.HEAD_PAIRS if is_head else Scorer.DETECTION
    scores = _score(scorer, explanation, split, seed, scorers.COUNT)
    (value,) = (each.value for each in scores if each.measure is Measure.AUC)
    return value or 0.0


def _score(
    scorer: Scorer, explanation: Explanation, split: AnySplit, seed: int, count: int
) -> tuple[Score, ...]:
    judge = OfflineSimulator()
    return asyncio.run(scorers.score(scorer, explanation, split, judge, seed=seed, count=count))
