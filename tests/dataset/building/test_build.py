"""Builds over real gRPC: what is in the records, held against Hugging Face's own forward pass."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tdb.dataset.v1 import dataset_pb2, read_pb2, record_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.common.server import ServiceServer
from services.inference.engine.model import Model
from tests.dataset.building import helpers
from tests.dataset.building.conftest import Gate

LENGTH, TOKENS = 12, 1000


def sequences(folder: Path) -> list[tuple[str, int, list[int]]]:
    """Document ids, offsets and ids of the corpus, cut by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[tuple[str, int, list[int]]] = []
    left = TOKENS
    for line, text in enumerate(helpers.documents(), 1):
        ids = tokenizer(text, add_special_tokens=False).input_ids if text else []
        for start in range(0, len(ids), LENGTH):
            part = ids[start : start + LENGTH][:left]
            if part:
                found.append((f"news.jsonl:{line}", start, part))
            left -= len(part)
    return found


def neurons(model: Any, ids: list[int], layer: int) -> NDArray[np.float32]:
    """[T, F] of a plain forward pass."""
    seen: list[torch.Tensor] = []
    handle = model.transformer.h[layer].mlp.act.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    found: NDArray[np.float32] = seen[0][0].numpy()
    return found


async def test_records_are_what_a_plain_forward_pass_sees(
    data: Path, inference: ServiceServer, model_folder: Path, model: Model
) -> None:
    corpus = sequences(model_folder)
    assert sum(len(ids) for _, _, ids in corpus) == TOKENS
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    seen = [neurons(plain, ids, 1) for _, _, ids in corpus]
    everything = np.concatenate(seen)
    async with helpers.serving(data, inference.port) as stub:
        said, dataset = await helpers.build(stub, helpers.request())
        records = {}
        async for response in stub.StreamRecords(read_pb2.StreamRecordsRequest(dataset="built")):
            for record in response.batch.records:
                records[record.component] = record
    assert {each.dataset for each in said} == {"built"}
    assert len(records) == dataset.records == 2 * 64 + 2 * 2
    check_header(dataset, model)
    by_place = {(name, offset): number for number, (name, offset, _) in enumerate(corpus)}
    for neuron in range(0, 64, 7):
        record = records[f"neuron.1.{neuron}"]
        peaks = [float(each[:, neuron].max()) for each in seen]
        wanted = sorted(range(len(corpus)), key=lambda each: -peaks[each])[:3]
        numbers = [by_place[each.document_id, each.document_offset] for each in record.top]
        assert numbers == wanted
        for example in (*record.top, *record.random, *record.quantiles[0].examples):
            number = by_place[example.document_id, example.document_offset]
            assert list(example.token_ids) == corpus[number][2]
            np.testing.assert_allclose(example.activations, seen[number][:, neuron], atol=1e-5)
        assert len(record.random) == 2
        check_statistics(record.statistics, everything[:, neuron].astype(np.float64))
        check_tokens(record, corpus, seen, neuron)
        check_output(record, plain, len(tokenizer), neuron)
    head = records["head.0.1"]
    for example in head.top:
        tokens = len(example.token_ids)
        assert len(example.pair_activations) == tokens * (tokens + 1) // 2
    assert head.key_token_statistics
    assert [*head.promoted, *head.suppressed] == []
    async with helpers.serving(data, inference.port) as stub:
        asked = read_pb2.GetRecordRequest(dataset="built", component="neuron.0.5")
        record = (await stub.GetRecord(asked)).record
        texts = tokenizer.decode
        for score in (*record.promoted, *record.suppressed):
            assert score.text == texts([score.token_id]) or "\ufffd" in texts([score.token_id])


