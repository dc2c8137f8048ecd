"""Records of trained models as they come back from the service: neurons, heads and latents against
plain hooks on Hugging Face's model, plain formulas and brute force over all activations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tdb.dataset.v1 import read_pb2, record_pb2
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.common.harvest import bins
from services.common.harvest.state import Keep
from services.common.settings import DictionarySource, ModelSource
from services.inference.engine.model import Model
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.common.backend import settings
from tests.dataset.building import helpers
from tests.inference.harvesting import brute
from tests.inference.harvesting.brute import Seen
from tests.inference.harvesting.test_trained_models import DEMO, magnitudes, stood

LENGTH, DOCUMENTS, QUANTILES = 24, 24, 4
KEEP = Keep(top=5, random=4, strata=10, per_stratum=2, seed=0)
ROUNDING = 1e-5

Records = dict[str, record_pb2.ComponentRecord]


@dataclass(frozen=True)
class Cut:
    index: int
    ids: tuple[int, ...]
    place: tuple[str, int]
    """Document id and offset."""


def cut(folder: Path, texts: Sequence[str]) -> list[Cut]:
    """The corpus's sequences, cut by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("a", add_special_tokens=False).input_ids
    begin = tokenizer("a").input_ids[: -len(plain)]
    found: list[Cut] = []
    for line, text in enumerate(texts, 1):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for offset in range(0, len(ids), LENGTH - len(begin)):
            part = (*begin, *ids[offset : offset + LENGTH - len(begin)])
            found.append(Cut(len(found), part, (f"corpus.jsonl:{line}", offset)))
    return found


async def built(
    data: Path, name: str, model: Model, source: str, texts: Sequence[str], groups: Sequence[str]
) -> Records:
    """The records of a dataset in five segments or so, read over gRPC."""
    folder = data / "corpora"
    folder.mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    asked = helpers.request(
        corpus={"files": {"path": "corpus.jsonl", "field": "body"}},
        tokens="1000000",
        sequenceLength=LENGTH,
        topK=KEEP.top,
        random=KEEP.random,
        quantiles=QUANTILES,
        groups=list(groups),
    )
    worker = Scheduler()
    records: Records = {}
    try:
        found = settings(TDB_MODEL=f"{name}={source}", TDB_CACHE_MIB="0")
        async with build_server(found, worker, {name: model}, port=0) as server:
            await server.set_serving()
            async with helpers.serving(data, server.port) as stub:
                await helpers.build(stub, asked)
                request = read_pb2.StreamRecordsRequest(dataset="built")
                async for response in stub.StreamRecords(request):
                    for record in response.batch.records:
                        records[record.component] = record
    finally:
        worker.close()
    return records


def check(
    records: Records,
    group: str,
    corpus: Sequence[Cut],
    activations: Sequence[Tensor],
    every_nth: int = 1,
) -> None:
    """That the records of a group say what all activations [P, N] of all sequences say."""
    seen = [
        Seen(each.index, each.ids, values.numpy())
        for each, values in zip(corpus, activations, strict=True)
    ]
    every = np.concatenate([each.activations for each in seen])
    components = every.shape[1]
    assert {each for each in records if each.startswith(f"{group}.")} == {
        f"{group}.{index}" for index in range(components)
    }
    for index in range(0, components, every_nth):
        record = records[f"{group}.{index}"]
        values = every[:, index].astype(np.float64)
        peaks = [float(each.activations[:, index].max()) for each in seen]
        margin = ROUNDING * max(float(np.abs(values).max()), 1e-30)
        check_statistics(record.statistics, values, margin)
        check_examples(record, group, corpus, seen, index, margin)
        check_quantiles(record, corpus, peaks, values, margin)
        check_tokens(record, corpus, seen, index)


def check_statistics(
    stated: record_pb2.Statistics, values: NDArray[np.float64], margin: float
) -> None:
    assert stated.count == len(values)
    mean, variance, skewness, kurtosis = brute.moments(values)
    size = float(np.abs(values).max())
    for name, wanted, scale in (
        ("max", values.max(), size),
        ("min", values.min(), size),
        ("mean", mean, size),
        ("variance", variance, size**2),
        ("skewness", skewness, 1.0),
        ("kurtosis", kurtosis, 1.0),
    ):
        if np.isnan(wanted):
            assert name not in {field.name for field, _ in stated.ListFields()}
        else:
            apart = abs(getattr(stated, name) - wanted)
            assert apart <= 1e-4 * max(abs(wanted), scale), (name, wanted)
    active = round(stated.fraction_active * len(values))
    assert (values > margin).sum() <= active <= (values > -margin).sum()
    edges, counts = list(stated.histogram.edges), list(stated.histogram.counts)
    assert (counts[0] > 0, counts[-1] > 0, sum(counts)) == (True, True, len(values))
    inner = edges[1:-1]
    whole = [float(np.float32(each)) for each in bins.EDGES[1:-1]]
    first = whole.index(inner[0]) if inner else 0
    assert inner == whole[first : first + len(inner)]
    for edge, below in zip(inner, np.cumsum(counts), strict=False):
        assert (values < edge - margin).sum() <= below <= (values <= edge + margin).sum()


