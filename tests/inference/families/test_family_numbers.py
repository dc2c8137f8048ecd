"""The numbers of every variant of every family: sums, columns, read-outs, rows of a batch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.inference.engine.attribution import Explanation, NormMode
from services.inference.engine.captured import Row
from services.inference.engine.columns import COLUMNS, Column, EmbedNodes, HeadNodes, NeuronNodes
from services.inference.engine.families import FAMILIES
from services.inference.engine.objectives import LogProb
from services.inference.engine.readouts import read_out
from tests.inference.families.models import (
    HEADS,
    IDS,
    LAST,
    VOCABULARY,
    Change,
    KeepDouble,
    Scales,
    edited,
    engine_of,
    reference_of,
    scales_held,
    untouched,
)
from tests.inference.families.shared import (
    ALL,
    OBJECTIVE,
    close,
    difference,
    direct_sums,
    edits_of,
    every_variant,
)
from tests.inference.helpers import explained


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


def columns_of(explanation: Explanation, kind: str, layer: int, at: Any) -> dict[Column, float]:
    """Every column of one node, named as the reference names its value."""
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
            assert [float(group.column(column)[index]) for column in COLUMNS] == pytest.approx(
                gathered, rel=1e-5
            )
            return dict(zip(COLUMNS, gathered, strict=True))
    raise AssertionError(f"no {kind} in layer {layer}")


def written(variant: str, sublayer: str, layer: int, scales: Scales, *changes: Change) -> Tensor:
    """[T, d]: what a sublayer adds to the stream, all norms held, after changes."""
    seen: list[Tensor] = []
    change = edited(*changes)

    def site(kind: str, at: int | None, values: Tensor) -> Tensor:
        if (kind, at) == (sublayer, layer):
            seen.append(values)
        return change(kind, at, values)

    reference_of(variant).run(IDS, site, scales)
    return seen[0][0]


@every_variant
def test_magnitudes(variant: str) -> None:
    scales = reference_of(variant).scales(IDS)
    (explanation,) = engine_of(variant).explain(explained(IDS, objective=OBJECTIVE))
    for kind, layer, at in NODES:
        where = (variant, "mlp" if kind == "neurons" else "attn", layer, scales)
        removed = written(*where) - written(*where, (kind, layer, at, torch.zeros_like))
        magnitude = columns_of(explanation, kind, layer, at)[Column.WRITE_MAGNITUDE]
        assert magnitude == pytest.approx(float(removed.norm()), rel=1e-3, abs=1e-5)


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
            found = columns_of(explanation, kind, layer, at)
            slope = (moved[0] - moved[1]) / (2 * STEP)
            expected = found[Column.ACTIVATION] * slope
            assert found[Column.TOTAL_EFFECT] == pytest.approx(expected, rel=1e-4, abs=1e-8)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_variant
def test_half_precision(variant: str, dtype: torch.dtype) -> None:
    engine, exact = engine_of(variant, dtype), engine_of(variant)
    logits = engine.hooks.run([Row(IDS)], ALL, gradients=False).logits
    assert logits.dtype is dtype
    assert close(logits, reference_of(variant, dtype).run(IDS, untouched), 0.01)
    found = []
    for each in (engine, exact):
        (explanation,) = each.explain(explained(IDS, objective=OBJECTIVE))
        total, size = direct_sums(explanation)
        assert abs(total - explanation.value) <= 0.01 * size
        columns = [group.column(Column.TOTAL_EFFECT) for group in explanation.groups]
        found.append(torch.cat(columns).float())
        nodes = [parse("embed~4"), parse("head.1.2~6-4")]
        assert read_out(each.architecture, explanation, nodes, 5, VOCABULARY)
    assert float(torch.corrcoef(torch.stack(found))[0, 1]) > 0.98


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
