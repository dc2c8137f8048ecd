"""A node's own value as the objective, against a pass written by hand, in float64.

By hand is `plain.forward`: another implementation, whose scales are held by dividing by a constant
and whose gradients are PyTorch's own. It shares neither formulas nor hooks with the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.objectives import Along, LogitDiff, LogProb, Objective
from services.inference.engine.run_view import RunView
from services.inference.engine.tracing import (
    Branch,
    Side,
    TracedNeuron,
    TracedScore,
    TracedValue,
)
from tests.inference import plain
from tests.inference.helpers import (
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    WIDTH,
    Engine,
    direct_sums,
    explained,
    in_float64,
    matrices,
    random_engine,
    random_model,
)
from tests.inference.test_attribution import EDITED

__all__ = ["in_float64"]

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
STEP = 1e-5
Seen = dict[tuple[str, int | None], Tensor]
ByHand = Callable[[Seen, Seen], Tensor]
"""J from what a pass shows at each site, and what it holds constant from the clean pass."""

LAYER, HEAD, QUERY, KEY = 1, 2, 6, 3
PAIR = parse("head.1.2~6-3")
ROOT = HEAD_WIDTH**0.5


def hand(
    model: Any,
    site: plain.Site = plain.untouched,
    held: plain.Scales | None = None,
    scales: plain.Scales | None = None,
) -> Seen:
    """What every site shows; gradients lead from all of it to the embedding."""
    seen: Seen = {}

    def watch(kind: str, layer: int | None, values: Tensor) -> Tensor:
        values = site(kind, layer, values)
        if kind == "embed":
            values = values.detach().requires_grad_()
        seen[kind, layer] = values
        return values

    seen["logits", None] = plain.forward(model, IDS, watch, held, scales)
    return seen


@dataclass(frozen=True)
class Trace:
    """An objective, and what a reader of SEMANTICS 6 would write down for it."""

    objective: Objective
    by_hand: ByHand
    point: tuple[str, int | None]
    reading: tuple[str, ...]
    linear: bool = True


def score(seen: Seen, clean: Seen, live: Side, *, after: bool = False) -> Tensor:
    query = (clean if live is Side.KEY else seen)["q", LAYER][HEAD, QUERY]
    keys = (clean if live is Side.QUERY else seen)["k", LAYER][HEAD, : QUERY + 1]
    scores = keys @ query / ROOT
    read: Tensor = scores.softmax(0) if after else scores
    return read[KEY]


def score_by_hand(live: Side, *, after: bool = False) -> ByHand:
    return lambda seen, clean: score(seen, clean, live, after=after)


def difference(logits: Tensor) -> Tensor:
    return logits[5] - logits[[9, 11]].mean()


DOWNSTREAM: dict[str, Trace] = {
    "logits": Trace(
        LogitDiff((5,), (9, 11), QUERY),
        lambda seen, _: (
            seen["logits", None][QUERY, 5] - seen["logits", None][QUERY, [9, 11]].mean()
        ),
        ("resid_post", LAYERS - 1),
        ("final",),
    ),
    "log probability": Trace(
        LogProb((5,), QUERY),
        lambda seen, _: seen["logits", None][QUERY].log_softmax(-1)[5],
        ("resid_post", LAYERS - 1),
        ("final",),
    ),
    "a neuron of the same layer": Trace(
        TracedNeuron(parse("neuron.1.9~6"), Branch.GATE),
        lambda seen, _: seen["gate", 1][6, 9],
        ("resid_mid", 1),
        ("mlp.1",),
    ),
    "a neuron's activation": Trace(
        TracedNeuron(parse("neuron.2.9~6"), None),
        lambda seen, _: seen["neurons", 2][6, 9],
        ("resid_mid", 2),
        ("mlp.2",),
    ),
    "a later key": Trace(
        TracedScore(parse("head.2.0~7-6"), Side.KEY),
        lambda seen, clean: clean["q", 2][0, 7] @ seen["k", 2][0, 6] / ROOT,
        ("resid_post", 1),
        ("attn.2",),
    ),
    "a later score": Trace(
        TracedScore(parse("head.2.0~6-1"), Side.BOTH),
        lambda seen, _: seen["q", 2][0, 6] @ seen["k", 2][0, 1] / ROOT,
        ("resid_post", 1),
        ("attn.2",),
    ),
}

TRACES: dict[str, Trace] = {
    "neuron": Trace(
        TracedNeuron(parse("neuron.1.7~5"), Branch.GATE),
        lambda seen, _: seen["gate", 1][5, 7],
        ("resid_mid", 1),
        ("mlp.1",),
    ),
    "neuron of the first layer": Trace(
        TracedNeuron(parse("neuron.0.7~5"), Branch.GATE),
        lambda seen, _: seen["gate", 0][5, 7],
        ("resid_mid", 0),
        ("mlp.0",),
    ),
    "neuron's activation": Trace(
        TracedNeuron(parse("neuron.2.7~5"), None),
        lambda seen, _: seen["neurons", 2][5, 7],
        ("resid_mid", 2),
        ("mlp.2",),
        linear=False,
    ),
    "neuron, up": Trace(
        TracedNeuron(parse("neuron.1.7~5"), Branch.UP),
        lambda seen, _: seen["up", 1][5, 7],
        ("resid_mid", 1),
        ("mlp.1",),
    ),
    "query": Trace(
        TracedScore(PAIR, Side.QUERY), score_by_hand(Side.QUERY), ("resid_post", 0), ("attn.1",)
    ),
    "key": Trace(
        TracedScore(PAIR, Side.KEY), score_by_hand(Side.KEY), ("resid_post", 0), ("attn.1",)
    ),
    "both": Trace(
        TracedScore(PAIR, Side.BOTH),
        score_by_hand(Side.BOTH),
        ("resid_post", 0),
        ("attn.1",),
        linear=False,
    ),
    "probability, query": Trace(
        TracedScore(PAIR, Side.QUERY, post=True),
        score_by_hand(Side.QUERY, after=True),
        ("resid_post", 0),
        ("attn.1",),
        linear=False,
    ),
    "probability, key": Trace(
        TracedScore(PAIR, Side.KEY, post=True),
        score_by_hand(Side.KEY, after=True),
        ("resid_post", 0),
        ("attn.1",),
        linear=False,
    ),
    "probability, both": Trace(
        TracedScore(PAIR, Side.BOTH, post=True),
        score_by_hand(Side.BOTH, after=True),
        ("resid_post", 0),
        ("attn.1",),
        linear=False,
    ),
    "score of the first layer": Trace(
        TracedScore(parse("head.0.1~4-4"), Side.QUERY),
        lambda seen, clean: seen["q", 0][1, 4] @ clean["k", 0][1, 4] / ROOT,
        ("embed", None),
        ("attn.0",),
    ),
    "along the middle": Trace(
        Along(parse("resid_mid.1"), torch.linspace(-1, 2, WIDTH).double(), 4),
        lambda seen, _: seen["resid_mid", 1][4] @ torch.linspace(-1, 2, WIDTH).double(),
        ("resid_mid", 1),
        (),
    ),
    "along the embedding": Trace(
        Along(parse("embed"), torch.linspace(-1, 2, WIDTH).double(), 4),
        lambda seen, _: seen["embed", None][4] @ torch.linspace(-1, 2, WIDTH).double(),
        ("embed", None),
        (),
    ),
}
VALUES = {f"value on {name}": TracedValue(PAIR, d.objective) for name, d in DOWNSTREAM.items()}
NAMES = [*TRACES, *VALUES]
FAMILIES = ("gpt2", "llama", "llama-tied")


def held_scales(scales: plain.Scales, reading: tuple[str, ...], mode: NormMode) -> plain.Scales:
    match mode:
        case NormMode.LIVE:
            return {}
        case NormMode.FINAL_NORM_FROZEN:
            return {name: scales[name] for name in reading}
        case NormMode.ALL_NORMS_FROZEN:
            return scales


def w_o(model: Any, layer: int) -> Tensor:
    """[H, dh, d]"""
    gpt2 = model.config.model_type == "gpt2"
    weight: Tensor = (
        model.transformer.h[layer].attn.c_proj.weight
        if gpt2
        else model.model.layers[layer].self_attn.o_proj.weight.T
    )
    return weight.view(HEADS, HEAD_WIDTH, WIDTH)


def w_out(model: Any, layer: int) -> Tensor:
    """[F, d]"""
    gpt2 = model.config.model_type == "gpt2"
    found: Tensor = (
        model.transformer.h[layer].mlp.c_proj.weight
        if gpt2
        else model.model.layers[layer].mlp.down_proj.weight.T
    )
    return found


def trace_of(name: str, model: Any, mode: NormMode) -> Trace:
    """A trace through a value needs the gradient of its downstream objective first."""
    if name in TRACES:
        return TRACES[name]
    downstream = DOWNSTREAM[name.removeprefix("value on ")]
    scales: plain.Scales = {}
    clean = hand(model, scales=scales)
    seen = hand(model, held=held_scales(scales, downstream.reading, mode))
    (gradient,) = torch.autograd.grad(
        downstream.by_hand(seen, detached(clean)), seen[downstream.point]
    )
    write = w_o(model, LAYER)[HEAD] @ gradient[QUERY]

    def by_hand(seen: Seen, clean: Seen) -> Tensor:
        return clean["probabilities", LAYER][HEAD, QUERY, KEY] * (
            seen["v", LAYER][HEAD, KEY] @ write
        )

    return Trace(VALUES[name], by_hand, ("resid_post", LAYER - 1), ("attn.1",))


def detached(seen: Seen) -> Seen:
    return {place: values.detach() for place, values in seen.items()}


@cache
def model_of(family: str) -> Any:
    return random_model(family, torch.float64)


@cache
def engine_of(family: str, dtype: torch.dtype = torch.float64) -> Engine:
    return random_engine(family, dtype)


def names_of(family: str) -> list[str]:
    """GPT-2's MLP is not gated."""
    return [name for name in NAMES if not (name == "neuron, up" and family == "gpt2")]


