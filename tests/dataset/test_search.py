"""Search, against a loop over all records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tdb.dataset.v1 import record_pb2, search_pb2
from tdb.type.v1 import token_pb2

from services.dataset import records, search
from services.dataset.library import Library
from services.dataset.reader import DatasetReader
from services.dataset.search import Condition, Question
from services.dataset.search_file import COLUMNS
from services.dataset.store import DatasetWriter
from tests.dataset import helpers
from tests.dataset.test_service import refusal

RECORDS = helpers.random_records(7, helpers.COMPONENTS)
# A statistic that some records lack.
for each in RECORDS[::3]:
    each.statistics.ClearField("skewness")
STATISTICS = {
    "max": search_pb2.STATISTIC_MAX,
    "mean": search_pb2.STATISTIC_MEAN,
    "variance": search_pb2.STATISTIC_VARIANCE,
    "skewness": search_pb2.STATISTIC_SKEWNESS,
    "kurtosis": search_pb2.STATISTIC_KURTOSIS,
    "fraction_active": search_pb2.STATISTIC_FRACTION_ACTIVE,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    helpers.write(folder / "small", RECORDS)
    return folder


def known(record: record_pb2.ComponentRecord, name: str) -> float | None:
    return getattr(record.statistics, name) if record.statistics.HasField(name) else None  # type: ignore[arg-type]


def brute(
    keep: Callable[[record_pb2.ComponentRecord], bool], order_by: str = "", ascending: bool = False
) -> list[str]:
    """Names, in the order of the result."""
    found = [record for record in RECORDS if keep(record)]
    if order_by:
        sign = 1 if ascending else -1

        def key(record: record_pb2.ComponentRecord) -> tuple[bool, float]:
            value = known(record, order_by)
            return value is None, sign * (value or 0.0)

        found.sort(key=key)
    return [record.component for record in found]


def peaks_at(record: record_pb2.ComponentRecord, token: int) -> bool:
    for example in record.top:
        if example.pair_activations:
            pairs = [(q, k) for q in range(len(example.token_ids)) for k in range(q + 1)]
            values = list(example.pair_activations)
            query, key = pairs[values.index(max(values))]
            places = [query, key]
        else:
            places = [list(example.activations).index(max(example.activations))]
        if token in [example.token_ids[place] for place in places]:
            return True
    return False


def names(found: search.Found) -> list[str]:
    return [component for component, _ in found.components]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_question_is_answered_as_a_loop_would(library: Path, data: st.DataObject) -> None:
    reader = Library(library).open("small")
    groups = data.draw(st.lists(st.sampled_from(reader.groups), unique=True))
    columns = data.draw(st.lists(st.sampled_from(COLUMNS), unique=True, max_size=2))
    ends = st.floats(-2, 2)
    conditions = tuple(Condition(name, data.draw(ends), data.draw(ends)) for name in columns)
    token = data.draw(st.none() | st.integers(0, 60))
    order_by = data.draw(st.sampled_from(("", *COLUMNS)))
    ascending = data.draw(st.booleans())
    question = Question(
        groups=tuple(groups),
        conditions=conditions,
        peak_token=token,
        order_by=order_by,
        ascending=ascending,
    )

    def keep(record: record_pb2.ComponentRecord) -> bool:
        if groups and not any(record.component.startswith(f"{group}.") for group in groups):
            return False
        for condition in conditions:
            value = known(record, condition.column)
            if value is None or not condition.at_least <= value <= condition.at_most:
                return False
        return token is None or peaks_at(record, token)

    wanted = brute(keep, order_by, ascending)
    limit = data.draw(st.integers(1, 50))
    found: list[str] = []
    rank: int | None = 0
    while rank is not None:
        page = search.search(reader, question, rank, limit)
        assert page.candidates == len(wanted)
        assert len(page.components) <= limit
        found += names(page)
        rank = page.next_rank
    assert found == wanted


async def pages(stub: Any, **request: Any) -> list[str]:
    found: list[str] = []
    cursor = ""
    while True:
        page = await stub.Search(
            search_pb2.SearchRequest(dataset="small", cursor=cursor, **request)
        )
        found += [each.component for each in page.components]
        cursor = page.next_cursor
        if not cursor:
            return found


async def test_statistics_order_and_pages_over_the_wire(library: Path) -> None:
    async with helpers.connected(library) as stub:
        for name, statistic in STATISTICS.items():
            wanted = brute(lambda record: True, name)
            assert await pages(stub, order_by=statistic, limit=7) == wanted
        ranges = [search_pb2.StatisticRange(statistic=STATISTICS["skewness"], at_most=0.5)]
        wanted = brute(lambda record: (known(record, "skewness") or 9) <= 0.5)
        assert 0 < len(wanted) < len(RECORDS)
        assert await pages(stub, ranges=ranges) == wanted
        one = await stub.Search(search_pb2.SearchRequest(dataset="small", limit=1))
        without = record_pb2.Statistics()
        without.CopyFrom(RECORDS[0].statistics)
        without.ClearField("histogram")
        assert one.components[0].statistics == without


async def test_text_and_tokens_over_the_wire(library: Path) -> None:
    def text_of(record: record_pb2.ComponentRecord) -> list[str]:
        return ["".join(f" w{token}" for token in each.token_ids) for each in record.top]

    first = " ".join(text_of(RECORDS[4])[1].split()[2:5])
    async with helpers.connected(library) as stub:
        for text in (first.upper(), "w1 w", "no such text"):
            wanted = [
                record.component
                for record in RECORDS
                if any(text.lower() in each for each in text_of(record))
            ]
            assert await pages(stub, text=text, limit=3) == wanted
        assert RECORDS[4].component in await pages(stub, text=first)
        top = RECORDS[0].top[0]
        token = top.token_ids[list(top.activations).index(max(top.activations))]
        by_id = await pages(stub, peak_token=token_pb2.TokenRef(id=token))
        assert by_id == brute(lambda record: peaks_at(record, token))
        assert RECORDS[0].component in by_id
        by_text = await pages(stub, peak_token=token_pb2.TokenRef(text=f" w{token}"))
        assert by_text == by_id


async def test_a_page_of_text_reads_a_bounded_number_of_records(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "READ_RECORDS", 5)
    reads: list[int] = []
    original = DatasetReader.read

    def counted(self: DatasetReader, place: int) -> record_pb2.ComponentRecord:
        reads.append(place)
        return original(self, place)

    monkeypatch.setattr(DatasetReader, "read", counted)
    async with helpers.connected(library) as stub:
        page = await stub.Search(search_pb2.SearchRequest(dataset="small", text="nothing"))
        assert len(reads) == 5
        assert not page.components
        assert page.next_cursor
        assert page.candidates == len(RECORDS)
        assert await pages(stub, text="nothing") == []
        assert len(reads) == 5 + len(RECORDS)


async def test_datasets_of_text_are_searched_by_text(tmp_path: Path) -> None:
    made = []
    for index, words in enumerate((["a", "b"], ["b", "c"], ["c", " a"])):
        record = record_pb2.ComponentRecord(component=f"neuron.0.{index}")
        record.top.add(token_texts=words, activations=[1.0, 3.0])
        made.append(record)
    with DatasetWriter(tmp_path / "small", helpers.header()) as writer:
        group = records.check(made[0])[0]
        writer.write(group, 0, made[:2])
        writer.write(group, 1, made[2:])
        writer.finish()
    async with helpers.connected(tmp_path) as stub:
        for text, index in (("b", 0), ("c", 1), (" a", 2)):
            found = await pages(stub, peak_token=token_pb2.TokenRef(text=text))
            assert found == [f"neuron.0.{index}"]
        assert await pages(stub, peak_token=token_pb2.TokenRef(text="a")) == []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pages(stub, peak_token=token_pb2.TokenRef(id=3))
        assert refusal(caught.value)[:2] == ("FAILED_PRECONDITION", ["peak_token.id"])


async def test_damage_is_named_and_the_rest_is_found(tmp_path: Path) -> None:
    helpers.write(tmp_path / "small", RECORDS)
    (tmp_path / "small" / "head.0.00000.search").unlink()
    path = tmp_path / "small" / "latent.demo-mlp-2.00000.search"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    records_path = tmp_path / "small" / "neuron.0.00000.records"
    content = bytearray(records_path.read_bytes())
    content[5] ^= 1
    records_path.write_bytes(content)
    async with helpers.connected(tmp_path) as stub:
        page = await stub.Search(search_pb2.SearchRequest(dataset="small"))
    assert page.damaged_groups == ["head.0", "latent.demo-mlp-2"]
    assert page.damaged == ["neuron.0.0"]
    lost = {*(f"latent.demo-mlp-2.{index}" for index in range(7)), "neuron.0.0"}
    assert [each.component for each in page.components] == [
        name for name in helpers.COMPONENTS if name not in lost and not name.startswith("head")
    ]


def statistic(number: int, **ends: float) -> search_pb2.StatisticRange:
    return search_pb2.StatisticRange(statistic=number, **ends)  # type: ignore[arg-type]


REFUSED: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"dataset": "nowhere"}, "NOT_FOUND", ["dataset"]),
    ({"groups": ["neuron"]}, "INVALID_ARGUMENT", ["groups[0]"]),
    ({"groups": ["neuron.0", "neuron.0.1"]}, "INVALID_ARGUMENT", ["groups[1]"]),
    ({"groups": ["neuron.7"]}, "NOT_FOUND", ["groups[0]"]),
    ({"ranges": [statistic(0, at_least=1)]}, "INVALID_ARGUMENT", ["ranges[0].statistic"]),
    ({"ranges": [statistic(1)]}, "INVALID_ARGUMENT", ["ranges[0]"]),
    ({"ranges": [statistic(1, at_least=2, at_most=1)]}, "INVALID_ARGUMENT", ["ranges[0].at_most"]),
    (
        {"ranges": [statistic(1, at_least=2), statistic(1, at_most=3)]},
        "INVALID_ARGUMENT",
        ["ranges[1].statistic"],
    ),
    (
        {"ranges": [statistic(1, at_least=float("nan"))]},
        "INVALID_ARGUMENT",
        ["ranges[0].at_least"],
    ),
    ({"peak_token": token_pb2.TokenRef()}, "INVALID_ARGUMENT", ["peak_token.ref"]),
    ({"peak_token": token_pb2.TokenRef(text="")}, "INVALID_ARGUMENT", ["peak_token.text"]),
    ({"peak_token": token_pb2.TokenRef(text="w7")}, "INVALID_ARGUMENT", ["peak_token.text"]),
    ({"peak_token": token_pb2.TokenRef(id=-1)}, "INVALID_ARGUMENT", ["peak_token.id"]),
    ({"text": "x" * 1001}, "INVALID_ARGUMENT", ["text"]),
    ({"order_by": 0}, "INVALID_ARGUMENT", ["order_by"]),
    ({"ascending": True}, "INVALID_ARGUMENT", ["ascending"]),
    ({"limit": 0}, "INVALID_ARGUMENT", ["limit"]),
    ({"limit": 1001}, "INVALID_ARGUMENT", ["limit"]),
    ({"cursor": "AAAA"}, "INVALID_ARGUMENT", ["cursor"]),
]


@pytest.mark.parametrize(("request_", "code", "fields"), REFUSED)
async def test_what_search_refuses(
    library: Path, request_: dict[str, Any], code: str, fields: list[str]
) -> None:
    async with helpers.connected(library) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Search(search_pb2.SearchRequest(**{"dataset": "small", **request_}))
        assert refusal(caught.value)[:2] == (code, fields)
