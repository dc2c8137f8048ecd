"""Numbers of OpenAI's Transformer Debugger server on the same weights, requests and edits.

What differs on purpose is undone here, for the comparison only: its neuron write norm is signed,
its ablation of a head pair zeroes the whole row, and it recomputes a traced value without the
interventions of the traced node's own block.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from services.common.addresses import Address, Kind
from services.inference.engine import loading
from services.inference.engine.attribution import (
    ExplainedRun,
    Explanation,
    NormMode,
    explain,
    row_of,
)
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Intervention, SetTo, Zero
from services.inference.engine.model import Model
from services.inference.engine.objectives import LogitDiff, Objective
from services.inference.engine.resolution import resolve
from services.inference.engine.run_view import RunView
from services.inference.engine.tracing import (
    Branch,
    HeldWrite,
    Side,
    TracedNeuron,
    TracedScore,
    TracedValue,
)
from tests.inference.helpers import matrices

pytestmark = pytest.mark.shared

CASES = [
    "01a_plain_logitdiff",
    "01b_plain_multi_targets",
    "01c_plain_no_distractor",
    "01d_two_prompts",
    "01e_single_token_prompt",
    "01g_plain_with_ae_server_neuron_components",
    "02a_ablate_neuron",
    "02b_ablate_neuron_value",
    "02c_ablate_head",
    "02d_ablate_multi",
    "02h_ablate_hide_early",
    "03a_trace_neuron",
    "03b_trace_neuron_layer0",
    "03c_trace_neuron_last_layer_mid_token",
    "03d_trace_head_K",
    "03d_trace_head_Q",
    "03d_trace_head_QK",
    "03d_trace_head_V",
    "03e_trace_head_layer0_Q",
    "03f_trace_head_layer0_V",
    "03m_trace_with_ablation",
]
TRACED_BESIDE_DICTIONARIES = [
    "03j_trace_neuron_on_ae_server",
    "03k_trace_head_V_on_ae_server",
    "03l_trace_head_Q_on_ae_server",
]
"""Neurons and heads traced while the table lists latents: embeddings and J are comparable."""
GROUPS = {
    Column.ACTIVATION: ("activation", "always_one", "attn_qk_probs", "mlp_post_act"),
    Column.WRITE_MAGNITUDE: (
        "write_norm",
        "resid_post_embedding_norm",
        "unflattened_attn_write_norm",
        "mlp_write_norm",
    ),
    Column.DIRECT_EFFECT: (
        "direction_write",
        "resid_post_embedding_proj_to_final_residual_grad",
        "unflattened_attn_write_to_final_residual_grad",
        "mlp_write_to_final_residual_grad",
    ),
    Column.TOTAL_EFFECT: (
        "act_times_grad",
        "token_attribution",
        "unflattened_attn_act_times_grad",
        "mlp_act_times_grad",
    ),
}


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Model:
    parity, tokenizer = shared_data / "parity/model", shared_data / "gpt2-tokenizer"
    device = torch.device("cpu")
    return Model(loading.load("parity", str(parity), str(tokenizer), device, torch.float32))


def to_run(request: dict[str, Any], model: Model) -> ExplainedRun:
    ids = model.vocabulary.encode(request["prompt"])
    wanted = [_intervention(each) for each in request.get("nodeAblations") or []]
    targets, distractors = (
        tuple(model.vocabulary.single(token) for token in request.get(name) or [])
        for name in ("targetTokens", "distractorTokens")
    )
    edits = resolve(wanted, model.architecture.shape, model.architecture.widths, len(ids))
    objective: Objective = LogitDiff(targets, distractors, len(ids) - 1)
    if request.get("upstreamNodeToTrace"):
        objective = _traced(request["upstreamNodeToTrace"], objective)
    return ExplainedRun(ids, edits, objective)


def _traced(trace: dict[str, Any], loss: Objective) -> Objective:
    """Its own trace through V without a downstream node is measured on the loss."""
    node = trace["nodeIndex"]
    layer = node["layerIndex"]
    if node["nodeType"] == "mlp_neuron":
        token, neuron = node["tensorIndices"]
        return TracedNeuron(Address(Kind.NEURON, layer, neuron, position=token), Branch.GATE)
    query, key, head = node["tensorIndices"]
    pair = Address(Kind.HEAD, layer, head, position=query, key=key)
    if trace["attentionTraceType"] == "V":
        return TracedValue(pair, loss)
    live = {"Q": Side.QUERY, "K": Side.KEY, "QK": Side.BOTH}[trace["attentionTraceType"]]
    return TracedScore(pair, live)


def _intervention(ablation: dict[str, Any]) -> Intervention:
    node, value = ablation["nodeIndex"], ablation["value"]
    layer = node["layerIndex"]
    if node["nodeType"] == "mlp_neuron":
        token, neuron = node["tensorIndices"]
        return Intervention(Address(Kind.NEURON, layer, neuron, position=token), SetTo(value))
    assert value == 0
    query, _, head = node["tensorIndices"]
    return Intervention(Address(Kind.HEAD, layer, head, position=query), Zero())


def expected(arrays: Any, prefix: str, column: Column, layers: int) -> list[torch.Tensor]:
    """TDB's values in the shapes of `matrices`."""
    group, embed, heads, neurons = GROUPS[column]
    found = [torch.tensor(arrays[f"{prefix}/{group}/{embed}/LNone"])[:, 0]]
    for layer in range(layers):  # stored as query, key, head
        found.append(torch.tensor(arrays[f"{prefix}/{group}/{heads}/L{layer}"]).permute(2, 0, 1))
    for layer in range(layers):
        values = torch.tensor(arrays[f"{prefix}/{group}/{neurons}/L{layer}"])
        found.append(values.abs() if column is Column.WRITE_MAGNITUDE else values)
    return found


