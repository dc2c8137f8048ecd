"""From the service's requests to what is read: every refusal names its field."""

import math
from dataclasses import dataclass

from tdb.dataset.v1 import read_pb2, search_pb2

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, inside
from services.dataset import cursors, groups, views
from services.dataset.groups import Group
from services.dataset.library import Library
from services.dataset.reader import DatasetReader
from services.dataset.search import Condition, Question

MAX_SELECTIONS = 100_000
MAX_TEXT = 1_000
MAX_GROUPS = 10_000
DEFAULT_LIMIT, MAX_LIMIT = 100, 1_000

_COLUMNS = {
    search_pb2.STATISTIC_MAX: "max",
    search_pb2.STATISTIC_MEAN: "mean",
    search_pb2.STATISTIC_VARIANCE: "variance",
    search_pb2.STATISTIC_SKEWNESS: "skewness",
    search_pb2.STATISTIC_KURTOSIS: "kurtosis",
    search_pb2.STATISTIC_FRACTION_ACTIVE: "fraction_active",
}


def dataset(library: Library, name: str) -> DatasetReader:
    """Raises InvalidArgument, NotFound, FailedPrecondition."""
    with inside("dataset"):
        return library.open(name)


def place(reader: DatasetReader, component: str) -> int:
    """Where a component's record is. Raises InvalidArgument, NotFound."""
    group, index = groups.parse_component(component)
    found = reader.place(group, index)
    if found is None:
        raise NotFound(
            f"the dataset {reader.name!r} has no record of {component}: {_holds(reader)}"
        )
    return found


def _holds(reader: DatasetReader) -> str:
    parts = []
    for group in reader.groups[:20]:
        shards = reader.shards_of(group)
        first, last = shards[0][0].runs[0][0], shards[-1][0].runs[-1][1]
        count = sum(entry.count for entry, _ in shards)
        whole = "" if count == last - first + 1 else f" ({count} of them)"
        parts.append(f"{group}.{first}..{last}{whole}")
    more = ", ..." if len(reader.groups) > len(parts) else ""
    return f"it has {', '.join(parts)}{more}"


@dataclass(frozen=True)
class Stream:
    """What a StreamRecordsRequest asks for: places, as ranges that do not hold their second end."""

    ranges: tuple[tuple[int, int], ...]
    total: int
    done: int
    """Components dealt with before."""
    question: bytes


def stream(reader: DatasetReader, request: read_pb2.StreamRecordsRequest) -> Stream:
    """Raises InvalidArgument, NotFound, FailedPrecondition."""
    if len(request.selections) > MAX_SELECTIONS:
        raise InvalidArgument(f"at most {MAX_SELECTIONS} fit in one call", field="selections")
    if request.selections:
        ranges = []
        for number, selection in enumerate(request.selections):
            with inside(f"selections[{number}]"):
                ranges.append(_selected(reader, selection))
    else:
        ranges = [(0, reader.records)]
    with inside("view"):
        for group in _groups_of(reader, ranges):
            views.check(request.view, group.kind)
    total = sum(stop - start for start, stop in ranges)
    if total > reader.stream_records:
        raise InvalidArgument(
            f"at most {reader.stream_records} records of {reader.name!r} fit in one call, these "
            f"are {total}: select some",
            field="selections",
        )
    question = cursors.question_hash(
        b"StreamRecords",
        request.dataset.encode(),
        *(selection.SerializeToString(deterministic=True) for selection in request.selections),
    )
    done = 0
    if request.cursor:
        done = cursors.read(request.cursor, question, reader.manifest.hash, total)
    return Stream(tuple(ranges), total, done, question)


def _selected(reader: DatasetReader, selection: read_pb2.Selection) -> tuple[int, int]:
    match selection.WhichOneof("components"):
        case "component":
            with inside("component"):
                start = place(reader, selection.component)
            return start, start + 1
        case "range":
            with inside("range"):
                return _range(reader, selection.range)
    raise InvalidArgument("name a component or a range", field="components", reason="REQUIRED")


def _range(reader: DatasetReader, wanted: read_pb2.ComponentRange) -> tuple[int, int]:
    with inside("first"):
        first, first_index = groups.parse_component(wanted.first)
    with inside("last"):
        last, last_index = groups.parse_component(wanted.last)
        same = (first.kind, first.dictionary) == (last.kind, last.dictionary)
        if not same or (last.order, last_index) < (first.order, first_index):
            raise InvalidArgument(
                f"{wanted.last} must be of the same kind as {wanted.first} and not come before it"
            )
    within = [group for group in reader.groups if first.order <= group.order <= last.order]
    if within:
        start = reader.first_place(within[0], first_index if within[0] == first else 0)
        until = last_index + 1 if within[-1] == last else 2**31
        stop = reader.first_place(within[-1], until)
        if start < stop:
            return start, stop
    raise NotFound(
        f"the dataset {reader.name!r} has no record from {wanted.first} to {wanted.last}: "
        f"{_holds(reader)}"
    )


