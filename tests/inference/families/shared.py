"""What the tests of all families share: how they run, what they explain, how they compare."""

import pytest
import torch
from torch import Tensor

from services.common.addresses import parse
from services.inference.engine.attribution import Explanation
from services.inference.engine.columns import Column
from services.inference.engine.interventions import Add, Intervention, Scale, SetTo, Zero
from services.inference.engine.objectives import LogitDiff
from tests.inference.families.models import (
    IDS,
    LAST,
    VARIANTS,
    WIDTH,
)
from tests.inference.helpers import Engine

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
