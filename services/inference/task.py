"""A piece of work for the device, and what is said about how it was served."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from services.inference.engine.cancellation import CancelToken

Result = TypeVar("Result")


class Priority(Enum):
    """INTERACTIVE goes first; BULK is work that comes in slices, such as the chunks of Verify."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True)
class Batch:
    """How a piece of work may share one padded pass with others, of any users.

    Those with equal keys may; `fits` says whether some of them do together, in tokens and bytes.
    `padded_tokens` is rows times the longest. `run` gives a result or an error for each member, in
    order.
    """

    key: Hashable
    member: Any
    fits: Callable[[Sequence[Any]], bool]
    padded_tokens: Callable[[Sequence[Any]], int]
    run: Callable[[Sequence[Any], CancelToken], Sequence[Any]]


@dataclass(frozen=True)
class Task:
    """What the scheduler must know about a piece of work."""

    kind: str
    """Device times are learnt by kind, such as `Attribute`."""
    tokens: int = 1
    """Rows times padded tokens of its passes: what its device time is estimated from."""
    priority: Priority = Priority.INTERACTIVE
    batch: Batch | None = None


@dataclass(frozen=True)
class Place:
    """Where a piece of work stands in the queue."""

    priority: Priority
    position: int
    """How many pieces of work go first, the one that runs included; an estimate."""
    expected_wait_s: float


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """A result and how it was served."""

    result: Result
    queue_ms: float
    place: Place
    """Where it stood when it came."""
    shared_by: int
    """Requests in the pass that answered it."""
