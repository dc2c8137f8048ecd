"""How to reach a service: the options of a gRPC channel that balances, and outlives restarts.

    grpc.insecure_channel("gpu-box:50051", options=channel.options())

A name with several addresses is several replicas (`dns:///` is gRPC's default scheme), and so is
`ipv4:10.0.0.1:50051,10.0.0.2:50051`. Calls go round those that say they are SERVING: one that loads
its model or drains is passed over. A call that no replica took is tried again: the same request has
the same result. What is not tried again is a stream that has brought something, and what would be
stored or paid for twice.
"""

import json
from collections.abc import Sequence

MAX_MESSAGE_BYTES = 16 * 1024 * 1024

# A replica that is gone, stopping or full; the server's grpc-retry-pushback-ms, where it sends one,
# says when. gRPC's servers cancel what reaches them in their last milliseconds, and only then does
# somebody hear CANCELLED who has not cancelled.
GONE = ("UNAVAILABLE", "CANCELLED")
RETRYABLE = (*GONE, "RESOURCE_EXHAUSTED")

CONNECTION: Sequence[tuple[str, str | int]] = (
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

_HEALTH = "grpc.health.v1.Health"
_EXPLAINER = "tdb.explainer.v1.ExplainerService"
ONCE = ("WriteExplanation", "Explain", "Score", "ExplainMany")
"""Methods of the explainer service that store something anew each time."""


def options(retryable: Sequence[str] = RETRYABLE) -> list[tuple[str, str | int]]:
    """The options of a channel. `retryable` are the names of statuses after which a call is tried
    again, four times within about four seconds."""
    return [*CONNECTION, ("grpc.service_config", json.dumps(service_config(retryable)))]


def service_config(retryable: Sequence[str] = RETRYABLE) -> dict[str, object]:
    """Balancing, health and the retry policy, in gRPC's own format for any language."""
    return {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,  # the most that gRPC makes
                    "initialBackoff": "0.1s",
                    "maxBackoff": "3s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": list(retryable),
                },
            },
            {"name": [{"service": _HEALTH}]},  # who asks for health wants to hear it at once
            {"name": [{"service": _EXPLAINER, "method": method} for method in ONCE]},
        ],
    }
