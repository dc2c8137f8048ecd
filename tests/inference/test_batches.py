"""Calls of several users in one padded pass are answered as if each were alone."""

import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from services.common.addresses import Address, Kind, parse
from services.common.errors import Cancelled, DeadlineExceeded, FailedPrecondition, TdbError
from services.inference.engine.asked import (
    AskedAttribution,
    AskedRun,
    AttributeResult,
    ReadPoints,
    length_bucket,
)
from services.inference.engine.attribution import ExplainedRun, NormMode
from services.inference.engine.baselines import Reference
from services.inference.engine.bound import Place
from services.inference.engine.cancellation import CancelToken, SharedToken
from services.inference.engine.captured import Pass, Row
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.sites import Point as SitePoint
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Mean,
    Operation,
    Patch,
    ProjectOut,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.norms import FINAL
from services.inference.engine.objectives import (
    Along,
    LogitDiff,
    LogitMinusMean,
    LogProb,
    Objective,
    Prob,
)
from services.inference.engine.points import Point
from services.inference.engine.run_view import RunView
from services.inference.engine.tables import Ranking
from services.inference.engine.traced_latents import TracedLatent
from services.inference.engine.tracing import (
    Branch,
    Side,
    TracedNeuron,
    TracedScore,
    TracedValue,
)
from tests.inference.batches import RememberingBatches, same_attribution, same_run
from tests.inference.helpers import (
    HEAD_WIDTH,
    VOCABULARY,
    WIDTH,
    Engine,
    in_float64,
    random_engine,
    shared_engine,
)
from tests.inference.planted import random_dictionary
from tests.inference.test_random_requests import runs

__all__ = ["in_float64"]

BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])
LISTED = VOCABULARY - 3
IDS = (3, 17, 4, 4, 25, 60, 8, 1)
PROMPTS = (IDS, (9, 2), (11, 30, 7, 12, 45), (1,), (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
"""Of different lengths: every batch has padding."""
BY_TOTAL = Ranking(Column.TOTAL_EFFECT, 12)
DIRECTION = torch.linspace(-1, 2, WIDTH)
PAIR = parse("head.1.2~6-3")
LOGIT_DIFF = LogitDiff((5,), (9, 11), 7)
OBJECTIVES: dict[str, Objective] = {
    "logit diff": LOGIT_DIFF,
    "earlier": LogitDiff((5,), (), 2),
    "minus mean": LogitMinusMean((5, 8), 4),
    "log prob": LogProb((5, 7), 6),
    "prob": Prob((1,), 7),
    "along a residual": Along(Address(Kind.RESID_POST, 1), DIRECTION, 5),
    "along the norm": Along(None, DIRECTION, 3),
    "neuron": TracedNeuron(parse("neuron.1.7~6"), Branch.GATE),
    "neuron, after": TracedNeuron(parse("neuron.2.3~5"), None),
    "query": TracedScore(PAIR, Side.QUERY),
    "key": TracedScore(PAIR, Side.KEY),
    "both": TracedScore(PAIR, Side.BOTH),
    "probability": TracedScore(PAIR, Side.QUERY, post=True),
    "value": TracedValue(parse("head.1.2~7-3"), LOGIT_DIFF),
    "value, cut": TracedValue(PAIR, LOGIT_DIFF),
    "value of a trace": TracedValue(
        parse("head.0.1~5-2"), TracedNeuron(parse("neuron.2.3~5"), Branch.GATE)
    ),
}
ALIGNED = tuple((place, place + 1) for place in range(5))
"""Tokens of a prompt of five and of the source that stand for each other."""
NUMBER: dict[str, Operation] = {
    "zero": Zero(),
    "set": SetTo(1.5),
    "scale": Scale(-2.0),
    "add": Add(0.7),
    "mean": Mean((Source(PROMPTS[4]), Source(PROMPTS[2]))),
    "patch": Patch(Source(PROMPTS[4], (Intervention(parse("neuron.0.3"), SetTo(2.0)),)), ALIGNED),
}
VECTOR: dict[str, Operation] = {
    "zero": Zero(),
    "scale": Scale(0.5),
    "add": Add(DIRECTION.double(), relative=True),
    "mean": Mean((Source(PROMPTS[4]), Source(PROMPTS[2]))),
    "patch": Patch(Source(PROMPTS[4]), ALIGNED),
    "project out": ProjectOut(DIRECTION.double()),
}
HEAD: dict[str, Operation] = {
    "set": SetTo(torch.linspace(-1, 1, HEAD_WIDTH).double()),
    "project out": ProjectOut(torch.linspace(-1, 2, HEAD_WIDTH).double()),
}
EDITS: dict[str, tuple[str, Operation]] = {
    **{f"neuron, {name}": ("neuron.1.7", each) for name, each in NUMBER.items()},
    **{f"stream, {name}": ("resid_post.1", each) for name, each in VECTOR.items()},
    **{f"head, {name}": ("head.1.2", each) for name, each in HEAD.items()},
    "pair, set": ("head.0.1~3-1", SetTo(0.5)),
    "pair, mask": ("head.0.1~3-1", Mask()),
    "pair, patch": ("head.0.1~3-1", Patch(Source(PROMPTS[4]), ALIGNED)),
    "query": ("head.1.0.q", Scale(2.0)),
    "key": ("head.1.0.k~2", Zero()),
    "value": ("head.1.0.v~2", Scale(3.0)),
    "embedding": ("embed~1", Scale(2.0)),
    "middle": ("resid_mid.0", Scale(1.1)),
    "attention": ("attn.1", Zero()),
    "mlp": ("mlp.2~3", Scale(0.5)),
}


def batches_of(engine: Engine) -> RememberingBatches:
    return RememberingBatches(engine.hooks, LISTED)


def single(engine: Engine, asked: AskedAttribution) -> AttributeResult:
    (answer,) = batches_of(engine).attribute([asked], CancelToken())
    assert not isinstance(answer, TdbError)
    return answer


def compare(
    answers: Sequence[AttributeResult | TdbError], alone: Sequence[AttributeResult]
) -> None:
    for ours, theirs in zip(answers, alone, strict=True):
        assert not isinstance(ours, TdbError)
        same_attribution(ours, theirs, BY_TOTAL)


def check(engine: Engine, asked: Sequence[AskedAttribution]) -> None:
    """Every answer of the batch is what the call gives alone."""
    answers = batches_of(engine).attribute(asked, CancelToken())
    for each, ours in zip(asked, answers, strict=True):
        assert not isinstance(ours, TdbError)
        same_attribution(ours, single(engine, each), each.ranking)


def asked_of(
    run: ExplainedRun, mode: NormMode = NormMode.FINAL_NORM_FROZEN, tokens: int = 0
) -> AskedAttribution:
    return AskedAttribution((run,), mode, BY_TOTAL, tokens)


def others(read_out_tokens: int = 0) -> list[AskedAttribution]:
    """Four plain calls of other lengths, in other norm modes."""
    modes = [*NormMode, NormMode.FINAL_NORM_FROZEN]
    return [
        asked_of(ExplainedRun(ids, (), LogitDiff((3,), (7,), len(ids) - 1)), mode, read_out_tokens)
        for ids, mode in zip(PROMPTS[1:], modes, strict=True)
    ]


@BOTH
def test_every_objective(family: str) -> None:
    engine = shared_engine(family)
    asked = [
        asked_of(ExplainedRun(IDS, (), objective), mode)
        for objective, mode in zip(OBJECTIVES.values(), cycle(NormMode), strict=False)
    ]
    check(engine, [*others(), *asked])


def test_the_other_branch_of_a_gated_neuron() -> None:
    objective = TracedNeuron(parse("neuron.1.7~6"), Branch.UP)
    check(shared_engine("llama"), [*others(), asked_of(ExplainedRun(IDS, (), objective))])


@BOTH
def test_every_edit(family: str) -> None:
    engine = shared_engine(family)
    asked = []
    for number, (target, operation) in enumerate(EDITS.values()):
        ids = PROMPTS[2] if isinstance(operation, Patch) or number % 2 else IDS
        edits = engine.edits(Intervention(parse(target), operation), tokens=len(ids))
        asked.append(asked_of(ExplainedRun(ids, edits, LogitDiff((5,), (), len(ids) - 1))))
    check(engine, [*others(), *asked])


@BOTH
def test_rankings_read_outs_pairs_and_baselines(family: str) -> None:
    engine = shared_engine(family)
    edits = engine.edits(Intervention(parse("neuron.1.7"), Zero()), tokens=len(IDS))
    plain = ExplainedRun(IDS, (), LOGIT_DIFF)
    edited = ExplainedRun(IDS, edits, LOGIT_DIFF)
    frozen = NormMode.FINAL_NORM_FROZEN
    reference = Reference(((PROMPTS[4], ()), (PROMPTS[4][::-1], ())), tuple(range(len(IDS))))
    check(
        engine,
        [
            AskedAttribution((plain, edited), frozen, BY_TOTAL, 4),
            *others(3),
            AskedAttribution((edited,), frozen, Ranking(None, 5), 6),
            AskedAttribution((plain,), frozen, Ranking(Column.DIRECT_EFFECT, 4, True)),
            AskedAttribution((plain,), frozen, Ranking(Column.ACTIVATION, 200), 2),
            AskedAttribution((plain,), frozen, BY_TOTAL, 2, reference),
        ],
    )


@cache
def with_dictionaries(family: str) -> Engine:
    double = torch.float64
    written = [
        random_dictionary("mlp", SitePoint.MLP_OUT, 1, "jumprelu", dtype=double),
        random_dictionary("attn", SitePoint.ATTN_OUT, 1, "topk", dtype=double),
        random_dictionary("view", SitePoint.RESID_POST, 0, "relu", dtype=double),
    ]
    return random_engine(family, double, written)


@BOTH
@pytest.mark.usefixtures("in_float64")
def test_latents(family: str) -> None:
    """With rows that edit a latent, trace one and do neither; in float64 no latent is near 0."""
    engine = with_dictionaries(family)
    place = Place(engine.hooks.shelf.served["mlp"].header, engine.architecture)
    latent = Address(Kind.LATENT, index=5, dictionary="mlp", position=6)
    target = Intervention(parse("latent.attn.3"), SetTo(2.0))
    edits = engine.edits(target, tokens=len(IDS))
    wanted = [
        ExplainedRun(IDS, (), TracedLatent(latent, place)),
        ExplainedRun(IDS, (), TracedLatent(latent, place, post=True)),
        ExplainedRun(IDS, edits, LOGIT_DIFF),
        *(each.runs[0] for each in others()),
    ]
    for dictionaries in (("attn", "mlp", "view"), ("mlp",), ()):
        check(
            engine,
            [
                AskedAttribution(
                    (run,),
                    NormMode.FINAL_NORM_FROZEN,
                    BY_TOTAL,
                    3,
                    dictionaries=dictionaries,
                    sources=2,
                )
                for run in wanted
            ],
        )


READS: dict[str, ReadPoints] = {
    "nothing": ReadPoints(),
    "lens": ReadPoints(lens=(Point("embed"), Point("resid_post", 1))),
    "everything": ReadPoints(
        activations=(Point("logits"), Point("attn_probs", 1), Point("v", 0), Point("mlp_act", 2))
    ),
}


@BOTH
def test_runs(family: str) -> None:
    engine = shared_engine(family)
    edits = engine.edits(Intervention(parse("head.1.0.k~2"), Zero()), tokens=len(IDS))
    asked = [
        AskedRun(IDS, edits, (2, 5, 7), 6, (1, 2), READS["nothing"]),
        AskedRun(PROMPTS[1], (), (0, 1), 3, (), READS["lens"]),
        AskedRun(PROMPTS[4], (), tuple(range(11)), 2, (8,), READS["everything"]),
        AskedRun(PROMPTS[3], (), (0,), 80, (), READS["nothing"]),
        AskedRun(IDS, edits, (1,), 2, (), READS["everything"]),
    ]
    for each, ours in zip(asked, batches_of(engine).run(asked, CancelToken()), strict=True):
        (alone,) = batches_of(engine).run([each], CancelToken())
        assert not isinstance(ours, TdbError)
        assert not isinstance(alone, TdbError)
        same_run(ours, alone)


MIXED = settings(
    max_examples=8,
    derandomize=True,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def check_mix(family: str, data: st.DataObject) -> None:
    engine = shared_engine(family)
    asked = []
    for ids, wanted, objective in data.draw(st.lists(runs(), min_size=2, max_size=6)):
        run = ExplainedRun(ids, engine.edits(*wanted, tokens=len(ids)), objective)
        ranking = Ranking(
            data.draw(st.none() | st.sampled_from(Column)), data.draw(st.integers(1, 30))
        )
        asked.append(
            AskedAttribution(
                (run,) * data.draw(st.integers(1, 2)),
                data.draw(st.sampled_from(NormMode)),
                ranking,
                data.draw(st.integers(0, 4)),
            )
        )
    check(engine, asked)


@BOTH
@MIXED
@given(data=st.data())
def test_random_mixes(family: str, data: st.DataObject) -> None:
    check_mix(family, data)


@pytest.mark.long
@BOTH
@MANY
@given(data=st.data())
def test_many_random_mixes(family: str, data: st.DataObject) -> None:
    check_mix(family, data)


def wrong_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row's logits at the positions of the row before it."""
    right = Pass.logits_at
    monkeypatch.setattr(
        Pass, "logits_at", lambda self, row: right(self, (row - 1) % len(self.rows))
    )


def padding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run as long as the longest of its batch."""
    monkeypatch.setattr(RunView, "tokens", property(lambda self: self.captured.embed.shape[1]))


def one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row's norm mode for all."""
    monkeypatch.setattr(Row, "freezes", lambda self, place: place == FINAL)


@pytest.mark.parametrize("wrong", [wrong_logits, padding_too, one_mode])
def test_mixed_rows_are_noticed(
    wrong: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison fails where the batch's bookkeeping is wrong."""
    engine, asked = shared_engine("gpt2"), others()
    alone = [single(engine, each) for each in asked]
    wrong(monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        compare(batches_of(engine).attribute(asked, CancelToken()), alone)


def overflowing(engine: Engine) -> AskedAttribution:
    edits = engine.edits(Intervention(parse("neuron.1.7"), SetTo(3e38)), tokens=len(IDS))
    return asked_of(ExplainedRun(IDS, edits, LOGIT_DIFF))


def refused_late(engine: Engine) -> AskedAttribution:
    """Its pass is well: what overflows is a baseline, which is its own."""
    edits = engine.edits(Intervention(parse("neuron.1.7"), SetTo(3e38)), tokens=len(IDS))
    run = ExplainedRun(IDS, (), LOGIT_DIFF)
    reference = Reference(((IDS, edits),), tuple(range(len(IDS))))
    return AskedAttribution((run,), NormMode.LIVE, BY_TOTAL, 0, reference)


@pytest.mark.parametrize("refused", [overflowing, refused_late])
def test_a_refusal_is_its_own(refused: Callable[[Engine], AskedAttribution]) -> None:
    engine, well = shared_engine("gpt2"), others(2)
    asked = [*well[:2], refused(engine), *well[2:]]
    answers = batches_of(engine).attribute(asked, CancelToken())
    for place, (each, ours) in enumerate(zip(asked, answers, strict=True)):
        if place == 2:
            assert isinstance(ours, FailedPrecondition)
            assert ours.reason == "NON_FINITE"
            continue
        assert not isinstance(ours, TdbError)
        same_attribution(ours, single(engine, each), BY_TOTAL)


def test_a_runs_refusal_is_its_own() -> None:
    engine = shared_engine("gpt2")
    edits = engine.edits(Intervention(parse("neuron.1.7"), SetTo(3e38)), tokens=len(IDS))
    asked = [AskedRun(IDS, edits, (7,), 3), AskedRun(PROMPTS[1], (), (1,), 3)]
    refused, ours = batches_of(engine).run(asked, CancelToken())
    assert isinstance(refused, FailedPrecondition)
    assert not isinstance(ours, TdbError)


def test_members_that_left() -> None:
    """They are told so; the others get their answers."""
    engine, asked = shared_engine("gpt2"), others()
    members = [CancelToken() for _ in asked]
    members[1].cancel()
    members[3] = CancelToken(deadline=time.monotonic() - 1)
    first, left, third, late = batches_of(engine).attribute(asked, SharedToken(members))
    assert isinstance(left, Cancelled)
    assert isinstance(late, DeadlineExceeded)
    for ours, each in ((first, asked[0]), (third, asked[2])):
        assert not isinstance(ours, TdbError)
        same_attribution(ours, single(engine, each), BY_TOTAL)


def test_a_batch_stops_when_everybody_left() -> None:
    engine, asked = shared_engine("gpt2"), others()
    members = [CancelToken(deadline=time.monotonic() - 1), *(CancelToken() for _ in asked[1:])]
    for each in members[1:]:
        each.cancel()
    with pytest.raises((DeadlineExceeded, Cancelled)):
        SharedToken(members).check()
    late, *left = batches_of(engine).attribute(asked, SharedToken(members))
    assert isinstance(late, DeadlineExceeded)
    assert all(isinstance(each, Cancelled) for each in left)


def test_keys() -> None:
    def key(ids: Sequence[int], **changes: object) -> object:
        run = ExplainedRun(tuple(ids), (), LogitDiff((5,), (), 0))
        asked = AskedAttribution((run,), NormMode.LIVE, BY_TOTAL, **changes)  # type: ignore[arg-type]
        return asked.batch_key

    assert key(range(9)) == key(range(15), read_out_tokens=4)
    assert key(range(9)) != key(range(17))
    assert key(range(9)) != key(range(9), dictionaries=("D",))
    assert key(range(9), dictionaries=("D", "E")) == key(range(9), dictionaries=("E", "D"))
    run = AskedRun(tuple(range(9)), (), (8,), 3)
    assert run.batch_key != key(range(9))
    assert run.batch_key == AskedRun(tuple(range(12)), (), (3,), 9, (4,)).batch_key
    assert run.batch_key != AskedRun(tuple(range(12)), (), tuple(range(12)), 9).batch_key


def test_tables_of_other_dictionaries_share_no_batch() -> None:
    run = ExplainedRun(IDS, (), LOGIT_DIFF)
    asked = [
        asked_of(run),
        AskedAttribution((run,), NormMode.LIVE, BY_TOTAL, dictionaries=("mlp",)),
    ]
    with pytest.raises(ValueError, match="in common"):
        batches_of(with_dictionaries("gpt2")).attribute(asked, CancelToken())


@pytest.mark.parametrize(
    ("tokens", "padded"),
    [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (128, 128), (129, 192)],
)
def test_length_buckets(tokens: int, padded: int) -> None:
    assert length_bucket(tokens) == padded
    run = ExplainedRun((0,) * tokens, (), LogitDiff((5,), (), 0))
    assert asked_of(run).padded_tokens == padded
    pair = AskedAttribution((run, run), NormMode.LIVE, BY_TOTAL)
    assert pair.padded_tokens == 2 * padded
    assert AskedRun((0,) * tokens, (), (0,), 1).padded_tokens == padded
