"""Every feature has its test on every variant, and the wrong layout fails."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from services.common.addresses import parse
from services.common.errors import InvalidArgument
from services.inference import features
from services.inference.engine.captured import Row
from services.inference.engine.families import EXPERT_FEATURES, FEATURES
from services.inference.engine.interventions import Intervention, Zero
from tests.inference.families import (
    test_family_experts,
    test_family_latents,
    test_family_numbers,
    test_family_passes,
    test_family_traces,
    test_running,
    test_verifying,
)
from tests.inference.families.models import (
    EXPERT_VARIANTS,
    HEADS,
    IDS,
    VARIANTS,
    WIDTH,
    WINDOW,
    engine_of,
    reference_of,
    untouched,
)
from tests.inference.families.shared import OBJECTIVE, close, direct_sums
from tests.inference.helpers import Engine, explained


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
    said = {feature: works for feature, works, _ in features.on(engine.architecture)}
    assert said["target.residual"]
    assert not said["target.resid_mid"]
    sequential = engine_of("gpt_neox/sequential")
    assert sequential.edits(Intervention(parse("resid_mid.1~2"), Zero()), tokens=len(IDS))


def test_every_feature_has_its_test_on_every_variant() -> None:
    files = (
        test_family_passes,
        test_family_numbers,
        test_family_latents,
        test_family_traces,
        test_running,
        test_verifying,
    )
    for feature in FEATURES:
        assert set(VARIANTS) <= variants_of(feature, *files), feature
    for feature in EXPERT_FEATURES:
        found = variants_of(feature, test_family_experts, test_family_latents, test_family_traces)
        assert set(EXPERT_VARIANTS) <= found, feature


def variants_of(feature: str, *files: ModuleType) -> set[str]:
    """What the test of a feature runs on."""
    name = "test_" + feature.replace(" ", "_").replace("-", "_")
    (test,) = (vars(file)[name] for file in files if name in vars(file))
    return {
        variant for mark in test.pytestmark if mark.args[0] == "variant" for variant in mark.args[1]
    }
