"""The dataset service as a process: `python -m services.dataset`."""

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore

from tdb.dataset.v1 import service_pb2_grpc

from services.common import tracing
from services.common.errors import FailedPrecondition
from services.common.server import ServiceServer, run_service
from services.common.settings import Settings, SettingsError
from services.common.tracing import Tracing
from services.dataset import http_files, remote_files
from services.dataset.block_cache import BlockCache
from services.dataset.building.builds import Builds
from services.dataset.importers.imports import Imports
from services.dataset.library import Library
from services.dataset.openai_catalogue import PUBLISHED
from services.dataset.openai_remote import OpenAIReader
from services.dataset.remote import RemoteStorage
from services.dataset.servicer import DatasetServicer

SERVICE = "tdb.dataset.v1.DatasetService"

_log = logging.getLogger("tdb.dataset")


def open_library(settings: Settings) -> Library:
    """The datasets of this deployment. Raises SettingsError where a folder cannot be made, or a
    remote dataset has the name of one here."""
    folder = settings.folder("datasets")
    if not (settings.remote_datasets or settings.openai_records):
        return Library(folder)
    cache = BlockCache(settings.folder("cache", "datasets"), settings.dataset_cache_bytes)
    at_once = BoundedSemaphore(http_files.AT_ONCE)
    remotes = []
    for each in settings.remote_datasets:
        if (folder / each.name).exists():
            raise SettingsError(
                f"TDB_REMOTE_DATASETS names {each.name}, but {folder / each.name} is here already."
            )
        with _as_setting("TDB_REMOTE_DATASETS"):
            there = remote_files.below(each.url, at_once)
        remotes.append(RemoteStorage(each.name, there, cache))
    published = []
    if settings.openai_records:
        with _as_setting("TDB_OPENAI_RECORDS"):
            bucket = remote_files.below(settings.openai_records, at_once)
        published = [OpenAIReader(each, bucket, cache) for each in PUBLISHED]
        taken = {each.name for each in settings.remote_datasets}
        for reader in published:
            if reader.name in taken or (folder / reader.name).exists():
                raise SettingsError(
                    f"TDB_OPENAI_RECORDS serves {reader.name}, but there is another dataset of "
                    "this name: give that one another"
                )
    return Library(folder, remotes, published=published)


@contextmanager
def _as_setting(name: str) -> Iterator[None]:
    """What cannot be read as it is set is a mistake in a setting."""
    try:
        yield
    except FailedPrecondition as error:
        raise SettingsError(f"{name}: {error.message}.") from None


def build_server(
    settings: Settings, servicer: DatasetServicer, port: int, traces: Tracing | None = None
) -> ServiceServer:
    return ServiceServer(
        "dataset",
        settings,
        port=port,
        add_servicers=lambda server: service_pb2_grpc.add_DatasetServiceServicer_to_server(
            servicer, server
        ),
        service_names=[SERVICE],
        metrics_port=settings.dataset_metrics_port,
        tracing=traces,
    )


def main() -> int:
    """Serves until told to stop; the exit code."""
    try:
        settings = Settings.from_env(os.environ)
        library = open_library(settings)
        traces = tracing.start(settings, "dataset")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    folder = settings.folder("datasets")
    builds = Builds(settings, library, folder)
    servicer = DatasetServicer(library, builds, Imports(settings, library, folder))

    async def prepare(server: ServiceServer) -> None:
        served = await asyncio.to_thread(library.warm_up)
        _log.info("local datasets opened", extra={"fields": {"datasets": served}})
        servicer.stopped = server.stopped
        builds.resume()
        if settings.demo_dataset:
            builds.keep_demo()
        await server.set_serving()

    try:
        server = build_server(settings, servicer, settings.dataset_port, traces)
        return run_service(server, prepare)
    finally:
        servicer.close()
        traces.close()
