"""Activations by name are those of a pass written by hand; the lens ends at the model's logits."""

import json
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.json_format import Parse, ParseDict
from tdb.inference.v1 import run_pb2
from torch import Tensor

from services.common.addresses import parse
from services.common.errors import FailedPrecondition, InvalidArgument
from services.inference import points_page, request_points
from services.inference.engine import activations, points
from services.inference.engine.captured import Pass, Row
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sites import Point as SitePoint
from services.inference.engine.interventions import Intervention, SetTo, Zero
from services.inference.engine.lens import default_points, lens_logits
from services.inference.engine.points import Point
from tests.inference import plain
from tests.inference.helpers import LAYERS, SENTENCE, Engine, random_engine, random_model
from tests.inference.planted import LATENTS, ByHand, random_dictionary
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
LAYER = 1
PLAIN = {
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "q": "q",
    "k": "k",
    "v": "v",
    "attn_probs": "probabilities",
    "z": "z",
    "attn_out": "attn",
    "mlp_act": "neurons",
    "mlp_out": "mlp",
}
"""Per-layer points and the sites of the pass written by hand that they are."""
FAMILIES = ("gpt2", "llama")
DICTIONARY = random_dictionary("D", SitePoint.MLP_ACT, LAYER)


def everything(engine: Engine, *edits: Intervention) -> tuple[Pass, frozenset[Point]]:
    of = {"L": f".{LAYER}", "D": ".D", "": ""}
    names = [kind.name + of[kind.of] for kind in points.KINDS]
    shapes = engine.hooks.shelf.shapes
    wanted = frozenset(points.parse(name, engine.architecture, shapes) for name in names)
    # A longer row beside it: pads must not show.
    rows = [Row(IDS, engine.edits(*edits, tokens=len(IDS))), Row((*IDS, 9, 9, 9))]
    current = engine.hooks.run(
        rows, range(len(IDS)), gradients=False, keep=wanted, dictionaries=["D"]
    )
    return current, wanted


def engine_with(family: str, *others: Dictionary, dtype: torch.dtype = torch.float32) -> Engine:
    return random_engine(family, dtype, [DICTIONARY, *others])


def by_hand(family: str, *changes: Any) -> dict[str, Tensor]:
    """Every site of layer 1, and what the others are of."""
    model: Any = random_model(family)
    seen: dict[str, Tensor] = {}
    change = plain.edited(*changes)

    def remember(kind: str, layer: int | None, values: Tensor) -> Tensor:
        values = change(kind, layer, values)
        if layer in (LAYER, None):
            seen[kind] = values
        if (kind, layer) == ("resid_post", LAYERS - 1):
            seen["last"] = values
        return values

    logits = plain.forward(model, IDS, remember)
    gpt2 = family == "gpt2"
    block = (model.transformer.h if gpt2 else model.model.layers)[LAYER]
    found = {name: seen[site] for name, site in PLAIN.items()}
    for name in ("q", "k", "v"):
        found[name] = found[name].transpose(0, 1)
    found["embed"] = seen["embed"]
    norm = block.ln_2 if gpt2 else block.post_attention_layernorm
    found["mlp_in"] = norm(seen["resid_mid"])
    found["attn_scores"] = seen["q"] @ seen["k"].transpose(1, 2) / seen["q"].shape[-1] ** 0.5
    final = model.transformer.ln_f if gpt2 else model.model.norm
    found["final_norm"] = final(seen["last"])
    found["logits"] = logits
    found["latents"] = ByHand(DICTIONARY).latents(seen["neurons"])
    return found


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


