"""Tensors go over the wire as they are, whatever their type, in pieces of any size."""

import pytest
import torch
from tdb.type.v1 import tensor_pb2

from services.common.errors import InvalidArgument
from services.inference import tensors


@pytest.mark.parametrize("dtype", [each for each in tensors.DATA_TYPES if each.is_floating_point])
def test_a_vector_comes_back_as_it_went(dtype: torch.dtype) -> None:
    vector = torch.linspace(-3, 5, 11).to(dtype)
    message = tensors.write(vector)
    assert message.data_type == tensors.DATA_TYPES[dtype]
    assert list(message.shape) == [11]
    assert len(message.data) == 11 * dtype.itemsize
    assert torch.equal(tensors.read_vector(message), vector.double())


def test_whole_numbers_are_sent_and_are_no_vector() -> None:
    message = tensors.write(torch.tensor([3, -1, 2**31 - 1], dtype=torch.int32))
    assert message.data_type == tensor_pb2.DATA_TYPE_INT32
    assert message.data == bytes.fromhex("03000000ffffffffffffff7f")
    with pytest.raises(InvalidArgument, match="FLOAT32"):
        tensors.read_vector(message)


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_pieces_are_row_major_and_little_endian(size: int) -> None:
    tensor = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
    pieces = list(tensors.pieces(tensor, size))
    assert {len(each) for each in pieces[:-1]} <= {size}
    assert b"".join(pieces) == tensor.numpy().astype("<f4").tobytes()
    assert tensors.write(tensor).data_type == tensor_pb2.DATA_TYPE_FLOAT32
