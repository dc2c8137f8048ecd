"""What jobs of the real process need around it: a dataset service, a language model, components."""

import hashlib
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
from tdb.dataset.v1 import dataset_pb2, read_pb2, record_pb2
from tdb.dataset.v1 import service_pb2_grpc as dataset_grpc
from tdb.explainer.v1 import explain_pb2, explanation_pb2, job_pb2

from services.explainer.engine.prompts import Prompt
from tests.explainer.openai_server import KEY, MODEL, OpenAIServer, Said
from tests.explainer.synthetic import WORDS, follower

PATTERN = 'Fires on the token " Mary" (10).'
GROUP = "neuron.1"


def record(number: int, *, examples: int = 24, length: int = 12) -> record_pb2.ComponentRecord:
    """The record of `neuron.1.NUMBER`, which fires on " Mary" in every second of its texts."""
    draw = random.Random(number)
    found = record_pb2.ComponentRecord(component=f"{GROUP}.{number}")
    found.statistics.max = 4.0
    found.statistics.fraction_active = 0.05
    for place in range(examples):
        tokens = [f" {draw.choice(WORDS)}" for _ in range(length)]
        if place % 2:
            tokens[draw.randrange(1, length)] = " Mary"
        found.top.add(
            token_texts=tokens,
            activations=[4.0 * (token == " Mary") for token in tokens],
            document_id=f"doc-{place}",
        )
    return found


class Dataset(dataset_grpc.DatasetServiceServicer):
    """The dataset `small`, in threads."""

    def __init__(self, count: int) -> None:
        self.records = {f"{GROUP}.{number}": record(number) for number in range(count)}

    def ListDatasets(self, request: Any, context: Any) -> dataset_pb2.ListDatasetsResponse:
        response = dataset_pb2.ListDatasetsResponse()
        described = response.datasets.add(name="small", manifest_hash="cd" * 32)
        described.header.model.id = "demo"
        described.header.model.weights_hash = "ab" * 32
        count = len(self.records)
        described.groups.add(name=GROUP, records=count, first=0, last=count - 1)
        return response

    def GetRecord(
        self, request: read_pb2.GetRecordRequest, context: Any
    ) -> read_pb2.GetRecordResponse:
        return read_pb2.GetRecordResponse(
            record=self.records[request.component], manifest_hash="cd" * 32
        )


@contextmanager
def serving(count: int) -> Iterator[str]:
    """The address of a dataset service that has so many components."""
    made: Any = Dataset
    dataset = made(count)
    server = grpc.server(ThreadPoolExecutor(4))
    add: Any = dataset_grpc.add_DatasetServiceServicer_to_server
    add(dataset, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def model(body: dict[str, Any]) -> Said | str:
    """Explains everything with the right token pattern, and judges by it."""
    if body["response_format"]["json_schema"]["name"] == "contrastive":
        return f'{{"explanation": "{PATTERN.replace(chr(34), chr(92) + chr(34))}"}}'
    return follower()(body)


def said(body: dict[str, Any]) -> Said:
    """What `model` says, in pieces."""
    answer = model(body)
    return Said(answer) if isinstance(answer, str) else answer


def environment(dataset: str, openai: OpenAIServer, **more: str) -> dict[str, str]:
    return {
        "TDB_DATASET_ADDRESS": dataset,
        "TDB_PROVIDER_URL": openai.url,
        "TDB_PROVIDER_MODEL": MODEL,
        "TDB_PROVIDER_KEY": KEY,
        # Nobody reads what is logged, and a pipe that is full would stop the service.
        "TDB_LOG_LEVEL": "error",
        **more,
    }


def request(
    count: int,
    method: "explanation_pb2.Method.ValueType" = explanation_pb2.METHOD_CONTRASTIVE,
    *scorers: "explanation_pb2.Scorer.ValueType",
    max_tokens: int | None = 10**8,
    **more: Any,
) -> explain_pb2.ExplainManyRequest:
    made = explain_pb2.ExplainManyRequest(
        dataset="small",
        range=explain_pb2.ComponentRange(first=f"{GROUP}.0", last=f"{GROUP}.{count - 1}"),
        method=method,
        **more,
    )
    if max_tokens is not None:
        made.budget.max_tokens = max_tokens
    if scorers:
        made.scoring.scorers.extend(scorers)
        if method != explanation_pb2.METHOD_TOKEN_PATTERN:
            # What `model` says is a token pattern, which would be judged offline.
            made.scoring.judge = explain_pb2.JUDGE_PROVIDER
    return made


def begun(stub: Any, asked: explain_pb2.ExplainManyRequest, **call: Any) -> job_pb2.Job:
    """The job as the first message shows it; nobody listens any more."""
    stream = stub.ExplainMany(asked, **call)
    first = next(stream)
    stream.cancel()
    assert first.WhichOneof("event") == "progress"
    job: job_pb2.Job = first.progress
    return job


def ended(stub: Any, id: str, **call: Any) -> job_pb2.Job:
    """How the job ended."""
    *_, last = stub.FollowJob(job_pb2.FollowJobRequest(id=id), **call)
    assert last.WhichOneof("event") == "summary"
    job: job_pb2.Job = last.summary
    return job


def key_of(body: dict[str, Any], openai: OpenAIServer) -> str:
    """What the reply to this question is kept under."""
    system, user = (message["content"] for message in body["messages"])
    form = body["response_format"]["json_schema"]
    prompt = Prompt(
        name=form["name"],
        system=system,
        user=user,
        schema=form["schema"],
        max_tokens=body["max_tokens"],
        temperature=body["temperature"],
        logprobs=body.get("logprobs", False),
        seed=body["seed"],
    )
    return hashlib.sha256(f"{openai.url}\n{MODEL}\n{prompt.hash}".encode()).hexdigest()


def paid(openai: OpenAIServer, bodies: Sequence[dict[str, Any]] | None = None) -> Counter[str]:
    """How often each question was answered."""
    return Counter(key_of(each, openai) for each in bodies or openai.answered)


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "explanations.sqlite3")) as connection:
        return connection.execute(query).fetchall()
