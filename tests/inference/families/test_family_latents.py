"""Dictionaries in every variant of every family, mixtures of experts included."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.common.errors import FailedPrecondition
from services.inference.engine import verification
from services.inference.engine.attribution import NormMode
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.dictionaries.dictionary import Dictionary, InputNorm, NormKind
from services.inference.engine.dictionaries.sites import Point, Site
from services.inference.engine.interventions import Intervention, Scale, SetTo, Zero
from services.inference.engine.shelving import widths_of
from services.inference.engine.verification import Ablation
from tests.inference.families.models import (
    ALL_VARIANTS,
    IDS,
    LAST,
    NEURONS,
    WIDTH,
    edited,
    engine_of,
    reference_of,
    untouched,
)
from tests.inference.families.shared import ALL, OBJECTIVE, close, direct_sums
from tests.inference.helpers import Engine, explained, shelf_of
from tests.inference.planted import ByHand, random_dictionary

LAYER = 2  # of experts in both variants that have them
DICTIONARIES = ("z", "attn", "attn_out", "mlp_act", "mlp", "mlp_out", "transcoder")
"""By the name of their site in the reference: `attn_out` and `mlp_out` lie before a post-norm."""


def dictionary(engine: Engine, name: str) -> Dictionary:
    architecture = engine.architecture
    widths = {
        Point.Z: architecture.n_heads * architecture.head_width,
        Point.MLP_ACT: NEURONS,
    }
    points = {
        "z": Point.Z,
        "attn": Point.ATTN_OUT,
        "attn_out": Point.ATTN_OUT,
        "mlp_act": Point.MLP_ACT,
    }
    return random_dictionary(
        "D",
        points.get(name, Point.MLP_OUT),
        LAYER,
        "topk" if name == "mlp_out" else "relu",
        InputNorm(NormKind.LAYER_NORM) if name == "attn" else None,
        reads=Point.MLP_IN if name == "transcoder" else None,
        skip=name == "transcoder",
        before_post_norm=name in ("attn_out", "mlp_out"),
        width=lambda point: widths.get(point, WIDTH),
    )


@contextmanager
def served(variant: str, name: str) -> Iterator[tuple[Engine, Dictionary]]:
    engine = engine_of(variant)
    found = dictionary(engine, name)
    empty = engine.hooks.shelf
    engine.hooks.shelf = shelf_of([found], engine.architecture, torch.float32)
    try:
        yield engine, found
    finally:
        engine.hooks.shelf = empty


def exists(variant: str, name: str) -> bool:
    return name != "mlp_act" or not ALL_VARIANTS[variant].experts


def ablated(variant: str, name: str, found: Dictionary) -> Tensor:
    """Logits of Hugging Face's pass without latent 3, and with latent 7 at 2 at token 5."""
    site = {"mlp_act": "neurons", "transcoder": "mlp"}.get(name, name)
    reads = "mlp_in" if name == "transcoder" else site
    seen: dict[str, Tensor] = {}
    formulas = ByHand(found)

    def change(target: Tensor) -> Tensor:
        x = seen["x"]
        latents = formulas.latents(x)
        after = latents.clone()
        after[..., 3] = 0
        after[:, 5, 7] = 2.0
        write = formulas.write(after, x) - formulas.write(latents, x)
        return target + write.view_as(target)

    def hook(kind: str, layer: int | None, values: Tensor) -> Tensor:
        if layer == LAYER and kind == reads:
            seen["x"] = values.flatten(2)
        return edited((site, LAYER, (slice(None),), change))(kind, layer, values)

    return reference_of(variant).run(IDS, hook)


@pytest.mark.parametrize("variant", list(ALL_VARIANTS))
def test_latents(variant: str) -> None:
    clean = reference_of(variant).run(IDS, untouched)
    for name in DICTIONARIES:
        if not exists(variant, name):
            continue
        with served(variant, name) as (engine, found):
            without = engine.hooks.run([Row(IDS)], ALL, gradients=False).logits
            read = engine.hooks.run([Row(IDS)], ALL, gradients=False, dictionaries=["D"]).logits
            assert torch.equal(read, without)
            edits = engine.edits(
                Intervention(parse("latent.D.3"), Zero()),
                Intervention(parse("latent.D.7~5"), SetTo(2.0)),
                tokens=len(IDS),
            )
            ours = engine.hooks.run([Row(IDS, edits)], ALL, gradients=False).logits
            assert close(ours, ablated(variant, name, found), 2e-5), name
            assert not close(ours, clean, 1e-4), name