def gradients_by_hand(
    value: Tensor, seen: Seen, places: list[tuple[str, int | None]]
) -> list[Tensor]:
    return list(
        torch.autograd.grad(value, [seen[place] for place in places], materialize_grads=True)
    )


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("mode", NormMode)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_column_is_what_the_pass_by_hand_gives(family: str, mode: NormMode) -> None:
    model = model_of(family)
    traces = [trace_of(name, model, mode) for name in names_of(family)]
    explanations = engine_of(family).explain(
        *(explained(IDS, objective=trace.objective) for trace in traces), norm_mode=mode
    )
    scales: plain.Scales = {}
    clean = detached(hand(model, scales=scales))
    for name, trace, explanation in zip(names_of(family), traces, explanations, strict=True):
        seen = hand(model, held=held_scales(scales, trace.reading, mode))
        value = trace.by_hand(seen, clean)
        assert explanation.value == pytest.approx(float(value.detach()), rel=1e-6, abs=1e-9), name
        places: list[tuple[str, int | None]] = [("embed", None)]
        places += [("probabilities", layer) for layer in range(LAYERS)]
        places += [("neurons", layer) for layer in range(LAYERS)]
        total = matrices(explanation, Column.TOTAL_EFFECT)
        reference, *gradients = gradients_by_hand(value, seen, [trace.point, *places])
        for place, ours, gradient in zip(places, total, gradients, strict=True):
            theirs = (seen[place] * gradient).detach()
            if name.startswith("probability") and place == ("probabilities", LAYER):
                theirs[HEAD, QUERY, KEY] += value.detach()  # J is this very value
            assert close(ours, theirs.sum(-1) if place[0] == "embed" else theirs), (name, place)
        outside = [t for t in range(len(IDS)) if t not in trace.objective.reads]
        assert not reference[outside].any(), name
        check_direct_effects(name, trace, explanation, model, seen, reference)


