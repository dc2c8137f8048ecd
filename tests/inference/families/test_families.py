"""What `families.FEATURES` says of every variant of every family holds. One test per feature."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.common.errors import InvalidArgument
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column, EmbedNodes, HeadNodes, NeuronNodes
from services.inference.engine.families import FAMILIES, FEATURES
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.objectives import LogitDiff, LogProb
from services.inference.engine.readouts import read_out
from tests.inference.families import test_running
from tests.inference.families.models import (
    HEADS,
    IDS,
    LAST,
    LAYERS,
    VARIANTS,
    VOCABULARY,
    WIDTH,
    WINDOW,
    KeepDouble,
    Scales,
    config_of,
    edited,
    engine_of,
    reference_of,
    untouched,
)
from tests.inference.helpers import Engine, explained

every_variant = pytest.mark.parametrize("variant", VARIANTS)
ALL = range(len(IDS))
OBJECTIVE = LogitDiff((5, 6), (9, 11), LAST)
VECTOR = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


def difference(logits: Tensor) -> float:
    """`OBJECTIVE` by its definition, from logits [1, T, V]."""
    here = logits[0, LAST].double()
    return float(here[[5, 6]].mean() - here[[9, 11]].mean())


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


def edits_of(engine: Engine) -> dict[str, list[Intervention]]:
    """Interventions whose constants and factors must travel the whole direct path."""
    head = torch.linspace(1, -2, engine.architecture.head_width, dtype=torch.float64)
    middle = (
        [] if engine.architecture.parallel else [Intervention(parse("resid_mid.1"), Scale(1.5))]
    )
    return {
        "plain": [],
        "nodes": [
            Intervention(parse("neuron.1.7"), SetTo(2.5)),
            Intervention(parse("head.1.2"), Zero()),
            Intervention(parse(f"head.2.1~{LAST}-{LAST - 1}"), SetTo(0.8)),
            Intervention(parse(f"head.2.3.v~{LAST - 2}"), Add(head)),
            Intervention(parse(f"head.2.0~{LAST}"), Add(head)),
        ],
        "stream": [
            Intervention(parse("mlp.0"), Scale(0.5)),
            Intervention(parse(f"attn.2~{LAST}"), Add(VECTOR)),
            Intervention(parse("resid_post.1"), Add(VECTOR)),
            *middle,
        ],
    }


def direct_sums(explanation: Explanation) -> tuple[float, float]:
    """Sum of all direct effects and remainder rows, and the sum of their absolute values."""
    columns = [group.column(Column.DIRECT_EFFECT).double() for group in explanation.groups]
    remainder = explanation.remainder.values()
    total = sum(float(column.sum()) for column in columns) + sum(remainder)
    size = sum(float(column.abs().sum()) for column in columns) + sum(map(abs, remainder))
    return total, size


@pytest.mark.parametrize("norm_mode", NormMode)
@every_variant
def test_sums(variant: str, norm_mode: NormMode) -> None:
    engine = engine_of(variant)
    for wanted in edits_of(engine).values():
        run = explained(IDS, *engine.edits(*wanted, tokens=len(IDS)), objective=OBJECTIVE)
        (explanation,) = engine.explain(run, norm_mode=norm_mode)
        total, size = direct_sums(explanation)
        assert abs(total - explanation.value) <= 1e-5 * size
        linear = norm_mode is not NormMode.LIVE and engine.architecture.logit_softcap is None
        assert (abs(explanation.remainder["rest"]) <= 1e-5 * size) is linear


NODES = [
    ("neurons", 0, (0, 2, 5)),
    ("neurons", 1, (0, LAST, 40)),
    ("neurons", 2, (0, LAST, 47)),
    ("probabilities", 0, (0, 3, 4, 2)),
    ("probabilities", 1, (0, 1, 5, 5)),
    ("probabilities", 2, (0, 0, LAST, LAST - 2)),
]
STEP = 1e-5


def value_and_total(
    explanation: Explanation, kind: str, layer: int, at: Any
) -> tuple[float, float]:
    for group in explanation.groups:
        if kind == "neurons" and isinstance(group, NeuronNodes):
            node = Address(Kind.NEURON, layer, at[2], position=at[1])
        elif kind == "probabilities" and isinstance(group, HeadNodes):
            node = Address(Kind.HEAD, layer, at[1], position=at[2], key=at[3])
        else:
            continue
        if group.address(0).layer == layer:
            index = group.find(node)
            assert index is not None
            gathered = group.gather(torch.tensor([index]))[0].tolist()
            return gathered[0], gathered[3]
    raise AssertionError(f"no {kind} in layer {layer}")


def scales_held(variant: str, norm_mode: NormMode) -> Scales:
    """The clean scales of the norms that the mode freezes."""
    reference = reference_of(variant, torch.float64)
    scales = reference.scales(IDS)
    match norm_mode:
        case NormMode.LIVE:
            return {}
        case NormMode.FINAL_NORM_FROZEN:
            return {reference.final_norm: scales[reference.final_norm]}
        case NormMode.ALL_NORMS_FROZEN:
            return scales


@pytest.mark.parametrize("norm_mode", NormMode)
@every_variant
def test_estimates(variant: str, norm_mode: NormMode) -> None:
    reference = reference_of(variant, torch.float64)
    with KeepDouble():
        held = scales_held(variant, norm_mode)
        (explanation,) = engine_of(variant, torch.float64).explain(
            explained(IDS, objective=OBJECTIVE), norm_mode=norm_mode
        )
        assert explanation.value == pytest.approx(difference(reference.run(IDS, untouched)))
        for kind, layer, at in NODES:
            moved = [
                difference(
                    reference.run(IDS, edited((kind, layer, at, partial(torch.add, step))), held)
                )
                for step in torch.tensor([STEP, -STEP], dtype=torch.float64)
            ]
            value, total = value_and_total(explanation, kind, layer, at)
            slope = (moved[0] - moved[1]) / (2 * STEP)
            assert total == pytest.approx(value * slope, rel=1e-4, abs=1e-8)
        embeds = explanation.groups[0]
        assert isinstance(embeds, EmbedNodes)
        for token in (0, 5):
            moved = [
                difference(
                    reference.run(
                        IDS, edited(("embed", None, (0, token), partial(torch.mul, 1 + step))), held
                    )
                )
                for step in torch.tensor([STEP, -STEP], dtype=torch.float64)
            ]
            slope = (moved[0] - moved[1]) / (2 * STEP)
            total = float(embeds.column(Column.TOTAL_EFFECT)[token])
            assert total == pytest.approx(slope, rel=1e-4, abs=1e-8)


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
def test_read_outs(variant: str) -> None:
    reference, engine = reference_of(variant, torch.float64), engine_of(variant, torch.float64)
    nodes = ["neuron.2.40~8", "neuron.0.5~3", "head.1.2~6-4", "head.0.3~5-3"]
    with KeepDouble():
        (explanation,) = engine.explain(explained(IDS, objective=OBJECTIVE))
        found = read_out(
            engine.architecture,
            explanation,
            [parse(node) for node in nodes],
            VOCABULARY,
            VOCABULARY,
        )
        scales = reference.scales(IDS)
        _check_output(variant, found[parse(nodes[0])].output, scales)
        for node in nodes:
            _check_inputs(variant, parse(node), found[parse(node)], scales)


def as_vector(scores: tuple[tuple[int, float], ...]) -> Tensor:
    vector = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token_id, score in scores:
        vector[token_id] = score
    return vector


def _check_output(variant: str, ours: tuple[tuple[int, float], ...], scales: Scales) -> None:
    """A last-layer neuron's write is what its removal takes from the logits, scales held."""
    reference = reference_of(variant, torch.float64)
    config = reference.model.config
    cap = getattr(config, "final_logit_softcapping", None)
    config.final_logit_softcapping = None
    try:
        clean = reference.run(IDS, untouched, scales)
        site = edited(("neurons", 2, (0, 8, 40), torch.zeros_like))
        effect = (clean - reference.run(IDS, site, scales))[0, 8]
    finally:
        config.final_logit_softcapping = cap
    assert torch.allclose(as_vector(ours), effect - effect.mean(), rtol=1e-6, atol=1e-9)


