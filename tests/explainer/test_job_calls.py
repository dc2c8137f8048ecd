"""Jobs over gRPC: what is asked for, what becomes of components, what is paid, what it may cost."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tdb.explainer.v1 import explain_pb2, explanation_pb2, job_pb2

from services.explainer import job_run
from tests.explainer import job_bench, stack
from tests.explainer.job_bench import GROUP, record
from tests.explainer.openai_server import Fault, OpenAIServer, failing, too_many, usage_of
from tests.explainer.stack import Stack, refusal

PATTERN = explanation_pb2.METHOD_TOKEN_PATTERN
CONTRASTIVE = explanation_pb2.METHOD_CONTRASTIVE
DETECTION, FUZZING = explanation_pb2.SCORER_DETECTION, explanation_pb2.SCORER_FUZZING
PROVIDER = explain_pb2.JUDGE_PROVIDER
MODEL = explanation_pb2.ExplainedModel(id="demo", weights_hash=stack.WEIGHTS)


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_run, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
async def offline(tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack.serving(tmp_path, [record(number) for number in range(6)]) as made:
        yield made


async def said(call: Any) -> tuple[list[job_pb2.JobItem], job_pb2.Job]:
    """The items of a job that is followed to its end, and how it ended."""
    messages = [each async for each in call]
    assert messages[0].WhichOneof("event") == "progress"
    assert messages[-1].WhichOneof("event") == "summary"
    return [m.item for m in messages if m.WhichOneof("event") == "item"], messages[-1].summary


async def listed(made: Stack, *components: str) -> list[explanation_pb2.Explanation]:
    request = explanation_pb2.ListExplanationsRequest(model=MODEL, components=components)
    return list((await made.stub.ListExplanations(request)).explanations)


def reasons(job: job_pb2.Job) -> dict[str, int]:
    return {each.reason: each.count for each in job.reasons}


async def test_a_range_is_explained_and_scored_offline(offline: Stack) -> None:
    asked = job_bench.request(6, PATTERN, DETECTION, FUZZING, max_tokens=None, seed=3)
    items, job = await said(offline.stub.ExplainMany(asked))
    assert job.state == job_pb2.JOB_STATE_DONE
    assert (job.components, job.explained, job.skipped, job.failed) == (6, 6, 0, 0)
    assert (job.usage.calls, job.usage.prompt_tokens) == (0, 0)
    assert {each.component for each in items} == {f"{GROUP}.{number}" for number in range(6)}
    for item in items:
        (found,) = await listed(offline, item.component)
        assert (found.id, found.text) == (item.explanation_id, item.text)
        assert '" Mary"' in found.text
        assert [each.scorer for each in found.scores].count(DETECTION) == 2
        assert [each.scorer for each in found.scores].count(FUZZING) == 2
        assert {each.value for each in found.scores} == {1.0}
        assert {each.judge for each in found.scores} == {"offline"}
        assert {each.seed for each in found.scores} == {3}
        assert found.provenance.seed == 3
        assert found.provenance.author == "local"
        assert found.provenance.dataset_hash == stack.DATASET_HASH
    # The same comes out where one component is explained by itself.
    alone = explain_pb2.ExplainRequest(
        dataset="small", component=f"{GROUP}.2", method=PATTERN, scoring=asked.scoring, seed=3
    )
    answers = [each async for each in offline.stub.Explain(alone)]
    (again,) = (m.explanation for m in answers if m.WhichOneof("event") == "explanation")
    assert again.id == next(i.explanation_id for i in items if i.component == f"{GROUP}.2")


async def test_what_is_explained_already_is_skipped_unless_asked_for(offline: Stack) -> None:
    await said(offline.stub.ExplainMany(job_bench.request(2, PATTERN, max_tokens=None)))
    _, job = await said(offline.stub.ExplainMany(job_bench.request(6, PATTERN, max_tokens=None)))
    assert (job.explained, job.skipped, reasons(job)) == (4, 2, {"ALREADY_EXPLAINED": 2})
    for other in (
        job_bench.request(2, PATTERN, max_tokens=None, seed=1),
        job_bench.request(2, PATTERN, max_tokens=None, again=True),
    ):
        _, job = await said(offline.stub.ExplainMany(other))
        assert (job.explained, job.skipped) == (2, 0)
    assert len(await listed(offline, f"{GROUP}.0")) == 2, "what comes out the same is one"
    offline.dataset.hash = "ef" * 32
    _, job = await said(offline.stub.ExplainMany(job_bench.request(2, PATTERN, max_tokens=None)))
    assert (job.explained, job.skipped) == (2, 0), "other examples"


async def test_the_gate(tmp_path: Path) -> None:
    dead, dense, few, fine, odd = (record(number) for number in range(5))
    for example in dead.top:
        example.activations[:] = [0.0] * len(example.activations)
    dead.statistics.max = 0.0
    dense.statistics.fraction_active = 0.6
    del few.top[3:]
    # Fires anywhere: no pattern tells its texts apart.
    for number, example in enumerate(odd.top):
        example.activations[:] = [0.0] * len(example.activations)
        example.activations[number % len(example.activations)] = float(number % 2)
        example.token_texts[:] = [f" {number}{place}" for place in range(len(example.token_texts))]
    async with stack.serving(tmp_path, [dead, dense, few, fine, odd]) as made:
        asked = job_bench.request(5, PATTERN, max_tokens=None)
        asked.gate.min_pattern_auc = 0.9
        items, job = await said(made.stub.ExplainMany(asked))
        assert {each.component[-1]: each.reason for each in items} == {
            "0": "NEVER_ACTIVE",
            "1": "TOO_DENSE",
            "2": "TOO_FEW_DOCUMENTS",
            "3": "",
            "4": "PATTERN_AUC_TOO_LOW",
        }
        assert (job.explained, job.skipped, job.failed) == (1, 4, 0)
        asked.gate.max_fraction_active = 0.6
        asked.gate.min_pattern_auc = 0.0
        _, job = await said(made.stub.ExplainMany(asked))
        assert reasons(job) == {
            "NEVER_ACTIVE": 1, "TOO_FEW_DOCUMENTS": 1, "ALREADY_EXPLAINED": 1,
        }  # fmt: skip


async def test_what_the_dataset_lacks_is_said_of_each_component(offline: Stack) -> None:
    del offline.dataset.records[f"{GROUP}.3"]
    _, job = await said(offline.stub.ExplainMany(job_bench.request(6, PATTERN, max_tokens=None)))
    assert (job.components, job.explained) == (5, 5), "a range is of what the dataset holds"
    asked = job_bench.request(1, PATTERN, max_tokens=None)
    asked.list.components.extend([f"{GROUP}.3", f"{GROUP}.5", f"{GROUP}.9"])
    asked.seed = 1
    _, job = await said(offline.stub.ExplainMany(asked))
    assert reasons(job) == {"NOT_FOUND": 2}
    assert (job.explained, job.failed) == (1, 2)
    found = (await offline.stub.GetJob(job_pb2.GetJobRequest(id=job.id))).job
    assert list(found.request.list.components) == list(asked.list.components)
    assert not job.request.list.components
    (_, first) = (await offline.stub.ListJobs(job_pb2.ListJobsRequest())).jobs
    assert first.components == 5


@pytest.fixture
def openai() -> Any:
    with OpenAIServer(job_bench.model) as server:
        yield server


@pytest.fixture
async def paying(tmp_path: Path, openai: OpenAIServer) -> AsyncIterator[Stack]:
    records = [record(number) for number in range(6)]
    async with stack.serving(tmp_path, records, openai, TDB_PROVIDER_PRICES="2,10") as made:
        yield made


async def test_what_is_used_is_what_was_asked(paying: Stack, openai: OpenAIServer) -> None:
    asked = job_bench.request(6, CONTRASTIVE, DETECTION)
    estimate = await paying.stub.EstimateCost(explain_pb2.EstimateCostRequest(explain_many=asked))
    assert not openai.requests, "nothing is sent for an estimate"
    _, job = await said(paying.stub.ExplainMany(asked))
    assert (job.explained, job.usage.calls) == (6, 6 * (1 + 3))
    used = [usage_of(each, job_bench.said(each)) for each in openai.answered]
    prompt = sum(each["prompt_tokens"] for each in used)
    completion = sum(each["completion_tokens"] for each in used)
    assert (job.usage.prompt_tokens, job.usage.completion_tokens) == (prompt, completion)
    assert job.usage.cost == pytest.approx((2 * prompt + 10 * completion) / 1e6)
    assert job.forecast_tokens == prompt + completion
    assert job.forecast_cost == pytest.approx(job.usage.cost)
    assert (estimate.calls, estimate.components) == (24, 6)
    assert (estimate.provider, estimate.provider_model) == (openai.url[7:-3], "test-model")
    assert prompt + completion < estimate.most_tokens
    assert estimate.expected_tokens == pytest.approx(prompt + completion, rel=0.5)
    assert job.usage.cost < estimate.most_cost
    # What was paid for is not paid for again, by anybody.
    asked.again = True
    _, job = await said(paying.stub.ExplainMany(asked))
    assert (job.usage.calls, job.usage.cached_calls, job.usage.cost) == (0, 24, 0.0)
    assert len(openai.answered) == 24


async def test_a_budget_ends_the_job_and_a_larger_one_goes_on(
    paying: Stack, openai: OpenAIServer
) -> None:
    asked = job_bench.request(6, CONTRASTIVE, DETECTION, max_tokens=9_000)
    _, job = await said(paying.stub.ExplainMany(asked))
    assert job.state == job_pb2.JOB_STATE_OUT_OF_BUDGET
    assert "budget of 9000 tokens" in job.message
    assert job.usage.prompt_tokens + job.usage.completion_tokens <= 9_000
    assert job.explained < 6
    assert openai.requests, "some of it was spent"
    resumed = job_pb2.ResumeJobRequest(id=job.id, budget=explain_pb2.Budget(max_tokens=10**7))
    assert (await paying.stub.ResumeJob(resumed)).job.state != job_pb2.JOB_STATE_OUT_OF_BUDGET
    _, job = await said(paying.stub.FollowJob(job_pb2.FollowJobRequest(id=job.id)))
    assert (job.state, job.explained, job.skipped) == (job_pb2.JOB_STATE_DONE, 6, 0)
    assert job.request.budget.max_tokens == 10**7
    assert set(job_bench.paid(openai).values()) == {1}
    for number in range(6):
        (found,) = await listed(paying, f"{GROUP}.{number}")
        assert len(found.scores) == 2


async def test_an_endpoint_that_dies_and_comes_back(paying: Stack, openai: OpenAIServer) -> None:
    openai.faults.extend([Fault()] * 5 + [failing(503)] * 100)
    states, messages = set(), set()
    async for message in paying.stub.ExplainMany(job_bench.request(6, CONTRASTIVE, DETECTION)):
        if message.WhichOneof("event") != "item":
            ended = message.WhichOneof("event") == "summary"
            job = message.summary if ended else message.progress
            states.add(job.state)
            messages.add(job.message)
    assert job_pb2.JOB_STATE_WAITING in states
    assert f"{openai.url[7:-3]} does not answer; the job goes on when it does" in messages
    assert (job.state, job.explained, job.failed) == (job_pb2.JOB_STATE_DONE, 6, 0)
    assert set(job_bench.paid(openai).values()) == {1}
    found = [each for n in range(6) for each in await listed(paying, f"{GROUP}.{n}")]
    assert not any(score.failures for each in found for score in each.scores)


async def test_storms_of_429(paying: Stack, openai: OpenAIServer) -> None:
    for _ in range(30):
        openai.faults.extend([too_many("1"), too_many(), Fault()])
    _, job = await said(paying.stub.ExplainMany(job_bench.request(6, CONTRASTIVE, DETECTION)))
    assert (job.state, job.explained, job.usage.calls) == (job_pb2.JOB_STATE_DONE, 6, 24)


async def test_a_wrong_key_ends_the_job_in_a_sentence(tmp_path: Path, openai: OpenAIServer) -> None:
    records = [record(number) for number in range(20)]
    async with stack.serving(tmp_path, records, openai, TDB_PROVIDER_KEY="sk-wrong") as made:
        _, job = await said(made.stub.ExplainMany(job_bench.request(20, CONTRASTIVE)))
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert "does not accept the key: TDB_PROVIDER_KEY is set" in job.message
        assert (job.explained, job.skipped, job.failed) == (0, 0, 0)
        assert len(openai.requests) <= 8


async def test_failures_are_counted_by_reason(paying: Stack, openai: OpenAIServer) -> None:
    openai.faults.extend([Fault(reply="no JSON")] * 2)
    openai.faults.append(Fault(400, {"message": "too long", "code": "context_length_exceeded"}))
    items, job = await said(paying.stub.ExplainMany(job_bench.request(6, CONTRASTIVE)))
    assert (job.state, job.explained, job.failed) == (job_pb2.JOB_STATE_DONE, 3, 3)
    assert reasons(job) == {"EXPLAINER_MALFORMED": 2, "EXPLAINER_REJECTED": 1}
    assert sum(bool(each.reason) for each in items) == 3


async def test_pausing_and_cancelling(tmp_path: Path, openai: OpenAIServer) -> None:
    openai.faults.extend([Fault(delay_s=0.02)] * 100)
    records = [record(number) for number in range(6)]
    async with stack.serving(tmp_path, records, openai, TDB_PROVIDER_CONCURRENCY="1") as made:
        stub = made.stub
        stream = aiter(stub.ExplainMany(job_bench.request(6, CONTRASTIVE, DETECTION)))
        job = (await anext(stream)).progress
        await stub.PauseJob(job_pb2.PauseJobRequest(id=job.id))
        paused = [each async for each in stream][-1].summary
        assert paused.state == job_pb2.JOB_STATE_PAUSED
        assert paused.explained <= 1
        await stub.ResumeJob(job_pb2.ResumeJobRequest(id=job.id))
        await stub.CancelJob(job_pb2.CancelJobRequest(id=job.id))
        _, ended = await followed(stub, job.id)
        assert ended.state == job_pb2.JOB_STATE_CANCELLED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ResumeJob(job_pb2.ResumeJobRequest(id=job.id))
        assert refusal(refused.value) == ("FAILED_PRECONDITION", "", "JOB_OVER")


async def followed(stub: Any, id: str) -> tuple[list[job_pb2.JobItem], job_pb2.Job]:
    messages = [each async for each in stub.FollowJob(job_pb2.FollowJobRequest(id=id))]
    return [m.item for m in messages if m.WhichOneof("event") == "item"], messages[-1].summary


async def test_jobs_of_two_users(tmp_path: Path) -> None:
    records = [record(number) for number in range(4)]
    async with stack.serving(tmp_path, records, TDB_TOKENS="ada:one,bob:two") as made:
        calls = {}
        for user, token, seed in (("ada", "one", 0), ("bob", "two", 1), ("ada", "one", 2)):
            metadata = (("authorization", f"Bearer {token}"),)
            asked = job_bench.request(4, PATTERN, max_tokens=None, seed=seed)
            calls[seed] = user, made.stub.ExplainMany(asked, metadata=metadata)
        for user, call in calls.values():
            _, job = await said(call)
            assert (job.user, job.state, job.explained) == (user, job_pb2.JOB_STATE_DONE, 4)


def changed(**fields: Any) -> explain_pb2.ExplainManyRequest:
    request = job_bench.request(2, CONTRASTIVE, DETECTION)
    for name, value in fields.items():
        if value is None:
            request.ClearField(name)  # type: ignore[arg-type]
        elif isinstance(value, int | str | bool):
            setattr(request, name, value)
        else:
            getattr(request, name).CopyFrom(value)
    return request


RANGE, LIST = explain_pb2.ComponentRange, explain_pb2.ComponentList


REFUSED = (
    (changed(dataset=""), "dataset", "REQUIRED"),
    (changed(method=0), "method", "REQUIRED"),
    (changed(method=7), "method", "INVALID_ARGUMENT"),
    (changed(range=None), "components", "REQUIRED"),
    (changed(budget=None), "budget", "REQUIRED"),
    (changed(budget=explain_pb2.Budget()), "budget", "REQUIRED"),
    (changed(budget=explain_pb2.Budget(max_cost=-1)), "budget.max_cost", "INVALID_ARGUMENT"),
    (changed(list=LIST()), "list.components", "REQUIRED"),
    (
        changed(list=LIST(components=["neuron.1.0", "neuron.1.0"])),
        "list.components[1]",
        "INVALID_ARGUMENT",
    ),
    (
        changed(list=LIST(components=["neuron.1.0", "head.1.0"])),
        "list.components[1]",
        "INVALID_ARGUMENT",
    ),
    (changed(range=RANGE(first="neuron.1.0")), "range.last", "INVALID_ARGUMENT"),
    (
        changed(range=RANGE(first="neuron.1.0", last="neuron.2.0")),
        "range.last",
        "INVALID_ARGUMENT",
    ),
    (
        changed(range=RANGE(first="neuron.1.3", last="neuron.1.2")),
        "range.last",
        "INVALID_ARGUMENT",
    ),
    (changed(range=RANGE(first="head.1.0", last="head.1.1")), "range.first", ""),
    (
        changed(gate=explain_pb2.Gate(max_fraction_active=0)),
        "gate.max_fraction_active",
        "INVALID_ARGUMENT",
    ),
    (
        changed(gate=explain_pb2.Gate(min_pattern_auc=1.5)),
        "gate.min_pattern_auc",
        "INVALID_ARGUMENT",
    ),
    (
        changed(scoring=explain_pb2.Scoring()),
        "scoring.scorers",
        "REQUIRED",
    ),
)


async def test_requests_that_cannot_be_right(paying: Stack) -> None:
    for request, field, reason in REFUSED:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await paying.stub.ExplainMany(request).read()
        code, found, why = refusal(refused.value)
        assert (code, found.partition(".method")[0]) == ("INVALID_ARGUMENT", field)
        assert why == (reason or "INVALID_ARGUMENT")
    assert not (await paying.stub.ListJobs(job_pb2.ListJobsRequest())).jobs


async def test_what_is_not_there(paying: Stack) -> None:
    for request, field in (
        (changed(dataset="other"), "dataset"),
        (changed(range=RANGE(first="neuron.1.7", last="neuron.1.9")), "range"),
        (changed(range=RANGE(first="neuron.3.0", last="neuron.3.9")), "range"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await paying.stub.ExplainMany(request).read()
        assert refusal(refused.value)[:2] == ("NOT_FOUND", field)
    for asked in (
        paying.stub.GetJob(job_pb2.GetJobRequest(id="none")),
        paying.stub.PauseJob(job_pb2.PauseJobRequest(id="none")),
        paying.stub.ResumeJob(job_pb2.ResumeJobRequest(id="none")),
        paying.stub.CancelJob(job_pb2.CancelJobRequest(id="none")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asked
        assert refusal(refused.value)[0] == "NOT_FOUND"


async def test_without_a_language_model_and_without_prices(
    offline: Stack, openai: OpenAIServer, tmp_path: Path
) -> None:
    for call in (
        offline.stub.ExplainMany(changed()).read(),
        offline.stub.EstimateCost(explain_pb2.EstimateCostRequest(explain_many=changed())),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refusal(refused.value)[::2] == ("FAILED_PRECONDITION", "PROVIDER_NOT_CONFIGURED")
    estimate = await offline.stub.EstimateCost(
        explain_pb2.EstimateCostRequest(explain_many=job_bench.request(6, PATTERN, DETECTION))
    )
    assert (estimate.calls, estimate.most_tokens, estimate.components) == (0, 0, 6)
    assert not estimate.provider
    async with stack.serving(tmp_path / "other", [record(0), record(1)], openai) as made:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await made.stub.ExplainMany(changed(budget=explain_pb2.Budget(max_cost=1.0))).read()
        assert refusal(refused.value) == ("FAILED_PRECONDITION", "budget.max_cost", "NO_PRICES")


@pytest.mark.parametrize(
    ("method", "scorers", "judge"),
    [
        (CONTRASTIVE, (DETECTION, FUZZING), PROVIDER),
        (CONTRASTIVE, (explanation_pb2.SCORER_SIMULATION,), PROVIDER),
        (PATTERN, (DETECTION,), PROVIDER),
        (PATTERN, (DETECTION,), 0),
        (explanation_pb2.METHOD_MAX_ACTIVATION_SUMMARY, (), 0),
    ],
)
async def test_an_estimate_is_of_the_very_calls(
    tmp_path: Path, openai: OpenAIServer, method: Any, scorers: tuple[Any, ...], judge: Any
) -> None:
    def model(body: dict[str, Any]) -> Any:
        name = body["response_format"]["json_schema"]["name"]
        explains = name in ("contrastive", "max_activation_summary")
        return job_bench.model(
            {**body, "response_format": {"json_schema": {"name": "contrastive"}}}
            if explains
            else body
        )

    openai.model = model
    request = explain_pb2.ExplainRequest(dataset="small", component=f"{GROUP}.0", method=method)
    if scorers:
        request.scoring.scorers.extend(scorers)
        request.scoring.judge = judge
    async with stack.serving(tmp_path, [record(0)], openai) as made:
        estimate = await made.stub.EstimateCost(explain_pb2.EstimateCostRequest(explain=request))
        assert not openai.requests
        messages = [each async for each in made.stub.Explain(request)]
        usage = messages[-1].summary.usage
        assert estimate.calls == usage.calls == len(openai.requests)
        assert estimate.components == 1
        assert not estimate.HasField("expected_cost")
        tokens = usage.prompt_tokens + usage.completion_tokens
        assert tokens <= estimate.most_tokens
        assert estimate.expected_tokens == pytest.approx(tokens, rel=0.6)
        if scorers:
            (stored,) = await listed(made, f"{GROUP}.0")
            again = explain_pb2.ScoreRequest(id=stored.id, dataset="small", scoring=request.scoring)
            scored = await made.stub.EstimateCost(explain_pb2.EstimateCostRequest(score=again))
            assert scored.calls == usage.calls - (method != PATTERN)