def check_direct_effects(
    name: str, trace: Trace, explanation: Explanation, model: Any, seen: Seen, reference: Tensor
) -> None:
    """Writes times g*, and exactly 0 where a write is no part of x_ref."""
    direct = matrices(explanation, Column.DIRECT_EFFECT)
    assert close(direct[0], (seen["embed", None] * reference).sum(-1).detach()), name
    kind, last = trace.point
    last = -1 if last is None else last
    for layer in range(LAYERS):
        heads, neurons = direct[1 + layer], direct[1 + LAYERS + layer]
        if layer > last:
            assert not heads.any(), (name, layer)
        else:
            met = torch.einsum("hed,qd->hqe", w_o(model, layer), reference)
            writes = torch.einsum("hqe,hke->hqk", met, seen["v", layer])
            writes = (seen["probabilities", layer] * writes).detach()
            assert close(heads, writes), (name, layer)
        if layer > last or (layer == last and kind == "resid_mid"):
            assert not neurons.any(), (name, layer)
        else:
            met = reference @ w_out(model, layer).T
            assert close(neurons, (seen["neurons", layer] * met).detach()), (name, layer)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max() + 1e-12)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_gradient_at_the_embedding_is_a_finite_difference(family: str) -> None:
    """Of a pass with just the reading norm's scale held, and what the trace holds constant."""
    model = model_of(family)
    mode = NormMode.FINAL_NORM_FROZEN
    traces = [trace_of(name, model, mode) for name in names_of(family)]
    explanations = engine_of(family).explain(
        *(explained(IDS, objective=trace.objective) for trace in traces), norm_mode=mode
    )
    scales: plain.Scales = {}
    clean = detached(hand(model, scales=scales))
    for name, trace, explanation in zip(names_of(family), traces, explanations, strict=True):
        held = held_scales(scales, trace.reading, mode)
        for token in (0, 5):
            values = []
            for step in (STEP, -STEP):
                factor = torch.tensor(1 + step, dtype=torch.float64)
                site = plain.edited(("embed", None, (token,), partial(torch.mul, factor)))
                values.append(float(trace.by_hand(detached(hand(model, site, held)), clean)))
            slope = (values[0] - values[1]) / (2 * STEP)
            ours = float(matrices(explanation, Column.TOTAL_EFFECT)[0][token])
            assert ours == pytest.approx(slope, rel=1e-5, abs=1e-8), (name, token)