def _groups_of(reader: DatasetReader, ranges: list[tuple[int, int]]) -> set[Group]:
    found = set()
    for group in reader.groups:
        shards = reader.shards_of(group)
        begin, end = shards[0][1], shards[-1][1] + shards[-1][0].count
        if any(start < end and stop > begin for start, stop in ranges):
            found.add(group)
    return found


@dataclass(frozen=True)
class Search:
    question: Question
    rank: int
    limit: int
    hash: bytes


def search(reader: DatasetReader, request: search_pb2.SearchRequest) -> Search:
    """Raises InvalidArgument, NotFound, FailedPrecondition."""
    if reader.unsearchable:
        raise FailedPrecondition(reader.unsearchable, field="dataset", reason="NOT_SEARCHABLE")
    if len(request.groups) > MAX_GROUPS:
        raise InvalidArgument(f"at most {MAX_GROUPS} fit in one call", field="groups")
    wanted = []
    for number, text in enumerate(request.groups):
        with inside(f"groups[{number}]"):
            group = groups.parse(text)
            if group not in reader.groups:
                raise NotFound(
                    f"the dataset {reader.name!r} has no records of {text}: {_holds(reader)}"
                )
            wanted.append(group)
    limit = request.limit if request.HasField("limit") else DEFAULT_LIMIT
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidArgument(f"must be in 1..{MAX_LIMIT}", field="limit")
    if len(request.text) > MAX_TEXT:
        raise InvalidArgument(f"has more than {MAX_TEXT} characters", field="text")
    question = Question(
        groups=tuple(wanted),
        conditions=_conditions(request),
        peak_token=_peak_token(request),
        text=request.text,
        order_by=_order_by(request),
        ascending=request.ascending,
    )
    canonical = search_pb2.SearchRequest()
    canonical.CopyFrom(request)
    canonical.ClearField("cursor")
    canonical.ClearField("limit")
    hash = cursors.question_hash(b"Search", canonical.SerializeToString(deterministic=True))
    rank = 0
    if request.cursor:
        rank = cursors.read(request.cursor, hash, reader.manifest.hash, reader.records)
    return Search(question, rank, limit, hash)


def _conditions(request: search_pb2.SearchRequest) -> tuple[Condition, ...]:
    found: dict[str, Condition] = {}
    for number, given in enumerate(request.ranges):
        with inside(f"ranges[{number}]"):
            column = _column(given.statistic, "statistic")
            if column in found:
                raise InvalidArgument("this statistic has a range already", field="statistic")
            if not (given.HasField("at_least") or given.HasField("at_most")):
                raise InvalidArgument("needs at_least, at_most or both", reason="REQUIRED")
            at_least = given.at_least if given.HasField("at_least") else -math.inf
            at_most = given.at_most if given.HasField("at_most") else math.inf
            if at_least > at_most:
                raise InvalidArgument("is below at_least", field="at_most")
            found[column] = Condition(column, at_least, at_most)
    return tuple(found.values())


def _column(statistic: search_pb2.Statistic.ValueType, field: str) -> str:
    if statistic not in _COLUMNS:
        names = ", ".join(search_pb2.Statistic.keys()[1:])
        raise InvalidArgument(f"must be one of {names}", field=field, reason="REQUIRED")
    return _COLUMNS[statistic]


def _order_by(request: search_pb2.SearchRequest) -> str:
    if request.HasField("order_by"):
        return _column(request.order_by, "order_by")
    if request.ascending:
        raise InvalidArgument("has no meaning without order_by", field="ascending")
    return ""


def _peak_token(request: search_pb2.SearchRequest) -> int | str | None:
    if not request.HasField("peak_token"):
        return None
    with inside("peak_token"):
        match request.peak_token.WhichOneof("ref"):
            case "text":
                if not request.peak_token.text:
                    raise InvalidArgument("is empty", field="text")
                return request.peak_token.text
            case "id":
                if request.peak_token.id < 0:
                    raise InvalidArgument("token ids count from 0", field="id")
                return request.peak_token.id
        raise InvalidArgument("name the token by text or by id", field="ref", reason="REQUIRED")