def check_output(record: record_pb2.ComponentRecord, plain: Any, tokens: int, neuron: int) -> None:
    """By the model's own unembedding: what the neuron writes, through the last norm. The tokenizer
    has `tokens`, the model more."""
    with torch.no_grad():
        write = plain.transformer.h[1].mlp.c_proj.weight[neuron]
        scores = plain.lm_head.weight @ ((write - write.mean()) * plain.transformer.ln_f.weight)
        scores -= scores.mean()
    listed = scores[:tokens]
    for side, largest in ((record.promoted, True), (record.suppressed, False)):
        values, ids = torch.topk(listed, 10, largest=largest)
        assert [each.token_id for each in side] == ids.tolist()
        np.testing.assert_allclose([each.score for each in side], values, rtol=1e-4)
    assert record.promoted[0].text == "", "texts are stored once, in the vocabulary"


def check_header(dataset: dataset_pb2.Dataset, model: Model) -> None:
    header = dataset.header
    assert header.source == dataset_pb2.SOURCE_BUILT
    assert header.model.id == "tiny"
    assert header.model.weights_hash == model.identity.weights_hash
    assert header.model.tokenizer_hash == model.vocabulary.files_hash
    assert (header.corpus.name, header.corpus.tokens) == ("news.jsonl", TOKENS)
    assert header.corpus.sequence_length == LENGTH
    assert dataset.has_token_ids
    assert dataset.has_vocabulary


def check_statistics(stated: record_pb2.Statistics, values: NDArray[np.float64]) -> None:
    off = values - values.mean()
    assert stated.count == TOKENS
    for name, wanted in (
        ("max", values.max()),
        ("min", values.min()),
        ("mean", values.mean()),
        ("variance", values.var()),
        ("skewness", (off**3).mean() / values.std() ** 3),
        ("kurtosis", (off**4).mean() / values.var() ** 2),
        ("fraction_active", (values > 0).mean()),
    ):
        np.testing.assert_allclose(getattr(stated, name), wanted, rtol=1e-4, atol=1e-6)
    assert sum(stated.histogram.counts) == TOKENS


def check_tokens(
    record: record_pb2.ComponentRecord,
    corpus: list[tuple[str, int, list[int]]],
    seen: list[NDArray[np.float32]],
    neuron: int,
) -> None:
    by_token: dict[int, list[float]] = {}
    for (_, _, ids), values in zip(corpus, seen, strict=True):
        for token, value in zip(ids, values[:, neuron], strict=True):
            by_token.setdefault(token, []).append(float(value))
    for each in record.token_statistics:
        assert each.count == len(by_token[each.token_id])
        np.testing.assert_allclose(each.mean, np.mean(by_token[each.token_id]), atol=1e-5)


async def test_texts_are_those_of_the_tokenizer(
    data: Path, inference: ServiceServer, model_folder: Path
) -> None:
    async with helpers.serving(data, inference.port) as stub:
        await helpers.build(stub, helpers.request(tokens=100, groups=["head.1"]))
        asked = read_pb2.GetRecordRequest(dataset="built", component="head.1.0")
        record = (await stub.GetRecord(asked)).record
    example = record.top[0]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert list(example.token_texts) == [tokenizer.decode([each]) for each in example.token_ids]
    assert all(each.token_text for each in record.token_statistics)


async def test_how_a_corpus_is_cut_into_segments_changes_no_record(
    data: Path, inference: ServiceServer
) -> None:
    found: list[dict[str, Any]] = []
    async with helpers.serving(data, inference.port) as stub:
        for name, segment in (("one", 200_000), ("many", 37)):
            asked = helpers.request(
                dataset=name, tokens=300, segmentTokens=segment, groups=["neuron.0"]
            )
            await helpers.build(stub, asked)
            records: dict[str, Any] = {}
            request = read_pb2.StreamRecordsRequest(dataset=name)
            async for response in stub.StreamRecords(request):
                for record in response.batch.records:
                    records[record.component] = record
            found.append(records)
    for component, one in found[0].items():
        many = found[1][component]
        for kept in ("top", "random"):
            assert places(getattr(one, kept)) == places(getattr(many, kept))
        for first, second in zip(one.quantiles, many.quantiles, strict=True):
            assert places(first.examples) == places(second.examples)
        assert list(one.statistics.histogram.counts) == list(many.statistics.histogram.counts)
        np.testing.assert_allclose(one.statistics.variance, many.statistics.variance, rtol=1e-6)