HEAD_VALUE = torch.linspace(1, -2, 4, dtype=torch.float64)
EDITS: tuple[tuple[Intervention, ...], tuple[Any, ...]] = (
    (
        Intervention(parse("head.1.2~6-3"), SetTo(0.7)),
        Intervention(parse("head.1.0~4"), Zero()),
        Intervention(parse("head.1.1.k~2"), SetTo(HEAD_VALUE)),
        Intervention(parse("neuron.1.5~3"), SetTo(2.0)),
        Intervention(parse("mlp.1~7"), Zero()),
    ),
    (
        ("probabilities", 1, (2, 6, 3), lambda x: torch.full_like(x, 0.7)),
        ("probabilities", 1, (0, 4), torch.zeros_like),
        ("k", 1, (1, 2), lambda x: HEAD_VALUE.to(x)),
        ("neurons", 1, (3, 5), lambda x: torch.full_like(x, 2.0)),
        ("mlp", 1, (7,), torch.zeros_like),
    ),
)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_is_what_it_is_by_hand(family: str, edited: bool) -> None:
    engine = engine_with(family)
    interventions, changes = EDITS if edited else ((), ())
    current, wanted = everything(engine, *interventions)
    theirs = by_hand(family, *changes)
    unedited = by_hand(family)
    different = 0
    for point in wanted:
        ours = activations.read(point, engine.architecture, current, 0)
        name = "embed" if point.name == "resid_pre" else point.name
        expected = by_hand_before(family, changes) if point == BEFORE else theirs[name]
        assert ours.shape == points.shape(point, engine.architecture, len(IDS))
        assert ours.nbytes == activations.size(point, engine.architecture, len(IDS))
        assert close(ours, expected), point
        different += point != BEFORE and not close(ours, unedited[name])
    assert (different > 8) == edited
    assert len(wanted) == len(points.KINDS)


BEFORE = Point("resid_post", LAYER - 1)


def by_hand_before(family: str, changes: Any) -> Tensor:
    """What the layer reads."""
    seen: list[Tensor] = []

    def remember(kind: str, layer: int | None, values: Tensor) -> Tensor:
        if (kind, layer) == ("resid_post", LAYER - 1):
            seen.append(values)
        return values

    plain.forward(random_model(family), IDS, remember)
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_points_agree_with_each_other(family: str) -> None:
    engine = engine_with(family)
    current, _ = everything(engine)
    layer = engine.architecture.layers[LAYER]

    def value(name: str) -> Tensor:
        return activations.read(Point(name, LAYER), engine.architecture, current, 0)

    scores = value("attn_scores")
    future = torch.ones(len(IDS), len(IDS)).triu(1).bool()
    assert torch.isfinite(scores).all()
    assert close(scores.masked_fill(future, float("-inf")).softmax(-1), value("attn_probs"))
    assert value("attn_probs")[:, future].abs().max() == 0
    by_head = value("attn_probs") @ value("v").transpose(0, 1)
    assert close(by_head.transpose(0, 1), value("z"))
    assert layer.mlp_down is not None
    assert close(layer.mlp_down(value("mlp_act")), value("mlp_out"))
    assert close(value("resid_mid") + value("mlp_out"), value("resid_post"))


@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_what_the_next_projection_reads_where_latents_are_edited(family: str) -> None:
    of_heads = random_dictionary("Z", SitePoint.Z, LAYER)
    engine = engine_with(family, of_heads)
    wanted = {
        "D": Intervention(parse("latent.D.3"), SetTo(2.0)),
        "Z": Intervention(parse("latent.Z.5~4"), SetTo(-1.0)),
    }
    current, _ = everything(engine, *wanted.values())
    plain, _ = everything(engine)
    layer = engine.architecture.layers[LAYER]

    def value(name: str, of: Pass = current) -> Tensor:
        return activations.read(Point(name, LAYER), engine.architecture, of, 0)

    assert layer.mlp_down is not None
    assert close(layer.mlp_down(value("mlp_act")), value("mlp_out"))
    assert close(layer.attention_out(value("z").flatten(1)), value("attn_out"))
    assert not close(value("z"), value("z", plain))
    # The neurons that the dictionary encoded, without what the edit of its latents adds.
    assert not close(layer.mlp_down(current.neurons[LAYER][0, : len(IDS)]), value("mlp_out"))
    latents = Point("latents", dictionary="D", latents=LATENTS)
    f = activations.read(latents, engine.architecture, current, 0)
    assert bool((f[:, 3] == 2.0).all())
    clean = ByHand(DICTIONARY).latents(current.neurons[LAYER][0, : len(IDS)])
    clean[:, 3] = 2.0
    assert close(f, clean)


