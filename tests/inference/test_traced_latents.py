"""A latent's own value as the objective, against a pass written by hand, in float64.

By hand is `plain.forward`; the encoder is written out below. Gradients are PyTorch's own. Other
families, with Hugging Face's own pass, are in `families/test_family_latent_traces.py`.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine import whole_verification
from services.inference.engine.attribution import NormMode
from services.inference.engine.bound import Place
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.dictionary import (
    Dictionary,
    Gated,
    InputNorm,
    NormKind,
)
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.estimates import estimate
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.traced_latents import TracedLatent
from services.inference.engine.tracing import TracedValue
from services.inference.engine.verification import Ablation
from tests.inference import plain
from tests.inference.helpers import (
    LAYERS,
    WIDTH,
    Engine,
    explained,
    in_float64,
    matrices,
    random_engine,
    random_model,
)
from tests.inference.planted import ACTIVATIONS, ByHand, random_dictionary
from tests.inference.test_latents import nodes_of
from tests.inference.test_tracing import (
    IDS,
    STEP,
    Seen,
    Trace,
    check_direct_effects,
    close,
    detached,
    gradients_by_hand,
    hand,
    held_scales,
    sums_close,
)

__all__ = ["in_float64"]

DOUBLE = torch.float64
LAYER, TOKEN, LATENT = 1, 6, 5
VECTOR = torch.linspace(-1, 2, WIDTH, dtype=DOUBLE)
LAYER_NORM = InputNorm(NormKind.LAYER_NORM)


@dataclass(frozen=True)
class Where:
    """A place of dictionaries, and what a reader of SEMANTICS 4 would write down for it."""

    point: Point
    shown: str
    """The site of a pass by hand that they read."""
    reference: tuple[str, int | None]
    reading: tuple[str, ...]
    transcoder: bool = False
    linear: bool = False

    def dictionary(
        self,
        activation: str = "relu",
        norm: InputNorm = LAYER_NORM,
        dtype: torch.dtype = DOUBLE,
        layer: int = LAYER,
    ) -> Dictionary:
        reads = Point.MLP_IN if self.transcoder else None
        return random_dictionary(
            "D", self.point, layer, activation, norm, reads=reads, skip=self.transcoder, dtype=dtype
        )

    def read(self, seen: Seen) -> Tensor:
        """[T, d_in]"""
        layer = LAYER - 1 if self.point is Point.RESID_PRE else LAYER
        return seen[self.shown, layer].flatten(1)


_ATTENTION = (("resid_post", 0), ("attn.1",))
_MLP = (("resid_mid", 1), ("mlp.1",))
PLACES = {
    "z": Where(Point.Z, "z", *_ATTENTION),
    "attn_out": Where(Point.ATTN_OUT, "attn", *_ATTENTION),
    "mlp_act": Where(Point.MLP_ACT, "neurons", *_MLP),
    "mlp_out": Where(Point.MLP_OUT, "mlp", *_MLP),
    "transcoder": Where(Point.MLP_OUT, "mlp_in", *_MLP, transcoder=True, linear=True),
    "resid_pre": Where(Point.RESID_PRE, "resid_post", ("resid_post", 0), (), linear=True),
    "resid_mid": Where(Point.RESID_MID, "resid_mid", ("resid_mid", 1), (), linear=True),
    "resid_post": Where(Point.RESID_POST, "resid_post", ("resid_post", 1), (), linear=True),
}
OF_ATTENTION = ("z", "attn_out")


@cache
def model_of(family: str) -> Any:
    return random_model(family, DOUBLE)


def traced(
    engine: Engine, token: int = TOKEN, latent: int = LATENT, *, post: bool = False
) -> TracedLatent:
    node = Address(Kind.LATENT, index=latent, dictionary="D", position=token)
    place = Place(engine.hooks.shelf.served["D"].header, engine.architecture)
    return TracedLatent(node, place, post)


def norm_scale(dictionary: Dictionary, x: Tensor) -> Tensor:
    """[..., 1]: what norm_in divides by."""
    match dictionary.norm.kind:
        case NormKind.LAYER_NORM:
            return x.std(-1, keepdim=True) + dictionary.norm.eps
        case NormKind.CONSTANT_NORM:
            return x.square().mean(-1, keepdim=True).sqrt()
        case NormKind.FACTOR:
            return torch.full_like(x[..., :1], 1 / dictionary.norm.factor)
    return torch.ones_like(x[..., :1])


def pre_by_hand(
    dictionary: Dictionary, x: Tensor, held: Tensor | None = None, latent: int = LATENT
) -> Tensor:
    """x [T, d_in] -> [T]; `held` is norm_in's scale where it is constant."""
    scale = norm_scale(dictionary, x) if held is None else held
    if dictionary.norm.kind in (NormKind.LAYER_NORM, NormKind.CENTRE):
        x = x - x.mean(-1, keepdim=True)
    u = (x / scale - dictionary.b_in) @ dictionary.w_enc[:, latent]
    match dictionary.activation:
        case Gated(_, r_mag, b_mag):
            return r_mag[latent].exp() * u + b_mag[latent]
    return u + dictionary.b_enc[latent]


