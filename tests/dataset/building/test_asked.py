"""A plan before anything is built: what is too large is refused, what a disk must hold is known."""

from pathlib import Path
from typing import Any

import pytest
from tdb.inference.v1 import model_pb2

from services.common.errors import InvalidArgument
from services.dataset.building import asked
from services.dataset.building.plan import Plan
from tests.dataset.building import helpers

GPT2 = model_pb2.GetModelResponse(
    dimensions=model_pb2.Dimensions(layers=12, heads=12, neurons=3072, context=1024),
    tokenizer=model_pb2.TokenizerFacts(vocabulary=50257, prepends_bos=True, bos_id=50256),
)


def plan(data: Path, **more: Any) -> Plan:
    request = asked.canonical(helpers.request(**more))
    return asked.plan(request, GPT2, asked.corpus(request, data / "corpora"))


def test_a_record_must_fit_into_a_message(data: Path) -> None:
    with pytest.raises(InvalidArgument, match="one message holds 8") as refusal:
        plan(data, sequenceLength=1024, topK=20)
    assert refusal.value.field == "sequence_length"
    assert plan(data, sequenceLength=1024, topK=20, groups=["neuron"]).sequence_length == 1024
    with pytest.raises(InvalidArgument, match="ask for shorter sequences or fewer examples"):
        plan(data, sequenceLength=1024, topK=400, groups=["neuron"])


def test_defaults_are_the_model_s_neurons_and_heads(data: Path) -> None:
    found = plan(data, groups=[], tokens=10_000_000)
    names = [each.name for each in found.components]
    assert names == [f"{kind}.{layer}" for kind in ("neuron", "head") for layer in range(12)]
    assert sum(each.count for each in found.components) == 36_864 + 144
    assert found.bos == 50256
    shorter = plan(data, groups=[], tokens=10_000_000, topK=1)
    assert shorter.disk_bytes < found.disk_bytes
    assert found.disk_bytes > 3 * 36_864 * (3 + 2 + 20) * 12 * 4
