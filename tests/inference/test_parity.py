"""Numbers of OpenAI's Transformer Debugger server on the same weights, requests and edits.

What differs on purpose is undone here, for the comparison only: its neuron write norm is signed,
and its ablation of a head pair zeroes the whole row.
"""

import json
from pathlib import Path
from typing import Any

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
)
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Intervention, SetTo, Zero
from services.inference.engine.model import Model
from services.inference.engine.objectives import LogitDiff
from services.inference.engine.resolution import resolve
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
]
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
    return ExplainedRun(ids, edits, LogitDiff(targets, distractors, len(ids) - 1))


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
        loss = float(arrays[f"{prefix}/loss"])
        assert explanation.value == pytest.approx(loss, rel=1e-4, abs=1e-4)
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
