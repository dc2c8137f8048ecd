"""Who goes next: shares of the device, classes, batches and bounds, without a device or a clock."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from services.common.errors import ResourceExhausted
from services.inference.fair_queue import MISSES, OWED_S, OWN_BULK_TURN, Entry, FairQueue
from services.inference.task import Batch, Priority, Task

CLICK, SWEEP = Priority.INTERACTIVE, Priority.BULK


def entry(user: str, priority: Priority = CLICK, cost: float = 0.1) -> Entry:
    return Entry(user, Task("work", priority=priority), cost)


def batched(user: str, tokens: int, key: str = "k", room: int = 64) -> Entry:
    def fits(members: Sequence[int]) -> bool:
        return len(members) * max(members) <= room

    def run(members: Sequence[Any], cancel: Any) -> Sequence[Any]:
        return members

    batch = Batch(key, tokens, fits, lambda members: len(members) * max(members), run)
    return Entry(user, Task("work", tokens, batch=batch), 0.1)


def run_for(
    queue: FairQueue[Entry],
    turns: int,
    refill: Callable[[Entry], Entry],
    took_s: float | None = None,
) -> Counter[str]:
    """Device seconds by user, where everyone comes back at once with the same."""
    used: Counter[str] = Counter()
    for _ in range(turns):
        taken = queue.take()
        seconds = sum(each.cost_s for each in taken) if took_s is None else took_s
        queue.settle(taken, seconds)
        for each in taken:
            used[each.user] += seconds / len(taken)  # type: ignore[assignment]
            queue.add(refill(each))
    return used


def again(each: Entry) -> Entry:
    return Entry(each.user, each.task, each.cost_s)


def test_one_user_is_served_in_order() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 10)
    entries = [entry("ada") for _ in range(5)]
    for each in entries:
        queue.add(each)
    assert [queue.take() for _ in range(5)] == [[each] for each in entries]
    assert queue.take() == []


def test_a_user_with_many_requests_leaves_the_others_their_share() -> None:
    queue: FairQueue[Entry] = FairQueue(1000, 1000)
    for _ in range(600):
        queue.add(entry("many"))
    queue.add(entry("one"))
    order = []
    for _ in range(3):
        taken = queue.take()
        order += [each.user for each in taken]
        queue.settle(taken, 0.1)
    assert "one" in order[:2]


def test_shares_are_of_device_time_not_of_requests() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 100)
    for user, cost in (("long", 0.9), ("short", 0.1), ("middling", 0.3)):
        queue.add(entry(user, cost=cost))
        queue.add(entry(user, cost=cost))
    used = run_for(queue, 600, again)
    assert max(used.values()) / min(used.values()) < 1.1


def test_measured_times_put_wrong_estimates_right() -> None:
    """A user whose work is estimated at a tenth of what it takes gains nothing by it."""
    queue: FairQueue[Entry] = FairQueue(10, 100)
    for user, cost in (("modest", 0.01), ("honest", 0.1)):
        queue.add(entry(user, cost=cost))
        queue.add(entry(user, cost=cost))
    used = run_for(queue, 400, again, took_s=0.1)
    assert used["modest"] / used["honest"] == pytest.approx(1, abs=0.05)


def test_a_click_waits_for_one_slice_of_a_sweep() -> None:
    queue: FairQueue[Entry] = FairQueue(100, 1000)
    for number in range(50):
        queue.add(entry(f"sweeper {number % 5}", SWEEP, 0.3))
    running = queue.take()
    queue.add(entry("ada"))
    queue.settle(running, 0.3)
    assert [each.user for each in queue.take()] == ["ada"]


def test_a_sweep_beside_users_who_never_stop_clicking_gets_its_share() -> None:
    queue: FairQueue[Entry] = FairQueue(100, 1000)
    for number in range(15):
        queue.add(entry(f"user {number}"))
    for _ in range(2):
        queue.add(entry("sweeper", SWEEP, 0.3))
    used = run_for(queue, 3000, again)
    fair = sum(used.values()) / 16
    assert all(0.8 * fair < each < 1.2 * fair for each in used.values()), used


def test_a_sweep_that_waits_for_each_answer_gets_its_share_too() -> None:
    """Between two slices nothing of it waits: it comes back as far behind as it left."""
    queue: FairQueue[Entry] = FairQueue(100, 1000)
    for number in range(15):
        queue.add(entry(f"user {number}"))
    queue.add(entry("sweeper", SWEEP, 0.3))
    used = run_for(queue, 6000, again)
    fair = sum(used.values()) / 16
    assert all(0.8 * fair < each < 1.2 * fair for each in used.values()), used


def test_a_sweep_that_comes_to_a_busy_device_is_served_within_seconds() -> None:
    """However many click: it is owed a slice once they have used about a second between them."""
    queue: FairQueue[Entry] = FairQueue(100, 1000)
    for number in range(15):
        queue.add(entry(f"user {number}"))
    run_for(queue, 300, again)
    queue.add(entry("sweeper", SWEEP, 0.3))
    seconds = 0.0
    while (taken := queue.take())[0].user != "sweeper":
        seconds += sum(each.cost_s for each in taken)
        queue.settle(taken, taken[0].cost_s)
        queue.add(again(taken[0]))
    assert seconds < 4 * OWED_S


def test_of_ones_own_work_clicks_go_first_and_sweeps_do_not_starve() -> None:
    queue: FairQueue[Entry] = FairQueue(1000, 1000)
    for _ in range(20):
        queue.add(entry("ada", SWEEP))
    for _ in range(40):
        queue.add(entry("ada"))
    order = [queue.take()[0].task.priority for _ in range(40)]
    assert order[: OWN_BULK_TURN - 1] == [CLICK] * (OWN_BULK_TURN - 1)
    assert order.count(SWEEP) == 40 // OWN_BULK_TURN


def test_idle_time_earns_no_credit() -> None:
    """Who comes after others have worked for long shares from then on, and does not catch up."""
    queue: FairQueue[Entry] = FairQueue(10, 100)
    queue.add(entry("early"))
    queue.add(entry("early"))
    run_for(queue, 500, again)
    queue.add(entry("late"))
    queue.add(entry("late"))
    used = run_for(queue, 20, again)
    assert used["early"] == pytest.approx(used["late"], abs=0.21)


def test_what_is_owed_to_a_user_does_not_grow_while_nothing_is_asked() -> None:
    queue: FairQueue[Entry] = FairQueue(100, 1000)
    queue.add(entry("sweeper", SWEEP, 0.1))
    for number in range(3):
        queue.add(entry(f"user {number}"))
    run_for(queue, 30, again)
    waiting = [each for each, _ in queue.waiting() if each.user == "sweeper"]
    for each in waiting:
        queue.drop(each)
    others = [each for each, _ in queue.waiting()]
    assert len(others) == 3
    run_for(queue, 3000, again)
    queue.add(entry("sweeper", SWEEP, 0.1))
    used = run_for(queue, 40, again)
    assert used["sweeper"] < OWED_S + 0.3


def test_accounts_of_users_who_left_are_forgotten() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 100)
    for number in range(500):
        queue.add(entry(f"user {number}"))
        queue.settle(queue.take(), 0.2)
    assert len(queue._accounts) <= 1


def test_the_queue_is_bounded_per_user_and_in_all() -> None:
    queue: FairQueue[Entry] = FairQueue(3, 5)
    for _ in range(3):
        queue.add(entry("ada"))
    with pytest.raises(ResourceExhausted, match="you have 3 requests waiting") as refused:
        queue.add(entry("ada"))
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.retry_after_s
    queue.add(entry("bob"))
    queue.add(entry("bob"))
    with pytest.raises(ResourceExhausted, match="all users together have 5"):
        queue.add(entry("cy"))
    queue.take()
    queue.add(entry("cy"))


def test_what_was_dropped_does_not_run_and_is_not_paid_for() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 10)
    first, second = entry("ada", cost=5), entry("ada", cost=5)
    queue.add(first)
    queue.add(second)
    queue.add(entry("bob", cost=5))
    assert queue.drop(first)
    assert not queue.drop(first)
    assert queue.take() == [second]
    assert queue.place(first) is None


def test_places_say_how_many_go_first_and_for_how_long() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 10)
    sweep = entry("ada", SWEEP, 0.5)
    assert queue.add(sweep).position == 0
    queue.take()
    first = queue.add(entry("ada", cost=0.2))
    assert (first.position, first.expected_wait_s) == (1, 0)
    behind = entry("ada", cost=0.2)
    place = queue.add(behind)
    assert place.position == 2
    assert place.expected_wait_s == pytest.approx(0.2)
    # Bob has used nothing, so he goes before what Ada has waiting.
    place = queue.add(entry("bob", cost=0.3))
    assert place.position == 1
    now = queue.place(behind)
    assert now
    assert now.position == 3
    assert now.expected_wait_s == pytest.approx(0.5)
    bulk = queue.add(entry("cy", SWEEP))
    assert bulk.position == 4
    assert [(each.user, each.task.priority) for each, _ in queue.waiting()] == [
        ("bob", CLICK),
        ("ada", CLICK),
        ("ada", CLICK),
        ("cy", SWEEP),
    ]
    assert [place.position for _, place in queue.waiting()] == [1, 2, 3, 4]


def test_work_of_several_users_shares_a_pass_as_long_as_it_fits() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 100)
    for user in ("ada", "bob", "cy"):
        for _ in range(2):
            queue.add(batched(user, 16))
    queue.add(batched("dan", 16, key="other"))
    queue.add(entry("eve"))
    taken = queue.take()
    # Four rows of 16 fit in 64: one of each user first, then the second of the first.
    assert [each.user for each in taken] == ["ada", "bob", "cy", "ada"]
    assert [each.user for each in queue.take()] == ["dan"]
    assert [each.user for each in queue.take()] == ["eve"]
    assert [each.user for each in queue.take()] == ["bob", "cy"]


def test_padding_counts() -> None:
    """A long row makes every row long: 3 x 32 tokens do not fit in 64, though 32 + 8 + 8 would."""
    queue: FairQueue[Entry] = FairQueue(10, 100)
    for user, tokens in (("ada", 32), ("bob", 8), ("cy", 8)):
        queue.add(batched(user, tokens))
    assert [each.user for each in queue.take()] == ["ada", "bob"]


def test_a_full_batch_is_not_tried_with_all_that_waits() -> None:
    queue: FairQueue[Entry] = FairQueue(1000, 1000)
    tried: list[int] = []

    def fits(members: Sequence[int]) -> bool:
        tried.append(len(members))
        return len(members) <= 3

    batch = Batch("k", 1, fits, len, lambda members, cancel: members)
    for number in range(300):
        queue.add(Entry(f"user {number}", Task("work", batch=batch), 0.1))
    assert len(queue.take()) == 3
    assert len(tried) == 2 + MISSES


def test_a_batch_is_paid_by_tokens() -> None:
    queue: FairQueue[Entry] = FairQueue(10, 100)
    queue.add(batched("ada", 30))
    queue.add(batched("bob", 10))
    taken = queue.take()
    assert len(taken) == 2
    queue.add(batched("ada", 30))
    queue.add(batched("bob", 10))
    queue.settle(taken, 4.0)
    assert queue._accounts["ada"].used_s == pytest.approx(3.0)
    assert queue._accounts["bob"].used_s == pytest.approx(1.0)