def trace_at(where: Where, dictionary: Dictionary, engine: Engine, mode: NormMode) -> Trace:
    def by_hand(seen: Seen, clean: Seen) -> Tensor:
        live = mode is NormMode.LIVE
        held = None if live else norm_scale(dictionary, where.read(clean)).detach()
        return pre_by_hand(dictionary, where.read(seen), held)[TOKEN]

    return Trace(traced(engine), by_hand, where.reference, where.reading, where.linear)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("mode", NormMode)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_column_is_what_the_pass_by_hand_gives(
    family: str, name: str, mode: NormMode
) -> None:
    where, model = PLACES[name], model_of(family)
    dictionary = where.dictionary("gated" if name == "z" else "relu")
    engine = random_engine(family, DOUBLE, [dictionary])
    trace = trace_at(where, dictionary, engine, mode)
    (explanation,) = engine.explain(explained(IDS, objective=trace.objective), norm_mode=mode)
    scales: plain.Scales = {}
    clean = detached(hand(model, scales=scales))
    seen = hand(model, held=held_scales(scales, where.reading, mode))
    value = trace.by_hand(seen, clean)
    assert explanation.value == pytest.approx(float(value.detach()), rel=1e-9)
    places: list[tuple[str, int | None]] = [("embed", None)]
    places += [(kind, layer) for kind in ("probabilities", "neurons") for layer in range(LAYERS)]
    reference, *gradients = gradients_by_hand(value, seen, [trace.point, *places])
    total = matrices(explanation, Column.TOTAL_EFFECT)
    for place, ours, gradient in zip(places, total, gradients, strict=True):
        theirs = (seen[place] * gradient).detach()
        assert close(ours, theirs.sum(-1) if place[0] == "embed" else theirs), place
    reads = trace.objective.reads
    assert reads == (tuple(range(TOKEN + 1)) if name in OF_ATTENTION else (TOKEN,))
    assert not reference[[t for t in range(len(IDS)) if t not in reads]].any()
    check_direct_effects(name, trace, explanation, model, seen, reference)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [NormKind.CENTRE, NormKind.CONSTANT_NORM, NormKind.FACTOR])
def test_gradients_are_finite_differences_with_the_scales_held(
    kind: NormKind, activation: str
) -> None:
    where, model = PLACES["attn_out"], model_of("llama")
    dictionary = where.dictionary(activation, InputNorm(kind, factor=0.7))
    engine = random_engine("llama", DOUBLE, [dictionary])
    (explanation,) = engine.explain(explained(IDS, objective=traced(engine)))
    scales: plain.Scales = {}
    clean = detached(hand(model, scales=scales))
    held = {name: scales[name] for name in where.reading}
    for hold_norm_in in (True, False):
        norm_in = norm_scale(dictionary, where.read(clean)) if hold_norm_in else None
        agree = []
        for token in (0, 5, TOKEN):
            values = []
            for step in (STEP, -STEP):
                factor = torch.tensor(1 + step, dtype=DOUBLE)
                site = plain.edited(("embed", None, (token,), partial(torch.mul, factor)))
                x = where.read(detached(hand(model, site, held)))
                values.append(float(pre_by_hand(dictionary, x, norm_in)[TOKEN]))
            slope = (values[0] - values[1]) / (2 * STEP)
            ours = float(matrices(explanation, Column.TOTAL_EFFECT)[0][token])
            agree.append(ours == pytest.approx(slope, rel=1e-5, abs=1e-8))
        assert all(agree) is (hold_norm_in or kind is not NormKind.CONSTANT_NORM)


