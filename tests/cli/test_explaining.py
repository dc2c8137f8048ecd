"""`tdb explain` and `tdb jobs`: what is asked of the service, what is spent, what is shown."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from tdb.cli import main
from tdb.explainer.v1 import explain_pb2, explanation_pb2, job_pb2, service_pb2_grpc

from tests.cli.helpers import tdb, until

EXPLAIN = ("explain", "--dataset", "demo", "neuron.0.1", "neuron.0.2", "--method")
RANGE = ("explain", "--dataset", "demo", "--range", "neuron.0.0", "neuron.0.9", "--method")
OFFLINE = "token_pattern"
ASKING = "contrastive"


def job(state: Any, **more: Any) -> job_pb2.Job:
    request = explain_pb2.ExplainManyRequest(
        dataset="demo", method=explanation_pb2.METHOD_CONTRASTIVE
    )
    return job_pb2.Job(id="j-1", state=state, components=2, request=request, **more)


class Service(service_pb2_grpc.ExplainerServiceServicer):
    """A job of two components, which ends as it is told or does not end."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.estimate = explain_pb2.EstimateCostResponse(components=2)
        self.ends: Any = job_pb2.JOB_STATE_DONE
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.refuses: type[Any] = object
        self.breaks = False

    def sent(self, kind: type[Any]) -> list[Any]:
        return [each for each in self.asked if isinstance(each, kind)]

    def _answer(self, request: Any, context: Any, answer: Any) -> Any:
        self.asked.append(request)
        if self.refusal and isinstance(request, self.refuses):
            context.abort(*self.refusal)
        return answer

    def EstimateCost(self, request: Any, context: Any) -> Any:
        return self._answer(request, context, self.estimate)

    def ExplainMany(self, request: Any, context: Any) -> Iterator[Any]:
        self._answer(request, context, None)
        return self._events(job_pb2.ExplainManyResponse, context)

    def FollowJob(self, request: Any, context: Any) -> Iterator[Any]:
        self._answer(request, context, None)
        return self._events(job_pb2.FollowJobResponse, context)

    def ListJobs(self, request: Any, context: Any) -> Any:
        jobs = [job(job_pb2.JOB_STATE_OUT_OF_BUDGET, explained=1, user="ann", created_ms=1)]
        return self._answer(request, context, job_pb2.ListJobsResponse(jobs=jobs))

    def PauseJob(self, request: Any, context: Any) -> Any:
        paused = job_pb2.PauseJobResponse(job=job(job_pb2.JOB_STATE_PAUSED))
        return self._answer(request, context, paused)

    def ResumeJob(self, request: Any, context: Any) -> Any:
        running = job_pb2.ResumeJobResponse(job=job(job_pb2.JOB_STATE_RUNNING))
        return self._answer(request, context, running)

    def CancelJob(self, request: Any, context: Any) -> Any:
        cancelled = job_pb2.CancelJobResponse(job=job(job_pb2.JOB_STATE_CANCELLED))
        return self._answer(request, context, cancelled)

    def _events(self, kind: Any, context: Any) -> Iterator[Any]:
        yield kind(progress=job(job_pb2.JOB_STATE_RUNNING))
        text = "fires on\n\x1b[2Jnames"
        yield kind(item=job_pb2.JobItem(component="neuron.0.1", explanation_id="e", text=text))
        yield kind(item=job_pb2.JobItem(component="neuron.0.2", reason="TOO_FEW_DOCUMENTS"))
        if self.breaks:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it stops")
        while self.ends is None and context.is_active():
            time.sleep(0.02)
        usage = explain_pb2.Usage(calls=3, prompt_tokens=1000, completion_tokens=234, cost=0.5)
        yield kind(summary=job(self.ends or 0, explained=1, skipped=1, usage=usage))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    made: Any = Service  # RPCs that no command asks for are missing
    servicer: Service = made()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_ExplainerServiceServicer_to_server(servicer, server)
    monkeypatch.setenv("TDB_EXPLAINER_PORT", str(server.add_insecure_port("127.0.0.1:0")))
    server.start()
    yield servicer
    servicer.ends = job_pb2.JOB_STATE_CANCELLED
    server.stop(None).wait()


