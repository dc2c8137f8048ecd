"""The load test of `benchmarks/load.py` at a tenth of its size: nothing lost, nothing wrong, and
users who ask alike are served alike. Times are the benchmark's."""

from pathlib import Path

import pytest

from benchmarks.load import SWEEPER, Work, phase, serving, unfairness
from tests.cli.test_up import model

__all__ = ["model"]

USERS = [SWEEPER, *(f"user-{number}" for number in range(1, 6))]
SECONDS = 12.0


@pytest.mark.long
def test_nothing_is_lost_or_wrong_and_users_are_served_alike(model: Path) -> None:
    with serving(model, USERS) as service:
        with service.stub(SWEEPER) as client:
            work = Work.prepare(client, 24, 400, 14)
        thinking = phase(service, work, USERS, SECONDS, 0.3)
        busy = phase(service, work, USERS, SECONDS, 0.0)
    for found in (thinking, busy):
        assert not found.bad, found.ends
        assert found.ends["click right"] == sum(found.clicks.values()) > 0
        assert found.ends["sweep right"] > 0
        assert set(found.clicks) == set(USERS[1:])
        assert found.health
        assert min(found.shares.values()) > 0
    assert unfairness([busy.clicks[user] for user in USERS[1:]]) < 0.4
    assert unfairness([busy.shares[user] for user in USERS[1:]]) < 0.4
