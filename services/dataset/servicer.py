"""The gRPC face of the dataset service: read the request, read the store, answer.

Everything that touches the disk runs in a few threads. A stream reads one batch at a time, and the
next one only when gRPC's flow control has taken the last, so a slow reader costs one batch.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any, TypeVar

import grpc.aio
from tdb.dataset.v1 import (
    build_pb2,
    dataset_pb2,
    explanations_pb2,
    import_pb2,
    read_pb2,
    search_pb2,
    service_pb2_grpc,
)

from services.common import calls
from services.common.errors import NotFound, TdbError, Unavailable, inside
from services.dataset import batches, cursors, explanation_batches, requests, search, views
from services.dataset.batches import Batch
from services.dataset.building.builds import Builds, Job
from services.dataset.importers.imports import Imports
from services.dataset.library import Library, check_name
from services.dataset.reader import DatasetReader

THREADS = 16
"""More than remote reads at once, so that a remote side that hangs leaves some for the others."""

PROGRESS_S = 1.0
"""How often a build says how far it is."""

Context = grpc.aio.ServicerContext[Any, Any]
Result = TypeVar("Result")


class DatasetServicer(service_pb2_grpc.DatasetServiceServicer):
    """Serves the datasets of `library`, and builds more."""

    def __init__(self, library: Library, builds: Builds, imports: Imports) -> None:
        self._library = library
        self._imports = imports
        self._builds = builds
        self.stopped = asyncio.Event()
        """Set when the service stops: those who follow a build are let go."""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dataset")

    def close(self) -> None:
        self._builds.close()
        self._threads.shutdown(cancel_futures=True)
        self._library.close()

    async def ListDatasets(
        self, request: dataset_pb2.ListDatasetsRequest, context: Context
    ) -> dataset_pb2.ListDatasetsResponse:
        return await self._in_thread(lambda: _list(self._library, self._builds))

    async def GetRecord(
        self, request: read_pb2.GetRecordRequest, context: Context
    ) -> read_pb2.GetRecordResponse:
        return await self._in_thread(lambda: _get(self._library, request))

    async def StreamRecords(
        self, request: read_pb2.StreamRecordsRequest, context: Context
    ) -> AsyncIterator[read_pb2.StreamRecordsResponse]:
        def read() -> tuple[DatasetReader, requests.Stream]:
            reader = requests.dataset(self._library, request.dataset)
            return reader, requests.stream(reader, request)

        reader, wanted = await self._in_thread(read)
        batches = _batches(reader, wanted, request)
        summary = read_pb2.StreamRecordsSummary(manifest_hash=reader.manifest.hash)
        while batch := await self._in_thread(lambda: next(batches, None)):
            summary.records += len(batch.records)
            summary.damaged += len(batch.damaged)
            yield read_pb2.StreamRecordsResponse(batch=batch)
        yield read_pb2.StreamRecordsResponse(summary=summary)

    async def StreamExplanations(
        self, request: explanations_pb2.StreamExplanationsRequest, context: Context
    ) -> AsyncIterator[explanations_pb2.StreamExplanationsResponse]:
        def read() -> tuple[DatasetReader, Iterator[explanations_pb2.ExplanationBatch]]:
            reader = requests.dataset(self._library, request.dataset)
            return reader, explanation_batches.of(reader, request)

        reader, batches = await self._in_thread(read)
        summary = explanations_pb2.StreamExplanationsSummary(manifest_hash=reader.manifest.hash)
        while batch := await self._in_thread(lambda: next(batches, None)):
            summary.explanations += len(batch.explanations)
            yield explanations_pb2.StreamExplanationsResponse(batch=batch)
        yield explanations_pb2.StreamExplanationsResponse(summary=summary)

    async def Search(
        self, request: search_pb2.SearchRequest, context: Context
    ) -> search_pb2.SearchResponse:
        return await self._in_thread(lambda: _search(self._library, request))

    async def DeleteDataset(
        self, request: dataset_pb2.DeleteDatasetRequest, context: Context
    ) -> dataset_pb2.DeleteDatasetResponse:
        def delete() -> int:
            with inside("dataset"):
                return self._builds.delete(request.dataset)

        return dataset_pb2.DeleteDatasetResponse(bytes=await self._in_thread(delete))

    async def BuildDataset(
        self, request: build_pb2.BuildDatasetRequest, context: Context
    ) -> AsyncIterator[build_pb2.BuildDatasetResponse]:
        call = calls.current()
        user = call.user if call else calls.LOCAL_USER
        job = await self._in_thread(lambda: self._builds.start(request, user))
        yield build_pb2.BuildDatasetResponse(progress=job.progress.message())
        while not await self._has_ended(job):
            yield build_pb2.BuildDatasetResponse(progress=job.progress.message())
        if job.error is not None:
            raise copy(job.error)
        name = request.dataset
        yield build_pb2.BuildDatasetResponse(
            dataset=await self._in_thread(lambda: _describe(self._library.open(name), False))
        )

    async def _has_ended(self, job: Job) -> bool:
        """Whether it ends within PROGRESS_S. Raises Unavailable when the service does."""
        end = time.monotonic() + PROGRESS_S
        while not job.ended.is_set():
            if self.stopped.is_set():
                raise Unavailable(
                    "the service stops; the build goes on when it is back", retry_after_s=1
                )
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.05)
        return True

    async def CancelBuild(
        self, request: build_pb2.CancelBuildRequest, context: Context
    ) -> build_pb2.CancelBuildResponse:
        def cancel() -> dataset_pb2.Build:
            with inside("dataset"):
                return self._builds.cancel(check_name(request.dataset)).progress.message()

        return build_pb2.CancelBuildResponse(build=await self._in_thread(cancel))

    async def ImportDataset(
        self, request: import_pb2.ImportDatasetRequest, context: Context
    ) -> AsyncIterator[import_pb2.ImportDatasetResponse]:
        loop = asyncio.get_running_loop()
        said: asyncio.Queue[import_pb2.ImportProgress] = asyncio.Queue()
        stop = threading.Event()

        def say(progress: import_pb2.ImportProgress) -> None:
            loop.call_soon_threadsafe(said.put_nowait, progress)

        work = asyncio.ensure_future(self._in_thread(lambda: self._imports.run(request, say, stop)))
        try:
            while not (work.done() and said.empty()):
                if self.stopped.is_set():
                    raise Unavailable(
                        "the service stops; the same request goes on when it is back",
                        retry_after_s=1,
                    )
                try:
                    progress = await asyncio.wait_for(said.get(), 0.05)
                except TimeoutError:
                    continue
                yield import_pb2.ImportDatasetResponse(progress=progress)
            await work
        finally:
            stop.set()
            # A thread cannot be taken back: what it still raises is nobody's.
            work.add_done_callback(lambda done: done.cancelled() or done.exception())
        name = request.dataset
        yield import_pb2.ImportDatasetResponse(
            dataset=await self._in_thread(lambda: _describe(self._library.open(name), False))
        )

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _list(library: Library, builds: Builds) -> dataset_pb2.ListDatasetsResponse:
    response = dataset_pb2.ListDatasetsResponse(builds=builds.list())
    for name in library.names():
        try:
            response.datasets.append(_describe(library.open(name), library.is_remote(name)))
        except TdbError as error:
            deleted_meanwhile = isinstance(error, NotFound) and not library.is_remote(name)
            if not deleted_meanwhile:
                response.unreadable.add(name=name, reason=error.message)
    return response


def _describe(reader: DatasetReader, is_remote: bool) -> dataset_pb2.Dataset:
    manifest = reader.manifest
    described = dataset_pb2.Dataset(
        name=reader.name,
        manifest_hash=manifest.hash,
        header=manifest.header,
        records=manifest.records,
        bytes=manifest.size,
        has_token_ids=manifest.has_token_ids,
        has_vocabulary=manifest.vocabulary is not None,
        is_remote=is_remote,
        explanations=manifest.explanations.count if manifest.explanations else 0,
    )
    for group in reader.groups:
        entries = [entry for entry, _ in reader.shards_of(group)]
        described.groups.add(
            name=str(group),
            records=sum(entry.count for entry in entries),
            first=entries[0].runs[0][0],
            last=entries[-1].runs[-1][1],
        )
    return described


def _get(library: Library, request: read_pb2.GetRecordRequest) -> read_pb2.GetRecordResponse:
    reader = requests.dataset(library, request.dataset)
    with inside("component"):
        place = requests.place(reader, request.component)
    record = reader.read(place)
    reader.fill_texts(record)
    with inside("view"):
        views.apply(request.view, record)
    return read_pb2.GetRecordResponse(record=record, manifest_hash=reader.manifest.hash)


def _batches(
    reader: DatasetReader, wanted: requests.Stream, request: read_pb2.StreamRecordsRequest
) -> Iterator[read_pb2.RecordBatch]:
    done = 0
    batch = Batch(reader, request)
    for start, stop in wanted.ranges:
        place = start + min(max(0, wanted.done - done), stop - start)
        done += place - start
        while place < stop:
            most = min(batch.room, stop - place)
            for item in reader.read_many(place, most, batches.MOST_BYTES - batch.size):
                batch.add(place, item)
                place += 1
                done += 1
                if batch.is_full:
                    break
            if batch.is_full:
                yield batch.message(wanted, done)
                batch = Batch(reader, request)
    if batch.count:
        yield batch.message(wanted, done)


def _search(library: Library, request: search_pb2.SearchRequest) -> search_pb2.SearchResponse:
    reader = requests.dataset(library, request.dataset)
    wanted = requests.search(reader, request)
    found = search.search(reader, wanted.question, wanted.rank, wanted.limit)
    response = search_pb2.SearchResponse(
        candidates=found.candidates,
        damaged=found.damaged,
        damaged_groups=found.damaged_groups,
        manifest_hash=reader.manifest.hash,
    )
    for component, statistics in found.components:
        response.components.add(component=component, statistics=statistics)
    if found.next_rank is not None:
        response.next_cursor = cursors.write(wanted.hash, reader.manifest.hash, found.next_rank)
    return response