def check_examples(
    record: record_pb2.ComponentRecord,
    group: str,
    corpus: Sequence[Cut],
    seen: Sequence[Seen],
    index: int,
    margin: float,
) -> None:
    by_place = {each.place: each.index for each in corpus}

    def numbers(examples: Sequence[record_pb2.Example]) -> list[int]:
        found = [by_place[each.document_id, each.document_offset] for each in examples]
        for number, each in zip(found, examples, strict=True):
            assert tuple(each.token_ids) == corpus[number].ids
            shown = each.pair_activations if group.startswith("head.") else each.activations
            wanted = seen[number].activations[:, index]
            np.testing.assert_allclose(shown, wanted, rtol=1e-5, atol=margin)
        return found

    top, wanted = numbers(record.top), brute.top_kept(seen, KEEP, index)
    if group.startswith("latent.") and max(each.activations[:, index].max() for each in seen) <= 0:
        assert top == []
    elif top != wanted:  # sequences that begin alike may have the same maximum
        peaks = [
            [seen[number].activations[:, index].max() for number in each] for each in (top, wanted)
        ]
        assert len(set(top)) == len(wanted)
        np.testing.assert_allclose(peaks[0], peaks[1], rtol=0, atol=margin)
    assert numbers(record.random) == brute.random_kept(seen, KEEP, group, index)
    strata = set(brute.strata_kept(seen, KEEP, group, index))
    drawn = [number for each in record.quantiles for number in numbers(each.examples)]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) <= strata


def check_quantiles(
    record: record_pb2.ComponentRecord,
    corpus: Sequence[Cut],
    peaks: Sequence[float],
    values: NDArray[np.float64],
    margin: float,
) -> None:
    positive = sorted(peak for peak in peaks if peak > 0)
    if not positive:
        assert not record.quantiles
        return
    edges = [float(edge) for edge in bins.EDGES[bins.FIRST_POSITIVE : -1]]
    close = [edge for edge in edges if min(abs(peak - edge) for peak in positive) <= margin]
    if close:
        return  # rounding decides on which side of an edge a maximum is
    boundaries = {max(edge for edge in edges if edge <= positive[0])}
    for number in range(1, QUANTILES):
        share = len(positive) * number / QUANTILES
        boundaries.add(next(e for e in edges if sum(peak < e for peak in positive) >= share))
    lower = sorted(float(each.lower) for each in record.quantiles)
    assert lower == sorted(
        float(np.float32(edge)) for edge in boundaries if any(peak >= edge for peak in positive)
    )
    highest = max(record.quantiles, key=lambda each: each.lower)
    assert highest.upper == pytest.approx(positive[-1], rel=1e-5)
    by_place = {each.place: each.index for each in corpus}
    for each in record.quantiles:
        for example in each.examples:
            peak = peaks[by_place[example.document_id, example.document_offset]]
            assert each.lower <= peak
            assert peak < each.upper or each is highest
        upper = np.inf if each is highest else each.upper
        inside = [
            ((values >= each.lower + off) & (values < upper - off)).mean()
            for off in (margin, -margin)
        ]
        assert inside[0] - 1e-6 <= each.fraction <= inside[1] + 1e-6


def check_tokens(
    record: record_pb2.ComponentRecord,
    corpus: Sequence[Cut],
    seen: Sequence[Seen],
    index: int,
) -> None:
    """Of heads by the query's token and by the key's."""
    of_heads = record.component.startswith("head.")
    for side, statistics in enumerate((record.token_statistics, record.key_token_statistics)):
        if side and not of_heads:
            assert not statistics
            continue
        found: dict[int, list[float]] = {}
        for each in seen:
            tokens = len(each.ids)
            places = np.tril_indices(tokens)[side].tolist() if of_heads else list(range(tokens))
            for place, value in zip(places, each.activations[:, index], strict=True):
                found.setdefault(each.ids[place], []).append(float(value))
        means = {token: np.mean(values) for token, values in found.items()}
        assert len(statistics) == 10
        for each_token in statistics:
            assert each_token.count == len(found[each_token.token_id])
            np.testing.assert_allclose(each_token.mean, means[each_token.token_id], atol=1e-5)
        ordered = [each_token.mean for each_token in statistics]
        assert ordered == sorted(ordered, reverse=True)


