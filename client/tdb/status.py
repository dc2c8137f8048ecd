"""`tdb status`: what a service and its gateway are doing, for a human or as JSON.

collect(where)    asks; everything that it found, named as in JSON
as_text(found)    tables
is_well(found)    whether all serve
"""

import http.client
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tdb.inference.v1 import model_pb2, queue_pb2, service_pb2_grpc, status_pb2
from tdb.terminal import duration, table
from tdb.type.v1.tensor_pb2 import DataType

TIMEOUT_S = 5.0
SERVING = "serving"

Found = dict[str, Any]


@dataclass(frozen=True)
class Where:
    """What to ask: `inference` at host:port, `gateway` at the URL of its page, "" for none;
    `others` are services of which only health is asked, by name."""

    inference: str
    gateway: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    token: str = ""
    credentials: grpc.ChannelCredentials | None = None
    """For services that speak TLS."""
    options: Sequence[tuple[str, str | int]] = ()


def collect(where: Where) -> Found:
    """Asks each of them. What cannot be had is said in `state` or `problems`, and never raised."""
    services = []
    if where.gateway:
        state = _gateway_state(where.gateway)
        services.append({"name": "gateway", "address": where.gateway, "state": state})
    for name, address in where.others.items():
        with _channel(where, address) as channel:
            state = _health(channel)
        services.append({"name": name, "address": address, "state": state})
    with _channel(where, where.inference) as channel:
        state = _health(channel)
        services.append({"name": "inference", "address": where.inference, "state": state})
        found: Found = {"services": services, "models": [], "queue": [], "problems": []}
        if state != "cannot be reached":
            found |= _of_inference(channel, where, found["problems"])
    return found


def is_well(found: Found) -> bool:
    """Whether everything serves and told all that it was asked."""
    return not found["problems"] and all(each["state"] == SERVING for each in found["services"])


def as_text(found: Found) -> str:
    """Tables with a line for each service, model, number and piece of work."""
    parts = [
        table(
            ("SERVICE", "ADDRESS", "STATE"),
            [(each["name"], each["address"], each["state"]) for each in found["services"]],
        )
    ]
    if found["models"]:
        models = [_model(model) for model in found["models"]]
        parts.append(table(("MODEL", "STATE", "DEVICE", "ABOUT"), models))
    if "uptimeS" in found:
        parts.append("\n".join(_numbers(found)))
    if found["queue"]:
        parts.append(table(_QUEUE_HEAD, [_work(entry) for entry in found["queue"]]))
    elif "uptimeS" in found:
        parts.append("Nobody waits for the device.")
    parts += found["problems"]
    return "\n\n".join(parts)


def _channel(where: Where, target: str) -> grpc.Channel:
    # Not by the proxy that the Hub may need.
    options = [("grpc.enable_http_proxy", 0), *where.options]
    if where.credentials:
        return grpc.secure_channel(target, where.credentials, options)
    return grpc.insecure_channel(target, options)


def _health(channel: grpc.Channel) -> str:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
        )
    except grpc.RpcError as error:
        late = _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED
        return "does not answer" if late else "cannot be reached"
    serves = answer.status == health_pb2.HealthCheckResponse.SERVING
    return SERVING if serves else "loading its model, or stopping"


def _gateway_state(url: str) -> str:
    """What `/readyz` says."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/readyz")
        response = connection.getresponse()
        body = json.loads(response.read())
        if response.status == 200:
            return SERVING
        awaited = "; ".join(f"{name}: {reason}" for name, reason in body["awaited"].items())
        return f"waits for {awaited}"
    except TimeoutError:
        return "does not answer"
    except (OSError, http.client.HTTPException):
        return "cannot be reached"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is no gateway of ours"
    finally:
        connection.close()


def _of_inference(channel: grpc.Channel, where: Where, problems: list[str]) -> Found:
    stub = service_pb2_grpc.InferenceServiceStub(channel)
    metadata = [("authorization", f"Bearer {where.token}")] if where.token else []

    def ask(method: Callable[..., Any], request: Message) -> Any:
        return method(request, timeout=TIMEOUT_S, metadata=metadata)

    found: Found = {"models": []}
    try:
        for name in ask(stub.ListModels, model_pb2.ListModelsRequest()).models:
            try:
                model = ask(stub.GetModel, model_pb2.GetModelRequest(model=name))
            except grpc.RpcError as error:
                if _code(error) is not grpc.StatusCode.UNAVAILABLE:
                    raise
                found["models"].append({"id": name, "state": "loading"})
            else:
                found["models"].append({"id": name, "state": "served", **_about(model)})
        found |= _tree(ask(stub.GetStatus, status_pb2.GetStatusRequest()))
        entries = ask(stub.GetQueue, queue_pb2.GetQueueRequest()).entries
        found["queue"] = [_tree(entry) for entry in entries]
    except grpc.RpcError as error:
        problems.append(_sentence(error))
    return found


def _about(model: model_pb2.GetModelResponse) -> Found:
    return {
        "device": model.device,
        "dataType": DataType.Name(model.data_type).removeprefix("DATA_TYPE_").lower(),
        "architecture": model.architecture,
        "layers": model.dimensions.layers,
        "dictionaries": len(model.dictionaries),
    }


def _tree(message: Message) -> Found:
    tree: Found = MessageToDict(message, always_print_fields_with_no_presence=True)
    return tree


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    return error.code()


def _sentence(error: grpc.RpcError) -> str:
    assert isinstance(error, grpc.Call)
    code = error.code()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "The service is of an earlier version, which cannot say how it is."
    return f"{code.name}: {error.details()}"


def _model(model: Found) -> tuple[str, ...]:
    if "device" not in model:
        return (model["id"], model["state"], "", "")
    about = f"{model['architecture']}, {model['layers']} layers, {model['dataType']}"
    if count := model["dictionaries"]:
        about += f", {count} {'dictionary' if count == 1 else 'dictionaries'}"
    return (model["id"], model["state"], model["device"], about)


def _numbers(found: Found) -> Iterator[str]:
    yield f"Up for {duration(found['uptimeS'])}."
    devices: dict[str, list[str]] = {}
    for memory in found["deviceMemory"]:
        size = _size(int(memory["bytes"]))
        devices.setdefault(memory["device"], []).append(f"{size} {memory['kind']}")
    for device, sizes in devices.items():
        yield f"Memory of {device}: {', '.join(sizes)}."
    if cache := found.get("cache"):
        numbers = ", ".join(f"{cache[name]} {name}" for name in ("hits", "misses", "joined"))
        broken = "" if cache["breaker"] == "closed" else f"; its breaker is {cache['breaker']}"
        errors = f", {cache['errors']} errors" if int(cache["errors"]) else ""
        yield f"Cache in {cache['store']}: {numbers}{errors}{broken}."


_QUEUE_HEAD = ("PLACE", "USER", "CLASS", "WORK", "CALL", "SINCE", "STARTS", "REQUEST")


def _work(entry: Found) -> tuple[str, ...]:
    queue = entry["queue"]
    runs = entry["running"]
    return (
        "runs" if runs else str(queue["position"]),
        entry["user"] or "-",
        queue["priority"].removeprefix("PRIORITY_").lower(),
        entry["kind"],
        entry["method"].rpartition("/")[2] or "-",
        duration(entry["waitedMs"] / 1e3),
        "-" if runs else f"in {duration(queue['expectedWaitMs'] / 1e3)}",
        entry["requestId"] or "-",
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
