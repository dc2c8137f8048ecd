"""The inference service as a process: `python -m services.inference`."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence

# Before transformers is imported: nothing is reported home, and no progress bars in the logs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from prometheus_client import CollectorRegistry
from tdb.inference.v1 import service_pb2_grpc
from transformers.utils import logging as transformers_logging

from services.common import tracing
from services.common.cache.cache import open_cache
from services.common.cache.metrics import CacheMetrics
from services.common.errors import FailedPrecondition
from services.common.metrics import new_registry
from services.common.server import ServiceServer, run_service
from services.common.settings import DictionarySource, ModelSource, Settings, SettingsError
from services.common.tracing import Tracing
from services.inference.caching import Answers
from services.inference.engine import loading
from services.inference.engine.cancellation import CancelToken
from services.inference.engine.model import Model
from services.inference.manifest import SERVICE
from services.inference.metrics import DeviceMetrics
from services.inference.readiness import Readiness
from services.inference.scheduler import QueueLimits, Scheduler
from services.inference.servicer import InferenceServicer
from services.inference.task import Task

DEVICE_LOST = "the device failed and cannot be used by this process any more: start it again."

_log = logging.getLogger("tdb.inference")


def build_server(
    settings: Settings,
    scheduler: Scheduler,
    models: dict[str, Model],
    port: int,
    registry: CollectorRegistry | None = None,
    traces: Tracing | None = None,
    answers: Answers | None = None,
) -> ServiceServer:
    """A server over `models`, which may be filled later; until then calls are UNAVAILABLE.

    `answers` None: with the cache that the settings name.
    """
    names = tuple(source.name for source in settings.models)
    known = answers or Answers(open_cache(settings))
    registry = registry or new_registry()
    registry.register(CacheMetrics(known.cache, lambda: known.flights.joined))
    return ServiceServer(
        "inference",
        settings,
        port=port,
        add_servicers=lambda server: service_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(scheduler, models, names, known), server
        ),
        on_stop=known.cache.aclose,
        service_names=[SERVICE],
        metrics_port=settings.inference_metrics_port,
        registry=registry,
        tracing=traces,
    )


def load_model(
    source: ModelSource,
    tokenizer: str | None,
    dictionaries: Sequence[DictionarySource] = (),
    dictionary_bytes: int = 2**30,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    activation_bytes: int | None = None,
) -> Model:
    """Loads and warms up one model, and tests its dictionaries. Raises FailedPrecondition."""
    where = _device(device)
    loaded = loading.load(source.name, source.source, tokenizer, where, dtype)
    model = Model(loaded)
    model.warm_up()
    model.open_dictionaries(dictionaries, dictionary_bytes)
    model.make_room(activation_bytes)
    model.measure_batches()
    return model


def _device(name: str) -> torch.device:
    """The device of TDB_DEVICE. Raises FailedPrecondition where this machine lacks it."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise FailedPrecondition(f"TDB_DEVICE is {name}, but torch sees {count} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise FailedPrecondition("TDB_DEVICE is mps, which torch does not see here")
    return device


def main() -> int:
    """Serves until told to stop; the exit code."""
    try:
        settings = Settings.from_env(os.environ)
        traces = tracing.start(settings, "inference")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    if not settings.models:
        print("No model is named: set TDB_MODEL, or use `tdb up --demo`.", file=sys.stderr)
        return 1
    transformers_logging.disable_progress_bar()
    registry = new_registry()
    limits = QueueLimits(settings.queue_per_user, settings.queue_total)
    scheduler = Scheduler(limits, DeviceMetrics(registry, traces))
    models: dict[str, Model] = {}

    async def prepare(server: ServiceServer) -> None:
        loop = asyncio.get_running_loop()
        scheduler.on_lost = lambda: loop.call_soon_threadsafe(server.fail, DEVICE_LOST)
        for source in settings.models:
            started = time.perf_counter()

            def load(_: CancelToken, source: ModelSource = source) -> Model:
                # They belong to the default model, which is the first.
                dictionaries = () if models else settings.dictionaries
                model = load_model(
                    source,
                    settings.tokenizer,
                    dictionaries,
                    settings.dictionary_bytes,
                    getattr(torch, settings.data_type),
                    settings.device,
                    settings.activation_bytes,
                )
                for earlier in models.values():  # whose room the new one's weights have taken
                    earlier.make_room(settings.activation_bytes)
                return model

            models[source.name] = (await scheduler.submit(load, Task("Load"))).result
            seconds = round(time.perf_counter() - started, 1)
            fields = {
                "model": source.name,
                "seconds": seconds,
                "activation_mib": models[source.name].room.budget // 2**20,
                "batch_tokens": models[source.name].batch_tokens,
            }
            _log.info("model loaded", extra={"fields": fields})
        readiness = Readiness(server, scheduler, models)
        scheduler.on_trouble = lambda: loop.call_soon_threadsafe(readiness.doubt)
        await server.set_serving()

    try:
        server = build_server(
            settings, scheduler, models, settings.inference_port, registry, traces
        )
        return run_service(server, prepare)
    finally:
        scheduler.close()
        traces.close()