def places(examples: Any) -> list[tuple[str, int, list[int]]]:
    return [(each.document_id, each.document_offset, list(each.token_ids)) for each in examples]


async def test_a_demo_s_dataset_is_built_once_and_of_the_model_that_is_served(
    data: Path, inference: ServiceServer, monkeypatch: Any
) -> None:
    module = "services.dataset.building.demo_dataset"
    monkeypatch.setattr(f"{module}.TOKENS", 600)
    monkeypatch.setattr(f"{module}.SEQUENCE_LENGTH", 16)
    monkeypatch.setattr(f"{module}.GROUPS", ("neuron", "head"))

    async def built() -> dataset_pb2.Dataset:
        async with helpers.serving(data, inference.port, TDB_DEMO_DATASET="1") as stub:
            while True:
                listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
                if listed.datasets and not listed.builds:
                    (found,) = listed.datasets
                    return found
                for each in listed.builds:
                    assert each.state != dataset_pb2.BUILD_STATE_FAILED, each.message

    first = await built()
    assert (first.name, first.header.corpus.tokens) == ("demo", 600)
    manifest = data / "datasets" / "demo" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert (await built()).manifest_hash == first.manifest_hash
    assert manifest.stat().st_mtime_ns == written, "it was built again"
    changed = manifest.read_text().replace(first.header.model.weights_hash, "0" * 64)
    manifest.write_text(changed)
    async with helpers.serving(data, inference.port, TDB_DEMO_DATASET="1") as stub:
        while True:
            listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
            if listed.datasets and listed.datasets[0].manifest_hash == first.manifest_hash:
                break


async def test_what_was_begun_of_a_demo_with_another_model_is_begun_anew(
    data: Path, inference: ServiceServer, monkeypatch: Any, gate: Gate
) -> None:
    module = "services.dataset.building.demo_dataset"
    for name, value in (
        ("TOKENS", 600),
        ("SEQUENCE_LENGTH", 16),
        ("SEGMENT_TOKENS", 60),
        ("GROUPS", ("neuron",)),
    ):
        monkeypatch.setattr(f"{module}.{name}", value)

    async def listed(stub: Any) -> dataset_pb2.ListDatasetsResponse:
        found: dataset_pb2.ListDatasetsResponse = await stub.ListDatasets(
            dataset_pb2.ListDatasetsRequest()
        )
        for each in found.builds:
            assert each.state != dataset_pb2.BUILD_STATE_FAILED, each.message
        return found

    plan = data / "datasets" / "demo" / "building" / "plan.json"
    gate.close(segments=2)
    async with helpers.serving(data, inference.port, TDB_DEMO_DATASET="1") as stub:
        while not any(each.done > 60 for each in (await listed(stub)).builds):
            pass
    gate.open()
    text = plan.read_text()
    plan.write_text(text.replace('"weights_hash": "', '"weights_hash": "0'))
    async with helpers.serving(data, inference.port, TDB_DEMO_DATASET="1") as stub:
        while not (await listed(stub)).datasets:
            pass


async def test_two_builds_wait_for_each_other(
    data: Path, inference: ServiceServer, gate: Gate
) -> None:
    async with helpers.serving(data, inference.port) as stub:
        gate.close(segments=0)
        one = stub.BuildDataset(helpers.request(dataset="one"))
        await anext(aiter(one))
        two = stub.BuildDataset(helpers.request(dataset="two", tokens=200))
        states = []
        async for response in two:
            if response.HasField("progress"):
                states.append(response.progress.state)
            gate.open()
        assert states[0] == dataset_pb2.BUILD_STATE_QUEUED
        *_, last = [response async for response in one]
        assert last.dataset.name == "one"
        listed = await stub.ListDatasets(dataset_pb2.ListDatasetsRequest())
        assert [each.name for each in listed.datasets] == ["one", "two"]
        assert not listed.builds