def test_latents_of_a_transcoder_are_of_what_it_reads() -> None:
    transcoder = random_dictionary("T", SitePoint.MLP_OUT, LAYER, reads=SitePoint.MLP_IN)
    engine = engine_with("llama", transcoder)
    wanted = [
        points.parse(name, engine.architecture, engine.hooks.shelf.shapes)
        for name in ("latents.T", f"mlp_in.{LAYER}")
    ]
    current = engine.hooks.run(
        [Row(IDS)], [0], gradients=False, keep=frozenset(wanted), dictionaries=["T"]
    )
    f, read = (activations.read(each, engine.architecture, current, 0) for each in wanted)
    assert close(f, ByHand(transcoder).latents(read))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_ends_at_the_models_own_logits(family: str) -> None:
    engine = random_engine(family)
    wanted = default_points(engine.architecture)
    assert list(map(str, wanted)) == ["embed", "resid_post.0", "resid_post.1", "resid_post.2"]
    current = engine.hooks.run([Row(IDS)], range(8), gradients=False, keep=frozenset(wanted))
    model: Any = random_model(family)
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    for point in wanted:
        residual = activations.read(point, engine.architecture, current, 0)
        lens = lens_logits(engine.architecture, residual[None])[0]
        assert torch.equal(lens, model.lm_head(norm(residual)))
        assert torch.equal(lens, current.logits[0]) == (point == wanted[-1])


def test_half_precision_is_given_as_it_is() -> None:
    engine = engine_with("llama", dtype=torch.bfloat16)
    current, wanted = everything(engine)
    theirs = by_hand("llama")
    for point in wanted:
        ours = activations.read(point, engine.architecture, current, 0)
        assert ours.dtype is torch.bfloat16
        assert ours.nbytes == activations.size(point, engine.architecture, len(IDS))
        if point != BEFORE and point.name != "attn_scores":
            name = "embed" if point.name == "resid_pre" else point.name
            worst = (ours.float() - theirs[name]).abs().max() / theirs[name].abs().max()
            assert worst < 0.1, point


def test_non_finite_activations_are_refused_by_name() -> None:
    engine = random_engine()
    wanted = frozenset({Point("attn_scores", 1)})
    current = engine.hooks.run([Row(IDS)], [0], gradients=False, keep=wanted)
    current.attention[1].query[0, 0, 0] = 3e38
    with pytest.raises(FailedPrecondition, match=r"attn_scores\.1 is not finite") as refusal:
        activations.read(Point("attn_scores", 1), engine.architecture, current, 0)
    assert refusal.value.reason == "NON_FINITE"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a point; the points are embed, resid_pre.L"),
        ("neuron.1.2", "is not a point"),
        ("mlp_out", "a layer is required, for example mlp_out.0"),
        ("mlp_out.01", "a layer is required"),
        ("mlp_out.3", "layer 3 does not exist; valid is 0..2"),
        ("logits.0", "there is one logits"),
        ("embed~3", "is not a point"),
        ("latents", "the id of a dictionary served with this model is required; there are latents"),
        ("latents.E", "there are latents.D"),
        ("latents.D.3", "there are latents.D"),
    ],
)
def test_what_is_no_point_is_refused(text: str, says: str) -> None:
    engine = engine_with("gpt2")
    with pytest.raises(InvalidArgument, match=says):
        points.parse(text, engine.architecture, engine.hooks.shelf.shapes)


def test_the_page_is_written_from_the_registry() -> None:
    assert points_page.PAGE.read_text() == points.as_page()


RUN: dict[str, Any] = {
    "prompt": {"text": SENTENCE[:-6]},
    "interventions": [{"target": "head.1.0~4", "zero": {}}],
}


def run_request(**more: Any) -> run_pb2.RunRequest:
    return ParseDict({"run": RUN, **more}, run_pb2.RunRequest())


