"""Between the API's messages and the values of store and engine."""

from tdb.explainer.v1 import explain_pb2, explanation_pb2

from services.explainer.engine.budget import Ledger
from services.explainer.engine.explanations import Method
from services.explainer.engine.scores import Measure, Scorer
from services.explainer.scoring import JudgeChoice
from services.explainer.stored import Ratings, StoredExplanation, StoredScore

METHODS: dict[int, Method] = {
    explanation_pb2.Method.Value(f"METHOD_{each.name}"): each for each in Method
}
SCORERS: dict[int, Scorer] = {
    explanation_pb2.Scorer.Value(f"SCORER_{each.name}"): each for each in Scorer
}
JUDGES: dict[int, JudgeChoice] = {
    explain_pb2.JUDGE_UNSPECIFIED: JudgeChoice.DEFAULT,
    explain_pb2.JUDGE_OFFLINE: JudgeChoice.OFFLINE,
    explain_pb2.JUDGE_PROVIDER: JudgeChoice.PROVIDER,
}
_METHOD_NUMBERS = {each: explanation_pb2.Method.ValueType(n) for n, each in METHODS.items()}
_SCORER_NUMBERS = {each: explanation_pb2.Scorer.ValueType(n) for n, each in SCORERS.items()}
_MEASURE_NUMBERS = {each: explanation_pb2.Measure.Value(f"MEASURE_{each.name}") for each in Measure}


def explanation(stored: StoredExplanation) -> explanation_pb2.Explanation:
    return explanation_pb2.Explanation(
        id=stored.id,
        model=explanation_pb2.ExplainedModel(
            id=stored.model.id,
            weights_hash=stored.model.weights_hash,
            dictionaries=[
                explanation_pb2.ExplainedDictionary(id=id, weights_hash=hash)
                for id, hash in stored.model.dictionaries
            ],
        ),
        component=stored.component,
        text=stored.text,
        provenance=explanation_pb2.Provenance(
            method=method_number(stored.method),
            explainer_model=stored.explainer_model,
            provider=stored.provider,
            prompt_hash=stored.prompt_hash,
            seed=stored.seed,
            dataset=stored.dataset,
            dataset_hash=stored.dataset_hash,
            documents=stored.documents,
            code_version=stored.code_version,
            author=stored.author,
            based_on=stored.based_on,
            published_method=stored.published_method,
        ),
        scores=[score(each) for each in stored.scores],
        created_ms=stored.created_ms,
        ratings=ratings(stored.ratings),
    )


def method_number(method: Method) -> "explanation_pb2.Method.ValueType":
    return _METHOD_NUMBERS[method]


def scorer_number(scorer: Scorer) -> "explanation_pb2.Scorer.ValueType":
    return _SCORER_NUMBERS[scorer]


def score(stored: StoredScore) -> explanation_pb2.Score:
    """A score without a scorer is one that others published."""
    return explanation_pb2.Score(
        scorer=_SCORER_NUMBERS[stored.scorer]
        if stored.scorer
        else explanation_pb2.SCORER_UNSPECIFIED,
        measure=_MEASURE_NUMBERS[stored.measure]
        if stored.measure
        else explanation_pb2.MEASURE_PUBLISHED,
        measure_name=stored.measure_name,
        value=stored.value,
        low=stored.low,
        high=stored.high,
        chance=stored.chance,
        n=stored.n,
        failures=[
            explanation_pb2.FailureCount(kind=kind.value, count=count)
            for kind, count in stored.failures.items()
        ],
        seed=stored.seed,
        judge=stored.judge,
        created_ms=stored.created_ms,
        dataset=stored.dataset,
        dataset_hash=stored.dataset_hash,
        code_version=stored.code_version,
    )


def ratings(found: Ratings) -> explanation_pb2.Ratings:
    return explanation_pb2.Ratings(count=found.count, mean=found.mean, own=found.own)


def usage(ledger: Ledger) -> explain_pb2.Usage:
    return explain_pb2.Usage(
        calls=ledger.calls,
        cached_calls=ledger.cached,
        prompt_tokens=ledger.prompt_tokens,
        completion_tokens=ledger.completion_tokens,
        cost=ledger.cost,
        bounded_calls=ledger.bounded_calls,
    )
