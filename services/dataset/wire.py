"""The little of protobuf's encoding that is needed to put messages together from stored bytes."""


def varint(number: int) -> bytes:
    """A number, or a length, from 0."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def field(number: int, data: bytes) -> bytes:
    """A field that is a message, text or bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data
