"""Who goes next: users share the device's time evenly, clicks before sweeps.

Start-time fair queueing on estimated device seconds, put right by measured ones. Every user has an
account of what was used; a piece of work stands at the account of its user plus what the user has
waiting before it, and the lowest goes first. A user who comes back starts no lower than those who
are there: idle time earns no credit. But who was behind them and left for a moment, as a sweep does
between two slices, comes back as far behind.

INTERACTIVE work goes before BULK work, so a click waits for one slice of a sweep at most. But a
user of bulk work who falls behind those who click gets a slice: nobody starves. How far behind is
`OWED_S` shared among those who click, which takes them about that long, however many they are.
Of one user's own work every `OWN_BULK_TURN`-th piece is bulk, where there is both.

A departure from deficit round robin, which DESIGN names: there a click waits for a whole rotation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from services.common.errors import ResourceExhausted
from services.inference.task import Place, Priority, Task

OWED_S = 1.0
OWN_BULK_TURN = 8
SEARCHED_FOR_BATCH = 64
"""Pieces of each user's waiting work that are looked through for one batch."""
MISSES = 4
"""After so many pieces that do not fit a batch is full: trying takes time, and others wait."""


@dataclass(eq=False)
class Entry:
    """One piece of work in the queue."""

    user: str
    task: Task
    cost_s: float
    """Estimated device seconds."""
    number: int = 0
    """In order of arrival."""


E = TypeVar("E", bound=Entry)


@dataclass
class _Account(Generic[E]):
    """What one user has used and waits for."""

    used_s: float
    waiting: dict[Priority, dict[int, E]] = field(
        default_factory=lambda: {priority: {} for priority in Priority}
    )
    """By number, the oldest first."""
    running: int = 0
    turns: int = 0
    """Interactive turns since bulk work of the same user last went."""
    left_at_s: float | None = None
    """The floor when the user's last work was done; None while there is some."""

    @property
    def behind_s(self) -> float:
        """How far below the floor the user left."""
        return 0.0 if self.left_at_s is None else max(self.left_at_s - self.used_s, 0.0)

    @property
    def idle(self) -> bool:
        return not self.running and not any(self.waiting.values())

    @property
    def count(self) -> int:
        return sum(map(len, self.waiting.values()))

    def standing(self, priority: Priority) -> Iterator[tuple[float, E]]:
        """Where each piece of work stands."""
        start = self.used_s
        for entry in self.waiting[priority].values():
            yield start, entry
            start += entry.cost_s


