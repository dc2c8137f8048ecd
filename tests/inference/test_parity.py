"""Numbers of OpenAI's Transformer Debugger server on the same weights, requests and edits.

Every case, every column of every node; `openai_numbers` says how requests and shapes correspond.
One more thing differs on purpose and is reproduced here: it recomputes a traced value without the
interventions and dictionaries of the traced node's own block. And it reads TopK dictionaries
without the normalisation that their authors trained them with.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self

import pytest
import torch

from services.common.settings import DictionarySource
from services.inference.engine import loading
from services.inference.engine.attribution import NormMode, row_of
from services.inference.engine.columns import Column
from services.inference.engine.dictionaries.dictionary import InputNorm, NormKind
from services.inference.engine.latents import LatentNodes
from services.inference.engine.model import Model
from services.inference.engine.run_view import RunView
from services.inference.engine.tracing import HeldWrite, Side, TracedScore, TracedValue
from tests.inference.helpers import shelf_of
from tests.inference.openai_numbers import TOLERANCE, Case

pytestmark = pytest.mark.shared

PLAIN = [
    "01a_plain_logitdiff",
    "01b_plain_multi_targets",
    "01c_plain_no_distractor",
    "01d_two_prompts",
    "01e_single_token_prompt",
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
OF_SUBLAYERS = [
    "01g_plain_with_ae_server_neuron_components",
    "02e_ablate_mlp_ae_latent",
    "02f_ablate_attn_ae_latent",
    "02i_ablate_neuron_on_ae_server",
    "02j_zero_ablate_active_latents",
    "03g_trace_mlp_ae_latent",
    "03h_trace_attn_ae_latent",
    "03j_trace_neuron_on_ae_server",
    "03k_trace_head_V_on_ae_server",
    "03l_trace_head_Q_on_ae_server",
    "05a_ae_both",
    "05b_ae_mlp_only",
    "05c_ae_attn_only",
]
OF_NEURONS = [
    "02g_ablate_ae_latent_mlppost",
    "02k_zero_ablate_active_latents_mlppost",
    "03i_trace_mlp_ae_latent_mlppost",
    "05d_ae_mlppost",
]
SERVERS = {
    "none": (),
    "mlp+attn": ("ae-resid-delta-mlp-v4", "ae-resid-delta-attn-v4"),
    "mlppost": ("ae-mlp-post-act-v4",),
    "topk": ("ae-resid-delta-mlp-topk",),
}
"""By the dictionaries that were loaded."""
CASES = {
    **dict.fromkeys(PLAIN, "none"),
    **dict.fromkeys(OF_SUBLAYERS, "mlp+attn"),
    **dict.fromkeys(OF_NEURONS, "mlppost"),
}
Serving = Callable[[str], Model]


@pytest.fixture(scope="module")
def serving(shared_data: Path) -> Serving:
    """The model as each server had it."""
    parity = shared_data / "parity"

    @cache
    def served(server: str) -> Model:
        weights, tokenizer = str(parity / "model"), str(shared_data / "gpt2-tokenizer")
        model = Model(
            loading.load("parity", weights, tokenizer, torch.device("cpu"), torch.float32)
        )
        # They are random, so their self-test must be overruled.
        sources = [
            DictionarySource(name, str(parity / "dictionaries" / name), unchecked=True)
            for name in SERVERS[server]
        ]
        model.open_dictionaries(sources, 1 << 30)
        return model

    return served


@pytest.fixture(scope="module")
def model(serving: Serving) -> Model:
    return serving("none")


@pytest.mark.parametrize("name", CASES)
def test_every_number_matches(name: str, serving: Serving, shared_data: Path) -> None:
    model, case = serving(CASES[name]), Case.read(shared_data, name)
    for number, explanation in enumerate(case.explain(model)):
        case.matches(number, explanation)


def test_every_case_is_compared(shared_data: Path) -> None:
    recorded = {path.stem for path in (shared_data / "parity/expected").glob("*.npz")}
    apart = {
        "03n_trace_V_same_head_ablated",
        "03o_trace_attn_ae_latent_head_ablated_same_layer",
        "09b_topk_ae_mlp_only",
    }
    assert recorded == CASES.keys() | apart


def test_the_comparison_fails_on_another_run(model: Model, shared_data: Path) -> None:
    """Negative control: the ablated expectations do not match the plain run, nor the other way."""
    case = Case.read(shared_data, "02a_ablate_neuron")
    explanations = case.explain(model)
    assert max(case.errors(0, explanations[1]).values()) > 1e-3
    assert max(case.errors(1, explanations[0]).values()) > 1e-3


def test_the_comparison_fails_on_latents_of_another_run(
    serving: Serving, shared_data: Path
) -> None:
    model, case = serving("mlp+attn"), Case.read(shared_data, "02e_ablate_mlp_ae_latent")
    ablated, clean = case.explain(model)
    latents = [group for group in clean.groups if isinstance(group, LatentNodes)]
    assert len(latents) == 6
    for number, other in ((0, clean), (1, ablated)):
        errors = case.errors(number, other)
        for column in ("latent", "write_norm", "act_times_grad", "write_to_final_residual_grad"):
            assert errors[f"online_mlp_autoencoder_{column}/L1"] > 1e-3


def test_topk_is_read_there_without_its_normalisation(serving: Serving, shared_data: Path) -> None:
    model, case = serving("topk"), Case.read(shared_data, "09b_topk_ae_mlp_only")
    dictionaries = model.shelf.bind(list(model.shelf.served))
    assert {bound.dictionary.norm.kind for bound in dictionaries} == {NormKind.LAYER_NORM}
    (normalised,) = case.explain(model)
    for layer in range(3):
        latents = f"online_mlp_autoencoder_latent/L{layer}"
        assert case.errors(0, normalised)[latents] > 0.1
    model.hooks.shelf = shelf_of(
        [replace(bound.dictionary, norm=InputNorm()) for bound in dictionaries],
        model.architecture,
        torch.float32,
    )
    (explanation,) = case.explain(model)
    case.matches(0, explanation)


@dataclass(frozen=True, eq=False)
class AsRecomputed(TracedValue):
    """Holds what it was given, whatever run it is explained in."""

    def hold(self, run: RunView) -> Self:
        return self


def test_a_value_of_an_ablated_head_is_recomputed_there(model: Model, shared_data: Path) -> None:
    """It takes the pattern before the ablation and the downstream gradient after it."""
    case = Case.read(shared_data, "03n_trace_V_same_head_ablated")
    ablated, clean = runs = case.runs(model)
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
    for number, explanation in enumerate(case.explain(model, [recomputed, clean])):
        case.matches(number, explanation)
    (ours,) = case.explain(model, [ablated])
    assert ours.value == 0  # in the run as it is the pair writes nothing


def test_a_latent_behind_an_ablated_head_is_recomputed_there(
    serving: Serving, shared_data: Path
) -> None:
    """The head's ablation is all there is, so without its block's J is that of the clean run; ours
    is what the latent's pre-activation really is."""
    case = Case.read(shared_data, "03o_trace_attn_ae_latent_head_ablated_same_layer")
    ours, clean = case.explain(serving("mlp+attn"))
    case.matches(1, clean)
    effects = (Column.DIRECT_EFFECT, Column.TOTAL_EFFECT)
    values = (Column.ACTIVATION, Column.WRITE_MAGNITUDE)
    assert max(case.errors(0, ours, values).values()) <= TOLERANCE
    assert max(case.errors(0, clean, effects).values()) <= TOLERANCE
    assert max(case.errors(0, clean, values).values()) > 1e-3
    assert max(case.errors(0, ours, effects).values()) > 1e-3
    assert case.value(0) == pytest.approx(clean.value, rel=TOLERANCE)
    assert ours.value != pytest.approx(clean.value, rel=0.1)
    logits = case.logits(0)
    assert (ours.logits - logits).abs().max() <= TOLERANCE * logits.abs().max()


def test_the_traces_differ_from_each_other(model: Model, shared_data: Path) -> None:
    """Negative control: what is expected of the query does not match the key, nor both."""
    case = Case.read(shared_data, "03d_trace_head_Q")
    (run,) = case.runs(model)
    assert isinstance(run.objective, TracedScore)
    others = [replace(run, objective=replace(run.objective, live=each)) for each in Side]
    errors = {
        side: max(case.errors(0, explanation).values())
        for side, explanation in zip(Side, case.explain(model, others), strict=True)
    }
    assert errors[Side.QUERY] <= TOLERANCE
    assert errors[Side.KEY] > 1e-2
    assert errors[Side.BOTH] > 1e-2
