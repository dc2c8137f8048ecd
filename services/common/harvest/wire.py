"""States as messages of `Harvest`: a header that lists the arrays, then their bytes in pieces."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tdb.inference.v1 import harvest_pb2
from tdb.type.v1 import tensor_pb2

from services.common.harvest.state import Array, Keep, State

PIECE_BYTES = 2**20

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.type.v1.tensor_pb2 import _DataType

    _DTYPES: "dict[_DataType.ValueType, np.dtype[Any]]"

_DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


def header(state: State) -> harvest_pb2.HarvestState:
    """What says how to read the pieces."""
    return harvest_pb2.HarvestState(
        group=state.group,
        count=state.count,
        window=state.window,
        arrays=[
            harvest_pb2.HarvestArray(
                name=name, data_type=_DATA_TYPES[array.dtype], shape=array.shape
            )
            for name, array in state.arrays.items()
        ],
    )


def pieces(state: State) -> Iterator[bytes]:
    """The bytes of the arrays in the order of the header, at most PIECE_BYTES at a time."""
    for array in state.arrays.values():
        data: Array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES].tobytes()


class Incoming:
    """A state that is being received."""

    def __init__(self, message: harvest_pb2.HarvestState, keep: Keep) -> None:
        """keep: what the request asked to keep."""
        self._message, self._keep = message, keep
        self._arrays: dict[str, Array] = {
            each.name: np.empty(list(each.shape), _DTYPES[each.data_type])
            for each in message.arrays
        }
        self._left: list[Array] = [
            array.reshape(-1).view(np.uint8)
            for array in self._arrays.values()
            if math.prod(array.shape)
        ]

    def add(self, piece: bytes) -> None:
        """Takes the next piece. Raises ValueError where it does not fit in."""
        if not self._left or len(piece) > len(self._left[0]):
            raise ValueError(f"{self._message.group}: more bytes than its header lists")
        self._left[0][: len(piece)] = np.frombuffer(piece, np.uint8)
        self._left[0] = self._left[0][len(piece) :]
        if not len(self._left[0]):
            del self._left[0]

    @property
    def is_whole(self) -> bool:
        return not self._left

    def state(self) -> State:
        """Raises ValueError where pieces are missing."""
        if not self.is_whole:
            raise ValueError(f"{self._message.group}: pieces of its state are missing")
        window = self._message.window if self._message.HasField("window") else None
        return State(self._message.group, self._keep, self._message.count, window, self._arrays)
