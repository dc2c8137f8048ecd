"""The services behind the gateway: which are exposed, where they are, how they are reached.

Adding a service to the gateway is one entry of `EXPOSED`. Where an address has several replicas
behind it, the channel (`tdb.channel`) balances them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from tdb import channel
from tdb.dataset.v1 import service_pb2 as dataset
from tdb.explainer.v1 import service_pb2 as explainer
from tdb.inference.v1 import service_pb2 as inference

from services.common import tls
from services.common.settings import Settings

# Backend name -> the proto services it answers for.
EXPOSED: Mapping[str, tuple[ServiceDescriptor, ...]] = {
    "inference": (inference.DESCRIPTOR.services_by_name["InferenceService"],),
    "dataset": (dataset.DESCRIPTOR.services_by_name["DatasetService"],),
    "explainer": (explainer.DESCRIPTOR.services_by_name["ExplainerService"],),
}

# RPCs of them that are for programs and not exposed, by full name: their streams are too large
# for JSON.
GRPC_ONLY = frozenset({"tdb.inference.v1.InferenceService.Harvest"})


def methods(service: ServiceDescriptor) -> Iterator[MethodDescriptor]:
    """The RPCs of an exposed service that plain HTTP can call."""
    for method in service.methods:
        # Requests of plain HTTP have one message.
        if not method.client_streaming and method.full_name not in GRPC_ONLY:
            yield method


@dataclass(frozen=True)
class Backend:
    name: str
    services: tuple[ServiceDescriptor, ...]
    channel: grpc.aio.Channel
    direct: grpc.aio.Channel
    """To ask one that `channel` passes over what it waits for."""
    tls_trouble: Callable[[], str]
    """Why TLS with it fails, "" where that is not what is wrong; blocks."""

    async def close(self) -> None:
        await self.channel.close()
        await self.direct.close()


def targets(settings: Settings) -> dict[str, str]:
    """Where each exposed backend listens."""
    return {
        "inference": settings.inference_target,
        "dataset": settings.dataset_target,
        "explainer": settings.explainer_target,
    }


def connect(addresses: Mapping[str, str], secured: tls.ClientTls | None) -> list[Backend]:
    """Opens the channels of each backend that has an address; they connect when first used.

    A service that is full is not asked again from here: it says when to come back, and the client
    hears that (`Retry-After`) rather than waiting without knowing.
    """
    return [
        Backend(
            name,
            services,
            channel=tls.channel(addresses[name], channel.options(channel.GONE), secured),
            direct=tls.channel(addresses[name], channel.CONNECTION, secured),
            tls_trouble=partial(secured.trouble, addresses[name]) if secured else lambda: "",
        )
        for name, services in EXPOSED.items()
        if name in addresses
    ]