@pytest.mark.parametrize("variant", list(ALL_VARIANTS))
def test_sums_close_with_latents_in_the_table(variant: str) -> None:
    for name in DICTIONARIES:
        if not exists(variant, name):
            continue
        with served(variant, name) as (engine, _):
            wanted = [
                Intervention(parse("latent.D.3"), SetTo(1.5)),
                Intervention(parse(f"error.D~{LAST}"), Scale(0.25)),
                Intervention(parse(f"mlp.{LAYER}"), Scale(0.5)),
            ]
            for edits in ((), engine.edits(*wanted, tokens=len(IDS))):
                run = explained(IDS, *edits, objective=OBJECTIVE)
                for norm_mode in (NormMode.FINAL_NORM_FROZEN, NormMode.ALL_NORMS_FROZEN):
                    (explanation,) = engine.explain(run, norm_mode=norm_mode, dictionaries=["D"])
                    total, size = direct_sums(explanation)
                    assert abs(total - explanation.value) <= 1e-5 * size, name
                    if not edits:
                        without = total - explanation.remainder["error.D"]
                        assert abs(without - explanation.value) > 1e-4 * size, name


@pytest.mark.parametrize("variant", list(ALL_VARIANTS))
def test_verified_latents(variant: str) -> None:
    """Resumed where each starts, under edits of the same dictionary, against whole passes."""
    for name in DICTIONARIES:
        if not exists(variant, name):
            continue
        with served(variant, name) as (engine, _):
            base = [
                Intervention(parse("latent.D.4"), SetTo(1.5)),
                Intervention(parse("mlp.1~5"), Scale(0.5)),
            ]
            edits = engine.edits(*base, tokens=len(IDS))
            site = engine.hooks.run([Row(IDS)], [0], gradients=False, dictionaries=["D"])
            latent = int(site.sites.found["D"].clean(0, len(IDS))[LAST].argmax())
            nodes = [parse(f"latent.D.{latent}{place}") for place in ("", f"~{LAST}", "~5")]
            ablations = [
                Ablation(node, *engine.edits(Intervention(node, Zero()), tokens=len(IDS)))
                for node in nodes
            ]
            rows = [Row(IDS, edits), *(Row(IDS, (*edits, each.edit)) for each in ablations)]
            logits = engine.hooks.run(rows, [LAST], gradients=False).logits[:, 0]
            whole, *without = (float(OBJECTIVE.of_logits(each)) for each in logits)
            size = max(map(abs, (whole, *without)))
            run = explained(IDS, *edits, objective=OBJECTIVE)
            begun = verification.begin(engine.hooks, run, ablations, CancelToken(), 1)
            chunks = (begun.chunk(number, CancelToken()) for number in range(len(begun.chunks)))
            found = {each.node: each.effect for chunk in chunks for each in chunk}
            for node, value in zip(nodes, without, strict=True):
                assert found[node] == pytest.approx(whole - value, abs=2e-5 * size), name
            assert abs(found[nodes[1]]) > 1e-4 * size, name


def test_a_site_on_the_other_side_of_a_post_norm_is_another_site() -> None:
    """The same weights read before and behind it leave other errors."""
    variant = "gemma2/softcap"
    found = []
    for name in ("mlp", "mlp_out"):
        with served(variant, name) as (engine, dictionary):
            assert dictionary.header.site_out.before_post_norm is (name == "mlp_out")
            (explanation,) = engine.explain(explained(IDS, objective=OBJECTIVE), dictionaries=["D"])
            found.append(explanation.remainder["error.D"])
    assert found[0] != pytest.approx(found[1], rel=1e-2)


def test_experts_have_no_neurons_for_a_dictionary_to_read() -> None:
    engine = engine_of("qwen3_moe/mixed")
    widths, found = widths_of(engine.architecture), dictionary(engine, "mlp_act")
    with pytest.raises(FailedPrecondition, match="this model has no mlp_act"):
        widths.check(found.header)
    site = Site(Point.MLP_ACT, 1)
    widths.check(replace(found.header, site_in=site, site_out=site))