LINEAR = [name for name, trace in TRACES.items() if trace.linear] + list(VALUES)


def sums_close(explanation: Explanation) -> float:
    """Asserts equality 1 of SEMANTICS 5; returns the size of the column."""
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size
    return size


FEW = ["plain", "steered", "queries, keys and values"]


@pytest.mark.parametrize("mode", NormMode)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sums_close_and_rest_is_zero_where_theory_says(family: str, mode: NormMode) -> None:
    engine = engine_of(family, torch.float32)
    names = names_of(family)
    objectives = [TRACES[name].objective if name in TRACES else VALUES[name] for name in names]
    whole = family == "gpt2" and mode is NormMode.FINAL_NORM_FROZEN
    for edits in EDITED if whole else FEW:
        wanted = EDITED[edits]
        applied = engine.edits(*wanted, tokens=len(IDS))
        runs = [explained(IDS, *applied, objective=objective) for objective in objectives]
        for name, explanation in zip(names, engine.explain(*runs, norm_mode=mode), strict=True):
            size = sums_close(explanation)
            rest = explanation.remainder["rest"]
            if name == "both" and mode is not NormMode.LIVE:
                assert rest == pytest.approx(-explanation.value, abs=1e-5 * size), edits
            elif name.startswith("along") or (name in LINEAR and mode is not NormMode.LIVE):
                assert abs(rest) <= 1e-5 * size, (name, edits)


