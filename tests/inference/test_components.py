"""DescribeComponent equals brute force over whole [d, d] maps, from Hugging Face's own weights."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import component_pb2
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.common.errors import FailedPrecondition
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.components import (
    ComponentDirection,
    Describer,
    Description,
    Extremes,
)
from services.inference.engine.dictionaries.dictionary import (
    Dictionary,
    Gated,
    InputNorm,
    NormKind,
)
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.model import Model
from services.inference.engine.readouts import Scores
from tests.inference.families.models import (
    HEADS,
    LAYERS,
    NEURONS,
    VOCABULARY,
    config_of,
    engine_of,
    random_model,
)
from tests.inference.helpers import random_engine, shelf_of
from tests.inference.helpers import random_model as random_gpt2
from tests.inference.planted import LATENTS, random_dictionary
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

FAMILIES = ("gpt2/tied", "llama/grouped", "qwen3/qk-norm", "gemma2/softcap")


@dataclass(frozen=True)
class Weights:
    """One layer of a model by the formulas of its file, norms' gains included, in float64.

    `ov` [H, d, d] and `qk` [H, d, d] (query, key) are whole maps; `write` [F, d]; `reads` [F, d].
    """

    ov: Tensor
    qk: Tensor
    write: Tensor
    reads: dict[str, Tensor]


class BruteForce:
    """A model's weights by the names of its own file."""

    def __init__(self, variant: str) -> None:
        self.kind = variant.partition("/")[0]
        self.model: Any = random_model(variant, torch.float64, "eager")
        self.config: Any = config_of(variant)
        self.groups = HEADS // getattr(self.config, "num_key_value_heads", HEADS)
        gpt2 = self.kind == "gpt2"
        self.trunk = self.model.transformer if gpt2 else self.model.model
        blocks = self.trunk.h if gpt2 else self.trunk.layers
        self.layers = [self._gpt2(each) if gpt2 else self._llama(each) for each in blocks]
        embedding = self.trunk.wte if gpt2 else self.trunk.embed_tokens
        self.embedding = embedding.weight
        if self.kind == "gemma2":
            self.embedding = self.embedding * self.config.hidden_size**0.5

    def _gain(self, norm: Any) -> Tensor:
        gain: Tensor = norm.weight + 1 if self.kind == "gemma2" else norm.weight
        return gain

    def _gpt2(self, block: Any) -> Weights:
        width = block.attn.c_proj.weight.shape[0]
        centre = torch.eye(width, dtype=torch.float64) - 1 / width
        query, key, value = (
            (centre * block.ln_1.weight @ part).view(width, HEADS, -1).transpose(0, 1)
            for part in block.attn.c_attn.weight.chunk(3, dim=1)
        )
        out = block.attn.c_proj.weight.view(HEADS, -1, width)
        return Weights(
            value @ out,
            query @ key.transpose(1, 2) / query.shape[-1] ** 0.5,
            block.mlp.c_proj.weight,
            {"read": (centre * block.ln_2.weight @ block.mlp.c_fc.weight).T},
        )

    def _llama(self, block: Any) -> Weights:
        attention, gemma = block.self_attn, self.kind == "gemma2"
        gain, width = self._gain(block.input_layernorm), attention.o_proj.weight.shape[0]
        query, key, value = (
            (project.weight * gain).view(-1, attention.head_dim, width)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if self.kind == "qwen3":
            query = query * attention.q_norm.weight[:, None]
            key = key * attention.k_norm.weight[:, None]
        key, value = (each.repeat_interleave(self.groups, 0) for each in (key, value))
        out = attention.o_proj.weight.T.view(HEADS, -1, width)
        write = block.mlp.down_proj.weight.T
        norm = block.post_attention_layernorm
        if gemma:
            out = out * self._gain(block.post_attention_layernorm)
            write = write * self._gain(block.post_feedforward_layernorm)
            norm = block.pre_feedforward_layernorm
        scaling = self.config.query_pre_attn_scalar if gemma else attention.head_dim
        return Weights(
            value.transpose(1, 2) @ out,
            query.transpose(1, 2) @ key / scaling**0.5,
            write,
            {
                "gate": block.mlp.gate_proj.weight * self._gain(norm),
                "up": block.mlp.up_proj.weight * self._gain(norm),
            },
        )

    def output(self, write: Tensor) -> Tensor:
        """[V]"""
        if self.kind == "gpt2":
            write = (write - write.mean()) * self.trunk.ln_f.weight
        else:
            write = write * self._gain(self.trunk.norm)
        scores: Tensor = self.model.lm_head.weight @ write
        return scores - scores.mean()

    def input(self, read: Tensor) -> Tensor:
        """[V]"""
        scores: Tensor = self.embedding @ read
        return scores


def described(
    variant: str, component: str, tokens: int = VOCABULARY, circuits: int = 4, similar: int = 500
) -> Description:
    describer = Describer(engine_of(variant).architecture, VOCABULARY)
    return describer.describe(parse(component), tokens, circuits, similar, CancelToken())


def as_vector(scores: Scores) -> Tensor:
    vector = torch.full((VOCABULARY,), torch.nan, dtype=torch.float64)
    for token_id, score in scores:
        vector[token_id] = score
    return vector


def close(scores: Scores, expected: Tensor) -> bool:
    return bool((as_vector(scores) - expected).abs().max() < 1e-4 * expected.abs().max())


def by_name(description: Description) -> dict[str, ComponentDirection]:
    return {each.name: each for each in description.directions}


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_neuron_writes_and_reads_what_its_weights_say(variant: str) -> None:
    brute = BruteForce(variant)
    weights = brute.layers[1]
    found = by_name(described(variant, "neuron.1.7"))
    assert [*found] == ["write", *weights.reads]
    write = found.pop("write")
    assert write.norm == pytest.approx(float(weights.write[7].norm()), rel=1e-5)
    assert close(write.output, brute.output(weights.write[7]))
    assert not close(write.output, brute.output(weights.write[8]))
    assert write.input == ()
    for name, each in found.items():
        read = weights.reads[name][7]
        assert each.norm == pytest.approx(float(read.norm()), rel=1e-5)
        assert close(each.input, brute.input(read))
        assert each.output == ()


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_heads_circuits_are_the_singular_directions_of_the_whole_maps(variant: str) -> None:
    brute = BruteForce(variant)
    weights = brute.layers[1]
    found = by_name(described(variant, "head.1.3"))
    assert [*found] == [f"{circuit}.{n}" for circuit in ("ov", "qk") for n in range(4)]
    for circuit, whole in (("ov", weights.ov[3]), ("qk", weights.qk[3])):
        left, values, right = torch.linalg.svd(whole)
        for number in range(4):
            ours = found[f"{circuit}.{number}"]
            assert ours.norm == pytest.approx(float(values[number]), rel=1e-4)
            u, v = left[:, number], right[number]
            sign = float(v[v.abs().argmax()].sign())
            assert close(ours.input, brute.input(sign * u))
            if circuit == "ov":
                assert close(ours.output, brute.output(sign * v * values[number]))
                assert ours.key_input == ()
            else:
                assert close(ours.key_input, brute.input(sign * v))
                assert ours.output == ()
    assert float(torch.linalg.svdvals(weights.ov[2])[0]) != pytest.approx(
        found["ov.0"].norm, rel=1e-3
    )


@pytest.mark.parametrize("variant", FAMILIES)
def test_similar_components_are_those_of_all_layers_by_cosine(variant: str) -> None:
    layers = BruteForce(variant).layers
    neurons = torch.cat([each.write for each in layers])
    maps = torch.cat([each.ov.flatten(1) for each in layers])
    for component, vectors, kind, width in (
        ("neuron.1.7", neurons, Kind.NEURON, NEURONS),
        ("head.1.3", maps, Kind.HEAD, HEADS),
    ):
        address = parse(component)
        own = (address.layer or 0) * width + (address.index or 0)
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        cosines = unit @ unit[own]
        expected = [
            (Address(kind, place // width, place % width), float(cosines[place]))
            for place in cosines.argsort(descending=True).tolist()
            if place != own
        ]
        found = described(variant, component, similar=10_000).similar
        assert len(found) == LAYERS * width - 1
        ours = dict(found)
        for each, cosine in expected:
            assert ours[each] == pytest.approx(cosine, abs=1e-5)
        values = [cosine for _, cosine in found]
        assert values == sorted(values, reverse=True)
        assert found[0][0] == expected[0][0]
        assert [each for each, _ in described(variant, component, similar=3).similar] == [
            each for each, _ in found[:3]
        ]


def test_exactly_the_tokens_asked_for_largest_first_and_never_undecodable_ones() -> None:
    architecture = engine_of("gpt2/tied").architecture
    few = Describer(architecture, 40).describe(parse("head.0.1"), 5, 2, 0, CancelToken())
    full = by_name(described("gpt2/tied", "head.0.1"))
    assert [each.name for each in few.directions] == ["ov.0", "ov.1", "qk.0", "qk.1"]
    assert few.similar == ()
    for each in few.directions:
        for ours, theirs in (
            (each.output, full[each.name].output),
            (each.input, full[each.name].input),
            (each.key_input, full[each.name].key_input),
        ):
            assert [token for token, _ in ours] == [token for token, _ in theirs if token < 40][
                : len(ours)
            ]
            assert len(ours) in (0, 5)


def test_layers_of_experts_have_no_neurons_to_compare_with() -> None:
    architecture = engine_of("qwen3_moe/mixed").architecture
    found = described("qwen3_moe/mixed", "neuron.1.7", similar=10_000).similar
    assert {each.layer for each, _ in found} == {1}
    assert len(found) == architecture.neurons - 1
    assert {each.layer for each, _ in described("qwen3_moe/mixed", "head.1.3").similar} == {0, 1, 2}


def test_what_writes_nothing_is_similar_to_nothing() -> None:
    engine = engine_of("opt/relu")
    row = engine.architecture.layers[1].w_out[7]
    kept = row.clone()
    lengths = engine.architecture.layers[1].w_out_norm
    try:
        row.zero_()
        lengths[7] = 0
        assert described("opt/relu", "neuron.1.7").similar == ()
        others = [str(each) for each, _ in described("opt/relu", "neuron.0.3").similar]
        assert "neuron.1.7" not in others
        assert len(others) == LAYERS * NEURONS - 2
    finally:
        row.copy_(kept)
        lengths[7] = float(kept.norm())


LATENT = 5
DICTIONARIES: dict[str, tuple[Dictionary, bool]] = {
    "a view": (random_dictionary("D", Point.RESID_POST, 1), True),
    "a view that centres": (
        random_dictionary("D", Point.RESID_MID, 1, norm=InputNorm(NormKind.LAYER_NORM)),
        True,
    ),
    "a view by a factor": (
        random_dictionary("D", Point.RESID_POST, 1, norm=InputNorm(NormKind.FACTOR, factor=4.0)),
        True,
    ),
    "a factor that stays": (
        random_dictionary(
            "D", Point.RESID_POST, 1, norm=InputNorm(NormKind.FACTOR, factor=4.0, undone=False)
        ),
        True,
    ),
    "a transcoder": (random_dictionary("D", Point.MLP_OUT, 1, reads=Point.MLP_IN), True),
    "gated": (random_dictionary("D", Point.RESID_POST, 0, "gated"), True),
    "of an MLP's output": (random_dictionary("D", Point.MLP_OUT, 1), False),
    "of neurons": (random_dictionary("D", Point.MLP_ACT, 1), False),
    "of heads": (random_dictionary("D", Point.Z, 1), False),
}
"""Dictionaries, and whether their latents read a direction of the stream."""


def latent_by_hand(model: Any, dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """Write and read of `LATENT` in a GPT-2, by SEMANTICS 9 with every scale of a norm 1."""
    norm, block = dictionary.norm, model.transformer.h[1]
    write = dictionary.w_dec[LATENT].double()
    match dictionary.header.site_out.point:
        case Point.MLP_ACT:
            write = write @ block.mlp.c_proj.weight
        case Point.Z:
            write = write @ block.attn.c_proj.weight
    if norm.kind is NormKind.FACTOR and norm.undone:
        write = write / norm.factor
    x = torch.zeros(len(dictionary.w_enc), dtype=torch.float64, requires_grad=True)
    stream = x
    if dictionary.header.site_in.point is Point.MLP_IN:
        stream = (x - x.mean()) * block.ln_2.weight
    if norm.kind is NormKind.LAYER_NORM:
        stream = stream - stream.mean()
    if norm.kind is NormKind.FACTOR:
        stream = stream * norm.factor
    pre = stream @ dictionary.w_enc[:, LATENT].double()
    if isinstance(dictionary.activation, Gated):
        pre = pre * dictionary.activation.r_mag[LATENT].exp()
    (read,) = torch.autograd.grad(pre, x)
    return write, read


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_latent_writes_and_reads_what_its_weights_say(name: str) -> None:
    dictionary, reads = DICTIONARIES[name]
    engine = random_engine("gpt2", dictionaries=[dictionary])
    model: Any = random_gpt2("gpt2", torch.float64)
    describer = Describer(engine.architecture, VOCABULARY)
    (bound,) = engine.hooks.shelf.bind(["D"])
    found = describer.describe_latent(bound, LATENT, VOCABULARY)
    write, read = latent_by_hand(model, dictionary)
    assert [each.name for each in found] == (["write", "read"] if reads else ["write"])
    assert found[0].norm == pytest.approx(float(write.norm()), rel=1e-5)
    scores = model.lm_head.weight @ ((write - write.mean()) * model.transformer.ln_f.weight)
    assert close(found[0].output, scores - scores.mean())
    if reads:
        assert found[1].norm == pytest.approx(float(read.norm()), rel=1e-5)
        assert close(found[1].input, model.transformer.wte.weight @ read)


def check_extremes(found: Extremes, scores: Tensor, count: int) -> None:
    """Of one write, against the scores [V] of all tokens."""
    order = scores.argsort(stable=True)
    for ids, values, wanted in (
        (found.largest, found.largest_scores, order.flip(0)[:count]),
        (found.smallest, found.smallest_scores, order[:count]),
    ):
        assert ids[0].tolist() == wanted.tolist()
        assert values[0].double() == pytest.approx(scores[wanted], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", FAMILIES)
def test_neurons_promote_and_suppress_what_brute_force_says(variant: str) -> None:
    brute, engine = BruteForce(variant), engine_of(variant)
    writes = brute.layers[1].write
    describer = Describer(engine.architecture, VOCABULARY)
    w_out = engine.architecture.layers[1].w_out
    found = describer.extreme_tokens(w_out, 6)
    assert found.largest.shape == found.smallest_scores.shape == (NEURONS, 6)
    for neuron in range(NEURONS):
        of_one = Extremes(*(each[neuron : neuron + 1] for each in found))
        check_extremes(of_one, brute.output(writes[neuron]), 6)
    # Neither the final norm nor the mean over the vocabulary may be left out.
    plain: Tensor = brute.model.lm_head.weight @ writes[0]
    with pytest.raises(AssertionError):
        check_extremes(Extremes(*(each[:1] for each in found)), plain, 6)
    few = Describer(engine.architecture, 4).extreme_tokens(w_out[:1], 6)
    assert few.largest.tolist() == few.smallest.flip(1).tolist()
    assert sorted(few.largest[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", DICTIONARIES)
def test_latents_promote_and_suppress_what_brute_force_says(name: str) -> None:
    dictionary, _ = DICTIONARIES[name]
    engine = random_engine("gpt2", dictionaries=[dictionary])
    model: Any = random_gpt2("gpt2", torch.float64)
    (bound,) = engine.hooks.shelf.bind(["D"])
    writes = bound.constant_scale * bound.unit_writes(torch.tensor([LATENT]))
    write, _ = latent_by_hand(model, dictionary)
    scores = model.lm_head.weight @ ((write - write.mean()) * model.transformer.ln_f.weight)
    found = Describer(engine.architecture, VOCABULARY).extreme_tokens(writes, 6)
    check_extremes(found, scores - scores.mean(), 6)


def test_equal_scores_come_by_id_and_overflow_is_refused() -> None:
    describer = Describer(engine_of("gpt2/tied").architecture, VOCABULARY)
    width = engine_of("gpt2/tied").architecture.width
    found = describer.extreme_tokens(torch.zeros(2, width), VOCABULARY)
    assert found.largest[1].tolist() == found.smallest[1].tolist() == [*range(VOCABULARY)]
    assert not found.largest_scores.any()
    for value in (1e38, torch.inf, torch.nan):
        write = torch.zeros(2, width)
        write[1, 3] = value
        with pytest.raises(FailedPrecondition, match="scores of tokens are not finite") as caught:
            describer.extreme_tokens(write * 10, 3)
        assert caught.value.reason == "NON_FINITE"


def test_similar_latents_are_those_that_write_alike() -> None:
    dictionary = random_dictionary("D", Point.MLP_ACT, 1)
    dictionary.w_dec[7] = 0
    engine = random_engine("gpt2", dictionaries=[dictionary])
    model: Any = random_gpt2("gpt2", torch.float64)
    describer = Describer(engine.architecture, VOCABULARY)
    (bound,) = engine.hooks.shelf.bind(["D"])
    writes = dictionary.w_dec.double() @ model.transformer.h[1].mlp.c_proj.weight
    cosines = torch.cosine_similarity(writes, writes[LATENT][None])
    write = bound.unit_writes(torch.tensor([LATENT]))[0]
    found = describer.similar_latents(bound, write, 100, LATENT, CancelToken())
    assert len(found) == LATENTS - 2  # less itself, and the one that writes nothing
    for address, cosine in found:
        assert cosine == pytest.approx(float(cosines[address.index or 0]), abs=1e-5)
    values = [cosine for _, cosine in found]
    assert values == sorted(values, reverse=True)
    ((itself, cosine),) = describer.similar_latents(bound, write, 1, None, CancelToken())
    assert itself == parse(f"latent.D.{LATENT}")
    assert cosine == pytest.approx(1.0)


async def test_latents_over_grpc_are_compared_with_all_dictionaries(
    stub: "Stub", model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = [random_dictionary("a", Point.MLP_OUT, 0), random_dictionary("b", Point.RESID_POST, 1)]
    shelf = shelf_of(served, model.architecture, torch.float32)
    monkeypatch.setattr(model.hooks, "shelf", shelf)
    response = await stub.DescribeComponent(request(component="latent.b.3", similar=100))
    assert [each.name for each in response.directions] == ["write", "read"]
    assert len(response.similar) == 2 * LATENTS - 1
    cosines = {
        f"latent.{each.id}.{index}": float(cosine)
        for each in served
        for index, cosine in enumerate(
            torch.cosine_similarity(each.w_dec, served[1].w_dec[3][None])
        )
    }
    for each in response.similar:
        assert each.cosine == pytest.approx(cosines[each.component], abs=1e-5)
    values = [each.cosine for each in response.similar]
    assert values == sorted(values, reverse=True)
    assert [each.id for each in response.manifest.dictionaries] == ["a", "b"]
    assert all(len(each.weights_hash) == 64 for each in response.manifest.dictionaries)
    alone = await stub.DescribeComponent(request(component="latent.b.3", similar=0))
    assert [each.id for each in alone.manifest.dictionaries] == ["b"]
    assert not alone.similar
    code, field, message = await refusal_of(
        stub.DescribeComponent(request(component="latent.b.99"))
    )
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "component")
    assert "valid is 0.." in message


def request(**more: Any) -> component_pb2.DescribeComponentRequest:
    return ParseDict({"component": "head.1.0", **more}, component_pb2.DescribeComponentRequest())


async def test_over_grpc_with_defaults_and_replay(stub: "Stub") -> None:
    response = await stub.DescribeComponent(request())
    assert response.component == "head.1.0"
    assert [each.name for each in response.directions] == [
        f"{circuit}.{number}" for circuit in ("ov", "qk") for number in range(3)
    ]
    norms = np.array([each.norm for each in response.directions]).reshape(2, 3)
    assert (np.diff(norms) <= 0).all()
    assert {len(each.input_tokens) for each in response.directions} == {10}
    assert len(response.similar) == 3  # two layers of two heads, less itself
    canonical = json.loads(response.manifest.request_json)
    assert canonical == {
        "model": "tiny",
        "component": "head.1.0",
        "tokens": 10,
        "similar": 10,
        "circuits": 3,
    }
    replayed = await stub.DescribeComponent(
        Parse(response.manifest.request_json, component_pb2.DescribeComponentRequest())
    )
    assert replayed.manifest.result_id == response.manifest.result_id
    assert replayed.directions == response.directions
    neuron = await stub.DescribeComponent(request(component="neuron.0.5", tokens=2, similar=0))
    assert [each.name for each in neuron.directions] == ["write", "read"]
    assert [len(each.output_tokens) for each in neuron.directions] == [2, 0]
    assert [len(each.input_tokens) for each in neuron.directions] == [0, 2]
    assert not neuron.similar


MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing": ({"component": ""}, "component", "an address is required"),
    "no address": ({"component": "neuron"}, "component", "is not an address"),
    "no such neuron": ({"component": "neuron.0.64"}, "component", "valid is 0..63"),
    "a node": ({"component": "head.0.1~3"}, "component", "name head.0.1"),
    "a part of a head": ({"component": "head.0.1.q"}, "component", "name head.0.1"),
    "a sublayer": ({"component": "mlp.0"}, "component", "has no direction of its own"),
    "the stream": ({"component": "resid_post.0"}, "component", "has no direction of its own"),
    "no dictionary": ({"component": "latent.x.1"}, "component", "no dictionary 'x' is loaded"),
    "no tokens": ({"tokens": 0}, "tokens", "tokens is 0; valid is 1..100"),
    "too many tokens": ({"tokens": 101}, "tokens", "valid is 1..100"),
    "too many similar": ({"similar": 101}, "similar", "valid is 0..100"),
    "too many circuits": ({"circuits": 9}, "circuits", "valid is 1..8"),
    "circuits of a neuron": (
        {"component": "neuron.0.1", "circuits": 2},
        "circuits",
        "only heads have circuits",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_are_refused(name: str, stub: "Stub") -> None:
    change, path, sentence = MALFORMED[name]
    code, field, message = await refusal_of(stub.DescribeComponent(request(**change)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == path
    assert sentence in message
