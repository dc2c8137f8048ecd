"""Every variant of every family runs as Hugging Face runs it, captured and edited in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.common.errors import InvalidArgument
from services.inference.engine.attribution import NormMode
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column, HeadNodes
from services.inference.engine.interventions import Intervention, Zero
from services.inference.engine.loading import load
from services.inference.engine.model import Model
from tests.inference.families.models import (
    HEADS,
    IDS,
    LAST,
    LAYERS,
    WINDOW,
    config_of,
    edited,
    engine_of,
    random_model,
    reference_of,
    untouched,
)
from tests.inference.families.shared import ALL, OBJECTIVE, close, every_variant
from tests.inference.helpers import explained


@every_variant
def test_logits(variant: str) -> None:
    theirs = reference_of(variant).run(IDS, untouched)
    for gradients in (False, True):
        row = Row(IDS, final_norm_frozen=gradients, block_norms_frozen=gradients)
        ours = engine_of(variant).hooks.run([row], ALL, gradients=gradients).logits
        assert close(ours, theirs)
    assert not close(ours.roll(1, dims=1), theirs)  # the comparison can fail


@every_variant
def test_layout(variant: str) -> None:
    """Each captured value is made of the one before by the weights that are laid out for it."""
    engine = engine_of(variant)
    current = engine.hooks.run([Row(IDS)], ALL, gradients=True)
    queries, keys = torch.arange(len(IDS))[:, None], torch.arange(len(IDS))
    for index, layer in enumerate(engine.architecture.layers):
        attn_in, mlp_in, site = (
            current.attn_in[index],
            current.mlp_in[index],
            current.attention[index],
        )
        assert close(attn_in, layer.attn_norm.module(current.block_inputs[index]))
        mlp_reads = current.block_inputs[index]
        if not layer.parallel:
            mlp_reads = mlp_reads + current.attn_write[index]
        assert close(current.middles[index], mlp_reads)
        assert close(mlp_in, layer.mlp_norm.module(mlp_reads))

        scores = site.scores(0, layer.scaling)
        if layer.attn_softcap is not None:
            scores = (scores / layer.attn_softcap).tanh() * layer.attn_softcap
        window = layer.window or len(IDS)
        masked = (keys > queries) | (keys <= queries - window)
        probabilities = scores.masked_fill(masked, float("-inf")).softmax(-1)
        assert close(site.used(0), probabilities)
        # Rotation changes no length of a pair of coordinates: the norms of q, k, v must agree.
        for weight, bias, norm, rotated in (
            (layer.w_q, layer.b_q, layer.q_norm, site.query[0]),
            (layer.w_k, layer.b_k, layer.k_norm, site.key[0]),
        ):
            projected = torch.einsum("hed,td->hte", weight, attn_in[0])
            projected = projected if bias is None else projected + bias[:, None]
            if norm is not None:
                projected = projected / norm.scale(projected) * norm.gain
            assert close(rotated.norm(dim=-1), projected.norm(dim=-1))
        values = torch.einsum("hed,td->hte", layer.w_v, attn_in[0])
        values = values if layer.b_v is None else values + layer.b_v[:, None]
        assert close(site.values[0], values)
        z = site.used(0) @ site.values_per_head(0)
        assert close(site.z[0].transpose(0, 1), z)
        write = torch.einsum("hqe,hed->qd", z, layer.w_o)
        write = write if layer.b_o is None else write + layer.b_o
        assert close(current.attn_write[index][0], _behind(write, current.attn_scale[index]))

        gates = mlp_in @ layer.w_in.T
        gates = gates if layer.b_in is None else gates + layer.b_in
        assert close(current.gates[index], gates)
        activations = layer.activation(gates)
        assert layer.gated is bool(current.ups)
        if layer.w_up is not None:
            ups = mlp_in @ layer.w_up.T
            ups = ups if layer.b_up is None else ups + layer.b_up
            assert close(current.ups[index], ups)
            activations = activations * ups
        assert close(current.neurons[index], activations)
        write = current.neurons[index][0] @ layer.w_out
        write = write if layer.b_out is None else write + layer.b_out
        assert close(current.mlp_write[index][0], _behind(write, current.mlp_scale[index]))
        after = mlp_reads + current.mlp_write[index]
        after = after + current.attn_write[index] if layer.parallel else after
        assert close(current.resid_post(index), after)


def _behind(write: Tensor, scale: Tensor | None) -> Tensor:
    return write if scale is None else write / scale[0]


@every_variant
def test_loading(variant: str, tmp_path: Path) -> None:
    random_model(variant, torch.float32, "eager").save_pretrained(tmp_path)
    device = torch.device("cpu")
    model = Model(load("tiny", str(tmp_path), None, device, torch.float32))
    model.warm_up()
    ours = model.hooks.run([Row(IDS)], ALL, gradients=False).logits
    assert close(ours, reference_of(variant).run(IDS, untouched))


@every_variant
def test_norm_modes(variant: str) -> None:
    engine = engine_of(variant)
    free = engine.hooks.run([Row(IDS)], ALL, gradients=True)
    row = Row(IDS, final_norm_frozen=True, block_norms_frozen=True)
    frozen = engine.hooks.run([row], ALL, gradients=True)
    assert torch.equal(free.logits, frozen.logits)
    totals = {
        round(float(explanation.groups[1].column(Column.TOTAL_EFFECT).double().norm()), 5)
        for norm_mode in NormMode
        for explanation in engine.explain(explained(IDS, objective=OBJECTIVE), norm_mode=norm_mode)
    }
    assert len(totals) == len(NormMode)  # and each mode has gradients of its own


ABLATED: list[tuple[str, str, int, Any]] = [
    ("neuron.1.7~3", "neurons", 1, (0, 3, 7)),
    ("head.1.2~6", "z", 1, (0, 6, 2)),
    ("head.0.1", "z", 0, (0, slice(None), 1)),
    ("head.1.3~6-4", "probabilities", 1, (0, 3, 6, 4)),
    ("attn.1~5", "attn", 1, (0, 5)),
    ("mlp.2~8", "mlp", 2, (0, 8)),
    ("embed~2", "embed", None, (0, 2)),  # type: ignore[list-item]
]


@every_variant
def test_ablation(variant: str) -> None:
    engine, reference = engine_of(variant), reference_of(variant)
    clean = reference.run(IDS, untouched)
    for address, kind, layer, at in ABLATED:
        edits = engine.edits(Intervention(parse(address), Zero()), tokens=len(IDS))
        ours = engine.hooks.run([Row(IDS, edits)], ALL, gradients=False).logits
        theirs = reference.run(IDS, edited((kind, layer, at, torch.zeros_like)))
        assert close(ours, theirs), address
        assert not close(ours, clean), address


@every_variant
def test_visible_pairs(variant: str) -> None:
    engine = engine_of(variant)
    config = config_of(variant)
    types = getattr(config, "layer_types", None) or ["full_attention"] * LAYERS
    windows = [WINDOW if kind == "sliding_attention" else None for kind in types]
    if variant == "mistral/window":
        windows = [WINDOW] * LAYERS
    assert engine.architecture.shape.windows == tuple(windows)
    (explanation,) = engine.explain(explained(IDS, objective=OBJECTIVE))
    for group in explanation.groups:
        if not isinstance(group, HeadNodes):
            continue
        layer = group.address(0).layer
        assert layer is not None
        window = windows[layer] or len(IDS)
        visible = [
            Address(Kind.HEAD, layer, head, position=query, key=key)
            for head in range(HEADS)
            for query in ALL
            for key in range(max(0, query - window + 1), query + 1)
        ]
        assert [group.address(index) for index in range(group.size)] == visible
        assert [group.find(node) for node in visible] == list(range(group.size))
        assert group.column(Column.ACTIVATION).min() > 0
        hidden = parse(f"head.{layer}.1~{LAST}-{LAST - WINDOW}")
        if windows[layer] is None:
            engine.edits(Intervention(hidden, Zero()), tokens=len(IDS))
            continue
        assert group.find(hidden) is None
        with pytest.raises(InvalidArgument, match=rf"window of 4 tokens.*in {LAST - 3}\.\.{LAST}"):
            engine.edits(Intervention(hidden, Zero()), tokens=len(IDS))
