"""What components promote and suppress, as the inference service says it of many at once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tdb.dataset.v1 import record_pb2
from tdb.inference.v1 import output_tokens_pb2
from tdb.type.v1 import tensor_pb2

from services.dataset.building.array_file import Array

COUNT = 10
"""Tokens on either side that a record names."""


@dataclass(frozen=True)
class OutputTokens:
    """Of neighbouring components: ids and scores [n, k], the largest and the smallest first."""

    first: int
    promoted: tuple[Array, Array]
    suppressed: tuple[Array, Array]

    @classmethod
    def joined(cls, blocks: Iterable[output_tokens_pb2.OutputTokens]) -> "OutputTokens":
        """Of blocks that follow one another, at least one."""
        found = list(blocks)
        promoted = [(_array(each.promoted), _array(each.promoted_scores)) for each in found]
        suppressed = [(_array(each.suppressed), _array(each.suppressed_scores)) for each in found]
        return cls(found[0].first, _joined(promoted), _joined(suppressed))

    def add_to(self, record: record_pb2.ComponentRecord, index: int) -> None:
        """To the record of component `index`. A score of 0 promotes nothing and suppresses nothing,
        and where the vocabulary is small, the most suppressed may still be promoted."""
        row = index - self.first
        record.promoted.extend(_scores(self.promoted, row, sign=1))
        record.suppressed.extend(_scores(self.suppressed, row, sign=-1))


def _joined(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([each for _, each in parts])


def _scores(side: tuple[Array, Array], row: int, sign: int) -> Iterator[record_pb2.TextScore]:
    for token, score in zip(side[0][row].tolist(), side[1][row].tolist(), strict=True):
        if score * sign > 0:
            yield record_pb2.TextScore(token_id=token, score=score)


def _array(message: tensor_pb2.Tensor) -> NDArray[np.int32] | NDArray[np.float32]:
    is_ids = message.data_type == tensor_pb2.DATA_TYPE_INT32
    found: Array = np.frombuffer(message.data, "<i4" if is_ids else "<f4")
    return found.reshape(list(message.shape))