@pytest.mark.parametrize("name", ["both", "probability, query", "neuron's activation"])
def test_rest_is_not_zero_elsewhere(name: str) -> None:
    (explanation,) = engine_of("gpt2", torch.float32).explain(
        explained(IDS, objective=TRACES[name].objective)
    )
    assert abs(explanation.remainder["rest"]) > 1e-3 * sums_close(explanation)


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_what_is_constant_between_reference_and_value_is_a_row(family: str) -> None:
    """Without `bias.read`, and without the row of an edited query, the sum does not close."""
    engine = engine_of(family, torch.float32)
    edits = engine.edits(*QUERY_EDITS, tokens=len(IDS))
    trace = TRACES["query"].objective
    (explanation,) = engine.explain(explained(IDS, *edits, objective=trace))
    size = sums_close(explanation)
    assert abs(explanation.remainder["rest"]) <= 1e-5 * size
    for row in ("bias.read", "edit.head.1.2.q~6"):
        assert abs(explanation.remainder[row]) > 1e-3 * size


HEAD_VECTOR = torch.linspace(1, -2, HEAD_WIDTH, dtype=torch.float64)
QUERY_EDITS = [
    Intervention(parse("head.1.2.q~6"), Add(HEAD_VECTOR)),
    Intervention(parse("head.1.2.q~6"), Scale(0.5)),
    Intervention(parse("head.1.1.q~6"), Scale(3.0)),
]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_are_of_the_run_as_it_is(family: str) -> None:
    """Interventions apply, those of the node's own block and of the node itself included."""
    model = model_of(family)
    engine = engine_of(family)
    edits = engine.edits(
        Intervention(parse("neuron.0.3~2"), SetTo(2.0)),
        Intervention(parse("resid_post.0~6"), Scale(1.5)),
        Intervention(parse("head.1.2.k~3"), Scale(-2.0)),
        Intervention(parse("head.1.0~5"), Zero()),
        Intervention(parse("neuron.2.7~5"), SetTo(0.75)),
        tokens=len(IDS),
    )
    site = plain.edited(
        ("neurons", 0, (2, 3), lambda x: torch.full_like(x, 2.0)),
        ("resid_post", 0, (6,), lambda x: 1.5 * x),
        ("k", 1, (2, 3), lambda x: -2.0 * x),
        ("probabilities", 1, (0, 5), torch.zeros_like),
        ("neurons", 2, (5, 7), lambda x: torch.full_like(x, 0.75)),
    )
    clean = detached(hand(model, site))
    for name, trace in TRACES.items():
        if name == "neuron, up" and family == "gpt2":
            continue
        (explanation,) = engine.explain(explained(IDS, *edits, objective=trace.objective))
        expected = float(trace.by_hand(clean, clean))
        assert explanation.value == pytest.approx(expected, rel=1e-6), name
    (edited,) = engine.explain(
        explained(IDS, *edits, objective=TRACES["neuron's activation"].objective)
    )
    assert edited.value == 0.75
    total = matrices(edited, Column.TOTAL_EFFECT)
    assert float(total[2 * LAYERS][5, 7]) == 0.75  # itself
    assert not any(column.any() for column in total[: 2 * LAYERS])


@pytest.mark.parametrize("post", [False, True])
def test_an_edited_pair_has_the_value_it_is_listed_with(post: bool) -> None:
    engine = engine_of("gpt2", torch.float32)
    (clean,) = engine.explain(explained(IDS))
    probability = float(matrices(clean, Column.ACTIVATION)[2][2, 6, 3])
    for wanted, value in (
        (Intervention(PAIR, SetTo(0.75)), 0.75),
        (Intervention(PAIR, Scale(2.0)), 2 * probability),
        (Intervention(parse("head.1.2"), Zero()), 0.0),
        (Intervention(parse("head.1.2~6"), Scale(3.0)), probability),
    ):
        edits = engine.edits(wanted, tokens=len(IDS))
        (explanation,) = engine.explain(
            explained(IDS, *edits, objective=TracedScore(PAIR, Side.BOTH, post=post))
        )
        listed = float(matrices(explanation, Column.ACTIVATION)[2][2, 6, 3])
        assert listed == pytest.approx(value)
        assert (explanation.value == pytest.approx(value)) is post
        itself = float(matrices(explanation, Column.TOTAL_EFFECT)[2][2, 6, 3])
        assert itself == (pytest.approx(value) if post else 0)


