"""What OpenAI's Transformer Debugger server was asked and what it answered, in our terms.

What it does differently on purpose is undone here, for the comparison only: its neuron write norm
is signed, and its ablation of a head pair zeroes the whole row.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.attribution import ExplainedRun, Explanation, NormMode, explain
from services.inference.engine.bound import Place
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.columns import Column, EmbedNodes, HeadNodes, NodeGroup
from services.inference.engine.interventions import Intervention, SetTo, Zero
from services.inference.engine.latents import LatentNodes
from services.inference.engine.model import Model
from services.inference.engine.objectives import LogitDiff, Objective
from services.inference.engine.resolution import resolve
from services.inference.engine.traced_latents import TracedLatent
from services.inference.engine.tracing import Branch, Side, TracedNeuron, TracedScore, TracedValue

GROUPS = {
    Column.ACTIVATION: "activation",
    Column.WRITE_MAGNITUDE: "write_norm",
    Column.DIRECT_EFFECT: "direction_write",
    Column.TOTAL_EFFECT: "act_times_grad",
}
EMBEDDING = {
    Column.ACTIVATION: "always_one",
    Column.WRITE_MAGNITUDE: "resid_post_embedding_norm",
    Column.DIRECT_EFFECT: "resid_post_embedding_proj_to_final_residual_grad",
    Column.TOTAL_EFFECT: "token_attribution",
}
OTHERS = {
    Column.WRITE_MAGNITUDE: "write_norm",
    Column.DIRECT_EFFECT: "write_to_final_residual_grad",
    Column.TOTAL_EFFECT: "act_times_grad",
}
LATENTS = {"mlp_autoencoder_latent": Kind.MLP, "attention_autoencoder_latent": Kind.ATTN}
TOLERANCE = 1e-4
"""Of a tensor's largest value."""


@dataclass(frozen=True)
class Case:
    requests: list[dict[str, Any]]
    arrays: Any

    @classmethod
    def read(cls, shared_data: Path, name: str) -> "Case":
        parity = shared_data / "parity"
        request = json.loads((parity / f"requests/{name}.json").read_text())
        arrays = np.load(parity / f"expected/{name}.npz", allow_pickle=False)
        return cls(request["request"]["subRequests"], arrays)

    def runs(self, model: Model) -> list[ExplainedRun]:
        return [to_run(each, model) for each in self.requests]

    def explain(self, model: Model, runs: list[ExplainedRun] | None = None) -> list[Explanation]:
        listed = [
            name
            for name, place in places(model).items()
            if self.requests[0][
                "componentTypeForMlp" if place.sublayer is Kind.MLP else "componentTypeForAttention"
            ]
            == "autoencoder_latent"
        ]
        runs = self.runs(model) if runs is None else runs
        explanations, _ = explain(
            model.hooks,
            model.architecture,
            runs,
            [NormMode.FINAL_NORM_FROZEN] * len(runs),
            CancelToken(),
            listed,
        )
        return list(explanations)

    def tokens(self, number: int) -> int:
        """How many the prompt of a request has."""
        return len(self.arrays[f"sub{number}/activation/always_one/LNone"])

    def value(self, number: int) -> float:
        """J of a request: the traced value or, where nothing was traced, the loss."""
        traced = float(self.arrays[f"sub{number}/trace_value"])
        return float(self.arrays[f"sub{number}/loss"]) if math.isnan(traced) else traced

    def logits(self, number: int) -> Tensor:
        return torch.tensor(self.arrays[f"sub{number}/logits_at_token"])

    def expected(self, number: int, key: str, column: Column) -> Tensor:
        values = torch.tensor(self.arrays[f"sub{number}/{GROUPS[column]}/{key}"])
        return values.abs() if column is Column.WRITE_MAGNITUDE else values

    def errors(
        self, number: int, explanation: Explanation, columns: tuple[Column, ...] = tuple(Column)
    ) -> dict[str, float]:
        """Largest difference by scalar and layer, relative to the largest value of its tensor."""
        found = {}
        for column in columns:
            for group in explanation.groups:
                key, ours = in_their_shape(group, column, explanation.groups[0].size)
                theirs = self.expected(number, key, column)
                scale = float(theirs.abs().max()) or 1.0
                found[key] = float((ours - theirs).abs().max()) / scale
        return found

    def matches(self, number: int, explanation: Explanation) -> None:
        """Asserts J, logits and every column of every node."""
        value, logits = self.value(number), self.logits(number)
        assert abs(explanation.value - value) <= TOLERANCE * abs(value) + 1e-6
        assert (explanation.logits - logits).abs().max() <= TOLERANCE * logits.abs().max()
        errors = self.errors(number, explanation)
        asked = {
            key.split("/", 2)[2]
            for key in self.arrays.files
            if key.startswith(f"sub{number}/") and key.count("/") == 3
        }
        assert set(errors) == asked
        wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE}
        assert not wrong


