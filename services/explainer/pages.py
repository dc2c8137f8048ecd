"""Results that are read page by page: kept as they were found, while there is room for them.

A cursor names a kept result and a place in it. So pages fit together whatever is stored meanwhile,
and the next one costs nothing. A result that had to make room is looked for again by the caller.
"""

import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.errors import FailedPrecondition, InvalidArgument

MOST_BYTES = 32 * 2**20
_CURSOR = re.compile(r"([A-Za-z0-9_-]{16})\.(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Ranking:
    """Everything that was found, best first: numbers of explanations and how well each fits [n].

    `without_embedding` explanations could not be compared.
    """

    numbers: NDArray[np.int64]
    relevances: NDArray[np.float64]
    without_embedding: int = 0

    @property
    def bytes(self) -> int:
        return self.numbers.nbytes + self.relevances.nbytes


class Pages:
    """The rankings that were asked for last, by what was asked."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, tuple[object, Ranking]] = OrderedDict()

    def keep(self, question: object, ranking: Ranking) -> str:
        """Its name, for `cursor`."""
        name = secrets.token_urlsafe(12)
        self._kept[name] = question, ranking
        while sum(each.bytes for _, each in self._kept.values()) > self._most_bytes:
            self._kept.popitem(last=False)
        return name

    def find(self, cursor: str, question: object) -> tuple[str, Ranking, int]:
        """The name, the ranking and the place in it. Raises InvalidArgument, FailedPrecondition."""
        parts = _CURSOR.fullmatch(cursor)
        if parts is None:
            raise InvalidArgument("this is no cursor that this service gave", field="cursor")
        name, place = parts[1], int(parts[2])
        if name not in self._kept:
            raise FailedPrecondition(
                "the pages of this search are no longer kept: start again without the cursor",
                field="cursor",
                reason="CURSOR_EXPIRED",
            )
        self._kept.move_to_end(name)
        asked, ranking = self._kept[name]
        if asked != question or place > len(ranking.numbers):
            raise InvalidArgument(
                "the cursor belongs to a call that asked for something else", field="cursor"
            )
        return name, ranking, place


def cursor(name: str, place: int) -> str:
    return f"{name}.{place}"
