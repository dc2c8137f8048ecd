"""Token read-outs of OpenAI's Transformer Debugger server on the same weights and prompts.

It omits the final norm's scale and the centring of the write where tokens are read out, and leaves
out tokens that are rare in its corpus: both are undone here, from our scores of every token.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind
from services.inference.engine.attribution import Explanation
from services.inference.engine.latents import LatentNodes
from services.inference.engine.model import Model
from services.inference.engine.readouts import ReadOut, read_out
from tests.inference.openai_numbers import LATENTS, TOLERANCE, Case, latent_of
from tests.inference.test_parity import Serving, serving

__all__ = ["serving"]

pytestmark = pytest.mark.shared

CASES = {
    "01a_plain_logitdiff": "none",
    "02d_ablate_multi": "none",
    "05a_ae_both": "mlp+attn",
    "05d_ae_mlppost": "mlppost",
}
NODES_OF_A_KIND = 2
LISTED = 10


def address(node: dict[str, Any], model: Model) -> Address:
    layer, indices = node["layerIndex"], node["tensorIndices"]
    match node["nodeType"]:
        case "attention_head":
            query, key, head = indices
            return Address(Kind.HEAD, layer, head, position=query, key=key)
        case "mlp_neuron":
            return Address(Kind.NEURON, layer, indices[1], position=indices[0])
        case "layer":
            return Address(Kind.EMBED, position=indices[0])
    assert node["nodeType"] in LATENTS
    return latent_of(node, model)


def some_of_each_kind(nodes: list[dict[str, Any]]) -> list[int]:
    """Places of the first few of each kind of node."""
    by_kind: dict[str, list[int]] = {}
    for place, node in enumerate(nodes):
        by_kind.setdefault(node["nodeType"], []).append(place)
    return [place for places in by_kind.values() for place in places[:NODES_OF_A_KIND]]


def as_vector(scores: tuple[tuple[int, float], ...], size: int) -> Tensor:
    ids, values = zip(*scores, strict=True)
    assert len(set(ids)) == size
    return torch.zeros(size).index_put((torch.tensor(ids),), torch.tensor(values))


def mean_of_write(model: Model, explanation: Explanation, node: Address) -> float:
    """What the final norm's centring takes away, from each kind of write by its definition."""
    architecture, captured, row = model.architecture, explanation.captured, explanation.row
    if node.layer is None and node.kind is Kind.EMBED:
        return float(captured.embed[row, node.position].detach().mean())
    if node.kind is Kind.LATENT:
        (group,) = (
            group
            for group in explanation.groups
            if isinstance(group, LatentNodes) and group.dictionary == node.dictionary
        )
        unit = group.bound.unit_writes(torch.tensor([node.index]))[0]
        return float(group.activations([node])[0] * unit.mean())
    assert node.layer is not None
    assert node.index is not None
    layer = architecture.layers[node.layer]
    if node.kind is Kind.NEURON:
        activation = captured.neurons[node.layer][row, node.position, node.index].detach()
        return float(activation * layer.w_out[node.index].mean())
    site = captured.attention[node.layer]
    value = site.values_per_head(row)[node.index, node.key]
    probability = site.used(row)[node.index, node.position, node.key]
    return float(probability * (value @ layer.w_o[node.index]).mean())


def as_theirs(model: Model, explanation: Explanation, node: Address, found: ReadOut) -> Tensor:
    """[V]: our output scores without scale and centring."""
    norm, w_u = model.architecture.final_norm, model.architecture.w_u
    stream = explanation.captured.final_input[explanation.row, node.position].detach()
    scale = (stream.var(correction=0) + norm.eps).sqrt()
    of_mean = (w_u - w_u.mean(0)) @ norm.gain
    ours = as_vector(found.output, len(w_u)) * scale
    return ours + mean_of_write(model, explanation, node) * of_mean


def check(model: Model, scores: Tensor, theirs: dict[str, Any], rare: Tensor) -> None:
    """The ten highest and lowest scores, and the tokens that have them."""
    error = TOLERANCE * float(scores.abs().max())
    kept = scores.clone()
    for name, sign in (("top", 1), ("bottom", -1)):
        kept[rare] = -sign * torch.inf
        best = kept.topk(LISTED, largest=sign > 0)
        recorded = [each["scalar"] for each in theirs[name]]
        assert (best.values - torch.tensor(recorded)).abs().max() <= error
        for each in theirs[name]:
            text = each["token"]
            if "\ufffd" not in text:  # part of a character, so of no one token
                at = float(scores[model.vocabulary.single(text)])
                assert at == pytest.approx(each["scalar"], abs=error)


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_nodes_match(name: str, serving: Serving, shared_data: Path) -> None:
    model, case = serving(CASES[name]), Case.read(shared_data, name)
    request = json.loads((shared_data / f"parity/requests/{name}.json").read_text())
    rare = torch.tensor(json.loads((shared_data / "parity/least_common_tokens.json").read_text()))
    compared = {"output": 0, "input": 0, "sources": 0}
    for explanation, answered in zip(case.explain(model), request["read_outs"], strict=True):
        outputs = answered["upvotedOutputTokens"]
        places = some_of_each_kind(outputs["nodeIndices"])
        nodes = [address(outputs["nodeIndices"][place], model) for place in places]
        every = len(model.architecture.w_u)
        found = read_out(model.architecture, explanation, nodes, every, every, case.tokens(0))
        inputs = answered["inputTokensThatUpvoteMlp"]["topTokensList"]
        sources = answered["tokenPairAttribution"]["topTokensAttendedToList"]
        for place, node in zip(places, nodes, strict=True):
            read = found[node]
            theirs = outputs["topTokensList"][place]
            check(model, as_theirs(model, explanation, node, read), theirs, rare)
            compared["output"] += 1
            uncentred = as_vector(read.output, every)
            with pytest.raises(AssertionError):  # ours as it is: another quantity
                check(model, uncentred, theirs, rare)
            if inputs[place] is not None:
                check(model, as_vector(read.input, every), inputs[place], rare)
                compared["input"] += 1
            if sources[place] is not None:
                _check_sources(read, sources[place])
                compared["sources"] += 1
    assert compared["output"]
    assert compared["input"]
    assert bool(compared["sources"]) is (name == "05a_ae_both")


def _check_sources(read: ReadOut, theirs: dict[str, Any]) -> None:
    """Tokens that an attention latent's value comes from; theirs lists masked ones with 0."""
    ours = dict(read.sources)
    error = TOLERANCE * max(map(abs, ours.values()))
    pairs = list(zip(theirs["tokenIndices"], theirs["attributions"], strict=True))
    assert any(score for _, score in pairs)
    for position, score in pairs:
        assert ours.get(position, 0.0) == pytest.approx(score, abs=error)