def asks(service: Service) -> None:
    """From here on the method needs a language model."""
    service.estimate = explain_pb2.EstimateCostResponse(
        components=2,
        calls=8,
        expected_tokens=4000,
        most_tokens=9000,
        expected_cost=0.25,
        most_cost=1.5,
        provider="llm.example",
        provider_model="judge-1",
    )


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_costs_nothing_begins_at_once(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*EXPLAIN, OFFLINE, "--score", "detection", "--score", "fuzzing", "--seed", "3"]
    more = ["--judge", "offline", "--items", "9", "--max-fraction-active", "0.25", "--again"]
    assert main([*command, *more]) == 0
    (asked,) = service.sent(explain_pb2.ExplainManyRequest)
    assert asked == explain_pb2.ExplainManyRequest(
        dataset="demo",
        list=explain_pb2.ComponentList(components=["neuron.0.1", "neuron.0.2"]),
        method=explanation_pb2.METHOD_TOKEN_PATTERN,
        scoring=explain_pb2.Scoring(
            scorers=[explanation_pb2.SCORER_DETECTION, explanation_pb2.SCORER_FUZZING],
            judge=explain_pb2.JUDGE_OFFLINE,
            items=9,
        ),
        seed=3,
        gate=explain_pb2.Gate(max_fraction_active=0.25),
        again=True,
    )
    shown = capsys.readouterr()
    assert (
        shown.out
        == "neuron.0.1\tfires on ?[2Jnames\nneuron.0.2\tno explanation: TOO_FEW_DOCUMENTS\n"
    )
    assert "j-1: done, 2 of 2 done, 1 skipped, 1,234 tokens ($0.5000) spent" in shown.err


def test_a_range_and_a_budget(service: Service) -> None:
    assert main([*RANGE, ASKING, "--max-tokens", "5", "--max-cost", "0.5"]) == 0
    (asked,) = service.sent(explain_pb2.ExplainManyRequest)
    assert (asked.range.first, asked.range.last) == ("neuron.0.0", "neuron.0.9")
    assert (asked.budget.max_tokens, asked.budget.max_cost) == (5, 0.5)


