"""Read-outs of latents: what they write, read and come from, against the pass written by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine.bound import Place
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.dictionary import (
    Dictionary,
    Gated,
    InputNorm,
    NormKind,
)
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.interventions import Intervention, Scale, SetTo, Zero
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.readouts import ReadOut, read_out
from services.inference.engine.traced_latents import TracedLatent
from tests.inference import by_hand, plain
from tests.inference.helpers import (
    LAYERS,
    VOCABULARY,
    explained,
    in_float64,
    random_engine,
    random_model,
)
from tests.inference.planted import LATENTS, ByHand, random_dictionary
from tests.inference.test_readouts import as_vector, logits_at
from tests.inference.test_splice import IDS, PLAIN

__all__ = ["in_float64"]

DOUBLE = torch.float64
LAST = len(IDS) - 1
LAYER = 1
LAYER_NORM = InputNorm(NormKind.LAYER_NORM)
BEHIND_ATTENTION = (Point.Z, Point.ATTN_OUT)
SITES = (*BEHIND_ATTENTION, Point.MLP_ACT, Point.MLP_OUT, Point.RESID_MID, Point.RESID_POST)


def dictionary_at(point: Point, layer: int = LAYER, **more: Any) -> Dictionary:
    return random_dictionary("D", point, layer, norm=LAYER_NORM, dtype=DOUBLE, **more)


def found(
    family: str,
    dictionary: Dictionary,
    nodes: list[Address],
    *wanted: Intervention,
    others: tuple[Dictionary, ...] = (),
    sources: int = 0,
) -> dict[Address, ReadOut]:
    engine = random_engine(family, DOUBLE, [dictionary, *others])
    run = explained(IDS, *engine.edits(*wanted, tokens=len(IDS)))
    (explanation,) = engine.explain(run, dictionaries=["D"])
    return read_out(engine.architecture, explanation, nodes, VOCABULARY, VOCABULARY, sources)


def at(token: int, *latents: int) -> list[Address]:
    return [Address(Kind.LATENT, index=each, dictionary="D", position=token) for each in latents]


def pre_activations(dictionary: Dictionary, x: Tensor) -> Tensor:
    """[T, N], written out, the scale of norm_in constant."""
    scale, mean = ByHand(dictionary).scale_and_mean(x)
    eps = dictionary.norm.eps if dictionary.norm.kind is NormKind.LAYER_NORM else 0.0
    u = ((x - mean) / (scale + eps) - dictionary.b_in) @ dictionary.w_enc
    match dictionary.activation:
        case Gated(_, r_mag, b_mag):
            return r_mag.exp() * u + b_mag
    return u + dictionary.b_enc


class Seen:
    """A pass by hand with edits, a leaf at one residual, and what stands at every site."""

    def __init__(
        self,
        model: Any,
        reads: tuple[str, int | None],
        wanted: tuple[Intervention, ...] = (),
        spliced: tuple[Dictionary, int, float] | None = None,
        held: plain.Scales | None = None,
    ) -> None:
        """`spliced`: a latent of a dictionary that is set to a number at every token."""
        self.at: dict[tuple[str, int | None], Tensor] = {}
        edit = by_hand.edited(model, wanted, len(IDS))

        def site(kind: str, layer: int | None, values: Tensor) -> Tensor:
            values = edit(kind, layer, values)
            if spliced is not None:
                dictionary, latent, number = spliced
                header = dictionary.header
                if (kind, layer) == (PLAIN[header.site_out.point], header.site_out.layer):
                    x = values.flatten(1)
                    f = ByHand(dictionary).latents(x)
                    after = f.clone()
                    after[:, latent] = number
                    change = ByHand(dictionary).write(after, x) - ByHand(dictionary).write(f, x)
                    values = (x + change).view_as(values)
            if (kind, layer) == reads:
                values = values.detach().requires_grad_()
            self.at[kind, layer] = values
            return values

        with torch.enable_grad():
            plain.forward(model, IDS, site, held)


def residual_read(point: Point) -> tuple[str, int | None]:
    if point in BEHIND_ATTENTION:
        return ("resid_post", LAYER - 1)
    return (
        (PLAIN[point], LAYER)
        if point in (Point.RESID_MID, Point.RESID_POST)
        else (
            "resid_mid",
            LAYER,
        )
    )


def input_by_hand(
    family: str,
    dictionary: Dictionary,
    node: Address,
    wanted: tuple[Intervention, ...] = (),
    spliced: tuple[Dictionary, int, float] | None = None,
    *,
    live: bool = False,
) -> Tensor:
    """[V]: gradient at the node's own token, by autograd, the reading norm's scale held."""
    model: Any = random_model(family, DOUBLE)
    site_in = dictionary.header.site_in
    reads = residual_read(site_in.point)
    name = "attn" if site_in.point in BEHIND_ATTENTION else "mlp"
    scales: plain.Scales = {}
    plain.forward(model, IDS, by_hand.edited(model, wanted, len(IDS)), scales=scales)
    key = f"{name}.{LAYER}"
    seen = Seen(model, reads, wanted, spliced, {} if live else {key: scales[key]})
    kind = PLAIN.get(site_in.point, "mlp_in")
    x = seen.at[kind, LAYER].flatten(1)
    with torch.enable_grad():
        value = pre_activations(dictionary, x)[node.position, node.index]
        (gradient,) = torch.autograd.grad(value, seen.at[reads])
    embedding: Tensor = model.get_input_embeddings().weight
    return embedding @ gradient[node.position]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("point", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_input_tokens_are_gradients_at_the_latents_own_token(
    family: str, point: Point, activation: str
) -> None:
    dictionary = dictionary_at(point, activation=activation)
    nodes = [*at(5, 2, 7), *at(LAST, 7), *at(0, 3)]
    read = found(family, dictionary, nodes)
    for node in nodes:
        expected = input_by_hand(family, dictionary, node)
        assert expected.abs().max() > 1e-6
        assert torch.allclose(as_vector(read[node].input), expected, rtol=1e-6, atol=1e-9), node
        assert read[node].key_input == ()
    if not point.startswith("resid"):
        live = input_by_hand(family, dictionary, nodes[0], live=True)
        assert not torch.allclose(as_vector(read[nodes[0]].input), live, rtol=1e-3)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_input_tokens_of_a_transcoder_are_linear(family: str) -> None:
    dictionary = dictionary_at(Point.MLP_OUT, reads=Point.MLP_IN, skip=True)
    (node,) = at(5, 2)
    ours = as_vector(found(family, dictionary, [node])[node].input)
    expected = input_by_hand(family, dictionary, node)
    assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("point", SITES)
def test_the_score_of_the_token_itself_is_its_embeddings_row_in_a_trace(point: Point) -> None:
    """In the first layer, where the embedding alone is upstream of what attention reads."""
    dictionary = dictionary_at(point, 0)
    engine = random_engine("llama", DOUBLE, [dictionary])
    for node in (*at(5, 2), *at(LAST, 7)):
        objective = TracedLatent(node, Place(dictionary.header, engine.architecture))
        traced, plain_table = (
            engine.explain(explained(IDS, objective=each), dictionaries=["D"])[0]
            for each in (objective, None)
        )
        embeds = traced.groups[0].column(Column.DIRECT_EFFECT)
        (read,) = read_out(
            engine.architecture, plain_table, [node], VOCABULARY, VOCABULARY
        ).values()
        ours = as_vector(read.input)[IDS[node.position or 0]]
        assert float(ours) == pytest.approx(float(embeds[node.position]), rel=1e-6)


EDITS = (
    Intervention(parse("neuron.1.5"), Scale(0.5)),
    Intervention(parse("neuron.1.6~5"), Zero()),
    Intervention(parse("head.1.0.q~5"), Scale(2.0)),
    Intervention(parse("head.1.1.k"), Scale(0.3)),
    Intervention(parse("head.1.2.v~5"), Zero()),
    Intervention(parse("head.1.3~5-5"), Scale(3.0)),
    Intervention(parse("head.1.3~5-2"), SetTo(0.5)),
    Intervention(parse("head.1.0~5"), Scale(-1.5)),
    Intervention(parse("resid_mid.1"), Scale(0.7)),
)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("point", SITES[:4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edits_on_the_way_are_read_through(family: str, point: Point) -> None:
    dictionary = dictionary_at(point)
    nodes = [*at(5, 2, 7), *at(LAST, 7)]
    read = found(family, dictionary, nodes, *EDITS)
    for node in nodes:
        expected = input_by_hand(family, dictionary, node, EDITS)
        assert torch.allclose(as_vector(read[node].input), expected, rtol=1e-6, atol=1e-9), node
    unedited = input_by_hand(family, dictionary, nodes[0])
    assert not torch.allclose(as_vector(read[nodes[0]].input), unedited, rtol=1e-3)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("earlier", "point"), [(Point.Z, Point.ATTN_OUT), (Point.MLP_ACT, Point.MLP_OUT)]
)
def test_an_edited_dictionary_on_the_way_is_read_through(earlier: Point, point: Point) -> None:
    dictionary = dictionary_at(point)
    other = replace(dictionary_at(earlier, seed=3), header=dictionary_at(earlier).header)
    other = replace(other, header=replace(other.header, id="E"))
    (node,) = at(5, 2)
    wanted = Intervention(parse("latent.E.4"), SetTo(1.5))
    ours = as_vector(found("llama", dictionary, [node], wanted, others=(other,))[node].input)
    expected = input_by_hand("llama", dictionary, node, spliced=(other, 4, 1.5))
    assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(ours, input_by_hand("llama", dictionary, node), rtol=1e-4)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("point", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_output_tokens_are_the_write_through_the_final_norm(family: str, point: Point) -> None:
    dictionary = dictionary_at(point)
    model: Any = random_model(family, DOUBLE)
    scales: plain.Scales = {}
    plain.forward(model, IDS, scales=scales)
    seen = Seen(model, residual_read(point))
    x = seen.at[PLAIN[point], LAYER].flatten(1).detach()
    f = ByHand(dictionary).latents(x)
    latents = f[5].nonzero()[:2, 0].tolist()
    inactive = int((f[5] == 0).nonzero()[0, 0])
    read = found(family, dictionary, at(5, *latents, inactive))
    gpt2 = family == "gpt2"
    block = (model.transformer.h if gpt2 else model.model.layers)[LAYER]
    for node in at(5, *latents, inactive):
        one = torch.zeros_like(f)
        one[5, node.index] = f[5, node.index]
        write = ByHand(dictionary).write(one, x)
        zero = torch.zeros_like(write)
        match point:
            case Point.Z:
                out = block.attn.c_proj if gpt2 else block.self_attn.o_proj
                write = out(write) - out(zero)
            case Point.MLP_ACT:
                out = block.mlp.c_proj if gpt2 else block.mlp.down_proj
                write = out(write) - out(zero)
        scores = logits_at(model, write[5], scales["final"][5], family)
        ours = as_vector(read[node].output)
        assert torch.allclose(ours, scores - scores.mean(), rtol=1e-6, atol=1e-9)
        assert bool(ours.any()) == (node.index != inactive)


def test_output_tokens_are_of_the_edited_value() -> None:
    dictionary = dictionary_at(Point.MLP_OUT, LAYERS - 1)
    nodes = at(LAST, 2)
    twice, thrice = (
        found("gpt2", dictionary, nodes, Intervention(nodes[0], SetTo(value)))[nodes[0]].output
        for value in (2.0, 3.0)
    )
    # The final norm's scale moves with the edit, the same for every token.
    ratio = as_vector(thrice) / as_vector(twice)
    assert ratio.max() == pytest.approx(float(ratio.min()), rel=1e-6)
    assert ratio[0] > 1


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("wanted", [(), EDITS])
@pytest.mark.parametrize("activation", ["relu", "gated"])
@pytest.mark.parametrize("point", BEHIND_ATTENTION)
@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied"])
def test_sources_and_constants_add_up_to_the_pre_activation(
    family: str, point: Point, activation: str, wanted: tuple[Intervention, ...]
) -> None:
    dictionary = dictionary_at(point, activation=activation)
    model: Any = random_model(family, DOUBLE)
    seen = Seen(model, ("resid_post", LAYER - 1), wanted)
    x = seen.at[PLAIN[point], LAYER].flatten(1).detach()
    f, pre = ByHand(dictionary).latents(x), pre_activations(dictionary, x)
    latents = f[5].nonzero()[:3, 0].tolist()
    inactive = int((f[5] == 0).nonzero()[0, 0])
    nodes = at(5, *latents, inactive)
    read = found(family, dictionary, nodes, *wanted, sources=100)
    # What is left when every value vector is 0: biases, and b_in and b_enc of the encoder.
    zero = torch.zeros_like(x)
    if point is Point.ATTN_OUT:
        block = (model.transformer.h if family == "gpt2" else model.model.layers)[LAYER]
        out = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
        zero = out(torch.zeros(len(IDS), out.weight.shape[0], dtype=DOUBLE))
    scale, _ = ByHand(dictionary).scale_and_mean(x)
    eps = dictionary.norm.eps
    u = ((zero - zero.mean(-1, keepdim=True)) / (scale + eps) - dictionary.b_in) @ dictionary.w_enc
    gated = dictionary.activation
    constants = (
        gated.r_mag.exp() * u + gated.b_mag if isinstance(gated, Gated) else u + dictionary.b_enc
    )
    for node in nodes[:-1]:
        scores = read[node].sources
        assert sorted(position for position, _ in scores) == list(range(6))
        sizes = [abs(score) for _, score in scores]
        assert sizes == sorted(sizes, reverse=True)
        total = sum(score for _, score in scores)
        expected = float((pre - constants)[5, node.index or 0])
        assert total == pytest.approx(expected, rel=1e-8)
        assert abs(total - float(pre[5, node.index or 0])) > 1e-6
    assert read[nodes[-1]].sources == ()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("point", BEHIND_ATTENTION)
def test_a_source_is_what_its_token_gives(point: Point) -> None:
    """The pre-activation less that of a pass whose values at one token are 0, pattern held."""
    dictionary = dictionary_at(point)
    model: Any = random_model("llama", DOUBLE)
    seen = Seen(model, ("resid_post", LAYER - 1))
    x = seen.at[PLAIN[point], LAYER].flatten(1).detach()
    latent = int(ByHand(dictionary).latents(x)[5].argmax())
    (node,) = at(5, latent)
    read = found("llama", dictionary, [node], sources=3)[node].sources
    assert len(read) == 3
    scale, _ = ByHand(dictionary).scale_and_mean(x)

    def pre(values: Tensor) -> Tensor:
        normed = (values - values.mean(-1, keepdim=True)) / (scale + dictionary.norm.eps)
        return ((normed - dictionary.b_in) @ dictionary.w_enc + dictionary.b_enc)[5, latent]

    for position, score in read:
        without: dict[str, Tensor] = {}

        def site(
            kind: str,
            layer: int | None,
            values: Tensor,
            position: int = position,
            without: dict[str, Tensor] = without,
        ) -> Tensor:
            if (kind, layer) == ("v", LAYER):
                values = values.clone()
                values[:, position] = 0
            if (kind, layer) == (PLAIN[point], LAYER):
                without["x"] = values.flatten(1)
            return values

        plain.forward(model, IDS, site)
        assert score == pytest.approx(float(pre(x) - pre(without["x"])), rel=1e-8)


@pytest.mark.parametrize("point", SITES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_precision_reads_nearly_the_same(family: str, point: Point) -> None:
    nodes = at(5, *range(LATENTS))
    vectors = []
    for dtype in (torch.bfloat16, torch.float32):
        dictionary = dictionary_at(point).to(torch.device("cpu"), dtype)
        engine = random_engine(family, dtype, [dictionary])
        (explanation,) = engine.explain(explained(IDS), dictionaries=["D"])
        read = read_out(engine.architecture, explanation, nodes, VOCABULARY, VOCABULARY, 100)
        vectors.append(torch.cat([as_vector(read[node].input) for node in nodes]))
    assert float(torch.corrcoef(torch.stack(vectors))[0, 1]) > 0.98


def test_only_attention_latents_have_sources_and_as_many_as_asked_for() -> None:
    for point in (Point.MLP_OUT, Point.RESID_POST):
        dictionary = dictionary_at(point)
        nodes = at(5, *range(LATENTS))
        read = found("gpt2", dictionary, nodes, sources=5)
        assert all(each.sources == () for each in read.values())
    dictionary = dictionary_at(Point.ATTN_OUT)
    nodes = at(5, *range(LATENTS))
    everything, few, none = (
        found("gpt2", dictionary, nodes, sources=count) for count in (100, 2, 0)
    )
    for node in nodes:
        assert few[node].sources == everything[node].sources[:2]
        assert none[node].sources == ()
    assert any(each.sources for each in everything.values())


@pytest.mark.parametrize("point", SITES)
def test_a_row_of_a_padded_batch_is_read_out_as_alone(point: Point) -> None:
    engine = random_engine("llama", DOUBLE, [dictionary_at(point)])
    nodes = at(4, *range(LATENTS))
    long = explained(IDS, *engine.edits(*EDITS, tokens=len(IDS)))
    short = explained(IDS[:5], objective=LogitDiff((5,), (9,), 4))
    alone, together = (
        read_out(
            engine.architecture,
            engine.explain(*runs, dictionaries=["D"])[-1],
            nodes,
            VOCABULARY,
            VOCABULARY,
            3,
        )
        for runs in ((short,), (long, short))
    )
    for node in nodes:
        for ours, theirs in (
            (together[node].input, alone[node].input),
            (together[node].output, alone[node].output),
        ):
            assert torch.allclose(as_vector(ours), as_vector(theirs), rtol=1e-5, atol=1e-7)
        assert [each for each, _ in together[node].sources] == [
            each for each, _ in alone[node].sources
        ]
    assert any(alone[node].sources for node in nodes) is (point in BEHIND_ATTENTION)
