"""Calls that share their work: the work is worth while as long as it is for one of them."""

from contextvars import copy_context

import pytest

from services.common import calls
from services.common.calls import Call


@pytest.mark.parametrize(
    ("deadlines", "latest"),
    [
        ([5.0], 5.0),
        ([5.0, 9.0, 7.0], 9.0),
        ([9.0, 5.0], 9.0),
        ([5.0, None, 7.0], None),
        ([None, 7.0], None),
    ],
)
def test_the_latest_deadline_of_all_counts(
    deadlines: list[float | None], latest: float | None
) -> None:
    callers = [Call("/a/B", str(number), deadline=each) for number, each in enumerate(deadlines)]
    context = copy_context()
    context.run(calls.enter, callers[0])
    for each in callers:  # the first too
        context.run(calls.share, each)
    call = context.run(calls.current)
    assert call == Call("/a/B", "0", deadline=latest, shared=True)
    assert not callers[0].shared
    assert calls.current() is None


def test_work_for_no_call_has_none() -> None:
    context = copy_context()
    context.run(calls.share, Call("/a/B", "0", deadline=1.0))
    assert context.run(calls.current) is None
