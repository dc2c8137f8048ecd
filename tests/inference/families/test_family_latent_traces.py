"""A latent's value as the objective behind post-norms and QK-norms, and in parallel blocks.

Against Hugging Face's own pass with plain PyTorch hooks, in float64.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from services.inference.engine import attention
from services.inference.engine.architecture import resolve
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.forward import Hooks
from tests.inference.families import models as families
from tests.inference.helpers import Engine, direct_sums, explained, matrices, shelf_of
from tests.inference.planted import random_dictionary
from tests.inference.test_traced_latents import (
    DOUBLE,
    LAYER,
    LAYER_NORM,
    TOKEN,
    norm_scale,
    pre_by_hand,
    traced,
)

GEMMA = "gemma2/softcap"
SITES = {
    "z": (Point.Z, False),
    "attn_out": (Point.ATTN_OUT, False),
    "attn_out before the post-norm": (Point.ATTN_OUT, True),
    "mlp_act": (Point.MLP_ACT, False),
    "mlp_out": (Point.MLP_OUT, False),
    "mlp_out before the post-norm": (Point.MLP_OUT, True),
}


def family_width(point: Point) -> int:
    return {Point.Z: 48, Point.MLP_ACT: families.NEURONS}.get(point, families.WIDTH)


def engine_of(dictionary: Dictionary, variant: str = GEMMA) -> Engine:
    dtype = dictionary.w_enc.dtype
    weights = families.random_model(variant, dtype, attention.IMPLEMENTATION)
    architecture = resolve(weights)
    engine = Engine(Hooks(weights, architecture), architecture)
    engine.hooks.shelf = shelf_of([dictionary], architecture, dtype)
    return engine


@dataclass
class Shown:
    """What Hugging Face's pass shows."""

    embed: Tensor
    at: dict[str, Tensor]
    """By name of `SITES`, [T, w], of layer 1."""


def shown(reference: Any, held: families.Scales) -> Shown:
    found: dict[str, Tensor] = {}

    def site(kind: str, layer: int | None, values: Tensor) -> Tensor:
        if kind == "embed":
            values = values.detach().requires_grad_()
            found["embed"] = values
        elif layer == LAYER:
            found[kind] = values
        return values

    reference.run(families.IDS, site, held)
    block = reference.blocks[LAYER]
    z, neurons = found["z"].flatten(2)[0], found["neurons"][0]
    return Shown(
        found["embed"],
        {
            "z": z,
            "attn_out": found["attn"][0],
            "attn_out before the post-norm": block.self_attn.o_proj(z),
            "mlp_act": neurons,
            "mlp_out": found["mlp"][0],
            "mlp_out before the post-norm": block.mlp.down_proj(neurons),
        },
    )


@pytest.mark.parametrize("mode", NormMode)
@pytest.mark.parametrize("name", SITES)
def test_sites_around_a_post_norm(name: str, mode: NormMode) -> None:
    """Value, slopes at the embedding and constants are those of Hugging Face's pass, with just the
    scales held that lie between x_ref and the site."""
    point, before = SITES[name]
    dictionary = random_dictionary(
        "D",
        point,
        LAYER,
        norm=LAYER_NORM,
        before_post_norm=before,
        width=family_width,
        dtype=DOUBLE,
    )
    with families.KeepDouble():
        engine = engine_of(dictionary)
        (explanation,) = engine.explain(
            explained(families.IDS, objective=traced(engine)), norm_mode=mode
        )
        reference = families.Reference(GEMMA, DOUBLE)
        scales = reference.scales(families.IDS)
        block = reference.blocks[LAYER]
        of_attention = point in (Point.Z, Point.ATTN_OUT)
        reading = [block.input_layernorm if of_attention else block.pre_feedforward_layernorm]
        if name in ("attn_out", "mlp_out"):
            reading.append(
                block.post_attention_layernorm if of_attention else block.post_feedforward_layernorm
            )
        held = {
            NormMode.LIVE: {},
            NormMode.FINAL_NORM_FROZEN: {module: scales[module] for module in reading},
            NormMode.ALL_NORMS_FROZEN: scales,
        }[mode]
        biased = block.self_attn if of_attention else block.mlp
        leaves = [
            parameter.requires_grad_()
            for label, parameter in biased.named_parameters()
            if label.endswith("bias") and not (point is Point.Z and label.startswith("o_proj"))
        ]
        seen = shown(reference, held)
        x = seen.at[name]
        norm_in = None if mode is NormMode.LIVE else norm_scale(dictionary, x).detach()
        leaves += [dictionary.b_in.requires_grad_(), dictionary.b_enc.requires_grad_()]
        value = pre_by_hand(dictionary, x, norm_in)[TOKEN]
        slope, *gradients = torch.autograd.grad(value, [seen.embed, *leaves])
    assert explanation.value == pytest.approx(float(value.detach()), rel=1e-8)
    theirs = (seen.embed * slope).sum(-1)[0].detach()
    ours = explanation.groups[0].column(Column.TOTAL_EFFECT)
    assert (ours - theirs).abs().max() <= 1e-7 * theirs.abs().max()
    constants = sum(float((a * b).sum().detach()) for a, b in zip(leaves, gradients, strict=True))
    assert explanation.remainder["bias.read"] == pytest.approx(constants, rel=1e-7)
    if of_attention:
        assert len(leaves) == (5 if point is Point.Z else 6)
    assert_closes(explanation)


