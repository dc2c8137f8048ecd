"""A build of latents, held against a plain forward pass and the formulas of SEMANTICS 9."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tdb.dataset.v1 import read_pb2, record_pb2
from transformers import AutoModelForCausalLM

from services.common.server import ServiceServer
from services.inference.engine.dictionaries.dictionary import Dictionary
from services.inference.engine.dictionaries.sites import Point
from services.inference.engine.model import Model
from tests.dataset.building import helpers
from tests.dataset.building.test_build import check_statistics, sequences
from tests.inference.helpers import shelf_of
from tests.inference.planted import LATENTS, random_dictionary


def latents(model: Any, dictionary: Dictionary, ids: list[int]) -> NDArray[np.float32]:
    """[T, N]: relu((x - b_dec) W_enc + b_enc) of what the MLP of layer 1 writes."""
    seen: list[torch.Tensor] = []
    handle = model.transformer.h[1].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    x = seen[0][0] - dictionary.b_in
    found: NDArray[np.float32] = torch.relu(x @ dictionary.w_enc + dictionary.b_enc).numpy()
    return found


async def test_records_of_latents(
    data: Path,
    inference: ServiceServer,
    model_folder: Path,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dictionary = random_dictionary("planted", Point.MLP_OUT, 1)
    shelf = shelf_of([dictionary], model.architecture, torch.float32)
    monkeypatch.setattr(model.hooks, "shelf", shelf)
    plain: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    corpus = sequences(model_folder)
    seen = [latents(plain, dictionary, ids) for _, _, ids in corpus]
    async with helpers.serving(data, inference.port) as stub:
        _, dataset = await helpers.build(stub, helpers.request(groups=["latent"]))
        assert [each.id for each in dataset.header.model.dictionaries] == ["planted"]
        records: list[record_pb2.ComponentRecord] = []
        async for response in stub.StreamRecords(read_pb2.StreamRecordsRequest(dataset="built")):
            records += response.batch.records
    assert [each.component for each in records] == [f"latent.planted.{n}" for n in range(LATENTS)]
    by_place = {(name, offset): number for number, (name, offset, _) in enumerate(corpus)}
    spoke = 0
    for latent, record in enumerate(records):
        peaks = [float(each[:, latent].max()) for each in seen]
        if max(peaks) == 0:
            assert not record.top, "a latent that is silent has no top"
            continue
        spoke += 1
        check_statistics(record.statistics, np.concatenate(seen)[:, latent].astype(np.float64))
        wanted = sorted(range(len(corpus)), key=lambda each: -peaks[each])[:3]
        top = [by_place[each.document_id, each.document_offset] for each in record.top]
        assert [peaks[each] for each in top] == pytest.approx([peaks[each] for each in wanted])
        for example, number in zip(record.top, top, strict=True):
            np.testing.assert_allclose(example.activations, seen[number][:, latent], atol=1e-5)
        with torch.no_grad():
            write = dictionary.w_dec[latent]
            scores = plain.lm_head.weight @ ((write - write.mean()) * plain.transformer.ln_f.weight)
            scores -= scores.mean()
        for each in (*record.promoted, *record.suppressed):
            assert each.score == pytest.approx(float(scores[each.token_id]), rel=1e-4)
        assert record.promoted[0].score > 0 > record.suppressed[0].score
    assert spoke > LATENTS / 2
