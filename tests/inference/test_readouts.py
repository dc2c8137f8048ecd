"""Read-outs: outputs are what a write does to the logits, inputs gradients of traced values."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.inference.engine.readouts import ReadOut, read_out
from tests.inference import plain
from tests.inference.helpers import (
    FAMILIES,
    VOCABULARY,
    explained,
    in_float64,
    random_engine,
    random_model,
)

__all__ = ["in_float64"]

IDS = (3, 17, 4, 4, 25, 60, 8, 1)
NODES = ["neuron.1.7~3", "neuron.2.40~7", "head.1.2~6-3", "head.2.1~7-7", "head.0.3~5-0", "embed~4"]


def found(
    family: str, tokens: int = VOCABULARY, vocabulary: int = VOCABULARY
) -> dict[str, ReadOut]:
    engine = random_engine(family, torch.float64)
    (explanation,) = engine.explain(explained(IDS))
    nodes = [parse(text) for text in NODES]
    read = read_out(engine.architecture, explanation, nodes, tokens, vocabulary)
    return {str(node): each for node, each in read.items()}


def as_vector(scores: tuple[tuple[int, float], ...]) -> Tensor:
    vector = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token_id, score in scores:
        vector[token_id] = score
    return vector


def logits_at(model: Any, residual: Tensor, scale: Tensor, family: str) -> Tensor:
    """The final norm with a given scale, then the unembedding."""
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    centred = residual - residual.mean() if family == "gpt2" else residual
    logits: Tensor = (centred / scale * norm.weight) @ model.lm_head.weight.T
    return logits


def seen_in_clean_pass(model: Any, kind: str, layer: int | None) -> Tensor:
    seen: list[Tensor] = []

    def remember(at: str, at_layer: int | None, values: Tensor) -> Tensor:
        if (at, at_layer) == (kind, layer):
            seen.append(values)
        return values

    plain.forward(model, IDS, remember)
    return seen[0]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_output_tokens_are_what_removing_the_write_does_to_the_logits(family: str) -> None:
    """In the last layer, with the final scale held: logits with the node less those without."""
    model: Any = random_model(family, torch.float64)
    scales: plain.Scales = {}
    clean = plain.forward(model, IDS, scales=scales)
    read = found(family)
    for node, kind, index in (
        ("neuron.2.40~7", "neurons", (7, 40)),
        ("head.2.1~7-7", "probabilities", (1, 7, 7)),
    ):
        changes: list[Any] = [(kind, 2, index, torch.zeros_like)]
        if kind == "probabilities":  # attention also moves the MLP behind it: hold what that writes
            mlp = seen_in_clean_pass(model, "mlp", 2)
            changes.append(("mlp", 2, slice(None), partial(torch.mul, torch.zeros(()))))
            changes.append(("mlp", 2, slice(None), partial(torch.add, mlp)))
        site = plain.edited(*changes)
        ablated = plain.forward(model, IDS, site, {"final": scales["final"]})
        effect = (clean - ablated)[7]
        expected = effect - effect.mean()
        assert torch.allclose(as_vector(read[node].output), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_output_tokens_of_early_writes_go_through_the_final_norm_at_their_token(
    family: str,
) -> None:
    model: Any = random_model(family, torch.float64)
    scales: plain.Scales = {}
    plain.forward(model, IDS, scales=scales)
    embed = seen_in_clean_pass(model, "embed", None)
    expected = logits_at(model, embed[4], scales["final"][4], family)
    ours = as_vector(found(family)["embed~4"].output)
    assert torch.allclose(ours, expected - expected.mean(), rtol=1e-6, atol=1e-9)
    assert found(family)["embed~4"].input == ()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_input_tokens_are_gradients_of_the_traced_value(family: str) -> None:
    """Autograd through the pass written by hand, with the reading norm's scale held."""
    model: Any = random_model(family, torch.float64)
    read = found(family)
    embedding = model.get_input_embeddings().weight
    for node in NODES[:-1]:
        address = parse(node)
        layer, index = address.layer, address.index
        assert layer is not None
        assert index is not None
        is_neuron = node.startswith("neuron")
        scales: plain.Scales = {}
        plain.forward(model, IDS, scales=scales)
        seen: dict[str, Tensor] = {}
        reads = ("resid_mid", layer) if is_neuron else ("embed", None)
        if not is_neuron and layer:
            reads = ("resid_post", layer - 1)

        def leaf(
            kind: str,
            at: int | None,
            values: Tensor,
            reads: tuple[str, int | None] = reads,
            seen: dict[str, Tensor] = seen,
            layer: int = layer,
        ) -> Tensor:
            if (kind, at) == reads:
                seen["leaf"] = values = values.detach().requires_grad_()
            if at == layer:
                seen[kind] = values
            return values

        pre: list[Tensor] = []
        block = (model.transformer.h if family == "gpt2" else model.model.layers)[layer]
        gate = block.mlp.c_fc if family == "gpt2" else block.mlp.gate_proj
        handle = gate.register_forward_hook(lambda *a, pre=pre: pre.append(a[2]))
        held = {name: scales[name] for name in (f"attn.{layer}", f"mlp.{layer}")}
        with torch.enable_grad():
            plain.forward(model, IDS, leaf, held)
            if is_neuron:
                value = pre[0][address.position, index]
                (gradient,) = torch.autograd.grad(value, seen["leaf"])
                pairs = [(gradient[address.position], read[node].input)]
            else:
                q, k = (seen[name][index] for name in ("q", "k"))
                width = q.shape[-1] ** 0.5
                at_q, at_k = q[address.position], k[address.key]
                (through_q,) = torch.autograd.grad(
                    at_q @ at_k.detach() / width, seen["leaf"], retain_graph=True
                )
                (through_k,) = torch.autograd.grad(at_q.detach() @ at_k / width, seen["leaf"])
                pairs = [
                    (through_q[address.position], read[node].input),
                    (through_k[address.key], read[node].key_input),
                ]
        handle.remove()
        for gradient, ours in pairs:
            expected = embedding @ gradient
            assert expected.abs().max() > 1e-6
            assert torch.allclose(as_vector(ours), expected, rtol=1e-5, atol=1e-9), node


def test_exactly_the_tokens_asked_for_largest_first_and_never_undecodable_ones() -> None:
    everything = found("gpt2")
    few = found("gpt2", tokens=5, vocabulary=40)
    for node, read in few.items():
        for ours, full in (
            (read.output, everything[node].output),
            (read.input, everything[node].input),
        ):
            decodable = [each for each in full if each[0] < 40]
            assert [token for token, _ in ours] == [token for token, _ in decodable[:5]]
            sizes = [abs(score) for _, score in full]
            assert sizes == sorted(sizes, reverse=True)
