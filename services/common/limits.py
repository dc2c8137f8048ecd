"""How much one user may ask, per minute and at once, and all of them together at once.

The rate is a token bucket: a user who has been quiet may send a quarter of a minute's requests at
once, and after that one every 60 / rate seconds. Who is refused is told when to come back, and the
refusals of a user name one moment after the other, over a minute: programs that wait as they are
told return one by one, not together to be refused together again.

An account is forgotten once it says no more than a new one would, so what is kept is bounded by the
users of the last minute, however many come and go.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.common.errors import ResourceExhausted

BURST_SHARE = 0.25  # of a minute's requests
LONGEST_WAIT_S = 60.0
AT_ONCE_WAIT_S = 1.0  # about what a request takes: nobody knows how long those running have left
_SWEEP_AT_LEAST = 1024
_ROUNDING_S = 1e-6


class _Account:
    """One user's. Times are in seconds of the clock."""

    def __init__(self) -> None:
        self.running = 0
        self.turned_away = 0
        """Refusals since a request was last let in, for running too many at once."""
        self.paid_until = 0.0
        """When the requests so far would have been due, one by one at the rate."""
        self.promised_until = 0.0
        """The latest moment that a refusal named."""

    def is_new(self, now: float) -> bool:
        return not self.running and self.paid_until <= now and self.promised_until <= now


class UserLimits:
    """The accounts of one server. 0 is no limit. For one thread."""

    def __init__(
        self,
        requests_per_minute: int,
        concurrent_requests: int,
        in_all: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`in_all` is how many requests of all users are served at once."""
        self._per_minute = requests_per_minute
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._burst = max(1, int(requests_per_minute * BURST_SHARE))
        self._concurrent = concurrent_requests
        self._in_all = in_all
        self._everybody = _Account()
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = _SWEEP_AT_LEAST

    @contextmanager
    def admit(self, user: str) -> Iterator[None]:
        """Counts a request of `user` while it is served. Raises ResourceExhausted."""
        account = self._account(user)
        if self._concurrent and account.running >= self._concurrent:
            raise _too_many_at_once(
                account,
                self._concurrent,
                f"{account.running} requests of yours are being served; at most "
                f"{self._concurrent} are at once",
                "TOO_MANY_AT_ONCE",
            )
        if self._in_all and self._everybody.running >= self._in_all:
            raise _too_many_at_once(
                self._everybody,
                self._in_all,
                f"{self._in_all} requests are being served, which is as many as at once",
                "SERVER_BUSY",
            )
        self._pay(account)
        for each in (account, self._everybody):
            each.running += 1
            each.turned_away = 0
        try:
            yield
        finally:
            account.running -= 1
            self._everybody.running -= 1

    def __len__(self) -> int:
        return len(self._accounts)

    def _account(self, user: str) -> _Account:
        if len(self._accounts) >= self._sweep_at:
            now = self._clock()
            self._accounts = {
                name: account for name, account in self._accounts.items() if not account.is_new(now)
            }
            self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(self._accounts))
        return self._accounts.setdefault(user, _Account())

    def _pay(self, account: _Account) -> None:
        if not self._interval:
            return
        now = self._clock()
        due = max(account.paid_until, now) + self._interval
        free = due - self._burst * self._interval  # when this request fits the burst
        if free <= now + _ROUNDING_S:
            account.paid_until = due
            return
        promise = max(account.promised_until + self._interval, free)
        # Beyond a minute the moments are given out again: nobody is sent away for longer.
        account.promised_until = promise if promise <= now + LONGEST_WAIT_S else free
        raise ResourceExhausted(
            f"you have sent more than {self._per_minute} requests per minute",
            reason="TOO_MANY_REQUESTS",
            metadata={"limit": str(self._per_minute)},
            retry_after_s=account.promised_until - now,
        )


def _too_many_at_once(
    account: _Account, limit: int, sentence: str, reason: str
) -> ResourceExhausted:
    """Sends away as many per second as run at once."""
    wait = AT_ONCE_WAIT_S * (1 + account.turned_away // limit)
    account.turned_away += 1
    return ResourceExhausted(
        sentence,
        reason=reason,
        metadata={"limit": str(limit)},
        retry_after_s=min(wait, LONGEST_WAIT_S),
    )
