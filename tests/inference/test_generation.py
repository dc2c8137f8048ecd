"""Generation over a cache is, step by step, the whole sequence run anew, whatever is edited."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.common.addresses import parse
from services.common.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.generation import Continuation, Ending, Finish, Generated
from services.inference.engine.interventions import (
    Add,
    Intervention,
    Mask,
    Mean,
    Patch,
    ProjectOut,
    Scale,
    SetTo,
    Source,
    Zero,
)
from services.inference.engine.sampling import Sampler, Sampling
from services.inference.engine.text import Vocabulary
from tests.inference import by_hand, plain
from tests.inference.helpers import HEAD_WIDTH, VOCABULARY, WIDTH, Engine, random_engine
from tests.inference.planted import random_dictionary
from tests.inference.test_random_requests import engine_of, interventions

PROMPT = (3, 17, 4, 4, 25)
NEW = 6
TOKENS = len(PROMPT) + NEW - 1
"""Tokens that are run: all but the last."""


def continued(
    engine: Engine,
    wanted: Sequence[Intervention] = (),
    sampling: Sampling = Sampling(),  # noqa: B008  # frozen
    prompt: tuple[int, ...] = PROMPT,
    ending: Ending = Ending(NEW),  # noqa: B008  # frozen
) -> tuple[Continuation, list[Generated]]:
    edits = engine.edits(*wanted, tokens=len(prompt) + ending.max_new_tokens - 1)
    continuation = Continuation(
        engine.hooks,
        Vocabulary(VOCABULARY, None),
        prompt,
        edits,
        sampling,
        ending,
        top=VOCABULARY,
    )
    steps = []
    while continuation.finish is None:
        steps.append(continuation.step(CancelToken()))
    return continuation, steps


def distribution(step: Generated) -> Tensor:
    found = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token_id, log_prob in step.top:
        found[token_id] = log_prob
    return found


def reached(wanted: Intervention, length: int) -> Intervention | None:
    """The edit at its positions in a pass over `length` tokens, None where it has none there."""
    target = wanted.target
    if target.position is not None:
        return wanted if target.position < length else None
    positions = range(TOKENS) if wanted.positions is None else wanted.positions
    here = tuple(position for position in positions if position < length)
    return replace(wanted, positions=here) if here else None


def from_scratch(model: Any, ids: Sequence[int], wanted: Sequence[Intervention]) -> Tensor:
    """Log probabilities [V] after `ids`, by a pass over all of them written by hand."""
    here = [part for each in wanted if (part := reached(each, len(ids))) is not None]
    logits = plain.forward(model, ids, by_hand.edited(model, here, len(ids)))[-1]
    return logits.double().log_softmax(-1)


def check_steps(engine: Engine, model: Any, wanted: Sequence[Intervention]) -> bool:
    """Raises unless every step is as from scratch; says whether the edits changed anything."""
    continuation, steps = continued(engine, wanted)
    ids = list(PROMPT)
    for step in steps:
        theirs = from_scratch(model, ids, wanted)
        ours = distribution(step)
        assert (ours - theirs).abs().max() < 1e-4, step.position
        assert step.token_id == int(ours.argmax())
        assert step.log_prob == float(ours[step.token_id])
        assert step.position == len(ids)
        ids.append(step.token_id)
    changed = bool((theirs - from_scratch(model, ids[:-1], ())).abs().max() > 1e-4)
    assert continuation.token_ids == tuple(ids[len(PROMPT) :])
    assert continuation.ids_read == tuple(ids[:-1])
    assert continuation.finish is Finish.LENGTH
    return changed


VECTOR = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)
HEAD_VECTOR = torch.linspace(2, -3, HEAD_WIDTH, dtype=torch.float64)
CASES: dict[str, tuple[Intervention, ...]] = {
    "none": (),
    "the prompt": (Intervention(parse("resid_mid.1~2"), Add(VECTOR)),),
    "everywhere": (Intervention(parse("resid_post.0"), Add(VECTOR)),),
    "from a position on": (Intervention(parse("neuron.1.7"), SetTo(4.0), tuple(range(3, TOKENS))),),
    "what is generated": (
        Intervention(parse("head.1.2"), Scale(-2.0), tuple(range(len(PROMPT), TOKENS))),
    ),
    "a node beyond the prompt": (Intervention(parse("mlp.0~7"), Zero()),),
    "a pair, query generated": (Intervention(parse("head.1.2~8-3"), SetTo(0.9)),),
    "a masked pair, both generated": (
        Intervention(parse("head.0.1~9-6"), Mask()),
        Intervention(parse("head.0.1~9-9"), Mask()),
    ),
    "a direction, everywhere": (Intervention(parse("resid_mid.1"), ProjectOut(VECTOR)),),
    "steered by lengths": (Intervention(parse("attn.1"), Add(VECTOR, relative=True)),),
    "a mean, everywhere": (Intervention(parse("mlp.0"), Mean((Source((5, 6)), Source((9,))))),),
    "patched in prompt and continuation": (
        Intervention(
            parse("resid_post.0"), Patch(Source((9, 8, 7)), ((1, 2), (6, 0), (7, 1))), (1, 6, 7)
        ),
    ),
    "a pair, both generated": (Intervention(parse("head.0.1~9-6"), SetTo(0.9)),),
    "a key of the prompt": (Intervention(parse("head.1.0.k~1"), SetTo(HEAD_VECTOR)),),
    "keys everywhere": (Intervention(parse("head.0.3.k"), Scale(-3.0)),),
    "values of prompt and continuation": (
        Intervention(parse("head.1.1.v"), Add(HEAD_VECTOR), (2, 6, 7)),
    ),
    "queries": (Intervention(parse("head.1.1.q"), Scale(4.0)),),
    "many": (
        Intervention(parse("embed"), Scale(1.5)),
        Intervention(parse("head.0.3.k"), Scale(-3.0)),
        Intervention(parse("head.0.3.k~6"), SetTo(HEAD_VECTOR)),
        Intervention(parse("head.0.2.v~3"), Zero()),
        Intervention(parse("head.1.2~8-3"), Add(0.9)),
        Intervention(parse("attn.2"), Scale(0.5)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_step_is_a_run_from_scratch(family: str, name: str) -> None:
    assert check_steps(*engine_of(family), CASES[name]) == (name != "none")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_edits_of_prompt_and_continuation(family: str, data: st.DataObject) -> None:
    wanted = data.draw(
        st.lists(interventions(TOKENS), min_size=1, max_size=4, unique_by=lambda i: i.target)
    )
    engine, model = engine_of(family)
    try:
        engine.edits(*wanted, tokens=TOKENS)
    except InvalidArgument:  # a row and its pair: refused, which has tests of its own
        return
    check_steps(engine, model, wanted)


def check_uncached(engine: Engine, wanted: Sequence[Intervention]) -> Continuation:
    """Raises unless every step is what our own pass over the whole sequence says."""
    edits = engine.hooks.fill(engine.edits(*wanted, tokens=TOKENS), CancelToken())
    continuation, steps = continued(engine, wanted)
    ids = list(PROMPT)
    for step in steps:
        here = [
            edit.only([position for position in edit.positions if position < len(ids)])
            for edit in edits
            if edit.positions[0] < len(ids)
        ]
        run = engine.hooks.run([Row(tuple(ids), tuple(here))], [len(ids) - 1], gradients=False)
        uncached = run.logits[0, 0].double().log_softmax(-1)
        assert (distribution(step) - uncached).abs().max() < 1e-4
        ids.append(step.token_id)
    _, clean = continued(engine)
    assert (distribution(steps[0]) - distribution(clean[0])).abs().max() > 1e-3
    return continuation


def test_values_of_other_runs_in_prompt_and_continuation() -> None:
    engine = random_engine("llama")
    source = Source((9, 8, 7, 6), (Intervention(parse("mlp.0"), Zero()),))
    wanted = [
        Intervention(parse("neuron.1.7"), Mean((source, Source((1, 2))))),
        Intervention(parse("attn.1"), Patch(source, ((1, 3), (7, 0), (8, 2))), (1, 7, 8)),
        Intervention(parse("head.0.3.k~6"), Patch(source, ((6, 1),))),
    ]
    check_uncached(engine, wanted)


@pytest.mark.parametrize("point", [Point.Z, Point.MLP_OUT, Point.RESID_POST])
def test_latents_of_prompt_and_continuation(point: Point) -> None:
    engine = random_engine("llama", dictionaries=[random_dictionary("D", point, 1)])
    wanted = [
        Intervention(parse("latent.D.3"), SetTo(2.0)),
        Intervention(parse("latent.D.7~8"), SetTo(-4.0)),
        Intervention(parse("error.D"), Scale(0.3), (2, 6)),
    ]
    continuation = check_uncached(engine, wanted)
    assert [receipt.sites for receipt in continuation.receipts] == [TOKENS, 1, 2]
    assert continuation.receipts[1].positions == (8,)


def test_an_edit_applied_in_its_own_step_only_would_be_noticed() -> None:
    """What forgetting the edits of cached keys would give differs from the run from scratch."""
    engine, model = engine_of("llama")
    _, steps = continued(engine, CASES["a key of the prompt"])
    ids = [*PROMPT, steps[0].token_id]
    forgotten = from_scratch(model, ids, ())
    assert (distribution(steps[1]) - forgotten).abs().max() > 1e-3


def test_receipts_count_every_site_once_over_all_steps() -> None:
    engine = random_engine("llama")
    wanted = [
        Intervention(parse("neuron.1.7"), SetTo(4.0)),
        Intervention(parse("head.0.3.k"), Scale(-3.0)),
        Intervention(parse("head.1.2~8-3"), SetTo(0.9)),
        Intervention(parse("mlp.0~2"), Zero()),
    ]
    continuation, _ = continued(engine, wanted)
    row = Row(continuation.ids_read, engine.edits(*wanted, tokens=TOKENS))
    whole = engine.hooks.run([row], [0], gradients=False).receipts(0)
    for ours, theirs in zip(continuation.receipts, whole, strict=True):
        assert (ours.target, ours.sites, ours.positions, ours.applied) == (
            theirs.target,
            theirs.sites,
            theirs.positions,
            theirs.applied,
        )
        assert ours.delta_norm == pytest.approx(theirs.delta_norm, rel=1e-4)
        assert (ours.before is None) == (theirs.before is None)
        assert ours.before is None or ours.before == pytest.approx(theirs.before, rel=1e-4)
        assert ours.after == theirs.after


def test_a_stop_token_ends_it_and_later_edits_were_never_applied() -> None:
    engine = random_engine("gpt2")
    _, free = continued(engine)
    stop = free[2].token_id
    assert stop not in [step.token_id for step in free[:2]]
    wanted = [Intervention(parse(f"mlp.0~{TOKENS - 1}"), Zero())]
    continuation, steps = continued(engine, wanted, ending=Ending(NEW, stop_tokens=(stop,)))
    assert continuation.finish is Finish.STOP_TOKEN
    assert [step.token_id for step in steps] == [step.token_id for step in free[:3]]
    (receipt,) = continuation.receipts
    assert (receipt.sites, receipt.applied, receipt.positions) == (0, 0, ())


def test_a_seed_repeats_and_the_whole_vocabulary_is_reached() -> None:
    engine = random_engine("gpt2")
    hot = Sampling(temperature=30.0, seed=11)
    first, _ = continued(engine, sampling=hot)
    second, _ = continued(engine, sampling=hot)
    assert first.token_ids == second.token_ids
    others = {
        continued(engine, sampling=Sampling(temperature=30.0, seed=seed))[0].token_ids
        for seed in range(3)
    }
    assert len(others) == 3


def test_a_steps_overflow_and_cancelling_end_it() -> None:
    engine = random_engine("gpt2")
    with pytest.raises(FailedPrecondition) as refusal:
        continued(engine, [Intervention(parse("neuron.0.7~7"), SetTo(1e38))])
    assert refusal.value.reason == "NON_FINITE"
    token = CancelToken()
    token.cancel()
    continuation = Continuation(
        engine.hooks, Vocabulary(VOCABULARY, None), PROMPT, (), Sampling(), Ending(3)
    )
    continuation.step(CancelToken())
    with pytest.raises(Cancelled):
        continuation.step(token)


def frequencies(sampling: Sampling, logits: Tensor, draws: int = 1500) -> Tensor:
    sampler = Sampler(sampling)
    counts = torch.zeros(len(logits), dtype=torch.float64)
    for _ in range(draws):
        counts[sampler.choose(logits)] += 1
    return counts / draws


LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 2.0], dtype=torch.float64)


def test_sampling_follows_the_probabilities() -> None:
    for temperature in (0.5, 1.0, 3.0):
        found = frequencies(Sampling(temperature, seed=3), LOGITS)
        expected = (LOGITS / temperature).softmax(-1)
        assert (found - expected).abs().max() < 0.05


def test_top_k_and_top_p_cut_as_they_say() -> None:
    by_hand = torch.zeros(5, dtype=torch.float64)
    by_hand[[1, 3, 4]] = LOGITS[[1, 3, 4]].softmax(-1)
    assert (frequencies(Sampling(1.0, top_k=3), LOGITS) - by_hand).abs().max() < 0.05
    # 1 and 4 have 0.36 each, 3 has 0.13, 0 has 0.08: of four, 0.72 are reached by two.
    probabilities = LOGITS.softmax(-1)
    two = float(probabilities[1] + probabilities[4])
    for top_p, kept in ((two - 0.01, [1, 4]), (two + 0.01, [1, 4, 3]), (0.01, [1]), (1.0, None)):
        found = frequencies(Sampling(1.0, top_p=top_p), LOGITS, 1000)
        reached = found.nonzero()[:, 0].tolist()
        assert reached == (sorted(kept) if kept else list(range(5)))
    # top-p is of what top-k leaves: of two equals, half is reached by the first alone.
    assert frequencies(Sampling(1.0, top_k=2, top_p=0.5), LOGITS, 200)[1] == 1.0


def test_equals_go_to_the_lowest_id_and_tiny_temperatures_are_greedy() -> None:
    assert Sampler(Sampling()).choose(LOGITS) == 1
    assert frequencies(Sampling(1e-300, seed=5), LOGITS, 200)[[1, 4]].sum() == 1.0
    assert Sampler(Sampling(1e-300)).choose(torch.tensor([0.0, 1e30, -1e30]).double()) == 1
