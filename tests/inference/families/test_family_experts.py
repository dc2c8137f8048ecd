"""Mixtures of experts: `mlp.L~t` is a node, and what `EXPERT_FEATURES` says holds.

Layers 0 and 2 of every variant have experts.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.common.addresses import Address, Kind, parse
from services.common.errors import InvalidArgument
from services.inference import features
from services.inference.engine import integrated, points, verification
from services.inference.engine.attribution import NormMode
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.captured import Row
from services.inference.engine.columns import Column, ExpertsNodes, NeuronNodes, NodeGroup
from services.inference.engine.generation import Continuation, Ending
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.objectives import LogProb
from services.inference.engine.readouts import read_out
from services.inference.engine.sampling import Sampling
from services.inference.engine.text import Vocabulary
from services.inference.engine.verification import Ablation
from tests.inference.families import test_family_numbers, test_family_passes, test_running
from tests.inference.families.models import (
    EXPERT_VARIANTS,
    IDS,
    LAST,
    VOCABULARY,
    KeepDouble,
    edited,
    engine_of,
    reference_of,
    scales_held,
    untouched,
)
from tests.inference.families.shared import (
    ALL,
    OBJECTIVE,
    VECTOR,
    close,
    difference,
    direct_sums,
)
from tests.inference.helpers import Engine, explained

every_expert = pytest.mark.parametrize("variant", EXPERT_VARIANTS)
STEP = 1e-5
ABLATED: list[tuple[str, str, int | None, Any]] = [
    ("mlp.0~3", "mlp", 0, (0, 3)),
    ("mlp.2", "mlp", 2, (0, slice(None))),
    ("head.1.2~6", "z", 1, (0, 6, 2)),
    ("head.1.3~6-4", "probabilities", 1, (0, 3, 6, 4)),
    ("attn.1~5", "attn", 1, (0, 5)),
    ("embed~2", "embed", None, (0, 2)),
]
EDITED: dict[str, list[Intervention]] = {
    "plain": [],
    "edited": [
        Intervention(parse("mlp.0"), Scale(0.5)),
        Intervention(parse(f"mlp.2~{LAST}"), Scale(2.0)),
        Intervention(parse(f"mlp.2~{LAST}"), Add(VECTOR)),
        Intervention(parse("resid_mid.1"), Scale(1.5)),
    ],
    "cut": [Intervention(parse("mlp.2"), SetTo(VECTOR))],
}


@every_expert
def test_logits(variant: str) -> None:
    test_family_passes.test_logits(variant)


@every_expert
def test_norm_modes(variant: str) -> None:
    test_family_passes.test_norm_modes(variant)


@every_expert
def test_loading(variant: str, tmp_path: Path) -> None:
    test_family_passes.test_loading(variant, tmp_path)


@every_expert
def test_every_layer_has_the_nodes_that_exist_there(variant: str) -> None:
    engine = engine_of(variant)
    mixed = variant == "qwen3_moe/mixed"
    assert engine.architecture.experts == (frozenset({0, 2}) if mixed else frozenset(range(3)))
    (explanation,) = engine.explain(explained(IDS, objective=OBJECTIVE))
    found = [type(group) for group in explanation.groups[-3:]]
    middle: type[NodeGroup] = NeuronNodes if mixed else ExpertsNodes
    assert found == [ExpertsNodes, middle, ExpertsNodes]
    group = explanation.groups[-1]
    assert [str(group.address(index)) for index in ALL] == [f"mlp.2~{token}" for token in ALL]
    assert not {"bias.mlp.0", "bias.mlp.2"} & set(explanation.remainder)
    with pytest.raises(InvalidArgument, match=r"mixture of experts.*finest node is mlp\.2"):
        engine.edits(Intervention(parse("neuron.2.0~1"), Zero()), tokens=len(IDS))
    with pytest.raises(InvalidArgument, match=r"read mlp_in\.0 or mlp_out\.0"):
        points.parse("mlp_act.0", engine.architecture)
    said = {feature: (works, why) for feature, works, why in features.on(engine.architecture)}
    works, why = said["target.neuron"]
    assert works is mixed
    assert "mixtures of experts" in why
    assert said["target.head"] == (True, "")


@pytest.mark.parametrize("norm_mode", NormMode)
@every_expert
def test_sums(variant: str, norm_mode: NormMode) -> None:
    engine = engine_of(variant)
    for wanted in EDITED.values():
        run = explained(IDS, *engine.edits(*wanted, tokens=len(IDS)), objective=OBJECTIVE)
        (explanation,) = engine.explain(run, norm_mode=norm_mode)
        total, size = direct_sums(explanation)
        assert abs(total - explanation.value) <= 1e-5 * size
        linear = norm_mode is not NormMode.LIVE
        assert (abs(explanation.remainder["rest"]) <= 1e-5 * size) is linear


@pytest.mark.parametrize("norm_mode", NormMode)
@every_expert
def test_estimates(variant: str, norm_mode: NormMode) -> None:
    reference = reference_of(variant, torch.float64)
    with KeepDouble():
        held = scales_held(variant, norm_mode)
        (explanation,) = engine_of(variant, torch.float64).explain(
            explained(IDS, objective=OBJECTIVE), norm_mode=norm_mode
        )
        seen: dict[tuple[str, int | None], Tensor] = {}
        reference.run(IDS, lambda kind, layer, x: seen.setdefault((kind, layer), x))
        for layer in (0, 2):
            group = next(
                group
                for group in explanation.groups
                if group.address(0).component == Address(Kind.MLP, layer)
            )
            for token in (2, LAST):
                moved = [
                    difference(
                        reference.run(
                            IDS,
                            edited(("mlp", layer, (0, token), partial(torch.mul, 1 + step))),
                            held,
                        )
                    )
                    for step in torch.tensor([STEP, -STEP], dtype=torch.float64)
                ]
                slope = (moved[0] - moved[1]) / (2 * STEP)
                found = group.gather(torch.tensor([token]))[0]
                assert float(found[3]) == pytest.approx(slope, rel=1e-4, abs=1e-8)
                length = float(seen["mlp", layer][0, token].norm())
                assert float(found[1]) == pytest.approx(length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_expert
def test_half_precision(variant: str, dtype: torch.dtype) -> None:
    test_family_numbers.test_half_precision(variant, dtype)


def ablations(engine: Engine) -> list[Ablation]:
    nodes = [parse(address) for address, *_ in ABLATED]
    edits = [engine.edits(Intervention(node, Zero()), tokens=len(IDS))[0] for node in nodes]
    return [Ablation(node, edit) for node, edit in zip(nodes, edits, strict=True)]


@every_expert
def test_ablation(variant: str) -> None:
    engine, reference = engine_of(variant), reference_of(variant)
    clean = reference.run(IDS, untouched)
    for ablation, (address, kind, layer, at) in zip(ablations(engine), ABLATED, strict=True):
        row = Row(IDS, (ablation.edit,))
        ours = engine.hooks.run([row], ALL, gradients=False).logits
        theirs = reference.run(IDS, edited((kind, layer, at, torch.zeros_like)))
        assert close(ours, theirs), address
        assert not close(ours, clean), address


@every_expert
def test_verification(variant: str) -> None:
    engine, reference = engine_of(variant), reference_of(variant)
    run = explained(IDS, objective=OBJECTIVE)
    clean = difference(reference.run(IDS, untouched))
    expected = [
        clean - difference(reference.run(IDS, edited((kind, layer, at, torch.zeros_like))))
        for _, kind, layer, at in ABLATED
    ]
    for tokens in (1, 10_000):
        begun = verification.begin(engine.hooks, run, ablations(engine), CancelToken(), tokens)
        chunks = [begun.chunk(number, CancelToken()) for number in range(len(begun.chunks))]
        effects = {str(each.node): each.effect for chunk in chunks for each in chunk}
        found = torch.tensor([effects[address] for address, *_ in ABLATED])
        assert close(found, torch.tensor(expected), 1e-4)


@every_expert
def test_integration(variant: str) -> None:
    """The mean gradient between 0 and the write, of Hugging Face's own passes."""
    engine, reference = engine_of(variant), reference_of(variant)
    node, shares = parse("mlp.0~3"), (0.25, 0.75)
    run = explained(IDS, objective=OBJECTIVE)
    begun = integrated.begin(engine.hooks, run, [node], len(shares), CancelToken())
    for number in range(len(begun.chunks)):
        begun.chunk(number, CancelToken())
    effects = []
    for share in shares:
        seen: dict[str, Tensor] = {}

        def site(
            kind: str,
            layer: int | None,
            values: Tensor,
            share: float = share,
            seen: dict[str, Tensor] = seen,
        ) -> Tensor:
            if (kind, layer) != ("mlp", 0):
                return values
            seen["end"] = values.detach()
            seen["leaf"] = (share * values.detach()).requires_grad_()
            return seen["leaf"]

        with torch.enable_grad():
            logits = reference.run(IDS, site)[0, LAST]
            objective = logits[[5, 6]].mean() - logits[[9, 11]].mean()
            (gradient,) = torch.autograd.grad(objective, seen["leaf"])
        effects.append(float((seen["end"] * gradient)[0, 3].sum()))
    assert begun.effects([node])[0] == pytest.approx(sum(effects) / 2, rel=1e-4)
    assert effects[0] != pytest.approx(effects[1], rel=1e-2)