EDITS: dict[str, list[Intervention]] = {
    "plain": [],
    "upstream, in the sublayer and at its site": [
        Intervention(parse("mlp.0"), Scale(0.5)),
        Intervention(parse("embed~2"), Add(VECTOR)),
        Intervention(parse("resid_post.0"), Add(VECTOR)),
        Intervention(parse("head.1.2.v~3"), Scale(2.0)),
        Intervention(parse("head.1.1~6"), Add(torch.ones(4, dtype=DOUBLE))),
        Intervention(parse("attn.1"), Add(VECTOR)),
        Intervention(parse("resid_mid.1"), Scale(-1.5)),
        Intervention(parse("neuron.1.7"), SetTo(2.0)),
        Intervention(parse("mlp.1"), Add(VECTOR)),
        Intervention(parse("resid_post.1"), Scale(0.25)),
    ],
    "of the dictionary": [
        Intervention(parse("latent.D.3"), SetTo(1.5)),
        Intervention(parse("error.D"), Scale(0.25)),
        Intervention(parse("bias.D~6"), Scale(2.0)),
    ],
}
OTHERS = [
    random_dictionary("A", Point.ATTN_OUT, 0, "jumprelu"),
    random_dictionary("B", Point.MLP_OUT, 0, "topk", LAYER_NORM),
    random_dictionary("C", Point.ATTN_OUT, 1),
    random_dictionary("V", Point.RESID_POST, 1),
]


@pytest.mark.parametrize("mode", NormMode)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sums_close_and_rest_is_zero_where_theory_says(
    family: str, name: str, mode: NormMode
) -> None:
    where = PLACES[name]
    own = where.dictionary(dtype=torch.float32)
    engine = random_engine(family, torch.float32, [own, *OTHERS])
    objective = traced(engine)
    for edits, wanted in EDITS.items():
        applied = engine.edits(*wanted, tokens=len(IDS))
        run = explained(IDS, *applied, objective=objective)
        post = explained(IDS, *applied, objective=replace(objective, post=True))
        listings: list[tuple[str, ...]] = [(), ("A", "B", "V"), ("D",)]
        for listed in listings:
            explanation, active = engine.explain(run, post, norm_mode=mode, dictionaries=listed)
            sums_close(active)
            size = sums_close(explanation)
            rest = abs(explanation.remainder["rest"])
            if where.linear and mode is not NormMode.LIVE:
                assert rest <= 1e-5 * size, (edits, listed)
            elif not where.linear and not listed:
                assert rest > 5e-5 * size, (edits, listed)


def biases_by_hand(
    model: Any, name: str, where: Where, dictionary: Dictionary
) -> dict[str, Tensor]:
    """Every constant between x_ref and the pre-activation, as a leaf of its own."""
    block = model.transformer.h[LAYER]
    leaves: list[tuple[Any, str]] = []
    if name in OF_ATTENTION:
        leaves += [(block.ln_1, "ln_1"), (block.attn.c_attn, "c_attn")]
        leaves += [(block.attn.c_proj, "c_proj")] if name == "attn_out" else []
    elif where.reading:
        leaves += [(block.ln_2, "ln_2")]
        leaves += [] if where.transcoder else [(block.mlp.c_fc, "c_fc")]
        leaves += [(block.mlp.c_proj, "down")] if name == "mlp_out" else []
    found: dict[str, Tensor] = {label: module.bias.requires_grad_() for module, label in leaves}
    found |= {
        "b_in": dictionary.b_in.requires_grad_(),
        "b_enc": dictionary.b_enc.requires_grad_(),
    }
    if isinstance(dictionary.activation, Gated):
        found["b_mag"] = dictionary.activation.b_mag.requires_grad_()
    return found


