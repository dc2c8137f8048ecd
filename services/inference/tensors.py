"""Tensors of the API: dtype, shape and little-endian bytes."""

from collections.abc import Iterator

import numpy as np
import torch
from tdb.type.v1 import tensor_pb2

from services.common.errors import InvalidArgument

_NUMPY = {
    tensor_pb2.DATA_TYPE_FLOAT32: "<f4",
    tensor_pb2.DATA_TYPE_FLOAT64: "<f8",
    tensor_pb2.DATA_TYPE_FLOAT16: "<f2",
}

DATA_TYPES = {
    torch.float32: tensor_pb2.DATA_TYPE_FLOAT32,
    torch.float64: tensor_pb2.DATA_TYPE_FLOAT64,
    torch.float16: tensor_pb2.DATA_TYPE_FLOAT16,
    torch.bfloat16: tensor_pb2.DATA_TYPE_BFLOAT16,
    torch.int32: tensor_pb2.DATA_TYPE_INT32,
}


def read_vector(message: tensor_pb2.Tensor) -> torch.Tensor:
    """A tensor of one axis, float64 on the CPU. Raises InvalidArgument; every value is finite."""
    if message.data_type not in _NUMPY and message.data_type != tensor_pb2.DATA_TYPE_BFLOAT16:
        raise InvalidArgument(
            "a vector's data type is FLOAT32, FLOAT64, FLOAT16 or BFLOAT16", field="data_type"
        )
    if len(message.shape) != 1 or message.shape[0] < 1:
        raise InvalidArgument(
            f"a vector has one axis, this has shape {list(message.shape)}", field="shape"
        )
    bfloat = message.data_type == tensor_pb2.DATA_TYPE_BFLOAT16
    dtype = np.dtype("<i2" if bfloat else _NUMPY[message.data_type])
    expected = message.shape[0] * dtype.itemsize
    if len(message.data) != expected:
        raise InvalidArgument(
            f"shape {list(message.shape)} needs {expected} bytes, there are {len(message.data)}",
            field="data",
        )
    vector = torch.from_numpy(np.frombuffer(message.data, dtype).copy())
    if bfloat:
        vector = vector.view(torch.bfloat16)
    vector = vector.double()
    if not torch.isfinite(vector).all():
        raise InvalidArgument("every value must be finite", field="data", reason="NON_FINITE")
    return vector


def write(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """A contiguous tensor on the CPU, as it is."""
    return tensor_pb2.Tensor(
        data_type=DATA_TYPES[tensor.dtype],
        shape=tensor.shape,
        data=b"".join(pieces(tensor, 2**20)),
    )


def pieces(tensor: torch.Tensor, size: int) -> Iterator[bytes]:
    """Bytes of a contiguous tensor on the CPU, row-major and little-endian, `size` at a time."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(data), size):
        yield data[start : start + size].tobytes()