@pytest.mark.parametrize("edits", EDITED)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_value_is_the_pairs_direct_effect_on_its_downstream(family: str, edits: str) -> None:
    engine = engine_of(family, torch.float32)
    applied = engine.edits(*EDITED[edits], tokens=len(IDS))
    objectives = [trace.objective for trace in DOWNSTREAM.values()]
    objectives += [TracedValue(PAIR, each) for each in objectives]
    runs = [explained(IDS, *applied, objective=each) for each in objectives]
    found = engine.explain(*runs)
    for name, table, traced in zip(DOWNSTREAM, found, found[len(DOWNSTREAM) :], strict=False):
        direct = matrices(table, Column.DIRECT_EFFECT)[1 + LAYER]
        expected = float(direct[HEAD, QUERY, KEY])
        error = 1e-5 * float(direct.abs().max())
        assert traced.value == pytest.approx(expected, rel=1e-4, abs=error), name


@pytest.mark.usefixtures("in_float64")
def test_the_write_meets_what_edits_make_of_the_downstream_gradient() -> None:
    model = model_of("gpt2")
    engine = engine_of("gpt2")
    edits = engine.edits(
        Intervention(parse("attn.1~6"), Scale(-2.0)),
        Intervention(parse("resid_post.1~6"), Scale(0.5)),
        Intervention(parse("head.1.2~6"), Scale(3.0)),
        tokens=len(IDS),
    )
    site = plain.edited(
        ("attn", 1, (6,), lambda x: -2.0 * x),
        ("resid_post", 1, (6,), lambda x: 0.5 * x),
        ("z", 1, (6, 2), lambda x: 3.0 * x),
    )
    scales: plain.Scales = {}
    hand(model, site, scales=scales)
    seen = hand(model, site, {"final": scales["final"]})
    trace = DOWNSTREAM["logits"]
    (gradient,) = torch.autograd.grad(trace.by_hand(seen, seen), seen[trace.point])
    write = seen["v", 1][2, 3] @ w_o(model, 1)[2] * seen["probabilities", 1][2, 6, 3]
    (explanation,) = engine.explain(
        explained(IDS, *edits, objective=TracedValue(PAIR, trace.objective))
    )
    expected = float((write @ gradient[6]).detach()) * -2.0 * 0.5 * 3.0
    assert explanation.value == pytest.approx(expected, rel=1e-9)