@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("name", PLACES)
def test_constants_between_reference_and_value_are_a_row(name: str, activation: str) -> None:
    """b . dJ/db of each bias, by autograd through the pass by hand with the scales held."""
    where = PLACES[name]
    engine = random_engine("gpt2", DOUBLE, [where.dictionary(activation)])
    (explanation,) = engine.explain(explained(IDS, objective=traced(engine)))
    model: Any = random_model("gpt2", DOUBLE)
    dictionary = where.dictionary(activation)
    scales: plain.Scales = {}
    clean = detached(hand(model, scales=scales))
    leaves = biases_by_hand(model, name, where, dictionary)
    seen = hand(model, held={each: scales[each] for each in where.reading})
    norm_in = norm_scale(dictionary, where.read(clean)).detach()
    value = pre_by_hand(dictionary, where.read(seen), norm_in)[TOKEN]
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    effects = {
        label: float((bias * gradient).sum().detach())
        for (label, bias), gradient in zip(leaves.items(), gradients, strict=True)
    }
    ours = explanation.remainder["bias.read"]
    assert ours == pytest.approx(sum(effects.values()), rel=1e-9)
    for label, effect in effects.items():
        if effect:
            assert ours != pytest.approx(sum(effects.values()) - effect, rel=1e-6), label


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["z", "mlp_out", "transcoder", "resid_post"])
def test_after_the_activation_it_is_f_and_its_edits(name: str, activation: str) -> None:
    where, model = PLACES[name], model_of("gpt2")
    dictionary = where.dictionary(activation)
    engine = random_engine("gpt2", DOUBLE, [dictionary])
    x = where.read(detached(hand(model)))
    f = ByHand(dictionary).latents(x)[TOKEN]
    active, silent = int(f.argmax()), int(f.argmin())
    assert f[active] > 0
    assert f[silent] == 0
    for latent in (active, silent):
        for wanted, value in (
            ([], f[latent]),
            ([Intervention(parse(f"latent.D.{latent}"), Scale(-2.0))], -2 * f[latent]),
            ([Intervention(parse(f"latent.D.{latent}~{TOKEN}"), SetTo(0.5))], 0.5),
            ([Intervention(parse(f"latent.D.{latent}~{TOKEN - 1}"), Zero())], f[latent]),
        ):
            edits = engine.edits(*wanted, tokens=len(IDS))
            before, after = engine.explain(
                explained(IDS, *edits, objective=traced(engine, latent=latent)),
                explained(IDS, *edits, objective=traced(engine, latent=latent, post=True)),
                dictionaries=["D"],
            )
            pre = pre_by_hand(dictionary, x, latent=latent)[TOKEN]
            assert before.value == pytest.approx(float(pre), rel=1e-9)
            assert after.value == pytest.approx(float(value), rel=1e-9)
            nodes = nodes_of(after, "D")
            index = nodes.find(traced(engine, latent=latent).node)
            assert index is not None
            row = nodes.gather(torch.tensor([index]))[0].tolist()
            columns = dict(zip(Column, row, strict=True))
            assert columns[Column.ACTIVATION] == pytest.approx(after.value)
            assert columns[Column.TOTAL_EFFECT] == pytest.approx(after.value)  # itself
            assert columns[Column.DIRECT_EFFECT] == 0
            slope = {0: 0.0, 1: 1.0, 2: -2.0}
            factor = slope[1 if not wanted or value == f[latent] else 2]
            if wanted and isinstance(wanted[0].operation, SetTo):
                factor = 0.0
            factor *= float(f[latent] != 0)
            for column in (Column.DIRECT_EFFECT, Column.TOTAL_EFFECT):
                for ours, pre_column in zip(
                    matrices(after, column), matrices(before, column), strict=True
                ):
                    assert close(ours, factor * pre_column)


def test_what_a_dictionary_writes_does_not_reach_what_is_encoded_at_its_site() -> None:
    """Its latents and those of another view there have no effect on J, though both sites are one;
    the same with the dictionary's own edits, which leave J as it is."""
    for name in PLACES:
        where = PLACES[name]
        other = random_dictionary("E", where.point, LAYER, seed=3)
        own = where.dictionary(dtype=torch.float32)
        engine = random_engine("gpt2", torch.float32, [own, other])
        objective = traced(engine)
        edits = engine.edits(
            Intervention(parse("latent.D.5"), SetTo(3.0)),
            Intervention(parse("error.D"), Zero()),
            tokens=len(IDS),
        )
        clean, edited = engine.explain(
            explained(IDS, objective=objective), explained(IDS, *edits, objective=objective)
        )
        assert edited.value == pytest.approx(clean.value, rel=1e-6)
        for listed in ("D", "E"):
            (explanation,) = engine.explain(
                explained(IDS, objective=objective), dictionaries=[listed]
            )
            nodes = nodes_of(explanation, listed)
            assert nodes.column(Column.ACTIVATION).any()
            assert not nodes.column(Column.TOTAL_EFFECT).any(), name
            assert not nodes.column(Column.DIRECT_EFFECT).any(), name


