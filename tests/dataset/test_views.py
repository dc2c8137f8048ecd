"""Other forms of a record, against loops written here."""

from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from tdb.dataset.v1 import read_pb2, record_pb2

from services.dataset import records, views
from tests.dataset import helpers

FORMS = {
    read_pb2.PAIR_FORM_QUERY_SUM: (0, sum),
    read_pb2.PAIR_FORM_QUERY_MAX: (0, max),
    read_pb2.PAIR_FORM_KEY_SUM: (1, sum),
    read_pb2.PAIR_FORM_KEY_MAX: (1, max),
}


def head(width: int | None) -> record_pb2.ComponentRecord:
    (record,) = helpers.random_records(5, ["head.1.2"], tokens=6)
    if width is not None:
        for example in records.examples(record):
            del example.pair_activations[records.pair_count(6, width) :]
            example.pair_width = width
    return record


def by_hand(example: record_pb2.Example, side: int, how: object) -> list[float]:
    """Pair by pair, as the proto's comment lays them out."""
    tokens = len(example.token_ids)
    width = example.pair_width if example.HasField("pair_width") else tokens
    of_token: list[list[float]] = [[] for _ in range(tokens)]
    values = iter(example.pair_activations)
    for query in range(tokens):
        for key in range(max(0, query - width + 1), query + 1):
            of_token[(query, key)[side]].append(next(values))
    assert next(values, None) is None
    return [how(found) for found in of_token]  # type: ignore[operator]


@pytest.mark.parametrize("width", [None, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_pairs_become_values_of_tokens(
    width: int | None, form: read_pb2.PairForm.ValueType
) -> None:
    before, after = head(width), head(width)
    views.apply(read_pb2.View(pair_form=form), after)
    for old, new in zip(records.examples(before), records.examples(after), strict=True):
        assert not new.pair_activations
        assert not new.HasField("pair_width")
        np.testing.assert_allclose(new.activations, by_hand(old, *FORMS[form]), rtol=1e-6)
    # Reading and being read are different things.
    other = head(width)
    swapped = {1: 3, 2: 4, 3: 1, 4: 2}[form]
    views.apply(read_pb2.View(pair_form=swapped), other)  # type: ignore[arg-type]
    assert (other == after) == (width == 1)


def test_normalised_values_are_shares_of_the_record_s_largest() -> None:
    (record,) = helpers.random_records(6, ["neuron.0.3"])
    scale = max(max(example.activations) for example in records.examples(record))
    after = record_pb2.ComponentRecord()
    after.CopyFrom(record)
    views.apply(read_pb2.View(normalised=True), after)
    for old, new in zip(records.examples(record), records.examples(after), strict=True):
        wanted = [max(0.0, value) / scale for value in old.activations]
        np.testing.assert_allclose(new.activations, wanted, rtol=1e-6)
    assert max(max(example.activations) for example in records.examples(after)) == 1.0
    assert any(min(example.activations) == 0 for example in records.examples(after))


def test_values_that_are_never_positive_are_0_and_not_huge() -> None:
    record = record_pb2.ComponentRecord(component="neuron.0.0")
    record.top.add(token_ids=[1, 2, 3], activations=[-1.0, 0.0, -5.0])
    views.apply(read_pb2.View(normalised=True), record)
    assert list(record.top[0].activations) == [0, 0, 0]


def test_forms_are_normalised_in_themselves() -> None:
    record, sums = head(None), head(None)
    views.apply(read_pb2.View(normalised=True, pair_form=read_pb2.PAIR_FORM_QUERY_SUM), record)
    views.apply(read_pb2.View(pair_form=read_pb2.PAIR_FORM_QUERY_SUM), sums)
    scale = max(max(example.activations) for example in records.examples(sums))
    for old, new in zip(records.examples(sums), records.examples(record), strict=True):
        wanted = np.maximum(old.activations, 0) / scale
        np.testing.assert_allclose(new.activations, wanted, rtol=1e-6)


async def test_views_are_served(tmp_path: Path) -> None:
    record = head(None)
    helpers.write(tmp_path / "d", [record])
    view = read_pb2.View(pair_form=read_pb2.PAIR_FORM_KEY_SUM, normalised=True)
    wanted = helpers.with_texts(record)
    views.apply(view, wanted)
    async with helpers.connected(tmp_path) as stub:
        got = await stub.GetRecord(
            read_pb2.GetRecordRequest(dataset="d", component="head.1.2", view=view)
        )
        assert got.record == wanted
        request = read_pb2.StreamRecordsRequest(dataset="d", view=view, token_texts=True)
        responses = [response async for response in stub.StreamRecords(request)]
        assert list(responses[0].batch.records) == [wanted]
        request.view.pair_form = 9  # type: ignore[assignment]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.StreamRecords(request).read()
