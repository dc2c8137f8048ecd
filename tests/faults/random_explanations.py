"""What fits in the explainer's requests, for `random_messages`."""

from collections.abc import Callable, Sequence
from typing import Any

from tdb.explainer.v1 import explanation_pb2

_E = "tdb.explainer.v1."

CHOICES: dict[str, Callable[[Any], Sequence[str]]] = {
    _E + "SimulateRequest.explanation": lambda _: ("id", "text"),
    _E + "EstimateCostRequest.call": lambda _: ("explain", "score", "explain_many"),
    _E + "ExplainManyRequest.components": lambda _: ("list", "list", "range"),
}

PRESENCE: dict[str, int | Callable[[Any], int]] = dict.fromkeys(
    (
        _E + "ExplainRequest.dataset",
        _E + "ExplainRequest.component",
        _E + "ExplainRequest.method",
        _E + "ScoreRequest.id",
        _E + "ScoreRequest.dataset",
        _E + "ScoreRequest.scoring",
        _E + "Scoring.scorers",
        _E + "SimulateRequest.texts",
        _E + "TokenTexts.tokens",
        _E + "ExplainManyRequest.dataset",
        _E + "ExplainManyRequest.method",
        _E + "ComponentList.components",
        _E + "ComponentRange.first",
        _E + "ComponentRange.last",
        _E + "ExplainedModel.id",
        _E + "ListExplanationsRequest.model",
        _E + "ListExplanationsRequest.components",
        _E + "GetExplanationRequest.id",
        _E + "RateExplanationRequest.id",
        _E + "DeleteExplanationRequest.id",
        _E + "WriteExplanationRequest.text",
        _E + "SearchRequest.query",
        _E + "ImportExplanationsRequest.dataset",
        _E + "GetJobRequest.id",
        _E + "FollowJobRequest.id",
        _E + "PauseJobRequest.id",
        _E + "ResumeJobRequest.id",
        _E + "CancelJobRequest.id",
    ),
    100,
)
PRESENCE |= {
    _E + "ExplainRequest.scoring": 50,
    _E + "ExplainManyRequest.scoring": 30,
    _E + "ExplainManyRequest.budget": 60,
    _E + "Scoring.judge": 30,
    _E + "Scoring.items": 60,
    _E + "RateExplanationRequest.rating": 70,
    _E + "WriteExplanationRequest.based_on": 30,
    _E + "WriteExplanationRequest.model": lambda builder: 0 if builder.here.based_on else 100,
    _E + "WriteExplanationRequest.component": lambda builder: 0 if builder.here.based_on else 100,
    _E + "SearchRequest.mode": 30,
    _E + "Budget.max_tokens": 70,
    _E + "Budget.max_cost": 30,
}

COUNTS: dict[str, tuple[int, ...]] = {
    _E + "TokenTexts.tokens": (1, 5, 20),
    _E + "ListExplanationsRequest.components": (1, 2, 3),
    _E + "ComponentList.components": (1, 2, 3),
}

UNIQUE = {
    _E + "Scoring.scorers",
    _E + "ListExplanationsRequest.components",
    _E + "ComponentList.components",
    _E + "SearchRequest.groups",
    _E + "SearchRequest.methods",
}


def _dataset(builder: Any) -> str:
    return str(builder.one(builder.world.datasets))


def _component(builder: Any) -> str:
    return str(builder.one(builder.world.components))


def _explanation(builder: Any) -> str:
    return str(builder.one(builder.world.explanations or ("none",)))


def _is_head(builder: Any) -> bool:
    """Whether the request being built is of a head, as far as it says."""
    asked = builder.built[0]
    named = getattr(asked, "component", "") or str(getattr(asked, "list", ""))
    return "head." in named


def _method(builder: Any) -> int:
    of_heads = ("METHOD_TOKEN_PATTERN", "METHOD_ATTENTION_HEAD")
    of_others = ("METHOD_TOKEN_PATTERN", "METHOD_CONTRASTIVE", "METHOD_MAX_ACTIVATION_SUMMARY")
    name = builder.one(of_heads if _is_head(builder) else of_others)
    return int(explanation_pb2.Method.Value(name))


def _scorer(builder: Any) -> int:
    of_others = ("SCORER_DETECTION", "SCORER_FUZZING", "SCORER_SIMULATION")
    name = "SCORER_HEAD_PAIRS" if _is_head(builder) else builder.one(of_others)
    return int(explanation_pb2.Scorer.Value(name))


def _words(builder: Any) -> str:
    return str(builder.one(builder.world.texts))


HINTS: dict[str, Callable[[Any], Any]] = {
    _E + "ExplainedModel.id": lambda builder: builder.one(builder.world.models),
    _E + "ListExplanationsRequest.components": _component,
    _E + "ComponentList.components": _component,
    _E + "ComponentRange.first": _component,
    _E + "ComponentRange.last": _component,
    _E + "ExplainRequest.component": _component,
    _E + "WriteExplanationRequest.component": _component,
    _E + "WriteExplanationRequest.text": _words,
    _E + "WriteExplanationRequest.based_on": _explanation,
    _E + "SimulateRequest.id": _explanation,
    _E + "SimulateRequest.text": lambda builder: builder.one(
        (*builder.world.texts, 'Fires on the token " Mary" (10).')
    ),
    _E + "TokenTexts.tokens": _words,
    _E + "ExplainRequest.method": _method,
    _E + "ExplainManyRequest.method": _method,
    _E + "Scoring.scorers": _scorer,
    _E + "Scoring.items": lambda builder: builder.number(12, 1),
    _E + "Scoring.seed": lambda builder: builder.number(99),
    _E + "ExplainRequest.seed": lambda builder: builder.number(99),
    _E + "ExplainManyRequest.seed": lambda builder: builder.number(99),
    _E + "Budget.max_tokens": lambda builder: builder.one((0, 100, 100_000)),
    _E + "Budget.max_cost": lambda builder: builder.one((0.0, 0.01, 3.0)),
    _E + "Gate.max_fraction_active": lambda builder: builder.number(10, 1) / 10,
    _E + "Gate.min_pattern_auc": lambda builder: builder.number(10) / 10,
    _E + "RateExplanationRequest.rating": lambda builder: builder.number(5, 1),
    _E + "SearchRequest.query": _words,
    _E + "SearchRequest.groups": lambda builder: builder.one(("neuron.1", "head.0")),
    _E + "SearchRequest.limit": lambda builder: builder.number(20, 1),
}
HINTS |= {
    _E + name + ".dataset": _dataset
    for name in (
        "ExplainRequest",
        "ScoreRequest",
        "ExplainManyRequest",
        "ImportExplanationsRequest",
    )
}
HINTS |= {
    _E + name + ".id": _explanation
    for name in (
        "ScoreRequest",
        "GetExplanationRequest",
        "RateExplanationRequest",
        "DeleteExplanationRequest",
    )
}
