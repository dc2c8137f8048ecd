"""Dictionaries over gRPC: listed with their self-test, refused where they do not fit, in tables."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
import torch
from google.protobuf.json_format import Parse
from safetensors.torch import save_file
from tdb.inference.v1 import (
    attribute_pb2,
    model_pb2,
    objective_pb2,
    run_pb2,
    service_pb2_grpc,
    verify_pb2,
)

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.settings import DictionarySource, ModelSource, Settings
from services.inference.engine.model import Model
from services.inference.request_tracing import traced_node
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

WIDTH = 16
IDS = [5, 17, 4, 25, 60, 8]


def write(
    folder: Path, hook: str, w_enc: torch.Tensor, w_dec: torch.Tensor, **metadata: Any
) -> None:
    """A ReLU dictionary in SAELens's layout."""
    folder.mkdir(parents=True)
    latents = w_enc.shape[1]
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": latents,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": hook, **metadata},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {
        "W_enc": w_enc,
        "W_dec": w_dec,
        "b_enc": torch.zeros(latents),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file(tensors, folder / "sae_weights.safetensors")


def exact() -> tuple[torch.Tensor, torch.Tensor]:
    """relu(x) and relu(-x) of every channel: they add up to x."""
    eye = torch.eye(WIDTH)
    return torch.cat([eye, -eye], 1), torch.cat([eye, -eye])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dictionaries")
    for layer in range(2):
        write(root / "set" / str(layer), f"blocks.{layer}.hook_mlp_out", *exact())
    write(root / "attn", "blocks.1.hook_attn_out", *exact(), l0=WIDTH, fvu=0.0)
    write(root / "stream", "blocks.1.hook_resid_post", *exact())
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(WIDTH, 40, generator=generator)
    write(root / "random", "blocks.1.hook_mlp_out", random, random.T.contiguous())
    write(root / "declared", "blocks.1.hook_attn_out", *exact(), l0=3.0)
    return root


@pytest.fixture(scope="module")
def served(model_folder: Path, folders: Path) -> Model:
    sources = [
        DictionarySource("set", str(folders / "set"), False),
        DictionarySource("attn", str(folders / "attn"), False),
        DictionarySource("stream", str(folders / "stream"), False),
        DictionarySource("random", str(folders / "random"), True),
    ]
    return load_model(ModelSource("tiny", str(model_folder)), None, sources)


@pytest_asyncio.fixture
async def stub(
    served: Model, model_folder: Path, scheduler: Scheduler, tmp_path: Path
) -> AsyncIterator["Stub"]:
    settings = Settings.from_env(
        {
            "TDB_MODEL": f"tiny={model_folder}",
            "TDB_DATA_DIR": str(tmp_path),
            "TDB_CACHE_MIB": "0",
        }
    )
    async with build_server(settings, scheduler, {"tiny": served}, port=0) as server:
        await server.set_serving()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield service_pb2_grpc.InferenceServiceStub(channel)


def table(*dictionaries: str, **more: Any) -> attribute_pb2.AttributeRequest:
    request = attribute_pb2.AttributeRequest(dictionaries=dictionaries, **more)
    request.run.prompt.token_ids.ids.extend(IDS)
    request.objective.logit_diff.targets.add(id=5)
    request.objective.logit_diff.distractors.add(id=9)
    return request


async def test_get_model_lists_them_with_what_they_measured(stub: "Stub") -> None:
    described = await stub.GetModel(model_pb2.GetModelRequest())
    by_id = {each.id: each for each in described.dictionaries}
    assert set(by_id) == {"set-mlp_out-0", "set-mlp_out-1", "attn", "stream", "random"}
    attn = by_id["attn"]
    assert (attn.site_in, attn.latents, attn.activation) == ("attn_out.1", 2 * WIDTH, "relu")
    assert attn.self_test.fvu < 1e-6
    assert attn.self_test.l0 == pytest.approx(WIDTH)
    assert attn.self_test.declared_l0 == WIDTH
    assert 500 <= attn.self_test.tokens <= 4_100
    assert attn.set_name == "attn"
    assert by_id["set-mlp_out-0"].set_name == "set"
    assert not attn.warning
    assert "FVU" in by_id["random"].warning


def test_one_that_does_not_fit_is_refused_with_the_numbers(
    model_folder: Path, folders: Path
) -> None:
    for name, numbers in (
        ("random", "FVU is"),
        ("declared", "L0 is 16, where its files declare 3"),
    ):
        source = DictionarySource(name, str(folders / name), False)
        with pytest.raises(FailedPrecondition, match=numbers) as refused:
            load_model(ModelSource("tiny", str(model_folder)), None, [source])
        assert "tried instead: " in refused.value.message
        assert "before (" not in refused.value.message  # this model has no post-norms


async def test_latents_stand_in_the_table_and_close(stub: "Stub") -> None:
    plain = await stub.Attribute(table(top_k=30))
    response = await stub.Attribute(table("set", "attn", "stream", top_k=30))
    assert response.objective_value == pytest.approx(plain.objective_value, abs=1e-5)
    totals = response.totals
    assert totals.listed + totals.unlisted + totals.remainder == pytest.approx(
        response.objective_value, abs=1e-4
    )
    kinds = {row.node.partition(".")[0] for row in response.rows}
    assert "latent" in kinds
    assert "neuron" not in kinds
    assert any(row.node.startswith("head.0.") for row in response.rows)
    assert not any(row.node.startswith("head.1.") for row in response.rows)
    left = {row.node for row in response.remainder}
    assert {"bias.attn", "error.attn", "error.set-mlp_out-0"} <= left
    assert "bias.mlp.0" not in left
    (view,) = response.views
    assert view.dictionary == "stream"
    assert view.latents + view.bias + view.error == pytest.approx(view.site, abs=1e-4)
    manifest = response.manifest
    names = [each.id for each in manifest.dictionaries]
    assert names == ["attn", "set-mlp_out-0", "set-mlp_out-1", "stream"]
    assert all(len(each.weights_hash) == 64 for each in manifest.dictionaries)
    assert manifest.result_id != plain.manifest.result_id
    replayed = attribute_pb2.AttributeRequest()
    replayed.CopyFrom(table(*names, top_k=30))
    again = await stub.Attribute(replayed)
    assert again.manifest.result_id == manifest.result_id


async def test_an_ablated_latent_is_verified_and_named_in_the_manifest(stub: "Stub") -> None:
    request = table("random", top_k=20)
    response = await stub.Attribute(request)
    assert "FVU" in response.manifest.warnings[0]
    latents = [row for row in response.rows if row.node.startswith("latent.random")]
    node = latents[0].node
    run = run_pb2.RunRequest()
    run.run.prompt.token_ids.ids.extend(IDS)
    run.run.interventions.add(target=node).zero.SetInParent()
    run.tokens.add(id=5)
    run.tokens.add(id=9)
    ablated = await stub.Run(run)
    (receipt,) = ablated.receipts
    assert receipt.target == node
    assert receipt.before == pytest.approx(latents[0].activation, rel=1e-5)
    assert receipt.after == 0
    assert [each.id for each in ablated.manifest.dictionaries] == ["random"]
    target, distractor = ablated.next_tokens[0].named
    without = target.logit - distractor.logit
    verify = verify_pb2.VerifyRequest(table=table(), nodes=[node])
    verified = [
        event.node async for event in stub.Verify(verify) if event.WhichOneof("event") == "node"
    ]
    assert verified[0].objective_value == pytest.approx(without, abs=1e-4)
    assert verified[0].verified_effect == pytest.approx(
        response.objective_value - without, abs=1e-4
    )
    assert verified[0].total_effect == pytest.approx(latents[0].total_effect, rel=1e-3, abs=1e-5)


async def test_named_latents_are_verified_from_another_run(stub: "Stub") -> None:
    """One token of a latent and all of them: what `Run` does with the same values set."""
    request = verify_pb2.VerifyRequest(
        table=table(), nodes=["latent.random.3~5", "latent.random.3"]
    )
    source = request.table.baseline.run.source
    source.prompt.token_ids.ids.extend(reversed(IDS))
    source.interventions.add(target="latent.random.3~2").scale.factor = 4.0
    events = [event async for event in stub.Verify(request)]
    nodes = [event.node for event in events if event.WhichOneof("event") == "node"]
    plain = (await stub.Attribute(table())).objective_value
    for found in nodes:
        run = run_pb2.RunRequest()
        run.run.prompt.token_ids.ids.extend(IDS)
        run.run.interventions.add(target=found.node).patch.CopyFrom(request.table.baseline.run)
        run.tokens.add(id=5)
        run.tokens.add(id=9)
        target, distractor = (await stub.Run(run)).next_tokens[0].named
        moved = target.logit - distractor.logit
        assert found.objective_value == pytest.approx(moved, abs=1e-4)
        assert found.verified_effect == pytest.approx(plain - moved, abs=1e-4)
    assert max(abs(each.verified_effect) for each in nodes) > 1e-3
    assert [each.id for each in events[-1].summary.manifest.dictionaries] == ["random"]


async def test_the_table_of_latents_is_verified_row_by_row(stub: "Stub") -> None:
    request = verify_pb2.VerifyRequest(table=table("set", top_k=10))
    events = [event async for event in stub.Verify(request)]
    nodes = [event.node.node for event in events if event.WhichOneof("event") == "node"]
    assert len(nodes) == 10
    assert any(node.startswith("latent.set-mlp_out") for node in nodes)
    assert {each.id for each in events[-1].summary.manifest.dictionaries} == {
        "set-mlp_out-0",
        "set-mlp_out-1",
    }


async def test_latents_are_read_out_with_their_sources(stub: "Stub", served: Model) -> None:
    request = table("set", "attn", "stream", top_k=40)
    request.read_outs.tokens = 4
    request.read_outs.sources = 3
    response = await stub.Attribute(request)
    rows = {row.node: row for row in response.rows if row.node.startswith("latent.")}
    assert {name.split(".")[1] for name in rows} >= {"attn", "stream", "set-mlp_out-0"}
    for name, row in rows.items():
        assert len(row.output_tokens) == len(row.input_tokens) == 4
        assert not row.key_input_tokens
        position = int(name.partition("~")[2])
        from_attention = name.startswith("latent.attn") and row.activation > 0
        assert len(row.sources) == (min(3, position + 1) if from_attention else 0)
        assert all(each.position <= position for each in row.sources)
    assert any(row.sources for row in rows.values())
    assert json.loads(response.manifest.request_json)["readOuts"] == {"tokens": 4, "sources": 3}
    # Of the two halves of a channel that this dictionary is, the value is the channel of
    # attention's output: all its sources together, but for the output bias.
    node, row = next((name, row) for name, row in rows.items() if row.sources)
    request.read_outs.sources = 100
    everything = await stub.Attribute(request)
    (whole,) = (each for each in everything.rows if each.node == node)
    assert list(whole.sources)[: len(row.sources)] == list(row.sources)
    latent = int(node.split(".")[2].partition("~")[0])
    bias = served.architecture.layers[1].b_o
    assert bias is not None
    held = float(bias[latent % WIDTH]) * (1 if latent < WIDTH else -1)
    total = sum(each.score for each in whole.sources)
    assert total == pytest.approx(whole.activation - held, abs=1e-5)


async def test_latents_are_activations_by_name(stub: "Stub") -> None:
    attributed = await stub.Attribute(table("attn", top_k=200))
    request = run_pb2.RunRequest(activations=["latents.attn", "latents.random"])
    request.run.prompt.token_ids.ids.extend(IDS)
    response = await stub.Run(request)
    first, second = response.activations
    assert [each.point for each in response.activations] == ["latents.attn", "latents.random"]
    assert list(first.axes) == ["token", "latent"]
    assert list(first.tensor.shape) == [len(IDS), 2 * WIDTH]
    assert list(second.tensor.shape) == [len(IDS), 40]
    values = np.frombuffer(first.tensor.data, "<f4").reshape(len(IDS), -1)
    for row in attributed.rows:
        if row.node.startswith("latent.attn"):
            latent, token = map(int, row.node.split(".")[2].split("~"))
            assert values[token, latent] == pytest.approx(row.activation, abs=1e-5)
    assert [each.id for each in response.manifest.dictionaries] == ["attn", "random"]
    stream = run_pb2.StreamActivationsRequest(points=["latents.attn"])
    stream.run.prompt.token_ids.ids.extend(IDS)
    events = [event async for event in stub.StreamActivations(stream)]
    data = b"".join(event.chunk for event in events if event.WhichOneof("event") == "chunk")
    assert data == first.tensor.data
    assert [each.id for each in events[-1].summary.manifest.dictionaries] == ["attn"]


async def test_latents_of_no_dictionary_are_no_point(stub: "Stub") -> None:
    request = run_pb2.RunRequest(activations=["latents.nothing"])
    request.run.prompt.token_ids.ids.extend(IDS)
    code, at, message = await refusal_of(stub.Run(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert at == "activations[0]"
    assert "there are latents.attn" in message


@pytest.mark.parametrize(
    ("names", "field", "sentence"),
    [
        (["nothing"], "dictionaries[0]", "served: attn, random, set, stream"),
        (["set", "random"], "dictionaries[1]", "both read mlp.1"),
        (["attn", "attn"], "dictionaries[1]", "named twice"),
        (["set", "set-mlp_out-0"], "dictionaries[1]", "named twice"),
    ],
)
async def test_what_cannot_stand_together_is_refused(
    stub: "Stub", names: list[str], field: str, sentence: str
) -> None:
    code, at, message = await refusal_of(stub.Attribute(table(*names)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert at == field
    assert sentence in message


def traced(node: str, *dictionaries: str, **more: Any) -> attribute_pb2.AttributeRequest:
    request = attribute_pb2.AttributeRequest(dictionaries=dictionaries, top_k=20)
    request.run.prompt.token_ids.ids.extend(IDS)
    request.objective.traced_node.CopyFrom(objective_pb2.TracedNode(node=node, **more))
    return request


PRE, POST = objective_pb2.ACTIVATION_SIDE_PRE, objective_pb2.ACTIVATION_SIDE_POST


@pytest.mark.parametrize("name", ["set-mlp_out-1", "attn", "stream", "random"])
async def test_a_latent_is_traced(stub: "Stub", name: str) -> None:
    """Before its activation, after it, verified, along paths, and replayed from the manifest."""
    listed = await stub.Attribute(table(name, top_k=40))
    node = next(row for row in listed.rows if row.node.startswith(f"latent.{name}"))
    before = await stub.Attribute(traced(node.node, "set-mlp_out-0"))
    after = await stub.Attribute(traced(node.node, "set-mlp_out-0", side=POST))
    for response in (before, after):  # active, and relu: J is the same
        totals = response.totals
        total = totals.listed + totals.unlisted + totals.remainder
        assert total == pytest.approx(response.objective_value, abs=1e-4)
        assert response.objective_value == pytest.approx(node.activation, rel=1e-4)
        assert any(row.direct_effect for row in response.rows)
        assert {each.id for each in response.manifest.dictionaries} == {name, "set-mlp_out-0"}
        assert bool(response.manifest.warnings) is (name == "random")
    written = json.loads(before.manifest.request_json)["objective"]["tracedNode"]
    assert written == {"node": node.node, "side": "ACTIVATION_SIDE_PRE"}
    again = Parse(before.manifest.request_json, attribute_pb2.AttributeRequest())
    assert (await stub.Attribute(again)).manifest.result_id == before.manifest.result_id
    nodes = ["embed~5", "neuron.0.3~5", "head.0.0~5", node.node]
    for side, itself in ((PRE, 0.0), (POST, node.activation)):
        request = verify_pb2.VerifyRequest(table=traced(node.node, side=side), nodes=nodes)
        request.table.ClearField("top_k")
        found = {
            event.node.node: event.node
            async for event in stub.Verify(request)
            if event.WhichOneof("event") == "node"
        }
        assert found[node.node].verified_effect == pytest.approx(itself, rel=1e-4, abs=1e-5)
        assert found[node.node].total_effect == pytest.approx(itself, rel=1e-4)
        for ablated in nodes[:3]:
            edited = traced(node.node, side=side)
            edited.run.interventions.add(target=ablated).zero.SetInParent()
            without = (await stub.Attribute(edited)).objective_value
            assert found[ablated].objective_value == pytest.approx(without, abs=1e-4)


async def test_integrated_effects_of_a_traced_latent_add_up(stub: "Stub") -> None:
    """All neurons of a layer together from 0, and all latents of one that stands there."""
    node = "latent.stream.3~5"
    for kind, listed, target in (
        ("neuron.0.", (), "mlp.0"),
        ("latent.set-mlp_out-0.", ("set-mlp_out-0",), ""),
    ):
        request = traced(node, *listed)
        request.top_k, request.integrated_steps = 20_000, 200
        response = await stub.Attribute(request)
        moved = sum(row.integrated_effect for row in response.rows if row.node.startswith(kind))
        if not target:  # they are exact: with all at 0 nothing is written
            target = "mlp.0"
        edited = traced(node)
        edited.run.interventions.add(target=target).zero.SetInParent()
        without = (await stub.Attribute(edited)).objective_value
        assert moved == pytest.approx(response.objective_value - without, rel=2e-2, abs=2e-3)
        assert abs(moved) > 0.01


async def test_a_latents_own_integrated_effect_is_its_value(stub: "Stub") -> None:
    listed = await stub.Attribute(table("stream", top_k=40))
    node = next(row for row in listed.rows if row.node.startswith("latent.stream"))
    request = traced(node.node, "stream", side=POST)
    request.top_k, request.integrated_steps = 2_000, 3
    response = await stub.Attribute(request)
    (own,) = (row for row in response.rows if row.node == node.node)
    for value in (own.activation, own.total_effect, own.integrated_effect):
        assert value == pytest.approx(response.objective_value, rel=1e-5)
    assert own.direct_effect == 0


async def test_a_pairs_write_is_traced_on_a_latent(stub: "Stub") -> None:
    latent = traced("latent.stream.3~5")
    request = traced("head.0.1~5-2", through=objective_pb2.THROUGH_VALUE)
    request.objective.traced_node.downstream.CopyFrom(latent.objective)
    response = await stub.Attribute(request)
    latent.top_k = 20_000
    (pair,) = (row for row in (await stub.Attribute(latent)).rows if row.node == "head.0.1~5-2")
    assert response.objective_value == pytest.approx(pair.direct_effect, rel=1e-4)
    assert [each.id for each in response.manifest.dictionaries] == ["stream"]


@pytest.mark.parametrize(
    ("node", "more", "field", "sentence"),
    [
        ("latent.stream.3", {}, "node", "has a value at every token"),
        ("latent.stream.32~5", {}, "node", "valid is 0..31"),
        ("latent.stream.3~6", {}, "node", "6 does not exist"),
        ("latent.nothing.3~5", {}, "node", "'nothing'"),
        ("bias.stream~5", {}, "node", "no value that can be traced"),
        ("latent.stream.3~5", {"through": objective_pb2.THROUGH_GATE}, "through", "one input"),
        ("latent.stream.3~5", {"side": 9}, "side", "does not define"),
        (
            "latent.stream.3~5",
            {"downstream": table().objective},
            "downstream",
            "THROUGH_VALUE only",
        ),
    ],
)
async def test_traces_of_latents_that_make_no_sense_are_refused(
    stub: "Stub", node: str, more: dict[str, Any], field: str, sentence: str
) -> None:
    code, at, message = await refusal_of(stub.Attribute(traced(node, **more)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert at == f"objective.traced_node.{field}"
    assert sentence in message


def test_nothing_is_upstream_of_a_latent_of_the_embedding(
    model_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "start", "blocks.0.hook_resid_pre", *exact())
    source = DictionarySource("start", str(tmp_path / "start"), False)
    model = load_model(ModelSource("tiny", str(model_folder)), None, [source])
    message = objective_pb2.TracedNode(node="latent.start.3~5")
    with pytest.raises(InvalidArgument, match="nothing is upstream of that"):
        traced_node(message, model, len(IDS), lambda *_: pytest.fail("has no downstream"))
