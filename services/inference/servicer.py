"""The gRPC face of the inference service: read the request, call the engine, answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import grpc.aio
from tdb.inference.v1 import (
    attribute_pb2,
    component_pb2,
    generate_pb2,
    harvest_pb2,
    model_pb2,
    output_tokens_pb2,
    queue_pb2,
    run_pb2,
    service_pb2_grpc,
    status_pb2,
    verify_pb2,
)

from services.common.errors import InvalidArgument, NotFound, Unavailable, inside
from services.inference import (
    admission,
    describe_component,
    generate,
    harvest,
    manifest,
    measured,
    output_tokens,
    queue_messages,
    request_limits,
    request_tokens,
    requests,
    responses,
    sharing,
    stream_activations,
    verify,
)
from services.inference.caching import Answers
from services.inference.engine.attribution import NormMode
from services.inference.engine.model import Model
from services.inference.metrics import device_memory
from services.inference.scheduler import ForCall, Scheduler

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Wanted = TypeVar("Wanted")
Named = TypeVar(
    "Named",
    run_pb2.RunRequest,
    attribute_pb2.AttributeRequest,
    component_pb2.DescribeComponentRequest,
    generate_pb2.GenerateRequest,
    run_pb2.StreamActivationsRequest,
    harvest_pb2.HarvestRequest,
    output_tokens_pb2.StreamOutputTokensRequest,
)
"""Requests with a model."""

LIVE_WARNING = (
    "norm mode LIVE: a live norm ignores the length of its input, so direct effects rank nodes but "
    "explain no share of the objective"
)


class InferenceServicer(service_pb2_grpc.InferenceServiceServicer):
    """Serves `models`, which fill up while they load; `names` are all, the default first."""

    def __init__(
        self,
        scheduler: Scheduler,
        models: Mapping[str, Model],
        names: tuple[str, ...],
        answers: Answers,
    ) -> None:
        self._scheduler = scheduler
        self._on_device = ForCall(scheduler)
        self._held = stream_activations.Held()
        self._answers = answers
        self._models = models
        self._names = names
        self._started = time.monotonic()

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=self._names)

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        model = self._model(request.model)
        return responses.describe(model, request_limits.of(model))

    async def Tokenize(
        self, request: model_pb2.TokenizeRequest, context: Context
    ) -> model_pb2.TokenizeResponse:
        model = self._model(request.model)

        def tokenize() -> model_pb2.TokenizeResponse:
            if request.documents:
                return request_tokens.documents(request, model)
            with inside("prompt"):
                if not request.HasField("prompt"):
                    raise InvalidArgument("a prompt is required", reason="REQUIRED")
                ids = request_tokens.prompt_ids(request.prompt, model)
            text, offsets = model.vocabulary.decode(ids)
            return model_pb2.TokenizeResponse(
                tokens=responses.tokens(ids, model.vocabulary), byte_offsets=offsets, text=text
            )

        return await asyncio.to_thread(tokenize)

    async def Run(self, request: run_pb2.RunRequest, context: Context) -> run_pb2.RunResponse:
        model = self._model(request.model)
        canonical = _named(request, model)
        wanted = await _admitted(requests.read_forward, admission.of_run, canonical, model)
        return await self._answers.one(
            "Run",
            model,
            canonical,
            run_pb2.RunResponse,
            partial(self._run, canonical, wanted, model),
        )

    async def _run(
        self, canonical: run_pb2.RunRequest, wanted: requests.Forward, model: Model
    ) -> run_pb2.RunResponse:
        finished = await self._on_device(
            partial(model.run, wanted.asked), sharing.of_run(wanted, model)
        )
        response = run_pb2.RunResponse()
        responses.fill_run(
            response, finished.result, wanted.read, wanted.run.token_ids, model.vocabulary
        )
        timings = queue_messages.timings(finished, forward_ms=finished.result.forward_ms)
        ids = [wanted.run.token_ids]
        response.manifest.CopyFrom(manifest.build("Run", model, canonical, ids, timings))
        return response

    async def Attribute(
        self, request: attribute_pb2.AttributeRequest, context: Context
    ) -> attribute_pb2.AttributeResponse:
        model = self._model(request.model)
        canonical = _named(request, model)
        wanted = await _admitted(
            requests.read_attribution, admission.of_attribution, canonical, model
        )
        return await self._answers.one(
            "Attribute",
            model,
            canonical,
            attribute_pb2.AttributeResponse,
            partial(self._attribute, canonical, wanted, model),
        )

    async def _attribute(
        self, canonical: attribute_pb2.AttributeRequest, wanted: requests.Attribution, model: Model
    ) -> attribute_pb2.AttributeResponse:
        finished = await self._on_device(
            partial(model.attribute, wanted.asked), sharing.of_attribution(wanted, model)
        )
        result = finished.result
        effects = await measured.measure(wanted, result, model, self._on_device)
        ids = [run.token_ids for run in wanted.runs]

        def answer() -> attribute_pb2.AttributeResponse:
            response = attribute_pb2.AttributeResponse()
            responses.fill_attribution(response, result, ids, model.vocabulary)
            measured.fill(response, result, effects)
            times = result.times
            timings = queue_messages.timings(
                finished,
                forward_ms=times.forward,
                backward_ms=times.backward,
                read_out_ms=result.own_ms,
            )
            norms = [run.objective.reading_norms(model.architecture) for run in wanted.runs]
            live = wanted.norm_mode is NormMode.LIVE and any(norms)
            warnings = [LIVE_WARNING] if live else []
            warnings += manifest.precision_warnings(model)
            warnings += [notice for each in result.outcomes for notice in each.notices]
            response.manifest.CopyFrom(
                manifest.build("Attribute", model, canonical, ids, timings, warnings)
            )
            return response

        # 100,000 rows take a second to write down; the loop must not wait for it.
        return await asyncio.to_thread(answer)

    async def Verify(
        self, request: verify_pb2.VerifyRequest, context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        model = self._model(request.table.model)
        canonical = verify_pb2.VerifyRequest()
        canonical.CopyFrom(request)
        wanted = await _admitted(verify.read, admission.of_verification, canonical, model)
        canonical.table.model = model.identity.id
        found = self._answers.stream(
            "Verify",
            model,
            canonical,
            verify_pb2.VerifyResponse,
            partial(verify.stream, canonical, wanted, model, self._on_device),
        )
        async for response in found:
            yield response

    async def DescribeComponent(
        self, request: component_pb2.DescribeComponentRequest, context: Context
    ) -> component_pb2.DescribeComponentResponse:
        model = self._model(request.model)
        canonical = _named(request, model)
        wanted = await _admitted(
            describe_component.read, admission.of_description, canonical, model
        )
        return await self._answers.one(
            "DescribeComponent",
            model,
            canonical,
            component_pb2.DescribeComponentResponse,
            partial(describe_component.answer, canonical, wanted, model, self._on_device),
            describe_component.dictionaries_used(wanted, model),
        )

    async def Generate(
        self, request: generate_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        model = self._model(request.model)
        canonical = _named(request, model)
        wanted = await _admitted(generate.read, admission.of_generation, canonical, model)
        compute = partial(generate.stream, canonical, wanted, model, self._on_device)
        found = (
            self._answers.stream(
                "Generate", model, canonical, generate_pb2.GenerateResponse, compute
            )
            if generate.is_repeatable(request)
            else compute()
        )
        async for response in found:
            yield response

    async def StreamActivations(
        self, request: run_pb2.StreamActivationsRequest, context: Context
    ) -> AsyncIterator[run_pb2.StreamActivationsResponse]:
        model = self._model(request.model)
        canonical = _named(request, model)
        wanted = await _admitted(stream_activations.read, admission.of_points, canonical, model)
        pieces = stream_activations.stream(canonical, wanted, model, self._on_device)
        with self._held.keep(wanted):
            async for response in pieces:
                yield response

    async def Harvest(
        self, request: harvest_pb2.HarvestRequest, context: Context
    ) -> AsyncIterator[harvest_pb2.HarvestResponse]:
        model = self._model(request.model)
        canonical = _named(request, model)
        asked = await _admitted(harvest.read, admission.of_harvest, canonical, model)
        async for response in harvest.stream(canonical, asked, model, self._on_device):
            yield response

    async def StreamOutputTokens(
        self, request: output_tokens_pb2.StreamOutputTokensRequest, context: Context
    ) -> AsyncIterator[output_tokens_pb2.StreamOutputTokensResponse]:
        model = self._model(request.model)
        canonical = _named(request, model)
        wanted = await _admitted(output_tokens.read, admission.of_output_tokens, canonical, model)
        async for response in output_tokens.stream(canonical, wanted, model, self._on_device):
            yield response

    async def GetQueue(
        self, request: queue_pb2.GetQueueRequest, context: Context
    ) -> queue_pb2.GetQueueResponse:
        return queue_pb2.GetQueueResponse(
            entries=queue_messages.entries(self._scheduler.snapshot())
        )

    async def GetStatus(
        self, request: status_pb2.GetStatusRequest, context: Context
    ) -> status_pb2.GetStatusResponse:
        return status_pb2.GetStatusResponse(
            uptime_s=time.monotonic() - self._started,
            device_memory=[
                status_pb2.DeviceMemory(device=device, kind=kind, bytes=size)
                for device, kind, size in device_memory()
            ],
            cache=self._answers.status(),
        )

    def _model(self, name: str) -> Model:
        name = name or self._names[0]
        if name not in self._names:
            raise NotFound(
                f"no model {name!r} is served here; served: {', '.join(self._names)}", field="model"
            )
        model = self._models.get(name)
        if model is None:
            raise Unavailable(f"the model {name!r} is still loading", retry_after_s=2.0)
        return model


def _named(request: Named, model: Model) -> Named:
    """A copy of the request that names the model by its id; reading it makes it canonical."""
    canonical = type(request)()
    canonical.CopyFrom(request)
    canonical.model = model.identity.id
    return canonical


async def _admitted(
    read: Callable[[Request, Model], Wanted],
    cost: Callable[[Wanted, Model], object],
    request: Request,
    model: Model,
) -> Wanted:
    """What a request asks for, where the device could ever do it."""

    def work() -> Wanted:
        wanted = read(request, model)
        cost(wanted, model)
        return wanted

    return await asyncio.to_thread(work)