def places(model: Model) -> dict[str, Place]:
    return {
        name: Place(each.header, model.architecture) for name, each in model.shelf.served.items()
    }


def to_run(request: dict[str, Any], model: Model) -> ExplainedRun:
    ids = model.vocabulary.encode(request["prompt"])
    wanted = [_intervention(each, model) for each in request.get("nodeAblations") or []]
    targets, distractors = (
        tuple(model.vocabulary.single(token) for token in request.get(name) or [])
        for name in ("targetTokens", "distractorTokens")
    )
    edits = resolve(wanted, model.shape, model.architecture.widths, len(ids))
    objective: Objective = LogitDiff(targets, distractors, len(ids) - 1)
    if request.get("upstreamNodeToTrace"):
        objective = _traced(request["upstreamNodeToTrace"], objective, model)
    return ExplainedRun(ids, edits, objective)


def _traced(trace: dict[str, Any], loss: Objective, model: Model) -> Objective:
    """Its own trace through V without a downstream node is measured on the loss."""
    node = trace["nodeIndex"]
    layer = node["layerIndex"]
    if node["nodeType"] in LATENTS:
        latent = latent_of(node, model)
        return TracedLatent(latent, places(model)[latent.dictionary])
    if node["nodeType"] == "mlp_neuron":
        token, neuron = node["tensorIndices"]
        return TracedNeuron(Address(Kind.NEURON, layer, neuron, position=token), Branch.GATE)
    query, key, head = node["tensorIndices"]
    pair = Address(Kind.HEAD, layer, head, position=query, key=key)
    if trace["attentionTraceType"] == "V":
        return TracedValue(pair, loss)
    live = {"Q": Side.QUERY, "K": Side.KEY, "QK": Side.BOTH}[trace["attentionTraceType"]]
    return TracedScore(pair, live)


def _intervention(ablation: dict[str, Any], model: Model) -> Intervention:
    node, value = ablation["nodeIndex"], ablation["value"]
    layer = node["layerIndex"]
    if node["nodeType"] in LATENTS:
        return Intervention(latent_of(node, model), SetTo(value))
    if node["nodeType"] == "mlp_neuron":
        token, neuron = node["tensorIndices"]
        return Intervention(Address(Kind.NEURON, layer, neuron, position=token), SetTo(value))
    assert value == 0
    query, _, head = node["tensorIndices"]
    return Intervention(Address(Kind.HEAD, layer, head, position=query), Zero())


def latent_of(node: dict[str, Any], model: Model) -> Address:
    at = LATENTS[node["nodeType"]], node["layerIndex"]
    (name,) = (name for name, place in places(model).items() if (place.sublayer, place.layer) == at)
    token, latent = node["tensorIndices"]
    return Address(Kind.LATENT, index=latent, dictionary=name, position=token)


def in_their_shape(group: NodeGroup, column: Column, tokens: int) -> tuple[str, Tensor]:
    """The server's name of a group's scalar and layer, and our values as it stores them: [T, 1],
    [query, key, head] with 0 where masked, [T, F], [T, N]."""
    if isinstance(group, EmbedNodes):
        return f"{EMBEDDING[column]}/LNone", group.column(column)[:, None]
    if isinstance(group, LatentNodes):
        group.prepare(group.nodes)
        values = group.column(column)
        full = values.new_empty(group.nodes)
        full[group.order(torch.arange(group.nodes))] = values
        kind = "mlp" if group.bound.sublayer is Kind.MLP else "attention"
        scalar = f"online_{kind}_autoencoder_{OTHERS.get(column, 'latent')}"
        return f"{scalar}/L{group.bound.layer}", full.view(-1, tokens).T
    layer, values = group.address(0).layer, group.column(column)
    if not isinstance(group, HeadNodes):
        scalar = f"mlp_{OTHERS.get(column, 'post_act')}"
        return f"{scalar}/L{layer}", values.view(tokens, -1)
    rows, keys = torch.tril_indices(tokens, tokens)
    full = values.new_zeros(tokens, tokens, group.size // len(rows))
    full[rows, keys] = values.view(-1, len(rows)).T
    scalar = f"unflattened_attn_{OTHERS[column]}" if column in OTHERS else "attn_qk_probs"
    return f"{scalar}/L{layer}", full