@pytest.mark.parametrize(("answer", "begins"), [("y\n", True), ("n\n", False), ("", False)])
def test_nothing_is_spent_without_a_yes(
    service: Service,
    answer: str,
    begins: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asks(service)
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    assert main([*EXPLAIN, ASKING]) == (0 if begins else 1)
    sent = service.sent(explain_pb2.ExplainManyRequest)
    # What was shown as the most is the budget.
    assert [each.budget.max_tokens for each in sent] == ([9000] if begins else [])
    shown = capsys.readouterr().err
    assert "2 components: up to 8 questions to judge-1 at llm.example" in shown
    assert "about 4,000 tokens ($0.2500), at most 9,000 tokens ($1.5000)" in shown
    assert begins or "nothing was sent" in shown


def test_ctrl_c_instead_of_an_answer_is_a_no(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    asks(service)
    terminal = _Terminal()
    monkeypatch.setattr(terminal, "readline", interrupt)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main([*EXPLAIN, ASKING]) == 1
    assert not service.sent(explain_pb2.ExplainManyRequest)
    assert "nothing was begun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--yes is needed where nobody can be asked"),
        (("--yes",), "--yes needs --max-tokens or --max-cost"),
        (("--yes", "--max-cost", "2"), ""),
    ],
)
def test_scripts_say_yes_and_how_much(
    service: Service,
    flags: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asks(service)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main([*EXPLAIN, ASKING, *flags]) == (1 if says else 0)
    sent = service.sent(explain_pb2.ExplainManyRequest)
    assert [each.budget.max_cost for each in sent] == ([] if says else [2.0])
    assert says in capsys.readouterr().err


def test_a_service_that_goes_away_leaves_the_job(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.breaks = True
    assert main([*EXPLAIN, OFFLINE]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 2
    assert "the job goes on when it is back: `tdb jobs follow j-1` shows it" in shown.err


@pytest.mark.parametrize("state", [job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_OUT_OF_BUDGET])
def test_a_job_that_is_not_done_is_exit_code_1(service: Service, state: Any) -> None:
    service.ends = state
    assert main([*EXPLAIN, OFFLINE]) == 1
    assert main(["jobs", "follow", "j-1"]) == 1


def test_jobs_are_listed_and_told(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "list"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["JOB", "STATE", "DONE"]
    assert row.split()[:8] == ["j-1", "out", "of", "budget", "1", "2", "contrastive", "demo"]
    for action, says in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        assert main(["jobs", action, "j-1"]) == 0
        assert capsys.readouterr().out == f"j-1: {says}, 0 of 2 done\n"
    assert main(["jobs", "resume", "j-1", "--max-tokens", "7"]) == 0
    plain, more = service.sent(job_pb2.ResumeJobRequest)
    assert not plain.HasField("budget")
    assert more.budget.max_tokens == 7


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (grpc.StatusCode.NOT_FOUND, "tdb: no dataset demo\n"),
        (grpc.StatusCode.UNAUTHENTICATED, "TDB_TOKEN is what is sent"),
        (grpc.StatusCode.UNAVAILABLE, "does not answer (no dataset demo): is `tdb up` running?"),
    ],
)
def test_refusals_are_one_sentence(
    service: Service, code: grpc.StatusCode, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refusal = (code, "no dataset demo")
    assert main([*EXPLAIN, OFFLINE]) == 1
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_job_is_asked_for_once_whatever_happens(service: Service) -> None:
    service.refusal = (grpc.StatusCode.UNAVAILABLE, "it stops")
    service.refuses = explain_pb2.ExplainManyRequest
    assert main([*EXPLAIN, OFFLINE]) == 1
    assert len(service.sent(explain_pb2.ExplainManyRequest)) == 1
    service.refuses = explain_pb2.EstimateCostRequest
    assert main([*EXPLAIN, OFFLINE]) == 1
    assert len(service.sent(explain_pb2.EstimateCostRequest)) == 1 + 5, "which may be repeated"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("explain", "--dataset", "d", "--method", OFFLINE), "components, or --range"),
        ((*RANGE, OFFLINE, "neuron.0.1"), "components, or --range"),
        ((*EXPLAIN, "human"), "invalid choice"),
        ((*EXPLAIN, OFFLINE, "--judge", "offline"), "add --score"),
        ((*EXPLAIN, OFFLINE, "--data", "x"), "unrecognized"),
        (("jobs",), "ACTION"),
        (("jobs", "follow"), "JOB"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_running(service: Service, tmp_path: Path) -> None:
    service.ends = None
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(
            tdb(*EXPLAIN, OFFLINE), stdout=file, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        until("both components", lambda: out.read_text().count("\n") == 2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "The job goes on: `tdb jobs follow j-1` shows it" in errors
    assert "`tdb jobs cancel j-1` ends it" in errors
    assert "Traceback" not in errors
    assert not service.sent(job_pb2.CancelJobRequest)


def test_a_reader_that_has_enough_leaves_the_job_running(service: Service) -> None:
    service.ends = None
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        tdb(*EXPLAIN, OFFLINE), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30
    )
    os.close(writer)
    assert process.returncode == 0, process.stderr
    assert "The job goes on: `tdb jobs follow j-1` shows it" in process.stderr
    assert "Traceback" not in process.stderr
    assert "BrokenPipeError" not in process.stderr