UNREACHED: dict[str, tuple[Objective, str]] = {
    "a score of the same layer": (TracedScore(parse("head.1.0~6-2"), Side.BOTH), "is no part of"),
    "an earlier neuron": (TracedNeuron(parse("neuron.0.3~6"), Branch.GATE), "is no part of"),
    "the embedding": (Along(parse("embed"), torch.ones(WIDTH).double(), 6), "is no part of"),
    "another token": (LogitDiff((5,), (), 7), "does not read token 6"),
    "a key elsewhere": (TracedScore(parse("head.2.0~6-1"), Side.KEY), "does not read token 6"),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_a_downstream_that_the_write_does_not_reach_is_said(name: str) -> None:
    downstream, reason = UNREACHED[name]
    engine = engine_of("gpt2", torch.float32)
    runs = [
        explained(IDS, objective=TracedValue(PAIR, downstream)),
        explained(IDS, objective=TRACES["query"].objective),
    ]
    for alone in (runs[:1], runs):
        explanation = engine.explain(*alone)[0]
        assert explanation.value == 0
        assert all(value == 0 for value in explanation.remainder.values())
        for column in (Column.DIRECT_EFFECT, Column.TOTAL_EFFECT):
            assert not any(part.any() for part in matrices(explanation, column))
        (notice,) = explanation.notices
        assert reason in notice
        assert "head.1.2~6-3" in notice


@pytest.mark.usefixtures("in_float64")
def test_another_formula_fails() -> None:
    """Negative controls: a live key, another downstream, a scale that is not held."""
    model = model_of("gpt2")
    engine = engine_of("gpt2")
    scales: plain.Scales = {}
    clean = detached(hand(model, scales=scales))

    def total(objective: Objective) -> Tensor:
        (explanation,) = engine.explain(explained(IDS, objective=objective))
        return matrices(explanation, Column.TOTAL_EFFECT)[0]

    def by_hand(formula: ByHand, held: plain.Scales) -> Tensor:
        seen = hand(model, held=held)
        (gradient,) = torch.autograd.grad(formula(seen, clean), seen["embed", None])
        return (seen["embed", None] * gradient).sum(-1).detach()

    held = {"attn.1": scales["attn.1"]}
    query = total(TRACES["query"].objective)
    assert close(query, by_hand(score_by_hand(Side.QUERY), held))
    assert not close(query, by_hand(score_by_hand(Side.BOTH), held))
    assert not close(query, by_hand(score_by_hand(Side.QUERY), {}))
    assert not close(query, by_hand(score_by_hand(Side.QUERY), scales))
    value = total(VALUES["value on logits"])
    for name in DOWNSTREAM:
        trace = trace_of(f"value on {name}", model, NormMode.FINAL_NORM_FROZEN)
        assert close(value, by_hand(trace.by_hand, held)) is (name == "logits")


def test_traces_norm_modes_and_plain_objectives_share_a_batch() -> None:
    engine = engine_of("llama", torch.float32)
    runs = [
        explained(IDS, objective=TRACES["both"].objective),
        explained(IDS[:5], objective=LogProb((2, 3), 3)),
        explained(IDS, objective=VALUES["value on a later key"]),
        explained(IDS, objective=TRACES["along the middle"].objective),
    ]
    together = engine.explain(*runs)
    for run, batched in zip(runs, together, strict=True):
        (alone,) = engine.explain(run)
        assert batched.value == pytest.approx(alone.value, rel=1e-5)
        for column in Column:
            for ours, theirs in zip(
                matrices(batched, column), matrices(alone, column), strict=True
            ):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert together[0].logits.shape == together[1].logits.shape


def test_the_logits_shown_are_those_of_the_nodes_token() -> None:
    logits = plain.forward(random_model(), IDS)
    (explanation,) = engine_of("gpt2", torch.float32).explain(
        explained(IDS, objective=TRACES["query"].objective)
    )
    assert torch.allclose(explanation.logits, logits[QUERY], atol=1e-4)


@pytest.mark.usefixtures("in_float64")
def test_what_is_held_is_of_the_run_it_was_taken_from() -> None:
    """As Verify values an objective: in other runs, with its constants from the first."""
    model = model_of("llama")
    engine = engine_of("llama")
    change = Intervention(parse("resid_post.0~3"), Scale(-1.0))
    site = plain.edited(("resid_post", 0, (3,), torch.neg))
    clean, changed = detached(hand(model)), detached(hand(model, site))
    for name in ("query", "key", "both", "probability, query", "probability, key"):
        trace = TRACES[name]
        bound = trace.objective.hold(view(engine))
        ours = float(bound.value(view(engine, change)).detach())
        assert ours == pytest.approx(float(trace.by_hand(changed, clean)), rel=1e-9), name
    trace = trace_of("value on a later key", model, NormMode.LIVE)
    bound = trace.objective.hold(view(engine))
    ours = float(bound.value(view(engine, change)).detach())
    assert ours == pytest.approx(float(trace.by_hand(changed, clean)), rel=1e-9)


def view(engine: Engine, *wanted: Intervention) -> RunView:
    row = Row(IDS, engine.edits(*wanted, tokens=len(IDS)))
    return RunView(engine.architecture, engine.hooks.run([row], [QUERY], gradients=True), 0)
