"""No bytes but those written under a key are taken for its value."""

import hashlib
import pickle
import zlib

import pytest

from services.common.cache import values
from services.common.cache.cache import MAX_VALUE_BYTES

TEXT = b"the cat sat on the mat, " * 100
NOISE = hashlib.shake_256(b"seed").digest(5000)


@pytest.mark.parametrize("value", [b"", b"short", TEXT, NOISE, TEXT[:1024]])
def test_a_value_comes_back(value: bytes) -> None:
    assert values.unpack("k", values.pack("k", value)) == value


def test_it_is_deflated_only_where_that_pays() -> None:
    assert values.pack("k", TEXT)[0] == values.DEFLATED
    assert len(values.pack("k", TEXT)) < len(TEXT) / 5
    assert values.pack("k", NOISE)[0] == values.PLAIN
    assert values.pack("k", TEXT[:1024])[0] == values.PLAIN
    overhead = 1 + values.DIGEST_BYTES
    assert len(values.pack("k", NOISE)) == len(NOISE) + overhead


@pytest.mark.parametrize("value", [b"short", TEXT, NOISE[:200]])
def test_every_flipped_bit_is_found(value: bytes) -> None:
    packed = values.pack("k", value)
    for place in range(len(packed)):
        for bit in range(8):
            damaged = bytearray(packed)
            damaged[place] ^= 1 << bit
            with pytest.raises(values.Damaged):
                values.unpack("k", bytes(damaged))


@pytest.mark.parametrize("value", [b"short", TEXT, NOISE[:200]])
def test_every_cut_is_found(value: bytes) -> None:
    packed = values.pack("k", value)
    for length in range(len(packed)):
        with pytest.raises(values.Damaged):
            values.unpack("k", packed[:length])
    with pytest.raises(values.Damaged):
        values.unpack("k", packed + b"\0")


def test_the_value_of_another_key_is_none() -> None:
    with pytest.raises(values.Damaged):
        values.unpack("other", values.pack("k", b"value"))
    # Key and value are two things, not their concatenation.
    longer = values.pack("k", b"v")
    with pytest.raises(values.Damaged):
        values.unpack("kv", longer[:-1])


def test_a_pickle_is_no_value() -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("it was unpickled",)

    with pytest.raises(values.Damaged):
        values.unpack("k", pickle.dumps(Trap()))


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(b"\0" * (MAX_VALUE_BYTES + 1))
    sealed = values._sealed("k", values.DEFLATED, bomb)
    with pytest.raises(values.Damaged):
        values.unpack("k", sealed)
    fits = values._sealed("k", values.DEFLATED, zlib.compress(b"\0" * MAX_VALUE_BYTES))
    assert values.unpack("k", fits) == b"\0" * MAX_VALUE_BYTES
