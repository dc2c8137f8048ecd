"""A service that is killed at any moment of a job: nothing is paid twice, nothing left out."""

import random
import signal
import time
from pathlib import Path

import grpc
import pytest
from tdb.explainer.v1 import explanation_pb2, job_pb2

from tests.explainer import job_bench
from tests.explainer.openai_server import OpenAIServer, Said
from tests.explainer.process import Process

AT_ONCE = 8


def run(folder: Path, components: int, kills: int, seed: int, delay_s: float) -> None:
    """A job with scores, killed so often at drawn moments."""
    draw = random.Random(seed)

    def model(body: dict[str, object]) -> Said | str:
        openai.wait(delay_s)
        return job_bench.model(body)

    with OpenAIServer(model) as openai, job_bench.serving(components) as dataset:
        environment = job_bench.environment(dataset, openai)
        calls = components * (1 + 3)  # an explanation, and detection of 6 + 6 texts by fives
        stops = sorted(draw.sample(range(1, calls - AT_ONCE), kills))
        with Process(folder, **environment) as service:
            asked = job_bench.request(
                components,
                explanation_pb2.METHOD_CONTRASTIVE,
                explanation_pb2.SCORER_DETECTION,
            )
            job = job_bench.begun(service.stub(), asked)
            assert job.components == components
            wait_for(openai, stops[0])
        lost: set[str] = set()  # answered, and the answer never came: nobody can know of them
        for stop in [*stops[1:], None]:
            answered = job_bench.paid(openai)
            stored = {key for (key,) in job_bench.rows(folder, "SELECT key FROM reply")}
            lost |= answered.keys() - stored
            with Process(folder, **environment) as service:
                (listed,) = service.stub().ListJobs(job_pb2.ListJobsRequest()).jobs
                assert (listed.id, listed.components) == (job.id, components)
                if stop is not None:
                    wait_for(openai, stop)
                    continue
                last = job_bench.ended(service.stub(), job.id)
        assert last.state == job_pb2.JOB_STATE_DONE
        assert (last.explained, last.skipped, last.failed) == (components, 0, 0)
        answered = job_bench.paid(openai)
        twice = {key for key, count in answered.items() if count > 1}
        assert twice <= lost, "a reply that was kept was paid for again"
        assert len(lost) <= kills * AT_ONCE
        stored = {key for (key,) in job_bench.rows(folder, "SELECT key FROM reply")}
        assert answered.keys() == stored
        assert len(answered) == calls
        # What the job says it used is no less than what was paid.
        tokens = sum(
            sum(map(len, (each["content"] for each in body["messages"]))) // 4
            for body in openai.answered
        )
        assert last.usage.prompt_tokens >= tokens
        assert last.usage.calls >= len(openai.answered)
        assert last.usage.calls <= len(openai.answered) + kills * AT_ONCE
    explained = job_bench.rows(
        folder, "SELECT component, count(*) FROM explanation GROUP BY component"
    )
    assert len(explained) == components
    assert {count for _, count in explained} == {1}
    scores = job_bench.rows(folder, "SELECT explanation, count(*) FROM score GROUP BY explanation")
    assert len(scores) == components
    assert {count for _, count in scores} == {2}, "balanced accuracy and AUC, once each"


def wait_for(openai: OpenAIServer, answers: int) -> None:
    while len(openai.answered) < answers:
        time.sleep(0.001)


def test_a_service_that_is_told_to_stop_lets_what_was_sent_come(tmp_path: Path) -> None:
    def model(body: dict[str, object]) -> Said | str:
        openai.wait(0.05)
        return job_bench.model(body)

    with OpenAIServer(model) as openai, job_bench.serving(10) as dataset:
        environment = job_bench.environment(dataset, openai, TDB_DRAIN_SECONDS="20")
        with Process(tmp_path, **environment) as service:
            asked = job_bench.request(
                10, explanation_pb2.METHOD_CONTRASTIVE, explanation_pb2.SCORER_DETECTION
            )
            following = service.stub().ExplainMany(asked)
            id = next(following).progress.id
            wait_for(openai, 5)
            code, errors = service.end(signal.SIGTERM)
        assert code == 0, errors
        with pytest.raises(grpc.RpcError) as refused:
            list(following)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(openai.answered) < 10 * (1 + 3)
        with Process(tmp_path, **environment) as service:
            last = job_bench.ended(service.stub(), id)
        assert (last.state, last.explained) == (job_pb2.JOB_STATE_DONE, 10)
        assert last.usage.bounded_calls == 0
        assert set(job_bench.paid(openai).values()) == {1}
        assert len(openai.answered) == 10 * (1 + 3)


def run_offline(folder: Path, components: int, kills: int, seed: int) -> None:
    """The same of a job that asks nobody: its processes end with the service."""
    draw = random.Random(seed)
    with OpenAIServer() as openai, job_bench.serving(components) as dataset:
        environment = job_bench.environment(dataset, openai)
        asked = job_bench.request(
            components,
            explanation_pb2.METHOD_TOKEN_PATTERN,
            explanation_pb2.SCORER_DETECTION,
            max_tokens=None,
        )
        id = ""
        for stop in sorted(draw.sample(range(1, components), kills)):
            with Process(folder, **environment) as service:
                stub = service.stub()
                id = id or job_bench.begun(stub, asked).id
                while stub.GetJob(job_pb2.GetJobRequest(id=id)).job.explained < stop:
                    time.sleep(0.01)
                children = children_of(service.process.pid)
                assert children
            wait_until_gone(children)
        with Process(folder, **environment) as service:
            last = job_bench.ended(service.stub(), id)
        assert (last.explained, last.skipped, last.failed) == (components, 0, 0)
        assert not openai.requests
    explained = job_bench.rows(
        folder, "SELECT component, count(*) FROM explanation GROUP BY component"
    )
    assert {count for _, count in explained} == {1}
    assert len(explained) == components
    assert job_bench.rows(folder, "SELECT count(*) FROM score") == [(2 * components,)]


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    if not found.exists():
        pytest.skip("only Linux says which processes are a process's")
    return [int(each) for each in found.read_text().split()]


def wait_until_gone(processes: list[int]) -> None:
    end = time.monotonic() + 30
    while any(Path(f"/proc/{each}").exists() for each in processes):
        assert time.monotonic() < end, "a process outlives its service"
        time.sleep(0.01)


def test_an_offline_job_of_thirty_killed_once(tmp_path: Path) -> None:
    run_offline(tmp_path, 30, kills=1, seed=0)


@pytest.mark.long
def test_an_offline_job_of_two_thousand_killed_three_times(tmp_path: Path) -> None:
    run_offline(tmp_path, 2_000, kills=3, seed=0)


def test_a_job_of_twenty_killed_twice(tmp_path: Path) -> None:
    run(tmp_path, 20, kills=2, seed=0, delay_s=0.01)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_job_of_two_hundred_killed_five_times(tmp_path: Path, seed: int) -> None:
    run(tmp_path, 200, kills=5, seed=seed, delay_s=0.02)