def _check_inputs(variant: str, node: Address, found: Any, scales: Scales) -> None:
    """Gradients of Hugging Face's own pre-activation or score, the block's norms held."""
    reference = reference_of(variant, torch.float64)
    block = reference.blocks[node.layer]
    layer = engine_of(variant).architecture.layers[node.layer or 0]
    held = {module: scale for module, scale in scales.items() if module in set(block.modules())}
    embedding = reference.model.get_input_embeddings()
    tokens = embedding(torch.arange(VOCABULARY))
    seen: dict[str, Tensor] = {}

    def remember(kind: str, at: int | None, values: Tensor) -> Tensor:
        if at == node.layer and kind in ("q", "k"):
            seen[kind] = values
        return values

    def leaf(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["leaf"] = args[0].detach().requires_grad_()
        return (seen["leaf"], *args[1:])

    names = {"gpt2": "mlp.c_fc", "gpt_neox": "mlp.dense_h_to_4h", "opt": "fc1"}
    gate = block.get_submodule(names.get(variant.partition("/")[0], "mlp.gate_proj"))
    attn_norm = block.get_submodule(FAMILIES[variant.partition("/")[0]].attn_norm)
    mlp_norm = block.get_submodule(FAMILIES[variant.partition("/")[0]].mlp_norm)
    is_neuron = node.kind is Kind.NEURON
    handles = [
        (mlp_norm if is_neuron else attn_norm).register_forward_pre_hook(leaf),
        gate.register_forward_hook(
            lambda m, args, out: seen.update(gate=out.view(1, len(IDS), -1))
        ),
    ]
    try:
        with torch.enable_grad():
            reference.run(IDS, remember, held)
            pairs: list[tuple[Tensor, int | None, tuple[tuple[int, float], ...]]] = []
            if is_neuron:
                pairs.append(
                    (seen["gate"][0, node.position, node.index], node.position, found.input)
                )
            else:
                q, k = seen["q"][0, node.index, node.position], seen["k"]
                k = k[0, (node.index or 0) // (HEADS // k.shape[1]), node.key]
                scaling = layer.scaling
                pairs.append((q @ k.detach() * scaling, node.position, found.input))
                pairs.append((q.detach() @ k * scaling, node.key, found.key_input))
            for value, position, ours in pairs:
                (gradient,) = torch.autograd.grad(value, seen["leaf"], retain_graph=True)
                gradient = gradient.view(1, len(IDS), -1)[0, position]
                expected = tokens @ gradient
                assert expected.abs().max() > 1e-6
                assert torch.allclose(as_vector(ours), expected, rtol=1e-5, atol=1e-9), str(node)
    finally:
        for handle in handles:
            handle.remove()


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


@every_variant
def test_batches(variant: str) -> None:
    engine = engine_of(variant)
    named = edits_of(engine)
    runs = [
        explained(IDS, *engine.edits(*named["nodes"], tokens=len(IDS)), objective=OBJECTIVE),
        explained(IDS[:5], objective=LogProb((2, 3), 3)),
        explained(IDS, *engine.edits(*named["stream"], tokens=len(IDS)), objective=OBJECTIVE),
    ]
    for norm_mode in (NormMode.FINAL_NORM_FROZEN, NormMode.ALL_NORMS_FROZEN):
        together = engine.explain(*runs, norm_mode=norm_mode)
        for run, batched in zip(runs, together, strict=True):
            (alone,) = engine.explain(run, norm_mode=norm_mode)
            assert batched.value == pytest.approx(alone.value, rel=1e-5, abs=1e-5)
            for ours, theirs in zip(batched.groups, alone.groups, strict=True):
                for column in Column:
                    assert close(ours.column(column), theirs.column(column), 2e-5)


def test_rows_of_a_batch_may_freeze_other_norms() -> None:
    """The last layer's QK norms and post-norms too, whose inputs are laid out in other ways."""
    engine = engine_of("gemma3_text/qk-norm")
    gradients = []
    for rows in (
        [Row(IDS, block_norms_frozen=True)],
        [Row(IDS)],
        [Row(IDS, block_norms_frozen=True), Row(IDS)],
    ):
        current = engine.hooks.run(rows, [LAST], gradients=True)
        objective = current.logits[:, 0, 5].sum()
        gradients.append(torch.autograd.grad(objective, current.embed)[0])
    assert close(gradients[2][0], gradients[0][0])
    assert close(gradients[2][1], gradients[1][0])
    assert not close(gradients[0], gradients[1], 1e-2)


# ---- the wrong layout fails


def sums_close(engine: Engine) -> bool:
    (explanation,) = engine.explain(explained(IDS, objective=OBJECTIVE))
    total, size = direct_sums(explanation)
    return abs(total - explanation.value) <= 1e-5 * size


def with_layers(variant: str, change: Callable[[Any], Any]) -> Engine:
    engine = engine_of(variant)
    layers = tuple(change(layer) for layer in engine.architecture.layers)
    return Engine(engine.hooks, replace(engine.architecture, layers=layers))


@pytest.mark.parametrize("variant", ["gemma2/softcap", "gemma3_text/qk-norm"])
@pytest.mark.parametrize("weights", ["w_out", "w_o"])
def test_writes_without_the_gain_of_the_post_norm_do_not_add_up(variant: str, weights: str) -> None:
    assert sums_close(engine_of(variant))

    def ungained(layer: Any) -> Any:
        norm = layer.mlp_post_norm if weights == "w_out" else layer.attn_post_norm
        return replace(layer, **{weights: getattr(layer, weights) / norm.gain})

    assert not sums_close(with_layers(variant, ungained))


def test_thirds_of_an_interleaved_projection_are_not_q_k_and_v() -> None:
    variant = "gpt_neox/parallel"
    current = engine_of(variant).hooks.run([Row(IDS)], [0], gradients=True)
    fused = reference_of(variant).blocks[1].attention.query_key_value
    third = fused.weight[2 * WIDTH :].view(HEADS, -1, WIDTH)
    bias = fused.bias[2 * WIDTH :].view(HEADS, -1)
    wrong = torch.einsum("hed,td->hte", third, current.attn_in[1][0]) + bias[:, None]
    assert not close(current.attention[1].values[0], wrong, 0.1)


def test_without_its_window_a_layer_has_other_logits() -> None:
    reference = reference_of("mistral/window")
    banded = reference.run(IDS, untouched)
    reference.model.config.sliding_window = None
    try:
        full = reference.run(IDS, untouched)
    finally:
        reference.model.config.sliding_window = WINDOW
    assert close(banded[:, :WINDOW], full[:, :WINDOW])
    assert not close(banded[:, WINDOW:], full[:, WINDOW:], 1e-2)


def test_a_parallel_block_has_no_stream_between_attention_and_mlp() -> None:
    engine = engine_of("gpt_neox/parallel")
    with pytest.raises(InvalidArgument, match="there is no resid_mid"):
        engine.edits(Intervention(parse("resid_mid.1~2"), Zero()), tokens=len(IDS))
    sequential = engine_of("gpt_neox/sequential")
    assert sequential.edits(Intervention(parse("resid_mid.1~2"), Zero()), tokens=len(IDS))


def test_every_feature_has_its_test_on_every_variant() -> None:
    for feature in FEATURES:
        name = "test_" + feature.replace(" ", "_").replace("-", "_")
        marks = {**globals(), **vars(test_running)}[name].pytestmark
        assert ("variant", VARIANTS) in [mark.args[:2] for mark in marks], feature
