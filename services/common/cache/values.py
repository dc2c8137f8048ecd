"""Values as they lie in Redis, so that nothing but what this program wrote is ever taken for one.

    format byte | 16 bytes | body

The body is the value, or the value deflated where that pays. The 16 bytes are a BLAKE2b digest of
key, format and body: bits that flipped, a value cut short, and the value of another key (the reply
to another command, after a fault in a client library) are all told from the real one. Bytes only:
there is nothing in them that could run.
"""

import hashlib
import zlib

from services.common.cache.cache import MAX_VALUE_BYTES

PLAIN, DEFLATED = 1, 2
WORTH_TRYING_BYTES = 1024
WORTH_KEEPING = 0.9
"""Of the length: deflated values that are longer than this share are kept as they are."""
DIGEST_BYTES = 16


class Damaged(Exception):
    """Bytes that are not what was written under the key."""


def pack(key: str, value: bytes) -> bytes:
    if len(value) > WORTH_TRYING_BYTES:
        deflated = zlib.compress(value, level=1)
        if len(deflated) < WORTH_KEEPING * len(value):
            return _sealed(key, DEFLATED, deflated)
    return _sealed(key, PLAIN, value)


def unpack(key: str, packed: bytes) -> bytes:
    """The value. Raises Damaged."""
    if len(packed) <= DIGEST_BYTES or packed[0] not in (PLAIN, DEFLATED):
        raise Damaged
    form, body = packed[0], packed[1 + DIGEST_BYTES :]
    if packed != _sealed(key, form, body):
        raise Damaged
    return body if form == PLAIN else _inflate(body)


def _sealed(key: str, form: int, body: bytes) -> bytes:
    digest = hashlib.blake2b(key.encode() + bytes([0, form]), digest_size=DIGEST_BYTES)
    digest.update(body)
    return bytes([form]) + digest.digest() + body


def _inflate(body: bytes) -> bytes:
    inflating = zlib.decompressobj()
    try:
        value = inflating.decompress(body, MAX_VALUE_BYTES)
    except zlib.error:
        raise Damaged from None
    if not inflating.eof:
        raise Damaged
    return value