def largest_error(explanation: Explanation, arrays: Any, prefix: str, layers: int) -> float:
    """Largest difference over all columns, relative to the largest value of its tensor."""
    worst = 0.0
    for column in Column:
        theirs = expected(arrays, prefix, column, layers)
        for ours, reference in zip(matrices(explanation, column), theirs, strict=True):
            scale = float(reference.abs().max()) or 1.0
            worst = max(worst, float((ours - reference).abs().max()) / scale)
    return worst


def objective_of(arrays: Any, prefix: str) -> float:
    name = "trace_value" if f"{prefix}/trace_value" in arrays else "loss"
    return float(arrays[f"{prefix}/{name}"])


@pytest.mark.parametrize("case", CASES)
def test_every_number_matches(case: str, model: Model, shared_data: Path) -> None:
    request = json.loads((shared_data / f"parity/requests/{case}.json").read_text())
    arrays = np.load(shared_data / f"parity/expected/{case}.npz", allow_pickle=False)
    runs = [to_run(each, model) for each in request["request"]["subRequests"]]
    explanations, _ = explain(
        model.hooks, model.architecture, runs, NormMode.FINAL_NORM_FROZEN, CancelToken()
    )
    for number, (run, explanation) in enumerate(zip(runs, explanations, strict=True)):
        prefix = f"sub{number}"
        assert explanation.value == pytest.approx(objective_of(arrays, prefix), rel=1e-4, abs=1e-4)
        logits = torch.tensor(arrays[f"{prefix}/logits_at_token"])
        assert (explanation.logits - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert largest_error(explanation, arrays, prefix, 3) <= 1e-4, run


def test_the_comparison_fails_on_another_run(model: Model, shared_data: Path) -> None:
    """Negative control: the ablated expectations do not match the plain run, nor the other way."""
    request = json.loads((shared_data / "parity/requests/02a_ablate_neuron.json").read_text())
    arrays = np.load(shared_data / "parity/expected/02a_ablate_neuron.npz", allow_pickle=False)
    runs = [to_run(each, model) for each in request["request"]["subRequests"]]
    explanations, _ = explain(
        model.hooks, model.architecture, runs, NormMode.FINAL_NORM_FROZEN, CancelToken()
    )
    assert largest_error(explanations[1], arrays, "sub0", 3) > 1e-3
    assert largest_error(explanations[0], arrays, "sub1", 3) > 1e-3


@pytest.mark.parametrize("case", TRACED_BESIDE_DICTIONARIES)
def test_traces_beside_dictionaries_match(case: str, model: Model, shared_data: Path) -> None:
    request = json.loads((shared_data / f"parity/requests/{case}.json").read_text())
    arrays = np.load(shared_data / f"parity/expected/{case}.npz", allow_pickle=False)
    run = to_run(request["request"]["subRequests"][0], model)
    (explanation,), _ = explain(
        model.hooks, model.architecture, [run], NormMode.FINAL_NORM_FROZEN, CancelToken()
    )
    assert explanation.value == pytest.approx(objective_of(arrays, "sub0"), rel=1e-4, abs=1e-4)
    logits = torch.tensor(arrays["sub0/logits_at_token"])
    assert (explanation.logits - logits).abs().max() <= 1e-4 * logits.abs().max()
    for column, (group, embed, _, _) in GROUPS.items():
        theirs = torch.tensor(arrays[f"sub0/{group}/{embed}/LNone"])[:, 0]
        ours = matrices(explanation, column)[0]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@dataclass(frozen=True, eq=False)
class AsRecomputed(TracedValue):
    """Holds what it was given, whatever run it is explained in."""

    def hold(self, run: RunView) -> Self:
        return self


def test_a_value_of_an_ablated_head_is_recomputed_there(model: Model, shared_data: Path) -> None:
    """It takes the pattern before the ablation and the downstream gradient after it."""
    case = "03n_trace_V_same_head_ablated"
    request = json.loads((shared_data / f"parity/requests/{case}.json").read_text())
    arrays = np.load(shared_data / f"parity/expected/{case}.npz", allow_pickle=False)
    runs = [to_run(each, model) for each in request["request"]["subRequests"]]
    ablated, clean = runs
    objective = ablated.objective
    assert isinstance(objective, TracedValue)
    node = objective.node
    rows = [row_of(model.architecture, run, NormMode.FINAL_NORM_FROZEN) for run in runs]
    current = model.hooks.run(rows, objective.logit_positions, gradients=True)
    view = RunView(model.architecture, current, 0)
    loss = objective.downstream.value(view)
    (gradient,) = torch.autograd.grad(loss, current.final_input, retain_graph=True)
    layer = model.architecture.layers[node.layer or 0]
    pattern = current.attention[node.layer or 0].used(1)
    held = HeldWrite(
        probability=pattern[node.index, node.position, node.key],
        direction=layer.w_o[node.index or 0] @ gradient[0, node.position],
        constant=torch.zeros(model.architecture.head_width),
    )
    recomputed = replace(ablated, objective=AsRecomputed(node, objective.downstream, held))
    explanations, _ = explain(
        model.hooks,
        model.architecture,
        [recomputed, clean],
        NormMode.FINAL_NORM_FROZEN,
        CancelToken(),
    )
    for number, explanation in enumerate(explanations):
        prefix = f"sub{number}"
        value = objective_of(arrays, prefix)
        assert explanation.value == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert largest_error(explanation, arrays, prefix, 3) <= 1e-4
    (ours,), _ = explain(
        model.hooks, model.architecture, [ablated], NormMode.FINAL_NORM_FROZEN, CancelToken()
    )
    assert ours.value == 0  # in the run as it is the pair writes nothing


def test_the_traces_differ_from_each_other(model: Model, shared_data: Path) -> None:
    """Negative control: what is expected of the query does not match the key, nor both."""
    request = json.loads((shared_data / "parity/requests/03d_trace_head_Q.json").read_text())
    arrays = np.load(shared_data / "parity/expected/03d_trace_head_Q.npz", allow_pickle=False)
    run = to_run(request["request"]["subRequests"][0], model)
    assert isinstance(run.objective, TracedScore)
    others = [replace(run, objective=replace(run.objective, live=each)) for each in Side]
    explanations, _ = explain(
        model.hooks, model.architecture, others, NormMode.FINAL_NORM_FROZEN, CancelToken()
    )
    errors = dict(
        zip(Side, (largest_error(each, arrays, "sub0", 3) for each in explanations), strict=True)
    )
    assert errors[Side.QUERY] <= 1e-4
    assert errors[Side.KEY] > 1e-2
    assert errors[Side.BOTH] > 1e-2
