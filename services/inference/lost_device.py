"""A lost device: an error after which every later call on it fails, told by its text."""

_LOST = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ECC error",
    "CUDA error: unknown error",
    "device is lost",
)
"""After one of these only a new process helps."""


def is_lost(error: BaseException) -> bool:
    """Whether the device can no longer be used by this process."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(each in text for each in _LOST)