DOWN = {
    "attn_out": ("attn_out", 2),
    "mlp_act": ("mlp_act", 2),
    "transcoder": ("transcoder", 1),
    "resid_post": ("resid_post", 1),
    "resid_mid": ("resid_mid", 1),
}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("name", DOWN)
def test_a_pairs_value_is_traced_on_what_a_latent_reads(name: str, edits: str) -> None:
    place, layer = DOWN[name]
    dictionary = PLACES[place].dictionary(dtype=torch.float32, layer=layer)
    engine = random_engine("llama", torch.float32, [dictionary])
    latent = traced(engine)
    applied = engine.edits(*EDITS[edits], tokens=len(IDS))
    pair = parse(f"head.1.2~{TOKEN}-3")
    table, value = engine.explain(
        explained(IDS, *applied, objective=latent),
        explained(IDS, *applied, objective=TracedValue(pair, latent)),
    )
    direct = matrices(table, Column.DIRECT_EFFECT)[1 + LAYER]
    error = 1e-5 * float(direct.abs().max())
    assert value.value == pytest.approx(float(direct[2, TOKEN, 3]), rel=1e-4, abs=error)
    assert value.value != 0
    assert not value.notices
    sums_close(value)


def test_a_pair_of_the_layer_that_a_latent_reads_has_no_direct_path() -> None:
    engine = random_engine(
        "llama", dictionaries=[PLACES["attn_out"].dictionary(dtype=torch.float32)]
    )
    objective = TracedValue(parse(f"head.1.2~{TOKEN}-3"), traced(engine))
    (explanation,) = engine.explain(explained(IDS, objective=objective))
    assert explanation.value == 0
    (notice,) = explanation.notices
    assert "is no part of" in notice


@pytest.mark.parametrize("name", ["z", "mlp_out", "transcoder", "resid_post"])
def test_rows_of_a_batch_do_not_mix(name: str) -> None:
    engine = random_engine("gpt2", dictionaries=[PLACES[name].dictionary(dtype=torch.float32)])
    runs = [
        explained(IDS, objective=traced(engine)),
        explained(IDS[:5], objective=traced(engine, token=3, latent=2)),
        explained(IDS),
    ]
    for run, batched in zip(runs, engine.explain(*runs), strict=True):
        (alone,) = engine.explain(run)
        assert batched.value == pytest.approx(alone.value, rel=1e-5)
        for column in Column:
            for ours, theirs in zip(
                matrices(batched, column), matrices(alone, column), strict=True
            ):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_effects_are_verified_by_really_ablating(name: str, post: bool) -> None:
    where, model = PLACES[name], model_of("gpt2")
    dictionary = where.dictionary()
    engine = random_engine("gpt2", DOUBLE, [dictionary])
    f = ByHand(dictionary).latents(where.read(detached(hand(model))))[TOKEN]
    latent = int(f.argmax())
    run = explained(IDS, objective=traced(engine, latent=latent, post=post))

    def by_hand(site: plain.Site = plain.untouched) -> float:
        x = where.read(detached(hand(model, site)))
        if post:
            return float(ByHand(dictionary).latents(x)[TOKEN, latent])
        return float(pre_by_hand(dictionary, x, latent=latent)[TOKEN])

    zeroed = {
        "neuron.0.5~6": plain.edited(("neurons", 0, (6, 5), torch.zeros_like)),
        "head.0.1~6-3": plain.edited(("probabilities", 0, (1, 6, 3), torch.zeros_like)),
        "embed~2": plain.edited(("embed", None, (2,), torch.zeros_like)),
    }
    own = f"latent.D.{latent}~{TOKEN}"
    edits = engine.edits(
        *(Intervention(parse(node), Zero()) for node in (*zeroed, own)), tokens=len(IDS)
    )
    ablations = [Ablation(edit.target, edit) for edit in edits]
    cancel = CancelToken()
    verified = whole_verification.begin(
        engine.hooks, run, ablations, NormMode.FINAL_NORM_FROZEN, cancel
    )
    assert verified.value == pytest.approx(by_hand(), rel=1e-9)
    found = {str(each.node): each for each in verified.chunk(0, cancel)}
    for node, site in zeroed.items():
        assert found[node].value == pytest.approx(by_hand(site), rel=1e-8, abs=1e-12), node
    itself = verified.value if post else 0.0
    assert found[own].effect == pytest.approx(itself, rel=1e-9)
    *_, estimated = estimate(engine.hooks, run, edits, NormMode.FINAL_NORM_FROZEN, cancel)
    assert estimated == pytest.approx(itself, rel=1e-6)