def assert_closes(explanation: Explanation) -> None:
    total, size = direct_sums(explanation)
    assert abs(total - explanation.value) <= 1e-5 * size


def test_a_sliding_window_bounds_what_is_read() -> None:
    dictionary = random_dictionary("D", Point.Z, 0, width=family_width)
    engine = engine_of(dictionary)
    objective = traced(engine, token=families.LAST)
    first = families.LAST - families.WINDOW + 1
    assert objective.reads == tuple(range(first, families.LAST + 1))
    (explanation,) = engine.explain(explained(families.IDS, objective=objective))
    embed = explanation.groups[0].column(Column.TOTAL_EFFECT)
    assert not embed[:first].any()
    assert embed[first:].all()
    assert_closes(explanation)


def slopes_by_hand(
    variant: str, kind: str, dictionary: Dictionary, held: list[str]
) -> tuple[float, Tensor]:
    """J and e . G(e) [T] of Hugging Face's pass, the scales of these norms of layer 1 held."""
    reference = families.Reference(variant, DOUBLE)
    scales = reference.scales(families.IDS)
    block = reference.blocks[LAYER]
    found: dict[str, Tensor] = {}

    def site(name: str, layer: int | None, values: Tensor) -> Tensor:
        if name == "embed":
            values = values.detach().requires_grad_()
        if layer in (None, LAYER):
            found[name] = values
        return values

    norms = {block.get_submodule(name) for name in held}
    reference.run(families.IDS, site, {norm: scales[norm] for norm in norms})
    x = found[kind].flatten(2)[0]
    value = pre_by_hand(dictionary, x, norm_scale(dictionary, x).detach())[TOKEN]
    (slope,) = torch.autograd.grad(value, found["embed"])
    return float(value.detach()), (found["embed"] * slope).sum(-1)[0].detach()


@pytest.mark.parametrize(("point", "kind"), [(Point.Z, "z"), (Point.ATTN_OUT, "attn")])
def test_norms_of_queries_and_keys_are_live(point: Point, kind: str) -> None:
    """They are a part of the sublayer, which is live between x_ref and the dictionary."""
    dictionary = random_dictionary(
        "D", point, LAYER, norm=LAYER_NORM, width=family_width, dtype=DOUBLE
    )
    variant = "qwen3/qk-norm"
    with families.KeepDouble():
        engine = engine_of(dictionary, variant)
        (explanation,) = engine.explain(explained(families.IDS, objective=traced(engine)))
        norms = ["input_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
        value, theirs = slopes_by_hand(variant, kind, dictionary, norms[:1])
        _, held = slopes_by_hand(variant, kind, dictionary, norms)
    ours = explanation.groups[0].column(Column.TOTAL_EFFECT)
    assert explanation.value == pytest.approx(value, rel=1e-8)
    assert (ours - theirs).abs().max() <= 1e-7 * theirs.abs().max()
    assert (ours - held).abs().max() > 1e-3 * held.abs().max()
    assert_closes(explanation)


@pytest.mark.parametrize("transcoder", [False, True])
def test_in_a_parallel_block_the_mlp_reads_what_attention_reads(transcoder: bool) -> None:
    dictionary = random_dictionary(
        "D",
        Point.MLP_OUT,
        LAYER,
        norm=LAYER_NORM,
        reads=Point.MLP_IN if transcoder else None,
        width=family_width,
        dtype=DOUBLE,
    )
    variant = "gpt_neox/parallel"
    with families.KeepDouble():
        engine = engine_of(dictionary, variant)
        objective = traced(engine)
        assert str(objective.point(engine.architecture)) == "resid_post.0"
        (explanation,) = engine.explain(explained(families.IDS, objective=objective))
        if not transcoder:
            value, theirs = slopes_by_hand(variant, "mlp", dictionary, ["post_attention_layernorm"])
            ours = explanation.groups[0].column(Column.TOTAL_EFFECT)
            assert explanation.value == pytest.approx(value, rel=1e-8)
            assert (ours - theirs).abs().max() <= 1e-7 * theirs.abs().max()
    direct = matrices(explanation, Column.DIRECT_EFFECT)
    assert not direct[1 + LAYER].any()  # attention of its own layer
    assert direct[LAYER].any()
    assert_closes(explanation)
    _, size = direct_sums(explanation)
    assert (abs(explanation.remainder["rest"]) <= 1e-9 * size) is transcoder


PLACES = {
    "z": (Point.Z, None),
    "attn_out": (Point.ATTN_OUT, None),
    "mlp_out": (Point.MLP_OUT, None),
    "transcoder": (Point.MLP_OUT, Point.MLP_IN),
    "resid_post": (Point.RESID_POST, None),
}


@pytest.mark.parametrize("variant", families.ALL_VARIANTS)
def test_sums_close_in_every_family(variant: str) -> None:
    shape = families.engine_of(variant).architecture
    widths = {Point.Z: shape.n_heads * shape.head_width}
    for name, (point, reads) in PLACES.items():
        dictionary = random_dictionary(
            "D",
            point,
            LAYER,
            norm=LAYER_NORM,
            reads=reads,
            width=lambda at: widths.get(at, families.WIDTH),
        )
        engine = engine_of(dictionary, variant)
        (explanation,) = engine.explain(explained(families.IDS, objective=traced(engine)))
        assert explanation.value != 0
        assert_closes(explanation)
        if name in ("transcoder", "resid_post"):
            _, size = direct_sums(explanation)
            assert abs(explanation.remainder["rest"]) <= 1e-5 * size
