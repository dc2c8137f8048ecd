"""The explainer service over real gRPC, with a dataset service that holds what a test gives it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from tdb.dataset.v1 import dataset_pb2, explanations_pb2, read_pb2, record_pb2, search_pb2
from tdb.dataset.v1 import service_pb2_grpc as dataset_grpc
from tdb.explainer.v1 import service_pb2_grpc
from tdb.inference.v1 import component_pb2
from tdb.inference.v1 import service_pb2_grpc as inference_grpc

from services.common.errors import NotFound, Unavailable
from services.common.server import ServiceServer
from services.common.settings import Settings
from services.explainer import server as processes
from services.explainer.engine.components import Component, Example
from services.explainer.servicer import ExplainerServicer
from services.explainer.store import ExplanationStore
from services.explainer.upstream import Upstream
from tests.common.backend import channel_to, settings
from tests.explainer.openai_server import KEY, MODEL, OpenAIServer

if TYPE_CHECKING:
    from tdb.explainer.v1.service_pb2_grpc import ExplainerServiceAsyncStub

WEIGHTS = "ab" * 32
DATASET_HASH = "cd" * 32
USER = "ada"


class StandInDataset(dataset_grpc.DatasetServiceServicer):
    """Serves records by address, as the dataset named `small`."""

    def __init__(self, records: Iterable[record_pb2.ComponentRecord]) -> None:
        self.records = {each.component: each for each in records}
        self.header = dataset_pb2.DatasetHeader(
            source=dataset_pb2.SOURCE_BUILT,
            model=dataset_pb2.RecordedModel(id="demo", weights_hash=WEIGHTS),
        )
        self.hash = DATASET_HASH
        self.explanations: list[explanations_pb2.SourceExplanation] = []
        self.breaks_after: deque[int] = deque()
        """Of each stream of explanations, after how many batches it breaks off; then none does."""
        self.users: list[str] = []

    async def ListDatasets(self, request: Any, context: Any) -> dataset_pb2.ListDatasetsResponse:
        described = dataset_pb2.Dataset(name="small", manifest_hash=self.hash, header=self.header)
        indices: dict[str, list[int]] = {}
        for component in self.records:
            group, _, index = component.rpartition(".")
            indices.setdefault(group, []).append(int(index))
        for group, held in sorted(indices.items()):
            described.groups.add(name=group, records=len(held), first=min(held), last=max(held))
        return dataset_pb2.ListDatasetsResponse(datasets=[described])

    async def Search(
        self, request: search_pb2.SearchRequest, context: Any
    ) -> search_pb2.SearchResponse:
        """The components of the one group that is asked for, two at a time."""
        (group,) = request.groups
        held = sorted(
            (each for each in self.records if each.rpartition(".")[0] == group),
            key=lambda each: int(each.rpartition(".")[2]),
        )
        at = int(request.cursor or 0)
        return search_pb2.SearchResponse(
            components=[search_pb2.FoundComponent(component=each) for each in held[at : at + 2]],
            next_cursor=str(at + 2) if at + 2 < len(held) else "",
        )

    async def GetRecord(
        self, request: read_pb2.GetRecordRequest, context: Any
    ) -> read_pb2.GetRecordResponse:
        self.users.append(dict(context.invocation_metadata()).get("x-tdb-user", ""))
        if request.dataset != "small":
            raise NotFound(f"there is no dataset {request.dataset!r}", field="dataset")
        if request.component not in self.records:
            raise NotFound(f"there is no record of {request.component}", field="component")
        return read_pb2.GetRecordResponse(
            record=self.records[request.component], manifest_hash=self.hash
        )

    async def StreamExplanations(
        self, request: explanations_pb2.StreamExplanationsRequest, context: Any
    ) -> AsyncIterator[explanations_pb2.StreamExplanationsResponse]:
        """Batches of two; a cursor is the place where the next one begins."""
        if request.dataset != "small":
            raise NotFound(f"there is no dataset {request.dataset!r}", field="dataset")
        left = self.breaks_after.popleft() if self.breaks_after else len(self.explanations)
        for start in range(int(request.cursor or 0), len(self.explanations), 2):
            if not left:
                raise Unavailable("the service stops", retry_after_s=0.01)
            left -= 1
            batch = explanations_pb2.ExplanationBatch(
                explanations=self.explanations[start : start + 2], cursor=str(start + 2)
            )
            yield explanations_pb2.StreamExplanationsResponse(batch=batch)
        summary = explanations_pb2.StreamExplanationsSummary(manifest_hash=self.hash)
        yield explanations_pb2.StreamExplanationsResponse(summary=summary)


class StandInInference(inference_grpc.InferenceServiceServicer):
    """Describes components as it is told to."""

    def __init__(self) -> None:
        self.described: component_pb2.DescribeComponentResponse | None = None

    async def DescribeComponent(
        self, request: component_pb2.DescribeComponentRequest, context: Any
    ) -> component_pb2.DescribeComponentResponse:
        if self.described is None:
            raise NotFound("no such model is served", field="model")
        return self.described


@dataclass
class Stack:
    """What a test talks to."""

    stub: "ExplainerServiceAsyncStub"
    dataset: StandInDataset
    inference: StandInInference
    store: ExplanationStore
    folder: Path
    port: int
    settings: Settings = field(repr=False)


def record(component: Component) -> record_pb2.ComponentRecord:
    """The record of a component: its strongest third on top, the rest by quantile and at random,
    where some of the strongest stand once more."""
    found = record_pb2.ComponentRecord(component=component.address)
    if component.max_activation is not None:
        found.statistics.max = component.max_activation
    ranked = [_example(each) for each in sorted(component.examples, key=lambda each: -each.peak)]
    third = len(ranked) // 3
    found.top.extend(ranked[:third])
    found.quantiles.add(examples=[*ranked[: third // 2], *ranked[third : 2 * third]])
    found.random.extend([*ranked[: third // 2], *ranked[2 * third :]])
    for name, scores in (("promoted", component.promoted), ("suppressed", component.suppressed)):
        for each in scores:
            getattr(found, name).add(text=each.text, score=each.score)
    return found


def _example(example: Any) -> record_pb2.Example:
    found = record_pb2.Example(
        token_texts=example.token_texts,
        token_ids=example.token_ids,
        document_id=example.document_id,
        document_offset=example.document_offset,
    )
    if isinstance(example, Example):
        found.activations.extend(example.activations)
    else:
        found.pair_activations.extend(example.pair_activations)
        if example.pair_width is not None:
            found.pair_width = example.pair_width
    return found


@asynccontextmanager
async def _upstream(name: str, add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[int]:
    """A service beside the explainer's, by its port."""
    server = ServiceServer(name, settings(), port=0, add_servicers=add, service_names=[])
    async with server:
        await server.set_serving()
        yield server.port