async def test_run_gives_the_lens_and_whole_activations(stub: "Stub") -> None:
    request = run_request(
        positions={"list": {"positions": [2, 5]}},
        topK=4,
        tokens=[{"text": " Mary"}],
        logitLens={"points": ["resid_post.1", "resid_pre.0", "resid_mid.0"]},
        activations=["attn_probs.1", "resid_pre.1", "logits"],
    )
    response = await stub.Run(request)
    assert [each.point for each in response.logit_lens] == ["embed", "resid_mid.0", "resid_post.1"]
    for reading in response.logit_lens:
        assert [each.position for each in reading.next_tokens] == [2, 5]
        assert {len(each.top) for each in reading.next_tokens} == {4}
    last, model = response.logit_lens[-1].next_tokens, response.next_tokens
    assert [each.top[0].token.id for each in last] == [each.top[0].token.id for each in model]
    assert last[0].named[0].logit == pytest.approx(model[0].named[0].logit, abs=1e-5)
    probabilities, residual, logits = response.activations
    assert [each.point for each in response.activations] == [
        "attn_probs.1",
        "resid_post.0",
        "logits",
    ]
    tokens = len(response.tokens)
    assert list(probabilities.axes) == ["head", "query", "key"]
    assert list(probabilities.tensor.shape) == [2, tokens, tokens]
    pattern = np.frombuffer(probabilities.tensor.data, "<f4").reshape(2, tokens, tokens)
    assert pattern[0, 4].sum() == 0  # the row that was zeroed
    assert pattern[1].sum(-1) == pytest.approx(np.ones(tokens), abs=1e-5)
    assert list(residual.tensor.shape) == [tokens, 16]
    scores = np.frombuffer(logits.tensor.data, "<f4").reshape(tokens, -1)
    assert scores[5, model[1].top[0].token.id] == pytest.approx(model[1].top[0].logit, abs=1e-6)
    canonical = json.loads(response.manifest.request_json)
    assert canonical["activations"] == ["attn_probs.1", "resid_post.0", "logits"]
    replayed = await stub.Run(Parse(response.manifest.request_json, run_pb2.RunRequest()))
    assert replayed.manifest.result_id == response.manifest.result_id
    replayed.manifest.Clear()
    response.manifest.Clear()
    assert replayed == response


async def test_the_lens_by_default_is_of_every_layer(stub: "Stub") -> None:
    response = await stub.Run(run_request(logitLens={}))
    assert [each.point for each in response.logit_lens] == ["embed", "resid_post.0", "resid_post.1"]


MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such point": ({"activations": ["neuron.0.1"]}, "activations[0]", "is not a point"),
    "no such layer": (
        {"activations": ["logits", "q.2"]},
        "activations[1]",
        "layer 2 does not exist; valid is 0..1",
    ),
    "twice by two names": (
        {"activations": ["embed", "resid_pre.0"]},
        "activations[1]",
        "embed is listed twice",
    ),
    "a lens on heads": (
        {"logitLens": {"points": ["embed", "z.0"]}},
        "logit_lens.points[1]",
        "z.0 is not the residual stream",
    ),
    "too many predictions": (
        {"logitLens": {}, "positions": {"all": {}}, "topK": 5000},
        "top_k",
        "3 points of the logit lens",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_read_outs_are_refused(name: str, stub: "Stub") -> None:
    change, path, sentence = MALFORMED[name]
    code, field, message = await refusal_of(stub.Run(run_request(**change)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == path
    assert sentence in message


async def test_over_a_mebibyte_is_refused_and_says_what_streams(
    stub: "Stub", monkeypatch: pytest.MonkeyPatch
) -> None:
    request = run_request(activations=["attn_probs.0", "attn_out.0"])
    tokens = len((await stub.Run(run_request())).tokens)
    monkeypatch.setattr(request_points, "MAX_TENSOR_BYTES", 8 * tokens**2)
    code, field, message = await refusal_of(stub.Run(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == "activations[1]"
    assert f"attn_out.0 alone is {tokens} x 16 numbers" in message
    assert "StreamActivations" in message
    monkeypatch.setattr(request_points, "MAX_TENSOR_BYTES", 8 * tokens**2 + tokens * 64)
    assert len((await stub.Run(request)).activations) == 2