def pairs_of(
    found: dict[str, list[Tensor]], layer: int, values: Callable[[Tensor], Tensor], w_o: Tensor
) -> list[Tensor]:
    return [
        magnitudes(pattern, values(each), w_o)
        for pattern, each in zip(found[f"pattern {layer}"], found["v"], strict=True)
    ]


async def test_the_demo_s_neurons_heads_and_latents(tmp_path: Path) -> None:
    name = "demo-mlp_out-2"
    folder, dictionary = DEMO / "model", DEMO / "dictionaries" / name
    model = load_model(
        ModelSource("demo", str(folder)), None, [DictionarySource(name, str(dictionary), False)]
    )
    texts = (DEMO / "dictionaries" / "sample.txt").read_text().splitlines()[:DOCUMENTS]
    corpus = cut(folder, texts)
    groups = ["neuron.3", "head.2", f"latent.{name}"]
    records = await built(tmp_path / "data", "demo", model, str(folder), texts, groups)
    modules = {
        "into down": "transformer.h.3.mlp.c_proj",
        "v": "transformer.h.2.attn.c_attn",
        "x": "transformer.h.2.mlp",
    }
    found = stood(folder, corpus, modules)
    check(records, "neuron.3", corpus, found["into down"], every_nth=11)
    w_o = load_file(folder / "model.safetensors")["transformer.h.2.attn.c_proj.weight"]
    pairs = pairs_of(
        found,
        2,
        lambda qkv: qkv.chunk(3, dim=-1)[2].reshape(len(qkv), 8, -1),
        w_o.float().view(8, -1, 128),
    )
    check(records, "head.2", corpus, pairs)
    # Another head's magnitudes are told apart.
    with pytest.raises(AssertionError):
        check(records, "head.2", corpus, [each.roll(1, 1) for each in pairs])
    weights = load_file(dictionary / "sae_weights.safetensors")
    k = int(json.loads((dictionary / "cfg.json").read_text())["k"])
    latents = []
    for x in found["x"]:
        pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        least = pre.topk(k, dim=-1).values[:, -1:]
        latents.append(torch.where(pre >= least, pre.clamp_min(0), 0))
    check(records, f"latent.{name}", corpus, latents, every_nth=7)


def random_dictionary(folder: Path, hook: str, width: int, latents: int) -> dict[str, Tensor]:
    """Writes a ReLU dictionary as SAELens does."""
    draw = torch.Generator().manual_seed(0)
    w_enc = torch.randn(width, latents, generator=draw) / width**0.5
    tensors = {
        "W_enc": w_enc,
        "W_dec": w_enc.T.contiguous(),
        "b_enc": 0.1 * torch.randn(latents, generator=draw) - 0.1,
        "b_dec": 0.1 * torch.randn(width, generator=draw),
    }
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": width,
        "d_sae": latents,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": hook},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.shared
async def test_stories_neurons_grouped_heads_and_latents(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260k"
    weights = random_dictionary(tmp_path / "mine", "blocks.3.hook_mlp_out", 64, 96)
    model = load_model(
        ModelSource("stories", str(folder)),
        None,
        [DictionarySource("mine", str(tmp_path / "mine"), True)],
    )
    texts = (folder / "EXPECTED-greedy-from-BOS.txt").read_text().splitlines()
    corpus = cut(folder, texts)
    groups = ["neuron.4", "head.4", "latent.mine"]
    records = await built(tmp_path / "data", "stories", model, str(folder), texts, groups)
    prefix = "model.layers.4"
    modules = {
        "into down": f"{prefix}.mlp.down_proj",
        "v": f"{prefix}.self_attn.v_proj",
        "x": "model.layers.3.mlp",
    }
    found = stood(folder, corpus, modules)
    check(records, "neuron.4", corpus, found["into down"], every_nth=5)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    w_o = plain.get_submodule(f"{prefix}.self_attn.o_proj").weight.detach()
    pairs = pairs_of(
        found,
        4,
        lambda v: v.view(len(v), 4, 8).repeat_interleave(2, 1),
        w_o.T.reshape(8, 8, -1),
    )
    check(records, "head.4", corpus, pairs)
    latents = [
        torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]) for x in found["x"]
    ]
    check(records, "latent.mine", corpus, latents)