@every_expert
def test_output_tokens_are_those_of_the_whole_write(variant: str) -> None:
    engine, reference = engine_of(variant), reference_of(variant)
    (explanation,) = engine.explain(explained(IDS, objective=OBJECTIVE))
    node = parse(f"mlp.2~{LAST}")
    read = read_out(engine.architecture, explanation, [node], VOCABULARY, VOCABULARY)[node]
    scales = reference.scales(IDS)
    clean = reference.run(IDS, untouched, scales)
    removed = edited(("mlp", 2, (0, LAST), torch.zeros_like))
    effect = (clean - reference.run(IDS, removed, scales))[0, LAST]
    ours = torch.tensor(sorted(read.output))[:, 1]
    assert close(ours, effect - effect.mean(), 1e-4)
    assert read.input == ()


@every_expert
def test_batches(variant: str) -> None:
    engine = engine_of(variant)
    runs = [
        explained(IDS, *engine.edits(*EDITED["edited"], tokens=len(IDS)), objective=OBJECTIVE),
        explained(IDS[:5], objective=LogProb((2, 3), 3)),
        explained(IDS, *engine.edits(*EDITED["cut"], tokens=len(IDS)), objective=OBJECTIVE),
    ]
    together = engine.explain(*runs)
    for run, batched in zip(runs, together, strict=True):
        (alone,) = engine.explain(run)
        assert batched.value == pytest.approx(alone.value, rel=1e-5, abs=1e-5)
        for column in Column:
            ours, theirs = (
                torch.cat([group.column(column) for group in explanation.groups])
                for explanation in (batched, alone)
            )
            assert close(ours, theirs)


@every_expert
def test_generation(variant: str) -> None:
    engine, reference = engine_of(variant), reference_of(variant)
    edits = engine.edits(Intervention(parse("mlp.0"), Scale(-1.0)), tokens=len(IDS) + 3)
    continuation = Continuation(
        engine.hooks,
        Vocabulary(VOCABULARY, None),
        IDS,
        edits,
        Sampling(),
        Ending(3),
        top=VOCABULARY,
    )
    ids = list(IDS)
    for _ in range(3):
        step = continuation.step(CancelToken())
        site = edited(("mlp", 0, (0,), partial(torch.mul, -1)))
        expected = reference.run(ids, site)[0, -1].log_softmax(-1)
        assert close(torch.tensor(sorted(step.top))[:, 1], expected, 1e-4)
        ids.append(step.token_id)


@every_expert
def test_points(variant: str) -> None:
    test_running.check_points(variant)
