"""StreamOutputTokens over real gRPC: what DescribeComponent says, of many components, in blocks."""

from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.json_format import Parse, ParseDict
from numpy.typing import NDArray
from tdb.inference.v1 import component_pb2, output_tokens_pb2
from tdb.type.v1 import tensor_pb2

from services.inference import output_tokens
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.model import Model
from tests.inference.helpers import shelf_of
from tests.inference.planted import LATENTS, random_dictionary
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

NEURONS = 64
Array = NDArray[Any]


def request(**more: Any) -> output_tokens_pb2.StreamOutputTokensRequest:
    fields = {"group": "neuron.1", **more}
    return ParseDict(fields, output_tokens_pb2.StreamOutputTokensRequest())


def array(message: tensor_pb2.Tensor) -> Array:
    ids = message.data_type == tensor_pb2.DATA_TYPE_INT32
    found: Array = np.frombuffer(message.data, "<i4" if ids else "<f4")
    return found.reshape(list(message.shape))


async def collect(
    stub: "Stub", **more: Any
) -> tuple[list[output_tokens_pb2.OutputTokens], output_tokens_pb2.StreamOutputTokensSummary]:
    blocks = []
    summary = None
    async for message in stub.StreamOutputTokens(request(**more)):
        assert summary is None, "the summary comes last"
        match message.WhichOneof("event"):
            case "progress":
                assert message.progress.unit == "components"
            case "tokens":
                blocks.append(message.tokens)
            case "summary":
                summary = message.summary
    assert summary is not None
    return blocks, summary


FIELDS = ("promoted", "promoted_scores", "suppressed", "suppressed_scores")


def joined(blocks: list[output_tokens_pb2.OutputTokens]) -> dict[str, Array]:
    return {
        name: np.concatenate([array(getattr(each, name)) for each in blocks]) for name in FIELDS
    }


async def described(stub: "Stub", component: str) -> dict[int, float]:
    """The scores of the hundred largest by size."""
    asked = component_pb2.DescribeComponentRequest(component=component, tokens=100, similar=0)
    write = (await stub.DescribeComponent(asked)).directions[0]
    return {each.token.id: each.score for each in write.output_tokens}


async def test_every_neuron_is_told_of_as_it_is_described(
    stub: "Stub", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_tokens, "AT_ONCE", 10)
    blocks, summary = await collect(stub, tokens=4)
    assert [each.first for each in blocks] == [*range(0, NEURONS, 10)]
    found = joined(blocks)
    assert {each.shape for each in found.values()} == {(NEURONS, 4)}
    for neuron in range(0, NEURONS, 9):
        scores = await described(stub, f"neuron.1.{neuron}")
        ordered = sorted(scores, key=lambda token: -scores[token])
        assert found["promoted"][neuron].tolist() == ordered[:4]
        assert found["suppressed"][neuron].tolist() == ordered[:-5:-1]
        for ids, values in (FIELDS[:2], FIELDS[2:]):
            for token, value in zip(found[ids][neuron], found[values][neuron], strict=True):
                assert value == pytest.approx(scores[token], rel=1e-4)
    assert summary.components == NEURONS
    assert summary.manifest.method.endswith("/StreamOutputTokens")
    again = Parse(summary.manifest.request_json, output_tokens_pb2.StreamOutputTokensRequest())
    assert again == request(model="tiny", first=0, count=NEURONS, tokens=4)


async def test_a_part_of_a_group_and_latents(
    stub: "Stub", model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = [random_dictionary("a", Point.MLP_OUT, 0), random_dictionary("b", Point.RESID_POST, 1)]
    shelf = shelf_of(served, model.architecture, torch.float32)
    monkeypatch.setattr(model.hooks, "shelf", shelf)
    (block,), summary = await collect(stub, group="latent.b", first=3, count=5)
    assert (block.first, summary.components) == (3, 5)
    assert [each.id for each in summary.manifest.dictionaries] == ["b"]
    assert block.promoted.shape == [5, 10]
    scores = await described(stub, "latent.b.4")
    assert array(block.promoted)[1].tolist() == sorted(scores, key=lambda each: -scores[each])[:10]
    (rest,), _ = await collect(stub, group="latent.b", first=LATENTS - 1)
    assert rest.promoted.shape == [1, 10]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"group": ""}, "group"),
        ({"group": "neuron.2"}, "group"),
        ({"group": "neuron.0.1"}, "group"),
        ({"group": "head.0"}, "group"),
        ({"group": "latent.none"}, "group"),
        ({"first": -1}, "first"),
        ({"first": NEURONS}, "first"),
        ({"count": 0}, "count"),
        ({"first": 1, "count": NEURONS}, "count"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 101}, "tokens"),
    ],
)
async def test_what_is_refused(stub: "Stub", given: dict[str, Any], field: str) -> None:
    code, named, _ = await refusal_of(first_of(stub, given))
    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def first_of(stub: "Stub", given: dict[str, Any]) -> Any:
    return await anext(aiter(stub.StreamOutputTokens(request(**given))))