@asynccontextmanager
async def serving(
    folder: Path,
    components: Iterable[Component | record_pb2.ComponentRecord] = (),
    openai: OpenAIServer | None = None,
    **variables: str,
) -> AsyncIterator[Stack]:
    """The service with its store in `folder`; with `openai` as the language model's endpoint."""
    # Of the other methods none is called.
    dataset_class: Any = StandInDataset
    inference_class: Any = StandInInference
    dataset = dataset_class(
        record(each) if isinstance(each, Component) else each for each in components
    )
    inference = inference_class()
    async with AsyncExitStack() as opened:
        ports = {
            name: await opened.enter_async_context(_upstream(name, partial(add, servicer)))
            for name, servicer, add in (
                ("dataset", dataset, dataset_grpc.add_DatasetServiceServicer_to_server),
                ("inference", inference, inference_grpc.add_InferenceServiceServicer_to_server),
            )
        }
        model = (
            {"TDB_PROVIDER_URL": openai.url, "TDB_PROVIDER_MODEL": MODEL, "TDB_PROVIDER_KEY": KEY}
            if openai
            else {}
        )
        given = {
            "TDB_DATA_DIR": str(folder),
            "TDB_DATASET_ADDRESS": f"127.0.0.1:{ports['dataset']}",
            "TDB_INFERENCE_ADDRESS": f"127.0.0.1:{ports['inference']}",
            **model,
            **variables,
        }
        found = settings(**given)
        database, lock = processes.open_database(found)
        opened.callback(lock.close)
        opened.callback(database.close)
        upstream = Upstream(found)
        opened.push_async_callback(upstream.close)
        provider = processes.open_provider(found, database)
        if provider:
            provider._sleep = _no_pause
            opened.push_async_callback(provider.close)
        embeddings = processes.open_embeddings(found)
        if embeddings:
            opened.push_async_callback(embeddings.close)
        served = ExplainerServicer(database, upstream, provider, embeddings=embeddings)
        opened.push_async_callback(served.close)
        server = await opened.enter_async_context(processes.build_server(found, served, 0))
        await server.set_serving()
        channel = await opened.enter_async_context(channel_to(server))
        stub: Any = service_pb2_grpc.ExplainerServiceStub(channel)
        yield Stack(
            stub, dataset, inference, ExplanationStore(database), folder, server.port, found
        )


async def _no_pause(seconds: float) -> None:
    """In place of the waits between tries."""
    await asyncio.sleep(0)


def refusal(error: grpc.aio.AioRpcError) -> tuple[str, str, str]:
    """Status, field, reason."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    fields, reason = [""], ""
    for detail in status.details:
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        if detail.Unpack(bad):
            fields = [violation.field for violation in bad.field_violations]
        if detail.Unpack(info):
            reason = info.reason
    return error.code().name, fields[0], reason
