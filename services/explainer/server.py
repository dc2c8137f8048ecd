"""The explainer service as a process: `python -m services.explainer`."""

import fcntl
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tdb.explainer.v1 import service_pb2_grpc

from services.common import tracing
from services.common.errors import FailedPrecondition, TdbError
from services.common.server import ServiceServer, run_service
from services.common.settings import Settings, SettingsError
from services.common.tracing import Tracing
from services.explainer.database import Database
from services.explainer.engine import embeddings
from services.explainer.engine.provider_settings import ProviderSettings
from services.explainer.reply_store import ReplyStore
from services.explainer.servicer import ExplainerServicer
from services.explainer.steering import ModelSteering
from services.explainer.upstream import Upstream

if TYPE_CHECKING:
    from services.explainer.engine.openai_embeddings import OpenAIEmbeddings
    from services.explainer.engine.openai_provider import OpenAIProvider

SERVICE = "tdb.explainer.v1.ExplainerService"
FILE = "explanations.sqlite3"


def open_database(settings: Settings) -> tuple[Database, IO[bytes]]:
    """The store, and the lock that keeps other processes from working on the same jobs: held until
    it is closed. Raises FailedPrecondition, SettingsError."""
    path = settings.folder() / FILE
    lock = _lock(path.with_name(f"{FILE}.lock"))
    try:
        return Database(path, settings.explanations_bytes + settings.reply_cache_bytes), lock
    except TdbError:
        lock.close()
        raise


def open_provider(settings: Settings, database: Database) -> "OpenAIProvider | None":
    """The language model; None where none is configured."""
    if not settings.provider_url:
        return None
    # It costs a second of the start, which most deployments do not need.
    from services.explainer.engine.openai_provider import OpenAIProvider

    return OpenAIProvider(
        ProviderSettings.of(settings), ReplyStore(database, settings.reply_cache_bytes)
    )


def open_embeddings(settings: Settings) -> "OpenAIEmbeddings | None":
    """What makes explanations searchable by meaning; None where none is configured."""
    if not settings.embedding_url:
        return None
    from services.explainer.engine.openai_embeddings import OpenAIEmbeddings

    return OpenAIEmbeddings(embeddings.endpoint(settings))


def build_server(
    settings: Settings,
    servicer: ExplainerServicer,
    port: int,
    traces: Tracing | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
) -> ServiceServer:
    return ServiceServer(
        "explainer",
        settings,
        port=port,
        add_servicers=lambda server: service_pb2_grpc.add_ExplainerServiceServicer_to_server(
            servicer, server
        ),
        service_names=[SERVICE],
        metrics_port=settings.explainer_metrics_port,
        tracing=traces,
        on_stop=on_stop,
    )


def main() -> int:
    """Serves until told to stop; the exit code."""
    try:
        settings = Settings.from_env(os.environ)
        traces = tracing.start(settings, "explainer")
        upstream = Upstream(settings, traces)
        database, lock = open_database(settings)
    except (SettingsError, TdbError) as error:
        print(error, file=sys.stderr)
        return 1
    provider = open_provider(settings, database)
    searching = open_embeddings(settings)
    servicer = ExplainerServicer(
        database, upstream, provider, steering=ModelSteering(upstream), embeddings=searching
    )

    async def prepare(server: ServiceServer) -> None:
        await servicer.start(server.stopped, settings.drain_s)
        await server.set_serving()

    async def close() -> None:
        await servicer.close()
        await upstream.close()
        if provider:
            await provider.close()
        if searching:
            await searching.close()

    try:
        server = build_server(settings, servicer, settings.explainer_port, traces, close)
        return run_service(server, prepare)
    finally:
        database.close()
        lock.close()
        traces.close()


def _lock(path: Path) -> IO[bytes]:
    try:
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise FailedPrecondition(
            f"another explainer service works on {path.with_suffix('')}: end that one, or give "
            "this one another TDB_DATA_DIR",
            reason="STORE_IN_USE",
        ) from None
    return lock
