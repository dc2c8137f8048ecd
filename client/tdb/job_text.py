"""Jobs of explanations as a terminal shows them."""

import sys
import time
from collections.abc import Iterable, Iterator

from tdb.explainer.v1 import explain_pb2, explanation_pb2, job_pb2
from tdb.terminal import duration, printable, table

QUIET_S = 10.0
"""How often progress is said where it cannot take the place of what was said before."""


class Shown:
    """A job on the terminal: components on standard output, how far it is on standard error."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._line = ""
        self._said = 0.0

    def progress(self, job: job_pb2.Job) -> None:
        line = sentence(job)
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._line = line
        elif not self._said or time.monotonic() - self._said > QUIET_S:
            self._said = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def item(self, item: job_pb2.JobItem) -> None:
        line, self._line = self._line, ""
        if line:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        told = item.text or f"no explanation: {item.reason}"
        print(f"{item.component}\t{_one_line(told)}", flush=True)
        if line:
            print(line, end="", file=sys.stderr, flush=True)
            self._line = line

    def end(self, job: job_pb2.Job) -> None:
        self._wipe()
        print(sentence(job), file=sys.stderr)

    def leave(self, job_id: str) -> None:
        """The user has gone, by Ctrl-C or as nobody reads standard output."""
        self.close()
        if job_id:
            text = (
                f"The job goes on: `tdb jobs follow {job_id}` shows it, "
                f"`tdb jobs cancel {job_id}` ends it."
            )
        else:
            text = "`tdb jobs list` shows whether the job has begun."
        print(text, file=sys.stderr)

    def close(self) -> None:
        if self._line:
            print(file=sys.stderr)
        self._line = ""

    def _wipe(self) -> None:
        if self._line:
            print("\r\x1b[K", end="", file=sys.stderr)
        self._line = ""


def sentence(job: job_pb2.Job) -> str:
    """How a job is, in one line."""
    return ", ".join(_parts(job))


def estimate(found: explain_pb2.EstimateCostResponse) -> str:
    """What a job may cost, and who would be asked."""
    components = f"{found.components:,} component{'' if found.components == 1 else 's'}"
    expected = _spent(
        found.expected_tokens, found.expected_cost if found.HasField("expected_cost") else None
    )
    most = _spent(found.most_tokens, found.most_cost if found.HasField("most_cost") else None)
    return (
        f"{components}: up to {found.calls:,} questions to {printable(found.provider_model)} at "
        f"{printable(found.provider)}, about {expected}, at most {most}."
    )


def table_of(jobs: Iterable[job_pb2.Job]) -> str:
    head = ("JOB", "STATE", "DONE", "OF", "METHOD", "DATASET", "USER", "SPENT", "AGE")
    return table(
        head,
        [
            (
                job.id,
                state(job),
                str(job.explained + job.skipped + job.failed),
                str(job.components),
                explanation_pb2.Method.Name(job.request.method).removeprefix("METHOD_").lower(),
                job.request.dataset,
                job.user or "-",
                _usage(job.usage) or "-",
                duration(max(0.0, time.time() - job.created_ms / 1e3)),
            )
            for job in jobs
        ],
    )


def state(job: job_pb2.Job) -> str:
    return job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower().replace("_", " ")


def _parts(job: job_pb2.Job) -> Iterator[str]:
    done = job.explained + job.skipped + job.failed
    yield f"{printable(job.id)}: {state(job)}"
    yield f"{done:,} of {job.components:,} done"
    for count, what in ((job.skipped, "skipped"), (job.failed, "failed")):
        if count:
            yield f"{count:,} {what}"
    if job.reasons:
        yield " ".join(f"{printable(each.reason)} {each.count:,}" for each in job.reasons)
    if spent := _usage(job.usage):
        yield f"{spent} spent"
    if job.HasField("forecast_cost"):
        yield f"${job.forecast_cost:,.4f} in all by forecast"
    if job.HasField("rate"):
        yield f"{job.rate:,.1f}/s"
    if job.HasField("seconds_left"):
        yield f"about {duration(job.seconds_left)} left"
    if job.message:
        yield _one_line(job.message)


def _usage(usage: explain_pb2.Usage) -> str:
    """ "" where nothing was spent."""
    tokens = usage.prompt_tokens + usage.completion_tokens
    return _spent(tokens, usage.cost if usage.HasField("cost") else None) if tokens else ""


def _spent(tokens: int, cost: float | None) -> str:
    return f"{tokens:,} tokens" + ("" if cost is None else f" (${cost:,.4f})")


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
