"""Jobs as the API's messages."""

from collections.abc import Sequence

from tdb.explainer.v1 import explain_pb2, job_pb2

from services.explainer import job_requests
from services.explainer.engine import budget
from services.explainer.engine.budget import Prices
from services.explainer.job_run import Item, JobView
from services.explainer.job_store import ComponentState, JobState, Used

STATES: dict[JobState, "job_pb2.JobState.ValueType"] = {
    each: job_pb2.JobState.Value(f"JOB_STATE_{each.name}") for each in JobState
}


def job(view: JobView, prices: Prices | None, components: Sequence[str] = ()) -> job_pb2.Job:
    """With `components`, the list that was asked for is in its request."""
    stored = view.job
    request = job_requests.of_text(stored.request)
    if request.WhichOneof("components") == "list":
        request.list.components.extend(components)
    counts = stored.counts
    message = job_pb2.Job(
        id=stored.id,
        state=STATES[stored.state],
        request=request,
        user=stored.user,
        components=stored.components,
        explained=counts[ComponentState.EXPLAINED],
        skipped=counts[ComponentState.SKIPPED],
        failed=counts[ComponentState.FAILED],
        reasons=[
            job_pb2.ReasonCount(reason=reason, count=count)
            for reason, count in sorted(stored.reasons.items())
        ],
        usage=usage(stored.used, prices),
        forecast_tokens=view.tokens,
        rate=view.rate,
        seconds_left=view.seconds_left,
        message=stored.message,
        created_ms=stored.created_ms,
    )
    done = stored.components - counts[ComponentState.PENDING]
    if done and message.usage.HasField("cost"):
        message.forecast_cost = message.usage.cost * stored.components / done
    return message


def usage(used: Used, prices: Prices | None) -> explain_pb2.Usage:
    tokens = budget.Usage(used.prompt_tokens, used.completion_tokens)
    return explain_pb2.Usage(
        calls=used.calls,
        cached_calls=used.cached_calls,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cost=tokens.cost(prices) if prices else None,
        bounded_calls=used.bounded_calls,
    )


def item(given: Item) -> job_pb2.JobItem:
    return job_pb2.JobItem(
        component=given.component,
        explanation_id=given.explanation_id,
        text=given.text,
        reason=given.reason,
    )
