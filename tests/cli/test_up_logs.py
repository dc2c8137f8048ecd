"""What `tdb up` with the real services tells: every request by its id in logs and traces, and no
prompt in them, in the metrics, or anywhere else."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.cli.helpers import Up, tdb, until
from tests.inference.conftest import model_folder

__all__ = ["model_folder"]  # a fixture

CANARY = "Xylophagous"
SERVICE = "tdb.inference.v1.InferenceService"
PROMPT = {"text": f"Mary {CANARY}"}
RUN = {"run": {"prompt": PROMPT}}
OBJECTIVE = {"logitDiff": {"targets": [{"id": 4}], "distractors": [{"id": 5}]}}

# Name of the request -> (RPC, body): answers, refusals by the service, refusals by the gateway.
REQUESTS: dict[str, tuple[str, Any]] = {
    "run": ("Run", RUN),
    "attribute": ("Attribute", {**RUN, "objective": OBJECTIVE, "topK": 3}),
    "tokenize": ("Tokenize", {"prompt": PROMPT}),
    "generate": ("Generate", {**RUN, "maxNewTokens": 2}),
    "verify": ("Verify", {"table": {**RUN, "objective": OBJECTIVE, "topK": 2}}),
    "too-long": ("Run", {"run": {"prompt": {"text": f"{CANARY} " * 40}}}),
    "no-target": (
        "Attribute",
        {**RUN, "objective": {"logitDiff": {"targets": [{"text": f" {CANARY} {CANARY}"}]}}},
    ),
    "no-model": ("Run", {**RUN, "model": CANARY}),
    "no-chat": ("Run", {"run": {"prompt": {"chat": {"messages": [{"content": CANARY}]}}}}),
    "no-component": ("DescribeComponent", {"component": f"head.{CANARY}"}),
    "no-field": ("Run", {CANARY: CANARY}),
    "no-json": ("Run", f'{{"run": "{CANARY}'),
    "no-method": ("Remember", RUN),
}
ON_DEVICE = ("run", "attribute", "generate", "verify")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that processes send by OTLP."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[tuple[str, Any]]:
        """(the process, its span)."""
        return [
            (attribute.value.string_value, span)
            for request in self.requests
            for resource in request.resource_spans
            for attribute in resource.resource.attributes
            if attribute.key == "service.name"
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector, and the URL that it listens at."""
    kept = Collector()
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    add = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(kept, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def ask(url: str, name: str) -> str:
    """Asks under the request's own name as its id; the id that came back."""
    method, body = REQUESTS[name]
    data = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json", "x-request-id": name}
    if method in ("Generate", "Verify"):
        headers["accept"] = "text/event-stream"
    request = urllib.request.Request(f"{url}/{SERVICE}/{method}", data.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            response.read()
            return str(response.headers["x-request-id"])
    except urllib.error.HTTPError as refusal:
        with refusal:
            details = json.loads(refusal.read())["details"]
        ids = [detail["debug"].get("requestId") for detail in details]
        return name if name in ids and refusal.headers["x-request-id"] == name else str(ids)


def lines(log: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if "message" in line]


def test_one_id_from_page_to_device_and_no_prompt_anywhere(
    model_folder: Path, tmp_path: Path, collector: tuple[Collector, str]
) -> None:
    collected, endpoint = collector
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "TDB_LOG_LEVEL": "debug",
        "TDB_GATEWAY_METRICS_PORT": "0",
        "TDB_INFERENCE_METRICS_PORT": "0",
    }
    with Up(tdb("up", "--model", f"tiny={model_folder}"), tmp_path, **variables) as up:
        url = up.url()
        for name in REQUESTS:
            assert ask(url, name) == name
        until("both ports", lambda: sum("metrics on port" in line for line in up.errors) == 2)
        ports = [line.split()[-1] for line in up.errors if "metrics on port" in line]
        metrics = ""
        for port in ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
                metrics += response.read().decode()
        assert up.stop() == 0
    assert 'tdb_requests_total{code="OK"' in metrics
    assert 'tdb_gateway_requests_total{code="ok"' in metrics
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert {"gateway.log", "inference.log"} <= set(logs)
    printed = [*up.errors, *up.out.queue]
    written = {**logs, "standard output and error": "\n".join(printed), "metrics": metrics}
    written["traces"] = str(collected.requests)
    assert [where for where, text in written.items() if CANARY in text] == []

    gateway = lines(tmp_path / "logs" / "gateway.log")
    inference = lines(tmp_path / "logs" / "inference.log")
    told = {line["request_id"]: line["code"] for line in gateway if line["message"] == "request"}
    answered = {name for name in REQUESTS if told[name] == "ok"}
    assert answered == {*ON_DEVICE, "tokenize"}
    calls = {line["request_id"] for line in inference if line["message"] == "call"}
    assert calls >= set(REQUESTS) - {"no-field", "no-json", "no-method"}
    worked = {name for line in inference for name in line.get("request_ids", ())}
    assert worked == set(ON_DEVICE)

    spans = collected.spans()
    ids = {
        attribute.value.string_value: span.trace_id
        for _, span in spans
        for attribute in span.attributes
        if attribute.key == "tdb.request_id"
    }
    whole = [(process, span) for process, span in spans if span.trace_id == ids["attribute"]]
    by_time = sorted(whole, key=lambda each: each[1].start_time_unix_nano)
    assert [(process, span.name) for process, span in by_time] == [
        ("tdb-gateway", f"/{SERVICE}/Attribute"),
        ("tdb-inference", f"{SERVICE}/Attribute"),
        ("tdb-inference", "Attribute"),
    ]
    parents = [span.parent_span_id for _, span in by_time]
    assert parents == [b"", *(span.span_id for _, span in by_time[:2])]
