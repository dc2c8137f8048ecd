"""The services behind the gateway: which are exposed, where they are, how they are reached.

Adding a service to the gateway is one entry of `EXPOSED`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from tdb.inference.v1 import service_pb2 as inference

from services.common.server import MAX_MESSAGE_BYTES
from services.common.settings import Settings

# Backend name -> the proto services it answers for.
EXPOSED: Mapping[str, tuple[ServiceDescriptor, ...]] = {
    "inference": (inference.DESCRIPTOR.services_by_name["InferenceService"],),
}

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A service that was restarted is back within a second or two; gRPC would wait two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True)
class Backend:
    name: str
    services: tuple[ServiceDescriptor, ...]
    channel: grpc.aio.Channel


def targets(settings: Settings) -> dict[str, str]:
    """Where each exposed backend listens."""
    return {"inference": settings.inference_target}


def connect(addresses: Mapping[str, str]) -> list[Backend]:
    """Opens one channel for each backend; they connect when first used."""
    return [
        Backend(name, services, grpc.aio.insecure_channel(addresses[name], options=_OPTIONS))
        for name, services in EXPOSED.items()
    ]