class FairQueue(Generic[E]):
    """Bounded per user and in all. Not thread-safe: the scheduler holds a lock."""

    def __init__(self, per_user: int, total: int) -> None:
        self.per_user = per_user
        self.total = total
        self._accounts: dict[str, _Account[E]] = {}
        self._floor_s = 0.0
        self._numbers = 0

    def __len__(self) -> int:
        return sum(account.count for account in self._accounts.values())

    def add(self, entry: E) -> Place:
        """Where the entry stands now. Raises ResourceExhausted."""
        account = self._accounts.get(entry.user)
        own = account.count if account else 0
        if own >= self.per_user or len(self) >= self.total:
            who = "you have" if own >= self.per_user else "all users together have"
            limit = self.per_user if own >= self.per_user else self.total
            raise ResourceExhausted(
                f"{who} {limit} requests waiting, the most that are kept; try again once some are "
                "answered",
                reason="QUEUE_FULL",
                retry_after_s=self._room_after_s(account if own >= self.per_user else None),
            )
        if account is None:
            account = self._accounts[entry.user] = _Account(self._floor_s)
        elif account.left_at_s is not None:
            account.used_s = max(account.used_s, self._floor_s - account.behind_s)
            account.left_at_s = None
        self._numbers += 1
        entry.number = self._numbers
        account.waiting[entry.task.priority][entry.number] = entry
        place = self.place(entry)
        assert place is not None
        return place

    def _room_after_s(self, account: _Account[E] | None) -> float:
        """When a place may be free: once a tenth of what waits is done."""
        accounts = [account] if account else self._accounts.values()
        lines = [line for each in accounts for line in each.waiting.values()]
        cost = sum(entry.cost_s for line in lines for entry in line.values())
        return min(max(cost / 10, 0.2), 30.0)

    def drop(self, entry: E) -> bool:
        """Takes out an entry that waits; whether it did."""
        account = self._accounts.get(entry.user)
        found = account and account.waiting[entry.task.priority].pop(entry.number, None)
        self._forget()
        return found is not None

    def take(self) -> list[E]:
        """What runs next: one entry, or several that share a pass; empty if nothing waits.

        Their users are charged the estimate until `settle`.
        """
        chosen = self._next()
        if chosen is None:
            return []
        account, priority = chosen
        first = next(iter(account.waiting[priority].values()))
        account.turns = 0 if priority is Priority.BULK else account.turns + 1
        entries = [first, *self._companions(first)] if first.task.batch else [first]
        for entry in entries:
            self._begin(entry)
        return entries

    def settle(self, entries: list[E], seconds: float) -> None:
        """Puts the charge of what `take` gave right: each pays its share of `seconds`."""
        tokens = sum(entry.task.tokens for entry in entries)
        for entry in entries:
            account = self._accounts[entry.user]
            account.running -= 1
            account.used_s += seconds * entry.task.tokens / tokens - entry.cost_s
        self._forget()

    def place(self, entry: E) -> Place | None:
        """Where a waiting entry stands; None once it was taken or dropped."""
        account = self._accounts.get(entry.user)
        priority = entry.task.priority
        if account is None or entry.number not in account.waiting[priority]:
            return None
        own = next(start for start, each in account.standing(priority) if each is entry)
        before = [
            each
            for start, each in self._standing(priority)
            if (start, each.number) < (own, entry.number)
        ]
        if priority is Priority.BULK:
            before += [each for _, each in self._standing(Priority.INTERACTIVE)]
        running = sum(each.running for each in self._accounts.values())
        return Place(
            priority, len(before) + (1 if running else 0), sum(each.cost_s for each in before)
        )

    def waiting(self) -> list[tuple[E, Place]]:
        """Everything that waits, in the order in which it is likely to run."""
        found: list[tuple[E, Place]] = []
        position = 1 if any(each.running for each in self._accounts.values()) else 0
        wait_s = 0.0
        for priority in Priority:
            standing = sorted(self._standing(priority), key=lambda each: (each[0], each[1].number))
            for _, entry in standing:
                found.append((entry, Place(priority, position, wait_s)))
                position += 1
                wait_s += entry.cost_s
        return found

    def clear(self) -> list[E]:
        """Takes out everything that waits."""
        entries = [entry for entry, _ in self.waiting()]
        for entry in entries:
            self.drop(entry)
        return entries

    def _standing(self, priority: Priority) -> Iterator[tuple[float, E]]:
        for account in self._accounts.values():
            yield from account.standing(priority)

    def _next(self) -> tuple[_Account[E], Priority] | None:
        """Whose turn it is, for what."""
        click, sweep = (self._lowest(priority) for priority in Priority)
        if click is None:
            return (sweep, Priority.BULK) if sweep else None
        if sweep is None:
            return click, Priority.INTERACTIVE
        clicking = sum(bool(each.waiting[Priority.INTERACTIVE]) for each in self._accounts.values())
        owed = sweep.used_s + OWED_S / clicking < click.used_s
        turn = click is sweep and click.turns >= OWN_BULK_TURN - 1
        return (sweep, Priority.BULK) if owed or turn else (click, Priority.INTERACTIVE)

    def _lowest(self, priority: Priority) -> _Account[E] | None:
        having = (each for each in self._accounts.values() if each.waiting[priority])
        return min(
            having,
            key=lambda each: (each.used_s, next(iter(each.waiting[priority]))),
            default=None,
        )

    def _companions(self, first: E) -> list[E]:
        """Others that may share the pass of `first`, the lowest first, as long as they fit."""
        assert first.task.batch
        priority = first.task.priority
        able = [
            (start, entry.number, entry)
            for account in self._accounts.values()
            for start, entry in islice(account.standing(priority), SEARCHED_FOR_BATCH)
            if entry is not first
            and entry.task.batch
            and entry.task.batch.key == first.task.batch.key
        ]
        found: list[E] = []
        members = [first.task.batch.member]
        misses = 0
        for _, _, entry in sorted(able, key=lambda each: each[:2]):
            assert entry.task.batch
            if first.task.batch.fits([*members, entry.task.batch.member]):
                found.append(entry)
                members.append(entry.task.batch.member)
            elif (misses := misses + 1) == MISSES:
                break
        return found

    def _begin(self, entry: E) -> None:
        account = self._accounts[entry.user]
        del account.waiting[entry.task.priority][entry.number]
        account.running += 1
        account.used_s += entry.cost_s

    def _forget(self) -> None:
        """Moves the floor up, and drops accounts that say no more than it does."""
        busy = [each.used_s for each in self._accounts.values() if not each.idle]
        every = [each.used_s for each in self._accounts.values()]
        self._floor_s = max(self._floor_s, min(busy) if busy else max(every, default=0.0))
        for each in self._accounts.values():
            if each.idle and each.left_at_s is None:
                each.left_at_s = self._floor_s
        self._accounts = {
            user: each for user, each in self._accounts.items() if self._says_more(each)
        }

    def _says_more(self, account: _Account[E]) -> bool:
        """Whether the account says more than a new one would."""
        if account.left_at_s is None or account.used_s > self._floor_s:
            return True
        return account.behind_s > 0 and self._floor_s - account.left_at_s < OWED_S
