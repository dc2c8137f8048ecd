"""Out of memory: how it is told, and work in parts that frees, halves and tries once more."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from services.common.errors import ResourceExhausted

Item = TypeVar("Item")
Found = TypeVar("Found")
Listener = Callable[[bool], None]
OUT_OF_MEMORY = "OUT_OF_MEMORY"
"""The reason of the refusal."""

_listener: ContextVar[Listener | None] = ContextVar("out_of_memory_listener", default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device: a CPU's allocator has no type for it."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def free() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def refusal() -> ResourceExhausted:
    return ResourceExhausted(
        "the device ran out of memory; try a shorter prompt, or again later",
        reason=OUT_OF_MEMORY,
        retry_after_s=5.0,
    )


@contextmanager
def telling(listener: Listener) -> Iterator[None]:
    """Within, `listener` is told of each time that `in_halves` runs out of memory, and whether it
    tries again."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def _tell(retried: bool) -> None:
    if listener := _listener.get():
        listener(retried)


def in_halves(work: Callable[[Sequence[Item]], list[Found]], items: Sequence[Item]) -> list[Found]:
    """`work` of the items together; where memory runs out for them, of each half by itself.

    Work that failed must have left nothing behind. Raises ResourceExhausted where half is still
    too much, or where there is a single item, once more after freeing.
    """
    try:
        return work(items)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: the error's traceback keeps the tensors of the pass alive.
    _tell(True)
    free()
    half = (len(items) + 1) // 2
    found: list[Found] = []
    for part in filter(len, (items[:half], items[half:])):
        try:
            found += work(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _tell(False)
            raise refusal() from None
    return found
