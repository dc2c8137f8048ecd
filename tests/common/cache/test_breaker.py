"""The circuit breaker, on a clock that the test turns."""

from services.common.cache.breaker import FAILURES, LONGEST_PAUSE_S, Breaker, State


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened() -> tuple[Breaker, Clock]:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        assert breaker.admits()
        breaker.failed()
    return breaker, clock


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(Clock())
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True]
    assert breaker.state is State.OPEN
    assert not breaker.admits()


def test_a_success_between_keeps_it_closed() -> None:
    breaker = Breaker(Clock())
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        assert not breaker.succeeded()
    assert breaker.state is State.CLOSED


def test_one_call_probes_after_the_pause() -> None:
    breaker, clock = opened()
    clock.now += 4.9
    assert not breaker.admits()
    clock.now += 0.1
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    assert breaker.succeeded()
    assert breaker.admits()
    assert breaker.admits()


def test_each_failed_probe_doubles_the_pause_up_to_a_minute() -> None:
    breaker, clock = opened()
    pauses = []
    for _ in range(6):
        pauses.append(breaker.pause_s)
        clock.now += breaker.pause_s - 0.01
        assert not breaker.admits()
        clock.now += 0.01
        assert breaker.admits()
        assert not breaker.failed()
    assert pauses == [5, 10, 20, 40, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    clock.now += LONGEST_PAUSE_S
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.pause_s == 5


def test_a_probe_that_was_abandoned_leaves_the_next_call_to_probe() -> None:
    breaker, clock = opened()
    clock.now += 5
    assert breaker.admits()
    breaker.abandoned()
    assert breaker.state is State.OPEN
    assert breaker.admits()


def test_calls_from_before_it_opened_change_nothing_when_they_fail() -> None:
    breaker, clock = opened()
    clock.now += 4
    assert not breaker.failed()
    clock.now += 1
    assert breaker.admits()
    assert breaker.pause_s == 5
